"""Ports of diffusers pipelines: their directories, plans, requests, and hand-written modules on several ranks."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm_omni.diffusion.data import DiffusionParallelConfig, OmniDiffusionConfig

from port_kit.autoparallel.host.checks import check_host, plan_of
from port_kit.autoparallel.host.index import PipelineIndex
from port_kit.autoparallel.plan import Plan
from port_kit.autoparallel.shipped import SHIPPED
from port_kit.autoparallel.verify import compare, proven_layouts
from port_kit.cli.clip_jobs import plan_jobs
from port_kit.cli.generate import build_parser
from port_kit.cli.make_clips import build_request
from port_kit.parallel.verify import port_test_case
from port_kit.port import HostedPort
from port_kit.registry import find_port, list_ports
from port_kit.runtime.plugin import register_pipelines
from port_kit.testing.workers import run_workers
from tests.helpers import raises

PORT = """
from port_kit.port import HostedPort

PORT = HostedPort(
    name="{name}",
    package=__name__,
    title="a port of Wan",
    class_name="{class_name}",
    output_type="video",
    hosted="WanPipeline",
    request_options={{"max_sequence_length": "int"}},
    tiny={{"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 2, "guidance_scale": 5.0}},
    replace={replace},
)
"""
RECIPE = """
from port_kit.download import FileRule, Recipe, Repository

RECIPE = Recipe(
    name="{name}",
    repositories=(Repository("org/wan", files=(FileRule("transformer/*", folder="transformer"),)),),
    model_index={{"_class_name": "{class_name}", "_diffusers_version": "0.40.0"}},
)
"""
Write = Callable[..., HostedPort]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Return a function that writes a port and finds it."""
    written: list[str] = []

    def make(name: str, replace: dict[str, str] | None = None) -> HostedPort:
        package = tmp_path / "ports" / name
        package.mkdir(parents=True)
        names = {"name": name, "class_name": f"{name.title().replace('_', '')}Pipeline"}
        (package / "__init__.py").write_text(PORT.format(**names, replace=replace or {}))
        (package / "recipe.py").write_text(RECIPE.format(**names))
        shutil.copy(SHIPPED / "WanTransformer3DModel.toml", package / "plan.toml")
        written.append(name)
        monkeypatch.setenv("PORT_KIT_PATH", str(package.parent))
        list_ports.cache_clear()
        port = find_port(name)
        assert isinstance(port, HostedPort)
        return port

    yield make
    list_ports.cache_clear()
    sys.path[:] = [folder for folder in sys.path if folder != str(tmp_path / "ports")]
    for name in [name for name in sys.modules if name.partition(".")[0] in written]:
        del sys.modules[name]


def config_of(model: Path, port: HostedPort, **degrees: int) -> OmniDiffusionConfig:
    """Return an engine's configuration."""
    parallel = DiffusionParallelConfig(**degrees)
    return OmniDiffusionConfig(
        model=str(model), model_class_name=port.class_name, dtype=torch.float32, parallel_config=parallel
    )


def test_a_port_brings_its_plan(write: Write, tmp_path: Path) -> None:
    port = write("hosted_wan")
    model = port_test_case(port, tmp_path).model
    index = PipelineIndex.read(model)
    assert (index.pipeline_class.__name__, index.denoisers) == ("WanPipeline", ["transformer"])
    plan = plan_of(config_of(model, port))
    assert plan == Plan.load(SHIPPED / "WanTransformer3DModel.toml")
    assert "tp2" in proven_layouts(port)
    check_host(config_of(model, port, tensor_parallel_size=2))
    file = tmp_path / "ports" / "hosted_wan" / "plan.toml"
    assert plan is not None
    file.write_text(plan.model_copy(update={"fingerprint": "0" * 16}).to_toml())
    with raises("plan_stale", "WanTransformer3DModel"):
        check_host(config_of(model, port, tensor_parallel_size=2))
    file.unlink()
    with raises("port_invalid", "plan.toml"):
        check_host(config_of(model, port))


def test_a_class_without_a_tiny_pipeline_is_named(write: Write, tmp_path: Path) -> None:
    port = write("hosted_wan")
    init = tmp_path / "ports" / "hosted_wan" / "__init__.py"
    init.write_text(init.read_text().replace("WanPipeline", "EasyAnimatePipeline"))
    list_ports.cache_clear()
    sys.modules.pop(port.package)
    with raises("port_invalid", "EasyAnimatePipeline"):
        port_test_case(find_port("hosted_wan"), tmp_path)


def test_options_become_arguments_of_the_call(write: Write) -> None:
    port = write("hosted_wan")
    options = ["--model", "DIR", "--tiny", "--max-sequence-length", "16", "--height", "64"]
    (job,) = plan_jobs(port, build_parser(port).parse_args(options))
    _, sampling = build_request(port, job.request, job.media)
    assert sampling.extra_args == {"max_sequence_length": 16}
    assert (sampling.height, sampling.num_frames, sampling.guidance_scale_provided) == (64, 9, True)


@pytest.mark.integration
def test_hand_written_modules_run_on_every_rank(write: Write, tmp_path: Path) -> None:
    def result(port: HostedPort) -> Any:
        case = port_test_case(port, tmp_path / port.name)
        (rank,) = run_workers(case.model, case.requests, setup=register_pipelines)
        return rank.outputs[0]["video"]

    here = "tests.autoparallel.replacements"
    plain = result(write("wan_plain"))
    assert (result(write("wan_doubled", {"blocks.*.ffn": f"{here}:DoubledFeedForward"})) - plain).abs().max() > 1e-3
    port = write("wan_same", {"blocks.*.ffn": f"{here}:SameFeedForward"})
    assert torch.equal(result(port), plain)
    case = port_test_case(port, tmp_path / "ranks")
    for comparison in compare(case.model, case.requests[0], ("tp2", "ulysses2")):
        assert comparison.ok, comparison.describe()
