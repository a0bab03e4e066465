"""Plans that are shipped with the kit, one per class of diffusers, and those that were inferred on this machine.

A plan holds for the source that it was inferred from. It records a fingerprint: a digest of the file of the class and
of all files of the same package that it imports.
"""

from __future__ import annotations

import ast
import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.util import find_spec, resolve_name
from pathlib import Path

from port_kit.autoparallel.infer import infer_plan
from port_kit.autoparallel.plan import Plan
from port_kit.autoparallel.prove import prove_plan, with_proofs
from port_kit.autoparallel.subject import load_subject
from port_kit.errors import ParallelError
from port_kit.files import os_errors_as

logger = logging.getLogger(__name__)

#: Folder of the shipped plans.
SHIPPED = Path(__file__).with_name("plans")
#: Characters of a fingerprint.
_DIGITS = 16


def fingerprint(module_class: str) -> str:
    """Return the digest of the source of a class, and of what it imports from its package, without importing it.

    Args:
        module_class: qualified name, such as ``diffusers.models.transformers.transformer_flux.FluxTransformer2DModel``.

    Raises:
        ParallelError: ``plan_subject``; its module has no source file.
    """
    files: dict[str, bytes] = {}
    _collect(module_class.rpartition(".")[0], files, {})
    if not files:
        raise ParallelError(
            f"{module_class}: its module has no source file", code="plan_subject", hint="name a class of a package"
        )
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + files[name] + b"\0")
    return digest.hexdigest()[:_DIGITS]


def _collect(module: str, files: dict[str, bytes], paths: dict[str, Path | None]) -> None:
    """Add the source of a module and of the modules of its package that it imports by name.

    Args:
        module: a name; an attribute of a package is left out.
        files: sources by module.
        paths: results of :func:`_source` by name.
    """
    path = _look_up(module, paths)
    if module in files or path is None:
        return
    files[module] = source = path.read_bytes()
    if path.name == "__init__.py":  # its imports serve others
        return
    for base, attributes in _imports(module, source):
        _collect(base, files, paths)
        found = _look_up(base, paths)
        if found is None or found.name == "__init__.py":  # to look for modules in another file would import it
            for attribute in attributes:
                _collect(f"{base}.{attribute}", files, paths)


@lru_cache(maxsize=1024)  # plans of one library share most modules
def _imports(module: str, source: bytes) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return the modules of its own package from which a source imports, with the imported names."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            relative = "." * node.level + (node.module or "")
            base = resolve_name(relative, module.rpartition(".")[0]) if node.level else relative
            if base.partition(".")[0] == module.partition(".")[0]:
                found.append((base, tuple(alias.name for alias in node.names)))
    return tuple(found)


def _look_up(module: str, paths: dict[str, Path | None]) -> Path | None:
    if module not in paths:
        paths[module] = _source(module)
    return paths[module]


def _source(module: str) -> Path | None:
    """Return the file of a module; None for other names. The packages above it are imported."""
    try:
        spec = find_spec(module)
    except (ImportError, ValueError):  # an attribute of a module, not a module
        return None
    path = Path(spec.origin) if spec is not None and spec.origin else None
    return path if path is not None and path.suffix == ".py" and path.is_file() else None


def check_fresh(plan: Plan, origin: str) -> None:
    """Check that the source of a plan's class is the one that it was inferred from.

    Args:
        plan: the plan; one without a fingerprint is accepted.
        origin: name of the plan in the message.

    Raises:
        ParallelError: ``plan_stale``.
    """
    if plan.fingerprint and plan.fingerprint != (found := fingerprint(plan.module_class)):
        versions = ", ".join(f"{name} {version}" for name, version in plan.versions.items())
        raise ParallelError(
            f"{origin}: the source of {plan.module_class} has changed since the plan was inferred with {versions}",
            code="plan_stale",
            hint=f"port-kit plan infer {plan.subject} -o plan.toml, then port-kit plan prove plan.toml --write",
            expected=plan.fingerprint,
            found=found,
        )


def shipped_plan(class_name: str) -> Path | None:
    """Return the shipped plan of a class, or None.

    Raises:
        ParallelError: ``plan_stale``; diffusers has another source.
    """
    path = SHIPPED / f"{class_name}.toml"
    if not path.is_file():
        return None
    check_fresh(Plan.load(path), path.name)
    return path


def make_plan(class_name: str, layouts: Sequence[str], folder: Path, *, report: Callable[[str], None]) -> Path:
    """Infer and prove the plan of a class of diffusers, and write it; return its path.

    Args:
        class_name: has a case in :mod:`port_kit.autoparallel.diffusers_cases`.
        layouts: are proven.
        folder: folder of the file.
        report: receives a line per step.

    Raises:
        ParallelError: ``plan_subject``, ``plan_inference``.
    """
    plan = proven_plan(class_name, layouts, report=report)
    path = folder / f"{class_name}.toml"
    with os_errors_as(path):
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(plan.to_toml(), encoding="utf-8")
    return path


def proven_plan(reference: str, layouts: Sequence[str], *, report: Callable[[str], None]) -> Plan:
    """Infer the plan of a subject, and prove it; return it with the proofs of the layouts that could be proven.

    Args:
        reference: class of diffusers with a case, or ``package.module:function``.
        layouts: are proven.
        report: receives a line per step.

    Raises:
        ParallelError: ``plan_subject``, ``plan_inference``.
    """
    subject = load_subject(reference)
    report(f"{reference}: inferring a plan")
    plan = infer_plan(subject)
    report(f"{reference}: proving {', '.join(layouts)}")
    results = prove_plan(subject, plan, layouts)
    for result in results:
        report(f"{reference}: {result.layout} {'proven' if result.proven else 'not proven: ' + result.reason}")
    return with_proofs(plan, results).model_copy(update={"fingerprint": fingerprint(plan.module_class)})


def local_plan(class_name: str, layout: str, *, report: Callable[[str], None]) -> Path:
    """Return a plan of a class that was made on this machine and proves a layout; make it if there is none.

    It is kept under ``$XDG_CACHE_HOME/port_kit/plans``.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "port_kit", "plans")
    path = cache / f"{class_name}.toml"
    if path.is_file():
        plan = Plan.load(path)
        tried = any(proof.layout == layout for proof in plan.proofs)
        if tried and plan.fingerprint == fingerprint(plan.module_class):
            return path
    return make_plan(class_name, [layout], cache, report=report)
