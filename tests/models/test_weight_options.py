"""Options that change the transformer's weights: LoRA by original names, FP8 quantization, offload of blocks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.fp8 import Fp8Config
from vllm.model_executor.layers.quantization.online.fp8 import OnlineLinearBase
from vllm.model_executor.utils import replace_parameter
from vllm_omni.diffusion.data import OmniDiffusionConfig
from vllm_omni.diffusion.lora.manager import DiffusionLoRAManager
from vllm_omni.errors import OmniClientError

from port_kit.errors import InputError
from port_kit.models.wan.pipeline.fusion_pipeline import FusionPipeline
from port_kit.models.wan.transformer.block import FusionBlock
from port_kit.models.wan.transformer.config import FusionConfig
from port_kit.models.wan.transformer.model import WanFusionTransformer
from port_kit.models.wan.weights.transformer_rules import TRANSFORMER
from port_kit.pipeline.loading import load_pipeline
from port_kit.pipeline.model_index import read_json
from port_kit.remap import load_weights
from port_kit.runtime.engine_options import OFFLOADS, check_options
from port_kit.runtime.lora_sets import write_set
from port_kit.runtime.single_process import single_rank

RANK, ALPHA = 4, 2.0
#: Adapters and merged weights round differently; the flows are of size 1.
TOLERANCE = 1e-4
MODULES = [
    f"{tower}_model.blocks.{layer}.{leaf}"
    for tower in ("video", "audio")
    for layer in (0, 2)
    for leaf in ("self_attn.q", "self_attn.v", "self_attn.o", "cross_attn.k", "cross_attn.v_fusion", "ffn.0", "ffn.2")
] + ["video_model.text_embedding.0"]


@pytest.fixture(scope="module")
def pipeline(ovi_model: Path) -> Iterator[FusionPipeline]:
    """The tiny pipeline."""
    with single_rank(torch.float32), torch.inference_mode():
        yield load_pipeline(ovi_model)


@pytest.fixture(scope="module")
def original(ovi_model: Path) -> dict[str, Tensor]:
    """The transformer's checkpoint, original names."""
    tensors: dict[str, Tensor] = {}
    for file in (ovi_model / "transformer").glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


@pytest.fixture(scope="module")
def adapters(original: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of some modules by original names, of all kinds: parts of fused ones, split by rows, by columns."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for module in MODULES:
        rows, columns = original[f"{module}.weight"].shape
        a = torch.randn(RANK, columns, generator=generator) / columns**0.5
        made[module] = a, torch.randn(rows, RANK, generator=generator)
    return made


Adapters = dict[str, tuple[Tensor, Tensor]]


def write_peft(folder: Path, adapters: Adapters) -> Path:
    """As PEFT saves it: a folder, the scale in its settings."""
    tensors = {}
    for module, (a, b) in adapters.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["q", "v"], "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def write_kohya(folder: Path, adapters: Adapters) -> Path:
    """As kohya's trainers save it: one file, underscores for dots, the scale in tensors."""
    tensors = {}
    for module, (a, b) in adapters.items():
        flat = f"lora_unet_{module.replace('.', '_')}"
        tensors |= {f"{flat}.lora_down.weight": a, f"{flat}.lora_up.weight": b, f"{flat}.alpha": torch.tensor(ALPHA)}
    file = folder.with_suffix(".safetensors")
    save_file(tensors, file)
    return file


def write_original(folder: Path, adapters: Adapters) -> Path:
    """As the original code's own trainers save it: bare names, no scale, so it is in B."""
    tensors = {}
    for module, (a, b) in adapters.items():
        tensors |= {f"diffusion_model.{module}.lora_A.weight": a, f"diffusion_model.{module}.lora_B.weight": b}
        tensors[f"diffusion_model.{module}.lora_B.weight"] = b * (ALPHA / RANK)
    folder.mkdir()
    save_file(tensors, folder / "lora.safetensors")
    return folder


@torch.inference_mode()
def flows(transformer: WanFusionTransformer) -> Tensor:
    """Run one pass on fixed inputs; both flows in one vector."""
    config, generator = transformer.config, torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    video, audio = draw(1, config.video.in_channels, 2, 4, 4), draw(1, 10, config.audio.in_channels)
    texts = draw(1, 7, config.video.text_dim), draw(1, 7, config.audio.text_dim)
    found = transformer(video, audio, torch.tensor(500), *texts)
    return torch.cat([flow.flatten() for flow in found])


def assert_adapts_to(merged: dict[str, Tensor], ovi_model: Path, adapter: Path) -> set[str]:
    """Assert that an adapter gives the flows of the merged weights, and its removal those of before.

    Returns:
        The modules that the adapter changes.
    """
    config = FusionConfig.from_dict(read_json(ovi_model, "transformer/config.json"))
    with single_rank(torch.float32), torch.inference_mode():
        expected = WanFusionTransformer(config)
        load_weights(expected, merged.items(), TRANSFORMER)
        pipeline = load_pipeline(ovi_model)
        before = flows(pipeline.transformer)
        manager = DiffusionLoRAManager(pipeline, torch.device("cpu"), torch.float32)
        manager.set_active_adapter(LoRARequest("style", 1, str(adapter)))
        adapted, wanted = flows(pipeline.transformer), flows(expected)
        assert (wanted - before).abs().max() > 0.01
        assert (adapted - wanted).abs().max() < TOLERANCE
        changed = {name for name, layer in manager._lora_modules.items() if layer.lora_b_stacked[0].any()}
        manager.set_active_adapter(None)
        assert torch.equal(flows(pipeline.transformer), before)
    return changed


@pytest.mark.parametrize("write", [write_peft, write_kohya, write_original])
def test_an_adapter_by_original_names_is_the_merged_weights(
    write: Callable[[Path, Adapters], Path],
    ovi_model: Path,
    original: dict[str, Tensor],
    adapters: Adapters,
    tmp_path: Path,
) -> None:
    merged = {name: tensor.float() for name, tensor in original.items()}
    for module, (a, b) in adapters.items():
        merged[f"{module}.weight"] = merged[f"{module}.weight"] + ALPHA / RANK * b @ a
    assert_adapts_to(merged, ovi_model, write(tmp_path / "lora", adapters))


def test_a_set_is_the_sum_of_its_adapters(
    ovi_model: Path, original: dict[str, Tensor], adapters: Adapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PORT_KIT_CACHE", str(tmp_path / "cache"))
    generator = torch.Generator().manual_seed(9)
    others: Adapters = {}  # of other ranks, of some of the modules and of one that the first does not adapt
    for module in [*MODULES[3:9], "audio_model.blocks.1.self_attn.k"]:
        rows, columns = original[f"{module}.weight"].shape
        a = torch.randn(RANK + 3, columns, generator=generator) / columns**0.5
        others[module] = a, torch.randn(rows, RANK + 3, generator=generator)
    merged = {name: tensor.float() for name, tensor in original.items()}
    for module, (a, b) in adapters.items():
        merged[f"{module}.weight"] = merged[f"{module}.weight"] + 0.75 * ALPHA / RANK * b @ a
    for module, (a, b) in others.items():
        merged[f"{module}.weight"] = merged[f"{module}.weight"] - 0.5 * ALPHA / (RANK + 3) * b @ a
    files = write_peft(tmp_path / "one", adapters), write_kohya(tmp_path / "two", others)
    assert_adapts_to(merged, ovi_model, write_set(list(zip(files, (0.75, -0.5), strict=True))))


def test_the_matrices_of_a_set_give_the_scaled_sum(
    pipeline: FusionPipeline, adapters: Adapters, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PORT_KIT_CACHE", str(tmp_path / "cache"))
    twice = {module: (a + 1, b * 2) for module, (a, b) in adapters.items()}
    paths = write_peft(tmp_path / "one", adapters), write_original(tmp_path / "two", twice)

    def deltas(path: Path) -> dict[str, Tensor]:
        modules, model = [pipeline.transformer], pipeline.od_config.model
        read, _ = pipeline.read_adapter(path, modules, model, adapter=1, dtype=torch.float32)
        return {name: lora.scaling * lora.lora_b @ lora.lora_a for name, lora in read.loras.items()}

    one, two = map(deltas, paths)
    alone = deltas(paths[0] / "adapter_model.safetensors")
    assert all(torch.equal(alone[name], one[name]) for name in one), "the scale is in the settings beside the file"
    both = deltas(write_set(list(zip(paths, (0.3, 1.5), strict=True))))
    assert both.keys() == one.keys() == two.keys() and len(both) == len(MODULES)
    for name, delta in both.items():
        torch.testing.assert_close(delta, 0.3 * one[name] + 1.5 * two[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "code", "name"),
    [
        (
            lambda a, b: {"video_model.blocks.0.self_attn.z": (a, b)},
            "remap_unexpected",
            "video_model.blocks.0.self_attn.z",
        ),
        (
            lambda a, b: {"video_model.blocks.9.self_attn.q": (a, b)},
            "remap_beyond_layers",
            "blocks.9.video.self_attn.qkv",
        ),
        (
            lambda a, b: {"video_model.blocks.0.self_attn.q": (a[:, 1:].contiguous(), b)},
            "remap_shape",
            "blocks.0.self_attn.q",
        ),
        (lambda a, b: {"audio_model.patch_embedding.0": (a, b)}, "remap_shape", "audio_model.patch_embedding.0"),
        (lambda a, b: {"blocks.0.cross_attn.k_img": (a, b)}, "remap_unexpected", "blocks.0.cross_attn.k_img"),
        (lambda a, b: {"blocks.9.self_attn.q": (a, b)}, "remap_unexpected", "blocks.9.self_attn.q"),
        (lambda a, b: {}, "lora_file", "lora.safetensors"),
    ],
    ids=["name", "layer", "shape", "convolution", "wan image attention", "wan layer", "empty"],
)
def test_an_adapter_of_another_model_is_the_clients_error_and_has_no_effect(
    pipeline: FusionPipeline, adapters: Adapters, tmp_path: Path, change: Callable[..., Adapters], code: str, name: str
) -> None:
    file = write_original(tmp_path / "lora", change(*adapters["video_model.blocks.0.self_attn.q"]))
    manager = DiffusionLoRAManager(pipeline, torch.device("cpu"), torch.float32)
    with pytest.raises(OmniClientError) as caught:
        manager.set_active_adapter(LoRARequest("bad", 7, str(file)))
    assert f"[{code}]" in str(caught.value) and name in str(caught.value)
    assert not manager._lora_modules and manager._active_adapter_id is None


#: A module of Wan2.2-TI2V-5B in its own repository, in diffusers, and the video tower's.
WAN_MODULES = {
    "blocks.0.self_attn.q": ("blocks.0.attn1.to_q", "video_model.blocks.0.self_attn.q"),
    "blocks.2.self_attn.o": ("blocks.2.attn1.to_out.0", "video_model.blocks.2.self_attn.o"),
    "blocks.1.cross_attn.k": ("blocks.1.attn2.to_k", "video_model.blocks.1.cross_attn.k"),
    "blocks.1.cross_attn.q": ("blocks.1.attn2.to_q", "video_model.blocks.1.cross_attn.q"),
    "blocks.0.ffn.0": ("blocks.0.ffn.net.0.proj", "video_model.blocks.0.ffn.0"),
    "blocks.2.ffn.2": ("blocks.2.ffn.net.2", "video_model.blocks.2.ffn.2"),
    "text_embedding.2": ("condition_embedder.text_embedder.linear_2", "video_model.text_embedding.2"),
    "time_projection.1": ("condition_embedder.time_proj", "video_model.time_projection.1"),
    "head.head": ("proj_out", "video_model.head.head"),
}
WAN_PATCH = "video_model.patch_embedding"


def _wan_file(form: str, adapters: Adapters) -> dict[str, Tensor]:
    """The same adapters by the names of a trainer."""
    marks = {"kohya": ("lora_down", "lora_up"), "diffusers": ("lora_A", "lora_B"), "wan": ("lora_A", "lora_B")}[form]
    others = {ours: (wan, theirs) for wan, (theirs, ours) in WAN_MODULES.items()}
    others[WAN_PATCH] = ("patch_embedding", "patch_embedding")
    tensors = {}
    for module, pair in adapters.items():
        wan, theirs = others[module]
        name = {
            "wan": f"diffusion_model.{wan}",
            "diffusers": f"transformer.{theirs}",
            "kohya": f"lora_unet_{wan.replace('.', '_')}",
        }[form]
        tensors |= {f"{name}.{mark}.weight": matrix for mark, matrix in zip(marks, pair, strict=True)}
        tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
    return tensors


@pytest.mark.parametrize("form", ["wan", "diffusers", "kohya"])
def test_an_adapter_of_wan_is_one_of_the_video_tower(
    form: str, ovi_model: Path, original: dict[str, Tensor], tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    adapters, merged = {}, {name: tensor.float() for name, tensor in original.items()}
    for module in [*[ours for _, ours in WAN_MODULES.values()], WAN_PATCH]:
        rows, *columns = original[f"{module}.weight"].shape
        a = torch.randn(RANK, *columns, generator=generator) / math.prod(columns) ** 0.5
        b = torch.randn(rows, RANK, *[1] * (len(columns) - 1), generator=generator)
        adapters[module] = a, b
        merged[f"{module}.weight"] += ALPHA / RANK * (b.flatten(1) @ a.flatten(1)).reshape(rows, *columns)
    save_file(_wan_file(form, adapters), tmp_path / "wan.safetensors")
    changed = assert_adapts_to(merged, ovi_model, tmp_path / "wan.safetensors")
    assert changed and not any(".audio." in name for name in changed)


@pytest.mark.parametrize("leaf", ["dora_scale", "diff", "diff_b", "lora_B.bias", "lora_magnitude_vector"])
def test_adapters_that_the_manager_cannot_apply_are_refused_by_name(
    pipeline: FusionPipeline, adapters: Adapters, tmp_path: Path, leaf: str
) -> None:
    a, b = adapters["video_model.blocks.0.self_attn.o"]
    name = "blocks.0.self_attn.o"
    value = b @ a if leaf == "diff" else torch.ones(b.shape[0])
    file = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b, f"{name}.{leaf}": value}
    save_file(file, tmp_path / "lora.safetensors")
    manager = DiffusionLoRAManager(pipeline, torch.device("cpu"), torch.float32)
    with pytest.raises(OmniClientError, match=f"{name}.{leaf}"):
        manager.set_active_adapter(LoRARequest("bad", 8, str(tmp_path / "lora.safetensors")))


class PlainFp8(OnlineLinearBase):
    """Per-tensor FP8 weights without kernels: vLLM's quantization of a layer in plain torch."""

    requantization_source: Any = None  #: vLLM 0.32's attribute: no conversion from another quantization

    def __init__(self) -> None:
        """Leave out the base's, which reads the configuration of a language model."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Replace the weight by its rounded form and its scale."""
        scale = layer.weight.abs().max().float() / torch.finfo(torch.float8_e4m3fn).max
        replace_parameter(layer, "weight", (layer.weight / scale).to(torch.float8_e4m3fn))
        replace_parameter(layer, "weight_scale", scale.reshape(1))

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply by the dequantized weight."""
        return torch.nn.functional.linear(x, layer.weight.to(x.dtype) * layer.weight_scale.to(x.dtype), bias)


class PlainFp8Config(Fp8Config):
    """Chooses layers as vLLM's ``fp8`` does."""

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Quantize every linear that is given this configuration."""
        return PlainFp8() if isinstance(layer, LinearBase) else None


def quantized(ovi_model: Path, config: QuantizationConfig) -> WanFusionTransformer:
    """Build the tiny transformer as an engine with this quantization does."""
    dims = FusionConfig.from_dict(read_json(ovi_model, "transformer/config.json"))
    return WanFusionTransformer(dims, quant_config=config, prefix="transformer")


def test_eight_bit_weights_are_made_while_loading_and_stay_close(
    pipeline: FusionPipeline, ovi_model: Path, original: dict[str, Tensor]
) -> None:
    waiting: list[int] = []

    def stream(transformer: WanFusionTransformer) -> Iterator[tuple[str, Tensor]]:
        for name in sorted(original):  # as the loader reads files: a bias before its weight
            yield name, original[name]
            waiting.append(sum(p.is_meta for p in transformer.parameters()))

    with single_rank(torch.float32), torch.inference_mode():
        transformer = quantized(ovi_model, PlainFp8Config())
        begun = sum(p.is_meta for p in transformer.parameters())
        load_weights(transformer, stream(transformer), TRANSFORMER)
        assert waiting[-1] == 0 and waiting[len(waiting) // 2] < 0.7 * begun, "layers wait for the end of loading"
        plain = [name for name, p in transformer.named_parameters() if name.endswith("weight") and p.ndim == 2]
        eight = [name for name in plain if transformer.get_parameter(name).dtype == torch.float8_e4m3fn]
        left = {name.split(".", 1)[1] for name in set(plain) - set(eight)}
        assert left == {
            "patch_embedding.proj.weight",
            "time_embedding.up.weight",
            "time_embedding.down.weight",
            "time_projection.linear.weight",
            "head.proj.weight",
        }
        assert len(eight) > 40 and all(
            "blocks." in name or "text_embedding" in name or "gated" in name for name in eight
        )
        expected, found = flows(pipeline.transformer), flows(transformer)
    assert 0 < (found - expected).norm() / expected.norm() < 0.1
    query = transformer.blocks[0].video.self_attn.qkv
    rows = [original[f"video_model.blocks.0.self_attn.{part}.weight"] for part in "qkv"]
    assert query.weight_scale == pytest.approx(float(torch.cat(rows).abs().max()) / 448)


def test_full_size_linears_that_are_quantized_fit_eight_bit_kernels() -> None:
    from port_kit.models.wan.transformer.config import OVI_TRANSFORMER_CONFIG

    with single_rank(torch.bfloat16, "meta"):
        transformer = WanFusionTransformer(
            FusionConfig.from_dict(OVI_TRANSFORMER_CONFIG), quant_config=PlainFp8Config()
        )
    for name, layer in transformer.named_modules():
        if isinstance(layer, LinearBase) and isinstance(layer.quant_method, PlainFp8):
            assert layer.input_size % 16 == 0 and layer.output_size % 16 == 0, name


@pytest.mark.parametrize(
    ("options", "option"),
    [
        *(({name: True}, name) for name in OFFLOADS),
        ({"quantization_config": "fp8"}, "quantization"),
        ({"diffusion_kv_cache_dtype": "fp8"}, "diffusion_kv_cache_dtype"),
        ({"video_output_transport": {"enable_device_postprocess": True}}, "video_output_transport"),
        ({"cache_backend": "cache_dit", "step_execution": True}, "step_execution"),
        ({"cache_backend": "cache_dit", "max_num_seqs": 2}, "max_num_seqs"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_option_that_cannot_run_is_refused_by_name(options: dict[str, Any], option: str) -> None:
    with pytest.raises(InputError) as caught:
        check_options(OmniDiffusionConfig(model="any", **options))
    assert (caught.value.code, caught.value.details) == ("engine_option", {"option": option})


def test_layerwise_offload_streams_the_blocks(pipeline: FusionPipeline) -> None:
    from vllm_omni.diffusion.offloader.block_discovery import get_blocks_from_dit

    names, blocks = get_blocks_from_dit(pipeline.transformer)
    assert names == ["blocks"] and all(isinstance(block, FusionBlock) for block in blocks)
    assert len(blocks) == pipeline.transformer.config.num_layers
    assert all(parameter.numel() for block in blocks for parameter in block.parameters())
