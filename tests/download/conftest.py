"""Fixtures of the download tests: a Hub with a small model, its recipe, and a git repository."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from port_kit.download import FileRule, Recipe, Repository
from port_kit.testing.gitserver import GitRemote
from port_kit.testing.hub import Hub
from tests.download.helpers import FILES, MODEL_INDEX, PACKAGE, VAE, VOCAB, WEIGHTS

for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy", "HF_ENDPOINT"):
    os.environ.pop(name, None)
os.environ["NO_PROXY"] = "127.0.0.1,localhost"


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A Hub with three repositories."""
    with Hub(FILES) as running:
        yield running


@pytest.fixture
def recipe(hub: Hub) -> Recipe:
    """A recipe that takes all but the README, pinned."""
    return Recipe(
        "small",
        (
            Repository(WEIGHTS, (FileRule("big.safetensors", "transformer"),), hub.commit(WEIGHTS)),
            Repository(VAE, (FileRule("*.safetensors", "vae"),), hub.commit(VAE)),
            Repository(VOCAB, (FileRule("words/*", "tokenizer"),), hub.commit(VOCAB)),
        ),
        MODEL_INDEX,
        {"transformer": {"layers": 2}, "vae": {}},
    )


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder of this test's own, and a HOME with a configuration that must have no effect."""
    monkeypatch.setenv("PORT_KIT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    (tmp_path / "user").mkdir()
    return tmp_path / "home"


@pytest.fixture
def remote(tmp_path: Path) -> GitRemote:
    """A repository with two commits; the first is the one that recipes pin."""
    made = GitRemote(tmp_path / "remotes/code", PACKAGE)
    made.git("tag", "pinned")
    made.commit({"zz_model/__init__.py": "value = 2\n"})
    return made
