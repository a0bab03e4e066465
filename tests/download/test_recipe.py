"""Recipes: the same schema in Python and in TOML, and errors that name the field."""

from __future__ import annotations

from pathlib import Path

import pytest

from port_kit.download import FileRule, GitCode, Recipe, Repository
from port_kit.errors import DownloadError
from tests.helpers import raises

INDEX = {"_class_name": "T", "_diffusers_version": "1"}
SHA = "0123456789abcdef0123456789abcdef01234567"

TOML = f"""
name = "my_model"
model_index = {{ _class_name = "T", _diffusers_version = "1" }}
configs.transformer = {{ num_layers = 30 }}

[[repositories]]
repo_id = "org/model"
revision = "{SHA}"
licence = "Apache-2.0"
files = [
    {{ pattern = "model.safetensors", folder = "transformer" }},
    {{ pattern = "vae.pth", folder = "vae", name = "model.safetensors", convert = true, wrapper = "generator" }},
]

[[code]]
name = "my_reference"
url = "https://github.com/org/model"
commit = "{SHA}"
packages = ["my_model"]
"""


def test_toml_and_python_give_the_same_recipe(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(TOML)
    rules = (
        FileRule("model.safetensors", "transformer"),
        FileRule("vae.pth", "vae", "model.safetensors", convert=True, wrapper="generator"),
    )
    expected = Recipe(
        "my_model",
        (Repository("org/model", rules, SHA, licence="Apache-2.0"),),
        INDEX,
        {"transformer": {"num_layers": 30}},
        (GitCode("my_reference", "https://github.com/org/model", ("my_model",), SHA),),
    )
    found = Recipe.from_toml(tmp_path / "r.toml")
    assert found == expected and found.fingerprint() == expected.fingerprint()


@pytest.mark.parametrize(
    ("rule", "path", "target"),
    [
        (FileRule("a/b.safetensors", "c"), "a/b.safetensors", "c/b.safetensors"),
        (FileRule("a/b.pth", "c", convert=True), "a/b.pth", "c/b.safetensors"),
        (FileRule("a/b.pth", "c", "m.safetensors", convert=True), "a/b.pth", "c/m.safetensors"),
        (FileRule("google/umt5/*", "tokenizer"), "google/umt5/x/y.json", "tokenizer/x/y.json"),
        (FileRule("*.json"), "deep/x.json", "deep/x.json"),
    ],
)
def test_targets(rule: FileRule, path: str, target: str) -> None:
    assert rule.target(path) == target


@pytest.mark.parametrize(
    "change",
    [
        {"name": "a b"},
        {"repositories": []},
        {"model_index": {"_class_name": "T"}},
        {"surprise": 1},
        {"repositories": [{"repo_id": "org/model"}]},
        {"repositories": [{"repo_id": "no-slash", "files": [{"pattern": "x"}]}]},
        {"repositories": [{"repo_id": "o/m", "files": [{"pattern": "x"}], "revision": "abc123"}]},
        {"repositories": [{"repo_id": "o/m", "files": [{"pattern": "x", "wrapper": "generator"}]}]},
        {"repositories": [{"repo_id": "o/m", "files": [{"pattern": "x", "sha256": "beef"}]}]},
        {"repositories": [{"repo_id": "o/m", "files": [{"pattern": "x"}]}] * 2},
        {"code": [{"name": "c", "url": "https://x/y", "packages": ["not a name"]}]},
        {"code": [{"name": "c", "url": "https://x/y", "packages": ["m"], "commit": "9a9f456"}]},
    ],
)
def test_what_cannot_be_right_is_refused(change: dict[str, object]) -> None:
    plain = {"name": "r", "repositories": [{"repo_id": "o/m", "files": [{"pattern": "x"}]}], "model_index": INDEX}
    assert Recipe.from_dict(plain).name == "r"
    with pytest.raises(DownloadError) as caught:
        Recipe.from_dict({**plain, **change})
    assert caught.value.code == "recipe_invalid"


PLAIN = """
name = "r"
model_index = { _class_name = "T", _diffusers_version = "1" }
[[repositories]]
repo_id = "o/m"
files = [ { pattern = "x" } ]
"""
CODE = '[[code]]\nname = "c"\nurl = "https://x/y"\npackages = ["m"]\n'


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('name = "r"', "name = 5"),
        ('[ { pattern = "x" } ]', "5"),
        ('[ { pattern = "x" } ]', '["x"]'),
        ('[ { pattern = "x" } ]', '{ pattern = "x" }'),
        ('"x"', "5"),
        ('"x"', '"x", convert = "no"'),
        ('"x"', '"x", folder = 7'),
        ('{ _class_name = "T", _diffusers_version = "1" }', '"_class_name _diffusers_version"'),
        ('{ _class_name = "T", _diffusers_version = "1" }', '["_class_name", "_diffusers_version"]'),
        ('"1" }', '"1", when = 2020-01-01 }'),
        ('"1" }', '"1", when = nan }'),
        ('"T"', "5"),
        ("[[repositories]]", 'configs = "x"\n[[repositories]]'),
        ("[[repositories]]", "configs.transformer = 5\n[[repositories]]"),
        ("[[repositories]]", "configs.transformer = { a = 10:00:00 }\n[[repositories]]"),
        ("files =", "revision = 5\nfiles ="),
        ("files =", 'branch = ""\nfiles ='),
        ("files =", 'gated = "no"\nfiles ='),
        ("o/m", "../.."),
        ("[[repositories]]", "code = 5\n[[repositories]]"),
        ("[[repositories]]", "[repositories]"),
    ],
)
def test_values_of_another_kind_are_named_with_their_file(tmp_path: Path, old: str, new: str) -> None:
    assert old in PLAIN
    (tmp_path / "r.toml").write_text(PLAIN.replace(old, new))
    with raises("recipe_invalid", "r.toml") as caught:
        Recipe.from_toml(tmp_path / "r.toml")
    assert caught.value.hint


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('["m"]', '"mm"'),
        ('["m"]', "[5]"),
        ('["m"]', '["import"]'),
        ('"https://x/y"', "5"),
        ('["m"]', '["m"]\npath = "../../.."'),
        ('["m"]', '["m"]\npath = "/etc"'),
        ("[[code]]", CODE + "[[code]]"),
    ],
)
def test_code_that_cannot_be_right_is_refused(tmp_path: Path, old: str, new: str) -> None:
    (tmp_path / "r.toml").write_text(PLAIN + CODE)
    assert Recipe.from_toml(tmp_path / "r.toml").code[0].name == "c"
    (tmp_path / "r.toml").write_text(PLAIN + CODE.replace(old, new))
    with pytest.raises(DownloadError) as caught:
        Recipe.from_toml(tmp_path / "r.toml")
    assert caught.value.code == "recipe_invalid"


def test_editors_of_all_systems_write_recipes(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_bytes(("\ufeff" + PLAIN.replace("\n", "\r\n")).encode())
    assert Recipe.from_toml(tmp_path / "r.toml").name == "r"
    for content in (b"\xff\xfe", b"a = " + b"[" * 100_000):
        (tmp_path / "r.toml").write_bytes(content)
        with raises("recipe_invalid", "r.toml"):
            Recipe.from_toml(tmp_path / "r.toml")


def test_a_file_that_is_no_toml_is_named(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("= 1")
    with raises("recipe_invalid", "r.toml"):
        Recipe.from_toml(tmp_path / "r.toml")
    with raises("recipe_invalid", "none.toml"):
        Recipe.from_toml(tmp_path / "none.toml")


def test_with_replaces_content_and_revisions() -> None:
    rule = FileRule("x", sha256="0" * 64)
    recipe = Recipe("r", (Repository("o/m", (rule,), SHA),), INDEX, {"a": {"n": 1}})
    other = recipe.with_(configs={"a": {"n": 2}}, model_index={"more": 1}, revisions={"o/m": None})
    assert other.configs == {"a": {"n": 2}} and other.model_index == {**INDEX, "more": 1}
    assert other.repositories[0].revision is None and other.repositories[0].files[0].sha256 == ""
    assert other.fingerprint() != recipe.fingerprint()
    with pytest.raises(DownloadError):
        recipe.with_(revisions={"other/name": None})
