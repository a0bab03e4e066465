"""Entries of a port that follow from its package, and those that are given."""

from __future__ import annotations

from typing import Any

import pytest

from port_kit.errors import PortKitError
from port_kit.port import Component, Port, build_module, lookup
from port_kit.registry import find_port

SHIPPED = ("ovi", "dreamid_omni", "mova")


def make(**given: Any) -> Port:
    fields = {"name": "tide", "package": "tide_port", "title": "t", "class_name": "TidePipeline"}
    return Port(**{**fields, "output_type": "video", "components": (), **given})


def test_entries_follow_from_the_package() -> None:
    port = make(variants={"small": "RECIPE_SMALL", "other": "elsewhere:RECIPE"})
    assert (port.pipeline, port.recipe) == ("tide_port.pipeline:TidePipeline", "tide_port.recipe:RECIPE")
    assert (port.original, port.tiny_model) == ("tide_port.recipe:ORIGINAL", "tide_port.config:TINY")
    assert port.variants == {"small": "tide_port.recipe:RECIPE_SMALL", "other": "elsewhere:RECIPE"}


def test_given_entries_stay() -> None:
    port = make(pipeline="a:B", recipe="c:D")
    assert (port.pipeline, port.recipe, port.original) == ("a:B", "c:D", "c:ORIGINAL")


def test_a_component_finds_its_module_rules_and_configuration_in_the_package() -> None:
    part = Component("video_vae", package="tide_port", kind="vae")
    assert part.build == "tide_port.model.video_vae:build_video_vae"
    assert (part.rules, part.config) == ("tide_port.weights:VIDEO_VAE", "tide_port.config:VIDEO_VAE_CONFIG")


def test_without_a_package_every_entry_is_required() -> None:
    assert Component("vae", build="a:b", rules="c:d", config="e:f").rules == "c:d"
    with pytest.raises(PortKitError) as caught:
        Component("vae", build="a:b")
    assert caught.value.code == "port_invalid"
    with pytest.raises(PortKitError) as caught:
        make(package="")
    assert caught.value.code == "port_invalid"


def test_lookup_returns_none_for_what_does_not_exist() -> None:
    assert lookup("port_kit.port:Port") is Port
    assert lookup("port_kit.port:NoSuchName") is None
    assert lookup("port_kit.no_such_module:NAME") is None
    assert lookup("no_such_package.module:NAME") is None


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_port_is_five_files(name: str) -> None:
    from pathlib import Path

    import port_kit.models

    (root,) = port_kit.models.__path__
    files = {path.name for path in (Path(root) / name).glob("*.py")}
    assert files == {"__init__.py", "config.py", "recipe.py", "weights.py", "pipeline.py"}
    assert find_port(name).package == f"port_kit.models.{name}"


class Denoiser:
    def __init__(self, *, channels: int, heads: int, layers: int = 2, prefix: str = "") -> None:
        self.sizes = (channels, heads, layers, prefix)


def test_a_configuration_has_the_parameters_of_its_class() -> None:
    built = build_module(Denoiser, {"channels": 4, "heads": 2}, prefix="transformer")
    assert built.sizes == (4, 2, 2, "transformer")
    with pytest.raises(PortKitError, match="Denoiser .* missing: channels, heads; unknown: dim") as caught:
        build_module(Denoiser, {"dim": 64}, prefix="transformer")
    assert caught.value.code == "component_config" and "config.py" in caught.value.hint
