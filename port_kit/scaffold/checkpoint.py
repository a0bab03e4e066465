"""Selection of the transformer's files in an inspected source, and their names in a recipe."""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass

from port_kit.errors import ScaffoldError
from port_kit.inspect import Component
from port_kit.inspect.checkpoint_files import group
from port_kit.scaffold.render import WIDTH, literal
from port_kit.scaffold.request import NewPort
from port_kit.scaffold.source import Source


def main_component(source: Source) -> Component | None:
    """The transformer of an inspected source: by name, else the component with most parameters."""
    if source.inspection is None:
        return None
    named = source.inspection.component("transformer")
    parts = [part for part in source.inspection.components if part.weights]
    return named if named and named.weights else max(parts, key=lambda part: part.parameters, default=None)


def require_readable(port: NewPort, source: Source) -> None:
    """Refuse a transformer whose recipe could not be carried out: no download turns its files into safetensors.

    Raises:
        ScaffoldError: ``scaffold_unsupported``, with the file and what is wrong with it.
    """
    found = main_component(source)
    for file in found.weights if found else ():
        if file.problem or not file.format.startswith(("safetensors", "torch")):
            raise ScaffoldError(
                f"{file.path} of {port.source} {file.problem or f'is {file.format}, which nothing here converts'}",
                code="scaffold_unsupported",
                hint="name a repository or folder that has the weights as safetensors or pickles, or leave --from "
                f"out: port-kit new {port.name} --path {port.path}",
            )


#: Of a file's rule in a recipe.
_INDENT = " " * 16


@dataclass(frozen=True)
class Checkpoint:
    """Location of the transformer's weights in the repository.

    Attributes:
        file: one of its files.
        pattern: all of them, as a recipe names them.
        name: its file in the model directory; empty for several.
        convert: they are pickles.
        wrapper: the keys above the tensors in a pickle.
    """

    file: str = "model.safetensors"
    pattern: str = "model.safetensors"
    name: str = "model.safetensors"
    convert: bool = False
    wrapper: str = ""

    @property
    def rule(self) -> str:
        """The rule as it stands in the recipe, in one line where that is not too long."""
        given = [
            literal(self.pattern),
            'folder="transformer"',
            *([f"name={literal(self.name)}"] if self.name else []),
            *(["convert=True"] if self.convert else []),
            *([f"wrapper={literal(self.wrapper)}"] if self.wrapper else []),
        ]
        line = f"{_INDENT}FileRule({', '.join(given)}),"
        if len(line) <= WIDTH:
            return line
        return f"{_INDENT}FileRule(\n" + "".join(f"{_INDENT}    {item},\n" for item in given) + f"{_INDENT}),"


def read_checkpoint(source: Source) -> Checkpoint:
    """Read which files are the transformer's; what nothing tells has the name that is most common."""
    found = main_component(source)
    if found is None:
        return Checkpoint()
    sets = group(found.weights)
    most = max(sets, key=lambda item: sum(file.size for file in item.files))
    first = most.files[0]
    pattern, name = glob.escape(first.path), "model.safetensors"
    if len(sets) > 1 and most.folder:
        pattern, name = f"{glob.escape(most.folder)}/*{first.path[first.path.rfind('.') :]}", ""
    elif most.shards:
        pattern, name = re.sub(r"-\d{5}(-of-\d{5})", r"-*\1", pattern), ""
    return Checkpoint(first.path, pattern, name, first.format.startswith("torch"), first.wrapper)
