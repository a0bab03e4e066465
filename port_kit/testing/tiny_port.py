"""The tiny model of a port: random weights under the published names, downloaded from a loopback Hub as the real one.

A port names it in :attr:`~port_kit.port.Port.tiny_model`, as one of

* a mapping from folders of the model directory to :class:`~port_kit.testing.tiny.TinyComponent`,
  :class:`~port_kit.testing.tiny.TinyPretrained` or :class:`~port_kit.testing.tiny.TinyTokenizer`,
* a function of a recipe and a folder that returns a :class:`~port_kit.testing.tiny.TinyModel`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, cast

from port_kit.download import Recipe, Report, download
from port_kit.errors import PortKitError
from port_kit.port import Port, lookup, resolve
from port_kit.testing.hub import Hub
from port_kit.testing.tiny import TinyModel, tiny_repositories


def tiny_model_of(port: Port, folder: Path, recipe: Recipe | None = None, *, trained: bool = False) -> TinyModel:
    """Write the tiny model of a port into ``folder``, laid out as the recipe's Hub repositories.

    Args:
        port: the port.
        folder: the files go to ``folder/<repository id>/<path>``.
        recipe: of a variant; default: the port's.
        trained: take :attr:`~port_kit.port.Port.trained_model` instead of random weights.

    Raises:
        PortKitError: ``port_invalid``; the port has no such model.
    """
    if trained and not port.trained_model:
        raise PortKitError(
            f"port {port.name} has no trained tiny model",
            code="port_invalid",
            hint=f"take random weights: port-kit download {port.name} --tiny",
        )
    declared: Any = lookup(port.trained_model if trained else port.tiny_model)
    if declared is None:
        raise PortKitError(
            f"port {port.name} has no tiny model: {port.tiny_model} does not exist",
            code="port_invalid",
            hint=f"add TINY to {port.package}.config, or set the port's tiny_model",
        )
    recipe = recipe or cast(Recipe, resolve(port.recipe))
    tiny: TinyModel = declared(recipe, folder) if callable(declared) else tiny_repositories(recipe, declared, folder)
    return tiny


def download_tiny(
    port: Port,
    output_dir: Path | str,
    *,
    recipe: Recipe | None = None,
    dry_run: bool = False,
    trained: bool = False,
) -> Report:
    """Serve the tiny model of a port on the loopback interface, and download it as the real one.

    Args:
        port: the port.
        output_dir: the model directory.
        recipe: of a variant; default: the port's.
        dry_run: only plan.
        trained: trained weights instead of random ones.
    """
    recipe = recipe or cast(Recipe, resolve(port.recipe))
    with tempfile.TemporaryDirectory(prefix="port-kit-") as folder:
        tiny = tiny_model_of(port, Path(folder), recipe, trained=trained)
        unpinned = recipe.with_(revisions={repository.repo_id: None for repository in recipe.repositories})
        with Hub(tiny.repositories) as hub:
            return download(
                tiny.recipe(unpinned), output_dir, dry_run=dry_run, endpoint=hub.endpoint, token=False, use_cache=False
            )
