"""Broken ports: each is reported with its cause, and does not affect other ports."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from port_kit.cli import main
from port_kit.errors import PortKitError, PortNotFoundError
from port_kit.registry import find_port, list_ports

GOOD = """
from port_kit.port import Port
PORT = Port(name="{name}", package=__name__, title="t", class_name="{class_name}", output_type="image", components=())
"""

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write a package into a folder that ``PORT_KIT_PATH`` names; without code, a good port of the package's name."""
    monkeypatch.setenv("PORT_KIT_PATH", str(tmp_path))
    before, path = set(sys.modules), list(sys.path)

    def put(package: str, code: str | None = None, *, name: str = "", class_name: str = "") -> Path:
        good = GOOD.format(name=name or package, class_name=class_name or f"{package}Pipeline")
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(good if code is None else code, encoding="utf-8")
        list_ports.cache_clear()
        return tmp_path / package

    yield put
    for module in set(sys.modules) - before:
        del sys.modules[module]
    sys.path[:] = path
    list_ports.cache_clear()


def only_problem() -> PortKitError:
    (problem,) = list_ports().problems
    return problem


def test_a_good_port_in_a_folder_is_offered_beside_the_shipped_ones(write: Write) -> None:
    write("tide_one")
    assert {"tide_one", "dreamid_omni"} <= set(list_ports())
    assert list_ports().problems == []


@pytest.mark.parametrize(
    ("code", "error", "hint"),
    [
        ("import sand_castle\nPORT = 1\n", "ModuleNotFoundError", "sand_castle"),
        ("PORT = 1 / 0\n", "ZeroDivisionError", ""),
        ("PORT = (\n", "SyntaxError", ""),
    ],
)
def test_a_broken_port_is_named_with_its_line_and_hinders_no_other(
    code: str, error: str, hint: str, write: Write
) -> None:
    write("tide_good")
    package = write("tide_broken", code)
    assert {"tide_good", "dreamid_omni"} <= set(list_ports())
    problem = only_problem()
    assert problem.code == "port_broken"
    assert error in problem.message
    assert f"{package / '__init__.py'}, line 1" in problem.message
    assert hint in problem.hint
    with pytest.raises(PortKitError) as caught:
        find_port("tide_broken")
    assert caught.value is problem


@pytest.mark.parametrize("shared", [{"name": "dreamid_omni"}, {"class_name": "DreamIDOmniPipeline"}])
def test_a_clash_with_a_shipped_port_names_both_and_offers_neither(shared: dict[str, str], write: Write) -> None:
    write("tide_clash", **shared)
    write("tide_other")
    ports = list_ports()
    assert "tide_other" in ports
    assert "dreamid_omni" not in ports and "tide_clash" not in ports
    for problem in ports.problems:
        assert problem.code == "port_clash"
        assert "port_kit.models.dreamid_omni:PORT of port-kit" in problem.message
        assert "tide_clash" in problem.message
    with pytest.raises(PortKitError) as caught:
        find_port("dreamid_omni")
    assert caught.value.code == "port_clash"


def test_a_port_object_of_another_type_is_reported(write: Write) -> None:
    write("tide_type", "PORT = {'name': 'tide_type'}\n")
    problem = only_problem()
    assert problem.code == "port_invalid" and "dict" in problem.message


def test_a_package_that_hides_another_is_reported(write: Write) -> None:
    write("json")
    problem = only_problem()
    assert problem.code == "port_clash" and "json/__init__.py" in problem.message


def test_packages_that_declare_no_port_are_not_imported(write: Write) -> None:
    write("tide_plain", "raise RuntimeError('imported')\n")
    write("tide_good")
    assert "tide_good" in list_ports() and list_ports().problems == []


@pytest.mark.parametrize(
    "place", ["nowhere", "", "tide_self"], ids=["missing folder", "no package with a PORT", "a package itself"]
)
def test_a_folder_without_a_port_is_reported(
    place: str, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place == "tide_self":
        write(place)
    monkeypatch.setenv("PORT_KIT_PATH", str(tmp_path / place))
    list_ports.cache_clear()
    problem = only_problem()
    assert problem.code == "port_path"
    assert str(tmp_path / place) in problem.message and problem.hint
    assert "dreamid_omni" in list_ports()


def test_list_prints_the_ports_and_reports_the_problem(write: Write) -> None:
    write("tide_broken", "import sand_castle\nPORT = 1\n")
    result = CliRunner().invoke(main, ["list", "--json"])
    envelope = json.loads(result.stdout)
    assert result.exit_code == 1 and not envelope["ok"]
    assert "dreamid_omni" in envelope["data"]
    assert "error [port_broken]: the port tide_broken" in result.stderr


def test_doctor_has_a_check_for_it(write: Write) -> None:
    write("tide_broken", "import sand_castle\nPORT = 1\n")
    result = CliRunner().invoke(main, ["doctor", "--no-engine", "--json"])
    checks = {check["name"]: check for check in json.loads(result.stdout)["data"]["checks"]}
    assert not checks["port tide_broken"]["ok"]


def test_a_name_that_is_nowhere_mentions_the_ports_that_cannot_be_used(write: Write) -> None:
    write("tide_broken", "import sand_castle\nPORT = 1\n")
    with pytest.raises(PortNotFoundError) as caught:
        find_port("seaweed")
    assert "1 " in caught.value.hint and "tide_broken" not in caught.value.details["known"]
