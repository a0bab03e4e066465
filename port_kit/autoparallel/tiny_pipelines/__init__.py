"""Tiny pipelines of diffusers, for tests of hosted pipelines. One function per pipeline, without files to fetch."""

from port_kit.autoparallel.tiny_pipelines import images, images_llm, videos
from port_kit.autoparallel.tiny_pipelines.case import TinyPipeline, write_pipeline

#: Tiny pipelines by class name.
CASES: dict[str, TinyPipeline] = {**images.CASES, **images_llm.CASES, **videos.CASES}

__all__ = ["CASES", "TinyPipeline", "images", "images_llm", "videos", "write_pipeline"]
