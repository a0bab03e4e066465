"""Generated pages of the documentation: ``docs/cli.md``, ``docs/troubleshooting.md``, drawings.

``python -m port_kit.docgen`` writes them. A test compares the committed pages with the generated ones.
"""
