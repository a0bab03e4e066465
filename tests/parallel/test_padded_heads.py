"""Heads that ranks cannot share evenly: seven heads on two ranks, which Ulysses pads in a mode of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from port_kit.parallel.engine_checks import layout_of
from port_kit.parallel.layout import Layout
from port_kit.parallel.layout_selection import read_model_shape
from port_kit.parallel.verify import ParallelTestCase, port_test_case, verify_parallel
from port_kit.registry import find_port, list_ports
from port_kit.runtime.plugin import register_pipelines
from port_kit.scaffold import NewPort, new_port
from tests.helpers import raises


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ParallelTestCase]:
    """A port whose tiny transformer has seven heads of eight channels."""
    folder = tmp_path_factory.mktemp("seven")
    new_port(NewPort("seven_heads", "custom", folder / "port"))
    config = folder / "port" / "seven_heads" / "config.py"
    text = config.read_text(encoding="utf-8")
    for before, after in (("512: 32", "512: 56"), ('"dim": 32, "heads": 4', '"dim": 56, "heads": 7')):
        assert text.count(before) == 1
        text = text.replace(before, after)
    config.write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PORT_KIT_PATH", str(folder / "port"))
        list_ports.cache_clear()
        register_pipelines()  # earlier tests of this process may have loaded the plugins without this port
        yield port_test_case(find_port("seven_heads"), folder)
    list_ports.cache_clear()


@pytest.mark.parametrize("layout", ["ulysses2-uaa", "ulysses2-uaaxring2"])
def test_ranks_with_padded_heads_equal_one(layout: str, seven: ParallelTestCase) -> None:
    (report,) = verify_parallel(seven, [layout])
    assert report.ok, report.describe()
    assert report.layout == layout
    assert max(report.tokens[1:]) < report.tokens[0]


def test_without_padding_the_layout_is_refused_before_it_runs(seven: ParallelTestCase) -> None:
    with raises("parallel_degree", "7 heads", "ulysses2-uaa"):
        next(verify_parallel(seven, ["ulysses2"]))


def test_a_failed_rank_shows_its_traceback(seven: ParallelTestCase) -> None:
    def fail(world: int) -> None:
        if world > 1:
            raise RuntimeError("planted")

    case = ParallelTestCase(seven.model, seven.requests, setup=fail, shape=seven.shape)
    (report,) = verify_parallel(case, ["cfg2"])
    assert not report.ok
    (finding,) = report.findings
    assert (finding.fault, "planted" in finding.traceback) == ("failed", True)
    assert 'raise RuntimeError("planted")' in report.describe()
    assert "planted" in report.to_json()["findings"][0]["traceback"]


def test_the_mode_is_part_of_the_engine_configuration() -> None:
    from vllm_omni.diffusion.data import DiffusionParallelConfig

    layout = Layout.parse("tp2xulysses2-uaa")
    assert (str(layout), layout.world) == ("tp2xulysses2-uaa", 4)
    config = DiffusionParallelConfig(**layout.parallel_config)
    assert config.ulysses_mode == "advanced_uaa"
    assert layout_of(config) == layout


@pytest.mark.parametrize("text", ["ring2-uaa", "ulysses1-uaa", "ulysses2-uua"])
def test_other_kinds_have_no_such_mode(text: str) -> None:
    with raises("parallel_degree"):
        Layout.parse(text)


@pytest.mark.usefixtures("seven")
def test_unknown_facts_are_a_warning(tmp_path: Path) -> None:
    port = find_port("seven_heads")
    with pytest.warns(UserWarning, match="config.json does not exist"):
        assert port_test_case(port, tmp_path, tmp_path).shape is None
    with pytest.warns(UserWarning, match="no component of kind transformer"):
        assert read_model_shape(replace(port, components=()), tmp_path) is None
