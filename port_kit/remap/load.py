"""Loading: tensors stream in, in any order, and each goes straight into its place; the books are closed at the end.

The writes are those of :mod:`port_kit.remap.lower`, the checks those of :mod:`port_kit.remap.plan`; nothing about a
rule's meaning is decided here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from port_kit.errors import RemapError
from port_kit.manifest import Manifest, TensorSpec
from port_kit.remap.boxes import Box, extents, first_overlap, gaps, intersection, slices, volume, whole
from port_kit.remap.diagnosis import diagnose
from port_kit.remap.joins import check_transform, incomplete, known_places, parts_of, place_parts
from port_kit.remap.lower import Lowered, Lowering, Write
from port_kit.remap.patterns import compile_pattern
from port_kit.remap.plan import IDENTITY, check, dead_rules, target_problems
from port_kit.remap.problems import Problem, raise_problems
from port_kit.remap.routes import Route, Routes, Seat
from port_kit.remap.rules import RuleSet
from port_kit.remap.steps import Reorder, Take, back, copy_through, gather
from port_kit.remap.targets import Target, is_elastic, read_targets
from port_kit.remap.transforms import find_transform

if TYPE_CHECKING:
    from torch import Tensor, nn

#: Tensors that may wait until the stream shows whether it is an original or a converted checkpoint.
MAX_UNDECIDED = 64
#: Bytes of parts that may wait for the rest of their group.
MAX_WAITING = 8 << 30


def load_weights(
    module: nn.Module,
    weights: Iterable[tuple[str, Tensor]],
    rules: RuleSet,
    *,
    sizes: Mapping[str, int] | None = None,
    prefix: str = "",
    folder: str | Path | None = None,
    narrow: bool = True,
) -> set[str]:
    """Fill a module from a stream of named tensors.

    Args:
        module: its parameters and persistent buffers are written in place; parameters with a ``weight_loader`` get
            whole slots through it, so tensor parallelism and quantization work as in vLLM's own models.
        weights: ``(name, tensor)`` in any order; names with ``prefix`` in front or without it.
        rules: the rule set.
        sizes: named sizes on top of the rule set's own.
        prefix: what stands before the returned names.
        folder: the folder or file that the stream reads; its headers are checked before the first tensor, and errors
            name the file of a tensor.
        narrow: floating-point values may be rounded to the module's dtype; set by whoever chose that dtype.

    Returns:
        Names of the targets that are completely loaded (or kept with a reason), with ``prefix`` in front.

    Raises:
        RemapError: with every gap in ``details["problems"]``; see :func:`port_kit.remap.plan.compile_plan`.
    """
    loader = WeightLoader(module, rules, sizes=sizes, prefix=prefix, folder=folder, narrow=narrow)
    for name, tensor in weights:
        loader.feed(name, tensor)
    return loader.finish()


def load_components(
    parts: Mapping[str, tuple[nn.Module, RuleSet]],
    weights: Iterable[tuple[str, Tensor]],
    *,
    sizes: Mapping[str, int] | None = None,
    model: str | Path | None = None,
    narrow: bool = True,
) -> set[str]:
    """Fill several components from one stream whose names start with the component's name and a dot.

    Args:
        parts: ``{component: (module, rules)}``.
        weights: the stream of a pipeline's ``load_weights``, all components in any order.
        sizes: named sizes of all components.
        model: the model directory, for the names of files in errors.
        narrow: as in :func:`load_weights`.

    Returns:
        Names of the loaded targets, with the component's name in front.

    Raises:
        RemapError: as :func:`load_weights`; ``remap_unexpected`` for a name of no component.
    """
    loaders = {
        name: WeightLoader(
            module,
            rules,
            sizes=sizes,
            prefix=f"{name}.",
            folder=Path(model) / name if model is not None else None,
            narrow=narrow,
        )
        for name, (module, rules) in parts.items()
    }
    for name, tensor in weights:
        component = name.partition(".")[0]
        if component not in loaders:
            problem = Problem("remap_unexpected", f"{name} belongs to no component: {', '.join(parts)}", source=name)
            raise_problems([problem], "weights")
        loaders[component].feed(name, tensor)
    return set().union(*[loader.finish() for loader in loaders.values()])


class WeightLoader:
    """A load in progress: :meth:`feed` tensors, then :meth:`finish`. Arguments as :func:`load_weights`."""

    def __init__(
        self,
        module: nn.Module,
        rules: RuleSet,
        *,
        sizes: Mapping[str, int] | None = None,
        prefix: str = "",
        folder: str | Path | None = None,
        narrow: bool = True,
    ) -> None:
        found = read_targets(module)
        self.targets = found.targets
        self.rules = rules
        self.prefix = prefix
        self.folder = Path(folder) if folder is not None else None
        elastic = {name for name, target in found.targets.items() if target.loader is not None and is_elastic(target)}
        specs = {name: target.spec for name, target in found.targets.items()}
        self.manifest = Manifest(specs, origin=type(module).__name__, aliases=found.aliases)
        self.lowering = Lowering(
            rules, specs, sizes or {}, narrow=narrow, aliases=found.aliases, elastic=(elastic, found.ranks)
        )
        self._converted: bool | None = None
        self._undecided: list[tuple[str, Tensor]] = []
        self._writes: dict[str, list[Write]] = defaultdict(list)
        self._used: dict[int, int] = defaultdict(int)
        self._specs: dict[object, TensorSpec] = {}
        self._problems: list[Problem] = []
        self._waiting: dict[object, list[tuple[Write, Tensor]]] = defaultdict(list)
        self._waiting_bytes = 0
        self._slots: dict[tuple[str, str], tuple[Tensor, int]] = {}
        self._accounted: dict[object, int] = {}
        self._known_places: dict[object, Box | None] = {}
        self._known_groups: dict[object, list[Box]] = {}
        self._planned: dict[tuple[str, str, str], Box] = {}
        self._seen: set[str] = set()
        self._routes: Routes | None = None
        self._seats: dict[str, Seat | None] = {}
        self._routed: list[Seat] = []
        self._blamed: set[str] = set()
        if self.folder is not None:
            self._check_headers(dict(sizes or {}), narrow)

    @cached_property
    def _identity(self) -> Lowering:
        """What an already converted checkpoint is loaded with."""
        return Lowering(IDENTITY, self.manifest, {}, narrow=self.lowering.narrow, aliases=self.manifest.aliases)

    def _check_headers(self, sizes: dict[str, int], narrow: bool) -> None:
        """Everything that the headers can tell, before the first tensor is read."""
        assert self.folder is not None
        source = Manifest.from_checkpoint(self.folder)
        plan = check(self.rules, source, self.manifest, sizes, narrow=narrow, elastic=self.lowering.elastic)
        raise_problems(plan.explained(), f"{self.rules.name} does not map {self.folder} completely")
        self._converted = plan.converted
        self._planned = {(write.source, write.target, write.part): write.region for write in plan.writes if write.part}

    # -- feeding -----------------------------------------------------------------------------------------------

    def feed(self, name: str, tensor: Tensor) -> None:
        """Put one tensor to where the rules send it; gaps are reported by :meth:`finish`."""
        name = name.removeprefix(self.prefix)
        seat = self._seats.get(name)
        if tensor.requires_grad:
            tensor = tensor.detach()
        if seat is None or tensor.dtype is not seat[2].dtype or tensor.shape != seat[2].shape:
            self._feed_without_seat(name, tensor)
            return
        self._seats[name] = None
        seat[2].put(seat[1], tensor)
        self._routed.append(seat)

    def _feed_without_seat(self, name: str, tensor: Tensor) -> None:
        if name in self._seen or self._seats.get(name, False) is None:
            self._problems.append(Problem("remap_collision", f"{name} comes twice", source=name))
            return
        if self._routes is not None and self._routes.learn(name, self._seen):
            self.feed(self.prefix + name, tensor)
            return
        self._seats.pop(name, None)
        self._seen.add(name)
        if self._routes is None:
            self._converted = self._decide(name) if self._converted is None else self._converted
            if self._converted is None and len(self._undecided) < MAX_UNDECIDED:
                self._undecided.append((name, tensor))
                return
            self._release()
        self._put(name, tensor)

    def _decide(self, name: str) -> bool | None:
        """Whether a name shows that the checkpoint is converted (or original); None where it fits both."""
        found = self.lowering.matches(name)
        ordinary = any(not self.lowering.rules[number].fallback for number in found)
        if name not in self.targets:
            return False if found else None
        if ordinary or found:
            return None
        return True

    def _release(self) -> None:
        self._converted = bool(self._converted)
        self._routes = Routes(
            self._identity if self._converted else self.lowering, self.targets, self._store_through_loader
        )
        self._seats = self._routes.seats
        waiting, self._undecided = self._undecided, []
        for name, tensor in waiting:
            self._put(name, tensor)

    def _put(self, name: str, tensor: Tensor) -> None:
        assert self._routes is not None
        write, rule = self._work_out(name, tensor)
        if write is not None and not is_elastic(self.targets[write.target]):
            self._routes.show(tensor, self.targets[write.target], write, rule)

    def _work_out(self, name: str, tensor: Tensor) -> tuple[Write | None, int]:
        """Put a tensor to where the rules say; returns its write, where others of its kind go the same way."""
        kind = (tensor.shape, tensor.dtype)
        spec = self._specs.get(kind)
        if spec is None:
            spec = TensorSpec(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            self._specs[kind] = spec
        lowered = self._lower(name, spec)
        if lowered.problems:
            self._problems += lowered.problems
            self._blamed.update(lowered.blamed)
            return None, 0
        alike = self._account(name, spec, lowered) and not lowered.dropped
        for write in lowered.writes:
            write, fixed = self._known_place(write)
            alike = alike and fixed
            if write.join is None:
                self._store(write, tensor)
            else:
                self._join(write, tensor)
        alone = len(lowered.writes) == len(lowered.rules) == 1
        return (write, lowered.rules[0]) if alone and alike else (None, 0)

    def _lower(self, name: str, spec: TensorSpec) -> Lowered:
        if self._converted:
            if name not in self.targets and self.lowering.matches(name):
                return _mixed(name, "an original name among converted ones")
            return self._identity.lower(name, spec)
        if name in self.targets and not self.lowering.matches(name):
            return _mixed(name, "a converted name among original ones")
        lowered = self.lowering.lower(name, spec)
        for number in lowered.rules:
            self._used[number] += 1
        return lowered

    def _account(self, name: str, spec: TensorSpec, lowered: Lowered) -> bool:
        """Check that every element of a source is used once or dropped; most rules use the whole tensor."""
        writes = lowered.writes
        if len(writes) == 1 and not lowered.dropped and not _selects(writes[0]):
            return True
        key = (spec.shape, tuple(write.steps for write in writes), tuple(box for box, _ in lowered.dropped))
        unused = self._accounted.get(key)
        if unused is None:
            boxes = [box for box, _ in lowered.dropped]
            for write in writes:
                boxes += back(write.steps, [whole(write.shape)])
            unused = -1 if first_overlap(boxes) else gaps(boxes, spec.shape)
            self._accounted[key] = unused
        if unused:
            code, what = ("remap_unused", f"{unused} elements of {name} are neither used nor dropped")
            if unused < 0:
                code, what = "remap_overlap", f"elements of {name} are used twice"
            self._problems.append(Problem(code, what, source=name))
        return not unused

    # -- joins -------------------------------------------------------------------------------------------------

    def _known_place(self, write: Write) -> tuple[Write, bool]:
        """A write, placed where it need not wait for other parts; and whether parts like it go to the same place."""
        if write.join is None or write.join.name != "concat":
            return write, write.join is None
        join = (id(write.join), write.region)
        key = (*join, write.part, write.shape)
        if key not in self._known_places:
            self._known_places[key] = None
            for placed in known_places(write, self.lowering.sizes):
                self._known_places[(*join, placed.part, placed.shape)] = placed.region
        region = self._known_places[key]
        if region is not None:
            return write.placed(region), True
        planned = self._planned.get((write.source, write.target, write.part))  # the headers told the other widths
        return (write if planned is None else write.placed(planned)), False

    def _join(self, write: Write, tensor: Tensor) -> None:
        assert write.join is not None
        group = self._waiting[write.group]
        group.append((write, tensor))
        self._waiting_bytes += tensor.nbytes
        if {part.part for part, _ in group} >= set(parts_of(write)):
            del self._waiting[write.group]
            self._waiting_bytes -= sum(part.nbytes for _, part in group)
            self._finish_group(group)
        elif self._waiting_bytes > MAX_WAITING:
            raise RemapError(
                f"{len(self._waiting)} groups wait for their parts with {self._waiting_bytes:,} bytes; "
                f"first: {next(iter(self._waiting.values()))[0][0].target}",
                code="remap_incomplete_group",
                hint="give concat its sizes, so that parts need not wait for each other",
            )

    def _finish_group(self, group: list[tuple[Write, Tensor]]) -> None:
        writes = [write for write, _ in group]
        tensors = {write.source: tensor for write, tensor in group}
        first = writes[0]
        assert first.join is not None
        if first.join.name == "concat":
            problems = self._store_concat(writes, tensors)
        else:
            problems = check_transform(writes)
            if not problems:
                parts = {write.part: gather(tensors[write.source], write.steps) for write in writes}
                result = find_transform(first.join.name).run(parts, dict(first.join.args), extents(first.region))
                self._store(first._replace(join=None, steps=()), result)
        self._problems += problems

    def _store_concat(self, writes: list[Write], tensors: Mapping[str, Tensor]) -> list[Problem]:
        """Store a complete group; where its parts go is worked out once for groups that are alike."""
        key = (id(writes[0].join), writes[0].region, tuple((write.part, write.shape) for write in writes))
        regions = self._known_groups.get(key)
        if regions is None:
            placed, problems = place_parts(writes, self.lowering.sizes)
            if problems:
                return problems
            region_of = {write.source: write.region for write in placed}
            regions = self._known_groups[key] = [region_of[write.source] for write in writes]
        for write, region in zip(writes, regions, strict=True):
            self._store(write.placed(region), tensors[write.source])
        return []

    # -- storing -----------------------------------------------------------------------------------------------

    def _store(self, write: Write, tensor: Tensor) -> None:
        target = self.targets[write.target]
        self._writes[write.target].append(write)
        if target.loader is None:
            copy_through(_view(target.tensor.data, write.region), tensor, write.steps)
        else:
            self._store_through_loader(target, write, tensor)

    def _store_through_loader(self, target: Target, write: Write, tensor: Tensor) -> None:
        """A parameter's loader takes whole slots: give it those, and collect slots that come in pieces."""
        spec = self.lowering.target[target.name]
        slots: Mapping[str, Box] = spec.slots or {"": whole(spec.shape)}
        piece = gather(tensor, write.steps)
        if slots.get(write.slot) == write.region:
            target.load(write.slot, piece[0] if "." in write.slot else piece)
            return
        for slot, box in slots.items():
            common = intersection(box, write.region)
            if common is None:
                continue
            inner = tuple((a - low, b - low) for (a, b), (low, _) in zip(common, write.region, strict=True))
            part = _view(piece, inner)
            if common == box:
                target.load(slot, part[0] if "." in slot else part)
            else:
                self._collect(target, slot, box, common, part)

    def _collect(self, target: Target, slot: str, box: Box, common: Box, part: Tensor) -> None:
        import torch

        key = (target.name, slot)
        if key not in self._slots:
            self._slots[key] = (torch.empty(extents(box), dtype=part.dtype, device=part.device), 0)
        held, count = self._slots[key]
        inner = tuple((a - low, b - low) for (a, b), (low, _) in zip(common, box, strict=True))
        _view(held, inner).copy_(part)
        count += volume(common)
        self._slots[key] = (held, count)
        if count >= volume(box):
            del self._slots[key]
            target.load(slot, held[0] if "." in slot else held)

    # -- the end -----------------------------------------------------------------------------------------------

    def finish(self) -> set[str]:
        """Close the books.

        Returns:
            Names of the loaded targets, with the prefix in front.

        Raises:
            RemapError: with every gap.
        """
        if self._routes is None:
            self._release()
        routed: defaultdict[str, list[Seat]] = defaultdict(list)
        for seat in self._routed:
            routed[seat[1].name].append(seat)
        for group in self._waiting.values():
            self._problems += incomplete([write for write, _ in group])
        kept = self._kept()
        blamed = self._blamed | {problem.target for problem in self._problems if problem.target}
        loaded = set(kept)
        sound: set[tuple[Route, ...]] = set()  # the routes that fill a target fill every target that is like it
        for name in self.targets:
            seats = routed.get(name, ())
            routes = tuple([seat[2] for seat in seats]) if seats else ()
            alone = bool(seats) and name not in self._writes
            if not alone or routes not in sound:
                self._writes[name] += [Write(source, route.steps, name, *route.write[3:]) for source, _, route in seats]
                problems = self._target_problems(name, name in kept, name in blamed)
                self._problems += problems
                if problems or name in blamed:
                    continue
                if alone:
                    sound.add(routes)
            loaded.add(name)
        if not self._converted:
            self._problems += dead_rules(self.rules, self._used, kept)
        if self._problems:
            files = dict.fromkeys([*self._seen, *(source for source, _, _ in self._routed)], "")
            problems = diagnose(self._problems, self.rules, files, self.targets, self.lowering.sizes)
            raise_problems(problems, f"{self.rules.name} does not load {self.manifest.origin} completely")
        return {self.prefix + name for name in loaded}

    def _target_problems(self, name: str, kept: bool, blamed: bool) -> list[Problem]:
        writes = self._writes.get(name)
        if writes:
            return target_problems(name, self.lowering.target, writes, blamed=blamed)
        if kept or blamed:
            return []
        shape = list(self.targets[name].spec.shape)
        return [Problem("remap_missing", f"{name} {shape} is not written by any source", target=name)]

    def _kept(self) -> dict[str, str]:
        kept = {}
        for rule in self.rules:
            if rule.keep and not self._converted:
                pattern = compile_pattern(str(rule.target))
                kept.update({name: rule.keep for name in self.targets if pattern.fullmatch(name)})
        return kept


def _view(tensor: Tensor, box: Box) -> Tensor:
    index = slices(box, tuple(tensor.shape))
    return tensor if index is None else tensor[index]


def _selects(write: Write) -> bool:
    return any(isinstance(step, (Take, Reorder)) for step in write.steps)


def _mixed(name: str, what: str) -> Lowered:
    return Lowered(problems=(Problem("remap_mixed", f"{name} is {what}", source=name),))
