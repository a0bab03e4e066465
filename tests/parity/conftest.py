"""A fake of the original code, served over git, and a tiny model for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from port_kit.download import Recipe, download
from port_kit.models.dreamid_omni import recipe as shipped
from port_kit.testing.gitserver import GitRemote, GitServer
from port_kit.testing.hub import Hub
from port_kit.testing.tiny_fusion import tiny_fusion_model
from tests.parity.fake_original_code import fake_original_files, with_code


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
    """A data folder of these tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PORT_KIT_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield patch


@pytest.fixture(scope="session")
def remote(environment: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GitRemote]:
    """The fake's repository; the port's recipe fetches its code from there, over http."""
    folder = tmp_path_factory.mktemp("git")
    made = GitRemote(folder / "original", fake_original_files())
    with GitServer(folder) as server:
        (code,) = shipped.RECIPE.code
        recipe = replace(shipped.RECIPE, code=(replace(code, url=server.url("original"), commit=made.head),))
        environment.setattr(shipped, "RECIPE", recipe)
        yield made


@pytest.fixture(scope="session")
def model(remote: GitRemote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, downloaded from a loopback Hub; the fake is fetched and in its lock."""
    folder = tmp_path_factory.mktemp("reference")
    tiny = tiny_fusion_model(shipped.RECIPE, folder / "hub")
    recipe: Recipe = shipped.RECIPE.with_(configs=tiny.configs)
    with Hub(tiny.repositories) as hub:
        directory = download(recipe, folder / "model", endpoint=hub.endpoint, token=False, use_cache=False).directory
    return with_code(directory, shipped.RECIPE.code[0], remote.head)
