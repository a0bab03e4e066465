"""Parallel plans for unmodified modules: observe, infer, write a plan file, apply, prove.

:mod:`~port_kit.autoparallel.subject` describes a module to observe, :mod:`~port_kit.autoparallel.plan` the plan file.
"""
