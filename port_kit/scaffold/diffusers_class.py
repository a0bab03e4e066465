"""Structure and behavior of a diffusers transformer, from which a port of it is generated.

The module tree is read from a tiny instance, and the tiny pipeline around it runs once with guidance and once
without. What cannot be adapted is listed, all of it, in one error.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from port_kit.errors import OptionalDependencyError, ScaffoldError
from port_kit.inspect.adapted_classes import ATTENTION_TEMPLATES, FAMILIES, GATHERED, KNOWN_OTHERWISE, PAIRS, Family

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class AttentionFacts:
    """One attention of every block.

    Attributes:
        path: in the block (``attn1``).
        cross: it reads the text, not the tokens.
        processor: the class that computes it.
        module: where that class is imported from.
    """

    path: str
    cross: bool
    processor: str
    module: str


@dataclass(frozen=True)
class ClassFacts:
    """Facts of a diffusers transformer from which a port is generated.

    Attributes:
        family: the pipeline around it.
        blocks: attribute of the list of blocks.
        block_class: class of all blocks.
        block_module: where that class is imported from.
        attentions: of each block.
        linears: ``{pattern of paths: role}`` of the other linears that are split.
        block_leaves: ``{submodule: its tensors}`` of a block, attentions' included; "" for the block's own.
        top: names of the other modules and parameters of the transformer that have values.
        top_parameters: those of them that are parameters.
        sharded: arguments of a block, tuples of tensors, that have one entry a token: ``{name: dimensions of each}``.
        batched: arguments of the transformer that have one entry a guidance branch.
        config: the class's defaults.
    """

    family: Family
    blocks: str
    block_class: str
    block_module: str
    attentions: tuple[AttentionFacts, ...]
    linears: Mapping[str, str]
    block_leaves: Mapping[str, tuple[str, ...]]
    top: tuple[str, ...]
    top_parameters: tuple[str, ...]
    sharded: Mapping[str, tuple[int, ...]]
    batched: tuple[str, ...]
    config: Mapping[str, Any]


@dataclass
class _Seen:
    """Observations of a run of the tiny pipeline."""

    calls: list[dict[str, Any]] = field(default_factory=list)
    blocks: list[tuple[int, dict[str, Any], Any]] = field(default_factory=list)
    cross: dict[str, bool] = field(default_factory=dict)


def read_class(name: str) -> ClassFacts:
    """Read a transformer class of the installed diffusers.

    Args:
        name: the class (``LTXVideoTransformer3DModel``).

    Raises:
        OptionalDependencyError: diffusers or transformers is not installed.
        ScaffoldError: there is no such class, or it cannot be adapted; lists every reason.
    """
    cls = _class(name)
    family = FAMILIES.get(name)
    if family is None:
        own = [KNOWN_OTHERWISE[name]] if name in KNOWN_OTHERWISE else []
        raise _refused(name, [f"no pipeline and no tiny configuration is known for {name}", *own, *_unknown(cls)])
    import torch

    torch.manual_seed(0)
    model = cls(**family.tiny).eval()
    lists = [path for path, child in model.named_children() if isinstance(child, torch.nn.ModuleList)]
    problems = list(_tree_problems(model, lists))
    if problems:
        raise _refused(name, problems)
    seen = _run(model, family, lists[0])
    block = model.get_submodule(f"{lists[0]}.0")
    problems = list(_run_problems(seen))
    if problems:
        raise _refused(name, problems)
    return ClassFacts(
        family=family,
        blocks=lists[0],
        block_class=type(block).__name__,
        block_module=type(block).__module__,
        attentions=tuple(_attentions(block, seen)),
        linears=_linears(model, lists[0]),
        block_leaves=_leaves(block),
        top=tuple(dict.fromkeys(key.partition(".")[0] for key in model.state_dict() if not key.startswith(lists[0]))),
        top_parameters=tuple(key for key in model.state_dict() if "." not in key),
        sharded=_sharded(seen),
        batched=_batched(seen),
        config={key: value for key, value in cls().config.items() if not key.startswith("_")},
    )


def _class(name: str) -> Any:
    try:
        import diffusers
        import transformers  # noqa: F401 - the pipelines need it
    except ModuleNotFoundError as error:
        raise OptionalDependencyError(
            f"reading {name} needs the package {error.name!r}, which is not installed",
            hint="install the runtime: pip install 'port-kit[omni]'",
        ) from error
    cls = getattr(diffusers, name, None)
    if not inspect.isclass(cls) or not hasattr(cls, "load_config"):
        raise ScaffoldError(
            f"diffusers {diffusers.__version__} has no model class {name!r}",
            code="scaffold_unsupported",
            hint=f"classes that can be adapted: {', '.join(FAMILIES)}",
        )
    return cls


def _refused(name: str, problems: Sequence[str]) -> ScaffoldError:
    return ScaffoldError(
        f"{name} cannot be adapted:\n" + "\n".join(f"  - {problem}" for problem in problems),
        code="scaffold_unsupported",
        hint=f"adapted are {', '.join(FAMILIES)}; for any other class take --path hybrid and port its transformer",
        problems=list(problems),
    )


def _unknown(cls: Any) -> Iterator[str]:
    """Yield the reasons against a class in the module tree of its default instance, built on the meta device."""
    import torch

    try:
        with torch.device("meta"):
            model = cls()
    except (TypeError, ValueError, NotImplementedError, RuntimeError, AttributeError) as error:
        yield f"it cannot be built from its defaults ({error})"
        return
    lists = [path for path, child in model.named_children() if isinstance(child, torch.nn.ModuleList)]
    yield from _tree_problems(model, lists)


def _tree_problems(model: nn.Module, lists: Sequence[str]) -> Iterator[str]:
    """Everything in a module tree that no template knows."""
    import torch

    if len(lists) != 1:
        yield f"it has {len(lists)} lists of modules ({', '.join(lists) or 'none'}); one list of blocks is adapted"
    for path in lists:
        kinds = sorted({type(child).__name__ for child in model.get_submodule(path).children()})
        if len(kinds) > 1:
            yield f"{path} holds blocks of several classes: {', '.join(kinds)}"
    if getattr(model, "_keep_in_fp32_modules", None):
        yield f"it keeps {', '.join(model._keep_in_fp32_modules)} in float32, which no template does"
    processors: dict[str, str] = {}
    activations: dict[str, str] = {}
    for path, child in model.named_modules():
        processor = getattr(child, "processor", None)
        if processor is not None:
            processors.setdefault(type(processor).__name__, path)
        if type(child).__name__ == "FeedForward":
            net = getattr(child, "net", None)  # some models have a class of that name and another build
            activations.setdefault(type(net[0]).__name__ if isinstance(net, torch.nn.ModuleList) else "", path)
    for activation, path in activations.items():
        if activation != "GELU":
            had = f"has the activation {activation}" if activation else "is not diffusers' own"
            yield f"{path} {had}; FeedForward with GELU is adapted"
    for processor, path in processors.items():
        if processor not in ATTENTION_TEMPLATES:
            known = ", ".join(ATTENTION_TEMPLATES)
            yield f"{path} is computed by {processor}; attention of {known} is adapted"
    if not processors:
        yield "none of its modules has an attention processor"
    elif len({ATTENTION_TEMPLATES.get(name) for name in processors}) > 1:
        yield f"its attentions are computed in several ways: {', '.join(processors)}"


def build_parts(family: Family, scratch: Path) -> dict[str, Any]:
    """Build the tiny components beside the transformer, with whatever values they are initialised with."""
    import importlib

    from port_kit.testing.tokenizer import write_tokenizer

    parts: dict[str, Any] = {}
    for name, part in family.parts.items():
        cls = getattr(importlib.import_module(part.module), part.class_name)
        if part.module == "transformers":
            parts[name] = cls(cls.config_class(**part.config)).eval()
        else:
            parts[name] = cls(**part.config)
    from transformers import AutoTokenizer

    write_tokenizer(scratch, size=family.vocabulary)
    return {**parts, "tokenizer": AutoTokenizer.from_pretrained(scratch)}


def _run(model: nn.Module, family: Family, blocks: str) -> _Seen:
    """Run the tiny pipeline with guidance, then without, and note what the transformer and its blocks were given."""
    import diffusers
    import torch

    seen = _Seen()

    def note_call(module: nn.Module, args: Any, kwargs: Any) -> None:
        names = list(inspect.signature(module.forward).parameters)
        seen.calls.append({**dict(zip(names, args, strict=False)), **kwargs})

    def note_block(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        names = list(inspect.signature(module.forward).parameters)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        seen.blocks.append((len(seen.calls), given, output))

    def note_attention(path: str) -> Any:
        def note(_module: nn.Module, args: Any, kwargs: Any) -> None:
            text = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
            seen.cross[path] = text is not None

        return note

    model.register_forward_pre_hook(note_call, with_kwargs=True)
    first = model.get_submodule(f"{blocks}.0")
    first.register_forward_hook(note_block, with_kwargs=True)
    for path, child in first.named_modules():
        if getattr(child, "processor", None) is not None:
            child.register_forward_pre_hook(note_attention(path), with_kwargs=True)
    diffusers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory(prefix="port-kit-") as scratch, torch.no_grad():
        pipeline = getattr(diffusers, family.pipeline)(transformer=model, **build_parts(family, Path(scratch)))
        pipeline.set_progress_bar_config(disable=True)
        for guidance in (family.guidance, 1.0):
            request = {**family.request, "guidance_scale": guidance}
            pipeline(prompt="a cat", output_type="latent", generator=torch.Generator().manual_seed(0), **request)
    return seen


def _run_problems(seen: _Seen) -> Iterator[str]:
    guided = sum(1 for call in seen.calls if call["hidden_states"].shape[0] == 2)
    if 2 * guided != len(seen.calls):
        yield "its pipeline does not run both branches of guidance in one batch"
        return
    given, output = seen.blocks[0][1:]
    tokens: Any = given.get("hidden_states")
    if not hasattr(tokens, "shape") or tokens.ndim != 3:
        yield "its blocks do not take hidden_states of [batch, tokens, width]"
    elif getattr(output, "shape", None) != tokens.shape:
        yield "its blocks do not return hidden_states alone"
    else:
        for name, value in given.items():
            if name != "hidden_states" and getattr(value, "ndim", 0) > 1 and value.shape[1] == tokens.shape[1]:
                yield f"its blocks take {name} with an entry a token; only tuples of such tables are split"


def _attentions(block: nn.Module, seen: _Seen) -> Iterator[AttentionFacts]:
    for path, child in block.named_modules():
        if getattr(child, "processor", None) is not None:
            kind = type(child.processor)
            yield AttentionFacts(path, seen.cross[path], kind.__name__, kind.__module__)


def _linears(model: nn.Module, blocks: str) -> dict[str, str]:
    """Name the linears outside of attention that are worth a collective, one entry for all blocks."""
    import torch

    found: dict[str, str] = {}
    for path, child in model.named_modules():
        roles: dict[str, str] = {}
        kind = type(child).__name__
        if kind in PAIRS:
            first, second = PAIRS[kind]
            roles = {first: "column", second: "row"}
        elif kind in GATHERED:
            roles = {GATHERED[kind]: "gathered"}
        for name, role in roles.items():
            full = f"{path}.{name}"
            if full.startswith(f"{blocks}."):
                full = ".".join([blocks, "*", *full.split(".")[2:]])
            if isinstance(model.get_submodule(full.replace("*", "0")), torch.nn.Linear):
                found[full] = role
    return found


def _leaves(block: nn.Module) -> dict[str, tuple[str, ...]]:
    leaves: dict[str, list[str]] = {}
    for key in block.state_dict():
        owner, _, leaf = key.rpartition(".")
        leaves.setdefault(owner, []).append(leaf)
    return {owner: tuple(names) for owner, names in leaves.items()}


def _sharded(seen: _Seen) -> dict[str, tuple[int, ...]]:
    """Tuples of tensors with one entry a token in dimension 1: rotary tables."""
    given = seen.blocks[0][1]
    tokens = given["hidden_states"].shape[1]
    return {
        name: tuple(item.ndim for item in value)
        for name, value in given.items()
        if isinstance(value, tuple) and all(hasattr(item, "shape") and item.shape[1] == tokens for item in value)
    }


def _batched(seen: _Seen) -> tuple[str, ...]:
    """Arguments whose tensors have two entries with guidance and one without."""
    guided, alone = seen.calls[0], seen.calls[-1]
    return tuple(
        name
        for name, value in guided.items()
        if hasattr(value, "shape") and value.ndim and value.shape[0] == 2 * alone[name].shape[0]
    )
