"""Parts of hosted pipelines that need no engine: index, request, media, checks before workers start."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cache_dit import DBCacheConfig
from cache_dit.caching.cache_contexts.cache_manager import CachedContextManager
from PIL import Image
from vllm_omni.diffusion.data import DiffusionParallelConfig, OmniDiffusionConfig
from vllm_omni.diffusion.request import OmniDiffusionRequest
from vllm_omni.inputs.data import OmniDiffusionSamplingParams

from port_kit.autoparallel import planned
from port_kit.autoparallel.host.caching import separate_branches
from port_kit.autoparallel.host.checks import PLAN_KEY, check_host
from port_kit.autoparallel.host.files import write_files
from port_kit.autoparallel.host.index import PipelineIndex
from port_kit.autoparallel.host.loading import build_denoiser
from port_kit.autoparallel.host.media import WORK, payload
from port_kit.autoparallel.host.request import call_arguments
from port_kit.autoparallel.plan import Blocks, Plan, Proof
from port_kit.autoparallel.tiny_pipelines import CASES, write_pipeline
from port_kit.autoparallel.tiny_pipelines.engine import Generated, generated
from port_kit.errors import PortKitError
from port_kit.parallel.layout import Layout
from port_kit.registry import find_port, list_ports

PLAN = Plan(
    subject="WanTransformer3DModel",
    module_class="diffusers.models.transformers.transformer_wan.WanTransformer3DModel",
    proofs=(
        Proof(layout="tp2", scale="deeper", dtype="float32", difference=0.0),
        Proof(layout="tp2xulysses2", scale="deeper", dtype="float32", difference=0.0),
    ),
)


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny pipeline."""
    return write_pipeline("WanPipeline", CASES["WanPipeline"], tmp_path_factory.mktemp("pipelines") / "wan")


def code_of(function: Any, *arguments: Any) -> str:
    """Return the code of the error that a call raises."""
    with pytest.raises(PortKitError) as caught:
        function(*arguments)
    return caught.value.code


def config_of(folder: Path, plan: Path | None = None, cache: str = "none", **degrees: int) -> OmniDiffusionConfig:
    """Return an engine's configuration."""
    return OmniDiffusionConfig(
        model=str(folder),
        dtype=torch.float32,
        cache_backend=cache,
        parallel_config=DiffusionParallelConfig(**degrees),
        additional_config={} if plan is None else {PLAN_KEY: str(plan)},
    )


def request_of(prompt: Any, **sampling: Any) -> tuple[Any, Any]:
    """Return what a worker gets of a request."""
    request = OmniDiffusionRequest(
        prompt=prompt, sampling_params=OmniDiffusionSamplingParams(**sampling), request_id="a"
    )
    return request.prompt, request.sampling_params


def test_the_index_names_denoisers_and_the_kind_of_output(wan: Path) -> None:
    index = PipelineIndex.read(wan)
    assert (index.denoisers, index.output_type) == (["transformer"], "video")
    assert "guidance_scale" in index.parameters


@pytest.mark.parametrize(
    "index", [{"_class_name": "NoSuchPipeline"}, {"_class_name": "DDPMPipeline", "scheduler": ["diffusers", "x"]}]
)
def test_a_directory_that_cannot_be_hosted_is_refused(index: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert code_of(PipelineIndex.read, tmp_path) == "inspect_target"


@pytest.mark.parametrize(
    ("name", "kind"), [("FluxPipeline", "image"), ("LTX2Pipeline", "video"), ("StableAudioPipeline", "audio")]
)
def test_kinds_of_output(name: str, kind: str) -> None:
    import diffusers

    assert PipelineIndex(Path(), getattr(diffusers, name), {}).output_type == kind


def test_a_request_becomes_arguments(wan: Path) -> None:
    prompt, sampling = request_of(
        {"prompt": "a", "negative_prompt": "b"}, num_frames=9, seed=5, extra_args={"max_sequence_length": 8}
    )
    found = call_arguments(prompt, sampling, PipelineIndex.read(wan).parameters, torch.device("cpu"))
    assert found.pop("generator").initial_seed() == 5
    expected = {"prompt": "a", "negative_prompt": "b", "num_frames": 9, "max_sequence_length": 8, "output_type": "np"}
    assert found == expected


@pytest.mark.parametrize(
    "sampling", [{"true_cfg_scale": 2.0}, {"extra_args": {"gidance_scale": 2.0}}, {"num_outputs_per_prompt": 11}]
)
def test_what_the_pipeline_does_not_take_is_refused(sampling: dict[str, Any], wan: Path) -> None:
    arguments = (*request_of("a", **sampling), PipelineIndex.read(wan).parameters, torch.device("cpu"))
    assert code_of(call_arguments, *arguments) == "input_value"


@pytest.mark.parametrize(
    ("pipeline", "expected"),
    [
        ("StableAudioPipeline", {"audio_start_in_s": 0.0, "audio_end_in_s": 2.0}),
        ("AudioLDM2Pipeline", {"audio_length_in_s": 2.0}),
    ],
)
@pytest.mark.parametrize("length", [{}, {"audio_length": 2.0}])
def test_the_length_of_audio_has_the_name_of_the_pipeline(
    length: dict[str, float], pipeline: str, expected: dict[str, float]
) -> None:
    """With and without the length that vLLM-Omni 0.32 adds to start and end."""
    import diffusers

    parameters = PipelineIndex(Path(), getattr(diffusers, pipeline), {}).parameters
    request = request_of("a", extra_args={"audio_start_in_s": 0.0, "audio_end_in_s": 2.0, **length})
    found = call_arguments(*request, parameters, torch.device("cpu"))
    assert {name: value for name, value in found.items() if name.startswith("audio")} == expected


def test_an_image_of_a_request_is_opened(tmp_path: Path) -> None:
    import diffusers

    Image.new("RGB", (6, 4), (9, 8, 7)).save(tmp_path / "a.png")
    parameters = PipelineIndex(Path(), diffusers.WanImageToVideoPipeline, {}).parameters
    for image in (str(tmp_path / "a.png"), [tmp_path / "a.png"], Image.open(tmp_path / "a.png")):
        request = request_of({"prompt": "a", "multi_modal_data": {"image": image}})
        found = call_arguments(*request, parameters, torch.device("cpu"))["image"]
        assert found.size == (6, 4) and found.getpixel((0, 0)) == (9, 8, 7)
    request = request_of({"prompt": "a", "multi_modal_data": {"image": str(tmp_path / "b.png")}})
    assert code_of(call_arguments, *request, parameters, torch.device("cpu")) == "input_unreadable"


@pytest.mark.parametrize(("name", "rate"), [("LTXPipeline", 25.0), ("WanPipeline", 24.0)])
def test_the_frame_rate_is_that_of_the_pipeline(name: str, rate: float) -> None:
    import diffusers

    assert PipelineIndex(Path(), getattr(diffusers, name), {}).fps == rate


def test_guidance_needs_no_plan(wan: Path) -> None:
    check_host(config_of(wan, cfg_parallel_size=2))


@pytest.mark.parametrize("degrees", [{"tensor_parallel_size": 2}, {"ulysses_degree": 2}])
def test_a_layout_without_a_plan_is_refused(degrees: dict[str, int], wan: Path) -> None:
    assert code_of(check_host, config_of(wan, **degrees)) == "plan_layout"


@pytest.mark.parametrize("option", [{"enable_cpu_offload": True}, {"cache_backend": "tea_cache"}])
def test_an_option_that_nothing_proves_is_refused(option: dict[str, Any], wan: Path) -> None:
    assert code_of(check_host, OmniDiffusionConfig(model=str(wan), dtype=torch.float32, **option)) == "engine_option"


def test_only_proven_layouts_are_accepted(wan: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(PLAN.to_toml())
    check_host(config_of(wan, path, tensor_parallel_size=2))
    check_host(config_of(wan, path, tensor_parallel_size=2, cfg_parallel_size=2))
    check_host(config_of(wan, path, tensor_parallel_size=2, ulysses_degree=2))
    assert code_of(check_host, config_of(wan, path, ulysses_degree=2)) == "plan_layout"
    assert code_of(check_host, config_of(wan, path, tensor_parallel_size=2, ring_degree=2)) == "plan_layout"


def test_a_planned_port_refuses_layouts_that_its_plan_does_not_prove(
    wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """The engine calls the check of a port with a pipeline of its own before workers start."""
    (tmp_path / "planned_port_of_tests").mkdir()
    files = {
        "__init__": "from port_kit.port import Port\n"
        "PORT = Port(name='planned_port_of_tests', title='t', class_name='PlannedPortOfTestsPipeline',"
        " output_type='video', package=__name__, plan='plan.toml', components=())\n",
        "pipeline": "from port_kit.autoparallel.planned import PlannedComponents\n"
        "class PlannedPortOfTestsPipeline(PlannedComponents): fps, audio_sample_rate = 24, None\n",
    }
    for name, text in files.items():
        (tmp_path / "planned_port_of_tests" / f"{name}.py").write_text(text)
    path = tmp_path / "planned_port_of_tests" / "plan.toml"
    monkeypatch.setenv("PORT_KIT_PATH", str(tmp_path))
    list_ports.cache_clear()
    request.addfinalizer(list_ports.cache_clear)
    port = find_port("planned_port_of_tests")

    def start(**degrees: int) -> None:
        config = config_of(wan, **degrees)
        config.model_class_name = port.class_name
        planned.get_post_process_func(config)

    with pytest.raises(PortKitError) as caught:
        start(tensor_parallel_size=2)
    assert caught.value.code == "port_invalid" and str(path) in caught.value.message
    path.write_text(PLAN.to_toml())
    start(tensor_parallel_size=2)
    start(cfg_parallel_size=2)
    with pytest.raises(PortKitError) as caught:
        start(tensor_parallel_size=2, ring_degree=2)
    assert caught.value.code == "plan_layout" and "tp2xring2" in caught.value.message
    assert "proven: tp2, tp2xulysses2" in caught.value.hint


def test_cache_dit_needs_a_proof_with_the_layout(wan: Path, tmp_path: Path) -> None:
    assert code_of(check_host, config_of(wan, cache="cache_dit")) == "plan_layout"
    path = tmp_path / "plan.toml"
    path.write_text(PLAN.to_toml())
    assert code_of(check_host, config_of(wan, path, "cache_dit", tensor_parallel_size=2)) == "plan_layout"
    proof = Proof(layout="cache_ditxtp2", scale="deeper", dtype="float32", difference=0.0)
    path.write_text(PLAN.model_copy(update={"proofs": (*PLAN.proofs, proof)}).to_toml())
    check_host(config_of(wan, path, "cache_dit", tensor_parallel_size=2))
    assert code_of(check_host, config_of(wan, path, "cache_dit")) == "plan_layout"
    two = config_of(wan, path, "cache_dit", tensor_parallel_size=2, cfg_parallel_size=2)
    assert code_of(check_host, two) == "engine_option"


def test_a_finding_is_the_reason_without_a_pattern(wan: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    blocks = Blocks(modules="blocks.*", cache_reason="its blocks change their argument kv_cache")
    path.write_text(PLAN.model_copy(update={"blocks": (blocks,)}).to_toml())
    with pytest.raises(PortKitError, match="change their argument kv_cache"):
        check_host(config_of(wan, path, "cache_dit"))


class _Scheduler:
    """Scheduler of a pipeline, of which only the end of a step matters."""

    def set_timesteps(self, _steps: int) -> None:
        """Begin."""

    def step(self, value: int) -> int:
        return value + 1


def test_branches_of_a_step_have_their_own_contexts() -> None:
    manager = CachedContextManager("test", persistent_context=True)
    denoiser, scheduler = torch.nn.Identity(), _Scheduler()
    denoiser._context_manager, denoiser._context_names = manager, ["blocks"]  # type: ignore[assignment]
    separate_branches(SimpleNamespace(components={"scheduler": scheduler}), {"transformer": denoiser})

    contexts = []  # kept alive, so that no two have the same identity

    def run(branches: int) -> list[int]:
        """Return the identities of the contexts of one step."""
        found = []
        for _ in range(branches):
            denoiser(torch.ones(1))
            contexts.append(manager.get_context("blocks"))
            found.append(id(contexts[-1]))
        assert scheduler.step(1) == 2
        return found

    manager.reset_context("blocks", cache_config=DBCacheConfig(num_inference_steps=2))
    first, second, third = run(2), run(3), run(1)
    assert len(set(second)) == 3 and first == second[:2] and third == second[:1]
    assert manager.get_context("blocks").cache_config.num_inference_steps is None
    manager.reset_context("blocks", cache_config=DBCacheConfig(num_inference_steps=2))
    assert not set(run(2)) & set(second[:1])


def test_a_pipeline_without_a_scheduler_has_no_branches() -> None:
    pipeline = SimpleNamespace(components={"vae": torch.nn.Identity()})
    assert code_of(separate_branches, pipeline, {"transformer": torch.nn.Identity()}) == "plan_cache"


def test_a_plan_of_another_class_is_refused(wan: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(PLAN.model_copy(update={"module_class": "diffusers.FluxTransformer2DModel"}).to_toml())
    assert code_of(check_host, config_of(wan, path, tensor_parallel_size=2)) == "plan_layout"


def test_denoisers_have_no_memory_and_keep_float32(wan: Path) -> None:
    module = build_denoiser(PipelineIndex.read(wan), "transformer", torch.bfloat16)
    assert {parameter.device.type for parameter in module.parameters()} == {"meta"}
    dtypes = {name: parameter.dtype for name, parameter in module.named_parameters()}
    assert dtypes["scale_shift_table"] is torch.float32
    assert dtypes["patch_embedding.weight"] is torch.bfloat16
    assert all(buffer.device.type == "cpu" for buffer in module.buffers())


def test_media_become_files(tmp_path: Path) -> None:
    pixels = torch.rand(2, 4, 6, 3)
    images = payload({"image": pixels}, fps=None, output_type=None)["payload"]["image"]
    paths = write_files(tmp_path / "a.png", SimpleNamespace(images=images), "image")
    assert [path.name for path in paths] == ["a_1.png", "a_2.png"]
    read = np.asarray(Image.open(paths[1])) / 255
    assert np.abs(read - pixels[1].numpy()).max() <= 0.5 / 255 + 1e-6

    samples = torch.rand(1, 2, 50) * 2 - 1
    made = payload({"audio": samples, "sample_rate": 8000}, fps=None, output_type=None)
    extra = {"audio": made["payload"]["audio"], "audio_sample_rate": made["metadata"]["audio"]["sample_rate"]}
    (path,) = write_files(tmp_path / "a.wav", SimpleNamespace(multimodal_output=extra), "audio")
    with wave.open(str(path)) as file:
        assert (file.getnchannels(), file.getframerate(), file.getnframes()) == (2, 8000, 50)
        found = np.frombuffer(file.readframes(50), dtype="<i2").reshape(50, 2).T / 32767
    assert np.abs(found - samples[0].numpy()).max() <= 1 / 32767


@pytest.mark.parametrize(
    ("name", "inputs", "media"),
    [
        ("WanPipeline", "text", []),
        ("DiTPipeline", "class", []),
        ("FluxKontextPipeline", "text + image", ["image"]),
        ("WanVideoToVideoPipeline", "text + video", ["video"]),
    ],
)
def test_tiny_requests_have_the_media_of_the_pipeline(name: str, inputs: str, media: list[str]) -> None:
    prompt, _ = CASES[name].request()
    assert CASES[name].inputs == inputs
    given = prompt.get("multi_modal_data", {})
    assert list(given) == media
    if "video" in media:
        frames = [np.asarray(frame) for frame in given["video"]]
        assert len({frame.tobytes() for frame in frames}) == 9


def test_another_layout_than_asked_for_is_an_error() -> None:
    work = {"layout": "single", "calls": 6.0, "branches": [], "exchanges": {}}
    made = payload({"image": torch.rand(1, 4, 6, 3), WORK: work}, fps=None, output_type="np")
    result = SimpleNamespace(images=made["payload"]["image"], multimodal_output={"metadata": made["metadata"]})
    assert generated(result, Layout()).work == work
    assert code_of(generated, result, Layout(ulysses=2)) == "parallel_degree"


def test_media_differ_relative_to_the_largest_value() -> None:
    one = Generated({"image0": np.array([0.0, 2.0]), "audio": np.array([1.0, -1.0])}, {})
    assert Generated({"image0": np.array([0.5, 2.0]), "audio": np.array([1.0, -1.1])}, {}).difference(one) == 0.25
    assert Generated({"image0": np.array([0.0, 2.0])}, {}).difference(one) == float("inf")
    assert Generated({**one.media, "audio": np.array([1.0, np.nan])}, {}).difference(one) == float("inf")


def test_a_wrong_suffix_is_refused(tmp_path: Path) -> None:
    assert code_of(write_files, tmp_path / "a.png", SimpleNamespace(images=[]), "video") == "media_write"
