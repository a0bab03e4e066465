"""The commands: data on stdout, the rest on stderr, one envelope with --json, exit codes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from port_kit.cli import main
from port_kit.cli.download import at_revisions, load_recipe
from port_kit.cli.download import main as download_script
from port_kit.errors import DownloadError
from port_kit.testing.hub import Hub
from tests.download.helpers import FILES, VAE


def call(*arguments: object, **environment: str) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(main, [str(item) for item in arguments], env=environment)


@pytest.fixture
def vae_hub() -> Iterator[Hub]:
    """A Hub with one repository."""
    with Hub({VAE: FILES[VAE]}) as hub:
        yield hub


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    """A recipe in TOML."""
    path = tmp_path / "zz.toml"
    path.write_text(
        f'name = "zz"\nmodel_index = {{ _class_name = "T", _diffusers_version = "1" }}\n'
        f'[[repositories]]\nrepo_id = "{VAE}"\nfiles = [{{ pattern = "vae.safetensors", folder = "vae" }}]\n'
    )
    return path


def test_download_then_verify_then_remove(vae_hub: Hub, recipe_file: Path, tmp_path: Path) -> None:
    options = ("--output-dir", tmp_path / "m", "--endpoint", vae_hub.endpoint, "--no-cache")
    planned = call("download", recipe_file, *options, "--dry-run")
    assert planned.exit_code == 0 and "vae/vae.safetensors" in planned.stdout and "to fetch" in planned.stdout
    assert not (tmp_path / "m").exists()
    done = call("download", recipe_file, *options)
    assert done.exit_code == 0 and "is complete: 1 files" in done.stdout
    assert "vae/vae.safetensors" in done.stderr and "vae/vae.safetensors" not in done.stdout
    verified = call("download", recipe_file, *options, "--verify").stdout
    assert "nothing to do, every file has the hash that it should have" in verified
    quiet = call("download", recipe_file, *options, "-q")
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (0, "", "")
    (tmp_path / "m/extra").write_text("x")
    assert "not part of the model: extra" in call("download", recipe_file, *options).stdout
    removed = call("remove", tmp_path / "m")
    assert removed.exit_code == 0 and "left, because port-kit did not put them there: extra" in removed.stdout


def test_json_is_one_envelope(vae_hub: Hub, recipe_file: Path, tmp_path: Path) -> None:
    options = ("--output-dir", tmp_path / "m", "--endpoint", vae_hub.endpoint, "--json")
    done = call("download", recipe_file, *options)
    envelope = json.loads(done.stdout)
    assert envelope["ok"] and envelope["data"]["fetched"] == ["vae/vae.safetensors"] and done.stderr == ""
    planned = json.loads(call("download", recipe_file, *options, "--dry-run").stdout)
    assert planned["data"]["plan"]["bytes_to_fetch"] == 0
    failed = call("download", recipe_file, *options, "--revision", "0" * 40)
    assert failed.exit_code == 1 and json.loads(failed.stdout)["error"]["code"] == "hub_revision_missing"
    assert json.loads(call("remove", tmp_path / "m", "--json").stdout)["data"]["gone"]


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    failed = call("download", "no_such_port", "--output-dir", tmp_path / "m")
    assert failed.exit_code == 1 and "error [port_not_found]" in failed.stderr and failed.stdout == ""
    failed = call("remove", tmp_path)
    assert failed.exit_code == 1 and "port.lock" in failed.stderr
    assert call("download").exit_code == 2


def test_offline_by_the_hubs_variable(vae_hub: Hub, recipe_file: Path, tmp_path: Path) -> None:
    done = call("download", recipe_file, "--output-dir", tmp_path / "m", HF_HUB_OFFLINE="1")
    assert done.exit_code == 1 and "offline_incomplete" in done.stderr and vae_hub.requests == []


def test_convert(tmp_path: Path) -> None:
    torch.save({"generator": {"a": torch.ones(2)}, "epoch": 1}, tmp_path / "x.pt")
    failed = call("convert", tmp_path / "x.pt", tmp_path / "x.safetensors")
    assert failed.exit_code == 1 and "--wrapper generator" in failed.stderr
    done = call("convert", tmp_path / "x.pt", tmp_path / "x.safetensors", "--wrapper", "generator")
    assert done.exit_code == 0 and "1 tensors" in done.stdout
    again = call("convert", tmp_path / "x.pt", tmp_path / "x.safetensors", "--wrapper", "generator", "--json")
    assert json.loads(again.stdout)["data"]["unchanged"]


def test_revisions_on_the_command_line(recipe_file: Path) -> None:
    recipe = load_recipe(str(recipe_file))
    assert at_revisions(recipe, ("a" * 40,)).repositories[0].revision == "a" * 40
    assert at_revisions(recipe, (f"{VAE}={'b' * 40}",)).repositories[0].revision == "b" * 40
    with pytest.raises(DownloadError):
        at_revisions(recipe, (f"other/repo={'b' * 40}",))
    with pytest.raises(DownloadError):
        at_revisions(recipe, ("main",))


def test_every_shipped_recipe_can_be_read() -> None:
    from port_kit.registry import list_ports

    for name in list_ports():
        recipe = load_recipe(name)
        assert recipe.name == name and len(recipe.fingerprint()) == 64


def test_a_script_of_ten_lines(
    vae_hub: Hub, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--output-dir", str(tmp_path / "m"), "--endpoint", vae_hub.endpoint, "-q", "--no-cache"]
    monkeypatch.setattr(sys, "argv", ["download_zz.py", *options])
    with pytest.raises(SystemExit) as ended:
        download_script(str(recipe_file))
    assert ended.value.code == 0 and (tmp_path / "m/model_index.json").is_file()


@pytest.mark.parametrize("name", ["download", "convert", "remove", "uninstall"])
def test_help_ends_with_two_examples(name: str) -> None:
    text = call(name, "--help").stdout
    assert text.count(f"port-kit {name}") >= 2
