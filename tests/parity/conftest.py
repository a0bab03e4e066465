"""A stand-in for the original code, served over git, and a tiny model that belongs to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from port_kit.download import GitCode, Recipe, download
from port_kit.download.gitcode import fetch_code
from port_kit.download.lock import read_lock
from port_kit.models.dreamid_omni import recipe as shipped
from port_kit.testing.gitserver import GitRemote, GitServer
from port_kit.testing.hub import Hub
from port_kit.testing.tiny_fusion import tiny_fusion_model

FAKE_ORIGINAL = Path(__file__).parent / "fake_original"


def fake_original_files() -> dict[str, bytes]:
    """The stand-in's files by their path in its repository."""
    return {path.relative_to(FAKE_ORIGINAL).as_posix(): path.read_bytes() for path in FAKE_ORIGINAL.rglob("*.py")}


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
    """A data folder of these tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PORT_KIT_HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield patch


@pytest.fixture(scope="session")
def remote(environment: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GitRemote]:
    """The stand-in's repository; the recipe that the port names fetches its code from there, over http."""
    folder = tmp_path_factory.mktemp("git")
    made = GitRemote(folder / "original", fake_original_files())
    with GitServer(folder) as server:
        (code,) = shipped.RECIPE.code
        recipe = replace(shipped.RECIPE, code=(replace(code, url=server.url("original"), commit=made.head),))
        environment.setattr(shipped, "RECIPE", recipe)
        yield made


@pytest.fixture(scope="session")
def model(remote: GitRemote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, downloaded from a loopback Hub; the stand-in is fetched and stands in its lock."""
    folder = tmp_path_factory.mktemp("reference")
    tiny = tiny_fusion_model(shipped.RECIPE, folder / "hub")
    recipe: Recipe = shipped.RECIPE.with_(configs=tiny.configs)
    with Hub(tiny.repositories) as hub:
        directory = download(recipe, folder / "model", endpoint=hub.endpoint, token=False, use_cache=False).directory
    return with_code(directory, shipped.RECIPE.code[0], remote.head)


def with_code(directory: Path, code: GitCode, commit: str) -> Path:
    """Fetch one commit and note it in the lock: what ``--with-reference`` does, less the entry in site-packages."""
    fetch_code(code, commit)
    lock = read_lock(directory)
    assert lock is not None
    lock.code[code.name] = {"url": code.url, "commit": commit}
    lock.save(directory)
    return directory
