"""Discovery of ports in installed packages and folders. A broken port is reported and does not affect the others.

Discovery imports only the packages that declare ports. It imports neither torch nor vLLM, unless the
``__init__.py`` of a port does.
"""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType

from port_kit.errors import PortKitError, PortNotFoundError
from port_kit.escape import quoted
from port_kit.port import Port

ENTRY_POINT_GROUP = "port_kit.ports"
PATH_VARIABLE = "PORT_KIT_PATH"

#: Errors of importing a package, after which its port is reported as broken.
_IMPORT_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    PortKitError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)
#: A package whose ``__init__.py`` does not contain ``PORT`` is not imported.
_DECLARES = re.compile(rb"\bPORT\b")


class Ports(dict[str, Port]):
    """The ports that can be used, by name.

    Attributes:
        problems: one error for each port or folder that cannot be used; ``details["port"]`` is its name, if
            known.
    """

    problems: list[PortKitError]

    def __init__(self) -> None:
        super().__init__()
        self.problems = []

    def problem_of(self, name: str) -> PortKitError | None:
        """Return the error that makes a port unusable, or None."""
        return next((problem for problem in self.problems if problem.details.get("port") == name), None)


@cache
def list_ports() -> Ports:
    """Return all usable ports, sorted by name; ``.problems`` has the errors of the others."""
    return discover()


def find_port(name: str) -> Port:
    """Return the port called ``name``.

    Raises:
        PortNotFoundError: with the nearest names that exist.
        PortKitError: a port of that name is declared, but cannot be used.
    """
    ports = list_ports()
    if name in ports:
        return ports[name]
    problem = ports.problem_of(name)
    if problem is not None:
        raise problem
    near = difflib.get_close_matches(name, ports, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else f"known ports: {', '.join(ports) or 'none'}"
    if ports.problems:
        hint += f"; {len(ports.problems)} more cannot be used, see port-kit list"
    raise PortNotFoundError(f"there is no port {quoted(name)}", hint=hint, known=list(ports))


def port_of_class(class_name: str | None) -> Port:
    """Return the port of a pipeline's class, a model directory's ``_class_name``.

    Raises:
        PortNotFoundError: no port serves the class.
    """
    ports = {port.class_name: port for port in list_ports().values()}
    if class_name not in ports:
        known = sorted(ports)
        raise PortNotFoundError(f"no port serves {class_name}", hint=f"known are {', '.join(known)}", known=known)
    return ports[class_name]


def discover() -> Ports:
    """Look at the entry points, then at the folders of ``PORT_KIT_PATH``; return ports sorted by name."""
    declared: list[tuple[Port, str]] = []
    problems: list[PortKitError] = []
    for name, origin, load in (*_installed(), *_in_folders(problems)):
        try:
            declared.append((_checked(load(), origin, name), origin))
        except _IMPORT_ERRORS as error:
            problems.append(_broken(name, origin, error))
    found = Ports()
    clashes = list(_clashes(declared))
    doubtful = {problem.details["port"] for problem in clashes}
    for port, _ in sorted(declared, key=lambda item: item[0].name):
        if port.name not in doubtful:
            found[port.name] = port
    found.problems = problems + clashes
    return found


def add_port_folders() -> None:
    """Put the folders of ``PORT_KIT_PATH`` at the end of ``sys.path``, for ``module:attribute`` on a command line."""
    for text in filter(None, os.environ.get(PATH_VARIABLE, "").split(os.pathsep)):
        _add_to_path(Path(text).expanduser())


def _add_to_path(folder: Path) -> None:
    entry = str(folder.resolve())
    if entry not in sys.path:
        sys.path.append(entry)


def _installed() -> Iterator[tuple[str, str, Callable[[], object]]]:
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        yield entry.name, f"{entry.value} of {_distribution(entry)}", entry.load


def _distribution(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "an unknown distribution"


def _in_folders(problems: list[PortKitError]) -> Iterator[tuple[str, str, Callable[[], object]]]:
    for text in filter(None, os.environ.get(PATH_VARIABLE, "").split(os.pathsep)):
        folder = Path(text).expanduser()
        packages = _packages(folder)
        if not packages:
            problems.append(_no_port_in(folder))
        for package in packages:
            yield package.name, str(package), partial(_declared_in, package)


def _packages(folder: Path) -> list[Path]:
    inits = sorted(folder.glob("*/__init__.py")) if folder.is_dir() else []
    return [path.parent for path in inits if _DECLARES.search(path.read_bytes())]


def _no_port_in(folder: Path) -> PortKitError:
    """Return an error for a path that is not a folder, is a port itself, or has no package that declares a port."""
    hint = f"{PATH_VARIABLE} names the folder above a port's package, whose __init__.py sets PORT"
    if not folder.is_dir():
        problem = f"{PATH_VARIABLE} names {folder}, which is not a folder"
    elif (folder / "__init__.py").is_file():
        problem = f"{PATH_VARIABLE} names {folder}, which is a package itself"
        hint = f"name the folder above it: {folder.absolute().parent}"
    else:
        problem = f"{PATH_VARIABLE} names {folder}, which has no package with a PORT"
    return PortKitError(problem, code="port_path", hint=hint, folder=str(folder))


def _declared_in(package: Path) -> object:
    return _import_package(package).PORT


def _import_package(package: Path) -> ModuleType:
    """Import the package in this folder under its own name; the folder above it goes onto ``sys.path``."""
    _add_to_path(package.parent)
    module = importlib.import_module(package.name)
    if module.__file__ is None or Path(module.__file__).resolve().parent != package.resolve():
        raise PortKitError(
            f"{package} is hidden by {module.__file__}, which has the same import name",
            code="port_clash",
            hint="rename the port's folder",
            port=package.name,
        )
    return module


def _checked(port: object, origin: str, name: str) -> Port:
    if not isinstance(port, Port):
        raise PortKitError(
            f"{origin} is {type(port).__name__}; expected a port_kit.Port",
            code="port_invalid",
            hint="the entry point, or PORT in the package, must be the Port object",
            port=name,
        )
    return port


def _broken(name: str, origin: str, error: BaseException) -> PortKitError:
    """Return an error with the original exception and the line that raised it."""
    if isinstance(error, PortKitError):
        return error
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "importlib" not in frame.filename and frame.filename != __file__]
    where = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
    if isinstance(error, SyntaxError):
        where = f" ({error.filename}, line {error.lineno})"
    hint = "repair it, or remove it from this environment"
    if isinstance(error, ModuleNotFoundError) and error.name:
        hint = f"install {error.name.partition('.')[0]}, or import it inside the functions that need it"
    reason = error.msg if isinstance(error, SyntaxError) else str(error)
    return PortKitError(
        f"the port {name} from {origin} cannot be imported: {type(error).__name__}: {reason}{where}",
        code="port_broken",
        hint=hint,
        port=name,
    )


def _clashes(declared: list[tuple[Port, str]]) -> Iterator[PortKitError]:
    """Yield an error for every port that shares its name or its pipeline's class with a different one.

    Both are unavailable, because the intended one is unknown.
    """
    for port, origin in declared:
        for other, other_origin in declared:
            shared = _shared(port, other)
            if shared:
                yield PortKitError(
                    f"two ports {shared}: {origin} and {other_origin}; neither is available",
                    code="port_clash",
                    hint="rename one of the two, uninstall it, or remove its folder from PORT_KIT_PATH",
                    port=port.name,
                )
                break


def _shared(port: Port, other: Port) -> str:
    if port == other:
        return ""
    if port.name == other.name:
        return f"are called {quoted(port.name)}"
    return f"register the pipeline {quoted(port.class_name)}" if port.class_name == other.class_name else ""
