"""Parts of a found model as a port has them: every component of the sources, with a name, a kind and its files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from port_kit.download import FileRule
from port_kit.errors import ScaffoldError
from port_kit.inspect import Component, Finding
from port_kit.inspect.components import has_weights, is_denoiser
from port_kit.inspect.missing_files import TOKENIZER_FILES
from port_kit.inspect.report import Recognized
from port_kit.inspect.roles import boundary_of, same_architecture
from port_kit.port import lookup
from port_kit.scaffold.file_rules import is_standard_name, require_readable, small_file_rules, small_files, weight_rules
from port_kit.scaffold.source import Source

#: Words in names of files and folders that tell what turns latents into an output.
_DECODERS = re.compile(r"vae|decoder|autoencoder|codec|vocoder|vocos|gan", re.IGNORECASE)
#: Words in names of parts that the transformer calls, if nothing else tells what they are.
_PARTNERS = re.compile(r"(^|[_./-])(dit|unet)([_./-]|$)|transformer|tower|bridge|denois", re.IGNORECASE)
#: Endings of classes without weights, and the usual folders of their files.
_FOLDERS = {"Tokenizer": "tokenizer", "Scheduler": "scheduler", "FeatureExtractor": "feature_extractor"}
#: Further files of tokenizers, which alone make none.
_BESIDE_TOKENIZER = {"added_tokens.json", "merges.txt", "special_tokens_map.json"}
#: Reason that a usable file is left out.
_OF_UNUSABLE = "belongs to a checkpoint with files that no recipe can use"
#: Name of a single file of weights that a library looks for; ``model.safetensors`` for others.
_SINGLE_FILES = {"diffusers": "diffusion_pytorch_model.safetensors"}


@dataclass(frozen=True)
class Part:
    """One folder of the model directory.

    Attributes:
        name: the folder, and the attribute of the pipeline.
        kind: one of :data:`port_kit.port.KINDS`; empty for files without weights, such as a tokenizer.
        source: where it comes from.
        rules: of its files.
        component: what was inspected; None for files without weights.
        pretrained: ``"module:Class"`` of a library that builds and fills it, or empty.
        config: content of its ``config.json`` if the recipe writes it, or the source has it.
        parameters: of the constructor of its class in the git code, with their defaults, ``...`` for those without.
        twin: True for a further transformer with the tensors of the first one, whose module it shares.
    """

    name: str
    kind: str
    source: Source
    rules: tuple[FileRule, ...]
    component: Component | None = None
    pretrained: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    twin: bool = False

    @property
    def recognized(self) -> Recognized | None:
        """The component of a registered port that it is; None for others."""
        found = self.component.recognized if self.component else None
        return found if found and found.build else None

    @property
    def is_own(self) -> bool:
        """True if the port has to bring the module."""
        return self.component is not None and not self.pretrained and self.recognized is None and not self.twin


def find_parts(sources: Sequence[Source]) -> list[Part]:
    """Return the parts of all sources, the transformer first.

    Raises:
        ScaffoldError: ``scaffold_unsupported``; there are no weights, or weights that nothing here reads.
    """
    found = [(source, part) for source in sources if source.inspection for part in source.inspection.components]
    for source, file in ((source, file) for source, part in found for file in part.weights):
        if file.format == "lfs pointer":
            require_readable(source, file)
    unreadable = [(source, file) for source, part in found for file in part.weights if file.obstacle]
    without = {id(part) for _, part in found if not part.weights or any(file.obstacle for file in part.weights)}
    weighted = [(source, part) for source, part in found if id(part) not in without]
    if not weighted and unreadable:
        require_readable(*unreadable[0])
    if not weighted:
        raise ScaffoldError(
            f"{' and '.join(source.repository for source in sources)}: expected weights, found none",
            code="scaffold_unsupported",
            hint="name a repository or folder that has them: port-kit inspect REPO_OR_DIR lists what there is",
        )
    main = _main(weighted)
    experts = _experts(weighted, main)
    taken: set[str] = set()
    ordered = sorted(weighted, key=lambda item: (item[1] is not main, not _is_in(item[1], experts)))
    parts = [_weighted(source, part, _unique(_name(part, experts), taken), main, experts) for source, part in ordered]
    return parts + [part for source in sources for part in _small(source, parts, taken)]


def left_out(sources: Sequence[Source]) -> list[Finding]:
    """Return the files that look like weights and that no recipe can use, with the reason."""
    found = [part for source in sources if source.inspection for part in source.inspection.components]
    unused = [part for part in found if any(file.obstacle for file in part.weights)]
    return [Finding(file.path, file.obstacle or _OF_UNUSABLE) for part in unused for file in part.weights]


def _main(weighted: list[tuple[Source, Component]]) -> Component:
    """Return the transformer: by its name, else the largest part that is no known component of another kind.

    Parts of classes that a library has are taken if there are no others.
    """
    parts = [part for _, part in weighted]
    named = [part for part in parts if is_denoiser(part.name.rpartition("/")[2])]
    open_ = [part for part in parts if part.recognized is None or part.recognized.kind == "transformer"]
    if not named and not open_:
        kinds = ", ".join(f"{part.name} ({part.recognized.origin})" for part in parts if part.recognized)
        raise ScaffoldError(
            f"expected the weights of a transformer, found {kinds}",
            code="scaffold_unsupported",
            hint="name the repository with the transformer's weights, too: --from REPO_OR_DIR --from REPO_OR_DIR",
        )
    unknown = [part for part in open_ if not part.known]
    return max(named or unknown or open_, key=lambda part: part.parameters)


def _experts(weighted: list[tuple[Source, Component]], main: Component) -> list[Component]:
    """Return the transformers: several if an index says at which noise they change; others are copies, such as EMA."""
    source = next(source for source, part in weighted if part is main)
    own = [part for one, part in weighted if one is source]
    groups = same_architecture(own) if boundary_of(source.index) is not None else []
    return next((group for group in groups if _is_in(main, group)), [main])


def _is_in(part: Component, group: Sequence[Component]) -> bool:
    return any(part is other for other in group)


def _name(part: Component, experts: Sequence[Component]) -> str:
    if _is_in(part, experts):
        return "transformer"
    if part.recognized is not None:
        return part.recognized.name
    last = part.name.rpartition("/")[2].partition(".")[0]
    words = re.sub(r"[^a-z0-9]+", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", last).lower()).strip("_")
    return words if words and words[0].isalpha() else f"part_{words}".rstrip("_")


def _unique(name: str, taken: set[str]) -> str:
    """Return the name, or with a number where it is taken."""
    count = 1
    while (f"{name}_{count}" if count > 1 else name) in taken:
        count += 1
    unique = f"{name}_{count}" if count > 1 else name
    taken.add(unique)
    return unique


def _weighted(source: Source, part: Component, name: str, main: Component, experts: Sequence[Component]) -> Part:
    place = part.weights[0].path.rpartition("/")[0]
    is_expert = _is_in(part, experts)
    pretrained, config = _pretrained(source, part) if not is_expert else ("", {})
    if not pretrained:
        config = _published(part, source.configs.get(f"{place}/config.json" if place else "config.json", {}))
    single = _SINGLE_FILES.get(pretrained.partition(":")[0], "model.safetensors")
    rules = weight_rules(source, part, name, name=single)
    if pretrained and part.known:  # the library reads its own small files; a recognised part has none
        rules = [*small_file_rules(small_files(source, place), name), *rules]
    twin = is_expert and part is not main and part.recognized is None
    return Part(name, _kind(part, is_expert), source, tuple(rules), part, pretrained, config, twin=twin)


def _published(part: Component, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a part's configuration in its source; of a known part only one with most keys of its port's."""
    if part.recognized is None or not part.recognized.misfits:
        return config if part.recognized is None else {}
    known: Any = lookup(part.recognized.config)
    keys = {key for key in known if not key.startswith("_")} if isinstance(known, Mapping) else set()
    return {**known, **config} if 2 * len(keys & set(config)) > len(keys) else {}


def _pretrained(source: Source, part: Component) -> tuple[str, Mapping[str, Any]]:
    """Return the library's class that fills a part, and the configuration that the recipe has to write."""
    is_standard = all(is_standard_name(file.path) for file in part.weights)
    if part.known and part.library in ("diffusers", "transformers") and is_standard:
        return f"{part.library}:{part.class_name}", {}
    if part.recognized is not None and part.recognized.pretrained:
        return part.recognized.pretrained, part.recognized.values
    return "", {}


def _kind(part: Component, is_expert: bool) -> str:
    if is_expert:
        return "transformer"
    if part.recognized is not None:
        return part.recognized.kind
    if _PARTNERS.search(part.name):
        return "partner"
    return "vae" if _DECODERS.search(f"{part.name} {part.class_name}") else "encoder"


def _small(source: Source, parts: list[Part], taken: set[str]) -> Iterator[Part]:
    """Yield the tokenizers and schedulers of a source."""
    components = source.inspection.components if source.inspection else ()
    places = {part.name: part.class_name for part in components if part.class_name and not has_weights(part.class_name)}
    tokenizers = {path.rpartition("/")[0] for path in source.listed if path.rpartition("/")[2] in TOKENIZER_FILES}
    places |= {place: "Tokenizer" for place in sorted(tokenizers) if place not in places}
    used = {rule.pattern for part in parts if part.source is source for rule in part.rules}
    for place, class_name in places.items():
        plain = class_name.removesuffix("Fast")
        usual = next((folder for ending, folder in _FOLDERS.items() if plain.endswith(ending)), "processor")
        paths = set(small_files(source, place)) - used
        if not place:  # of the root's files, those of the model are not a tokenizer's
            paths = {path for path in paths if path in TOKENIZER_FILES | _BESIDE_TOKENIZER}
        if paths:
            folder = _unique(usual, taken)
            yield Part(folder, "", source, tuple(small_file_rules(sorted(paths), folder)))
