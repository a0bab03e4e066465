"""Ovi's tiny model on 2 and 4 ranks against one, with proof that the work was divided."""

from __future__ import annotations

import json

import pytest

from port_kit.cli import main

#: A first frame has a timestep of its own: its 6 tokens of 186 lie on one rank of a sharded sequence.
LAYOUTS = ("tp2", "ulysses2xcfg2")


def test_ranks_compute_the_result_of_one(capfd: pytest.CaptureFixture[str]) -> None:
    options = [word for layout in LAYOUTS for word in ("--layout", layout)]
    main(["verify", "parallel", "ovi", *options, "--json"], standalone_mode=False)
    layouts = json.loads(capfd.readouterr().out)["data"]["layouts"]
    assert [layout["layout"] for layout in layouts] == list(LAYOUTS)
    assert all(layout["ok"] and layout["max_abs"] <= 5e-6 for layout in layouts)
    sharded = layouts[1]["tokens"]
    assert len(sharded) == 5 and all(2 * tokens >= sharded[0] > tokens for tokens in sharded[1:])
