"""Text report of an inspection."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from port_kit.download.progress import human
from port_kit.escape import escape_control_chars
from port_kit.inspect.report import TITLES, Component, Finding, Inspection, Memory, ModelCard


def describe(inspection: Inspection) -> str:
    """Return the text report."""
    where = f" at {inspection.commit}" if inspection.commit else ""
    blocks = [
        [f"{inspection.target}{where}: {TITLES[inspection.path]}"],
        _findings("evidence", inspection.evidence),
        ["components", *_table(inspection.components)] if inspection.components else [],
        _findings("missing", inspection.missing),
        _findings("pitfalls", inspection.pitfalls),
        list(_facts(inspection)),
        [f"next: {inspection.next}"],
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _findings(title: str, findings: Sequence[Finding]) -> list[str]:
    rows = [(finding.file, finding.fact) for finding in findings]
    return [title, *_columns(rows)] if rows else []


def _table(components: Iterable[Component]) -> list[str]:
    head = ("name", "class", "size", "tensors", "parameters", "dtype", "format")
    return _columns([head, *(_row(part) for part in components)])


def _row(part: Component) -> tuple[str, ...]:
    class_name = part.class_name + ("" if part.known or not part.class_name else " (unknown)")
    if not part.weights:
        return part.name, class_name or "-", "-", "-", "-", "-", "-"
    return (
        part.name,
        class_name or "-",
        human(part.size),
        f"{part.tensors:,}",
        _count(part.parameters),
        ", ".join(part.dtypes) or "-",
        _format(part),
    )


def _format(part: Component) -> str:
    files = f", {len(part.weights)} files" if len(part.weights) > 1 else ""
    wrappers = dict.fromkeys(file.wrapper for file in part.weights if file.wrapper)
    return ", ".join(part.formats) + files + "".join(f", under {wrapper}" for wrapper in wrappers)


def _count(parameters: int) -> str:
    """``14.3 B``, ``8.1 M``."""
    for limit, unit in ((10**9, "B"), (10**6, "M")):
        if parameters >= limit:
            return f"{parameters / limit:.1f} {unit}"
    return f"{parameters:,}"


def _facts(inspection: Inspection) -> Iterator[str]:
    card = inspection.card
    rows = [("files", f"{inspection.files} files, {human(inspection.size)}")]
    if inspection.memory:
        rows += [("memory", line) for line in _memory(inspection.memory)]
    rows.append(("gate", inspection.gate or _open_gate(card)))
    link = f" ({card.licence_link})" if card.licence_link else ""
    rows.append(("licence", f"{card.licence}{link}" if card.licence else "README.md does not say"))
    rows += [("card", card.problem)] if card.problem else []
    rows += [("task", card.task)] if card.task else []
    rows += [("base model", ", ".join(card.base_models))] if card.base_models else []
    rows += [("code", address) for address in card.code]
    rows += [("mentions", repo_id) for repo_id in card.repositories if repo_id != inspection.target]
    yield from _columns(rows, indent="")


def _open_gate(card: ModelCard) -> str:
    return "open to you; README.md asks for terms to be accepted" if card.asks_terms else "none: the files can be read"


def _memory(memory: Memory) -> Iterator[str]:
    yield f"weights of all components: {_binary(memory.stored)} as stored, {_binary(memory.bfloat16)} in bfloat16"
    ranks = ", ".join(f"{_binary(size)} on {count}" for count, size in memory.per_rank.items() if count > 1)
    yield f"on each of several GPUs with {' and '.join(memory.sharded)} sharded: {ranks}; activations come on top"


def _binary(count: float) -> str:
    """Memory is counted in powers of two: ``21.4 GiB``."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _columns(rows: Sequence[Sequence[str]], indent: str = "  ") -> list[str]:
    rows = [[escape_control_chars(cell) for cell in row] for row in rows]
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return [f"{indent}{line}".rstrip() for line in lines]
