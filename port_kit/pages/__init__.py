"""Pages of the documentation that are generated: ``docs/cli.md`` and ``docs/troubleshooting.md``.

``python -m port_kit.pages`` writes them; a test compares what is committed with what the code says.
"""
