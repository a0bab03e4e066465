"""One rank of a proof: the plan applied, the module run, its work measured, and its exchanges left out."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from port_kit.autoparallel.attention_functions import AttentionCall
from port_kit.autoparallel.block_lists import declare_hsdp
from port_kit.autoparallel.boundaries import ShardedModel
from port_kit.autoparallel.engine_groups import engine_groups
from port_kit.autoparallel.observe import block_paths
from port_kit.autoparallel.plan import Plan, find
from port_kit.autoparallel.subject import ModelScale, Subject, TokenScale
from port_kit.autoparallel.tree import Arguments, leaves, rebuild
from port_kit.parallel.layout import Layout
from port_kit.upstream.checks import require

#: Inputs of a proof: masked keys, and a batch with other numbers of tokens. Neither is the smallest input.
INPUTS = (TokenScale(image=1, text=1, audio=1, masked=True), TokenScale(image=2, text=2, audio=1, batch=1))


#: Guidance branch whose outputs a rank returns.
_BRANCH = 0


@dataclass(frozen=True)
class Run:
    """One configuration to run.

    Attributes:
        scale: name of the configuration.
        model: its multipliers.
        dtype: dtype of weights and inputs.
        controls: run again with each exchange left out.
    """

    scale: str
    model: ModelScale
    dtype: torch.dtype = torch.float32
    controls: bool = False


@dataclass
class Measured:
    """Results of one run on one rank.

    Attributes:
        outputs: output tensors per input.
        tokens: tokens that enter blocks, summed over blocks and inputs.
        rows: rows that enter linears of blocks, summed.
        block_bytes: bytes of the parameters of blocks that this rank holds.
        exchanges: number of attention calls by kind of exchange.
        controls: output tensors of the first input per exchange that was left out.
    """

    outputs: list[tuple[Tensor, ...]] = field(default_factory=list)
    tokens: int = 0
    rows: int = 0
    block_bytes: int = 0
    exchanges: dict[str, int] = field(default_factory=dict)
    controls: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)


def run_single(subject: Subject, plan: Plan, run: Run) -> Measured:
    """Run the unmodified module."""
    model = nn.Module.to(subject.build(run.model), run.dtype)
    return _measure(subject, plan, run, model)


def run_rank(subject: Subject, plan: Plan, runs: list[Run], layout: Layout, rank: int, folder: Path) -> list[Measured]:
    """Apply the plan with the groups of a layout, and run each configuration; the work of one forked rank."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with engine_groups(layout, rank, folder / "rendezvous", torch.float32) as config:
        return [_run(subject, plan, run, layout, config) for run in runs]


def _run(subject: Subject, plan: Plan, run: Run, layout: Layout, config: Any) -> Measured:
    model = nn.Module.to(subject.build(run.model), run.dtype)
    sharded = apply_plan(model, plan, layout, config, run.dtype)
    measured = _measure(subject, plan, run, model, layout)
    measured.exchanges = sharded.exchanges()
    if run.controls:
        for name, left_out in _controls(layout).items():
            with left_out():
                measured.controls[name] = _call(subject, model, run_inputs(subject, run, INPUTS[0]), layout)
    return measured


def apply_plan(model: nn.Module, plan: Plan, layout: Layout, config: Any, dtype: torch.dtype) -> ShardedModel:
    """Apply the parts of a plan that a layout needs."""
    from port_kit.autoparallel.sequence import apply_tokens

    if layout.tp > 1:
        _split_channels(model, plan)
    sharded = apply_tokens(model, plan)
    if layout.hsdp > 1:
        _shard_blocks(model, plan, config, dtype)
    return sharded


@torch.no_grad()
def _split_channels(model: nn.Module, plan: Plan) -> None:
    """Apply tensor parallelism, and load the original weights with the rules of the plan."""
    from port_kit.autoparallel.tensor.apply import apply_tensor_parallelism
    from port_kit.autoparallel.tensor.weights import weight_rules
    from port_kit.remap import load_weights

    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    applied = apply_tensor_parallelism(model, plan)
    load_weights(model, weights.items(), weight_rules(applied, plan.subject))


def _shard_blocks(model: nn.Module, plan: Plan, config: Any, dtype: torch.dtype) -> None:
    from vllm_omni.diffusion.distributed.hsdp import HSDPInferenceConfig, apply_hsdp_to_model

    require("hsdp_apply")
    declare_hsdp(model, plan)
    parallel = config.parallel_config
    settings = HSDPInferenceConfig(
        enabled=True,
        hsdp_replicate_size=parallel.hsdp_replicate_size,
        hsdp_shard_size=parallel.hsdp_shard_size,
        param_dtype=dtype,
        reduce_dtype=dtype,
    )
    apply_hsdp_to_model(model, settings, torch.device("cpu"))


def _measure(subject: Subject, plan: Plan, run: Run, model: nn.Module, layout: Layout | None = None) -> Measured:
    measured = Measured(block_bytes=_block_bytes(model, plan))
    hooks = [*_count_tokens(model, plan, measured), *_count_rows(model, plan, measured)]
    for tokens in INPUTS:
        measured.outputs.append(_call(subject, model, run_inputs(subject, run, tokens), layout))
    for hook in hooks:
        hook.remove()
    return measured


def _call(subject: Subject, model: nn.Module, inputs: dict[str, Any], layout: Layout | None) -> tuple[Tensor, ...]:
    with torch.no_grad():
        if layout is not None and layout.cfg > 1:
            return _call_branches(subject, model, inputs)
        outputs = subject.output(model(**inputs))
    return tuple(output.detach().float().clone() for output in outputs)


def _call_branches(subject: Subject, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
    """Run one guidance branch per rank of the guidance group, and gather; return the outputs of the first branch.

    The other branches get other numbers: their outputs must not reach the result.
    """
    from vllm_omni.diffusion.distributed.parallel_state import get_cfg_group

    group = get_cfg_group()
    if group.rank_in_group:
        inputs = rebuild(inputs, lambda _path, leaf: _negated(leaf))
    outputs = subject.output(model(**inputs))
    return tuple(
        group.all_gather(output.float().contiguous(), separate_tensors=True)[_BRANCH].clone() for output in outputs
    )


def _negated(leaf: Any) -> Any:
    return -leaf if torch.is_tensor(leaf) and leaf.is_floating_point() and leaf.dim() > 2 else leaf


def run_inputs(subject: Subject, run: Run, tokens: TokenScale) -> dict[str, Any]:
    """Return new inputs with floating-point tensors in the run's dtype; a module may change its inputs in place."""

    def cast(_path: str, leaf: Any) -> Any:
        return leaf.to(run.dtype) if torch.is_tensor(leaf) and leaf.is_floating_point() else copy.copy(leaf)

    inputs = subject.inputs(tokens, run.model)
    return inputs if run.dtype is torch.float32 else rebuild(inputs, cast)


def _blocks(model: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    """Return the blocks of a plan; all members of lists of modules if it names none."""
    patterns = [blocks.modules for blocks in plan.blocks]
    if not patterns:
        return {path: model.get_submodule(path) for path in block_paths(model)}
    return {path: block for pattern in patterns for path, block in find(model, pattern).items()}


def _block_bytes(model: nn.Module, plan: Plan) -> int:
    parameters = {id(p): p for block in _blocks(model, plan).values() for p in block.parameters()}
    local = [p.to_local() if hasattr(p, "to_local") else p for p in parameters.values()]
    return sum(p.numel() * p.element_size() for p in local)


def _count_tokens(model: nn.Module, plan: Plan, measured: Measured) -> Iterator[Any]:
    """Count the tokens of the first input of each block that has tokens."""
    for blocks in plan.blocks:
        axes = [axis for axis in blocks.inputs if axis.dim >= 0]
        for block in find(model, blocks.modules).values() if axes else ():
            yield block.register_forward_pre_hook(
                _token_counter(block, axes[0].path, axes[0].dim, measured), with_kwargs=True
            )


def _token_counter(block: nn.Module, path: str, dim: int, measured: Measured) -> Callable[..., None]:
    names = Arguments(block)

    def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
        for found, leaf in leaves(names.named(args, kwargs)):
            if found == path and torch.is_tensor(leaf):
                measured.tokens += leaf.shape[dim]

    return hook


def _count_rows(model: nn.Module, plan: Plan, measured: Measured) -> Iterator[Any]:
    def hook(_module: nn.Module, args: Any) -> None:
        measured.rows += args[0].numel() // max(args[0].shape[-1], 1)

    for block in _blocks(model, plan).values():
        for module in block.modules():
            if isinstance(getattr(module, "weight", None), Tensor) and hasattr(module, "in_features"):
                yield module.register_forward_pre_hook(hook)


def _controls(layout: Layout) -> Mapping[str, Callable[[], Any]]:
    """Return the exchanges of a layout, each with a context that leaves it out."""
    found: dict[str, Callable[[], Any]] = {}
    if layout.tp > 1:
        found["sums over ranks"] = _without_sums
    if layout.cfg > 1:
        found["the branch of the first rank"] = _with_other_branch
    if layout.sequence > 1:
        found["tokens of other ranks"] = _without_other_tokens
    return found


@contextmanager
def _without_sums() -> Iterator[None]:
    """Leave out the all-reduces of tensor parallelism."""
    from vllm.distributed import get_tp_group

    with _replaced(get_tp_group(), "all_reduce", lambda x: x):
        yield


@contextmanager
def _without_other_tokens() -> Iterator[None]:
    """Attend to this rank's tokens only, and keep its own parts where tokens are exchanged at linears."""
    from port_kit.autoparallel.exchange import GroupExchange
    from port_kit.autoparallel.sites import SiteRouter

    def local(_router: Any, _site: Any, call: AttentionCall, _mask: Any) -> Any:
        query, key, value = (x.transpose(1, 2) for x in call.tensors)
        out = scaled_dot_product_attention(query, key, value, scale=call.scale, enable_gqa=True)
        return call.wrap(out.transpose(1, 2))

    with (
        _replaced(SiteRouter, "_run_kernel", lambda *_: None),
        _replaced(SiteRouter, "_exchange_heads", local),
        _replaced(SiteRouter, "_exchange_keys", local),
        _replaced(GroupExchange, "all_to_all", lambda _exchange, parts: list(parts)),
    ):
        yield


@contextmanager
def _with_other_branch() -> Iterator[None]:
    """Return the outputs of the last guidance branch."""
    global _BRANCH
    _BRANCH = -1
    try:
        yield
    finally:
        _BRANCH = 0


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
