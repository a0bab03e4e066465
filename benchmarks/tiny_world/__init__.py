"""A world of bouncing shapes with a tone at each bounce: its prompts, clips and scores, and a tiny Ovi trained on it.

The world is small enough that the truth of every prompt can be drawn and measured. :mod:`.grammar` has the prompts,
:mod:`.clips` draws pixels and sound, :mod:`.scores` measures them without learned parts, :mod:`.train` trains the
parts of the model, and :mod:`.release` packs them for :mod:`port_kit.testing.tiny_trained`.
"""
