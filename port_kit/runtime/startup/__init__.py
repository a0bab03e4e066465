"""Makes a CUDA-built torchvision importable beside a CPU-built torch. Runs at every start of the interpreter.

Package indexes serve torchvision as a CUDA build, whatever torch is installed. Beside a CPU-built torch its compiled
half cannot be loaded; torchvision passes over that, then registers fake kernels for operators that nobody declared,
and its import fails - and with it that of transformers' image processors, of vLLM and of vLLM-Omni, in every process
and before any plugin of theirs runs. Declaring the operators is enough: the Python transforms work, and the operators
themselves still fail where they are called.

``port_kit_startup.pth``, which the package puts into site-packages, imports this module under the name
``port_kit_startup``; so it imports the standard library's smallest parts only, and its one effect is an import hook
that waits for torchvision. Nothing is changed unless torch is a CPU build and torchvision a CUDA build.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader

TYPE_CHECKING = False
if TYPE_CHECKING:  # `typing` costs more than everything else here
    from collections.abc import Sequence
    from types import ModuleType

#: The operators for which torchvision registers fakes on import, with the schemas of its compiled half.
SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}

_FAKE = 'register_fake("torchvision::'

#: Keeps declarations alive: they end when their library object does.
_libraries: list[object] = []


class TorchvisionFinder:
    """Import hook that finds torchvision as usual and lets :class:`TorchvisionLoader` run it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return torchvision's spec with the loader exchanged; None for every other module."""
        if name != "torchvision":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = TorchvisionLoader(spec.loader.name, spec.loader.path)
        return spec


class TorchvisionLoader(SourceFileLoader):
    """Declares the missing operators just before torchvision's own code runs, and only then imports torch."""

    def exec_module(self, module: ModuleType) -> None:
        """Run torchvision."""
        if is_cuda_build(_folder(self.path)) and _torch_is_cpu_build():
            _declare(_folder(self.path))
        super().exec_module(module)


def is_cuda_build(folder: str) -> bool:
    """Say whether the torchvision in this folder was built for CUDA, without importing it."""
    return "+cu" in _text(f"{folder}/version.py")


def unbacked_operators() -> list[str]:
    """Return the operators of the installed torchvision for which it registers fakes; empty without torchvision."""
    spec = PathFinder.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return []
    return _fakes(_folder(spec.origin))


def _declare(folder: str) -> None:
    """Declare the operators; raises RegistrationError where this torchvision has others than the known ones."""
    unknown = [name for name in _fakes(folder) if name not in SCHEMAS]
    if unknown:
        from port_kit.errors import RegistrationError

        raise RegistrationError(
            f"torchvision is a CUDA build beside a CPU-built torch, and declares operators that the kit does not"
            f" know: {', '.join(unknown)}",
            code="upstream_changed",
            hint="install torchvision's CPU build from https://download.pytorch.org/whl/cpu",
            patch="torchvision_schemas",
        )
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in SCHEMAS.values():
        library.define(schema)
    _libraries.append(library)


def _torch_is_cpu_build() -> bool:
    import torch

    return torch.version.cuda is None and getattr(torch.version, "hip", None) is None


def _fakes(folder: str) -> list[str]:
    pieces = _text(f"{folder}/_meta_registrations.py").split(_FAKE)[1:]
    return sorted(piece.partition('"')[0] for piece in pieces)


def _folder(origin: str) -> str:
    return origin.rpartition("/")[0] or origin.rpartition("\\")[0]


def _text(path: str) -> str:
    """Read a file; one that does not exist reads as empty: such a torchvision is none that the kit knows."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return ""


def install() -> None:
    """Put the import hook in front of the others, once."""
    if not any(isinstance(finder, TorchvisionFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, TorchvisionFinder())


if __name__ == "port_kit_startup":
    install()
