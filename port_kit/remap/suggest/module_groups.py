"""The groups that are matched: modules with their own parameters, one group for all layers that repeat it.

``blocks.0.attn.q.weight``, ``blocks.0.attn.q.bias``, ``blocks.1.attn.q.weight`` ... are one group: parts
``("blocks", "{}", "attn", "q")``, instances ``(0,), (1,) ...``, roles ``weight`` and ``bias``.
A number that names a slot of a ``Sequential`` (``mlp.0.weight``) stays in the parts: its siblings are other things.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from port_kit.remap.suggest.vocabulary import LEAVES, natural_key, words

Shape = tuple[int, ...]
Index = tuple[int, ...]

#: Role of a module's main parameter, and of a parameter that is a group of its own (``scale_shift_table``).
WEIGHT = "weight"
INDEX_SLOT = "{}"
_NUMBER = re.compile(r"0|[1-9][0-9]*")
_ITEM = re.compile(r"([A-Za-z_]+?)(0|[1-9][0-9]*)")
_LIST_LENGTH = 3  # fewer numbered words are no list of layers: attn1 and attn2
_BLOCK_SIZE = 5  # tensors; smaller modules are no list of layers: norm1, norm2 and norm3
_SCATTERED = 1.3  # runs of names under one module, over modules, above which a file has no order


@dataclass(frozen=True, eq=False)
class ModuleGroup:
    """One module template (or a virtual one: a fused group, a stack of experts).

    Attributes:
        parts: components of the module's name, ``{}`` for an index.
        names: role -> instance -> the tensor's full name (empty for a virtual group).
        shapes: role -> instance -> shape.
        order: position among the groups of its manifest.
        kind: ``plain``, ``concat`` (members' rows or columns one after another), ``stack`` (one member's last index) or
            ``weight_norm`` (direction and magnitude of one member's weight norm).
        members: the groups that a virtual group is made of, in row order.
        axis: for a stack, which index of the members is stacked; for a concat, the axis of its matrices.
        tokens: words of the name with their distance from the innermost component.
    """

    parts: tuple[str, ...]
    names: Mapping[str, Mapping[Index, str]]
    shapes: Mapping[str, Mapping[Index, Shape]]
    order: float
    kind: str = "plain"
    members: tuple[ModuleGroup, ...] = ()
    axis: int = -1
    tokens: tuple[tuple[str, int], ...] = field(default=())

    @property
    def instances(self) -> tuple[Index, ...]:
        """All instances, sorted by index."""
        return tuple(sorted(next(iter(self.shapes.values()))))

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(sorted(self.shapes))

    @property
    def words(self) -> frozenset[str]:
        return frozenset(word for word, _ in self.tokens)

    @property
    def leaf_words(self) -> tuple[str, ...]:
        """Words of the innermost named component (slots of a ``Sequential`` do not name anything)."""
        for part in reversed(self.parts):
            if words(part):
                return words(part)
        return ()

    @property
    def leaves(self) -> tuple[ModuleGroup, ...]:
        """The plain groups under this one (itself if it is plain)."""
        return (self,) if not self.members else tuple(leaf for part in self.members for leaf in part.leaves)

    def first_name(self, role: str) -> str:
        """Return the name of a parameter in the first instance of a plain group."""
        return next(iter(self.names[role].values()))

    def tensor_names(self) -> Iterator[str]:
        """Yield the names of all tensors of the group."""
        for leaf in self.leaves:
            for row in leaf.names.values():
                yield from row.values()

    def tensors(self, role: str, index: Index) -> list[str]:
        """Return the names of the tensors that one parameter of one instance consists of."""
        if self.kind == "stack":
            (member,) = self.members
            axis, count = self.axis, self.shapes[role][index][0]
            inner = [index[:axis] + (value,) + index[axis:] for value in range(count)]
            return [name for at in inner for name in member.tensors(role, at)]
        if self.kind == "weight_norm" and role == "weight":
            return [self.members[0].names[part][index] for part in ("weight_g", "weight_v")]
        if self.members:
            return [name for member in self.members for name in member.tensors(role, index)]
        return [self.names[role][index]]

    def joined_along(self, shape: Shape) -> int:
        """For a concat, the axis along which tensors of this shape are joined: vectors have but one."""
        return self.axis if len(shape) > 1 else 0

    def __str__(self) -> str:
        return ".".join(self.parts)


@lru_cache(maxsize=1 << 16)
def _stem(part: str) -> tuple[str, tuple[int, ...]]:
    return re.sub(r"\d+", "#", part), tuple(int(digits) for digits in re.findall(r"\d+", part))


def split_leaf(name: str) -> tuple[list[str], str]:
    """A tensor's name as (components of its module, role of the tensor in it)."""
    for part, original in (("weight_g", "original0"), ("weight_v", "original1")):
        name = name.replace(f"parametrizations.weight.{original}", part)
    components = name.split(".")
    leaf = components[-1]
    if leaf in LEAVES and len(components) > 1:
        return components[:-1], LEAVES[leaf]
    for suffix in ("_weight", "_bias"):
        if leaf.endswith(suffix):
            return [*components[:-1], leaf.removesuffix(suffix)], suffix[1:]
    return components, WEIGHT


#: How much :func:`group_modules` groups: all layers, all but the innermost list, nothing (one group per tensor).
GROUPINGS = ("layers", "outer", "tensors")


def group_modules(manifest: Mapping[str, Shape], grouping: str = "layers") -> list[ModuleGroup]:
    """Group a manifest's tensors into groups, in the manifest's order.

    Args:
        manifest: name -> shape.
        grouping: one of :data:`GROUPINGS`.
    """
    positions = _positions(manifest)
    split = {name: split_leaf(name) for name in manifest}
    if grouping == "tensors":
        singles = [
            ModuleGroup(tuple(components), {role: {(): name}}, {role: {(): manifest[name]}}, positions[name])
            for name, (components, role) in split.items()
        ]
        return _with_tokens(singles)
    names: dict[tuple[str, ...], dict[str, dict[Index, str]]] = defaultdict(lambda: defaultdict(dict))
    lists = _numbered_lists(components for components, _ in split.values())
    lists |= _even_lists(split, manifest)
    for name, (components, role) in split.items():
        parts, index = _template(components, lists, outer=grouping == "outer")
        if index in names[parts][role]:  # two spellings of one role in one module (weight and scale)
            parts, role = (*parts, name.rpartition(".")[2]), WEIGHT
        names[parts][role][index] = name
    groups: list[ModuleGroup] = []
    for parts, roles in names.items():
        groups.extend(_uniform_groups(parts, roles, manifest, positions))
    return _with_tokens(sorted(groups, key=lambda group: group.order))


def _with_tokens(groups: Sequence[ModuleGroup]) -> list[ModuleGroup]:
    """Give every group the words of its name with their distance from the innermost component.

    A number becomes its ordinal among its numbered siblings, ``#0`` for the first: code bases disagree about where to
    start and what to count (``norm1, norm2``, ``block_1, block_2``, ``0, 2``), but seldom about the order.
    """
    numbers: dict[tuple[tuple[str, ...], str], set[tuple[int, ...]]] = defaultdict(set)
    for group in groups:
        for depth, part in enumerate(group.parts):
            stem, digits = _stem(part)
            numbers[group.parts[:depth], stem].add(digits)
    ordered = {siblings: sorted(found) for siblings, found in numbers.items()}

    def tokens(parts: tuple[str, ...]) -> Iterator[tuple[str, int]]:
        named = [depth for depth in reversed(range(len(parts))) if parts[depth] != INDEX_SLOT]
        for distance, depth in enumerate(named):
            yield from ((word, distance) for word in words(parts[depth]))
            stem, digits = _stem(parts[depth])
            if digits:
                yield f"#{ordered[parts[:depth], stem].index(digits)}", distance

    return [replace(group, tokens=tuple(tokens(group.parts))) for group in groups]


def has_own_order(manifest: Iterable[str]) -> bool:
    """Return True if the names come in an order of their own (a module's): not sorted, and modules not scattered."""
    given = list(manifest)
    if given in (sorted(given), sorted(given, key=natural_key)):
        return False
    modules = [name.rsplit(".", 2)[0] for name in given]
    runs = 1 + sum(one != two for one, two in zip(modules, modules[1:], strict=False))
    return runs <= _SCATTERED * len(set(modules))


def _positions(manifest: Iterable[str]) -> dict[str, float]:
    """Order of the names: the file's own if it has one, else natural order."""
    given = list(manifest) if has_own_order(manifest) else sorted(manifest, key=natural_key)
    return {name: float(position) for position, name in enumerate(given)}


def _numbered_lists(names: Iterable[list[str]]) -> set[tuple[tuple[str, ...], str]]:
    """(parent, stem) of lists of blocks whose items carry their number in a word: ``layer_0, layer_1, layer_2``."""
    sizes: dict[tuple[tuple[str, ...], str], Counter[str]] = defaultdict(Counter)
    for components in names:
        for depth, component in enumerate(components[:-1]):
            found = _ITEM.fullmatch(component)
            if found:
                sizes[tuple(components[:depth]), found[1]][found[2]] += 1
    return {key for key, items in sizes.items() if len(items) >= _LIST_LENGTH and min(items.values()) >= _BLOCK_SIZE}


def _even_lists(
    split: Mapping[str, tuple[list[str], str]], manifest: Mapping[str, Shape]
) -> set[tuple[tuple[str, ...], str]]:
    """Lists of bare modules (numbers right before the parameter) that are all alike."""
    items: dict[tuple[str, ...], dict[str, set[tuple[str, Shape]]]] = defaultdict(lambda: defaultdict(set))
    for name, (components, role) in split.items():
        if _NUMBER.fullmatch(components[-1]):
            items[tuple(components[:-1])][components[-1]].add((role, manifest[name]))
    return {
        (parent, "")
        for parent, found in items.items()
        if len(found) >= _LIST_LENGTH
        and {int(number) for number in found} == set(range(len(found)))
        and len({frozenset(roles) for roles in found.values()}) == 1
    }


def _template(
    components: list[str], lists: set[tuple[tuple[str, ...], str]], *, outer: bool
) -> tuple[tuple[str, ...], Index]:
    """Replace the numbers of inner components by index slots; an innermost number is a name and stays."""
    index: list[int] = []
    parts: list[str] = []
    for depth, component in enumerate(components[:-1]):
        found = _ITEM.fullmatch(component)
        if _NUMBER.fullmatch(component):
            parts.append(INDEX_SLOT)
            index.append(int(component))
        elif found and (tuple(components[:depth]), found[1]) in lists:
            parts.append(found[1] + INDEX_SLOT)
            index.append(int(found[2]))
        else:
            parts.append(component)
    if _NUMBER.fullmatch(components[-1]) and (tuple(components[:-1]), "") in lists:
        parts.append(INDEX_SLOT)
        index.append(int(components[-1]))
    else:
        parts.append(components[-1])
    if outer and index:
        depth = max(depth for depth, part in enumerate(parts) if INDEX_SLOT in part)
        parts[depth] = parts[depth].replace(INDEX_SLOT, str(index.pop()))
    return tuple(parts), tuple(index)


def _uniform_groups(
    parts: tuple[str, ...],
    roles: Mapping[str, Mapping[Index, str]],
    manifest: Mapping[str, Shape],
    positions: Mapping[str, float],
) -> list[ModuleGroup]:
    """One group for all instances that have the same roles: layers without a bias are a group of their own."""
    by_roles: dict[tuple[str, ...], list[Index]] = defaultdict(list)
    for index in sorted({index for instances in roles.values() for index in instances}):
        by_roles[tuple(role for role in sorted(roles) if index in roles[role])].append(index)
    groups = []
    for present, indices in by_roles.items():
        names = {role: {index: roles[role][index] for index in indices} for role in present}
        shapes = {role: {index: manifest[name] for index, name in row.items()} for role, row in names.items()}
        order = min(positions[name] for row in names.values() for name in row.values())
        groups.append(ModuleGroup(parts, names, shapes, order))
    return groups


def size_of(group: ModuleGroup) -> dict[Index, int]:
    """Elements of each instance."""
    total: dict[Index, int] = defaultdict(int)
    for row in group.shapes.values():
        for index, shape in row.items():
            total[index] += math.prod(shape)
    return dict(total)
