"""The contributions in ``docs/upstream``: each applies to the installed release, and makes its failing tests pass."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from email import message_from_string
from importlib.util import find_spec
from pathlib import Path

import pytest

from port_kit.upstream.registry import PATCHES
from port_kit.upstream.series import SERIES, installed_series

FOLDER = Path(__file__).parents[2] / "docs" / "upstream"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
NAMES = sorted(path.stem for path in FOLDER.glob("*.patch"))
#: Test of README.md of a fault that upstream has fixed, and its outcome by series.
FIXED = "tests/test_audio_sample_rate.py"
FIXED_OUTCOME = dict(zip(SERIES, ("FAILED", "PASSED"), strict=True))

Outcomes = dict[str, list[str]]


def _patch(name: str) -> Path:
    """Return a patch for the installed series."""
    own = FOLDER / installed_series() / f"{name}.patch"
    return own if own.exists() else FOLDER / f"{name}.patch"


def _files(patch: Path) -> list[str]:
    return re.findall(r"^\+\+\+ b/(\S+)$", patch.read_text(encoding="utf-8"), flags=re.MULTILINE)


def _package() -> Path:
    spec = find_spec("vllm_omni")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parents[1]


def _copy_sources(folder: Path, patches: Iterable[Path]) -> None:
    """Copy the installed files that the patches change; in a tree of links, in place of the links."""
    for name in (name for patch in patches for name in _files(patch) if (_package() / name).exists()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).unlink(missing_ok=True)
        shutil.copyfile(_package() / name, folder / name)


def _apply(folder: Path, patch: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}  # a repository above would be patched
    return subprocess.run(
        ["git", "apply", *options, str(patch)], cwd=folder, env=environment, capture_output=True, text=True
    )


def _run_tests(folder: Path, *options: str) -> Outcomes:
    """Run the tests of all patches on a copy of the installed package; return outcomes by test file.

    Args:
        folder: place of the copy, which is not there yet.
        options: of ``git apply``, such as the parts of the patches to leave out.
    """
    patches = [_patch(name) for name in NAMES]
    shutil.copytree(_package() / "vllm_omni", folder / "vllm_omni", copy_function=os.symlink)
    _copy_sources(folder, patches)
    for patch in patches:
        assert (done := _apply(folder, patch, *options)).returncode == 0, done.stderr
    code = re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    assert len(code) == 1
    (folder / FIXED).write_text(code[0], encoding="utf-8")
    # Without plugins, no part of the kit takes part.
    environment = {**os.environ, "PYTHONPATH": str(folder), "VLLM_PLUGINS": "", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", f"--rootdir={folder}", "tests"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    outcomes: Outcomes = defaultdict(list)
    for outcome, name in re.findall(r"^(PASSED|FAILED|ERROR) ([^:\s]+)", done.stdout, flags=re.MULTILINE):
        outcomes[name].append(outcome)
    assert outcomes, done.stdout + done.stderr
    return outcomes


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Outcomes of the patches' tests on the installed package."""
    return _run_tests(tmp_path_factory.mktemp("before") / "tree", "--include=tests/*")


@pytest.fixture(scope="module")
def after(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Outcomes of the patches' tests on the patched package."""
    return _run_tests(tmp_path_factory.mktemp("after") / "tree")


@pytest.mark.parametrize("name", NAMES)
def test_a_patch_applies_alone(name: str, tmp_path: Path) -> None:
    _copy_sources(tmp_path, [_patch(name)])
    assert (done := _apply(tmp_path, _patch(name), "--check")).returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_only_the_patch_makes_its_tests_pass(name: str, before: Outcomes, after: Outcomes) -> None:
    tests = [path for path in _files(_patch(name)) if path.startswith("tests/")]
    assert tests
    for path in tests:
        assert "FAILED" in before[path] and "ERROR" not in before[path]
        assert set(after[path]) == {"PASSED"} and len(after[path]) == len(before[path])


def test_no_two_patches_change_one_file() -> None:
    files = [path for name in NAMES for path in _files(_patch(name))]
    assert len(files) == len(set(files))


@pytest.mark.parametrize(
    "variant", sorted(FOLDER.glob("[0-9]*/*.patch")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_a_variant_is_needed_and_has_the_same_message_and_tests(variant: Path, tmp_path: Path) -> None:
    assert variant.parent.name in SERIES
    patch = FOLDER / variant.name
    for text in (r"\A.*?^---$", r"^\+\+\+ b/tests/.*?^diff "):
        found = [
            re.search(text, path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL) for path in (patch, variant)
        ]
        assert found[0] and found[1] and found[0][0] == found[1][0]
    _copy_sources(tmp_path, [patch])
    applies = _apply(tmp_path, patch, "--check").returncode == 0
    assert applies == (variant.parent.name != installed_series())


@pytest.mark.parametrize("name", NAMES)
def test_a_patch_has_a_message(name: str) -> None:
    message = message_from_string((FOLDER / f"{name}.patch").read_text(encoding="utf-8"))
    prefix, _, subject = str(message["Subject"]).partition(" ")
    assert prefix == "[PATCH]" and re.match(r"(\[\w+\])+ [A-Z]", subject) and len(subject) <= 72
    text, _, _ = str(message.get_payload()).partition("\n---\n")
    assert "Tested with tests/" in text
    assert max(map(len, text.splitlines())) <= 76


def _rows() -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in README.splitlines() if line.startswith("| ")
    ]


def test_the_table_lists_every_patch_and_every_entry_with_its_threads() -> None:
    rows = _rows()[1:]
    patches = [name for cells in rows for name in re.findall(r"\]\((\w+)\.patch\)", cells[0])]
    assert sorted(patches) == NAMES
    named = [re.findall(r"`(\w+)`", cells[1]) for cells in rows]
    assert sorted(name for names in named for name in names) == sorted(PATCHES)
    for names, cells in zip(named, rows, strict=True):
        threads = {thread for name in names for thread in PATCHES[name].threads}
        assert set(re.findall(r"https://[^)]+", cells[4])) == threads
        assert ("none found" in cells[4]) == (not threads)


@pytest.mark.slow
def test_the_fixed_fault_is_fixed_in_the_series_of_the_table(before: Outcomes) -> None:
    assert before[FIXED] == [FIXED_OUTCOME[installed_series()]]
