"""Write a port that runs a pipeline of diffusers unchanged: names, a recipe and a parallel plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from port_kit.autoparallel.host.files import SUFFIXES
from port_kit.autoparallel.host.index import PipelineIndex
from port_kit.autoparallel.host.request import MEDIA
from port_kit.autoparallel.plan import Plan
from port_kit.autoparallel.tiny_pipelines import CASES, TinyPipeline
from port_kit.errors import ScaffoldError
from port_kit.inspect import Component
from port_kit.inspect.known_classes import diffusers_names, library_version
from port_kit.scaffold.common import common_values, media_values
from port_kit.scaffold.modality import FORMS
from port_kit.scaffold.pipeline_files import file_rules
from port_kit.scaffold.plans import plan_of_class, tested_layouts
from port_kit.scaffold.render import literal, render
from port_kit.scaffold.request import NewPort
from port_kit.scaffold.serving_files import serving_templates, serving_values
from port_kit.scaffold.source import Source, read_source

#: Tests that need a tiny pipeline.
_TINY_TESTS = ("test_download", "test_ranks", "test_generate")
#: Numbers of a pipeline's call that requests set in another way, or not at all.
_NOT_OPTIONS = {
    *("height", "width", "num_frames", "num_inference_steps", "guidance_scale", "callback_steps"),
    *("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt"),
}

_NO_TINY = """
There is no tiny pipeline of this class. `--tiny` and `port-kit verify parallel` need one: `tiny_model` of `PORT`."""

_NO_REPOSITORY = """
`recipe.py` was read from a folder: name the repository that has its files, and a revision."""


def hosted_files(port: NewPort, report: Callable[[str], None]) -> dict[str, str]:
    """Return a port's files by their paths.

    Args:
        port: the request; its source is a pipeline of diffusers.
        report: receives a line per step of the inference.

    Raises:
        ScaffoldError: the source is no pipeline of diffusers, its weights cannot be read, or nothing is proven.
        ParallelError: no plan can be inferred for the class of its transformer.
        InspectError: what ``--from`` names is no model, or has no transformer.
        DownloadError: it cannot be reached.
    """
    source = read_source(port.source, next(iter(port.repositories), f"your-org/{port.name}"), endpoint=port.endpoint)
    index = _index(port, source)
    plan = plan_of_class(index.components[index.denoisers[0]], report)
    case = CASES.get(index.pipeline_class.__name__) if "prompt" in index.parameters else None
    values = {
        **common_values(port, source, sum(part.parameters for part in _transformers(source, index))),
        **_port_values(index, case),
        **_recipe_values(port, source, index),
        **_test_values(plan, case, index, source),
        **serving_values(index.output_type, tested_layouts(plan), takes_image=_takes_image(index)),
    }
    templates = _templates(port.name, case) | serving_templates(index.output_type, takes_image=_takes_image(index))
    files = {path: render(template, values) for path, template in sorted(templates.items())}
    return {**files, f"{port.name}/plan.toml": plan.to_toml()}


def _templates(name: str, case: TinyPipeline | None) -> dict[str, str]:
    templates = {f"{name}/{part}.py": f"hosted/{part}.py" for part in ("__init__", "config", "recipe")}
    templates |= {f"tests/{part}.py": f"common/{part}.py" for part in ("conftest", *(_TINY_TESTS if case else ()))}
    return templates | {
        "tests/test_plan.py": "common/test_plan.py",
        "README.md": "hosted/README.md",
        "CARD.md": "common/CARD.md",
        "pyproject.toml": "common/pyproject.toml",
        f"download_{name}.py": "common/download.py",
        f"generate_{name}.py": "common/generate.py",
    }


def _index(port: NewPort, source: Source) -> PipelineIndex:
    if source.inspection is None:
        raise ScaffoldError(
            "--path diffusers needs a pipeline; --from is not given",
            code="scaffold_unsupported",
            hint=f"port-kit new {port.name} --from REPO_OR_DIR",
        )
    if source.inspection.class_name not in diffusers_names() or not source.index:
        found = source.inspection.class_name or "no class in model_index.json"
        raise ScaffoldError(
            f"{port.source}: expected a pipeline of {library_version('diffusers')}, found {found}",
            code="scaffold_unsupported",
            hint=f"take --path {'hybrid' if source.inspection.path == 'hybrid' else 'custom'}",
        )
    return PipelineIndex.from_index(Path(port.source), source.index)


def _transformers(source: Source, index: PipelineIndex) -> list[Component]:
    """Return the first of the components that guidance calls."""
    found = source.inspection.component(index.denoisers[0]) if source.inspection else None
    return [found] if found else []


def _port_values(index: PipelineIndex, case: TinyPipeline | None) -> dict[str, str]:
    """Return the entries of ``PORT``."""
    options = {
        name: type(parameter.default).__name__
        for name, parameter in index.parameters.items()
        if type(parameter.default) in (int, float) and name not in _NOT_OPTIONS
    }
    denoisers = tuple(index.denoisers)
    hosted, output = index.pipeline_class.__name__, index.output_type
    words = {"video": "a video", "image": "a picture", "audio": "a sound"}
    return {
        "hosted": hosted,
        "transformer": index.components[denoisers[0]],
        "path": f"diffusers ({hosted})",
        "reference": f"{library_version('diffusers')}, `{hosted}`, which runs unchanged",
        "output": output,
        "output_text": words[output],
        "output_word": words[output].replace(" ", "_"),
        "suffix": SUFFIXES[output].removeprefix("."),
        "denoisers": "" if denoisers == ("transformer",) else f"    denoisers={literal(denoisers)},\n",
        "references": _references(index.output_type) if _takes_image(index) else "",
        "example_prompt": FORMS[output].example_prompt,
        "request_options": f"    request_options={literal(options, 4)},\n" if options else "",
        "tiny": f"    tiny={literal(_tiny_request(case), 4)},\n" if case else "",
    }


def _takes_image(index: PipelineIndex) -> bool:
    return any(name in index.parameters for name in MEDIA["image"])


def _references(output: str) -> str:
    """Return the entries of a pipeline that takes an image; of a video, it is the first frame."""
    return '    references=("image",),\n' + ("    first_frame=True,\n" if output == "video" else "")


def _tiny_request(case: TinyPipeline) -> Mapping[str, Any]:
    return {**case.sampling, "extra_args": dict(case.arguments)} if case.arguments else dict(case.sampling)


def _recipe_values(port: NewPort, source: Source, index: PipelineIndex) -> dict[str, str]:
    own = {**source.index, "_class_name": port.pipeline_class}
    own.setdefault("_diffusers_version", library_version("diffusers").partition(" ")[2])
    folders = [name for name in index.components if any(path.startswith(f"{name}/") for path in source.listed)]
    denoisers = {name: literal(source.configs[f"{name}/config.json"]) for name in index.denoisers}
    configs = (f"{name.upper()}_CONFIG: Mapping[str, Any] = {values}" for name, values in denoisers.items())
    return {
        "files": file_rules(source, folders),
        "model_index": literal(own, 4),
        "configs": "\n".join(configs),
    }


def _test_values(plan: Plan, case: TinyPipeline | None, index: PipelineIndex, source: Source) -> dict[str, str]:
    layouts = tested_layouts(plan)
    guided = ("cfg2",) if case and case.branches > 1 else ()
    checked = "tiny model: download, two ranks, the engine" if case else "tiny transformer: two ranks"
    expected = " s at " if index.output_type == "audio" else ""
    if case and not expected:
        expected = f"{case.sampling['width']}x{case.sampling['height']}"
    return {
        "layouts": literal((*layouts, *guided)),
        "proven": literal(layouts),
        "ranks": literal((1, 2) if "tp2" in layouts else (1,)),
        "expected_size": expected,
        **media_values(takes_image=bool(case and case.image)),
        "environment": "",
        "original_path": "",
        "checked": checked,
        "checks": f"On a CPU, with a {checked}; coverage of every weight at full size; age of the plan.",
        "notes": ("" if case else _NO_TINY) + ("" if source.revision else _NO_REPOSITORY),
    }
