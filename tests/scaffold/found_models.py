"""A model of its own code over two repositories of a loopback Hub, with the code in a git repository."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from port_kit.testing import GitRemote, GitServer
from port_kit.testing.hub import Hub
from port_kit.testing.tiny import expand, read_outline
from port_kit.testing.tiny_fusion import OUTLINES
from tests.inspect import fake_repositories

NET, EXTRAS = "some-lab/some-net", "other-lab/extras"
WIDTH = 64
_LAYER = {"attn.q": (64, 64), "attn.k": (64, 64), "attn.v": (64, 64), "mlp.up": (256, 64), "mlp.down": (64, 256)}
SHAPES = {f"layers.{index}.{name}.weight": shape for index in range(12) for name, shape in _LAYER.items()}
SHAPES |= {"patch.weight": (64, 8), "out.weight": (8, 64), "time.weight": (64, 64), "scale": (64,)}
CODEC = {"inner.weight": (320, 8, 3), "inner.bias": (320,)}

NET_CODE = """
import torch
from torch import nn


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch, self.out = nn.Linear(8, 64), nn.Linear(64, 8)


class Net(Base):
    def __init__(self, depth=4, *, activation=torch.relu):
        super().__init__()
        self.time = nn.Linear(64, 64)
        self.layers = nn.ModuleList()
        self.register_parameter("scale", None)


class NetWithMemory(Net):
    def __init__(self):
        super().__init__()
        self.memory = nn.Linear(64, 64)
"""
CODE = {
    "some_net_code/__init__.py": "",
    "some_net_code/net.py": NET_CODE,
    "some_net_code/old.py": "print 'a module of Python 2'\n",
    "tests/test_net.py": "raise SystemExit",
    "setup.py": "raise SystemExit('nothing of the repository is executed')",
}


def outline(name: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return a published component as names, shapes and dtypes."""
    return expand(read_outline(OUTLINES / f"{name}.json"))


def zeros(shapes: dict[str, tuple[tuple[int, ...], str]]) -> dict[str, torch.Tensor]:
    """Return tensors of any size that are small in a file."""
    return {name: torch.zeros(()).expand(shape) for name, (shape, _) in shapes.items()}


def repositories(card: str) -> dict[str, fake_repositories.Files]:
    """Return the files: shards under a wrapper, a vocoder that is called a VAE, a VAE of MMAudio, a tokenizer."""
    names = list(SHAPES)
    halves = {1: names[: len(names) // 2], 2: names[len(names) // 2 :]}
    shards = {
        f"weights/net-0000{part}-of-00002.pt": fake_repositories.torch_file(
            {"state_dict": {f"module.{name}": torch.zeros(SHAPES[name]) for name in half}, "epoch": 3}
        )
        for part, half in halves.items()
    }
    vae = {f"vae.{name}": value for name, value in zeros(outline("mmaudio_vae_16k")).items()}
    return {
        NET: {
            **shards,
            "README.md": fake_repositories.card("license: mit", card),
            "weights/net-00001-of-00002.log": b"a log",
            "assets/demo.mp4": b"not weights",
            "train_state.json": b"{}",
            "bpe/tokenizer.json": b"{}",
            "bpe/tokenizer_config.json": b'{"tokenizer_class": "T5TokenizerFast"}',
        },
        EXTRAS: {
            "README.md": fake_repositories.card("license: cc-by-4.0"),
            "wan_vae.pth": fake_repositories.torch_file({"generator": zeros(outline("bigvgan_16k")), "steps": 3}),
            "umt5.safetensors": fake_repositories.safetensors(CODEC, "float32"),
            "discriminator/encoder.pt": fake_repositories.torch_file({"ema": vae}),
        },
    }


@contextmanager
def served(folder: Path, card: str = "Code: {url}", code: dict[str, str] | None = None) -> Iterator[tuple[Hub, str]]:
    """Serve both repositories and the code; yield the Hub and the commit of the code.

    Args:
        folder: the git repository is written to it.
        card: text of the README; ``{url}`` is the address of the code.
        code: files of the git repository instead of :data:`CODE`.
    """
    remote = GitRemote(folder / "git" / "code", dict(code or CODE))
    with GitServer(folder / "git") as server, Hub(repositories(card.format(url=server.url("code")))) as hub:
        yield hub, remote.head
