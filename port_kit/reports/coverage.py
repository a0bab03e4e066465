"""HTML page of ``coverage --html``: sources and targets by layer template, and every gap with a hint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from port_kit.remap.problems import HINTS
from port_kit.reports import html
from port_kit.reports.html import Html


def coverage_page(title: str, components: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the page.

    Args:
        title: title of the page.
        components: :meth:`port_kit.remap.coverage.Coverage.to_json` of each; one of a single check may be unnamed.
    """
    ok = all(report["ok"] for report in components.values())
    gaps = sum(report["problem_count"] for report in components.values())
    parts = [
        html.verdict(ok, "every element accounted for", f"{gaps} gap{'s' if gaps != 1 else ''}"),
        html.facts(
            [
                ("source tensors", sum(report["source"]["tensors"] for report in components.values())),
                ("source bytes", f"{sum(report['source']['bytes'] for report in components.values()):,}"),
                ("target tensors", sum(report["target"]["tensors"] for report in components.values())),
                ("rules", sum(report["rules"]["count"] for report in components.values())),
            ]
        ),
    ]
    if len(components) > 1:
        parts.append(_overview(components))
    for name, report in components.items():
        parts += _component(name, report)
    return html.page(f"Coverage of {title}", "from names, shapes and dtypes alone; no weight was read", parts)


def _overview(components: Mapping[str, Mapping[str, Any]]) -> Html:
    rows = [
        (
            Html(f'<a href="#{html.put(name)}">{html.put(name)}</a>'),
            f"{report['source']['used']} of {report['source']['tensors']}",
            f"{report['target']['written']} of {report['target']['tensors']}",
            len(report["dropped"]),
            html.verdict(report["ok"], "complete", f"{report['problem_count']} gaps"),
        )
        for name, report in components.items()
    ]
    return html.table(("component", "sources used", "targets written", "dropped", ""), rows, ("", "n", "n", "n", ""))


def _component(name: str, report: Mapping[str, Any]) -> list[Html]:
    source, target, rules = report["source"], report["target"], report["rules"]
    parts = [html.heading(name or rules["name"], name)]
    rows: list[tuple[str, Html, str]] = [
        ("source", html.code(source["origin"]), f"{source['used']} of {source['tensors']} tensors used"),
        ("target", html.code(target["origin"]), f"{target['written']} of {target['tensors']} tensors written"),
        ("configuration", html.code(target.get("config") or "none"), "the target is built with it"),
        ("rules", html.code(rules["name"]), f"{rules['count']} rules; the target is {target['from']}"),
    ]
    parts.append(html.table(("", "", ""), rows))
    parts += [_problem(problem) for problem in report["problems"]]
    if report["converted"]:
        parts.append(Html("<p>The source has the target's names already and passes through unchanged.</p>"))
    elif report["lines"]:
        parts.append(_templates(report["lines"], is_open=len(report["lines"]) <= 40))
    for word in ("dropped", "kept"):
        if report[word]:
            parts.append(_reasons(word, report[word]))
    return parts


def _templates(lines: list[Mapping[str, Any]], *, is_open: bool) -> Html:
    rows = [
        (html.codes(line["source"]), line["shape"], html.codes(line["target"]), line["how"], line["count"])
        for line in lines
    ]
    columns = ("source, by layer template", "shape", "target", "how", "tensors")
    table = html.table(columns, rows, ("", "code", "", "", "n"))
    return html.folded(f"{len(lines)} layer templates", table, is_open=is_open)


def _problem(problem: Mapping[str, Any]) -> Html:
    count = problem.get("count", 1)
    word = str(problem["code"]).removeprefix("remap_")
    return html.problem(
        f"{word}{f', {count} times' if count > 1 else ''}",
        [
            ("", problem["message"]),
            ("sources:", html.codes(problem["sources"]) if problem.get("sources") else ""),
            ("targets:", html.codes(problem["targets"]) if problem.get("targets") else ""),
            ("file:", html.code(problem["file"]) if problem.get("file") else ""),
            ("rule:", html.code(problem["rule"]) if problem.get("rule") else ""),
            ("did you mean:", html.code(problem["near"]) if problem.get("near") else ""),
            ("hint:", HINTS.get(problem["code"], "")),
        ],
    )


def _reasons(word: str, names: Mapping[str, str]) -> Html:
    reasons: dict[str, list[str]] = {}
    for name, reason in names.items():
        reasons.setdefault(reason, []).append(name)
    rows = [(reason, len(group), html.codes(group[:20])) for reason, group in reasons.items()]
    return html.folded(f"{len(names)} {word}", html.table(("reason", "tensors", "names"), rows, ("", "n", "")))
