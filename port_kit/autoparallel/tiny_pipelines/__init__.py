"""Tiny pipelines of diffusers, for tests of hosted pipelines. One function per pipeline, without files to fetch."""

from port_kit.autoparallel.tiny_pipelines.case import TinyPipeline, write_pipeline
from port_kit.autoparallel.tiny_pipelines.cases import CASES

__all__ = ["CASES", "TinyPipeline", "write_pipeline"]
