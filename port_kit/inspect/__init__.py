"""Inspection of repositories and folders: support in vLLM-Omni and the next step, from listings and headers alone.

>>> from port_kit.inspect import inspect
>>> inspect("org/model").path                                                     # doctest: +SKIP
'diffusers'
"""

from __future__ import annotations

from port_kit.inspect.inspection import inspect
from port_kit.inspect.render import describe
from port_kit.inspect.report import Component, Finding, Inspection, Memory, ModelCard, WeightFile

__all__ = ["Component", "Finding", "Inspection", "Memory", "ModelCard", "WeightFile", "describe", "inspect"]
