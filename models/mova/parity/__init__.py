"""Golden cases of MOVA, in the order in which the pipeline computes.

Folder layout (``SET.json`` holds all dimensions)::

    SET.json  ckpts/<name>/  scheduler/  text_encoder/  video_vae/  audio_vae/  transformer/<case>/  e2e*/  e2e_media/

``ckpts/<name>`` is a repository in the original's layout, with a ``config.json`` per component.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from port_kit.models.mova.parity import component_cases, pipeline_cases, transformer_cases
from port_kit.models.mova.parity.goldens import Goldens
from port_kit.parity import Case


def cases(folder: Path) -> Iterator[Case]:
    """Yield all golden cases of a folder.

    Raises:
        ParityError: the folder has no checkpoint.
    """
    goldens = Goldens.open(folder)
    yield from component_cases.cases(goldens)
    yield from transformer_cases.cases(goldens)
    yield from pipeline_cases.cases(goldens)
