"""Detection of missing or damaged files that vLLM-Omni requires."""

from __future__ import annotations

import re
from collections.abc import Iterator

from port_kit.escape import quoted
from port_kit.inspect.checkpoint_files import Index, group, missing_shards, read_index
from port_kit.inspect.classify import Classification
from port_kit.inspect.components import has_weights, index_path, named_by_index
from port_kit.inspect.documents import Documents
from port_kit.inspect.report import Component, Finding, WeightFile

#: Names of files that make a tokenizer.
TOKENIZER_FILES = {
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
}
#: Words in names of text encoders; a folder or file of that name needs a tokenizer beside it.
_TEXT_ENCODER = re.compile(r"(?:^|[/_.-])(?:text_encoder|u?m?t5|clip|llama|qwen|gemma|mistral)", re.IGNORECASE)
#: Suffixes of the files that vLLM-Omni's standard loader reads.
_LOADED = (".safetensors", ".bin", ".pt")


def find_missing_files(
    documents: Documents, classification: Classification, components: list[Component], files: dict[str, WeightFile]
) -> list[Finding]:
    """List the files that are missing or incomplete for vLLM-Omni to load the model."""
    found = [*_index_needs(documents, classification), *_transformer_config(documents, classification)]
    found += [Finding(link, "is no file, or a link that leads nowhere") for link in documents.listing.broken]
    if not documents.listing.gate:
        found += [*_component_needs(documents, components), *_tokenizer(documents, components)]
        found += _readable(components, files)
        found += index_gaps(documents, files)
    return [*found, *sorted(documents.problems, key=lambda finding: finding.file)]


def _index_needs(documents: Documents, classification: Classification) -> Iterator[Finding]:
    path = index_path(documents)
    if not path and classification.path != "supported":
        yield Finding("model_index.json", "is not there; vLLM-Omni reads the pipeline's class from it")
    if not path or documents.listing.gate:
        return
    index = documents.object(path)
    if not index.get("_class_name"):
        yield Finding(path, "lacks _class_name, the key of vLLM-Omni's registry")
    if not index.get("_diffusers_version"):
        yield Finding(path, "lacks _diffusers_version, by which vLLM-Omni knows a diffusion model")


def _transformer_config(documents: Documents, classification: Classification) -> Iterator[Finding]:
    """Check for the transformer's configuration unless the model is already supported."""
    there = any(path in documents.listing.files for path in ("transformer/config.json", "unet/config.json"))
    if classification.path != "supported" and not there:
        yield Finding("transformer/config.json", "is not there; vLLM-Omni gives it to the pipeline")


def _component_needs(documents: Documents, components: list[Component]) -> Iterator[Finding]:
    path = index_path(documents)
    named = named_by_index(path, documents.object(path))
    folders = {name.partition("/")[0] for name in documents.listing.files if "/" in name}
    for part in components:
        if part.name in named and named[part.name].elsewhere not in ("", documents.listing.name):
            continue
        if part.name in named and part.name not in folders:
            yield Finding(path, f"names {part.name}, and there is no such folder")
        elif part.class_name and has_weights(part.class_name) and not part.weights:
            yield Finding(part.source, f"{part.name}: {part.class_name} has no weights beside it")


def _tokenizer(documents: Documents, components: list[Component]) -> Iterator[Finding]:
    names = {path.rpartition("/")[2] for path in documents.listing.files}
    encoders = [part.name for part in components if part.weights and _TEXT_ENCODER.search(part.name)]
    if encoders and not names & TOKENIZER_FILES:
        yield Finding("tokenizer/", f"is not there; the text encoder {encoders[0]} needs one")


def _readable(components: list[Component], files: dict[str, WeightFile]) -> Iterator[Finding]:
    """Yield files that cannot be read, or not by vLLM-Omni's standard loader."""
    for file in files.values():
        if file.problem:
            yield Finding(file.path, file.problem)
    for file in (file for part in components for file in part.weights):
        if not file.problem and file.wrapper:
            yield Finding(file.path, f"has its tensors under {quoted(file.wrapper)}: needs port-kit convert --wrapper")
        elif not file.problem and not file.path.lower().endswith(_LOADED):
            what = "port-kit convert" if file.format.startswith("torch") else "a conversion"
            yield Finding(file.path, f"is {file.format}, which the standard loader does not read: needs {what}")


def index_gaps(documents: Documents, files: dict[str, WeightFile]) -> Iterator[Finding]:
    """Yield missing shards and indexes that disagree with their files."""
    indexes = []
    for path in documents.listing.files:
        if path.endswith(".json") and ".index." in path.rpartition("/")[2]:
            index = read_index(path, documents.content(path))
            if isinstance(index, Index):
                indexes.append(index)
            else:
                yield index
    yield from missing_shards(group(files.values()), indexes, files)
