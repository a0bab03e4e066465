"""Assemble DreamID-Omni's model directory: plan, fetch, verify, convert, lock, and model_index.json last.

python download_dreamid_omni.py --output-dir dreamid_omni [--dry-run]      # all options: --help
python download_dreamid_omni.py --output-dir tiny --tiny                   # a tiny model from a loopback Hub
"""

import sys

from port_kit.cli.download import main
from port_kit.models.dreamid_omni.recipe import RECIPE
from port_kit.testing import tiny_fusion

if __name__ == "__main__":
    tiny_fusion.main(RECIPE) if "--tiny" in sys.argv else main("dreamid_omni")
