"""HTML page of ``verify parity --html``: cases, differences, and the first divergence of each case."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from port_kit.reports import html
from port_kit.reports.html import Html

_WIDTH, _HEIGHT = 160, 10  # pixels of a bar
#: Decades below the bound that a bar shows; smaller values have no length.
_DECADES = 8


def parity_page(data: Mapping[str, Any]) -> str:
    """Return the page.

    Args:
        data: the ``data`` of ``port-kit verify parity --json``.
    """
    cases: list[Mapping[str, Any]] = data["cases"]
    held = sum(case["ok"] for case in cases)
    parts: list[Html] = [html.verdict(data["ok"], "within all bounds", "outside its bounds")]
    pairs = sum(len(case["differences"]) for case in cases)
    seconds = sum(case["seconds"] for case in cases)
    parts.append(
        html.facts(
            [
                ("cases within bounds", f"{held} of {len(cases)}"),
                ("tensors compared", pairs),
                ("seconds", f"{seconds:.1f}"),
            ]
        )
    )
    if "reference" in data:
        parts.append(_provenance(data["reference"]))
    parts.append(_overview(cases))
    failures = [case for case in cases if not case["ok"]]
    if failures:
        parts.append(html.heading("Where it parts"))
        parts += [_failure(case) for case in failures]
    for component, group in groupby(cases, key=lambda case: component_of(case["case"])):
        parts.append(html.heading(component, component))
        parts += [_case(case) for case in group]
    return html.page(f"Parity of {data['port']}", f"against the goldens {Path(data['goldens']).name}", parts)


def _overview(cases: list[Mapping[str, Any]]) -> Html:
    rows = []
    for component, group in groupby(cases, key=lambda case: component_of(case["case"])):
        members = list(group)
        held = sum(case["ok"] for case in members)
        worst = max((used(item) for case in members for item in case["differences"]), default=0.0)
        link = Html(f'<a href="#{html.put(component)}">{html.put(component)}</a>')
        share = "exact" if worst == 0 else f"{worst:.2g} of a bound"
        rows.append((link, f"{held} of {len(members)}", share, html.verdict(held == len(members))))
    return html.table(("component", "cases within bounds", "largest difference", ""), rows, ("", "n", "n", ""))


def component_of(case: str) -> str:
    """Return the component that a case is about: the first folder of its name, or the name without its dtype."""
    return case.partition("/")[0] if "/" in case else case.partition(" ")[0]


def _provenance(reference: Mapping[str, Any]) -> Html:
    made = reference["made_from"]
    rows: list[tuple[str, html.Cell]] = [
        ("original code", html.code(f"{made['code']}, {reference['code_version']}")),
        ("model", html.code(Path(reference["model"]).name)),
        ("interpreter", html.code(Path(reference["python"]).name)),
        ("recorded", "earlier, and used again" if reference["reused"] else f"now, in {reference['seconds']} s"),
    ]
    return html.table(("the goldens", ""), rows)


def _failure(case: Mapping[str, Any]) -> Html:
    first = next(item for item in case["differences"] if not item["ok"])
    before = [item["name"] for item in case["differences"]]
    index = before.index(first["name"])
    return html.problem(
        case["case"],
        [
            ("first tensor outside its bound:", html.code(first["name"])),
            ("difference:", _figures(first)),
            ("allowed:", f"{_bound(first['bound'])} ({first['bound']['why']})"),
            ("last one that agrees:", html.code(before[index - 1]) if index else "none: it is the first"),
            ("hint:", _hint(first, index)),
        ],
    )


def _hint(first: Mapping[str, Any], index: int) -> str:
    if not math.isfinite(first["max_abs"]):
        return "a value is not finite: look for an overflow or an uninitialized parameter in the module of that name"
    if index == 0:
        return "the first tensor differs already: look at its weights (port-kit coverage) and at how inputs are read"
    return "what comes before agrees: look at the module between these two tensors"


def _case(case: Mapping[str, Any]) -> Html:
    rows = [
        (
            html.code(item["name"]),
            f"{item['max_abs']:.2e}",
            f"{item['rel_l2']:.2e}",
            _bound(item["bound"]),
            _bar(item),
            html.verdict(item["ok"]),
        )
        for item in case["differences"]
    ]
    columns = ("tensor, in forward order", "max abs", "rel L2", "bound", "how much of it", "")
    content = html.table(columns, rows, ("", "n", "n", "n", "", ""))
    count = f"{len(rows)} tensor{'s' if len(rows) != 1 else ''}"
    words = f"{case['case']}: {count}, largest difference {case['max_abs']:.2e}, {case['seconds']:.1f} s "
    summary = Html(html.put(words) + html.verdict(case["ok"]).text)
    return html.folded(summary, content, is_open=not case["ok"])


def _figures(item: Mapping[str, Any]) -> str:
    return f"max abs {item['max_abs']:.3e}, relative L2 {item['rel_l2']:.3e}"


def _bound(bound: Mapping[str, Any]) -> str:
    limits = (("abs", bound["max_abs"]), ("rel L2", bound["rel_l2"]))
    return ", ".join(f"{name} {value:.1e}" for name, value in limits if value is not None)


def used(item: Mapping[str, Any]) -> float:
    """Return the largest share of a bound that a difference uses: 1 is all of it, more is too much."""
    pairs = ((item["max_abs"], item["bound"]["max_abs"]), (item["rel_l2"], item["bound"]["rel_l2"]))
    shares = [_share(value, limit) for value, limit in pairs if limit is not None]
    return math.inf if any(math.isnan(share) for share in shares) else max(shares)


def _share(value: float, limit: float) -> float:
    if limit == 0.0:
        return 0.0 if value == 0.0 else math.inf
    return value / limit


def _bar(item: Mapping[str, Any]) -> Html:
    """Draw the share on a logarithmic scale that ends at ten times the bound; the line is the bound."""
    share = used(item)
    decades = _DECADES + 1
    places = 0.0 if share <= 0 else min(max(math.log10(min(share, 10.0)) + _DECADES, 0.0), decades)
    length, line = round(_WIDTH * places / decades, 1), round(_WIDTH * _DECADES / decades, 1)
    kind = "bar" if item["ok"] else "bar over"
    title = "exact" if share == 0 else f"{share:.2g} of the bound"
    return Html(
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img"><title>{html.put(title)}</title>'
        f'<rect class="track" width="{_WIDTH}" height="{_HEIGHT}"/>'
        f'<rect class="{kind}" width="{length}" height="{_HEIGHT}"/>'
        f'<line class="bound" x1="{line}" x2="{line}" y2="{_HEIGHT}"/></svg>'
    )
