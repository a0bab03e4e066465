"""Tiny configurations of the transformer classes of diffusers, and their inputs.

Each case varies in depth, heads and width of the model, and in image, text and audio tokens and batch of the inputs.
``CASES`` maps the name of a class to a function that returns its :class:`~port_kit.autoparallel.subject.Subject`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from port_kit.autoparallel.diffusers_cases import audio, flux, hunyuan, image_cross, image_joint, video, wan
from port_kit.autoparallel.subject import Subject

_MODULES = (audio, flux, hunyuan, image_cross, image_joint, video, wan)

CASES: dict[str, Callable[[], Subject]] = {
    name: partial(case.subject, name) for module in _MODULES for name, case in sorted(module.CASES.items())
}
