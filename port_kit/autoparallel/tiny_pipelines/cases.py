"""All tiny pipelines."""

from __future__ import annotations

from port_kit.autoparallel.tiny_pipelines import edits, images, images_llm, videos
from port_kit.autoparallel.tiny_pipelines.case import TinyPipeline

#: Tiny pipelines by class name.
CASES: dict[str, TinyPipeline] = {**images.CASES, **images_llm.CASES, **videos.CASES, **edits.CASES}
