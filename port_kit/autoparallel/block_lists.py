"""Lists of blocks for HSDP, offload and regional compilation, with or without sharded tokens."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from port_kit.autoparallel.plan import Blocks, Plan, find, generalize, generalize_all, matches
from port_kit.autoparallel.tensor.blocks import BlockCalls, is_linear
from port_kit.upstream.checks import require


def list_blocks(model: nn.Module, calls: BlockCalls) -> tuple[Blocks, ...]:
    """Return the lists whose members are called and have linears, without token axes."""
    called = [path for path in calls.first if any(map(is_linear, model.get_submodule(path).modules()))]
    return tuple(Blocks(modules=pattern) for pattern in generalize_all(called))


def with_complete_modules(blocks: Iterable[Blocks], model: nn.Module, calls: BlockCalls) -> tuple[Blocks, ...]:
    """Record in each list the modules with parameters that code outside of their block calls.

    Such a call does not gather the parameters that HSDP shards with the block. A module of the first block only is
    recorded by its path; every other one by its pattern, so that the plan holds for other depths.
    """
    outside = [path for path in calls.outside if path.rpartition(".")[0] not in calls.outside]
    paths = sorted(path for path in outside if any(True for _ in model.get_submodule(path).parameters()))
    return tuple(entry.model_copy(update={"complete": _patterns(paths, entry.modules)}) for entry in blocks)


def _patterns(paths: list[str], modules: str) -> tuple[str, ...]:
    length = len(modules.split("."))
    own = [path for path in paths if matches(".".join(path.split(".")[:length]), modules)]
    found = []
    for path in own:
        pattern = generalize(path)
        alone = [one for one in own if generalize(one) == pattern] == [path]
        first = path.split(".")[length - 1] == "0"
        found.append(path if alone and first else pattern)
    return tuple(dict.fromkeys(found))


def declare_hsdp(model: nn.Module, plan: Plan) -> None:
    """Declare to vLLM-Omni which blocks HSDP shards, and which of their modules it leaves complete.

    Raises:
        ParallelError: ``plan_pattern``; the module lacks what the plan names.
    """
    require("hsdp_declarations")
    sharded = [blocks for blocks in plan.blocks if blocks.hsdp]
    model._hsdp_shard_conditions = [  # type: ignore[assignment]
        lambda name, _module: any(matches(name, blocks.modules) for blocks in sharded)
    ]
    complete = [path for blocks in sharded for pattern in blocks.complete for path in find(model, pattern)]
    if complete:
        before = list(getattr(model, "_hsdp_ignored_modules", None) or ())
        model._hsdp_ignored_modules = [*before, *complete]  # type: ignore[assignment]
