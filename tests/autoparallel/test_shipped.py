"""Shipped plans: their fingerprints, staleness, and the choice of a plan."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from port_kit.autoparallel.host.index import PipelineIndex
from port_kit.autoparallel.host.plans import find_plan
from port_kit.autoparallel.infer import infer_plan
from port_kit.autoparallel.plan import Plan, Proof
from port_kit.autoparallel.shipped import SHIPPED, check_fresh, fingerprint
from port_kit.autoparallel.subject import load_subject
from port_kit.errors import ParallelError
from port_kit.parallel.layout import Layout

CLASS = "diffusers.models.transformers.transformer_wan.WanTransformer3DModel"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package with a model that imports a helper, and a module that it does not import."""
    folder = tmp_path / "stale_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "model.py").write_text("from .helper import f\nimport torch\n\nclass Model: pass\n")
    (folder / "helper.py").write_text("def f(): return 1\n")
    (folder / "other.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "stale_package"]:
        del sys.modules[name]


def _fingerprint() -> str:
    importlib.invalidate_caches()
    return fingerprint("stale_package.model.Model")


@pytest.mark.parametrize(("file", "changes"), [("model.py", True), ("helper.py", True), ("other.py", False)])
def test_a_fingerprint_covers_what_the_module_imports(package: Path, file: str, changes: bool) -> None:
    before = _fingerprint()
    (package / file).write_text((package / file).read_text() + "\ny = 2\n")
    assert (_fingerprint() != before) is changes


def test_a_fingerprint_imports_no_module_of_the_package(package: Path) -> None:
    _fingerprint()
    assert not {"stale_package.model", "stale_package.helper"} & sys.modules.keys()


def test_a_stale_plan_is_refused() -> None:
    plan = Plan(subject="WanTransformer3DModel", module_class=CLASS, fingerprint="0" * 16)
    with pytest.raises(ParallelError) as caught:
        check_fresh(plan, "plan.toml")
    assert caught.value.code == "plan_stale"
    check_fresh(plan.model_copy(update={"fingerprint": fingerprint(CLASS)}), "plan.toml")


def test_a_module_without_a_source_is_refused() -> None:
    with pytest.raises(ParallelError) as caught:
        fingerprint("no_such_package.Model")
    assert caught.value.code == "plan_subject"


def test_shipped_plans_are_fresh_and_proven() -> None:
    for path in SHIPPED.glob("*.toml"):
        plan = Plan.load(path)
        check_fresh(plan, path.name)
        assert plan.fingerprint and plan.proofs and plan.module_class.rpartition(".")[2] == path.stem


@pytest.mark.slow
@pytest.mark.parametrize("name", [path.stem for path in SHIPPED.glob("*.toml")])
def test_inference_gives_the_shipped_plan(name: str) -> None:
    shipped = Plan.load(SHIPPED / f"{name}.toml")
    recorded = {"versions": shipped.versions, "fingerprint": shipped.fingerprint, "proofs": shipped.proofs}
    assert infer_plan(load_subject(name)).model_copy(update=recorded) == shipped


def test_a_given_plan_is_checked(tmp_path: Path) -> None:
    index = PipelineIndex(tmp_path, object, {"transformer": "WanTransformer3DModel"})
    proof = Proof(layout="tp2", scale="deeper", dtype="float32", difference=0.0)
    path = tmp_path / "plan.toml"
    path.write_text(Plan(subject="WanTransformer3DModel", module_class=CLASS, proofs=(proof,)).to_toml())
    assert find_plan(index, Layout(tp=4, cfg=2), path, report=print) == path
    with pytest.raises(ParallelError) as caught:
        find_plan(index, Layout(ring=2), path, report=print)
    assert caught.value.code == "plan_layout"
