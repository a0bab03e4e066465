"""The rules: every tensor of the published checkpoints is used or dropped with a reason, every parameter is filled."""

from __future__ import annotations

import pytest
from port_kit.port_tests import assert_rules_cover

from driftwood import PORT, config


@pytest.mark.parametrize("name", ("transformer", "projector"))
def test_the_rules_cover_the_published_checkpoint(name: str) -> None:
    assert_rules_cover(PORT, name, config.HERE / f"{name}.json")
