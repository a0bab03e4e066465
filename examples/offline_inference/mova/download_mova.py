"""Assemble MOVA's model directory: plan, fetch, verify, lock, and model_index.json last.

python download_mova.py --output-dir mova [--variant 360p] [--dry-run]      # all options: --help
python download_mova.py --output-dir tiny --tiny                            # a tiny model from a loopback Hub
"""

from port_kit.cli.download import main

if __name__ == "__main__":
    main("mova")
