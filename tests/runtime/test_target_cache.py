"""Recorded targets are those of the real modules; command lines that use them need neither torch nor vLLM."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from port_kit.manifest import Manifest
from port_kit.registry import find_port
from port_kit.runtime import target_cache
from port_kit.runtime.target_cache import build_manifest, component_config, component_target, recording_path

DATA = Path(__file__).parent.parent / "data" / "manifests" / "components.json.gz"
COMPONENTS = ["transformer", "text_encoder", "vae", "audio_vae", "vocoder"]


@pytest.mark.parametrize("name", COMPONENTS)
def test_recorded_targets_equal_built_ones(name: str) -> None:
    port = find_port("dreamid_omni")
    component = port.component(name)
    known = component_target(port, name)
    built = build_manifest(component, component_config(component))
    assert known.origin == "recorded", f"run: port-kit manifest --port dreamid_omni --component {name} --record"
    assert dict(known.manifest) == dict(built)
    assert {k: v.slots for k, v in known.manifest.items()} == {k: v.slots for k, v in built.items()}
    assert recording_path(port, name).is_file()


def run(*arguments: str) -> tuple[int, dict]:
    done = subprocess.run(
        [sys.executable, "-m", "port_kit", *arguments, "--json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    return done.returncode, json.loads(done.stdout)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source of the vocoder, made from its own rules' target and the published names."""
    tables = json.loads(gzip.decompress(DATA.read_bytes()))
    path = tmp_path_factory.mktemp("manifests")
    for name, table in tables.items():
        (path / f"{name}.json").write_text(json.dumps(table))
    return path


def test_coverage_of_a_component_from_headers_alone(source: Path) -> None:
    file = next(path for path in sorted(source.iterdir()) if "umt5" in path.name or "text" in path.name)
    code, envelope = run("coverage", "--source", str(file), "--port", "dreamid_omni", "--component", "text_encoder")
    assert code == 0 and envelope["ok"] and envelope["data"]["target"]["from"] == "recorded"
    assert envelope["data"]["problem_count"] == 0


def test_a_gap_is_exit_code_1(source: Path, tmp_path: Path) -> None:
    file = next(path for path in sorted(source.iterdir()) if "umt5" in path.name or "text" in path.name)
    table = json.loads(file.read_text())
    table["blocks.3.attn.qq.weight"] = table.pop("blocks.3.attn.q.weight")
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps(table))
    code, envelope = run("coverage", "--source", str(broken), "--port", "dreamid_omni", "--component", "text_encoder")
    assert code == 1 and not envelope["ok"]
    codes = {problem["code"] for problem in envelope["data"]["problems"]}
    assert codes == {"remap_unexpected", "remap_missing"}


def test_reading_a_target_imports_neither_torch_nor_vllm() -> None:
    script = (
        "import sys\nfrom port_kit.registry import find_port\n"
        "from port_kit.runtime.target_cache import component_target\n"
        "known = component_target(find_port('dreamid_omni'), 'transformer')\n"
        "assert known.origin == 'recorded' and len(known.manifest) > 1000\n"
        "assert 'torch' not in sys.modules and 'vllm' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)


def test_manifest_command_round_trips(tmp_path: Path) -> None:
    out = tmp_path / "vae.json"
    code, envelope = run("manifest", "--port", "dreamid_omni", "--component", "vae", "-o", str(out))
    assert code == 0 and envelope["data"]["tensors"] == len(Manifest.from_json(out))


def test_a_recording_is_kept_for_other_releases_if_the_module_is_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = find_port("dreamid_omni")
    path = tmp_path / "vae.json"
    monkeypatch.setattr(target_cache, "recording_path", lambda port, name: path)
    monkeypatch.setattr(target_cache, "releases", lambda: "vllm-omni 0.1")
    target_cache.record(port, "vae")
    monkeypatch.setattr(target_cache, "releases", lambda: "vllm-omni 0.2")
    target_cache.record(port, "vae")
    data = json.loads(path.read_text())
    assert data["releases"] == ["vllm-omni 0.1", "vllm-omni 0.2"]
    del data["tensors"]["encoder.conv_in.bias"]
    path.write_text(json.dumps(data))
    target_cache.record(port, "vae")
    assert json.loads(path.read_text())["releases"] == ["vllm-omni 0.2"]
