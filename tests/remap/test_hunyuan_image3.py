"""HunyuanImage 3.0's language core: the rule set leaves the same bits as vLLM-Omni's own load_weights."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from port_kit.errors import RemapError
from port_kit.manifest import Manifest, TensorSpec
from port_kit.remap import Rule, RuleSet, load_weights
from port_kit.remap.plan import check
from port_kit.runtime.single_process import single_rank
from port_kit.targets import read_targets
from port_kit.testing.rules import assert_covers, assert_mutations_caught, assert_round_trip
from tests.remap.loader_equivalence import RULE_SETS, assert_loaders_agree, cleared, manifest_of, random_checkpoint

RULES = RuleSet.from_file(RULE_SETS / "hunyuan_image3.toml")
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, DENSE, EXPERT, EXPERTS, VOCABULARY = 32, 6, 2, 8, 24, 16, 3, 48
SIZES = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM}


def layer(number: int, experts: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one layer of the original; without experts for the first ones."""
    rows = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.qkv_proj": (rows, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
        "self_attn.query_layernorm": (HEAD_DIM,),
        "self_attn.key_layernorm": (HEAD_DIM,),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    if experts:
        shapes["mlp.gate.wg"] = (experts, HIDDEN)
    shared = "mlp.shared_mlp" if experts else "mlp"
    for mlp, width in [(shared, DENSE), *((f"mlp.experts.{expert}", EXPERT) for expert in range(experts))]:
        shapes[f"{mlp}.gate_and_up_proj"] = (2 * width, HIDDEN)
        shapes[f"{mlp}.down_proj"] = (HIDDEN, width)
    return {f"layers.{number}.{name}.weight": shape for name, shape in shapes.items()}


def apart(number: int) -> dict[str, tuple[int, ...]]:
    """The projections of one layer that another form of the checkpoint has one by one, with biases."""
    shapes: dict[str, tuple[int, ...]] = {"self_attn.o_proj.bias": (HIDDEN,)}
    for part, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
        shapes[f"self_attn.{part}_proj.weight"] = (heads * HEAD_DIM, HIDDEN)
        shapes[f"self_attn.{part}_proj.bias"] = (heads * HEAD_DIM,)
    shared = "mlp.shared_mlp" if number else "mlp"
    shapes |= {f"{shared}.{half}_proj.weight": (DENSE, HIDDEN) for half in ("gate", "up")}
    return {f"layers.{number}.{name}": shape for name, shape in shapes.items()}


def original(*, fused: bool = True) -> dict[str, torch.Tensor]:
    """A tiny checkpoint of the core in the original's names: one dense layer, two with experts."""
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (VOCABULARY, HIDDEN), "ln_f.weight": (HIDDEN,)}
    for number in range(3):
        shapes |= layer(number, EXPERTS if number else 0)
        if not fused:
            shapes |= apart(number)
    if not fused:
        joined = ("self_attn.qkv_proj.weight", "0.mlp.gate_and_up_proj.weight", "shared_mlp.gate_and_up_proj.weight")
        shapes = {name: shape for name, shape in shapes.items() if not name.endswith(joined)}
    return random_checkpoint({name: TensorSpec(shape, "bfloat16") for name, shape in shapes.items()})


def build(*, bias: bool) -> nn.Module:
    """vLLM-Omni's module for the same sizes."""
    from vllm_omni.diffusion.models.hunyuan_image3 import hunyuan_image3_transformer as source

    config = source.HunyuanImage3Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=DENSE,
        moe_intermediate_size=EXPERT,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        attention_head_dim=HEAD_DIM,
        attention_bias=bias,
        use_qk_norm=True,
        num_experts=EXPERTS,
        moe_topk=2,
        use_mixed_mlp_moe=True,
        num_shared_expert=1,
        moe_layer_num_skipped=1,
        rope_scaling={"rope_type": "default", "rope_theta": 10000.0},
    )
    return source.HunyuanImage3Model(config)


@pytest.fixture(scope="module")
def core() -> Iterator[nn.Module]:
    with single_rank(dtype=torch.bfloat16):
        yield build(bias=False)


def test_projections_apart_and_biases_leave_the_same_bits() -> None:
    """The published files fuse q/k/v and gate/up; the loader takes them one by one too, and so do the rules."""
    with single_rank(dtype=torch.bfloat16):
        core = build(bias=True)
        weights = original(fused=False)
        assert_loaders_agree(core, core.load_weights, RULES, weights, SIZES)
        plan = assert_covers(RULES, manifest_of(weights), Manifest.from_module(core), SIZES)
        assert_round_trip(plan)
        assert assert_mutations_caught(plan).same == ()
        both = manifest_of({**original(), **weights})
        codes = {problem.code for problem in check(RULES, both, plan.target, SIZES).problems}
        assert {"remap_ambiguous", "remap_collision"} & codes


def test_rules_and_load_weights_leave_the_same_bits(core: nn.Module) -> None:
    assert_loaders_agree(core, core.load_weights, RULES, original(), SIZES)


def test_rows_of_a_fused_projection_go_where_they_belong(core: nn.Module) -> None:
    weights = original()
    load_weights(cleared(core), weights.items(), RULES, sizes=SIZES)
    state = core.state_dict()
    given = weights["layers.2.self_attn.qkv_proj.weight"].view(KV_HEADS, HEADS // KV_HEADS + 2, HEAD_DIM, HIDDEN)
    got = state["layers.2.self_attn.qkv_proj.weight"].view(HEADS + 2 * KV_HEADS, HEAD_DIM, HIDDEN)
    assert torch.equal(got[HEADS // KV_HEADS], given[1, 0])  # the first query of the second key head
    assert torch.equal(got[HEADS + 1], given[1, -2]) and torch.equal(got[-1], given[1, -1])
    up, gate = weights["layers.2.mlp.experts.1.gate_and_up_proj.weight"].chunk(2)
    stacked = state["layers.2.mlp.experts.routed_experts.w13_weight"]
    assert torch.equal(stacked[1], torch.cat([gate, up]))


def test_pack_leads_back_and_notices_every_mutation(core: nn.Module) -> None:
    plan = assert_covers(RULES, manifest_of(original()), Manifest.from_module(core), SIZES)
    assert_round_trip(plan)
    assert_mutations_caught(plan)


def test_pack_serves_the_whole_pipeline_under_its_prefix(core: nn.Module) -> None:
    source = {f"model.{name}": tensor for name, tensor in original().items()}
    target = {f"model.{name}": spec for name, spec in Manifest.from_module(core).items()}
    assert_covers(RULES.under("model.", "model."), manifest_of(source), Manifest(target), SIZES)


@pytest.mark.parametrize("expert", range(EXPERTS))
@pytest.mark.parametrize("what", ["gate_and_up_proj", "down_proj"])
def test_a_lost_expert_is_an_error(core: nn.Module, expert: int, what: str) -> None:
    lost = f"layers.2.mlp.experts.{expert}.{what}.weight"
    with pytest.raises(RemapError) as caught:
        load_weights(core, ((n, t) for n, t in original().items() if n != lost), RULES, sizes=SIZES)
    assert caught.value.code in ("remap_missing", "remap_incomplete_group")
    assert f"{expert}.w" in str(caught.value.details["problems"])


def test_a_lost_half_of_an_expert_is_an_error(core: nn.Module) -> None:
    weights = original()
    name = "layers.1.mlp.experts.0.gate_and_up_proj.weight"
    weights[name] = weights[name].chunk(2)[0]
    with pytest.raises(RemapError):
        load_weights(core, weights.items(), RULES, sizes=SIZES)


HALVES = RuleSet(
    "halves",
    (
        Rule(r"experts\.(\d+)\.(w1|w3)", "routed_experts.w13_weight", shard=r"\1.\2"),
        Rule(r"experts\.(\d+)\.w2", "routed_experts.w2_weight", shard=r"\1.w2"),
    ),
)


def test_experts_of_one_of_two_ranks_take_their_part_of_whole_tensors() -> None:
    from vllm_omni.diffusion.layers.fused_moe import FusedMoE

    shapes = {"w1": (64, 32), "w3": (64, 32), "w2": (32, 64)}
    specs = {f"experts.{n}.{half}": TensorSpec(shape, "bfloat16") for n in range(3) for half, shape in shapes.items()}
    weights = random_checkpoint(specs)
    with single_rank(dtype=torch.bfloat16):
        experts = FusedMoE(
            num_experts=3, top_k=2, hidden_size=32, intermediate_size=64, tp_size=2, dp_size=1, pcp_size=1
        )
        targets = read_targets(experts).targets
        assert targets["routed_experts.w13_weight"].spec.shape == (3, 128, 32)
        assert targets["routed_experts.w2_weight"].spec.shape == (3, 32, 64)
        load_weights(cleared(experts), weights.items(), HALVES)
        state = experts.state_dict()
    assert torch.equal(
        state["routed_experts.w13_weight"][2], torch.cat([weights["experts.2.w1"][:32], weights["experts.2.w3"][:32]])
    )
    assert torch.equal(state["routed_experts.w2_weight"][1], weights["experts.1.w2"][:, :32])
