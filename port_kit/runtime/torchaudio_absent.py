"""Lets ``vllm serve --omni`` start where torchaudio is not installed.

vLLM-Omni's API server imports torchaudio for its speech endpoints, at the top of two modules, and so does not start
without it, whatever it serves. torchaudio's published builds need CUDA. Here these two modules, and no others, are
given a stand-in: the server starts, and a speech endpoint that really needs torchaudio says so. Everywhere else
torchaudio stays what it is, not installed: ``import torchaudio`` fails, and whoever asks whether it exists hears no.

See ``torchaudio_absent`` in ``patches.md``.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NoReturn

from port_kit.errors import OptionalDependencyError

PACKAGE = "torchaudio"
#: The modules that import torchaudio at their top, and that the API server imports.
MODULES = ("vllm_omni.entrypoints.openai.audio_utils_mixin", "vllm_omni.utils.audio")


class Absent(ModuleType):
    """Stands in for torchaudio and everything in it: attributes are stand-ins too, and calling one raises."""

    def __getattr__(self, name: str) -> Absent:
        """Return a stand-in for the attribute; names with two underscores do not exist."""
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(f"{self.__name__}.{name}")

    def __call__(self, *_: object, **__: object) -> NoReturn:
        """Raise OptionalDependencyError: nothing of torchaudio can be used."""
        raise OptionalDependencyError(
            f"{self.__name__} was called, and {PACKAGE} is not installed; only speech endpoints need it",
            hint=f"install the {PACKAGE} build that fits the installed torch",
        )


class AbsentFinder:
    """Import hook that finds :data:`MODULES` as usual and lets :class:`AbsentLoader` run them."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the module's spec with the loader exchanged; None for every other module."""
        if name not in MODULES or find_spec(PACKAGE) is not None:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = AbsentLoader(spec.loader.name, spec.loader.path)
        return spec


class AbsentLoader(SourceFileLoader):
    """Runs a module whose own import statements, and nobody else's, get the stand-in for torchaudio."""

    def exec_module(self, module: ModuleType) -> None:
        """Run the module.

        Raises:
            RegistrationError: it imports something else of torchaudio than the stand-in was made for.
        """
        from port_kit.runtime.guards import require

        require("torchaudio_absent")
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": _import}
        super().exec_module(module)


def _import(
    name: str,
    globals: Mapping[str, Any] | None = None,
    locals: Mapping[str, Any] | None = None,
    fromlist: Sequence[str] = (),
    level: int = 0,
) -> ModuleType:
    """Do what ``import`` does, but find torchaudio to be the stand-in."""
    if level == 0 and name.partition(".")[0] == PACKAGE:
        return Absent(name if fromlist else PACKAGE)
    return __import__(name, globals, locals, fromlist, level)


def install() -> None:
    """Put the import hook in front of the others, once. It does nothing where torchaudio is installed."""
    if not any(isinstance(finder, AbsentFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, AbsentFinder())
