"""Layer templates of names."""

from __future__ import annotations

from port_kit.remap.names import collapse, expand, parse_ranges, ranges


def test_names_collapse_and_expand() -> None:
    names = [f"blocks.{n}.ffn.{m}.weight" for n in range(30) for m in (0, 2)]
    assert collapse(names) == ["blocks.{0..29}.ffn.{0,2}.weight"]
    assert collapse(["a.1", "a.2.b", "a.4.b", "c"]) == ["a.1", "a.{2,4}.b", "c"]
    assert expand("blocks.#.ffn.#.weight", [range(30), [0, 2]]) == names
    assert parse_ranges(ranges([5, 1, 2, 3, 9])) == [1, 2, 3, 5, 9]
