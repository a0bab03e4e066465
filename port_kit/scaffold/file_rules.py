"""Rules of a recipe for the files of an inspected source: no file that is not there, and no more than are meant."""

from __future__ import annotations

import fnmatch
import glob
import re
from collections.abc import Iterable, Iterator

from port_kit.download import FileRule
from port_kit.errors import ScaffoldError
from port_kit.inspect import Component, WeightFile
from port_kit.inspect.checkpoint_files import STANDARD_STEMS, WeightSet, group
from port_kit.inspect.weights import is_weights
from port_kit.scaffold.render import WIDTH, literal
from port_kit.scaffold.source import Source

_SHARD = re.compile(r"-\d{5}(-of-\d{5})")
#: Of a rule in a recipe.
_INDENT = " " * 16


def weight_rules(source: Source, part: Component, folder: str, *, name: str = "model.safetensors") -> list[FileRule]:
    """Return the rules of a component's weights, with containers and wrappers.

    Args:
        source: the repository or folder.
        part: the component.
        folder: of the component in the model directory.
        name: of a single file there, unless its library gave it a name that it finds again.

    Raises:
        ScaffoldError: ``scaffold_unsupported``; no download turns a file of it into safetensors.
    """
    for file in part.weights:
        require_readable(source, file)
    sets = group(part.weights)
    return [rule for item in sets for rule in _rules_of_set(source, item, folder, name if len(sets) == 1 else "")]


def require_readable(source: Source, file: WeightFile) -> None:
    """Refuse a file that no recipe can use.

    Raises:
        ScaffoldError: ``scaffold_unsupported``.
    """
    if file.obstacle:
        raise ScaffoldError(
            f"{file.path} of {source.repository} {file.obstacle}",
            code="scaffold_unsupported",
            hint="name a repository or folder that has the weights as safetensors or pickles",
        )


def _rules_of_set(source: Source, item: WeightSet, folder: str, name: str) -> Iterator[FileRule]:
    """Yield one rule for all shards if a pattern matches them alone, else one per file; and one for the index."""
    paths = [file.path for file in item.files]
    pattern = _SHARD.sub(r"-*\1", glob.escape(paths[0]))
    matched = fnmatch.filter(source.listed, pattern)
    containers = {(file.format.partition(" ")[0], file.wrapper) for file in item.files}
    is_single = len(paths) == 1
    if not is_single and (sorted(matched) != sorted(paths) or len(containers) > 1):
        yield from (_rule(file, glob.escape(file.path), folder, "") for file in item.files)
    else:
        keeps_name = not is_single or (item.is_standard and item.suffix == ".safetensors" and not item.variant)
        yield _rule(item.files[0], glob.escape(paths[0]) if is_single else pattern, folder, "" if keeps_name else name)
    index = f"{_SHARD.sub('', paths[0])}.index.json"
    if not is_single and item.suffix == ".safetensors" and index in source.listed:
        yield FileRule(glob.escape(index), folder=folder)


def _rule(file: WeightFile, pattern: str, folder: str, name: str) -> FileRule:
    is_pickle = file.format.startswith("torch")
    return FileRule(pattern, folder=folder, name=name, convert=is_pickle, wrapper=file.wrapper if is_pickle else "")


def small_files(source: Source, place: str) -> list[str]:
    """Return the files in a folder of the source that hold no weights, such as those of a tokenizer."""
    paths = [path for path in source.listed if path.rpartition("/")[0] == place and not is_weights(path)]
    return [path for path in paths if not path.endswith(".index.json")]


def small_file_rules(paths: Iterable[str], folder: str) -> list[FileRule]:
    """Return a rule for each of the files."""
    return [FileRule(glob.escape(path), folder=folder) for path in paths]


def is_standard_name(path: str) -> bool:
    """Return True for a name that a library gives to the one checkpoint of a folder."""
    return path.rpartition("/")[2].partition(".")[0] in STANDARD_STEMS


def rule_text(rule: FileRule) -> str:
    """Return a rule as it stands in a recipe, in one line where that is not too long."""
    given = [literal(rule.pattern), f"folder={literal(rule.folder)}"]
    given += [f"name={literal(rule.name)}"] if rule.name else []
    given += ["convert=True"] if rule.convert else []
    given += [f"wrapper={literal(rule.wrapper)}"] if rule.wrapper else []
    line = f"{_INDENT}FileRule({', '.join(given)}),"
    if len(line) <= WIDTH:
        return line
    return f"{_INDENT}FileRule(\n" + "".join(f"{_INDENT}    {item},\n" for item in given) + f"{_INDENT}),"
