"""The tiny model of a port that runs a pipeline of diffusers."""

from __future__ import annotations

import json
from pathlib import Path

from port_kit.autoparallel.tiny_pipelines.case import TinyPipeline, write_pipeline
from port_kit.autoparallel.tiny_pipelines.cases import CASES
from port_kit.download import FileRule, Recipe
from port_kit.errors import PortKitError
from port_kit.port import HostedPort
from port_kit.registry import find_port
from port_kit.testing.tiny import TinyModel


def tiny_model(recipe: Recipe, folder: Path) -> TinyModel:
    """Write the tiny pipeline of a port's class, laid out as its Hub repository.

    Raises:
        PortKitError: ``port_invalid``; there is no tiny pipeline of the class.
    """
    port = find_port(recipe.name)
    assert isinstance(port, HostedPort)
    root = write_pipeline(port.hosted, tiny_case(port), folder / recipe.repositories[0].repo_id)
    index = json.loads((root / "model_index.json").read_text(encoding="utf-8"))
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    return TinyModel(
        {recipe.repositories[0].repo_id: files},
        configs={},
        model_index={**index, "_class_name": port.class_name},
        files=(FileRule("*/*"),),
    )


def tiny_case(port: HostedPort) -> TinyPipeline:
    """Return the tiny pipeline of a port's class.

    Raises:
        PortKitError: ``port_invalid``; there is none.
    """
    if port.hosted not in CASES:
        raise PortKitError(
            f"port {port.name}: expected a tiny pipeline of {port.hosted}, found none",
            code="port_invalid",
            hint="set tiny_model of PORT to a function of a recipe and a folder that returns a TinyModel",
            known=sorted(CASES),
        )
    return CASES[port.hosted]
