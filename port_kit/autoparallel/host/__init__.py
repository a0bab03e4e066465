"""vLLM-Omni pipelines that host a directory of a diffusers pipeline, with its transformer adapted by a plan.

:mod:`port_kit.runtime.hosts` has the names under which they are registered.
"""
