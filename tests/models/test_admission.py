"""Names and magnitudes of requests to the fusion ports, results and weights that are not finite, and cancellation."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from vllm_omni.diffusion import cancellation
from vllm_omni.diffusion.data import DiffusionRequestAbortedError, OmniDiffusionConfig
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch
from vllm_omni.errors import OmniClientError
from vllm_omni.inputs.data import OmniDiffusionSamplingParams
from vllm_omni.lora.request import LoRARequest

from port_kit.models.ovi import PORT
from port_kit.models.wan.pipeline.fusion_pipeline import FusionPipeline
from port_kit.models.wan.pipeline.request import MAX_SCALE, MAX_SHIFT, MIN_SHIFT, SOLVERS
from port_kit.pipeline.admission import DERIVED, READ
from port_kit.pipeline.loading import load_pipeline
from port_kit.pipeline.process_funcs import get_pre_process_func
from port_kit.runtime.lora_sets import write_set
from port_kit.runtime.single_process import single_rank
from tests.helpers import raises

IMAGE = Image.new("RGB", (64, 64), (90, 120, 60))


@pytest.fixture(scope="module")
def pipeline(ovi_model: Path) -> Iterator[FusionPipeline]:
    """The tiny Ovi with clips of 5 frames."""
    with single_rank(torch.float32), torch.inference_mode():
        made = load_pipeline(ovi_model)
        made.lengths = made.warm_up
        yield made


def serve(pipeline: FusionPipeline, prompt: Any = "rain", **sampling: Any) -> Any:
    """Serve a request of one step as the engine does."""
    fields = {"num_inference_steps": 1, "seed": 5, **sampling}
    request = OmniDiffusionRequest(prompt, OmniDiffusionSamplingParams(**fields), "one")
    return pipeline.forward(DiffusionRequestBatch([request]))


def arrive(model: Path, prompt: Any = "rain", **sampling: Any) -> OmniDiffusionRequest:
    """Pre-process a request as the engine does on its arrival."""
    config = OmniDiffusionConfig(model=str(model), model_class_name=PORT.class_name, dtype=torch.float32)
    process = get_pre_process_func(config)
    assert process is not None
    return process(OmniDiffusionRequest(prompt, OmniDiffusionSamplingParams(**sampling), "one"))


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        *[(name, "'shift'") for name in ("shfit", "Shift", "SHIFT")],
        ("solver", "'solver_name'"),
        ("video_cfg_scale", "'video_guidance_scale'"),
        *[(name, f"set {name} itself") for name in ("seed", "num_inference_steps", "height", "width", "num_frames")],
        *[(name, f"set {name} itself") for name in ("fps", "guidance_scale")],
        *[(name, f"leave {name} out") for name in ("aspect_ratio", "short_edge", "sound_duration")],
        *[(name, "") for name in ("sampler", "negative_prompt", "image", "nonsense", "preencode_mp4", "")],
    ],
)
def test_a_name_that_is_not_read_is_refused(pipeline: FusionPipeline, name: str, nearest: str) -> None:
    for value in (3, None, "x", [1]):
        result = serve(pipeline, extra_args={name: value})
        assert result.error_status_code == 400
        assert repr(name) in result.error or f"{name} is" in result.error
        assert nearest in result.error


@pytest.mark.parametrize("value", [0, 1, False, "yes"])
def test_sound_is_always_made(pipeline: FusionPipeline, value: object) -> None:
    assert serve(pipeline, extra_args={"generate_sound": value}).error_status_code == 400


def test_every_sampling_parameter_is_read_or_refused(pipeline: FusionPipeline) -> None:
    others = [field for field in dataclasses.fields(OmniDiffusionSamplingParams) if field.name not in READ | DERIVED]
    assert len(others) > 50
    for field in others:
        sampling = OmniDiffusionSamplingParams(seed=1)
        setattr(sampling, field.name, "latent" if field.name != "guidance_scale_2" else 2.0)
        with raises("input_value", field.name):
            pipeline.admit("rain", sampling)


@pytest.mark.parametrize(
    "sampling",
    [
        {"latents": torch.zeros(1)},
        {"output_type": "latent"},
        {"generator": torch.Generator().manual_seed(3)},
        {"generator": [torch.Generator()], "seed": 3},
        {"fps": 12},
        {"frame_rate": 12.0},
        {"guidance_scale": 2.0, "extra_args": {"video_guidance_scale": 3.0}},
        {"lora_scale": 0.5},
    ],
)
def test_a_parameter_that_would_be_ignored_is_refused(ovi_model: Path, sampling: dict[str, Any]) -> None:
    with pytest.raises(OmniClientError, match=next(iter(sampling))):
        arrive(ovi_model, **sampling)


def test_a_fresh_generator_of_the_seed_is_the_seed(pipeline: FusionPipeline) -> None:
    generator = torch.Generator().manual_seed(5)
    pipeline.admit("rain", OmniDiffusionSamplingParams(seed=5, generator=generator))
    torch.rand(1, generator=generator)
    with raises("input_value", "generator"):
        pipeline.admit("rain", OmniDiffusionSamplingParams(seed=5, generator=generator))


@pytest.mark.parametrize("name", ["prompt_embeds", "prompt_token_ids", "height", "mm_processor_kwargs", "image"])
def test_a_field_of_the_prompt_that_is_not_read_is_refused(pipeline: FusionPipeline, name: str) -> None:
    with raises("input_value", name):
        pipeline.admit({"prompt": "rain", name: [64]}, OmniDiffusionSamplingParams())


SCALES = ("video_guidance_scale", "audio_guidance_scale")
ENDS = [
    *[{name: scale} for name in SCALES for scale in (-MAX_SCALE, 0.0, MAX_SCALE)],
    *[{"shift": shift, "solver_name": solver} for shift in (MIN_SHIFT, MAX_SHIFT) for solver in SOLVERS],
]


@pytest.mark.parametrize("options", ENDS, ids=str)
def test_results_are_finite_at_the_ends_of_the_ranges(pipeline: FusionPipeline, options: dict[str, Any]) -> None:
    result = serve(pipeline, extra_args=options, num_inference_steps=3)
    assert result.error is None
    assert bool(result.output["audio"].isfinite().all())


@pytest.mark.parametrize("name", ["video", "audio"])
def test_a_result_that_is_not_finite_is_an_error(
    pipeline: FusionPipeline, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    initial = pipeline.initial_latents

    def overflowing(prepared: Any) -> dict[str, torch.Tensor]:
        latents = initial(prepared)
        return {**latents, name: latents[name] * float("nan")}

    monkeypatch.setattr(pipeline, "initial_latents", overflowing)
    plain = serve(pipeline)
    assert plain.error_status_code is None and "output_not_finite" in plain.error and "weights" in plain.error
    given = serve(pipeline, extra_args={"shift": 9.0, "audio_guidance_scale": 8})
    assert given.error_status_code == 400
    assert "output_not_finite" in given.error and "shift, audio_guidance_scale" in given.error


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("folder", ["transformer", "vae", "text_encoder"])
def test_weights_that_are_not_finite_are_named_with_their_file(
    ovi_model: Path, tmp_path: Path, folder: str, value: float
) -> None:
    model = tmp_path / "model"
    shutil.copytree(ovi_model, model)
    file = sorted((model / folder).glob("*.safetensors"))[-1]
    tensors = load_file(file)
    name = next(
        key for key in sorted(tensors) if tensors[key].is_floating_point() and tensors[key].ndim == 2 or folder == "vae"
    )
    tensors[name].view(-1)[-1] = value
    save_file(tensors, file)
    with single_rank(torch.float32), raises("model_incomplete", name, file.name):
        load_pipeline(model)


def damage(model: Path, what: str) -> str:
    """Damage a model directory; return what an error has to name."""
    index = model / "model_index.json"
    if what == "tokenizer":
        shutil.rmtree(model / "tokenizer")
        return "tokenizer"
    if what == "empty tokenizer":
        for file in (model / "tokenizer").iterdir():
            file.unlink()
        return "tokenizer"
    if what == "json":
        index.write_text(index.read_text()[:-9])
    elif what == "nested":
        index.write_text("[" * 100_000)
    else:
        index.write_text(what)
    return "model_index.json"


@pytest.mark.parametrize(
    "what", ["tokenizer", "empty tokenizer", "json", "nested", "[]", "{}", '{"_class_name": 3}', ""]
)
def test_a_damaged_directory_is_named(ovi_model: Path, tmp_path: Path, what: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(ovi_model, model)
    name = damage(model, what)
    with single_rank(torch.float32), raises("model_incomplete", name):
        load_pipeline(model)


def test_a_cancelled_request_ends_between_blocks(pipeline: FusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = cancellation.RequestCancellationRegistry()
    blocks: list[int] = []

    def count(index: int) -> None:
        blocks.append(index)
        registry.cancel(["one"])

    hooks = [
        block.register_forward_hook(lambda *_, index=index: count(index))
        for index, block in enumerate(pipeline.transformer.blocks)
    ]
    try:
        with (
            cancellation.request_cancellation_scope([registry.create("one")]),
            pytest.raises(DiffusionRequestAbortedError),
        ):
            serve(pipeline, num_inference_steps=2)
    finally:
        for hook in hooks:
            hook.remove()
        registry.close()
    assert set(blocks) == {0} and len(pipeline.transformer.blocks) > 1
    assert serve(pipeline).error is None


def write_lora(path: Path, model: Path, rank: int = 4, seed: int = 0, **changes: Any) -> Path:
    """Write an adapter of one linear of the tiny transformer."""
    shape = load_file(next((model / "transformer").glob("*.safetensors")))[
        "video_model.blocks.0.self_attn.q.weight"
    ].shape
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "video_model.blocks.0.self_attn.q.lora_A.weight": torch.randn(rank, shape[1], generator=generator),
        "video_model.blocks.0.self_attn.q.lora_B.weight": torch.randn(shape[0], rank, generator=generator),
        **changes,
    }
    save_file(tensors, path)
    return path


def test_an_adapter_is_identified_by_content_and_scale(ovi_model: Path, tmp_path: Path) -> None:
    files = [write_lora(tmp_path / f"{seed}.safetensors", ovi_model, seed=seed) for seed in (0, 1)]
    copy = shutil.copyfile(files[0], tmp_path / "copy.safetensors")

    def number(path: Path, scale: float = 1.0, client: int = 7) -> int:
        request = arrive(ovi_model, lora_request=LoRARequest("style", client, str(path)), lora_scale=scale)
        adapter = request.sampling_params.lora_request
        assert adapter is not None and adapter.lora_path == str(path)
        return adapter.lora_int_id

    first = number(files[0])
    assert first == number(files[0], client=9) == number(Path(copy))
    assert len({first, number(files[1]), number(files[0], 0.5), number(files[0], 0.50001)}) == 4
    write_lora(files[0], ovi_model, seed=3)
    assert number(files[0]) != first


def test_a_set_is_identified_by_its_contents_and_their_scales(
    ovi_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PORT_KIT_CACHE", str(tmp_path / "cache"))
    files = [write_lora(tmp_path / f"{seed}.safetensors", ovi_model, seed=seed) for seed in (0, 1)]
    copy = shutil.copyfile(files[0], tmp_path / "copy.safetensors")

    def number(*members: tuple[Path, float], scale: float = 1.0) -> int:
        path = str(write_set(members))
        request = arrive(ovi_model, lora_request=LoRARequest("style", 7, path), lora_scale=scale)
        assert request.sampling_params.lora_request is not None
        return request.sampling_params.lora_request.lora_int_id

    first = number((files[0], 0.5), (files[1], 1.0))
    assert first == number((Path(copy), 0.5), (files[1], 1.0))
    others = [number((files[0], 0.6), (files[1], 1.0)), number((files[0], 0.5), (files[1], 1.0), scale=0.5)]
    assert len({first, *others}) == 3
    write_lora(files[1], ovi_model, seed=3)
    assert number((files[0], 0.5), (files[1], 1.0)) != first


def test_the_ranks_of_a_set_are_bounded_together(
    ovi_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PORT_KIT_CACHE", str(tmp_path / "cache"))
    wide, small = (write_lora(tmp_path / f"{rank}.safetensors", ovi_model, rank=rank) for rank in (512, 1))
    arrive(ovi_model, lora_request=LoRARequest("style", 1, str(wide)))
    path = write_set([(wide, 1.0), (small, 1.0)])
    with pytest.raises(OmniClientError, match=r"LoRAs 512.safetensors, 1.safetensors: .* add up to 513; at most 512"):
        arrive(ovi_model, lora_request=LoRARequest("style", 1, str(path)))


def test_a_member_of_a_set_that_is_wrong_is_named(
    ovi_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PORT_KIT_CACHE", str(tmp_path / "cache"))
    good, other = write_lora(tmp_path / "good.safetensors", ovi_model), tmp_path / "other.safetensors"
    save_file({"double_blocks.0.img_attn.qkv.lora_A.weight": torch.ones(2, 8)}, other)
    path = write_set([(good, 1.0), (other, 1.0)])
    with pytest.raises(OmniClientError, match=r"(?s)other.safetensors.*double_blocks.*hint: .* FLUX or HunyuanVideo"):
        arrive(ovi_model, lora_request=LoRARequest("style", 1, str(path)))
    other.unlink()
    with pytest.raises(OmniClientError, match=r"\[source_missing\].*other.safetensors"):
        arrive(ovi_model, lora_request=LoRARequest("style", 1, str(path)))


def test_a_lora_of_a_wider_model_is_named_with_it(ovi_model: Path, tmp_path: Path) -> None:
    pair = {"A": torch.ones(2, 5120), "B": torch.ones(5120, 2)}
    file = tmp_path / "a.safetensors"
    save_file({f"diffusion_model.blocks.0.self_attn.q.lora_{half}.weight": pair[half] for half in pair}, file)
    with pytest.raises(OmniClientError, match=r"(?s)remap_shape.*a.safetensors.*hint: .*Wan2.1 14B or Wan2.2 A14B"):
        arrive(ovi_model, lora_request=LoRARequest("style", 1, str(file)))


def test_the_checkpoint_of_the_model_is_no_lora(ovi_model: Path) -> None:
    file = next((ovi_model / "transformer").glob("*.safetensors"))
    with pytest.raises(OmniClientError, match=r"\[lora_file\] LoRA transformer/.* it is a checkpoint, not a LoRA"):
        arrive(ovi_model, lora_request=LoRARequest("style", 1, str(file)))


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e308, -101, [1], "1", True, None])
def test_a_wrong_scale_of_an_adapter_is_refused(ovi_model: Path, tmp_path: Path, scale: Any) -> None:
    file = write_lora(tmp_path / "a.safetensors", ovi_model)
    with pytest.raises(OmniClientError, match="lora_scale"):
        arrive(ovi_model, lora_request=LoRARequest("style", 1, str(file)), lora_scale=scale)


A = "video_model.blocks.0.self_attn.q.lora_A.weight"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({A: torch.zeros(4, 3)}, "remap_shape"),
        ({A: torch.full((4, 64), float("nan"))}, "lora_file"),
        ({A.replace(".q.", ".none."): torch.zeros(4, 64)}, ""),
        ({A.replace("_A.", "_B."): torch.zeros(8, 5)}, ""),
        ({"video_model.blocks.0.self_attn.q.alpha": torch.tensor(float("inf"))}, "lora_file"),
        ({"video_model.blocks.0.self_attn.q.alpha": torch.zeros(3)}, "remap_shape"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_on_arrival(
    ovi_model: Path, tmp_path: Path, changes: dict[str, torch.Tensor], code: str
) -> None:
    file = write_lora(tmp_path / "a.safetensors", ovi_model, **changes)
    with pytest.raises(OmniClientError, match=code):
        arrive(ovi_model, lora_request=LoRARequest("style", 1, str(file)))


@pytest.mark.parametrize(
    "path", ["/etc/none", "owner/repo", "/etc/passwd", "/proc/self/environ", "/", "x" * 5000, "a\0b"]
)
def test_any_other_path_is_refused(ovi_model: Path, path: str) -> None:
    with pytest.raises(OmniClientError, match="LoRA"):
        arrive(ovi_model, lora_request=LoRARequest("style", 1, path))
