"""Random rule sets that are complete by construction, with the shapes of both sides."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from hypothesis import strategies as st

from port_kit.remap import Op, Rule, RuleSet

Shapes = dict[str, tuple[int, ...]]
extent = st.integers(1, 5)


@dataclass
class RandomMapping:
    """Rules and both sides; ``folded`` sources come back in another form, ``dropped`` ones not at all."""

    rules: list[Rule] = field(default_factory=list)
    source: Shapes = field(default_factory=dict)
    target: Shapes = field(default_factory=dict)
    folded: set[str] = field(default_factory=set)
    dropped: set[str] = field(default_factory=set)
    kept: set[str] = field(default_factory=set)
    sizes: dict[str, int] = field(default_factory=dict)

    def layers(self, draw: st.DrawFn, number: int, source: Shapes, target: Shapes) -> None:
        """Repeat tensors over a few layers."""
        for layer in range(draw(st.integers(1, 3))):
            self.source |= {f"s{number}.{layer}.{leaf}": shape for leaf, shape in source.items()}
            self.target |= {f"t{number}.{layer}.{leaf}": shape for leaf, shape in target.items()}

    def rule(self, number: int, leaf: str, target: str | tuple[str, ...], **fields: object) -> None:
        """A rule for one leaf of all layers; ``target`` are leaves too."""
        names = (target,) if isinstance(target, str) else target
        paths = tuple(rf"t{number}.\1.{name}" for name in names)
        self.rules.append(Rule(rf"s{number}\.(\d+)\.{leaf}", paths if len(paths) > 1 else paths[0], **fields))


def moved(draw: st.DrawFn, mapping: RandomMapping, number: int) -> None:
    """One tensor to one tensor, its elements in another order."""
    a, b, c, d = (draw(extent) for _ in range(4))
    order = tuple(draw(st.permutations(range(3))))
    cuts = sorted(draw(st.sets(st.integers(1, a * b + 1), max_size=3)))
    runs = [[start, stop] for start, stop in itertools.pairwise([0, *cuts, a * b + 2])]
    cube = (a, b, c)
    op, given, wanted = draw(
        st.sampled_from(
            [
                ((), cube, cube),
                ("transpose", cube, (a, c, b)),
                (Op.of("transpose", perm=order), cube, tuple(cube[axis] for axis in order)),
                ("reshape", cube, (b * a, c)),
                (Op.of("reshape", shape=(-1, "in1 * in2")), cube, (a, b * c)),
                (Op.of("reorder", dim=0, runs=draw(st.permutations(runs))), (a * b + 2, c), (a * b + 2, c)),
                (Op.of("reorder", dim=-1, parts=d), (c, 2 * a), (c, 2 * a)) if d == 2 else ((), cube, cube),
                (Op.of("rearrange", pattern="(x y) z -> z (y x)", sizes=[["x", a]]), (a * b, c), (c, b * a)),
                (
                    Op.of("rearrange", pattern="(h two d) ... -> (two h d) ...", sizes=[["two", 2], ["d", c]]),
                    (a * 2 * c, b, d),
                    (2 * a * c, b, d),
                ),
                ((Op("transpose"), Op.of("reshape", shape=(b, -1))), (a, b), (b, a)),
            ]
        )
    )
    mapping.layers(draw, number, {"w": given}, {"w": wanted})
    mapping.rule(number, "w", "w", op=op)


def split(draw: st.DrawFn, mapping: RandomMapping, number: int) -> None:
    """One tensor to several, along any axis: sizes given, as expressions, or those of the targets."""
    parts, dim, rank = [draw(extent) for _ in range(draw(st.integers(2, 4)))], draw(st.integers(0, 2)), 3
    rest = [draw(extent) for _ in range(rank - 1)]
    shapes = [(*rest[:dim], part, *rest[dim:]) for part in parts]
    how = draw(st.sampled_from(["given", "named", "targets"]))
    sizes: tuple[int | str, ...] = tuple(parts)
    if how == "named":
        mapping.sizes[f"n{number}"] = parts[0]
        sizes = (f"n{number}", *parts[1:])
    op = Op.of("split", dim=dim - rank * draw(st.booleans()), **({} if how == "targets" else {"sizes": sizes}))
    turned = draw(st.booleans()) and how != "targets"
    wanted = [(one, three, two) if turned else (one, two, three) for one, two, three in shapes]
    mapping.layers(
        draw,
        number,
        {"w": (*rest[:dim], sum(parts), *rest[dim:])},
        {f"p{at}": shape for at, shape in enumerate(wanted)},
    )
    mapping.rule(number, "w", tuple(f"p{at}" for at in range(len(parts))), op=(op, Op("transpose")) if turned else op)


def joined(draw: st.DrawFn, mapping: RandomMapping, number: int) -> None:
    """Several tensors to one, along any axis, parts of any extents."""
    parts, dim = [draw(extent) for _ in range(draw(st.integers(2, 4)))], draw(st.integers(0, 1))
    other, names = draw(extent), "abcd"[: draw(st.just(4))]
    shapes = [(part, other) if dim == 0 else (other, part) for part in parts]
    total = (sum(parts), other) if dim == 0 else (other, sum(parts))
    order = draw(st.permutations(list(names[: len(parts)])))
    sizes = {"sizes": tuple(parts)} if draw(st.booleans()) else {}
    given = dict(zip(order, shapes, strict=True))
    mapping.layers(draw, number, given, {"w": total})
    path, op = rf"t{number}.\1.w", Op.of("concat", dim=dim, parts=tuple(order), **sizes)
    mapping.rules.append(Rule(rf"s{number}\.(\d+)\.({'|'.join(sorted(order))})", path, shard=r"\2", op=op))


def experts(draw: st.DrawFn, mapping: RandomMapping, number: int) -> None:
    """Experts of every layer stacked, and the halves of fused ones put into their rows."""
    count, rows, columns = draw(st.integers(1, 4)), draw(extent), draw(extent)
    down = {f"e.{expert}.down": (rows, columns) for expert in range(count)}
    halves = {f"e.{expert}.{half}": (rows, columns) for expert in range(count) for half in ("gate", "up")}
    dim = draw(st.integers(0, 1))
    stacked = (count, rows, columns) if dim == 0 else (rows, count, columns)
    mapping.layers(draw, number, down | halves, {"down": stacked, "gate_up": (count, 2 * rows, columns)})
    at = rf"s{number}\.(\d+)\.e\.(\d+)\."
    mapping.rules.append(Rule(at + "down", rf"t{number}.\1.down", shard=r"\2", op=Op.of("stack", dim=dim)))
    mapping.rules.append(Rule(at + "gate", rf"t{number}.\1.gate_up", into=rf"[\2, 0:{rows}]"))
    mapping.rules.append(Rule(at + "up", rf"t{number}.\1.gate_up", into=rf"[\2, {rows}:]"))


def unstacked(draw: st.DrawFn, mapping: RandomMapping, number: int) -> None:
    """A stack taken apart, each item in two pieces."""
    count, one, two, columns = draw(st.integers(1, 3)), draw(extent), draw(extent), draw(extent)
    target = {f"e.{at}.{half}": (size, columns) for at in range(count) for half, size in (("g", one), ("u", two))}
    mapping.layers(draw, number, {"w": (count, one + two, columns)}, target)
    for at in range(count):
        mapping.rule(number, "w", f"e.{at}.g", take=f"[{at}, 0:{one}]")
        mapping.rule(number, "w", f"e.{at}.u", take=f"[{at}, {one}:]")


def crossed(draw: st.DrawFn, mapping: RandomMapping, number: int) -> None:
    """Many to many: two sources, each with a part for both of two targets."""
    a, b, c, d, columns = (draw(extent) for _ in range(5))
    mapping.layers(
        draw, number, {"m": (a + b, columns), "n": (c + d, columns)}, {"x": (a + c, columns), "y": (b + d, columns)}
    )
    mapping.rule(number, "m", "x", take=f"[0:{a}]", into=f"[0:{a}]")
    mapping.rule(number, "m", "y", take=f"[{a}:]", into=f"[0:{b}]")
    mapping.rule(number, "n", "x", take=f"[0:{c}]", into=f"[{a}:]")
    mapping.rule(number, "n", "y", take=f"[{c}:]", into=f"[{b}:]")


def numbered(draw: st.DrawFn, mapping: RandomMapping, number: int) -> None:
    """Layer numbers that are computed: a flat list in pieces, a shift, a list that counts backwards."""
    count, shape = draw(st.integers(1, 6)), (draw(extent), draw(extent))
    text = draw(st.sampled_from([r"{\1 // 2}.{\1 % 2}", r"{\1 + 3}", "{" + str(count) + r" - \1}"]))
    for layer in range(count):
        placed = {"{\\1 + 3}": f"{layer + 3}", r"{\1 // 2}.{\1 % 2}": f"{layer // 2}.{layer % 2}"}
        mapping.source[f"s{number}.{layer}.w"] = shape
        mapping.target[f"t{number}.{placed.get(text, str(count - layer))}.w"] = shape
    mapping.rules.append(Rule(rf"s{number}\.(\d+)\.w", f"t{number}.{text}.w"))


def folded(draw: st.DrawFn, mapping: RandomMapping, number: int) -> None:
    """A weight norm: its parts do not come back as they were."""
    a, b, c = draw(extent), draw(extent), draw(extent)
    mapping.layers(draw, number, {"g": (a, 1, 1), "v": (a, b, c)}, {"w": (a, b, c)})
    mapping.rules.append(Rule(rf"s{number}\.(\d+)\.(g|v)", rf"t{number}.\1.w", shard=r"\2", op="weight_norm"))
    mapping.folded |= {name for name in mapping.source if name.startswith(f"s{number}.")}


def aside(draw: st.DrawFn, mapping: RandomMapping, number: int) -> None:
    """Unmapped tensors: a dropped source, a kept target, an optional rule, unchanged names."""
    shape = (draw(extent), draw(extent))
    mapping.source |= {f"s{number}.ema.w": shape, f"same{number}.w": shape}
    mapping.target |= {f"t{number}.freqs": shape, f"same{number}.w": shape}
    mapping.rules += [
        Rule(rf"s{number}\.ema\..*", drop="a second copy"),
        Rule(target=rf"t{number}\.freqs", keep="computed when it is built"),
        Rule(rf"s{number}\.never\.(\d+)", rf"t{number}.never.\1", optional=True),
        Rule(rf"(same{number}\..*)", r"\1", fallback=True),
    ]
    mapping.dropped.add(f"s{number}.ema.w")
    mapping.kept.add(f"t{number}.freqs")


Kind = Callable[[st.DrawFn, RandomMapping, int], None]
KINDS: tuple[Kind, ...] = (
    moved,
    split,
    joined,
    experts,
    unstacked,
    crossed,
    numbered,
    folded,
    aside,
)


@st.composite
def random_mappings(
    draw: st.DrawFn, kinds: tuple[Callable[[st.DrawFn, RandomMapping, int], None], ...] = KINDS
) -> tuple[RandomMapping, RuleSet]:
    """Draw a mapping of one to four kinds and its rules as one set, sometimes under prefixes."""
    mapping = RandomMapping()
    for number in range(draw(st.integers(1, 4))):
        draw(st.sampled_from(kinds))(draw, mapping, number)
    rules = RuleSet("random", tuple(draw(st.permutations(mapping.rules))), mapping.sizes)
    if draw(st.integers(0, 3)):
        return mapping, rules
    rules = rules.under("ckpt.", "model.")
    mapping.source, mapping.target = (
        {prefix + name: shape for name, shape in side.items()}
        for prefix, side in (("ckpt.", mapping.source), ("model.", mapping.target))
    )
    mapping.folded, mapping.dropped = (
        {f"ckpt.{name}" for name in names} for names in (mapping.folded, mapping.dropped)
    )
    mapping.kept = {f"model.{name}" for name in mapping.kept}
    return mapping, rules
