"""The command: its output and exit codes; it neither loads torch nor downloads weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from port_kit.cli import main
from port_kit.inspect import known_classes
from port_kit.testing.hub import Hub
from tests.inspect import fake_repositories
from tests.inspect.types import Folder


def test_json_envelope(folder: Folder) -> None:
    result = CliRunner().invoke(main, ["inspect", str(folder(fake_repositories.hybrid_model())), "--json"])
    envelope = json.loads(result.stdout)
    assert result.exit_code == 0 and envelope["ok"] and envelope["command"] == "inspect"
    data = envelope["data"]
    assert data["path"] == "hybrid" and data["components"][0]["weights"][0]["tensors"] == 1
    assert data["memory"]["sharded"] == ["transformer"]


def test_text_goes_to_stdout(folder: Folder) -> None:
    result = CliRunner().invoke(main, ["inspect", str(folder(fake_repositories.supported_model()))])
    assert result.exit_code == 0 and ": already supported\n" in result.stdout


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_no_verdict_is_exit_code_1(flags: list[str]) -> None:
    with Hub({"org/closed": fake_repositories.diffusers_model()}, gated=("org/closed",)) as hub:
        result = CliRunner().invoke(main, ["inspect", "org/closed", "--endpoint", hub.endpoint, *flags])
    assert result.exit_code == 1 and "gated" in result.stdout


def test_errors_have_a_code_and_a_hint(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / "nothing")])
    assert result.exit_code == 1 and "[inspect_target]" in result.stderr and "hint:" in result.stderr


def test_only_headers_travel_and_torch_stays_out() -> None:
    big = fake_repositories.safetensors({"blocks.0.weight": (2048, 2048)})
    files = fake_repositories.diffusers_model() | {
        "transformer/diffusion_pytorch_model-00001-of-00002.safetensors": big
    }
    program = (
        "import sys; from port_kit.cli import main\n"
        "main(['inspect', 'org/model', '--json'], standalone_mode=False)\n"
        "assert not {'torch', 'vllm', 'vllm_omni', 'diffusers', 'transformers'} & set(sys.modules), sys.modules.keys()"
    )
    with Hub({"org/model": files}, cdn=True) as hub:
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, **hub.environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        sent = sum(request.sent for request in hub.requests)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["data"]["path"] == "diffusers"
    assert sent < 200_000 < len(big)
    kinds = [request.kind for request in hub.requests if request.host == "hub"]
    assert kinds.count("get") == len(files) - 1 and len(kinds) == len(files) - 1 + 3, "each once; tokenizer.json never"


def test_catalogue_has_what_is_known_to_exist() -> None:
    omni = known_classes.omni()
    assert omni.pipelines["WanPipeline"].startswith("wan2_2.") and len(omni.pipelines) > 50
    assert "bagel" in omni.stages and omni.by_architecture["BagelForConditionalGeneration"] == "BagelPipeline"
    names = known_classes.diffusers_names()
    assert (names["AutoencoderKLWan"], names["UniPCMultistepScheduler"], names["WanPipeline"]) == (
        "models",
        "schedulers",
        "pipelines",
    )
    for name in ("UMT5EncoderModel", "T5TokenizerFast", "CLIPImageProcessorFast", "PreTrainedTokenizerFast"):
        assert known_classes.library_has("transformers", name)
    assert known_classes.library_has("stable_diffusion", "StableDiffusionSafetyChecker")
    for library, name in (("transformers", "NoSuchModel"), ("diffusers", "UMT5EncoderModel"), ("my_code", "Any")):
        assert not known_classes.library_has(library, name)


@pytest.mark.slow
def test_catalogue_equals_what_the_packages_say_when_imported() -> None:
    import diffusers
    from vllm_omni.config.pipeline_registry import OMNI_PIPELINES
    from vllm_omni.diffusion.registry import _DIFFUSION_MODELS

    assert set(known_classes.omni().stages) == set(OMNI_PIPELINES)
    assert set(known_classes.omni().pipelines) <= set(_DIFFUSION_MODELS)
    known = diffusers._class_to_module
    assert set(known_classes.diffusers_names()) <= set(known)
    assert {
        name for name in set(known) - set(known_classes.diffusers_names()) if not known[name].startswith("utils")
    } == set()
