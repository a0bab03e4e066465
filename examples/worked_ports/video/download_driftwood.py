"""Assemble the model directory of driftwood: plan, fetch, verify, lock.

python download_driftwood.py --output-dir MODEL [--dry-run]      # all options: --help
python download_driftwood.py --output-dir TINY --tiny            # a tiny model from a loopback Hub
"""

from __future__ import annotations

import os
from pathlib import Path

from port_kit.cli.download import main

# The port is found without being installed.
os.environ["PORT_KIT_PATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PORT_KIT_PATH", "")])

if __name__ == "__main__":
    main("driftwood")
