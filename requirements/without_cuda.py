"""Make the CUDA builds of torchvision and torchaudio importable in the CPU environment of this clone.

The CPU builds of both packages are on PyTorch's own index only. An environment that is installed from other indexes
has CUDA builds, whose compiled parts a CPU build of torch cannot load. `make set-up` runs this script with the
interpreter of .venv. It deletes the compiled parts, and declares the two operators for which torchvision registers
fake kernels on import. Python code of both packages works; their compiled operators fail if called.
Packages that fit the installed torch are left alone. Only the environment of the running interpreter is changed.
"""

from __future__ import annotations

import os
import re
import sys
import sysconfig
from pathlib import Path

#: Schemas of the operators for which torchvision 0.28 registers fake kernels.
OPERATORS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def main() -> int:
    """Change the packages that do not fit; return the exit status."""
    site = Path(sysconfig.get_path("platlib"))
    if "+cpu" not in _version(site / "torch"):
        return 0
    for name in ("torchvision", "torchaudio"):
        package = site / name
        version = _version(package)
        if "+cu" not in version:
            continue
        if name == "torchvision":
            _declare_operators(package)
        for library in package.rglob("*.so"):
            library.unlink()
        _write(package / "version.py", f"__version__ = {version.partition('+')[0] + '+cpu'!r}\ncuda = None\n")
    return 0


def _version(package: Path) -> str:
    path = package / "version.py"
    found = re.search(r"""__version__\s*=\s*["'](.+?)["']""", path.read_text("utf-8")) if path.is_file() else None
    return found[1] if found else ""


def _declare_operators(package: Path) -> None:
    fakes = re.findall(r'register_fake\("torchvision::(\w+)"', (package / "_meta_registrations.py").read_text("utf-8"))
    if unknown := sorted(set(fakes) - set(OPERATORS)):
        raise SystemExit(f"torchvision registers fakes for {', '.join(unknown)}: add the schemas to {__file__}")
    path = package / "extension.py"
    lines = ['_library = torch.library.Library("torchvision", "DEF")']
    lines += [f"_library.define({OPERATORS[name]!r})" for name in fakes]
    _write(path, "\n".join([path.read_text("utf-8"), *lines, ""]))


def _write(path: Path, text: str) -> None:
    """Replace a file: it may be a hard link into the installer's cache, which must not change."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, "utf-8")
    os.replace(partial, path)


if __name__ == "__main__":
    sys.exit(main())
