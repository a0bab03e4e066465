"""Test helpers for the kit and for any port.

* tiny checkpoints in the original formats (:mod:`~port_kit.testing.tiny`), and the tiny model of a port
  (:mod:`~port_kit.testing.tiny_port`),
* a loopback Hub with faults on demand (:mod:`~port_kit.testing.hub`) and a loopback git server
  (:mod:`~port_kit.testing.gitserver`),
* a pipeline on N forked ranks in about a second (:mod:`~port_kit.testing.workers`),
* vLLM-Omni's API server in a process group of its own (:mod:`~port_kit.testing.server`).

Importing this package needs neither torch nor vLLM.
"""

from port_kit.testing.gitserver import GitRemote, GitServer
from port_kit.testing.hub import Fault, Hub
from port_kit.testing.tiny import (
    TinyComponent,
    TinyModel,
    TinyPretrained,
    TinyTokenizer,
    expand,
    fill,
    scale,
    tiny_repositories,
    write_checkpoint,
)
from port_kit.testing.tiny_port import download_tiny, tiny_model_of
from port_kit.testing.tokenizer import write_tokenizer
from port_kit.testing.workers import RankResult, Request, run_workers, warm_up

__all__ = [
    "Fault",
    "GitRemote",
    "GitServer",
    "Hub",
    "RankResult",
    "Request",
    "TinyComponent",
    "TinyModel",
    "TinyPretrained",
    "TinyTokenizer",
    "download_tiny",
    "expand",
    "fill",
    "run_workers",
    "scale",
    "tiny_model_of",
    "tiny_repositories",
    "warm_up",
    "write_checkpoint",
    "write_tokenizer",
]
