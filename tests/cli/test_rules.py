"""``port-kit rules``, ``coverage`` and ``manifest`` on local checkpoints: results, envelopes, exit codes, errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from port_kit.cli import main
from port_kit.remap import RuleSet

RULES = r"""
name = "pair"

[sizes]
hidden = 4

[[rule]]
source = 'b\.(\d+)\.(q|k|v)\.weight'
target = 'layers.\1.attn.qkv.weight'
shard = '\2'
op = { name = "concat", dim = 0, parts = ["q", "k", "v"] }

[[rule]]
source = 'b\.(\d+)\.o\.weight'
target = 'layers.\1.attn.o.weight'
op = { name = "reshape", shape = ["hidden", -1] }

[[rule]]
source = 'ema\..+'
drop = "a second copy"
"""
SOURCE: dict[str, tuple[int, ...]] = {
    **{f"b.{n}.{part}.weight": (4 if part == "q" else 2, 4) for n in range(2) for part in "qkv"},
    **{f"b.{n}.o.weight": (4, 4, 1) for n in range(2)},
    "ema.x": (3,),
}
TARGET = {f"layers.{n}.attn.{leaf}.weight": shape for n in range(2) for leaf, shape in (("qkv", [8, 4]), ("o", [4, 4]))}


class Workspace:
    """A folder with a sharded checkpoint, a target's manifest and rules; runs commands on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors = {name: torch.randn(shape) for name, shape in SOURCE.items()}
        self.checkpoint, self.target, self.rules = folder / "dit", folder / "T.json", folder / "rules.toml"
        self.checkpoint.mkdir()
        names = sorted(self.tensors)
        files = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
        for file, held in files.items():
            save_file({name: self.tensors[name] for name in held}, self.checkpoint / file)
        index = {"weight_map": {name: file for file, held in files.items() for name in held}}
        (self.checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
        self.target.write_text(json.dumps(TARGET))
        self.rules.write_text(RULES)

    def sides(self, **changed: object) -> list[str]:
        given = {"source": self.checkpoint, "target": self.target, "rules": self.rules, **changed}
        return [word for name, value in given.items() for word in (f"--{name}", str(value))]

    def run(self, *words: object) -> Result:
        return CliRunner().invoke(main, [str(word) for word in words])

    def json(self, *words: object, code: int = 0) -> dict[str, Any]:
        """The envelope; its fields are those of every command."""
        done = self.run(*words, "--json")
        assert done.exit_code == code, done.output
        envelope: dict[str, Any] = json.loads(done.stdout)
        assert envelope["schema"] == "port-kit/1" and envelope["ok"] is (code == 0)
        assert " ".join(map(str, words)).startswith(envelope["command"])
        assert ("data" in envelope) != ("error" in envelope)
        return envelope


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


# -- success ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["folder", "index", "one file", "manifest"])
def test_every_form_of_a_local_checkpoint_is_covered(workspace: Workspace, form: str) -> None:
    source = workspace.checkpoint
    if form == "index":
        source = workspace.checkpoint / "model.safetensors.index.json"
    elif form == "one file":
        source = workspace.folder / "whole.safetensors"
        save_file(workspace.tensors, source)
    elif form == "manifest":
        source = workspace.folder / "S.json"
        assert workspace.json("manifest", workspace.checkpoint, "-o", source)["data"]["tensors"] == len(SOURCE)
    data = workspace.json("coverage", *workspace.sides(source=source))["data"]
    assert data["source"]["used"] == len(SOURCE) - 1 and data["target"]["written"] == len(TARGET)
    assert data["dropped"] == {"ema.x": "a second copy"} and data["problems"] == []
    assert {"b.{0..1}.q.weight"} in [set(line["source"]) for line in data["lines"]]


def test_coverage_and_check_for_people(workspace: Workspace) -> None:
    text = workspace.run("coverage", *workspace.sides()).stdout
    assert "b.{0..1}.q.weight [4, 4] -> layers.{0..1}.attn.qkv.weight" in text
    assert text.strip().endswith("complete: all 9 sources and 4 targets accounted for")
    assert workspace.run("rules", "check", "--rules", workspace.rules).stdout == "pair: 3 rules, all valid\n"
    assert workspace.json("rules", "check", *workspace.sides())["data"]["coverage"]["ok"]


def test_manifest_of_a_sharded_index(workspace: Workspace) -> None:
    data = workspace.json("manifest", workspace.checkpoint)["data"]
    assert data["manifest"]["b.0.o.weight"][:2] == [[4, 4, 1], "float32"]
    assert data["bytes"] == sum(tensor.nbytes for tensor in workspace.tensors.values()) and data["from"] == "headers"
    assert (
        workspace.run("manifest", workspace.checkpoint).stdout.splitlines()[-1]
        == f"9 tensors, {data['bytes']} bytes (headers)"
    )


def test_plan_prints_the_map(workspace: Workspace) -> None:
    data = workspace.json("rules", "plan", *workspace.sides())["data"]
    assert data["map"]["layers.1.attn.o.weight"] == {
        "from": ["b.1.o.weight"],
        "op": "reshape",
        "detail": {"shape": [4, 4]},
    }
    assert data["map"]["layers.0.attn.qkv.weight"]["from"] == [f"b.0.{part}.weight" for part in "qkv"]
    assert data["source"]["b.0.k.weight"] == [2, 4] and data["dropped"] == ["ema.x"]
    assert not data["converted"] and data["kept"] == {}
    text = workspace.run("rules", "plan", *workspace.sides()).stdout
    assert "layers.1.attn.o.weight <- b.1.o.weight [reshape]" in text


@pytest.mark.parametrize("name", ["b.1.k.weight", "layers.1.attn.qkv.weight", "ema.x"])
def test_explain_knows_both_sides(workspace: Workspace, name: str) -> None:
    data = workspace.json("rules", "explain", name, *workspace.sides())["data"]
    assert data["found"] and (data["tasks"] or data["notes"])
    if name == "b.1.k.weight":
        assert data["rules"][0]["groups"] == ["1", "k"] and data["rules"][0]["shard"] == r"\2"
        assert data["tasks"] == ["b.1.k.weight -> layers.1.attn.qkv.weight [into 4:6, 0:4]"]


def test_explain_of_an_unknown_name_offers_the_nearest(workspace: Workspace) -> None:
    data = workspace.json("rules", "explain", "b.1.kk.weight", *workspace.sides(), code=1)["data"]
    assert not data["found"] and "did you mean b.1.k.weight?" in data["notes"][0]


def test_suggest_writes_rules_that_plan_accepts(workspace: Workspace) -> None:
    written = workspace.folder / "proposed.toml"
    data = workspace.json(
        "rules", "suggest", "--source", workspace.checkpoint, "--target", workspace.target, "-o", written
    )["data"]
    assert sum(data["targets_explained"].values()) == len(TARGET) and data["missing"] == {}
    assert {rule["confidence"] for item in data["proposals"] for rule in item["rules"]} <= {"certain", "likely"}
    planned = workspace.json("rules", "plan", *workspace.sides(rules=written))["data"]["map"]
    assert planned == workspace.json("rules", "plan", *workspace.sides())["data"]["map"]
    text = workspace.run("rules", "suggest", "--source", workspace.checkpoint, "--target", workspace.target).stdout
    assert "target tensors explained" in text


def test_suggest_takes_the_target_of_a_port(workspace: Workspace) -> None:
    """As the rules files of a new port say."""
    source = workspace.folder / "vae.json"
    workspace.run("manifest", "--port", "ovi", "--component", "vae", "-o", source)
    words = ("rules", "suggest", "--source", source, "--port", "ovi", "--component", "vae")
    assert workspace.json(*words)["data"]["missing"] == {}


def test_invert_leads_back(workspace: Workspace) -> None:
    back = workspace.folder / "back.toml"
    data = workspace.json("rules", "invert", *workspace.sides(), "-o", back)["data"]
    assert data["output"] == str(back) and RuleSet.from_file(back).to_dict() == data["rules"]
    swapped = ["--source", workspace.target, "--target", workspace.checkpoint, "--rules", back]
    assert workspace.json("rules", "check", *swapped)["data"]["coverage"]["ok"]
    assert RuleSet.from_toml(workspace.run("rules", "invert", *workspace.sides()).stdout).name == "pair_inverse"


def test_export_there_and_back_gives_the_same_bits(workspace: Workspace) -> None:
    converted, original = workspace.folder / "converted.safetensors", workspace.folder / "original.safetensors"
    options = ["--rules", workspace.rules]
    there = ["--forward", "--target", workspace.target, "-o", converted]
    done = workspace.json("rules", "export", workspace.checkpoint, *options, *there)["data"]
    assert done["tensors"] == len(TARGET)
    back = ["--source", workspace.checkpoint, "-o", original]
    done = workspace.json("rules", "export", converted, *options, *back)["data"]
    assert done["inexact"] == {} and done["tensors"] == len(SOURCE) - 1
    returned = load_file(original)
    assert all(torch.equal(tensor, workspace.tensors[name]) for name, tensor in returned.items())


def test_a_port_provides_its_rules() -> None:
    done = CliRunner().invoke(main, ["rules", "check", "--port", "dreamid_omni", "--component", "vae", "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["data"]["rules"] > 0


# -- errors ----------------------------------------------------------------------------------------------------------

CHANGES: dict[str, tuple[str, str]] = {
    # code: (text of the rules, replacement)
    "remap_pattern": (r"b\.(\d+)\.o\.weight", r"b\.(\d+\.o\.weight"),
    "remap_template": (r"layers.\1.attn.o.weight", r"layers.\3.attn.o.weight"),
    "remap_rules": ('drop = "a second copy"', 'dropp = "a second copy"'),
    "remap_op": ('name = "reshape", shape = ["hidden", -1]', 'name = "fold"'),
    "remap_size": ('["hidden", -1]', '["width", -1]'),
    "remap_shape": ('["hidden", -1]', '["2 * hidden", -1]'),
    "remap_dead_rule": (r"ema\..+", r"emma\..+"),
    "remap_unexpected": (r"attn.o.weight", r"attn.out.weight"),
    "remap_incomplete_group": ("(q|k|v)", "(q|k)"),
    "remap_slot": ('op = { name = "concat", dim = 0, parts = ["q", "k", "v"] }', ""),
    "remap_ambiguous": (r"ema\..+", r"(ema\..+|b\.0\.o.*)"),
    "remap_beyond_layers": (r"layers.\1.attn.o.weight", r"layers.{\1 + 1}.attn.o.weight"),
    "remap_unused": (
        'op = { name = "reshape", shape = ["hidden", -1] }',
        'op = { name = "reshape", shape = [2, "hidden"] }\ntake = "[0:2]"\ninto = "[0:2]"',
    ),
    "remap_overlap": (
        'op = { name = "reshape", shape = ["hidden", -1] }',
        'op = { name = "reshape", shape = [3, "hidden"] }\ntake = "[0:3]"\ninto = "[0:3]"\n\n'
        "[[rule]]\nsource = 'b\\.(\\d+)\\.o\\.weight'\ntarget = 'layers.\\1.attn.o.weight'\n"
        'op = { name = "reshape", shape = [2, "hidden"] }\ntake = "[2:4]"\ninto = "[2:4]"',
    ),
    "remap_collision": (r"layers.\1.attn.o.weight", "layers.0.attn.o.weight"),
}


@pytest.mark.parametrize("code", CHANGES)
def test_each_error_has_its_code_message_and_hint(workspace: Workspace, code: str) -> None:
    old, new = CHANGES[code]
    assert old in RULES
    workspace.rules.write_text(RULES.replace(old, new, 1))
    found = problems(workspace.json("coverage", *workspace.sides(), code=1))
    assert code in found, found
    assert all(found.values())
    done = workspace.run("rules", "plan", *workspace.sides())
    assert done.exit_code == 1 and (done.stdout or done.stderr)
    back = workspace.json("rules", "invert", *workspace.sides(), code=1)["error"]
    assert back["code"] in (code, "remap_failed") and back["message"] and back["hint"]


def problems(envelope: dict[str, Any]) -> dict[str, str]:
    """Return codes and messages of a command's report: an error of the rule set, or the problems of its plan."""
    if "error" in envelope:
        assert envelope["error"]["hint"]
        return {envelope["error"]["code"]: envelope["error"]["message"]}
    return {entry["code"]: entry["message"] for entry in envelope["data"]["problems"]}


@pytest.mark.parametrize(
    ("name", "shape", "code"),
    [
        ("layers.2.attn.o.weight", [4, 4], "remap_missing"),
        ("layers.0.attn.o.weight", [4, 5], "remap_shape"),
        ("layers.0.attn.o.weight", None, "remap_beyond_layers"),
        ("layers.0.attn.o.weight", [[4, 4], "int64"], "remap_dtype"),
    ],
)
def test_gaps_of_the_target(workspace: Workspace, name: str, shape: list[Any] | None, code: str) -> None:
    changed = {key: value for key, value in {**TARGET, name: shape}.items() if value is not None}
    workspace.target.write_text(json.dumps(changed))
    assert code in problems(workspace.json("coverage", *workspace.sides(), code=1))


def test_invalid_files(workspace: Workspace) -> None:
    broken = workspace.folder / "broken.safetensors"
    broken.write_bytes(b"\xff" * 64)
    for source in (broken, workspace.folder / "nothing", workspace.folder / "empty.json"):
        if source.suffix == ".json":
            source.write_text("[]")
        error = workspace.json("coverage", *workspace.sides(source=source), code=1)["error"]
        assert error["code"] == "manifest_invalid" and error["hint"]
    index = workspace.checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"b.0.q.weight": "absent.safetensors"}}))
    assert workspace.json("manifest", workspace.checkpoint, code=1)["error"]["code"] == "manifest_invalid"
    done = workspace.run("manifest", workspace.checkpoint)
    assert done.exit_code == 1 and not done.stdout and "error [manifest_invalid]" in done.stderr
    assert "hint:" in done.stderr


@pytest.mark.parametrize("size", ["hidden", "hidden=x", "=3"])
def test_sizes_are_names_and_numbers(workspace: Workspace, size: str) -> None:
    error = workspace.json("coverage", *workspace.sides(), "--size", size, code=1)["error"]
    assert error["code"] == "remap_size" and "--size" in error["hint"]


def test_an_unwritable_way_back_is_said(workspace: Workspace) -> None:
    source = workspace.folder / "S.json"
    source.write_text(json.dumps({"c.weight_g": [4, 1], "c.weight_v": [4, 4]}))
    workspace.target.write_text(json.dumps({"c.weight": [4, 4]}))
    workspace.rules.write_text(
        "name = 'fold'\n[[rule]]\nsource = 'c\\.weight_(g|v)'\ntarget = 'c.weight'\nshard = '\\1'\nop = 'weight_norm'\n"
    )
    assert workspace.json("coverage", *workspace.sides(source=source))["data"]["ok"]
    error = workspace.json("rules", "invert", *workspace.sides(source=source), code=1)["error"]
    assert error["code"] == "remap_op" and "export" in error["hint"]


def test_import_and_export_of_another_librarys_mapping(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    (workspace.folder / "foreign_mapping.py").write_text(
        r"NAMES = {r'^b\.(\d+)\.': r'layers.\1.attn.', r'^ema\.': 'e.'}"
    )
    monkeypatch.syspath_prepend(str(workspace.folder))
    out = workspace.folder / "imported.toml"
    data = workspace.json("rules", "import", "foreign_mapping:NAMES", "-o", out, "--name", "mine")["data"]
    assert data["output"] == str(out) and RuleSet.from_file(out).to_dict() == data["rules"]
    text = workspace.json("rules", "export", "--as", "vllm", "--rules", out)["data"]["python"]
    assert "WeightsMapper(" in text and "re.compile(" in text
    data = workspace.json("rules", "import", "foreign_mapping:NAMES", "--source", workspace.checkpoint)["data"]
    targets = {rule.get("target") for rule in data["rules"]["rule"]}
    assert r"layers.\1.attn.o.weight" in targets and "e.x" in targets
    error = workspace.json("rules", "import", "foreign_mapping:OTHER", code=1)["error"]
    assert error["code"] == "remap_rules"


def test_export_for_a_library_names_omitted_rules(workspace: Workspace) -> None:
    words = ("rules", "export", "--as", "transformers", "--rules", workspace.rules)
    error = workspace.json(*words, code=1)["error"]
    assert error["code"] == "remap_interop" and len(error["details"]["refused"]) == 3
    file = workspace.folder / "mapping.py"
    done = workspace.run(*words, "--partial", "-o", file)
    assert done.exit_code == 0 and done.stderr.count("left out: ") == 3
    assert file.read_text().count("# left out: ") == 3


@pytest.mark.parametrize(
    "words",
    [
        ("rules", "check"),
        ("rules", "plan", "--rules", "x.toml"),
        ("rules", "check", "--port", "dreamid_omni"),
        ("rules", "suggest", "--source", "S.json"),
        ("rules", "suggest", "--source", "S.json", "--target", "S.json", "-o", "x.json"),
        ("rules", "export", "."),
        ("rules", "export", "--rules", "x.toml", "-o", "y"),
        ("rules", "export", ".", "--as", "vllm", "--rules", "x.toml"),
        ("rules", "export", "--as", "vllm", "--forward", "--rules", "x.toml"),
        ("rules", "export", "--as", "sglang", "--rules", "x.toml"),
        ("rules", "export", ".", "-o", "y", "--partial", "--rules", "x.toml", "--source", "S.json"),
        ("rules", "import"),
        ("rules", "nothing"),
        ("coverage", "--source", "S.json"),
        ("coverage", "--source", "S.json", "--target", "T.json", "--port", "dreamid_omni"),
        ("manifest",),
    ],
)
def test_usage_errors_are_2(workspace: Workspace, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace.folder)
    (workspace.folder / "S.json").write_text("{}")
    (workspace.folder / "x.toml").write_text(RULES)
    done = workspace.run(*words)
    assert done.exit_code == 2 and "Usage:" in done.stderr and not done.stdout


def test_rules_of_a_module_in_a_port_folder(tmp_path: Path) -> None:
    """``module:ATTRIBUTE`` is found in the folders of ``PORT_KIT_PATH``, also of ``rules import``."""
    (tmp_path / "ports" / "lagoon").mkdir(parents=True)
    (tmp_path / "ports" / "lagoon" / "__init__.py").write_text("")
    (tmp_path / "ports" / "lagoon" / "weights.py").write_text(
        "from port_kit.remap import Rule, RuleSet\nRULES = RuleSet('lagoon', (Rule('a', 'b'),))\n"
    )
    command = [sys.executable, "-m", "port_kit", "rules", "check", "--rules", "lagoon.weights:RULES", "--json"]
    environment = {**os.environ, "PORT_KIT_PATH": str(tmp_path / "ports")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and json.loads(done.stdout)["data"]["name"] == "lagoon", done.stdout
