"""Make git code importable in this environment, and take it out again.

One ``port_kit_<name>.pth`` file in site-packages, with one line: the folder that links to the declared packages. Python
adds it at the end of ``sys.path``, so that it hides no other module.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from port_kit.download.gitcode import (
    check_code,
    check_declared,
    code_folder,
    code_home,
    fetch_code,
    plain_url,
    resolve_commit,
    sweep_code,
)
from port_kit.download.recipe import FULL_HASH, NAME, GitCode
from port_kit.errors import DownloadError
from port_kit.escape import quoted
from port_kit.files import os_errors_as, read_json, write_atomically, write_json

# Packages are found as at every start, .pth files included, but without running sitecustomize and usercustomize.
_FIND = """
import importlib.util, json, site, sys
site.addsitepackages(site.venv(site.removeduppaths()))
found = {}
for name in sys.argv[1:]:
    spec = importlib.util.find_spec(name)
    places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or ())]
    found[name] = next((place for place in places if place), None)
print(json.dumps(found))
"""
_WORD = re.compile(r"\w+")


def site_packages() -> Path:
    """Return the folder of this environment in which ``.pth`` files are read."""
    return Path(sysconfig.get_path("purelib"))


def pth_file(name: str) -> Path:
    """Return the file that makes the git code called ``name`` importable."""
    return site_packages() / f"port_kit_{name}.pth"


def check_target(code: GitCode) -> None:
    """Check before a long download that the installation after it is possible.

    Raises:
        DownloadError: ``install_target`` or ``code_clash``.
    """
    check_declared(code)
    place = site_packages()
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise DownloadError(
            f"{place} may not be written, so {code.name} cannot be made importable ({error.strerror})",
            code="install_target",
            hint="use a virtual environment of your own, or leave out --with-reference",
        ) from error
    # A .pth file is decoded with the locale's encoding: under LC_ALL=C any other path stops every start of Python.
    path = str(code_home())
    if not path.isascii() or any(character in path for character in "\r\n") or path.startswith(("import ", "#")):
        raise DownloadError(
            f"{quoted(path)} cannot stand in a .pth file, which holds one ASCII path a line",
            code="install_target",
            hint="choose another folder: set PORT_KIT_HOME",
        )
    _check_start_up(code)
    for package, origin in _find(code.packages).items():
        if origin is not None and not _is_ours(code, origin):
            raise DownloadError(
                f"{package} of git code {code.name} is importable already, from {origin}",
                code="code_clash",
                hint="uninstall that, or use another virtual environment",
            )


def _check_start_up(code: GitCode) -> None:
    """Refuse packages that a line of a ``.pth`` file imports at every start."""
    for path in sorted(site_packages().glob("*.pth")):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        imported = {word for line in lines if line.startswith(("import ", "import\t")) for word in _WORD.findall(line)}
        refused = [package for package in code.packages if package in imported]
        if refused:
            raise DownloadError(
                f"the package {refused[0]} of git code {code.name} would be imported by {path} at every start",
                code="code_clash",
                hint="use another virtual environment",
            )


def _is_ours(code: GitCode, origin: str) -> bool:
    return Path(os.path.abspath(origin)).is_relative_to(code_home() / code.name)


def plan_code(codes: Sequence[GitCode], fixed: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, str]]:
    """Return ``{name: {"url", "commit"}}`` for a lock, which says ``fixed`` already; see :func:`check_target`."""
    planned = {}
    for code in codes:
        commit = code.commit or fixed.get(code.name, {}).get("commit")
        if commit is None or not is_installed(code, commit):
            check_target(code)
            found = resolve_commit(code)
            commit = commit or found
        planned[code.name] = {"url": plain_url(code.url), "commit": commit}
    return {**{name: dict(item) for name, item in fixed.items()}, **planned}


def install_all(codes: Sequence[GitCode], planned: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Fetch and install the git code of a recipe; return ``{name: folder}``."""
    folders = {}
    for code in codes:
        fetch_code(code, planned[code.name]["commit"])
        folders[code.name] = str(install_code(code, planned[code.name]["commit"]))
    return folders


def examine_code(codes: Sequence[GitCode], planned: Mapping[str, Mapping[str, str]]) -> None:
    """Compare the installed git code with its commit; a changed checkout is the user's to judge: an error."""
    for code in codes:
        commit = planned.get(code.name, {}).get("commit")
        if commit and code_folder(code.name, commit).exists():
            check_code(code, commit)


def install_code(code: GitCode, commit: str) -> Path:
    """Make a fetched commit importable, and prove it with a fresh interpreter; return its folder.

    Raises:
        DownloadError: see :func:`check_target`; ``code_broken`` if the proof fails.
    """
    check_target(code)
    folder, target = code_folder(code.name, commit), pth_file(code.name)
    if not is_installed(code, commit):
        write_atomically(target, f"{folder / 'path'}\n")
    users = set(read_json(folder / "users.json") or [])
    if str(target) not in users:
        write_json(folder / "users.json", sorted({*users, str(target)}))
    found = _find(code.packages)
    strange = {name: origin for name, origin in found.items() if not origin or not _is_ours(code, origin)}
    if strange:
        raise DownloadError(
            f"git code {code.name} was installed, but a fresh interpreter finds {strange}",
            code="code_broken",
            hint="check that this environment reads .pth files (no `python -S`)",
        )
    return folder


def is_installed(code: GitCode, commit: str) -> bool:
    """Return True if this environment has this commit; looks at files only."""
    target, line = pth_file(code.name), f"{code_folder(code.name, commit) / 'path'}\n"
    return target.is_file() and target.read_text(encoding="ascii", errors="replace") == line


def uninstall_code(name: str) -> list[str]:
    """Take git code out of this environment; its checkout too if no other environment uses it.

    Returns:
        The paths that were removed.

    Raises:
        DownloadError: ``code_broken`` if no code of that name is installed.
    """
    with os_errors_as(pth_file(name)):
        removed = _take_out(name, pth_file(name)) if NAME.fullmatch(name) else []
    if not removed:
        raise DownloadError(
            f"no git code called {quoted(name)} is installed in this environment",
            code="code_broken",
            hint=f"installed: {', '.join(installed_names()) or 'none'}; model directories go with port-kit remove",
        )
    return removed


def _take_out(name: str, target: Path) -> list[str]:
    removed = []
    if target.is_file():
        target.unlink()
        removed.append(str(target))
    sweep_code(name)
    commits = (path for path in (code_home() / name).glob("*") if FULL_HASH.fullmatch(path.name) and path.is_dir())
    for folder in sorted(commits):
        if not _forget_user(folder, target):
            shutil.rmtree(folder)
            removed.append(str(folder))
    for empty in (code_home() / name, code_home()):
        if empty.is_dir() and not any(empty.iterdir()):
            empty.rmdir()
    return removed


def installed_names() -> list[str]:
    """Return the names of the git code in this environment."""
    return sorted(path.stem.removeprefix("port_kit_") for path in site_packages().glob("port_kit_*.pth"))


def _forget_user(folder: Path, target: Path) -> list[str]:
    """Return the other environments that still use a checkout."""
    users = [user for user in read_json(folder / "users.json") or [] if user != str(target) and Path(user).is_file()]
    if users:
        write_json(folder / "users.json", users)
    return users


def _find(packages: Sequence[str]) -> dict[str, str | None]:
    """Ask a fresh interpreter in the C locale for the origins of names."""
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-I", "-S", "-c", _FIND, *packages]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise DownloadError(
            f"a fresh interpreter fails: {done.stderr.strip().splitlines()[-1:]}",
            code="code_broken",
            hint="repair this Python environment",
        )
    return json.loads(done.stdout)
