"""``verify parity --reference``: a fake of the original runs in its own process and is compared with the port."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import pytest
from click.testing import CliRunner

from port_kit.cli import main
from port_kit.download import download
from port_kit.models.dreamid_omni import recipe as shipped
from port_kit.port import resolve
from port_kit.registry import find_port
from port_kit.testing.gitserver import GitRemote
from port_kit.testing.hub import Hub
from port_kit.testing.tiny_fusion import tiny_fusion_model
from tests.parity.fake_original_code import FAKE_ORIGINAL, fake_original_files, with_code

Commit = Callable[[dict[str, str]], Path]


def run(*arguments: str, port: str = "dreamid_omni") -> tuple[int, dict[str, Any], str]:
    """Run the command in this process; return its exit code, its envelope and its stderr.

    The streams are files: vLLM asks the standard output for its descriptor.
    """
    command = ["verify", "parity", port, *arguments, "--json"]
    with TemporaryFile("w+") as output, TemporaryFile("w+") as told:
        with redirect_stdout(output), redirect_stderr(told), pytest.raises(SystemExit) as caught:
            main(command)
        for stream in (output, told):
            stream.seek(0)
        return int(caught.value.code or 0), json.loads(output.read()), told.read()


@pytest.fixture
def commit(model: Path, remote: GitRemote, tmp_path: Path) -> Commit:
    """Return a model directory whose lock names another commit of the fake, with changed files."""

    def put(files: dict[str, str]) -> Path:
        copy = tmp_path / "model"
        shutil.copytree(model, copy, symlinks=True)
        remote.git("checkout", "--quiet", "-B", "other", "main")
        head = remote.commit(dict(files))
        remote.git("checkout", "--quiet", "main")
        return with_code(copy, shipped.RECIPE.code[0], head)

    return put


@pytest.fixture(scope="module")
def recorded(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any], Path]:
    """One complete run: record, reuse, compare, report."""
    folder = tmp_path_factory.mktemp("recorded")
    code, envelope, _ = run(
        *("--reference", "--model", str(model), "--output-dir", str(folder / "goldens")),
        *("--device", "cpu", "--html", str(folder / "parity.html")),
    )
    return code, envelope, folder


def test_the_port_agrees_with_the_reference_component_by_component(
    recorded: tuple[int, dict[str, Any], Path],
) -> None:
    code, envelope, folder = recorded
    assert code == 0 and envelope["ok"], envelope
    cases = {case["case"]: case for case in envelope["data"]["cases"]}
    assert set(cases) == {
        "umt5 fp32",
        "mmaudio fp32",
        "wan_vae fp32",
        "wan_vae bf16 weights",
        "fusion/dreamid_one_ref fp32",
        "fusion/dreamid_two_refs fp32",
    }
    assert all(len(case["differences"]) >= 1 for case in cases.values())
    inside = [item["name"] for item in cases["fusion/dreamid_two_refs fp32"]["differences"]]
    assert {"vid.context", "audio.block0.self_attn", "vid.block1.cross_attn", "audio.block1.ffn", "vid.head"} <= set(
        inside
    )
    assert 0 < cases["fusion/dreamid_two_refs fp32"]["max_abs"] < 5e-5
    assert (folder / "goldens" / "SET.json").is_file()
    page = (folder / "parity.html").read_text(encoding="utf-8")
    assert "fusion/dreamid_two_refs" in page and "within all bounds" in page


def test_recordings_state_their_origin(
    recorded: tuple[int, dict[str, Any], Path], remote: GitRemote, model: Path
) -> None:
    provenance = json.loads((recorded[2] / "goldens" / "reference.json").read_text())
    assert provenance["made_from"]["content"] == remote.head
    assert provenance["code_version"] == f"commit {remote.head[:12]}"
    assert provenance["model"] == str(model)
    assert recorded[1]["data"]["reference"]["reused"] is False
    assert "recorded fusion/dreamid_two_refs fp32" in (recorded[2] / "goldens" / "reference.log").read_text()


def test_a_second_run_reuses_files(recorded: tuple[int, dict[str, Any], Path], model: Path) -> None:
    goldens = recorded[2] / "goldens"
    code, envelope, told = run(
        *("--reference", "--model", str(model), "--output-dir", str(goldens), "--device", "cpu"),
        *("--only", "fusion/dreamid_one_ref*"),
    )
    assert code == 0 and envelope["data"]["reference"]["reused"] is True
    assert "already" in told


def test_a_reference_that_computes_something_else_is_seen(
    recorded: tuple[int, dict[str, Any], Path], tmp_path: Path
) -> None:
    """Goldens decide: if the original's values differ, the case fails at that tensor."""
    from safetensors.torch import load_file, save_file

    goldens = tmp_path / "goldens"
    shutil.copytree(recorded[2] / "goldens", goldens, symlinks=True)
    path = goldens / "fusion" / "dreamid_one_ref" / "outputs_fp32.safetensors"
    save_file({name: value * 1.01 for name, value in load_file(path).items()}, path)
    code, envelope, _ = run("--goldens", str(goldens), "--only", "fusion/dreamid_one_ref*")
    assert code == 1
    assert envelope["data"]["cases"][0]["first_divergence"] == "vid.0"


def test_the_fake_reproduces_the_recorded_outputs(goldens: Path) -> None:
    """The fake agrees with recorded outputs of the original, which makes comparisons with it meaningful."""
    script = Path(__file__).with_name("run_fake_original.py")
    done = subprocess.run(
        [sys.executable, str(script), str(FAKE_ORIGINAL), str(goldens)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    differences = json.loads(done.stdout.splitlines()[-1])
    assert differences and max(differences.values()) < 2e-5


@pytest.mark.parametrize("name", ["dreamid_omni", "ovi"])
def test_whatever_a_shipped_port_names_exists(name: str) -> None:
    port = find_port(name)
    for named in (port.pipeline, port.recipe, port.parity, port.original, port.tiny_model, *port.variants.values()):
        assert resolve(named) is not None
    for component in port.components:
        assert all(resolve(named) for named in (component.build, component.rules, component.config))


@pytest.mark.slow
def test_ovi_agrees_with_its_reference(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from port_kit.models.ovi.recipe import RECIPE

    files = {path.replace("dreamid_omni", "ovi"): data for path, data in fake_original_files().items()}
    remote = GitRemote(tmp_path / "ovi", {path: data.replace(b"dreamid_omni", b"ovi") for path, data in files.items()})
    tiny = tiny_fusion_model(RECIPE, tmp_path / "hub")
    with Hub(tiny.repositories) as hub:
        recipe = RECIPE.with_(configs=tiny.configs)
        directory = download(recipe, tmp_path / "model", endpoint=hub.endpoint, token=False, use_cache=False).directory
    with_code(directory, replace(RECIPE.code[0], url=remote.url), remote.head)
    code, envelope, _ = run(
        *("--reference", "--model", str(directory), "--output-dir", str(tmp_path / "goldens"), "--device", "cpu"),
        port="ovi",
    )
    assert code == 0, envelope
    cases = {case["case"]: case["max_abs"] for case in envelope["data"]["cases"]}
    names = {"fusion/ovi_t2v fp32", "fusion/ovi_i2v_first_frame_clean fp32", "fusion/ovi_slg fp32"}
    assert names <= set(cases) and all(0 < cases[name] < 5e-5 for name in names)


CRASH = "import numpy\nraise RuntimeError('the weights are melting')\n"


FAILURES = {
    "crash": (CRASH, (), "reference_failed", "RuntimeError: the weights are melting", "reference.log"),
    "missing package": (
        "import sandcastle_attn\n",
        (),
        "reference_failed",
        "exit code 1",
        "pip install sandcastle_attn",
    ),
    "killed": ("import os\nos.kill(os.getpid(), 9)\n", (), "reference_failed", "signal 9", "memory"),
    "no CUDA": ("", ("--precision", "bf16"), "reference_failed", "this process has no CUDA device", "reference.log"),
    "nothing recorded": ("import os\nos._exit(0)\n", (), "reference_output", "lacks SET.json", "did not do its work"),
    "timeout": (
        "import time\ntime.sleep(60)\n",
        ("--timeout", "4"),
        "reference_timeout",
        "ran for more than 4 s and was stopped",
        "--timeout",
    ),
}
SLOW = dict.fromkeys(("crash", "killed", "no CUDA"), [pytest.mark.slow])


@pytest.mark.parametrize("failure", [pytest.param(name, id=name, marks=SLOW.get(name, [])) for name in FAILURES])
def test_a_reference_that_fails_is_reported_with_its_last_words(failure: str, commit: Commit, tmp_path: Path) -> None:
    content, arguments, code, words, hint = FAILURES[failure]
    broken = commit({"dreamid_omni/modules/fusion.py": content})
    goldens = tmp_path / "goldens"
    exit_code, envelope, _ = run(
        "--reference", "--model", str(broken), "--output-dir", str(goldens), "--device", "cpu", *arguments
    )
    error = envelope["error"]
    assert (exit_code, error["code"]) == (1, code)
    assert words in error["message"] and hint in error["hint"]
    assert not goldens.exists()


def test_a_reference_of_another_shape_names_case_and_tensor(
    recorded: tuple[int, dict[str, Any], Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    goldens = tmp_path / "goldens"
    shutil.copytree(recorded[2] / "goldens", goldens, symlinks=True)
    path = goldens / "mmaudio" / "outputs_fp32.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "vocode": tensors["vocode"][..., :-4].contiguous()}, path)
    code, envelope, _ = run("--goldens", str(goldens), "--only", "mmaudio*")
    assert (code, envelope["error"]["code"]) == (1, "parity_shape")
    assert "case mmaudio fp32: vocode has shape" in envelope["error"]["message"]


def test_a_reference_that_was_not_fetched_names_the_command(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    lock = json.loads((copy / "port.lock").read_text())
    (copy / "port.lock").write_text(json.dumps({**lock, "code": {}}))
    code, envelope, _ = run("--reference", "--model", str(copy), "--output-dir", str(tmp_path / "goldens"))
    assert (code, envelope["error"]["code"]) == (1, "reference_missing")
    assert envelope["error"]["hint"].endswith(f"port-kit download dreamid_omni --output-dir {copy} --with-reference")


def test_no_model_directory_names_the_command(tmp_path: Path) -> None:
    code, envelope, _ = run("--reference", "--model", str(tmp_path), "--output-dir", str(tmp_path / "goldens"))
    assert (code, envelope["error"]["code"]) == (1, "reference_missing")
    assert "no model_index.json" in envelope["error"]["message"]


def test_a_checkout_that_was_changed_is_not_run(commit: Commit, remote: GitRemote, tmp_path: Path) -> None:
    from port_kit.download.gitcode import code_folder

    model = commit({"dreamid_omni/extra.py": "x = 1\n"})
    head = json.loads((model / "port.lock").read_text())["code"]["dreamid_omni_reference"]["commit"]
    changed = code_folder("dreamid_omni_reference", head) / "repo" / "dreamid_omni" / "extra.py"
    changed.write_text("x = 2\n")
    code, envelope, _ = run("--reference", "--model", str(model), "--output-dir", str(tmp_path / "goldens"))
    assert (code, envelope["error"]["code"]) == (1, "code_broken")


def test_an_interpreter_that_is_none_is_reported(model: Path, tmp_path: Path) -> None:
    code, envelope, _ = run(
        *("--reference", "--model", str(model), "--output-dir", str(tmp_path / "goldens")),
        *("--reference-python", str(tmp_path / "nowhere" / "python")),
    )
    assert (code, envelope["error"]["code"]) == (1, "reference_python")


def test_a_folder_that_is_not_a_recording_is_left_alone(model: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    code, envelope, _ = run("--reference", "--model", str(model), "--output-dir", str(tmp_path))
    assert (code, envelope["error"]["code"]) == (1, "reference_output")
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("arguments", [(), ("--reference", "--goldens", ".")])
def test_goldens_and_reference_exclude_each_other(arguments: tuple[str, ...]) -> None:
    result = CliRunner().invoke(main, ["verify", "parity", "dreamid_omni", *arguments])
    assert result.exit_code == 2
