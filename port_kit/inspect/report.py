"""Result of an inspection and its JSON form."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from port_kit.dtypes import ITEM_SIZES
from port_kit.escape import quoted
from port_kit.manifest import Manifest

#: supported: vLLM-Omni or a port serves it as it is; diffusers: all classes are in diffusers and transformers; hybrid:
#: some are; custom: none are; unknown: the files that decide cannot be read (a gate).
ModelPath = Literal["supported", "diffusers", "hybrid", "custom", "unknown"]
TITLES: dict[str, str] = {
    "supported": "already supported",
    "diffusers": "diffusers-based",
    "hybrid": "hybrid (some components are diffusers', the rest is the model's own)",
    "custom": "custom (its own layout and its own code)",
    "unknown": "unknown (the files required to classify it cannot be read)",
}


#: Formats that a download converts, or that need no conversion.
_CONVERTIBLE = ("safetensors", "torch")


@dataclass(frozen=True)
class Finding:
    """A fact and its origin: a file or another place (``folder name``)."""

    file: str
    fact: str


@dataclass(frozen=True)
class WeightFile:
    """One file of tensors.

    Attributes:
        path: in the repository or folder, with ``/``.
        size: bytes.
        format: ``safetensors``, ``torch zip``, ``torch legacy``, ``gguf`` ..., or the suffix if it cannot be read.
        entries: ``{tensor name: (shape, dtype)}``; empty if it cannot be read.
        wrapper: of a pickle, the keys above the tensors, dotted; ``.`` for the top level, if there are further tensors.
        problem: why it cannot be read, or could not be loaded; empty if it can.
        details: further values of its header (GGUF architecture, values beside the tensors).
        alternatives: of a pickle, wrappers of further tensors with at least half as many bytes, such as an average of
            the weights.
    """

    path: str
    size: int
    format: str
    entries: Mapping[str, tuple[tuple[int, ...], str]] = field(default_factory=dict, repr=False)
    wrapper: str = ""
    problem: str = ""
    details: Mapping[str, str] = field(default_factory=dict)
    alternatives: tuple[str, ...] = ()

    @property
    def obstacle(self) -> str:
        """Reason, after its name, that a download cannot turn it into safetensors; empty if there is none."""
        if self.problem:
            return self.problem
        if not self.format.startswith(_CONVERTIBLE):
            return f"is {self.format}, which nothing here converts"
        return "" if self.entries else "has no tensors"

    @property
    def parameters(self) -> int:
        """Number of elements of all tensors."""
        return sum(self.dtypes.values())

    @property
    def dtypes(self) -> dict[str, int]:
        """Number of elements by dtype, the largest first."""
        counts: dict[str, int] = {}
        for shape, dtype in self.entries.values():
            counts[dtype] = counts.get(dtype, 0) + _product(shape)
        return dict(sorted(counts.items(), key=lambda item: -item[1]))

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serializable dictionary; tensors are counted, not listed."""
        return {
            "path": self.path,
            "size": self.size,
            "format": self.format,
            "tensors": len(self.entries),
            "parameters": self.parameters,
            "dtypes": self.dtypes,
            "wrapper": self.wrapper,
            "problem": self.problem,
            "details": dict(self.details),
            "alternatives": list(self.alternatives),
        }


@dataclass(frozen=True)
class Recognized:
    """A known component that a checkpoint holds, by names and shapes.

    Attributes:
        name: usual folder of it in a model directory.
        kind: one of :data:`port_kit.port.KINDS`.
        origin: of the module, in words: ``the vae of the port ovi``.
        prefix: leading name parts of all tensors, such as ``module.``; empty if there are none.
        port: the port that has the component, or empty.
        build, rules, config: references of that port's component.
        pretrained: ``"module:Class"`` of a class that its own library fills, or empty.
        values: content of its ``config.json``, read from the shapes; for :attr:`pretrained`.
        misfits: tensors whose shape differs from the full size of the port's component.
    """

    name: str
    kind: str
    origin: str
    prefix: str = ""
    port: str = ""
    build: str = ""
    rules: str = ""
    config: str = ""
    pretrained: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    misfits: int = 0

    @property
    def text(self) -> str:
        """The finding, after ``its tensors are those of``."""
        under = f", under {quoted(self.prefix)}" if self.prefix else ""
        sizes = f", in other sizes ({self.misfits} tensors differ)" if self.misfits else ""
        return f"{self.origin}{under}{sizes}"


@dataclass(frozen=True)
class Component:
    """One part of the model.

    Attributes:
        name: its folder, its key in ``model_index.json``, or the path of its weights without suffix.
        library: ``diffusers``, ``transformers``, a word of ``model_index.json``, or empty.
        class_name: as ``model_index.json`` or its ``config.json`` says; empty if neither does.
        known: whether the installed library has that class.
        source: the file that names the class; empty if none does.
        weights: the files that a loader takes.
        spare: further weight files of it that are not counted (other variants and formats of the same tensors).
        recognized: the known component that its tensors are, by names and shapes; None if they are of none.
    """

    name: str
    library: str = ""
    class_name: str = ""
    known: bool = False
    source: str = ""
    weights: tuple[WeightFile, ...] = ()
    spare: tuple[WeightFile, ...] = ()
    recognized: Recognized | None = None

    @property
    def size(self) -> int:
        """Bytes of the weights that are taken."""
        return sum(file.size for file in self.weights)

    @property
    def parameters(self) -> int:
        """Number of elements of the weights that are taken."""
        return sum(file.parameters for file in self.weights)

    @property
    def tensors(self) -> int:
        """Number of tensors of the weights that are taken."""
        return sum(len(file.entries) for file in self.weights)

    @property
    def formats(self) -> tuple[str, ...]:
        """Formats of the weights that are taken, each once."""
        return tuple(dict.fromkeys(file.format for file in self.weights))

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Dtypes of the weights that are taken, each once."""
        return tuple(dict.fromkeys(dtype for file in self.weights for dtype in file.dtypes))

    @property
    def manifest(self) -> Manifest:
        """The names, shapes and dtypes of its tensors; those of a dtype that torch lacks (GGUF's) are left out."""
        entries = {name: entry for file in self.weights for name, entry in file.entries.items()}
        return Manifest({name: entry for name, entry in entries.items() if entry[1] in ITEM_SIZES}, origin=self.name)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serializable dictionary."""
        return {
            "name": self.name,
            "library": self.library,
            "class_name": self.class_name,
            "known": self.known,
            "source": self.source,
            "size": self.size,
            "tensors": self.tensors,
            "parameters": self.parameters,
            "formats": list(self.formats),
            "dtypes": list(self.dtypes),
            "weights": [file.to_dict() for file in self.weights],
            "spare": [file.path for file in self.spare],
            "recognized": None if self.recognized is None else dataclasses.asdict(self.recognized),
        }


@dataclass(frozen=True)
class ModelCard:
    """Content of a model card (README.md).

    Attributes:
        licence: the metadata's ``license``; ``license_name`` if that is ``other``; empty if absent.
        licence_link: URL of its text.
        base_models: models that this one was made from.
        task: the metadata's ``pipeline_tag``.
        code: git repositories that it names, in the order of the text.
        repositories: Hub repositories that it names.
        asks_terms: whether its metadata describes a gate, open to this reader or not.
        problem: why the metadata cannot be read; empty if it can.
    """

    licence: str = ""
    licence_link: str = ""
    base_models: tuple[str, ...] = ()
    task: str = ""
    code: tuple[str, ...] = ()
    repositories: tuple[str, ...] = ()
    asks_terms: bool = False
    problem: str = ""


@dataclass(frozen=True)
class Memory:
    """Bytes that the weights need; activations come on top.

    Attributes:
        stored: as the files have them.
        bfloat16: with every parameter in two bytes, vLLM-Omni's default.
        per_rank: in bfloat16 on each of N GPUs, with sharded parts divided and all other parts complete.
        sharded: the components that tensor parallelism or HSDP divides: the transformers, else the largest component.
    """

    stored: int
    bfloat16: int
    per_rank: Mapping[int, int]
    sharded: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """The result of inspecting a repository or folder, from its listing and headers.

    Attributes:
        target: the repository id or the folder, as given.
        commit: of a repository, 40 hex digits; None for a folder.
        path: see :data:`ModelPath`.
        evidence: why, in the order of the decision.
        files: number of files.
        size: bytes of all files.
        class_name: the pipeline's class, if a file names one.
        components: the parts, in the order of ``model_index.json``, then by name.
        gate: reason that the files cannot be read; empty if they can.
        card: the content of README.md.
        missing: files and entries that vLLM-Omni requires and that are missing.
        pitfalls: failures that vLLM-Omni would not report.
        memory: of the weights; None if no tensor could be read.
        next: the command to run now, or the thing to do.
    """

    target: str
    commit: str | None
    path: ModelPath
    evidence: tuple[Finding, ...]
    files: int
    size: int
    class_name: str
    components: tuple[Component, ...]
    gate: str
    card: ModelCard
    missing: tuple[Finding, ...]
    pitfalls: tuple[Finding, ...]
    memory: Memory | None
    next: str

    def component(self, name: str) -> Component | None:
        """Return the component called ``name``, or None."""
        return next((part for part in self.components if part.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serializable dictionary, as ``--json`` prints it."""
        plain = {name: getattr(self, name) for name in ("target", "commit", "path", "files", "size", "class_name")}
        plain |= {name: [dataclasses.asdict(item) for item in getattr(self, name)] for name in ("evidence", "missing")}
        return {
            **plain,
            "pitfalls": [dataclasses.asdict(item) for item in self.pitfalls],
            "components": [part.to_dict() for part in self.components],
            "gate": self.gate,
            "card": dataclasses.asdict(self.card),
            "memory": None if self.memory is None else dataclasses.asdict(self.memory),
            "next": self.next,
        }


def _product(shape: tuple[int, ...]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count
