"""Request to ``port-kit new``, checked before anything is read or written."""

from __future__ import annotations

import keyword
import re
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

from port_kit.errors import ScaffoldError
from port_kit.escape import quoted
from port_kit.scaffold.modality import Modality
from port_kit.scaffold.render import camel

#: Where the model's code comes from. diffusers: its pipeline runs unchanged; custom: ported into the port; external:
#: its modules stay a git dependency, the pipeline is the port's; bypass: the weights do not come through the loader;
#: hybrid: the decoder is diffusers', the transformer is ported.
PortPath = Literal["diffusers", "custom", "external", "bypass", "hybrid"]
PATHS: tuple[str, ...] = get_args(PortPath)

#: What is generated keeps its form for names up to this.
_LONGEST = 30
_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")


@dataclass(frozen=True)
class NewPort:
    """A port to be written.

    Attributes:
        name: of the port, its package and its scripts.
        path: see :data:`PortPath`.
        target: the folder to be made.
        source: a Hub repository or a folder that the model lies in, or empty.
        more_sources: further ones with parts of the model.
        repositories: of the sources that are folders, in their order: Hub repositories with the same files.
        wrapper: keys above the tensors that are taken from pickles with several sets of tensors.
        code: address of the git repository with the model's code, or empty.
        endpoint: of the Hub; default ``HF_ENDPOINT``.
        output: modality of the output; a pipeline of diffusers has its own.
    """

    name: str
    path: PortPath
    target: Path
    source: str = ""
    code: str = ""
    endpoint: str | None = None
    output: Modality = "video"
    more_sources: tuple[str, ...] = ()
    repositories: tuple[str, ...] = ()
    wrapper: str = ""

    def __post_init__(self) -> None:
        if self.path == "hybrid" and self.output != "video":
            raise ScaffoldError(
                f"the decoder of a hybrid is a video VAE; {self.output} is asked for",
                code="scaffold_unsupported",
                hint=f"port-kit new {self.name} --path custom --output {self.output}",
            )
        if not _NAME.fullmatch(self.name) or keyword.iskeyword(self.name) or len(self.name) > _LONGEST:
            wanted = f"lower-case words joined by _ are, up to {_LONGEST} characters"
            raise _refused(f"{quoted(self.name)} is no name of a port: {wanted}", "rename the port")
        if self.name in sys.stdlib_module_names or _is_importable(self.name):
            raise _refused(f"a module called {self.name} is importable already", f"call it {self.name}_port")
        from port_kit.registry import list_ports

        if self.name in list_ports():
            raise _refused(f"there is a port called {self.name}", "take another name, or remove that port")
        for word in _misleading(self.name):
            raise _refused(
                f"vLLM-Omni takes a model folder whose name contains {quoted(word)} for its own {word}",
                "leave that word out: download_*.py names the folder after the port",
            )

    @property
    def sources(self) -> tuple[str, ...]:
        """All repositories and folders of the model."""
        return (self.source, *self.more_sources) if self.source else ()

    @property
    def prefix(self) -> str:
        """The name as the beginning of a class's name."""
        return camel(self.name)

    @property
    def pipeline_class(self) -> str:
        """``_class_name`` of the model directory."""
        return f"{self.prefix}Pipeline"


def _is_importable(name: str) -> bool:
    """Return True if a module has that name. A folder without ``__init__.py`` in the working directory is none."""
    spec = find_spec(name)
    return spec is not None and spec.origin is not None


def _misleading(name: str) -> list[str]:
    """Words by which vLLM-Omni recognises its own models in a folder's name; empty where it is not installed."""
    from port_kit.errors import OptionalDependencyError
    from port_kit.inspect.known_classes import omni

    try:
        known = omni()
    except OptionalDependencyError:
        return []
    prefix = f"{camel(name)}Pipeline"
    if prefix in known.pipelines:
        raise _refused(f"{prefix} is a pipeline of vLLM-Omni's own registry", "take another name")
    return [word for word in known.stages if word.replace("_", "") in name.replace("_", "")]


def _refused(message: str, hint: str) -> ScaffoldError:
    return ScaffoldError(message, code="scaffold_name", hint=hint)
