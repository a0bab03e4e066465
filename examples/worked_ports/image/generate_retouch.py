"""A prompt to an image, through vLLM-Omni's own engine.

python generate_retouch.py --model DIR --prompt "..." -o out.png        # all options: --help
python generate_retouch.py --model TINY --tiny -o out.png               # sizes of the tiny model
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from port_kit.cli.generate import run
from port_kit.registry import find_port

# The port is found without being installed, by the engine's processes, too.
os.environ["PORT_KIT_PATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PORT_KIT_PATH", "")])

if __name__ == "__main__":
    raise SystemExit(run(find_port("retouch"), sys.argv[1:]))
