"""Paths that a repository, a recipe or a lock names."""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path

from port_kit.errors import DownloadError
from port_kit.escape import quoted, shortened

_RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?")
_FORBIDDEN = re.compile(r'[\x00-\x1f<>:"|?*\\]')
_LONGEST_NAME = 255  # bytes, of all common file systems
_LONGEST_PATH = 2048  # the system allows about twice that for the complete path
_DEEPEST = 64
#: folders from whose files other programs run commands, and the kit's own
_REFUSED_FOLDERS = frozenset({".git", ".hg", ".svn", ".bzr", ".jj", ".sl", "_darcs", "cvs", ".port_kit"})


def check_relative_path(path: str, origin: str) -> None:
    """Refuse a path that could leave the model directory, that another program takes commands from, or that some
    system cannot store: ``path_unsafe``.
    """
    parts = path.split("/")
    if len(parts) >= _DEEPEST or len(path) > _LONGEST_PATH or not all(map(_is_plain_name, parts)):
        raise DownloadError(
            f"{origin} names the path {quoted(path)}, which cannot be stored safely under a model directory",
            code="path_unsafe",
            hint="take this file out of the recipe's patterns, and tell the repository's owner",
        )
    message = f"{origin} names the path {ascii(shortened(path))}, which the locale of this process cannot write"
    check_locale(path, message, "path_unsafe")


def check_locale(path: str, message: str, code: str) -> None:
    """Refuse a path that the locale of this process cannot write, with an error of this code."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError as error:
        raise DownloadError(message, code=code, hint="set LC_ALL=C.UTF-8 or PYTHONUTF8=1") from error


def _is_plain_name(part: str) -> bool:
    """Return True if a name is one on every system, however that system folds case and look-alikes."""
    folded = folded_name(part)
    # Cs: half a surrogate pair, which JSON can hold and no file system stores
    invisible = any(unicodedata.category(sign) in ("Cc", "Cf", "Cs", "Zl", "Zp") for sign in part)
    special = folded in ("", ".", "..") or part[-1:] in (".", " ") or _RESERVED.fullmatch(part)
    refused = folded in _REFUSED_FOLDERS or folded.startswith("git~")
    too_long = len(part.encode(errors="replace")) > _LONGEST_NAME
    return not (invisible or special or refused or too_long or _FORBIDDEN.search(part))


def folded_name(name: str) -> str:
    """Return a name as a file system may compare it: without case, and with one spelling for each letter."""
    return unicodedata.normalize("NFKC", name).casefold()


def require_place(path: Path) -> None:
    """Refuse a target that is a folder or a dangling link, or that has a file as a parent: ``target_foreign``."""
    in_the_way = next((parent for parent in path.parents if parent.exists() and not parent.is_dir()), None)
    if in_the_way is not None or path.is_dir() or (path.is_symlink() and not path.exists()):
        raise foreign_target(f"{in_the_way or path} is in the way: {path} is to be a file")


def foreign_target(message: str) -> DownloadError:
    """Return the error for a target that the kit did not create."""
    return DownloadError(message, code="target_foreign", hint="move it away, or choose another --output-dir")
