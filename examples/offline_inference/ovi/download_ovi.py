"""Assemble Ovi's model directory: plan, fetch, verify, convert, lock, and model_index.json last.

python download_ovi.py --output-dir ovi [--variant 960x960_10s] [--dry-run]      # all options: --help
python download_ovi.py --output-dir tiny --tiny                                  # a tiny model from a loopback Hub
"""

from port_kit.cli.download import main

if __name__ == "__main__":
    main("ovi")
