"""Assemble DreamID-Omni's model directory: plan, fetch, verify, convert, lock, and model_index.json last.

python download_dreamid_omni.py --output-dir dreamid_omni [--dry-run]      # all options: --help
python download_dreamid_omni.py --output-dir tiny --tiny                   # a tiny model from a loopback Hub
"""

from port_kit.cli.download import main

if __name__ == "__main__":
    main("dreamid_omni")
