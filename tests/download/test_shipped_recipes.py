"""The shipped recipes, as they are, against a Hub that holds small files under the published names.

Unconfirmed revisions and commits of a recipe must be marked in the plan, fixed by the
first run and kept by every later one.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from port_kit.cli.download import load_recipe
from port_kit.download import FileRule, Recipe
from port_kit.registry import list_ports
from port_kit.testing.gitserver import GitRemote
from port_kit.testing.hub import Hub
from tests.download.helpers import SHORT, bring, hashes, noise

SHIPPED = ("dreamid_omni", "mova", "ovi")
STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


def content(rule: FileRule, path: Path) -> dict[str, bytes]:
    """Return small files that match a rule: a checkpoint under the rule's wrapper, or other files."""
    if rule.convert:
        state: object = STATE
        for key in reversed(rule.wrapper.split(".") if rule.wrapper else []):
            state = {key: state}
        torch.save(state, path)
        return {rule.pattern: path.read_bytes()}
    if rule.is_glob and rule.folder != "tokenizer":  # a folder with its configuration
        files = {"config.json": b'{"layers": 2}', "diffusion_pytorch_model.safetensors": save(STATE)}
        return {rule.pattern.replace("*", name): data for name, data in files.items()}
    if rule.is_glob:
        return {rule.pattern.replace("*", name): noise(500, len(name)) for name in ("spiece.model", "tokenizer.json")}
    return {rule.pattern: save(STATE)}


def files_of(recipe: Recipe, folder: Path) -> dict[str, dict[str, bytes]]:
    """Return the repositories of a recipe, each with one additional file."""
    repositories: dict[str, dict[str, bytes]] = {}
    for repository in recipe.repositories:
        files = repositories.setdefault(repository.repo_id, {"assets/demo.mp4": b"not wanted"})
        for rule in repository.files:
            files |= content(rule, folder / "checkpoint.pth")
    return repositories


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_resolves_unpinned_revisions(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    loose = [repository.repo_id for repository in recipe.repositories if repository.revision is None]
    with Hub(files_of(recipe, tmp_path)) as hub:
        used = {repository.repo_id: hub.commit(repository.repo_id) for repository in recipe.repositories}
        plan = bring(recipe, tmp_path / "m", hub, dry_run=True).plan
        assert plan is not None and plan.to_json()["unconfirmed"] == loose
        for repo_id in loose:
            assert f"{repo_id} at {used[repo_id]}  (not pinned by the recipe: fixed in port.lock)" in plan.describe()
        for repository in recipe.repositories:
            assert f"licence: {repository.licence}" in plan.describe()
            assert plan.to_json()["licences"][repository.repo_id] == repository.licence
        bring(recipe, tmp_path / "m", hub)
        lock = json.loads((tmp_path / "m/port.lock").read_text())
        assert (lock["revisions"], lock["unconfirmed"]) == (used, loose)
        before = hashes(tmp_path / "m")
        for repo_id in loose:
            hub.push(repo_id, {"assets/demo.mp4": b"everything else was moved away"})
        (tmp_path / "m/tokenizer/tokenizer.json").unlink()
        bring(recipe, tmp_path / "m", hub)
        assert hashes(tmp_path / "m") == before


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_gives_the_directory_that_its_port_reads(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    with Hub(files_of(recipe, tmp_path)) as hub:
        bring(recipe, tmp_path / "m", hub, policy=dataclasses.replace(SHORT, segment_size=None))
    index = json.loads((tmp_path / "m/model_index.json").read_text())
    assert index == recipe.model_index and {"_class_name", "_diffusers_version"} <= set(index)
    for component in list_ports()[name].components:
        assert json.loads((tmp_path / "m" / component.name / "config.json").read_text())
        (weights,) = (tmp_path / "m" / component.name).glob("*.safetensors")
        loaded = load_file(weights)
        assert set(loaded) == set(STATE) and all(torch.equal(loaded[key], STATE[key]) for key in STATE)
    assert not list((tmp_path / "m").rglob("demo.mp4")) and not list((tmp_path / "m").rglob("*.pt*"))


@pytest.mark.parametrize("name", SHIPPED)
def test_the_commit_of_a_shipped_recipes_code_is_fixed_too(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    (code,) = recipe.code
    remote = GitRemote(tmp_path / "remote", {f"{code.packages[0]}/__init__.py": ""})
    local = dataclasses.replace(recipe, code=(dataclasses.replace(code, url=remote.url),))
    with Hub(files_of(recipe, tmp_path)) as hub:
        plan = bring(local, tmp_path / "m", hub, dry_run=True, with_reference=True).plan
    assert plan is not None
    assert plan.lock.code == {
        code.name: {"url": remote.url, "commit": code.commit or remote.git("rev-parse", "HEAD").strip()}
    }
    assert f"code {code.name}: {remote.url} at " in plan.describe()
