"""Pages of the documentation site: the repository's Markdown files, and a reference made from docstrings.

``site.py FOLDER`` writes them into a folder, from which mkdocs builds the site. The pages keep their paths, except
README.md, which becomes the index. A link to a module becomes a link to its reference page; linked files that are
no pages are copied; a link to a folder without a reference page becomes plain text.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ("*.md", "docs/**/*.md", "examples/**/*.md", "recipes/**/*.md", "port_kit/upstream/*.md")
ASSETS = ("docs/**/*.svg", "docs/**/*.png")
#: Folders of modules, with the packages that they are imported as.
PACKAGES = {"port_kit": "port_kit", "models": "port_kit.models"}
#: Packages without reference pages: docs/cli.md describes the commands, and templates are no modules of the kit.
HIDDEN = ("cli", "pages", "__main__")
#: Optional parts of arguments, such as ``OWNER/NAME[@REV][:PATH]``, have the form of a link; code spans are skipped.
_OPTIONAL_PARTS = re.compile(r"(`[^`\n]*`)|\]\[(?=:)")
_ROLE = re.compile(r":(?:class|func|meth|data|mod|attr|exc):(<code>)~?")
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")


def main(folder: Path) -> None:
    """Write all pages."""
    shutil.rmtree(folder, ignore_errors=True)
    modules = reference(folder)
    for pattern in PAGES:
        for path in sorted(ROOT.glob(pattern)):
            write(folder / page_name(path), translate(path, path.read_text(encoding="utf-8"), folder, modules))
    for pattern in ASSETS:
        for path in ROOT.glob(pattern):
            copy(path, folder)


def page_name(path: Path) -> Path:
    """Return a page's place in the site."""
    name = path.relative_to(ROOT)
    return Path("index.md") if name == Path("README.md") else name


def reference(folder: Path) -> dict[Path, Path]:
    """Write a page for each public module, and their index; return page by source file and package folder."""
    found: dict[Path, Path] = {}
    entries: list[str] = []
    for source, package in PACKAGES.items():
        for path in sorted((ROOT / source).rglob("*.py")):
            parts = path.relative_to(ROOT / source).with_suffix("").parts
            if parts[0] in HIDDEN or any(part.startswith("_") and part != "__init__" for part in parts):
                continue
            name = ".".join((package, *parts)).removesuffix(".__init__")
            page = Path("reference") / f"{name}.md"
            write(folder / page, f"# {name}\n\n::: {name}\n")
            entries.append(f"- [`{name}`]({page.name})")
            found[path] = page
            if path.name == "__init__.py":
                found[path.parent] = page
    title = "# Python reference\n\nOne page per module, made from the docstrings.\n\n"
    write(folder / "reference" / "index.md", title + "\n".join(sorted(entries)) + "\n")
    return found


def translate(path: Path, text: str, folder: Path, modules: dict[Path, Path]) -> str:
    """Return a page's text with links that work in the site."""

    def link(match: re.Match[str]) -> str:
        label, target, anchor = match[1], match[2], match[3] or ""
        place = Path(os.path.normpath(path.parent / target))
        if place in modules:
            page = modules[place]
        elif place.is_dir():
            return label
        elif place.suffix == ".md" or not place.exists():
            page = page_name(place)
        else:
            page = copy(place, folder)
        return f"[{label}]({os.path.relpath(page, page_name(path).parent)}{anchor})"

    text = _OPTIONAL_PARTS.sub(lambda found: found[1] or r"]\[", text)
    return _LINK.sub(link, text)


def on_page_content(html: str, **_: object) -> str:
    """Remove the roles of Sphinx from a page; mkdocs calls this."""
    return _ROLE.sub(r"\1", html)


def copy(path: Path, folder: Path) -> Path:
    """Copy a file of the repository into the site; return its place there."""
    name = path.relative_to(ROOT)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, folder / name)
    return name


def write(path: Path, text: str) -> None:
    """Write a file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
