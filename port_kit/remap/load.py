"""Loading from a stream of named tensors: each is copied into its place, and coverage is verified at the end.

If the headers of the checkpoint are known, the plan is compiled from them, and problems are raised before the first
tensor is read. Otherwise the same plan is built tensor by tensor, and is checked for completeness at the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from port_kit.manifest import Manifest, TensorSpec
from port_kit.regions import Shape
from port_kit.remap.executor import Executor
from port_kit.remap.plan import PlanBuilder, check
from port_kit.remap.problems import Problem, raise_problems, remap_error
from port_kit.remap.resolve import CopyTask, Resolver
from port_kit.remap.rule import Rules, Sizes
from port_kit.targets import Targets, read_targets

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

#: Bytes of parts that may wait for the others of their group.
MAX_WAITING = 8 << 30


def load_weights(
    module: nn.Module,
    weights: Iterable[tuple[str, Tensor]],
    rules: Rules,
    *,
    sizes: Sizes | None = None,
    prefix: str = "",
    folder: str | Path | None = None,
    allow_downcast: bool = True,
    converted: bool | None = None,
) -> set[str]:
    """Fill a module from a stream of named tensors.

    Args:
        module: its parameters and persistent buffers are written in place. Parameters with a ``weight_loader`` get
            complete shards through it, so that tensor parallelism and quantization work as in vLLM's own models.
        weights: ``(name, tensor)`` in any order; names may start with ``prefix``. A tensor that has to wait for others
            is copied, so that a stream may reuse its buffers.
        rules, sizes: the rules, and named sizes on top of their own.
        prefix: prefix of the returned names.
        folder: the folder or file that the stream reads; its headers are checked before the first tensor, and errors
            name the file of a tensor.
        allow_downcast: floating-point values may be rounded to the module's dtype. A finite value that becomes infinite
            is an error in any case.
        converted: the tensors have the target's names, and rules are not applied; by default as ``folder`` records it.

    Returns:
        Names of the targets that are loaded (or kept with a reason), with ``prefix``.

    Raises:
        RemapError: with every gap in ``details["problems"]``; see :meth:`port_kit.remap.rules.RuleSet.compile`.
    """
    loader = WeightLoader(
        module, rules, sizes=sizes, prefix=prefix, folder=folder, allow_downcast=allow_downcast, converted=converted
    )
    for name, tensor in weights:
        loader.feed(name, tensor)
    return loader.finish()


def load_components(
    parts: Mapping[str, tuple[nn.Module, Rules]],
    weights: Iterable[tuple[str, Tensor]],
    *,
    sizes: Sizes | None = None,
    model: str | Path | None = None,
    allow_downcast: bool = True,
) -> set[str]:
    """Fill several components from one stream whose names start with the component's name and a dot.

    Args:
        parts: ``{component: (module, rules)}``.
        weights: the stream of a pipeline's ``load_weights``, all components in any order.
        sizes: named sizes of all components.
        model: the model directory, whose headers are checked first.
        allow_downcast: as for :func:`load_weights`.

    Returns:
        Names of the loaded targets, with the component's name.

    Raises:
        RemapError: as :func:`load_weights`; ``remap_unexpected`` for a name of no component.
    """
    loaders = {}
    for name, (module, rules) in parts.items():
        folder = Path(model) / name if model is not None else None
        loaders[name] = WeightLoader(
            module, rules, sizes=sizes, prefix=f"{name}.", folder=folder, allow_downcast=allow_downcast
        )
    for name, tensor in weights:
        component = name.partition(".")[0]
        if component not in loaders:
            problem = Problem("remap_unexpected", f"{name} belongs to no component: {', '.join(parts)}", source=name)
            raise_problems([problem], "weights")
        loaders[component].feed(name, tensor)
    return set().union(*[loader.finish() for loader in loaders.values()])


def target_manifest(module: nn.Module, targets: Targets) -> Manifest:
    """Return the manifest of a module whose targets have been read."""
    specs = {name: target.spec for name, target in targets.targets.items()}
    return Manifest(specs, origin=type(module).__name__, aliases=targets.aliases)


class _Ahead(NamedTuple):
    """A source that is expected because an earlier layer has it; between large copies, resolving it takes longer.

    Attributes:
        shape, dtype, spec: those of the earlier layer's source, and of this one unless it has to be resolved again.
        target: the parameter or buffer that it fills.
        region: the index of the elements that it fills, empty for all of them.
    """

    shape: Shape
    dtype: torch.dtype
    spec: TensorSpec
    target: Tensor
    region: tuple[slice, ...]


class WeightLoader:
    """A load in progress: :meth:`feed` tensors, then :meth:`finish`. Arguments as for :func:`load_weights`."""

    def __init__(
        self,
        module: nn.Module,
        rules: Rules,
        *,
        sizes: Sizes | None = None,
        prefix: str = "",
        folder: str | Path | None = None,
        allow_downcast: bool = True,
        converted: bool | None = None,
    ) -> None:
        import torch

        found = read_targets(module)
        self._rules, self._prefix = rules, prefix
        self._target = target_manifest(module, found)
        naming = "" if converted is None else "converted" if converted else "original"
        self._resolver = Resolver(rules, self._target, sizes or {}, allow_downcast=allow_downcast, opaque=found.opaque)
        self._builder = PlanBuilder(rules, self._target, self._resolver, naming)
        self._executor = Executor(found.targets, self._resolver.target)
        self._pending = self._builder.pending
        self._planned: dict[str, list[list[CopyTask]]] | None = None
        self._specs: Mapping[str, TensorSpec] = {}
        self._known_specs: dict[object, TensorSpec] = {}
        self._dense = torch.strided
        self._ahead: dict[str, _Ahead] = {}
        self._waiting: dict[str, Tensor] = {}
        self._seen: dict[str, _Ahead | None] = {}
        self._problems: list[Problem] = []
        if folder is not None:
            source = Manifest.from_checkpoint(folder)
            source.naming = naming or source.naming
            plan = check(rules, source, self._target, resolver=self._resolver)
            raise_problems(plan.explained(), f"{rules.name} does not map {folder} completely")
            groups, tasks = plan.joined(), plan.by_source()
            self._specs = source
            self._planned = {
                name: [groups[key] if key in groups else [task] for key, task in keyed.items()]
                for name in source
                for keyed in [{task if task.join is None else task.group: task for task in tasks.get(name, [])}]
            }
            self._pending = {name: len(found) for name, found in self._planned.items()}

    def feed(self, name: str, tensor: Tensor) -> None:
        """Copy one tensor to its places; gaps are reported by :meth:`finish`."""
        name = name.removeprefix(self._prefix)
        if name in self._seen:
            self._problems.append(Problem("remap_collision", f"{name} comes twice", source=name))
            return
        self._seen[name] = ahead = self._ahead.pop(name, None)
        if tensor.is_meta or tensor.layout is not self._dense:
            kind = "one on the meta device" if tensor.is_meta else str(tensor.layout).removeprefix("torch.")
            raise remap_error("remap_tensor", f"{name}: expected a dense tensor, found {kind}")
        if tensor.requires_grad:
            tensor = tensor.detach()
        if ahead is not None:
            if tensor.shape == ahead.shape and tensor.dtype == ahead.dtype:
                memory = ahead.target.data
                (memory[ahead.region] if ahead.region else memory).copy_(tensor)
                return
            self._seen[name] = None
        for group in self._ready(name, tensor):
            if len(group) == 1 and group[0].source == name:
                self._executor.copy(group[0], tensor)
            else:
                self._executor.run(group, {task.source: self._waiting.get(task.source, tensor) for task in group})
            for source in {task.source for task in group} if self._planned is not None else ():
                self._pending[source] -= 1
        if self._pending.get(name):
            self._hold(name, tensor)
        if self._waiting:
            self._waiting = {held: kept for held, kept in self._waiting.items() if self._pending.get(held)}

    def _ready(self, name: str, tensor: Tensor) -> list[list[CopyTask]]:
        """Return the groups of tasks whose sources have all arrived, this one last."""
        spec = self._known_specs.get((tensor.shape, tensor.dtype))
        if spec is None:
            spec = TensorSpec(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            self._known_specs[tensor.shape, tensor.dtype] = spec
        if self._planned is None:
            ready = self._builder.add(name, spec)
            index = self._executor.plain_index(ready[0][0], tensor.dtype) if self._builder.layers else None
            if index is not None:
                for task in self._builder.layers:
                    target = self._executor.targets[task.target].tensor
                    self._ahead[task.source] = _Ahead(tensor.shape, tensor.dtype, spec, target, index)
            return ready
        planned = self._specs.get(name)
        if planned is None:
            self._problems.append(Problem("remap_unexpected", f"{name} is not in the headers", source=name))
            return []
        if (planned.shape, planned.dtype) != (spec.shape, spec.dtype):  # changed since the headers were read
            found = self._resolver.resolve(name, spec)
            self._problems += found.problems
            self._planned[name] = [[task] for task in found.tasks if not found.problems]
            self._pending[name] = len(self._planned[name])
        arrived = {name, *self._waiting}
        return [group for group in self._planned[name] if arrived.issuperset(task.source for task in group)]

    def _hold(self, name: str, tensor: Tensor) -> None:
        """Keep a copy of a tensor until its partners arrive; the stream may reuse its memory."""
        self._waiting[name] = tensor.clone()
        size = sum(part.nbytes for part in self._waiting.values())
        if size > MAX_WAITING:
            message = f"{len(self._waiting)} tensors wait for the other parts of their targets"
            found = f"expected at most {MAX_WAITING:,} bytes, found {size:,}; first: {next(iter(self._waiting))}"
            hint = "give concat its sizes, so that parts need not wait for each other"
            raise remap_error("remap_incomplete_group", f"{message}: {found}", hint)

    def finish(self) -> set[str]:
        """Verify that everything arrived.

        Returns:
            Names of the loaded targets, with the prefix.

        Raises:
            RemapError: with every gap.
        """
        problems = [*self._problems, *self._executor.problems]
        if self._planned is None:
            for name, ahead in self._seen.items():
                if ahead is not None:
                    self._builder.add(name, ahead.spec)
            problems += self._builder.finish().explained()
        for name in self._planned or ():
            if name not in self._seen:
                message, file = f"{name} is not in the stream", self._specs[name].file
                problems.append(Problem("remap_missing", message, source=name, file=file))
        raise_problems(problems, f"{self._rules.name} does not load {self._target.origin} completely")
        return {self._prefix + name for name in self._target}
