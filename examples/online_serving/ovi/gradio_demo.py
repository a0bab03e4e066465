"""A web page for Ovi, over a running server or one that it starts.

python gradio_demo.py --url http://127.0.0.1:8000
python gradio_demo.py --model DIR [options of port-kit serve]
"""

from __future__ import annotations

import sys

from port_kit.cli import main

if __name__ == "__main__":
    main(["page", "ovi", *sys.argv[1:]])
