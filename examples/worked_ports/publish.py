"""Publish the models of the worked ports as their authors would: repositories of a Hub, and of git.

python publish.py FOLDER
port-kit hub FOLDER/hub

Weights are seeded. Each model has its weights in two repositories, in the containers of its authors, without
``model_index.json`` and ``config.json``. ``FOLDER/git/NAME`` is a repository with the code.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
#: Name of the model by the folder of its port.
MODELS = {"video": "driftwood", "audio": "murmur", "image": "retouch"}
State = dict[str, torch.Tensor]


def write_driftwood(hub: Path, build: Callable[[str], State]) -> None:
    """The average of the weights is beside the epoch, and was saved from a wrapper of torch."""
    net = {f"module.{name}": value for name, value in build("driftwood_lab.nets:DriftNet").items()}
    torch.save({"epoch": 3, "ema": net}, place(hub, "driftwood-ai/driftwood", "weights/driftwood_final.pth"))
    torch.save(build("driftwood_lab.nets:Projector"), place(hub, "driftwood-ai/projector", "projector.bin"))


def write_murmur(hub: Path, build: Callable[[str], State]) -> None:
    """The vocoder has normalized weights: a direction and a magnitude each."""
    content = {"model": build("murmur_lab.denoiser:Murmur"), "step": 800_000}
    torch.save(content, place(hub, "murmur-audio/murmur", "murmur_800k.pt"))
    torch.save({"generator": build("murmur_lab.vocoder:Vocoder")}, place(hub, "murmur-audio/vocoder", "vocoder.pth"))


def write_retouch(hub: Path, build: Callable[[str], State]) -> None:
    """The pickle has a key of BasicSR; the codec is a safetensors file."""
    content = {"params_ema": build("retouch_lab.editor:Editor")}
    torch.save(content, place(hub, "retouch-lab/retouch", "net_g_latest.pth"))
    save_file(build("retouch_lab.editor:Codec"), place(hub, "retouch-lab/codec", "codec.safetensors"))


def place(hub: Path, repository: str, path: str) -> Path:
    """Return a file of a repository, whose card is written, too."""
    file = hub / repository / path
    file.parent.mkdir(parents=True, exist_ok=True)
    card = f"---\nlicense: apache-2.0\n---\n\nCode: https://github.com/{repository}\n"
    (hub / repository / "README.md").write_text(card, encoding="utf-8")
    return file


def publish(kind: str, folder: Path) -> None:
    """Write the repositories of one model."""
    name, original = MODELS[kind], HERE / kind / "original"
    sys.path.insert(0, str(original))

    def build(entry: str) -> State:
        module, _, attribute = entry.partition(":")
        torch.manual_seed(7)
        network: Any = getattr(import_module(module), attribute)()
        return network.state_dict()

    globals()[f"write_{name}"](folder / "hub", build)
    sys.path.remove(str(original))
    code = folder / "git" / name
    shutil.copytree(original, code, ignore=shutil.ignore_patterns("__pycache__"))
    author = ("-c", f"user.name={name}", "-c", f"user.email={name}@example.org")
    for arguments in (("init", "--quiet"), ("add", "."), (*author, "commit", "--quiet", "-m", "Release")):
        subprocess.run(["git", *arguments], cwd=code, check=True)


if __name__ == "__main__":
    for published in MODELS:
        publish(published, Path(sys.argv[1]))
