"""Tests of Cache-DiT for inferred plans: patterns, findings, proofs, and the comparison with Cache-DiT's own blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cache_dit import BlockAdapter, DBCacheConfig, ForwardPattern, disable_cache, enable_cache
from torch import Tensor, nn

from port_kit.autoparallel.block_lists import list_blocks
from port_kit.autoparallel.cache.adapter import cached_lists
from port_kit.autoparallel.cache.infer import with_cache_patterns
from port_kit.autoparallel.cache.prove import prove_cache
from port_kit.autoparallel.cache.steps import EVERYTHING, STEPS, cache_enabled, caller, run_cached_steps, run_steps
from port_kit.autoparallel.plan import Blocks, CacheState, Plan
from port_kit.autoparallel.prove import prove_plan
from port_kit.autoparallel.results import CONTROL_FACTOR, TOLERANCE, LayoutResult, difference
from port_kit.autoparallel.shipped import SHIPPED
from port_kit.autoparallel.subject import ModelScale, Subject, TokenScale, load_subject
from port_kit.autoparallel.tensor.blocks import observe_blocks
from port_kit.errors import ParallelError
from port_kit.parallel.cached_layout import split_cache, with_cache
from port_kit.parallel.layout import Layout
from tests.helpers import slow


def cached_plan(subject: Subject) -> Plan:
    """Return a plan with the lists of a module and their patterns."""
    model = subject.build(ModelScale())
    blocks = list_blocks(model, observe_blocks(model, subject.inputs(TokenScale())))
    return Plan(subject=subject.name, module_class="", blocks=with_cache_patterns(subject, blocks))


def patterns(name: str) -> dict[str, str]:
    """Return the patterns of a class of diffusers by list."""
    return {each.modules: each.cache_pattern for each in cached_plan(load_subject(name)).blocks if each.cache_pattern}


class Block(nn.Module):
    """A residual block; ``effect`` is called with the arguments."""

    def __init__(self, effect: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.effect = nn.Linear(8, 8), effect

    def forward(self, hidden: Tensor, memory: Tensor) -> Tensor:
        self.effect(hidden, memory)
        return hidden + self.linear(hidden + memory.mean())


class Module(nn.Module):
    """Blocks with code between them."""

    def __init__(self, depth: int, effect: Any, between: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.blocks, self.between = nn.ModuleList(Block(effect) for _ in range(depth)), between

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = self.between(block(x, memory), number)
        return x


def subject_of(effect: Any = lambda *_: None, between: Any = lambda x, _: x) -> Subject:
    def build(scale: ModelScale) -> nn.Module:
        torch.manual_seed(0)
        return Module(2 * scale.depth, effect, between).eval()

    def inputs(tokens: TokenScale, _model: ModelScale | None = None) -> dict[str, Any]:
        x = torch.randn(1 + tokens.batch, 5 + tokens.image, 8, generator=torch.Generator().manual_seed(1))
        return {"x": x, "memory": torch.ones(3, 4)}

    return Subject("tests:subject", build, inputs, output=lambda result: (result,))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("CogVideoXTransformer3DModel", {"transformer_blocks.*": "Pattern_0"}),
        ("FluxTransformer2DModel", {"transformer_blocks.*": "Pattern_1", "single_transformer_blocks.*": "Pattern_1"}),
        ("WanTransformer3DModel", {"blocks.*": "Pattern_2"}),
        ("ChromaTransformer2DModel", {"transformer_blocks.*": "Pattern_1", "single_transformer_blocks.*": "Pattern_3"}),
        ("Cosmos3OmniTransformer", {"layers.*": "Pattern_1"}),
    ],
)
def test_patterns(name: str, expected: dict[str, str]) -> None:
    assert patterns(name) == expected


def test_a_list_follows_the_one_that_it_alternates_with() -> None:
    spatial, temporal = cached_plan(load_subject("LatteTransformer3DModel")).blocks
    assert (spatial.cache_pattern, spatial.cache_with) == ("", "temporal_transformer_blocks.*")
    assert temporal.cache_pattern == "Pattern_3"


def test_a_list_whose_results_the_module_uses_one_by_one_is_excluded() -> None:
    vace, main = cached_plan(load_subject("WanVACETransformer3DModel")).blocks
    assert not vace.cache_pattern and "a cached step differs" in vace.cache_reason
    assert main.cache_pattern == "Pattern_2"


def _shorten(x: Tensor, number: int) -> Tensor:
    return x[:, 1:] if number == 1 else x


@pytest.mark.parametrize(
    ("subject", "finding"),
    [
        (subject_of(effect=lambda hidden, _memory: hidden.mul_(2)), "change their argument hidden"),
        (subject_of(effect=lambda _hidden, memory: memory.add_(1)), "change their argument memory"),
        (
            subject_of(between=_shorten),
            "blocks.2 receives hidden of shape (1, 4, 8); the previous block returned (1, 5, 8)",
        ),
    ],
)
def test_findings(subject: Subject, finding: str) -> None:
    (blocks,) = cached_plan(subject).blocks
    assert not blocks.cache_pattern and finding in blocks.cache_reason


def test_code_between_the_blocks_is_part_of_the_reuse() -> None:
    plan = cached_plan(subject := subject_of(between=lambda x, number: x * 1.5 + number))
    assert plan.blocks[0].cache_pattern == "Pattern_3"
    assert prove_cache(subject, plan, Layout()).proven


@pytest.mark.parametrize(
    "name", ["CogVideoXTransformer3DModel", "FluxTransformer2DModel", "WanTransformer3DModel", "SanaTransformer2DModel"]
)
def test_steps_that_reuse_are_those_of_cache_dit(name: str) -> None:
    """Compare with the blocks of Cache-DiT, which these classes fit as they are."""
    subject, scale = load_subject(name), ModelScale(depth=2)
    plan, model = cached_plan(subject), subject.build(scale)
    inputs, call = lambda: subject.inputs(TokenScale(image=1), scale), caller(subject, model)
    with cache_enabled(model, plan, EVERYTHING) as backend:
        ours = run_cached_steps(model, call, inputs, backend)
    model = subject.build(scale)
    lists = {each.modules.removesuffix(".*"): each for each in plan.blocks if each.cache_pattern}
    adapter = BlockAdapter(
        transformer=model,
        blocks=[getattr(model, each) for each in lists],
        forward_pattern=[ForwardPattern[each.cache_pattern] for each in lists.values()],
        check_forward_pattern=False,
    )
    type(adapter.pipe)._is_cached = False
    config = DBCacheConfig(
        residual_diff_threshold=EVERYTHING, max_warmup_steps=0, max_continuous_cached_steps=-1, Fn_compute_blocks=1
    )
    enable_cache(adapter, cache_config=config)
    theirs = run_steps(caller(subject, model), inputs)
    disable_cache(adapter)
    assert ours.reused == dict.fromkeys(lists, STEPS - 1)
    assert max(difference(one, other) for one, other in zip(ours.outputs, theirs, strict=True)) <= TOLERANCE


def test_the_cache_can_be_disabled_and_configured_again() -> None:
    subject = load_subject("FluxTransformer2DModel")
    plan, model = cached_plan(subject), subject.build(ModelScale())
    inputs, call = lambda: subject.inputs(TokenScale(), ModelScale()), caller(subject, model)
    before = run_steps(call, inputs)
    for _ in range(2):
        with cache_enabled(model, plan, EVERYTHING) as backend:
            steps = run_cached_steps(model, call, inputs, backend)
        assert difference(steps.outputs[-1], before[-1]) > CONTROL_FACTOR * TOLERANCE
    assert difference(run_steps(call, inputs)[-1], before[-1]) == 0


def test_a_request_that_failed_leaves_no_trace() -> None:
    """The first spatial block of Latte is called before the list whose decision it follows."""
    subject, scale = load_subject("LatteTransformer3DModel"), ModelScale(depth=2)
    plan, model = cached_plan(subject), subject.build(scale)
    inputs, call = lambda: subject.inputs(TokenScale(), scale), caller(subject, model)
    expected = call(inputs())

    def fail(*_: Any) -> None:
        raise InterruptedError

    with cache_enabled(model, plan, EVERYTHING) as backend:
        run_cached_steps(model, call, inputs, backend, varied=False)
        hook = model.get_submodule("temporal_transformer_blocks.0").register_forward_hook(fail)
        with pytest.raises(InterruptedError):
            call(inputs())
        hook.remove()
        region = cached_lists(model).regions["temporal_transformer_blocks"]
        region.reuse = region.active = True
        steps = run_cached_steps(model, call, inputs, backend, varied=False)
    assert max(difference(outputs, expected) for outputs in steps.outputs) <= TOLERANCE
    assert steps.computed == 8 + 2 * 2


def test_more_blocks_than_the_list_has_are_refused() -> None:
    subject = subject_of()
    model = subject.build(ModelScale())
    with cache_enabled(model, cached_plan(subject), EVERYTHING) as backend:
        backend.config = replace(backend.config, Fn_compute_blocks=3)
        backend._refresh_funcs = []
        for context in model._context_manager._cached_context_manager.values():  # type: ignore[union-attr, operator]
            context.cache_config.Fn_compute_blocks = 3
        with pytest.raises(ParallelError) as caught:
            model(**subject.inputs(TokenScale()))
    assert caught.value.code == "plan_cache"


def shipped(name: str) -> tuple[Subject, Plan]:
    return load_subject(name), Plan.load(SHIPPED / f"{name}.toml")


@pytest.mark.integration
@pytest.mark.parametrize("name", ["WanTransformer3DModel", *slow("FluxTransformer2DModel")])
def test_shipped_plans_are_proven_with_ulysses(name: str) -> None:
    alone, with_ulysses = prove_plan(
        *shipped(name), ["cache_dit", "cache_ditxulysses2"], {"deeper": ModelScale(depth=2)}
    )
    for result in (alone, with_ulysses):
        assert result.proven, result.reason
        assert result.control is not None and result.control >= CONTROL_FACTOR * TOLERANCE
        assert result.reconstruction is not None and result.reconstruction <= TOLERANCE
        assert result.skipped == pytest.approx(1 / 3)
    assert alone.difference is not None and alone.difference <= 1e-6
    assert set(with_ulysses.exchanges) - {"local"}
    assert alone.reused == with_ulysses.reused
    assert any(count for count in alone.reused.values())


def faulty(plan: Plan, **changes: Any) -> Plan:
    return plan.model_copy(update={"blocks": tuple(each.model_copy(update=changes) for each in plan.blocks)})


def prove(subject: Subject, plan: Plan) -> LayoutResult:
    return prove_cache(subject, plan, Layout(), {})


def test_a_state_that_is_missing_is_found() -> None:
    subject, plan = shipped("FluxTransformer2DModel")
    states = (CacheState(input="hidden_states", output="1"),)
    result = prove(subject, faulty(plan, cache_states=states))
    assert not result.proven and "a block returns a tensor at '0'" in result.reason


def test_a_plan_without_a_pattern_is_refused_with_its_finding() -> None:
    subject, plan = shipped("FluxTransformer2DModel")
    result = prove(subject, faulty(plan, cache_pattern="", cache_reason="blocks change a buffer"))
    assert not result.proven and "blocks change a buffer" in result.reason


def test_names_of_layouts() -> None:
    for text, layout in (("cache_dit", Layout()), ("cache_ditxtp2xulysses2", Layout(tp=2, ulysses=2))):
        assert split_cache(text) == (True, layout)
        assert with_cache(layout) == text
    assert split_cache("tp2") == (False, Layout(tp=2))


def test_plans_without_cache_are_read() -> None:
    text = 'format = 1\nsubject = "S"\nmodule_class = "m.S"\n[[blocks]]\nmodules = "blocks.*"\n'
    assert Plan.from_toml(text).blocks == (Blocks(modules="blocks.*"),)
