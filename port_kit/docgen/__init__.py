"""Pages of the documentation that are generated: ``docs/cli.md``, ``docs/troubleshooting.md``, pictures.

``python -m port_kit.docgen`` writes them; a test compares what is committed with what the code says.
"""
