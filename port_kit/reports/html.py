"""Building blocks of HTML reports: one self-contained file, light and dark styles, escaped input."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from port_kit.files import os_errors_as, write_atomically

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #60646c; --line: #d9d9e0; --back: #fff; --panel: #f7f7f9;
  --good: #18794e; --good-back: #e6f6eb; --bad: #b42318; --bad-back: #feebe7; --bar: #5b7fc7; }
@media (prefers-color-scheme: dark) { :root { --ink: #edeef0; --soft: #a0a6ad; --line: #34383e; --back: #111214;
  --panel: #1a1c1f; --good: #5fd39a; --good-back: #12291d; --bad: #ff9b8f; --bad-back: #3a1714; --bar: #7c9ee0; } }
body { margin: 0 auto; max-width: 72rem; padding: 2rem 1.5rem 4rem; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p.sub { color: var(--soft); margin: 0 0 1.2rem; } code, td.code { font: 13px/1.45 ui-monospace, monospace; }
td.code, code { overflow-wrap: anywhere; } .facts { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1rem 0; }
.fact { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: .6rem .9rem;
  min-width: 8rem; }
.fact b { display: block; font-size: 1.15rem; font-variant-numeric: tabular-nums; } .fact span { color: var(--soft); }
.ok, .bad { border-radius: 999px; padding: .1rem .6rem; font-weight: 600; white-space: nowrap; }
.ok { color: var(--good); background: var(--good-back); } .bad { color: var(--bad); background: var(--bad-back); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th { text-align: left; color: var(--soft); font-weight: 600; } td, th { border-bottom: 1px solid var(--line);
  padding: .35rem .7rem .35rem 0; vertical-align: top; } td.n, th.n { text-align: right;
  font-variant-numeric: tabular-nums; }
.problem { border-left: 4px solid var(--bad); background: var(--bad-back); padding: .6rem .9rem;
  border-radius: 0 8px 8px 0; margin: .6rem 0; } .problem p { margin: .2rem 0; }
details { margin: .5rem 0; } summary { cursor: pointer; }
nav a { margin-right: 1rem; color: inherit; } .bar { fill: var(--bar); } .bar.over { fill: var(--bad); }
.bound { stroke: var(--soft); } .track { fill: var(--panel); } footer { margin-top: 3rem; color: var(--soft); }
"""


@dataclass(frozen=True)
class Html:
    """Text that is HTML already; all other text is escaped when it is inserted."""

    text: str


Cell = str | int | float | Html


def put(value: Cell) -> str:
    """Return a value as HTML: escaped, unless it is HTML."""
    return value.text if isinstance(value, Html) else escape(str(value))


def page(title: str, sub: str, parts: Iterable[Html]) -> str:
    """Return a complete document."""
    body = "\n".join(part.text for part in parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<h1>{escape(title)}</h1>\n<p class="sub">{escape(sub)}</p>\n{body}\n'
        "<footer>written by port-kit</footer>\n</body>\n</html>\n"
    )


def heading(text: str, anchor: str = "") -> Html:
    """Return a section heading."""
    mark = f' id="{escape(anchor, quote=True)}"' if anchor else ""
    return Html(f"<h2{mark}>{escape(text)}</h2>")


def verdict(ok: bool, good: str = "ok", bad: str = "failed") -> Html:
    """Return a colored label."""
    return Html(f'<span class="{"ok" if ok else "bad"}">{escape(good if ok else bad)}</span>')


def facts(pairs: Sequence[tuple[str, Cell]]) -> Html:
    """Return a row of labeled figures."""
    boxes = "".join(f'<div class="fact"><b>{put(value)}</b><span>{escape(name)}</span></div>' for name, value in pairs)
    return Html(f'<div class="facts">{boxes}</div>')


def table(columns: Sequence[str], rows: Iterable[Sequence[Cell]], classes: Sequence[str] = ()) -> Html:
    """Return a table. ``classes`` has one CSS class per column (``n`` for numbers, ``code`` for names)."""
    kinds = [*classes, *[""] * len(columns)][: len(columns)]
    marks = [f' class="{kind}"' if kind else "" for kind in kinds]
    head = "".join(f"<th{mark}>{escape(name)}</th>" for name, mark in zip(columns, marks, strict=True))
    lines = [
        "<tr>" + "".join(f"<td{mark}>{put(cell)}</td>" for cell, mark in zip(row, marks, strict=True)) + "</tr>"
        for row in rows
    ]
    return Html(
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def problem(title: Cell, lines: Sequence[tuple[str, Cell]]) -> Html:
    """Return an error box without empty lines."""
    inside = "".join(f"<p><b>{escape(name)}</b> {put(value)}</p>" for name, value in lines if value not in ("", None))
    return Html(f'<div class="problem"><p><b>{put(title)}</b></p>{inside}</div>')


def folded(summary: Cell, content: Html, *, is_open: bool = False) -> Html:
    """Return a collapsible block."""
    return Html(f"<details{' open' if is_open else ''}><summary>{put(summary)}</summary>{content.text}</details>")


def code(text: object) -> Html:
    """Return a name in the fixed-width font."""
    return Html(f"<code>{escape(str(text))}</code>")


def codes(texts: Iterable[object]) -> Html:
    """Return several names, one per line."""
    return Html("<br>".join(code(text).text for text in texts))


def write_page(path: Path, text: str) -> None:
    """Write a page and create its folder.

    Raises:
        DownloadError: ``output_dir`` or ``disk_full`` if the file cannot be written.
    """
    with os_errors_as(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
