"""The original code of a model: one pinned commit, fetched independently of this machine's git configuration.

The code lies in ``<home>/code/<name>/<commit>/``: ``repo`` is the checkout, ``path`` holds one link for each package
that becomes importable. ``<home>`` is ``PORT_KIT_HOME``, or ``port_kit`` in the user's data folder.

A URL may hold a password. Git gets it by its environment alone; errors, plans, locks and the checkout's configuration
have the URL without it.
"""

from __future__ import annotations

import keyword
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

from port_kit.download.recipe import FULL_HASH, GitCode
from port_kit.errors import DownloadError
from port_kit.escape import quoted, reason_of, redacted
from port_kit.files import os_errors_as
from port_kit.owner import OWNER, may_run, owner

_URL = re.compile(r"(https|http|ssh|file)://[^\s-]\S*")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_SILENCE = 8  # seconds without a byte before git gives a server up
_LONGEST = 1800  # seconds that one git command may take
_LFS_POINTER = b"version https://git-lfs.github.com/spec"
_CONFIG = {
    "core.hooksPath": os.devnull,
    "core.fsmonitor": "false",
    "core.autocrlf": "false",
    "protocol.ext.allow": "never",
    "submodule.recurse": "false",
    "credential.helper": "",
    "gc.auto": "0",
}
# Names that Python's start-up, or a module of the standard library, tries to import if they exist.
_START_UP = {"sitecustomize", "usercustomize", "site", "org", "java", "vms_lib", "_distutils_hack", "__main__"}
_REFUSED_NAMES = frozenset(name.casefold() for name in {*_START_UP, *sys.stdlib_module_names, *keyword.kwlist})


class _GitFailed(Exception):
    """A git command that failed, in git's own words."""


def code_home() -> Path:
    """Return the folder under which git code lies; it outlives reboots and model directories.

    Raises:
        DownloadError: ``install_target`` if this user has no home folder.
    """
    if chosen := os.environ.get("PORT_KIT_HOME"):
        return Path(chosen).absolute() / "code"
    try:
        data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    except RuntimeError as error:
        raise DownloadError(
            f"there is no place for git code: {reason_of(error)}",
            code="install_target",
            hint="set HOME or PORT_KIT_HOME",
        ) from error
    return Path(data).absolute() / "port_kit" / "code"


def code_folder(name: str, commit: str) -> Path:
    """Return the folder of one commit of one dependency."""
    return code_home() / name / commit


def environment(url: str = "", safe_folders: tuple[str, ...] = ()) -> dict[str, str]:
    """Return the variables under which git runs: no user or system configuration, no prompts, no hooks, no helpers.

    Args:
        url: its user name and password, if it has any, are passed on here and nowhere else.
        safe_folders: checkouts of other users that this user has declared to be safe.
    """
    config = [*_CONFIG.items(), *(("safe.directory", folder) for folder in safe_folders)]
    if url and plain_url(url) != url:
        config.append((f"url.{url}.insteadOf", plain_url(url)))
    kept = {key: value for key, value in os.environ.items() if not key.startswith("GIT_") or key == "GIT_SSL_CAINFO"}
    return {
        **kept,
        **{f"GIT_CONFIG_KEY_{index}": key for index, (key, _) in enumerate(config)},
        **{f"GIT_CONFIG_VALUE_{index}": value for index, (_, value) in enumerate(config)},
        "GIT_CONFIG_COUNT": str(len(config)),
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_TERMINAL_PROMPT": "0",
        "GIT_ASKPASS": "true",
        "SSH_ASKPASS": "true",
        "GIT_SSH_COMMAND": "ssh -oBatchMode=yes -oConnectTimeout=10",
        "GIT_LFS_SKIP_SMUDGE": "1",
        "GIT_HTTP_LOW_SPEED_LIMIT": "1",
        "GIT_HTTP_LOW_SPEED_TIME": str(_SILENCE),
        "GIT_ALLOW_PROTOCOL": "https:http:ssh:file",
        "GIT_TEMPLATE_DIR": "",
        "LC_ALL": "C",
    }


def plain_url(url: str) -> str:
    """Return a git URL without password; the user's name of ssh is none."""
    parts = urlsplit(url)
    if parts.scheme == "ssh" and parts.username and not parts.password:
        return url
    return redacted(url)


def check_declared(code: GitCode) -> None:
    """Refuse URLs that run commands, hide options or are not protected (``code_url``), and packages that Python itself
    would import (``code_clash``).
    """
    try:
        parts = urlsplit(code.url)
        host = parts.hostname or ""
    except ValueError:
        parts, host = urlsplit(""), "-"
    plain = _URL.fullmatch(code.url) and not any(ord(character) < 33 for character in code.url)
    exposed = parts.scheme == "http" and host not in _LOOPBACK
    if not plain or exposed or host.startswith("-"):
        raise DownloadError(
            f"git code {code.name}: {quoted(redacted(code.url))} is not an https, ssh or file URL",
            code="code_url",
            hint="correct the recipe",
        )
    refused = [package for package in code.packages if package.casefold() in _REFUSED_NAMES]
    if refused:
        raise DownloadError(
            f"git code {code.name} declares the package {refused[0]}, which Python would import by itself",
            code="code_clash",
            hint="do not use this recipe unless you trust where it comes from",
        )


def resolve_commit(code: GitCode) -> str:
    """Return the commit to use: the recipe's, or the branch's current one. Queries the remote in both cases."""
    check_declared(code)
    answer = _told(code, "asking for its branches", "ls-remote", "--", plain_url(code.url), seconds=90)
    if code.commit is not None:
        return code.commit
    refs = {name: commit for commit, _, name in (line.partition("\t") for line in answer.splitlines())}
    names = [f"{prefix}{code.branch}" for prefix in ("", "refs/heads/", "refs/tags/")]
    # An annotated tag is an object of its own; `^{}` is the commit that it names.
    found = next((refs[name] for ref in names for name in (f"{ref}^{{}}", ref) if name in refs), "")
    if not FULL_HASH.fullmatch(found):
        raise _broken(code, f"{plain_url(code.url)} has no branch {code.branch}", "correct the recipe")
    return found


def fetch_code(code: GitCode, commit: str) -> Path:
    """Fetch one commit beside its place and rename it; return its folder. One that is there is checked instead.

    Raises:
        DownloadError: ``code_broken``, ``code_clash``, ``code_url``.
    """
    check_declared(code)
    folder = code_folder(code.name, commit)
    if folder.exists():
        check_code(code, commit)
        return folder
    with os_errors_as(folder, "install_target", "choose another place for git code: set PORT_KIT_HOME"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        sweep_code(code.name)
        aside = folder.parent / f".{commit}.{owner()}~{secrets.token_hex(4)}.tmp"
        try:
            check_out(code, commit, aside / "repo")
            _link_packages(code, aside)
            os.rename(aside, folder)
        except OSError:
            if not folder.exists():
                raise
            check_code(code, commit)  # another process was faster
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return folder


def check_code(code: GitCode, commit: str) -> None:
    """Refuse a checkout of which HEAD or a file is not its commit's: ``code_broken``."""
    repository = code_folder(code.name, commit) / "repo"
    what, status = "examining its checkout", ("status", "--porcelain", "--untracked-files=all", "--ignored=matching")
    head = _told(code, what, "rev-parse", "HEAD", folder=repository).strip()
    lines = _told(code, what, *status, folder=repository).splitlines()
    changes = [line for line in lines if not _is_harmless(line)]
    if head != commit or changes:
        found = f"HEAD is {head}" if head != commit else f"changed: {', '.join(changes[:5])}"
        raise _broken(
            code,
            f"{repository} is not {commit} any more ({found})",
            f"take it out and install it again: port-kit uninstall {code.name}",
        )


def describe_clone(folder: Path) -> str:
    """Return the commit of a folder in a clone, and whether its files changed; empty if git tracks none of them."""
    try:
        if not _run(_LONGEST, ("ls-files", "--", "."), folder, environment()):
            return ""
        head = _run(_LONGEST, ("rev-parse", "HEAD"), folder, environment()).strip()
        changes = _run(_LONGEST, ("status", "--porcelain", "--", "."), folder, environment())
    except (_GitFailed, DownloadError):
        return ""
    return f"commit {head[:12]}{' with changes' if changes else ''}"


def _is_harmless(line: str) -> bool:
    """Return True for bytecode, and for ignored files that Python does not import."""
    ignored = line.startswith("!! ") and not line.rstrip('"').endswith((".py", ".so", "/"))
    return ignored or line.endswith((".pyc", ".egg-info/")) or "__pycache__/" in line


def check_out(code: GitCode, commit: str, target: Path) -> None:
    """Fetch one commit into a new folder; no hook and no filter of it is run.

    Raises:
        DownloadError: ``code_broken``.
    """
    target.mkdir(parents=True)
    what, url = f"fetching commit {commit}", plain_url(code.url)
    _told(code, what, "init", "--quiet", folder=target)
    _told(code, what, "fetch", "--quiet", "--depth=1", "--no-tags", "--", url, commit, folder=target)
    _told(code, what, "checkout", "--quiet", "--detach", "FETCH_HEAD", folder=target)
    head = _told(code, what, "rev-parse", "HEAD", folder=target).strip()
    if head != commit:
        raise _broken(code, f"{url} gave {head} for {commit}", f"correct the recipe: a tag's commit is meant, {head}")
    root = target.resolve()
    for path in root.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            raise _broken(
                code,
                f"{path.relative_to(root)} links out of its repository",
                "this code cannot be installed safely; tell its owner",
            )


def _link_packages(code: GitCode, folder: Path) -> None:
    """Link the declared packages: a repository's ``tests`` and ``utils`` are not importable."""
    source = folder / "repo" / code.path
    (folder / "path").mkdir()
    _check_content(code, folder / "repo")
    for package in code.packages:
        found = next((name for name in (package, f"{package}.py") if _is_module(source / name)), None)
        if found is None:
            raise _broken(
                code,
                f"{plain_url(code.url)} has no module {package} in {code.path or 'its root'}",
                "correct packages or path in the recipe",
            )
        link = Path(os.path.relpath(source / found, folder / "path"))
        (folder / "path" / found).symlink_to(link)


def _is_module(path: Path) -> bool:
    """Return True for a file, and for a folder with a Python module in it or below."""
    return path.is_file() if path.suffix == ".py" else any(path.rglob("*.py")) or any(path.rglob("*.so"))


def _check_content(code: GitCode, repository: Path) -> None:
    """Refuse packages of which git has fetched only a reference: submodules and Git LFS pointers."""
    declared = tuple(f"{code.path}/{package}".lstrip("/") for package in code.packages)
    for line in _told(code, "listing its files", "ls-files", "--stage", "-z", folder=repository).split("\0"):
        mode, _, path = line.partition(" ")[0], *line.partition("\t")[1:]
        inside = any(path == f"{name}.py" or f"{path}/".startswith(f"{name}/") for name in declared)
        above = any(name.startswith(f"{path}/") for name in declared)
        if mode == "160000" and (inside or above):
            raise _broken(
                code,
                f"{path} is a submodule of {plain_url(code.url)}, and submodules are not fetched",
                "declare the submodule's repository as git code of its own",
            )
        if inside and mode.startswith("100") and _is_lfs_pointer(repository / path):
            raise _broken(
                code,
                f"{path} lies in Git LFS, whose content is not fetched",
                "take the package out of the recipe, or use a repository that holds its files",
            )


def _is_lfs_pointer(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(len(_LFS_POINTER)) == _LFS_POINTER


def sweep_code(name: str) -> None:
    """Delete the remains of killed fetches."""
    ours = re.compile(rf"\.[0-9a-f]{{40}}\.({OWNER})~[0-9a-f]+\.tmp")
    for path in (code_home() / name).glob(".*.tmp"):
        found = ours.fullmatch(path.name)
        if found and not may_run(found[1], elsewhere=True) and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def _told(code: GitCode, what: str, *arguments: str, folder: Path | None = None, seconds: float = _LONGEST) -> str:
    """Run git and return its output; git's complaint becomes the error's message.

    A checkout of another user is examined if this user has declared it safe (``safe.directory``), as git asks for.
    """
    try:
        try:
            return _run(seconds, arguments, folder, environment(code.url))
        except _GitFailed as error:
            safe = _safe_folders() if "safe.directory" in str(error) else ()
            if not safe:
                raise
            return _run(seconds, arguments, folder, environment(code.url, safe))
    except _GitFailed as error:
        raise _broken(
            code,
            f"{what} at {plain_url(code.url)} failed: {redacted(str(error))}",
            "check the URL, the commit and the network; a private repository needs an ssh key",
        ) from error


def _safe_folders() -> tuple[str, ...]:
    """Return the user's own list of checkouts that belong to others and are safe."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    try:
        return tuple(_run(10, ("config", "--global", "--get-all", "safe.directory"), None, kept).splitlines())
    except _GitFailed:
        return ()


def _run(seconds: float, arguments: tuple[str, ...], folder: Path | None, variables: dict[str, str]) -> str:
    """Run one git command; raise its last message. It and its helpers end when this process is interrupted."""
    try:
        process = subprocess.Popen(
            ["git", *arguments],
            cwd=folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except FileNotFoundError as error:
        missing = "git is not installed" if folder is None or folder.is_dir() else f"there is no checkout at {folder}"
        raise DownloadError(missing, code="code_broken", hint="install git") from error
    try:
        output, complaint = process.communicate(timeout=seconds)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise _GitFailed(f"no answer within {seconds:.0f} s") from error
        raise
    if process.returncode:
        lines = [line.strip() for line in complaint.decode(errors="replace").splitlines() if line.strip()]
        raise _GitFailed("; ".join(lines[-4:])[:1000] or f"exit status {process.returncode}")
    return output.decode(errors="surrogateescape")


def _broken(code: GitCode, message: str, hint: str) -> DownloadError:
    return DownloadError(f"git code {code.name}: {message}", code="code_broken", hint=hint)
