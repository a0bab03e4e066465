"""Write a port of a model that was inspected: its files, its known components and its git code."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from port_kit.errors import ScaffoldError
from port_kit.escape import escape_control_chars, quoted
from port_kit.inspect.pitfalls import several_sets
from port_kit.inspect.report import Finding, WeightFile
from port_kit.scaffold.common import common_values, media_values
from port_kit.scaffold.found_sizes import output_sizes
from port_kit.scaffold.found_values import Found, channels_expression, found_values
from port_kit.scaffold.git_code import FoundCode, find_code, named_code
from port_kit.scaffold.modality import FORMS, modality_values
from port_kit.scaffold.own_port import LAYOUTS, loading_values
from port_kit.scaffold.parts import Part, find_parts, left_out
from port_kit.scaffold.render import literal, render
from port_kit.scaffold.request import NewPort
from port_kit.scaffold.serving_files import serving_templates, serving_values
from port_kit.scaffold.source import Source, read_source

#: Templates of the package, of the files beside it, and of the tests: ``{file: template}``.
_PACKAGE = {
    "__init__": "own/__init__",
    "config": "found/config",
    "pipeline": "own/pipeline",
    "recipe": "found/recipe",
    "weights": "found/weights",
    "model/__init__": "own/model_init",
}
_TESTS = {
    "conftest": "common/conftest",
    "test_coverage": "found/test_coverage",
    "test_download": "common/test_download",
    "test_generate": "common/test_generate",
}
#: Tests of a transformer that is split by a plan, and of one that is ported.
_PLANNED = {"test_plan": "common/test_plan", "test_ranks": "common/test_ranks"}
_PORTED = {"test_cache": "own/test_cache", "test_parallel": "own/test_parallel"}
_SUGGEST = "port-kit rules suggest --port {0} --component {1} --source {0}/{1}.json -o {0}/{1}.toml"

#: Code of errors in generated files that wait for their author.
_UNFINISHED = "port_unfinished"


def found_files(port: NewPort, report: Callable[[str], None]) -> dict[str, str]:
    """Return the files of a port of an inspected model by their paths.

    Args:
        port: the request; it has a source.
        report: receives a line per file that is left out.

    Raises:
        InspectError: a source is no model.
        DownloadError: a source or the git code cannot be reached.
        ScaffoldError: weights that no recipe can use, no transformer, or no repository for a folder.
    """
    sources = list(_read(port))
    parts = find_parts(sources)
    for finding in left_out(sources):
        report(f"left out: {finding.file} {finding.fact}")
    weights = [file for part in parts if part.component for file in part.component.weights]
    _require_wrapper(port, weights)
    for finding in several_sets(weights):
        report(f"{finding.file} {finding.fact}")
    url = named_code(port, sources)
    code = find_code(port, url, parts) if url else None
    if code is not None:
        parts = [replace(part, parameters=code.signatures.get(part.name, {})) for part in parts]
    found = Found(port, parts, code)
    values = {**_common(found), **loading_values(port), **found_values(found)}
    values |= {"left_out": _left_out(left_out(sources)), "part_rows": _part_rows(found)}
    files = {path: render(template, values) for path, template in sorted(_templates(found).items())}
    return {**files, **_part_files(found, values)}


def _read(port: NewPort) -> Iterator[Source]:
    """Read the sources; folders take the repositories that were given, in their order."""
    given = iter(port.repositories)
    for target in port.sources:
        source = read_source(target, "", endpoint=port.endpoint, wrapper=port.wrapper)
        repository = source.repository or next(given, "")
        if not repository:
            raise ScaffoldError(
                f"{target} is a folder: expected the repository that has its files, found none",
                code="scaffold_unsupported",
                hint=f"port-kit new {port.name} --from {target} --repository OWNER/NAME",
            )
        yield replace(source, repository=repository)


def _require_wrapper(port: NewPort, weights: Sequence[WeightFile]) -> None:
    """Refuse a wrapper that selects nothing.

    Raises:
        ScaffoldError: ``scaffold_unsupported``.
    """
    if port.wrapper and not any(file.wrapper == port.wrapper for file in weights):
        known = sorted({wrapper for file in weights for wrapper in (file.wrapper, *file.alternatives) if wrapper})
        raise ScaffoldError(
            f"no pickle of {' and '.join(port.sources)} has tensors under {quoted(port.wrapper)}; there is: "
            f"{', '.join(known) or 'no wrapper'}",
            code="scaffold_unsupported",
            hint=f"port-kit inspect {port.source} lists the sets of tensors",
        )


def _common(found: Found) -> dict[str, str]:
    """Return the fields that follow from the request, the transformer and the code."""
    port, main = found.port, found.parts[0]
    form, sizes = FORMS[port.output], output_sizes(found.parts)
    tiny = dict(form.tiny)
    if "height" in tiny:
        tiny |= {"height": 4 * sizes["size_multiple"], "width": 6 * sizes["size_multiple"]}
    if "num_frames" in tiny:
        tiny |= {"num_frames": 1 + 2 * sizes["frame_step"]}
    planned = port.path == "external"
    original = "".join(f' / "{part}"' for part in _code_folder(found.code).split("/")) if found.code else ""
    return {
        **common_values(port, main.source, main.component.parameters if main.component else 0),
        **modality_values(port.output, **sizes, channels=channels_expression(main)),
        **serving_values(port.output, LAYOUTS),
        **media_values(takes_image=False),
        "path": port.path,
        "reference": f"`{found.code.code.url}` at `{found.code.code.commit}`" if found.code else "the original code",
        "reference_word": "original code",
        "tiny_request": literal(tiny, 4),
        "original_path": f"\nsys.path.append(str(ROOT{original}))" if original else "",
        "environment": f', environment={{"PYTHONPATH": str(ROOT{original})}}' if original else "",
        "expected_size": f"{tiny['width']}x{tiny['height']}" if "width" in tiny else form.expected,
        "checks": "Coverage of every published tensor; on a tiny model with seeded weights, on a CPU: download, ranks\n"
        f"against one, {form.text} through the engine.",
        "layouts": literal(LAYOUTS),
        "proven": literal(("tp2", "ulysses2")),
        "ranks": literal((1, 2)),
        "plan": '\n    plan="plan.toml",' if planned else "",
        "planned": "PlannedComponents, " if planned else "",
        "planned_import": "from port_kit.autoparallel.planned import PlannedComponents\n" if planned else "",
        "clone": _clone(found.code),
    }


def _clone(code: FoundCode | None) -> str:
    if code is None:
        return ""
    return f"    git clone {code.code.url} original && git -C original checkout {code.code.commit}\n"


def _code_folder(code: FoundCode) -> str:
    """Return the folder of the packages in a port with a clone of the code."""
    return f"original/{code.code.path}".rstrip("/")


def _templates(found: Found) -> dict[str, str]:
    """Return the templates by the paths of the files."""
    name, planned = found.port.name, found.port.path == "external"
    templates = {f"{name}/{part}.py": f"{template}.py" for part, template in _PACKAGE.items()}
    tests = {**_TESTS, **(_PLANNED if planned else _PORTED)}
    templates |= {f"tests/{part}.py": f"{template}.py" for part, template in tests.items()}
    if any(map(found.is_original, found.parts)):
        templates[f"{name}/model/original.py"] = "found/original.py"
    if found.is_compared:
        templates["tests/test_parity.py"] = "own/test_parity.py"
    if not planned and found.parts[0].is_own:
        templates[f"{name}/model/transformer.py"] = "own/transformer.py"
    templates |= serving_templates(found.port.output)
    return templates | {
        "README.md": "found/README.md",
        "CARD.md": "common/CARD.md",
        "pyproject.toml": "common/pyproject.toml",
        f"download_{name}.py": "common/download.py",
        f"generate_{name}.py": "common/generate.py",
    }


def _part_files(found: Found, values: Mapping[str, str]) -> dict[str, str]:
    """Return the files of each part that the port brings: its tensors, its rules and its module."""
    name, files = found.port.name, {}
    for part in found.listed:
        files[f"{name}/{part.name}.json"] = _tensors(part)
    for part in found.ruled:
        fields = {**values, "part": part.name, "suggest": _SUGGEST.format(name, part.name)}
        files[f"{name}/{part.name}.toml"] = render("found/rules.toml", fields)
    for part in (part for part in found.parts if part.is_own):
        template = found.module_template(part)
        if template:
            files[f"{name}/model/{part.name}.py"] = render(template, {**values, **_module_values(found, part)})
    return files


def _module_values(found: Found, part: Part) -> dict[str, str]:
    """Return the fields of a part's module: the class of the git code, or an error that says what is left to do."""
    name = found.port.name
    module, _, class_name = found.class_of(part).partition(":")
    if found.is_original(part):
        return {
            "part": part.name,
            "origin": ", from the model's own repository",
            "error_import": "",
            "original_import": f"\nfrom {name}.model.original import original\n"[part.kind == "transformer" :],
            "build_body": f'    return original("{module}").{class_name}(**config)',
        }
    return {
        "part": part.name,
        "origin": "",
        "error_import": "from port_kit.errors import PortKitError\n",
        "original_import": "",
        "build_body": "    raise PortKitError(\n"
        f'        "the {part.name} has no module yet; its tensors are listed in {part.name}.json",\n'
        f'        code="{_UNFINISHED}",\n'
        f'        hint="return the module from build_{part.name} in {name}/model/{part.name}.py",\n    )',
    }


def _tensors(part: Part) -> str:
    """Return the names, shapes and dtypes of a part, a line each."""
    manifest: Any = part.component.manifest if part.component else {}
    lines = (f" {json.dumps(name)}: {json.dumps(entry)}" for name, entry in manifest.to_json().items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _left_out(findings: Sequence[Finding]) -> str:
    if not findings:
        return ""
    rows = "\n".join(f"| `{_cell(finding.file)}` | {_cell(finding.fact)} |" for finding in findings)
    return f"\n## Files that no recipe can use\n\n| file | why |\n|---|---|\n{rows}\n"


def _cell(text: str) -> str:
    """Return a text as a cell of a table."""
    return escape_control_chars(text).replace("|", "\\|")


def _part_rows(found: Found) -> str:
    rows = []
    for part in found.parts:
        patterns = ", ".join(f"`{_cell(rule.pattern)}`" for rule in part.rules)
        rows.append(f"| `{part.name}` | {patterns} of `{part.source.repository}` | {found.module_text(part)} |")
    return "\n".join(rows)
