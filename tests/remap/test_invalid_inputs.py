"""Invalid files are errors by code; unusual valid files work."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from port_kit.cli import main
from port_kit.cli.inputs import read_rules
from port_kit.errors import RemapError
from port_kit.manifest import Manifest
from port_kit.remap import Op, Rule, RuleSet
from port_kit.remap.plan import check
from tests.helpers import raises


def run(*arguments: object) -> Result:
    done = CliRunner().invoke(main, [*map(str, arguments), "--json"])
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    return done


def header(table: object, data: bytes = b"") -> bytes:
    raw = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **changes}


MANIFESTS = {
    "deep": "[" * 100_000,
    "digits": '{"a": [[' + "9" * 5000 + '], "float32"]}',
    "dtype list": '{"a": [[1], ["float32"]]}',
    "dtype object": '{"a": [[1], {}]}',
    "extent float": '{"a": [[1.0], "float32"]}',
    "extent true": '{"a": [[true], "float32"]}',
    "extent NaN": '{"a": [[NaN], "float32"]}',
    "negative": '{"a": [[-1], "float32"]}',
    "null": '{"a": null}',
    "slots": '{"a": [[1], "float32", {"slots": [1]}]}',
    "surrogate": '{"\\ud800": [[1], "float32"]}',
    "marker": '{"a.#.b": [[1], "float32"]}',
    "list": "[1]",
    "text": '"x"',
    "empty": "",
}
HEADERS = {
    "no offsets": header({"a": {"dtype": "F32", "shape": [1]}}),
    "offsets of text": header({"a": entry(data_offsets=["0", "4"])}, b"1234"),
    "offsets before the start": header({"a": entry(data_offsets=[-4, 0])}),
    "more elements than bytes": header({"a": entry(shape=[100])}, b"1234"),
    "null": header({"a": None}),
    "list": header({"a": [1]}),
    "dtype list": header({"a": entry(dtype=["F32"])}, b"1234"),
    "unknown dtype": header({"a": entry(dtype="F4")}, b"1234"),
    "extent text": header({"a": entry(shape=["1"])}, b"1234"),
    "extent float": header({"a": entry(shape=[1.5])}, b"1234"),
    "extent float beside": header({"a": entry(), "b": entry(shape=[1.0], data_offsets=[4, 8])}, b"1234" * 2),
    "extent true beside": header({"a": entry(), "b": entry(shape=[True], data_offsets=[4, 8])}, b"1234" * 2),
    "two in one place": header({"a": entry(), "b": entry()}, b"1234"),
    "a hole": header({"a": entry(), "b": entry(data_offsets=[8, 12])}, b"1234" * 3),
    "header list": header([1]),
    "header deep": header(b"[" * 100_000),
    "no header": b"123",
    "empty": b"",
    "cut": header({"a": entry()}, b"12"),
}
INDEXES: dict[str, object] = {
    "none": {},
    "null": {"weight_map": None},
    "number": {"weight_map": {"a": 5}},
    "list": {"weight_map": {"a": ["x"]}},
    "above": {"weight_map": {"a": "../model.safetensors"}},
    "absolute": {"weight_map": {"a": "/etc/passwd"}},
    "absent": {"weight_map": {"a": "none.safetensors"}},
    "a list": [1],
}


@pytest.mark.parametrize("what", MANIFESTS)
def test_manifests_that_are_none(tmp_path: Path, what: str) -> None:
    (tmp_path / "m.json").write_text(MANIFESTS[what])
    done = run("manifest", tmp_path / "m.json")
    assert done.exit_code == 1 and json.loads(done.stdout)["error"]["code"] == "manifest_invalid"


@pytest.mark.parametrize("what", HEADERS)
def test_headers_that_are_none(tmp_path: Path, what: str) -> None:
    (tmp_path / "m.safetensors").write_bytes(HEADERS[what])
    done = run("manifest", tmp_path / "m.safetensors")
    assert done.exit_code == 1 and json.loads(done.stdout)["error"]["code"] == "manifest_invalid"


@pytest.mark.parametrize("what", INDEXES)
def test_indexes_that_are_none(tmp_path: Path, what: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(INDEXES[what]))
    (tmp_path / "model.safetensors").write_bytes(header({"a": entry()}, b"1234"))
    done = run("manifest", tmp_path)
    assert done.exit_code == 1 and json.loads(done.stdout)["error"]["code"] == "manifest_invalid"


@pytest.mark.parametrize("name", ["a--b/c..d", "owner/name", "owner/name@main:folder/x.pth"])
def test_repositories_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    done = run("manifest", name)
    assert done.exit_code == 1 and json.loads(done.stdout)["error"]["code"] == "manifest_invalid"


RULES = [
    "source = 5\ntarget = 'b'",
    "source = ['a']\ntarget = 'b'",
    "source = 'a'\ntarget = []",
    "source = 'a'\ntarget = [[1]]",
    "source = 'a'\ntarget = 'b'\nshard = []",
    "source = 'a'\ntarget = 'b'\nshard = { x = 1 }",
    "source = 'a'\ntarget = 'b'\noptional = 'yes'",
    "source = 'a'\ntarget = 'b'\nvariant = 5",
    "source = 'a'\ntarget = 'b'\ntake = 5",
    "source = 'a'\ndrop = 5",
    "source = 'a'\ntarget = 'b'\nop = 5",
    "source = 'a'\ntarget = 'b'\nop = { name = 5 }",
    *(
        f"source = 'a'\ntarget = {target}\nop = {{ name = '{op}', {arguments} }}"
        for op, target, arguments in [
            ("split", "['b', 'c']", "dim = 'x'"),
            ("split", "['b', 'c']", "dim = 0, sizes = 5"),
            ("split", "['b', 'c']", "dim = 0, sizes = [1.5, 2]"),
            ("split", "['b', 'c']", "dim = 0, sizes = [{ x = 1 }, 2]"),
            ("reshape", "'b'", "shape = 5"),
            ("reshape", "'b'", "shape = [[1]]"),
            ("transpose", "'b'", "perm = 5"),
            ("transpose", "'b'", "perm = ['x']"),
            ("rearrange", "'b'", "pattern = 5"),
            ("rearrange", "'b'", "pattern = 'a -> a', sizes = 5"),
            ("rearrange", "'b'", "pattern = 'a -> a', sizes = [['a']]"),
            ("reorder", "'b'", "dim = 0, runs = 5"),
            ("reorder", "'b'", "dim = 0, runs = [[0]]"),
            ("reorder", "'b'", "dim = 0, parts = [1]"),
            ("reorder", "'b'", "dim = 0, order = 5"),
            ("cast", "'b'", "dtype = ['x']"),
        ]
    ),
    "source = 'a'\ntarget = 'b'\nshard = 'q'\nop = { name = 'concat', dim = 0, parts = 5 }",
    "source = 'a'\ntarget = 'b'\nshard = 'q'\nop = { name = 'concat', dim = 0, parts = [] }",
    "source = 'a'\ntarget = 'b'\nshard = 'q'\nop = { name = 'concat', dim = 0, parts = ['q', 'q'] }",
    "source = 'a'\ntarget = 'b'\nshard = 'q'\nop = { name = 'concat', dim = 0, parts = ['q', 'k'], sizes = 5 }",
]


@pytest.mark.parametrize("body", RULES)
def test_rules_that_are_none(body: str) -> None:
    with pytest.raises(RemapError) as caught:
        RuleSet.from_toml(f"[[rule]]\n{body}\n")
    assert caught.value.code in ("remap_rules", "remap_op")


@pytest.mark.parametrize(
    "text",
    [
        "name = 5",
        "allow_downcast = 'x'",
        "include = 5",
        "[[include]]\nrules = 'a.toml'\nsource = 5",
        "extends = 'nowhere_at_all:RULES'",
        "extends = 'os:path'",
        "extends = 'os:nothing'",
        "extends = 5",
    ],
)
def test_rule_files_that_are_none(text: str) -> None:
    with pytest.raises(RemapError) as caught:
        RuleSet.from_toml(text)
    assert caught.value.code == "remap_rules"


@pytest.mark.parametrize("text", ["nowhere_at_all:X", "a:b:c", "os:path", ".x:y", ""])
def test_references_that_are_none(text: str) -> None:
    with pytest.raises(RemapError) as caught:
        read_rules(text)
    assert caught.value.code == "remap_rules"


def test_a_deep_rule_file_is_none(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text("[" * 100_000)
    with raises("remap_rules", "r.json"):
        read_rules(str(tmp_path / "r.json"))


@pytest.mark.parametrize("output", ["folder.toml", "file/x.toml"])
def test_an_output_that_cannot_be_written(tmp_path: Path, output: str) -> None:
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "s.json").write_text('{"a": [[1], "float32"]}')
    done = run(
        "rules", "suggest", "--source", tmp_path / "s.json", "--target", tmp_path / "s.json", "-o", tmp_path / output
    )
    assert done.exit_code == 1 and json.loads(done.stdout)["error"]["code"] == "output_dir"


def test_names_sizes_of_rearrange_may_be_a_table() -> None:
    rules = RuleSet.from_toml(
        "[[rule]]\nsource='a'\ntarget='b'\nop={name='rearrange', pattern='(h two) -> (two h)', sizes={two=2}}"
    )
    assert rules.rules[0].op == (Op.of("rearrange", pattern="(h two) -> (two h)", sizes=[["two", 2]]),)
    assert RuleSet.from_toml(rules.to_toml()) == rules


#: Names with special characters of templates, for which no rule is proposed, and one with a newline.
SIGNS = {"a\nb": [4], "q'\"\\": [2], "{a}": [12], "\\1": [13], "b.3.{x}.w": [3], "b.4.{x}.w": [3]}
ODD = {
    "блоки.0.вес": [2, 3],
    "模型.1.权重": [3],
    "é.\u0661.x": [1],
    ".": [],
    "a..b": [0, 5],
    "x.\u00b2.w": [6],
    "c.\u0001.\u007f\t'x": [7],
    "%s.%d": [11],
    "01.w": [15],
    "b.007.w": [16],
    "99999999999999999999999.w": [17],
}


def test_odd_names_are_names(tmp_path: Path) -> None:
    file, rules, back = tmp_path / "s.json", tmp_path / "r.toml", tmp_path / "b.toml"
    file.write_text(json.dumps({name: [shape, "float32"] for name, shape in ODD.items()}))
    sides = ("--source", file, "--target", file)
    assert run("rules", "suggest", *sides, "-o", rules).exit_code == 0
    assert run("coverage", *sides, "--rules", rules).exit_code == 0
    assert run("rules", "invert", *sides, "--rules", rules, "-o", back).exit_code == 0
    assert run("coverage", *sides, "--rules", back).exit_code == 0
    plan = json.loads(run("rules", "plan", *sides, "--rules", rules).stdout)["data"]
    assert set(plan["map"]) == set(ODD) and all(item["from"] == [name] for name, item in plan["map"].items())
    for name in ODD:
        assert run("rules", "explain", name, "--rules", rules, "--source", file).exit_code == 0


def test_names_with_signs_of_templates(tmp_path: Path) -> None:
    file, rules, back = tmp_path / "s.json", tmp_path / "r.toml", tmp_path / "b.toml"
    file.write_text(json.dumps({name: [shape, "float32"] for name, shape in SIGNS.items()}))
    sides = ("--source", file, "--target", file)
    rules.write_text("[[rule]]\nsource = '([^.]*)'\ntarget = '\\1'\n[[rule]]\nsource = 'b\\.(\\d+)\\.\\{x\\}\\.w'\n")
    rules.write_text(rules.read_text() + "target = 'b.\\1.\\{x\\}.w'\n")
    assert run("coverage", *sides, "--rules", rules).exit_code == 0
    assert run("rules", "invert", *sides, "--rules", rules, "-o", back).exit_code == 0
    assert run("coverage", *sides, "--rules", back).exit_code == 0
    done = run("rules", "suggest", *sides)
    assert done.exit_code == 0 and set(json.loads(done.stdout)["data"]["missing"]) == set(SIGNS) - {"a\nb"}


def test_ten_thousands_of_gaps_take_seconds() -> None:
    """All names are wrong: 25,000 sources without a rule, 25,000 targets without a source."""
    names = [f"blocks.{layer}.{part}.{at}.weight" for layer in range(250) for part in "abcde" for at in range(20)]
    source = Manifest({f"model.{name}": ((4, 4), "float32") for name in names})
    target = Manifest({name: ((4, 4), "float32") for name in names})
    start = time.process_time()
    plan = check(RuleSet("none", (Rule(r"other\.(.*)", r"\1", optional=True),)), source, target)
    problems = plan.explained()
    assert time.process_time() - start < 20
    assert len(problems) == 2 * len(names)
