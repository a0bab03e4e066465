"""Coverage of a checkpoint by the rules of a plan, at full size, from names and shapes alone."""

from __future__ import annotations

from typing import Any

import torch

from port_kit.autoparallel.plan import Plan
from port_kit.autoparallel.ports import plan_file
from port_kit.autoparallel.tensor.apply import apply_tensor_parallelism
from port_kit.autoparallel.tensor.weights import weight_rules
from port_kit.manifest import Manifest
from port_kit.parallel.meta_init import meta_init
from port_kit.port import Port, resolve
from port_kit.remap.coverage import Coverage, coverage


def planned_coverage(port: Port, component: str, ranks: int = 1) -> Coverage:
    """Check that the rules of a port's plan fill every parameter of a component from every weight of the module.

    Args:
        port: has a plan.
        component: an unmodified module.
        ranks: tensor-parallel size; the rules are those of its first rank.

    Raises:
        ParallelError: ``plan_degree``, ``plan_refused``, ``plan_pattern``; the plan cannot be applied.
    """
    part, plan = port.component(component), Plan.load(plan_file(port))
    build: Any = resolve(part.build)
    config: Any = resolve(part.config)
    with meta_init(torch.float32):
        source = Manifest.from_module(build(config))
    with meta_init(torch.float32, ranks):
        module = build(config)
        applied = apply_tensor_parallelism(module, plan, prefix=component)
        return coverage(weight_rules(applied, plan.subject), source, Manifest.from_module(module))
