"""``python -m port_kit`` is ``port-kit``."""

from port_kit.cli import main

main(prog_name="port-kit")
