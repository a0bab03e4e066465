"""What the download tests share: a Hub with a small model, its recipe, and impatience."""

from __future__ import annotations

import ctypes
import hashlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from port_kit.download import FileRule, GitCode, Policy, Recipe, Report, Repository, download
from port_kit.testing.gitserver import GitRemote
from port_kit.testing.hub import Hub

for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy", "HF_ENDPOINT"):
    os.environ.pop(name, None)
os.environ["NO_PROXY"] = "127.0.0.1,localhost"

IMPATIENT = Policy(connect_timeout=2, read_timeout=0.6, attempts=4, base=0.02, longest=5, segment_size=1 << 20)
WEIGHTS, VAE, VOCAB = "org/model", "org/vae", "org/words"
MODEL_INDEX = {"_class_name": "TestPipeline", "_diffusers_version": "0.40.0"}


def noise(size: int, seed: int = 0) -> bytes:
    """Bytes that do not repeat."""
    return random.Random(seed).randbytes(size)


FILES = {
    WEIGHTS: {"big.safetensors": noise(5 << 20, 1), "README.md": b"read me"},
    VAE: {"vae.safetensors": noise(300_000, 2)},
    VOCAB: {"words/spiece.model": noise(5000, 3), "words/tokenizer.json": b"{}", "words/empty.txt": b""},
}
EXPECTED = {
    "transformer/big.safetensors": FILES[WEIGHTS]["big.safetensors"],
    "vae/vae.safetensors": FILES[VAE]["vae.safetensors"],
    "tokenizer/spiece.model": FILES[VOCAB]["words/spiece.model"],
    "tokenizer/tokenizer.json": b"{}",
    "tokenizer/empty.txt": b"",
}


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


def bring(recipe: Recipe, directory: Path, hub: Hub, **options: object) -> Report:
    """Download impatiently, without token and cache."""
    defaults = {"endpoint": hub.endpoint, "policy": IMPATIENT, "use_cache": False, "token": False}
    return download(recipe, directory, **{**defaults, **options})  # type: ignore[arg-type]


def assert_whole(directory: Path, expected: dict[str, bytes] = EXPECTED) -> None:
    """All files are there with the right content, and nothing that should not be."""
    for target, content in expected.items():
        assert (directory / target).read_bytes() == content, target
    assert (directory / "model_index.json").is_file()
    assert orphans(directory) == []


def orphans(directory: Path) -> list[str]:
    """What a finished download must not leave: parts, journals, temporary files."""
    found = [path for path in directory.rglob("*") if path.is_file() and path.suffix == ".tmp"]
    found += [path for path in (directory / ".port_kit").rglob("*") if path.name != "lock"]
    return [str(path.relative_to(directory)) for path in found]


def hashes(directory: Path) -> dict[str, str]:
    """sha256 of every file of a model directory."""
    files = [path for path in directory.rglob("*") if path.is_file() and ".port_kit" not in path.parts]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def without_privileges() -> None:
    """For ``preexec_fn``: rights on files count for the new program, even where it runs as root.

    Both capabilities that pass over them leave the bounding set, so that a program that is executed has neither.
    """
    drop = 24  # PR_CAPBSET_DROP
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(drop, capability, 0, 0, 0)  # refused to plain users, who have neither anyway


PACKAGE = {"zz_model/__init__.py": "value = 1\n", "utils/__init__.py": "", "tests/__init__.py": ""}


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


def pinned(remote: GitRemote) -> str:
    """The first commit."""
    return remote.git("rev-parse", "pinned").strip()


def code(url: str, commit: str | None = None, **fields: object) -> GitCode:
    """Git code with one package."""
    return GitCode("zz_code", url, **{"packages": ("zz_model",), "commit": commit, **fields})  # type: ignore[arg-type]
