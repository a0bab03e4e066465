"""The rules: every tensor of the published checkpoints is used or dropped with a reason, every parameter is filled."""

from __future__ import annotations

import pytest
from port_kit.manifest import Manifest
from port_kit.port import resolve
from port_kit.remap import RuleSet
from port_kit.runtime.component_config import component_config
from port_kit.runtime.target_cache import build_manifest
from port_kit.testing.rules import assert_covers, assert_mutations_caught, assert_round_trip

from murmur import PORT, config

FILES = "--source murmur/{0}.json -o murmur/{0}.toml"
SUGGEST = "port-kit rules suggest --port murmur --component {0} " + FILES


@pytest.mark.parametrize("name", ("transformer", "vocoder"))
def test_the_rules_cover_the_published_checkpoint(name: str) -> None:
    component = PORT.component(name)
    rules = resolve(component.rules)
    assert isinstance(rules, RuleSet)
    assert len(rules), f"{name}.toml has no rules yet; write model/{name}.py, then: {SUGGEST.format(name)}"
    target = build_manifest(component, component_config(component))
    plan = assert_covers(rules, Manifest.from_json(config.HERE / f"{name}.json"), target)
    assert_round_trip(plan)
    assert_mutations_caught(plan)
