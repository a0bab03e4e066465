"""The plan file: how a module is split over ranks, by module pattern.

A pattern is a module path in which ``*`` stands for one component, as in ``transformer_blocks.*.attn.to_q``. Nothing
in a plan depends on the depth, the widths, the number of heads or the number of tokens: a plan inferred from a tiny
module holds for the full one. Plans are TOML files; people review them and keep them under version control.

Arguments of a module are named as in the signature of its ``forward``, elements of nested values by a dotted path:
``hidden_states``, ``image_rotary_emb.0``. Outputs are numbered: ``""`` is the output itself, ``0`` its first element.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import tomlkit
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from port_kit.errors import ParallelError
from port_kit.escape import quoted, reason_of
from port_kit.files import read_text

FORMAT: Literal[1] = 1


class Section(BaseModel):
    """Base of all parts of a plan: immutable, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Stream(Section):
    """A sequence of tokens that is sharded over the sequence-parallel ranks.

    Attributes:
        name: unique name.
        grows_with: steps of the token scale that lengthen it: image, text, audio.
    """

    name: str
    grows_with: tuple[str, ...] = ()


class TokenAxis(Section):
    """An argument or output of a module that has one entry per token.

    Attributes:
        path: dotted path of the value.
        dim: dimension of the tokens, from the front; -1 if the value is an integer that counts them.
        streams: streams of which the dimension consists, in order.
        grid: number of consecutive dimensions, or integer arguments, that hold the grid of the stream's tokens. The
            first of them is sharded, and the stream is sharded by its rows.
    """

    path: str
    dim: int
    streams: tuple[str, ...]
    grid: int = 1


class CacheState(Section):
    """A tensor that each block of a list changes and passes to the next one.

    Attributes:
        input: path of the argument of a block.
        output: path in the result of a block.
    """

    input: str
    output: str


class Blocks(Section):
    """A list of blocks between which tokens stay sharded.

    Attributes:
        modules: pattern of the blocks.
        inputs: arguments that each block shards if they are still complete.
        outputs: outputs with one entry per token.
        gather: all-gather the outputs after the last block of the pattern, after each block, or never.
        hsdp: shard the parameters of each block under HSDP.
        offload: offload each block as one unit.
        compile: compile each block as one region.
        cache_pattern: forward pattern of Cache-DiT (``Pattern_0`` to ``Pattern_5``), or empty.
        cache_states: tensors that Cache-DiT reuses, hidden states first.
        cache_with: pattern of the list whose decision this list follows: calls of both alternate.
        cache_reason: finding that excludes the list from Cache-DiT.
        complete: modules of blocks that code outside of their block calls; HSDP does not shard their parameters.
    """

    modules: str
    inputs: tuple[TokenAxis, ...] = ()
    outputs: tuple[TokenAxis, ...] = ()
    gather: Literal["last", "each", "never"] = "last"
    hsdp: bool = True
    offload: bool = True
    compile: bool = True
    cache_pattern: str = ""
    cache_states: tuple[CacheState, ...] = ()
    cache_with: str = ""
    cache_reason: str = ""
    complete: tuple[str, ...] = ()


class AttentionSite(Section):
    """One attention call of a module.

    Attributes:
        module: pattern of the module that calls attention.
        at: exchange tokens and heads at the call itself (``kernel``), or at the linears around it (``linears``).
        call: for ``kernel``: functions from the module to the call, such as
            ``("processor.__call__", "dispatch_attention_fn")``.
        index: ordinal of the call among those of the module with the same functions.
        queries: streams of the queries, in order; ``*`` stands for tokens that are complete on every rank.
        keys: streams of the keys, in order; ``*`` as above. Complete keys are never communicated.
        mask: the mask is complete on every rank, sharded like the keys, or absent.
        axes: for ``linears``: token dimensions of the outputs of the linears before the site and of the input of the
            linear after it, by path within the module. A linear without one has complete tokens.
        gathered: for ``linears``: arguments of the module that are gathered first, for code that reads their length;
            the linears still process this rank's tokens.
    """

    module: str
    at: Literal["kernel", "linears"] = "kernel"
    call: tuple[str, ...] = ()
    index: int = 0
    queries: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    mask: Literal["", "whole", "sharded"] = ""
    axes: tuple[TokenAxis, ...] = ()
    gathered: tuple[TokenAxis, ...] = ()


class WholeModule(Section):
    """A module that runs on all tokens on every rank: a visible cost.

    Attributes:
        module: pattern of the module.
        inputs: arguments to gather before it.
        outputs: outputs to shard after it.
        halo: rows of the grid that a convolution reads on both sides; if positive, only these are exchanged, and the
            module runs on this rank's rows.
        reason: finding that makes it necessary.
    """

    module: str
    inputs: tuple[TokenAxis, ...] = ()
    outputs: tuple[TokenAxis, ...] = ()
    halo: int = 0
    reason: str = ""


class UnitGroup(Section):
    """Units that are divided over the ranks together: the heads of an attention, the channels of a feed-forward.

    Expressions are arithmetic over attributes of a block, such as ``attn.heads`` or ``attn.heads*attn.head_dim``.
    They are evaluated on the unmodified block.

    Attributes:
        name: unique name, the block list and the module that the linears have in common.
        block: pattern of the block.
        count: expression for the number of units; the number of ranks must divide it.
        mixes_tokens: a token's result depends on other tokens between the linears, as in attention.
    """

    name: str
    block: str
    count: str
    mixes_tokens: bool = False


class ChannelRule(Section):
    """Consecutive channels that are split in one way, for any width.

    Attributes:
        units: name of the group; rank ``r`` of ``n`` holds the r-th n-th part of each part.
        size: expression for the channels of one part; empty if all parts of the dimension are equal.
        repeat: number of equal consecutive parts that are each split (two halves of a gated unit).
    """

    units: str
    size: str = ""
    repeat: int = 1


class LinearPlan(Section):
    """Role of a linear, or of a convolution over tokens, under tensor parallelism.

    Attributes:
        module: pattern of the linear.
        role: split by output, by input after a column linear, or by output and all-gathered.
        channels: rules that partition the split dimension, in order; none for ``gathered``.
    """

    module: str
    role: Literal["column", "row", "gathered"]
    channels: tuple[ChannelRule, ...] = ()


class NormPlan(Section):
    """A norm over channels that are split; its statistics are reduced over the ranks.

    Attributes:
        module: pattern of the norm.
        kind: statistics of the norm.
        channels: rules that partition its width.
    """

    module: str
    kind: Literal["rms", "layer"]
    channels: tuple[ChannelRule, ...]


class TablePlan(Section):
    """An argument or parameter with one entry per split channel or unit; each rank reads its part.

    Attributes:
        module: pattern of the module.
        path: argument or parameter.
        kind: argument or parameter.
        dim: dimension of the channels.
        channels: rules that partition the dimension.
    """

    module: str
    path: str
    kind: Literal["argument", "parameter"]
    dim: int
    channels: tuple[ChannelRule, ...]


class DividedValue(Section):
    """An integer attribute that is divided by the number of ranks, such as ``heads``.

    Attributes:
        module: pattern of the module.
        attribute: dotted attribute path, such as ``heads`` or ``processor.num_heads``.
        index: entry of a tuple or list that is divided, or entries of nested ones; None if the attribute is a number.
        units: name of the group whose code reads it; empty if several do.
    """

    module: str
    attribute: str
    index: int | tuple[int, ...] | None = None
    units: str = ""


class Proof(Section):
    """One layout for which a plan was proven.

    Attributes:
        layout: as ``port-kit layout`` writes it, such as ``tp2xulysses2``.
        scale: configuration, ``inferred`` or a name of the other configurations.
        dtype: dtype of the weights.
        difference: largest difference from one rank, relative to the largest value.
        control: the same difference with one exchange left out.
        tokens: largest part of the tokens that a rank processed.
        block_bytes: largest part of the bytes of the blocks that a rank held.
    """

    layout: str
    scale: str
    dtype: str
    difference: float
    control: float | None = None
    tokens: float | None = None
    block_bytes: float | None = None


class Refusal(Section):
    """A kind of parallelism that the module cannot have, and the finding that excludes it."""

    kind: str
    reason: str


class Plan(Section):
    """A parallel plan. See the module's docstring.

    Attributes:
        format: version of the file format.
        subject: reference from which :func:`port_kit.autoparallel.subject.load_subject` loads the subject.
        module_class: qualified name of the module's class.
        versions: packages that the plan was inferred with.
        fingerprint: digest of the source that it was inferred from (:mod:`port_kit.autoparallel.shipped`).
    """

    format: Literal[1] = FORMAT
    subject: str
    module_class: str
    versions: dict[str, str] = Field(default_factory=dict)
    fingerprint: str = ""
    streams: tuple[Stream, ...] = ()
    blocks: tuple[Blocks, ...] = ()
    attention: tuple[AttentionSite, ...] = ()
    whole: tuple[WholeModule, ...] = ()
    units: tuple[UnitGroup, ...] = ()
    linears: tuple[LinearPlan, ...] = ()
    norms: tuple[NormPlan, ...] = ()
    tables: tuple[TablePlan, ...] = ()
    divided: tuple[DividedValue, ...] = ()
    refused: tuple[Refusal, ...] = ()
    proofs: tuple[Proof, ...] = ()

    def to_toml(self) -> str:
        """Return the plan as TOML; :meth:`from_toml` reads it back. Fields with default values are left out."""
        return tomlkit.dumps({"format": self.format, **self.model_dump(mode="json", exclude_defaults=True)})

    @classmethod
    def from_toml(cls, text: str) -> Plan:
        """Read a plan.

        Raises:
            ParallelError: ``plan_file``; the text is not TOML, or not a plan.
        """
        try:
            return cls.model_validate(tomllib.loads(text))
        except (tomllib.TOMLDecodeError, ValidationError) as error:
            raise ParallelError(
                f"not a plan file: {reason_of(error)}",
                code="plan_file",
                hint="infer it again: port-kit plan infer CLASS -o FILE",
            ) from error

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan file.

        Raises:
            ParallelError: ``plan_file``; it cannot be read.
        """
        try:
            return cls.from_toml(read_text(path))
        except (OSError, UnicodeDecodeError) as error:
            raise ParallelError(f"{path}: {reason_of(error)}", code="plan_file", hint="name a plan file") from error

    def validate_for(self, module: nn.Module) -> None:
        """Check that every pattern names modules.

        Raises:
            ParallelError: ``plan_pattern``; a pattern matches nothing.
        """
        sections = (self.attention, self.whole, self.norms, self.tables, self.divided)
        patterns = [entry.module for section in sections for entry in section]  # type: ignore[attr-defined]
        for linear in self.linears:
            find_linears(module, linear)
        patterns += [pattern for blocks in self.blocks for pattern in (blocks.modules, *blocks.complete)]
        for pattern in patterns:
            find(module, pattern)


def matches(path: str, pattern: str) -> bool:
    """Return True if a module path matches a pattern; ``*`` matches one component."""
    parts, wanted = path.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def present(module: nn.Module, pattern: str) -> dict[str, nn.Module]:
    """Return the modules that match a pattern, by path, in the order of registration; there may be none."""
    return {path: child for path, child in module.named_modules(remove_duplicate=False) if matches(path, pattern)}


def find(module: nn.Module, pattern: str) -> dict[str, nn.Module]:
    """Return the modules that match a pattern, by path, in the order of registration.

    There are none if the configuration of the module leaves them out: their owners have None in their place.

    Raises:
        ParallelError: ``plan_pattern``; there are none for another reason.
    """
    found = present(module, pattern)
    if not found and not _is_left_out(module, pattern):
        raise ParallelError(
            f"pattern {quoted(pattern)} matches no module of {type(module).__name__}",
            code="plan_pattern",
            hint="infer the plan from this class: port-kit plan infer CLASS -o FILE",
            pattern=pattern,
        )
    return found


def find_linears(module: nn.Module, entry: LinearPlan) -> dict[str, nn.Module]:
    """Return the linears of an entry; there may be none with the role ``gathered``, which changes no result.

    Raises:
        ParallelError: ``plan_pattern``; as :func:`find`.
    """
    return present(module, entry.module) if entry.role == "gathered" else find(module, entry.module)


def _is_left_out(module: nn.Module, pattern: str) -> bool:
    parts = pattern.split(".")
    for length in range(len(parts) - 1, -1, -1):
        owners = present(module, ".".join(parts[:length])) if length else {"": module}
        if owners:
            return all(getattr(owner, parts[length], owner) is None for owner in owners.values())
    return False


def generalize(path: str) -> str:
    """Return the pattern of a module path: indices become ``*`` if they number the members of a list of blocks.

    Only the first index of a path is replaced; later ones (``to_out.0``) distinguish modules within a block.
    """
    parts = path.split(".")
    index = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return path if index is None else ".".join([*parts[:index], "*", *parts[index + 1 :]])


def generalize_all(paths: Iterable[str]) -> tuple[str, ...]:
    """Return the patterns of several paths without repetition, in order."""
    return tuple(dict.fromkeys(map(generalize, paths)))
