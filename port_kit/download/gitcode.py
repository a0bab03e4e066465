"""The original code of a model: one pinned commit, fetched without trusting what is configured on this machine.

The code lies in ``<home>/code/<name>/<commit>/``: ``repo`` is the checkout, ``path`` holds one link for each package
that becomes importable. ``<home>`` is ``PORT_KIT_HOME``, or ``port_kit`` in the user's data folder.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from port_kit.download.files import explained
from port_kit.download.recipe import FULL_HASH, GitCode
from port_kit.errors import DownloadError

if TYPE_CHECKING:
    from git import Git, Repo

_URL = re.compile(r"(https|http|ssh|file)://[^\s-]\S*")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_SILENCE = 5  # seconds without a byte before git gives a server up
_LONGEST = 1800  # seconds that one git command may take
_CONFIG = {
    "core.hooksPath": os.devnull,
    "core.fsmonitor": "false",
    "core.autocrlf": "false",
    "protocol.ext.allow": "never",
    "submodule.recurse": "false",
    "credential.helper": "",
    "gc.auto": "0",
}
_T = TypeVar("_T")


def code_home() -> Path:
    """Return the folder under which git code lies; it outlives reboots and model directories."""
    if chosen := os.environ.get("PORT_KIT_HOME"):
        return Path(chosen).absolute() / "code"
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data).absolute() / "port_kit" / "code"


def code_folder(name: str, commit: str) -> Path:
    """Return where one commit of one dependency lies."""
    return code_home() / name / commit


def environment() -> dict[str, str]:
    """Return the variables under which git runs: no user or system configuration, no prompts, no hooks, no helpers."""
    config = {f"GIT_CONFIG_KEY_{index}": key for index, key in enumerate(_CONFIG)}
    config |= {f"GIT_CONFIG_VALUE_{index}": value for index, value in enumerate(_CONFIG.values())}
    return {
        **config,
        "GIT_CONFIG_COUNT": str(len(_CONFIG)),
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


def check_url(code: GitCode) -> None:
    """Refuse URLs that run commands, hide options, or are not protected.

    Raises:
        DownloadError: ``code_url``.
    """
    parts = urlsplit(code.url)
    plain = _URL.fullmatch(code.url) and not any(ord(character) < 33 for character in code.url)
    exposed = parts.scheme == "http" and parts.hostname not in _LOOPBACK
    if not plain or exposed or (parts.hostname or "").startswith("-"):
        raise DownloadError(
            f"git code {code.name}: {code.url!r} is not an https, ssh or file URL",
            code="code_url",
            hint="correct the recipe",
        )


def resolve_commit(code: GitCode) -> str:
    """Return the commit to use: the recipe's, or what the branch points to now. Asks the remote in both cases."""
    check_url(code)
    git = _import_git()
    answer = _told(code, "asking for its branches", lambda: _run(git.Git(), 60, "ls-remote", "--", code.url))
    if code.commit is not None:
        return code.commit
    endings = (f"\t{code.branch}", f"/{code.branch}")
    found = [line.split("\t")[0] for line in answer.splitlines() if line.endswith(endings)]
    if not found or not FULL_HASH.fullmatch(found[0]):
        raise DownloadError(f"{code.url} has no branch {code.branch}", code="code_broken", hint="correct the recipe")
    return found[0]


def fetch_code(code: GitCode, commit: str) -> Path:
    """Bring one commit, aside and then by rename; return its folder. What is there already is checked, not fetched.

    Raises:
        DownloadError: ``code_broken``, ``code_url``.
    """
    folder = code_folder(code.name, commit)
    if folder.exists():
        check_code(code, commit)
        return folder
    check_url(code)
    with explained(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        sweep_code(code.name)
        aside = folder.parent / f".{commit}.{os.getpid()}.tmp"
        try:
            _check_out(code, commit, aside / "repo")
            _link_packages(code, aside)
            os.rename(aside, folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return folder


def check_code(code: GitCode, commit: str) -> None:
    """Compare a checkout with its commit.

    Raises:
        DownloadError: ``code_broken`` where HEAD or a file is another.
    """
    repository = code_folder(code.name, commit) / "repo"
    git = _import_git()

    def examine() -> tuple[str, list[str]]:
        with git.Repo(repository) as repo:
            lines = repo.git.status("--porcelain", "--untracked-files=all").splitlines()
            return repo.head.commit.hexsha, [line for line in lines if not _is_bytecode(line)]

    head, changes = _told(code, "examining its checkout", examine)
    if head != commit or changes:
        what = f"HEAD is {head}" if head != commit else f"changed: {', '.join(changes[:5])}"
        raise DownloadError(
            f"git code {code.name} in {repository} is not {commit} any more ({what})",
            code="code_broken",
            hint=f"take it out and install it again: port-kit uninstall {code.name}",
        )


def _is_bytecode(line: str) -> bool:
    return line.endswith(".pyc") or "__pycache__/" in line


def _check_out(code: GitCode, commit: str, target: Path) -> None:
    git = _import_git()
    target.mkdir(parents=True)

    def fetch() -> None:
        with git.Repo.init(target) as repo:
            repo.create_remote("origin", code.url)
            _run(repo.git, _LONGEST, "fetch", "--quiet", "--depth=1", "--no-tags", "origin", commit)
            _run(repo.git, _LONGEST, "checkout", "--quiet", "--detach", "FETCH_HEAD")
            _check_checkout(code, commit, repo)

    _told(code, f"fetching commit {commit}", fetch)


def _run(git: Git, seconds: float, *arguments: str) -> str:
    """Run one git command and return its output. It ends, with all its helpers, when we are interrupted.

    GitPython's own time limit keeps an interrupted interpreter alive until it is over.
    """
    from git.exc import GitCommandError

    command = ["git", *arguments]
    held = git.execute(command, as_process=True, start_new_session=True)  # ends the process when it is let go
    process = held.proc  # type: ignore[union-attr]
    assert process is not None
    try:
        output, complaint = process.communicate(timeout=seconds)
    except BaseException as error:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            raise GitCommandError(command, -signal.SIGKILL, f"no answer within {seconds:.0f} s") from error
        raise
    if process.returncode:
        raise GitCommandError(command, process.returncode, complaint)
    return str(output.decode(errors="replace"))


def _check_checkout(code: GitCode, commit: str, repo: Repo) -> None:
    if repo.head.commit.hexsha != commit:
        raise DownloadError(f"{code.url} gave {repo.head.commit.hexsha} for {commit}", code="code_broken")
    root = Path(repo.working_dir).resolve()
    for path in root.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            raise DownloadError(
                f"git code {code.name}: {path.relative_to(root)} links out of its repository",
                code="code_broken",
                hint="this code cannot be installed safely; tell its owner",
            )


def _link_packages(code: GitCode, folder: Path) -> None:
    """Only declared names become importable: a repository's ``tests`` and ``utils`` stay its own."""
    source = folder / "repo" / code.path
    (folder / "path").mkdir()
    for package in code.packages:
        found = next((name for name in (package, f"{package}.py") if (source / name).exists()), None)
        if found is None:
            raise DownloadError(
                f"{code.url} has no module {package} in {code.path or 'its root'}",
                code="code_broken",
                hint="correct packages or path in the recipe",
            )
        link = Path(os.path.relpath(source / found, folder / "path"))
        (folder / "path" / found).symlink_to(link)


def sweep_code(name: str) -> None:
    """Delete what killed fetches left."""
    for path in (code_home() / name).glob(".*.tmp"):
        number = path.name.removesuffix(".tmp").rpartition(".")[2]
        if number.isdigit() and not Path(f"/proc/{number}").exists():
            shutil.rmtree(path, ignore_errors=True)


def _import_git() -> ModuleType:
    """GitPython looks for git when it is imported, which is why that happens late."""
    try:
        import git
    except ImportError as error:
        raise DownloadError("git is not installed", code="code_broken", hint="install git") from error
    return git


@contextmanager
def _hardened() -> Iterator[None]:
    """Give git :func:`environment`; GitPython adds to the process's variables and cannot take any away."""
    before = dict(os.environ)
    for key in [key for key in before if key.startswith("GIT_") and key != "GIT_SSL_CAINFO"]:
        del os.environ[key]
    os.environ.update(environment())
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _told(code: GitCode, what: str, action: Callable[[], _T]) -> _T:
    """Run git; its last line of complaint becomes the error's message."""
    from git.exc import GitCommandError, InvalidGitRepositoryError, NoSuchPathError

    try:
        with _hardened():
            return action()
    except (InvalidGitRepositoryError, NoSuchPathError) as error:
        raise DownloadError(f"git code {code.name}: no repository in {error}", code="code_broken") from error
    except (GitCommandError, ValueError) as error:
        lines = [line.strip() for line in str(getattr(error, "stderr", error)).splitlines() if line.strip()]
        reason = lines[-1].removeprefix("stderr: ").strip("'") if lines else type(error).__name__
        raise DownloadError(
            f"git code {code.name}: {what} at {code.url} failed: {reason}",
            code="code_broken",
            hint="check the URL, the commit and the network; a private repository needs an ssh key",
        ) from error
