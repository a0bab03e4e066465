"""BAGEL: the rule set leaves the same bits in vLLM-Omni's BagelPipeline as the pipeline's own load_weights."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from port_kit.errors import RemapError
from port_kit.manifest import Manifest, TensorSpec
from port_kit.remap import RuleSet, load_weights
from port_kit.remap.plan import check
from port_kit.runtime.single_process import single_rank
from port_kit.targets import read_targets
from port_kit.testing.rules import assert_covers, assert_mutations_caught, assert_round_trip
from port_kit.testing.tokenizer import write_tokenizer
from tests.remap.loader_equivalence import RULE_SETS, assert_loaders_agree, random_checkpoint
from tests.remap.test_rule_sets import one_of_each_kind

PUBLISHED = Path(__file__).parent.parent / "data" / "manifests" / "bagel.json.gz"
RULES = RuleSet.from_file(RULE_SETS / "bagel.toml")
LAYERS = 2
#: Extents of the published checkpoint -> those of a tiny one, by the first word of the names.
TINY = {
    "encoder": {128: 32, 256: 64, 512: 128},
    "decoder": {128: 32, 256: 64, 512: 128},
    "vit_model": {1152: 16, 4304: 20, 588: 12, 4900: 9},
    "connector": {1152: 16, 3584: 32},
    "vit_pos_embed": {4900: 9, 3584: 32},
    "": {152064: 128, 3584: 32, 512: 16, 128: 8, 18944: 24, 4096: 16},
}
FULL_SIZE: dict[str, dict[str, Any]] = {
    "config": {"max_latent_size": 64, "vit_max_num_patch_per_side": 70},
    "llm_config": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "vit_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 980,
        "patch_size": 14,
    },
}
TINY_SIZE: dict[str, dict[str, Any]] = {
    "config": {"max_latent_size": 4, "vit_max_num_patch_per_side": 3},
    "llm_config": {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "vit_config": {
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "image_size": 6,
        "patch_size": 2,
    },
}


def published() -> Manifest:
    """The manifest of ema.safetensors and ae.safetensors as they are on the Hub."""
    tables = json.loads(gzip.decompress(PUBLISHED.read_bytes()))
    return Manifest({name: entry for table in tables.values() for name, entry in Manifest.from_json(table).items()})


def tiny() -> Manifest:
    """The published manifest with fewer layers of language and vision model, and small extents."""
    entries: dict[str, TensorSpec] = {}
    for name, spec in published().items():
        first, _, rest = name.partition(".")
        number = rest.partition("layers.")[2].partition(".")[0]
        if number.isdecimal() and int(number) >= LAYERS:
            continue
        extents = TINY.get(first, TINY[""])
        entries[name] = replace(spec, shape=tuple(extents.get(extent, extent) for extent in spec.shape))
    return Manifest(entries)


def write_configs(folder: Path, configs: dict[str, dict[str, Any]]) -> str:
    """Write the files other than weights that BagelPipeline reads from a model folder."""
    for name, config in {**configs, "preprocessor_config": {}}.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    write_tokenizer(folder, size=100)
    return str(folder)


def build(model: str, *, keep_place: bool = False) -> torch.nn.Module:
    """Build the pipeline in a process group of one rank; ``keep_place`` leaves its parameters on the meta device."""
    from vllm_omni.diffusion.forward_context import get_forward_context
    from vllm_omni.diffusion.models.bagel.pipeline_bagel import BagelPipeline

    config = get_forward_context().omni_diffusion_config
    config.model, config.parallel_config.use_hsdp = model, keep_place
    return BagelPipeline(od_config=config)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[torch.nn.Module]:
    """A tiny pipeline, its autoencoder with 32 channels for 128."""
    from vllm_omni.diffusion.models.bagel import pipeline_bagel

    full_size = pipeline_bagel.default_ae_params()
    model = write_configs(tmp_path_factory.mktemp("bagel"), TINY_SIZE)
    with single_rank(dtype=torch.bfloat16):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline_bagel, "default_ae_params", lambda: replace(full_size, ch=32))
            built = build(model)
        yield built


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, torch.Tensor]:
    """Random weights under the published names."""
    return random_checkpoint(tiny())


def test_rules_and_load_weights_leave_the_same_bits(
    pipeline: torch.nn.Module, checkpoint: dict[str, torch.Tensor]
) -> None:
    assert_loaders_agree(pipeline, pipeline.load_weights, RULES, checkpoint)


#: Sources, and the target that each of them is missing from.
LOST = {
    "language_model.model.layers.1.self_attn.q_proj.weight": "model.layers.1.self_attn.qkv_proj.weight",
    "language_model.model.layers.1.self_attn.k_proj_moe_gen.weight": "model.layers.1.self_attn.qkv_proj.gen_exp.weight",
    "language_model.model.layers.0.self_attn.v_proj.bias": "model.layers.0.self_attn.qkv_proj.bias",
    "language_model.model.layers.0.mlp_moe_gen.up_proj.weight": "model.layers.0.mlp_moe_gen.gate_up_proj.weight",
    "language_model.model.norm_moe_gen.weight": "model.norm.gen_weight",
    "vit_model.vision_model.post_layernorm.bias": "vit_model.vision_model.post_layernorm.bias",
    "connector.fc1.weight": "bagel.connector.fc1.weight",
    "decoder.conv_out.bias": "vae.decoder.conv_out.bias",
}


@pytest.mark.parametrize("lost", LOST)
def test_a_lost_tensor_is_an_error(pipeline: torch.nn.Module, checkpoint: dict[str, torch.Tensor], lost: str) -> None:
    with pytest.raises(RemapError) as caught:
        load_weights(pipeline, ((name, tensor) for name, tensor in checkpoint.items() if name != lost), RULES)
    assert any(problem["target"].endswith(LOST[lost]) for problem in caught.value.details["problems"])


def test_pack_leads_back_and_notices_every_mutation(pipeline: torch.nn.Module) -> None:
    source = Manifest({name: replace(spec, dtype="bfloat16") for name, spec in tiny().items()})
    plan = assert_covers(RULES, source, Manifest.from_module(pipeline))
    assert_round_trip(plan)
    assert_mutations_caught(one_of_each_kind(plan))


def test_shards_of_the_second_projections_are_known(pipeline: torch.nn.Module) -> None:
    targets = read_targets(pipeline).targets
    for leaf in ("weight", "bias"):
        own = targets[f"language_model.model.layers.0.self_attn.qkv_proj.{leaf}"]
        second = targets[f"language_model.model.layers.0.self_attn.qkv_proj.gen_exp.{leaf}"]
        assert second.spec == own.spec and second.spec.slots == own.spec.slots and second.shards == own.shards


def test_the_published_checkpoint_is_covered(tmp_path: Path) -> None:
    model = write_configs(tmp_path, FULL_SIZE)
    with single_rank(dtype=torch.bfloat16, device="meta"):
        target = Manifest.from_module(build(model, keep_place=True))
    source = published()
    plan = assert_covers(RULES, source, target, allow_downcast=True)
    assert len(plan.by_source()) == len(source) and not plan.dropped
    for lost in LOST:
        rest = Manifest({name: spec for name, spec in source.items() if name != lost})
        assert not check(RULES, rest, target, allow_downcast=True).ok, lost
