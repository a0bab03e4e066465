"""A small model for the download tests, and assertions on its directory."""

from __future__ import annotations

import ctypes
import hashlib
import random
from pathlib import Path

from port_kit.download import GitCode, Policy, Recipe, Report, download
from port_kit.testing.gitserver import GitRemote
from port_kit.testing.hub import Hub

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


def bring(recipe: Recipe, directory: Path, hub: Hub, **options: object) -> Report:
    """Download with short timeouts, without token and cache."""
    defaults = {"endpoint": hub.endpoint, "policy": IMPATIENT, "use_cache": False, "token": False}
    return download(recipe, directory, **{**defaults, **options})  # type: ignore[arg-type]


def assert_whole(directory: Path, expected: dict[str, bytes] = EXPECTED) -> None:
    """Assert that all files have the expected content and that no temporary file is left."""
    for target, content in expected.items():
        assert (directory / target).read_bytes() == content, target
    assert (directory / "model_index.json").is_file()
    assert orphans(directory) == []


def orphans(directory: Path) -> list[str]:
    """Return files that a finished download must not leave: partial downloads, journals, temporary files."""
    found = [path for path in directory.rglob("*") if path.is_file() and path.suffix == ".tmp"]
    found += [path for path in (directory / ".port_kit").rglob("*") if path.name != "lock"]
    return [str(path.relative_to(directory)) for path in found]


def hashes(directory: Path) -> dict[str, str]:
    """sha256 of every file of a model directory."""
    files = [path for path in directory.rglob("*") if path.is_file() and ".port_kit" not in path.parts]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def without_privileges() -> None:
    """For ``preexec_fn``: make file permissions apply to the new program, even if it runs as root.

    Both capabilities that pass over them leave the bounding set, so that a program that is executed has neither.
    """
    drop = 24  # PR_CAPBSET_DROP
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(drop, capability, 0, 0, 0)  # refused to plain users, who have neither anyway


PACKAGE = {"zz_model/__init__.py": "value = 1\n", "utils/__init__.py": "", "tests/__init__.py": ""}


def pinned(remote: GitRemote) -> str:
    """The first commit."""
    return remote.git("rev-parse", "pinned").strip()


def code(url: str, commit: str | None = None, **fields: object) -> GitCode:
    """Git code with one package."""
    return GitCode("zz_code", url, **{"packages": ("zz_model",), "commit": commit, **fields})  # type: ignore[arg-type]
