"""Rules of the complete project: light imports, complete lists, registered errors, short files."""

from __future__ import annotations

import ast
import configparser
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from port_kit.errors import CODES

ROOT = Path(__file__).parents[2]
CODE = ("port_kit", "models", "examples", "benchmarks")
HEAVY_PACKAGES = (
    "autoparallel",
    "models",
    "page.build",
    "parity.run_modules",
    "runtime",
    "upstream",
    "parallel",
    "pipeline",
    "port_tests",
    "scaffold.hosted_port",
    "scaffold.plans",
    "serving",
)
LIGHT = ("port_kit.runtime.target_cache", "port_kit.serving.limits", "port_kit.upstream.series")


def _files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def _run(code: str, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", *flags, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        cwd=ROOT / "tests",
        timeout=120,
    )


def _modules() -> list[str]:
    """Return every module of the kit outside of the heavy packages and modules."""
    paths = (path.relative_to(ROOT).with_suffix("") for path in _files("port_kit"))
    names = (".".join(path.parts).removesuffix(".__init__") for path in paths)
    light = (name for name in names if not name.startswith(tuple(f"port_kit.{folder}" for folder in HEAVY_PACKAGES)))
    return [name for name in (*light, *LIGHT) if name != "port_kit.__main__"]


def test_importing_the_kit_imports_no_torch() -> None:
    code = (
        f"import importlib, sys\nfor name in {_modules()!r}: importlib.import_module(name)\n"
        "from port_kit.registry import list_ports; list_ports()\n"
        "print(sorted({'torch', 'vllm', 'vllm_omni', 'transformers', 'diffusers', 'numpy'} & set(sys.modules)))"
    )
    done = _run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_no_package_and_no_generated_port_imports_a_port() -> None:
    """But for a generated page, which lists the shipped ports' errors too."""
    files = [*(ROOT / "port_kit").rglob("*.py"), *(ROOT / "port_kit").rglob("*.tmpl")]
    importing = re.compile(r"^\s*(?:from|import) port_kit\.models\b", re.MULTILINE)
    found = {path.relative_to(ROOT).as_posix() for path in files if importing.search(path.read_text(encoding="utf-8"))}
    assert len(files) > 150 and found == {"port_kit/docgen/errors.py"}


@pytest.mark.parametrize("path", _files("port_kit", "models"), ids=lambda path: str(path.relative_to(ROOT)))
def test_all_is_sorted_and_complete(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    declared = _declared_all(tree)
    if declared is None:
        return
    assert declared == sorted(declared)
    # A package that only imports names exports them; any other module exports its definitions.
    public = {name for name in _defined(tree) or _imported(tree) if not name.startswith("_")}
    assert public <= set(declared), f"{path} does not list {sorted(public - set(declared))}"


def _defined(tree: ast.Module) -> list[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [node.name for node in tree.body if isinstance(node, kinds)]


def _declared_all(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return ast.literal_eval(node.value)
    return None


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("port_kit"):
            yield from (alias.asname or alias.name for alias in node.names)


def test_every_package_is_listed() -> None:
    options = configparser.ConfigParser()
    options.read(ROOT / "setup.cfg")
    listed = set(options["options"]["packages"].split())
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in _files("port_kit") if path.name == "__init__.py"}
    ports = {path.parent.relative_to(ROOT).parts for path in _files("models") if path.name == "__init__.py"}
    found |= {".".join(("port_kit", *parts)) for parts in ports}
    assert listed == found


def test_no_file_is_too_long() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in _files(*CODE, "tests")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 600
    }
    assert not long


def _pages() -> list[Path]:
    return [
        *ROOT.glob("*.md"),
        *(path for folder in ("docs", "examples", "port_kit", "recipes") for path in (ROOT / folder).rglob("*.md")),
    ]


def _anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub derives from a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", _pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_link_and_no_path_of_a_page_leads_nowhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([\w-]+))?\)", text):
        place = page.parent / target if target else page
        assert place.exists(), target
        assert not anchor or anchor in _anchors(place), f"{target}#{anchor}"
    folders = "port_kit|models|tests|docs|examples|benchmarks|requirements"
    for path in re.findall(rf"`((?:{folders})/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


def _constants(path: Path) -> Iterator[str]:
    """String literals, and of f-strings with a code's beginning the codes that they can become."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        if isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
            parts = [part.value if isinstance(part, ast.Constant) else r"\w+" for part in node.values]
            if re.fullmatch(r"[a-z]+_", parts[0]):
                yield from (code for code in CODES if re.fullmatch("".join(parts), code))


def _codes(path: Path) -> Iterator[str]:
    """Literal ``code=`` arguments of calls that make an error, and the classes' default codes."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg == "code" and isinstance(keyword.value, ast.Constant):
                    if isinstance(keyword.value.value, str):
                        yield keyword.value.value


def test_every_raised_code_is_registered() -> None:
    unknown = {code: str(path) for path in _files("port_kit", "models") for code in _codes(path) if code not in CODES}
    assert not unknown


def test_every_registered_code_is_used() -> None:
    errors = ROOT / "port_kit" / "errors.py"
    used = {text for path in _files("port_kit", "models") if path != errors for text in _constants(path)}
    # errors.py has the list itself: only a second occurrence, as the default of a class, counts.
    own = list(_constants(errors))
    used |= {text for text in CODES if own.count(text) > 1}
    assert set(CODES) <= used, f"never used: {sorted(set(CODES) - used)}"


def test_a_missing_runtime_names_the_command_that_installs_it() -> None:
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("vllm", "vllm_omni", "torch"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from port_kit import OptionalDependencyError, find_port
from port_kit.port import resolve
try:
    resolve(find_port("dreamid_omni").pipeline)
except OptionalDependencyError as error:
    print(error.code, isinstance(error, ImportError), error.hint)
"""
    done = _run(code)
    assert done.stdout.startswith("dependency_missing True"), done.stdout + done.stderr
    assert "pip install 'port-kit[omni" in done.stdout
