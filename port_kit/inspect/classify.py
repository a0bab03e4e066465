"""Classification of a model into one of four paths. Every finding names the file that it is based on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from port_kit.checkpoint.configuration import CONFIG_NAME, changed_values
from port_kit.download.recipe import Recipe
from port_kit.escape import quoted
from port_kit.inspect.components import CONFIGS, INDEXES, has_weights, index_path, is_denoiser
from port_kit.inspect.documents import Documents
from port_kit.inspect.known_classes import diffusers_names, library_version, omni
from port_kit.inspect.parallel_plans import describe_plan
from port_kit.inspect.report import Component, Finding, ModelPath
from port_kit.inspect.roles import find_roles
from port_kit.port import Port, lookup, resolve
from port_kit.registry import list_ports

#: Values of a configuration that a finding shows.
_SHOWN = 3
_ADAPTER = "DiffusersAdapterPipeline"


@dataclass(frozen=True)
class Classification:
    """The path of a model and the evidence for it.

    Attributes:
        path: see :data:`~port_kit.inspect.report.ModelPath`.
        class_name: the pipeline's class, or empty.
        evidence: in the order of the decision.
        stage: the key of a multi-stage pipeline that serves it, or empty.
        port: the port that takes files of this repository, or empty; with the option for another checkpoint than the
            default one.
    """

    path: ModelPath
    class_name: str
    evidence: tuple[Finding, ...]
    stage: str = ""
    port: str = ""


def classify(documents: Documents, components: list[Component]) -> Classification:
    """Classify a model by the registries, then by its index and the classes of its components."""
    evidence: list[Finding] = []
    taking = list(_ports_that_take(documents.listing.name))
    evidence += [finding for _, finding in taking]
    port = taking[0][0] if taking else ""
    hidden = _hidden(documents)
    if hidden:
        return Classification(
            "unknown",
            "",
            (*evidence, Finding(hidden, "is required to classify the model, but the repository is gated")),
            port=port,
        )
    class_name, source = _pipeline_class(documents, evidence)
    stage = _stage(documents)
    if stage:
        evidence.append(Finding("config.json", f"model_type {stage} is a multi-stage pipeline of {_omni()}"))
    elif class_name in omni().stage_classes:
        stage = omni().stage_classes[class_name]
        evidence.append(Finding(source, f"{class_name} is the multi-stage pipeline {stage} of {_omni()}"))
    served = [Finding(source, by) for by in _served_by(class_name)]
    if served or stage:
        served += [finding for port in list_ports().values() for finding in _other_sizes(documents, port, class_name)]
        return Classification("supported", class_name, (*evidence, *served), stage, port)
    if class_name:
        evidence.append(Finding(source, f"{class_name} is neither in {_omni()}'s registry nor a port's pipeline"))
        word = "is" if class_name in diffusers_names() else "is not"
        evidence.append(Finding(source, f"{class_name} {word} in {library_version('diffusers')}"))
    evidence += [*_classes(components), *find_roles(documents, components)]
    path = _path(documents, class_name, components)
    return Classification(path, class_name, (*evidence, *_ways_to_run(path, components)), port=port)


def _ways_to_run(path: ModelPath, components: list[Component]) -> Iterator[Finding]:
    """Yield the findings about running a pipeline of diffusers: its plan, and vLLM-Omni's adapter."""
    if path != "diffusers":
        return
    for part in components:
        if is_denoiser(part.name):
            yield Finding(part.source, f"{part.name}: {describe_plan(part.class_name)}")
    if _ADAPTER in omni().pipelines:
        yield Finding(
            _omni(),
            "its diffusers adapter runs the pipeline unchanged (diffusion_load_format='diffusers'), without tensor, "
            "sequence and guidance parallelism, caches and offload",
        )


def _hidden(documents: Documents) -> str:
    """Return the first file that is required to classify the model and that the gate hides, or an empty string."""
    if not documents.listing.gate:
        return ""
    return next((path for path in documents.listing.files if path.rpartition("/")[2] in (*INDEXES, *CONFIGS)), "")


def _pipeline_class(documents: Documents, evidence: list[Finding]) -> tuple[str, str]:
    """Return the pipeline's class and the file that says so, as vLLM-Omni looks for it: the index, then config.json."""
    path = index_path(documents)
    if path:
        name = documents.object(path).get("_class_name")
        if isinstance(name, str) and name:
            return name, path
        evidence.append(Finding(path, "names no _class_name"))
        return "", path
    evidence.append(Finding("model_index.json", "is not there"))
    return _class_of_root_config(documents.object("config.json")), "config.json"


def _class_of_root_config(config: dict[str, Any]) -> str:
    """Return the pipeline class that vLLM-Omni selects for a root ``config.json``, or an empty string."""
    listed = config.get("architectures")
    architectures = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    by_type = omni().by_model_type.get(str(config.get("model_type"))) if config else None
    by_architecture = [omni().by_architecture[name] for name in architectures if name in omni().by_architecture]
    served = [name for name in architectures if len(architectures) == 1 and name in omni().pipelines]
    return next(iter([*filter(None, [by_type]), *by_architecture, *served]), "")


def _stage(documents: Documents) -> str:
    """The multi-stage pipeline that the root's ``model_type`` selects."""
    model_type = documents.object("config.json").get("model_type")
    return model_type if isinstance(model_type, str) and model_type in omni().stages else ""


def _served_by(class_name: str) -> Iterator[str]:
    if class_name and class_name in omni().pipelines:
        yield f"{class_name} is in {_omni()}'s registry ({omni().pipelines[class_name]})"
    for port in list_ports().values():
        if class_name == port.class_name:
            yield f"{class_name} is the pipeline of the port {port.name}"


def _other_sizes(documents: Documents, port: Port, class_name: str) -> Iterator[Finding]:
    """Yield the components of a port's model directory whose configuration differs from full size."""
    if port.class_name != class_name:
        return
    for component in port.components:
        path = f"{component.name}/{CONFIG_NAME}"
        config = documents.object(path)
        full: Any = lookup(component.config)
        changed = changed_values(full or {}, config)
        if changed:
            shown = [f"{key} {value} (full size: {at_full})" for key, (value, at_full) in changed.items()]
            yield Finding(
                path, f"differs from the port's: {', '.join(shown[:_SHOWN])}{' ...' if shown[_SHOWN:] else ''}"
            )


def _ports_that_take(repo_id: str) -> Iterator[tuple[str, Finding]]:
    """Yield the ports with a recipe that uses this repository's transformer, as arguments of a download."""
    for port in list_ports().values():
        recipes = {port.name: port.recipe}
        recipes |= {f"{port.name} --variant {name}": entry for name, entry in port.variants.items()}
        taken = ((words, _transformer_files(recipe, repo_id)) for words, recipe in recipes.items())
        words, patterns = next((found for found in taken if found[1]), ("", ""))
        if words:
            yield words, Finding(patterns, f"becomes the transformer of the port {port.name}")


def _transformer_files(reference: str, repo_id: str) -> str:
    """Return the files of a repository that a recipe makes the transformer of; empty if there are none."""
    repositories = [one for one in _recipe(reference).repositories if one.repo_id == repo_id]
    return ", ".join(rule.pattern for one in repositories for rule in one.files if rule.folder == "transformer")


def _recipe(reference: str) -> Recipe:
    recipe = resolve(reference)
    if not isinstance(recipe, Recipe):
        raise TypeError(f"{reference} is a {type(recipe).__name__}, not a Recipe")
    return recipe


def _classes(components: list[Component]) -> Iterator[Finding]:
    for part in components:
        if part.recognized is not None:
            yield Finding(_place(part), f"{part.name}: its tensors are those of {part.recognized.text}")
        elif not part.class_name:
            yield Finding(_place(part), f"{part.name}: nothing names its class")
        else:
            yield Finding(part.source, f"{part.name}: {part.class_name} {_origin(part)}")


def _origin(part: Component) -> str:
    if part.library in ("diffusers", "transformers"):
        return f"{'is' if part.known else 'is not'} in {library_version(part.library)}"
    if part.known:
        return f"is in {library_version('diffusers')} (pipelines/{part.library})"
    return f"comes from {quoted(part.library)}, the model's own code"


def _place(part: Component) -> str:
    return part.weights[0].path if part.weights else f"{part.name}/"


def _path(documents: Documents, class_name: str, components: list[Component]) -> ModelPath:
    """Return the path of a model that neither vLLM-Omni nor a port serves."""
    own = [part for part in components if has_weights(part.class_name) and not part.known]
    of_diffusers = [part for part in components if part.known and part.library != "transformers"]
    if index_path(documents) and class_name in diffusers_names() and components and not own:
        return "diffusers"
    return "hybrid" if of_diffusers else "custom"


def _omni() -> str:
    return f"vLLM-Omni {omni().version}"
