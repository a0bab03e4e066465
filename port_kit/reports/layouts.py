"""Drawings of a parallel layout as text and as SVG.

vLLM-Omni numbers the ranks of a model so that those of one tensor-parallel group are neighbors, then those of one
sequence, then the guidance branches (``order="tp-sp-pp-cfg-dp"`` in its ``parallel_state``); within a sequence the
Ulysses group is contiguous and Ring strides over it. HSDP shards over blocks of neighboring ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from port_kit.parallel.layout import Layout, divisors

_HIGH, _PAD, _TITLE, _LABEL = 74, 12, 42, 16  # pixels
_LETTER = 5.4  # pixels: width of a letter, on average
_TERMINAL = 110  # columns
_COLOURS = ("#3b6fc4", "#c2631d", "#2f8a5b", "#8b4fb5", "#b3375c", "#5f6b7a", "#8a7a1f", "#1f7f8a")


@dataclass(frozen=True)
class Place:
    """The coordinates of one rank in a layout.

    Attributes:
        rank: global.
        tp, cfg: index in its tensor-parallel and its guidance group.
        sequence: index of its share of the sequence; 0 if it is not shared.
        ulysses, ring, allgather: its index in each kind of sequence group.
        hsdp: index of its share of the parameters.
    """

    rank: int
    tp: int
    sequence: int
    cfg: int
    ulysses: int
    ring: int
    allgather: int
    hsdp: int

    def words(self, layout: Layout) -> list[str]:
        """Return one line per kind of parallelism, with this rank's share."""
        lines = []
        if layout.tp > 1:
            lines.append(f"tp {self.tp}: 1/{layout.tp} of matrices")
        if layout.sequence > 1:
            kinds = (("ulysses", layout.ulysses), ("ring", layout.ring), ("allgather", layout.allgather))
            used = " ".join(f"{kind} {getattr(self, kind)}" for kind, degree in kinds if degree > 1)
            lines.append(f"{used}: tokens, part {self.sequence + 1} of {layout.sequence}")
        if layout.cfg > 1:
            lines.append(f"cfg {self.cfg}: branches i % {layout.cfg} = {self.cfg}")
        if layout.hsdp > 1:
            lines.append(f"hsdp {self.hsdp}: 1/{layout.hsdp} of blocks")
        return lines or ["everything"]


def places(layout: Layout) -> list[Place]:
    """Return the coordinates of every rank of a layout, in rank order."""
    found = []
    for rank in range(layout.world):
        # HSDP alone takes ranks from no other kind: each of them computes everything.
        computing = rank if layout.world == layout.tp * layout.sequence * layout.cfg else 0
        tp, rest = computing % layout.tp, computing // layout.tp
        sequence, cfg = rest % layout.sequence, rest // layout.sequence
        found.append(
            Place(
                rank=rank,
                tp=tp,
                sequence=sequence,
                cfg=cfg,
                ulysses=sequence % layout.ulysses,
                ring=sequence // layout.ulysses % layout.ring,
                allgather=sequence % layout.allgather,
                hsdp=rank % layout.hsdp,
            )
        )
    return found


def layout_text(layout: Layout) -> str:
    """Draw a layout for a terminal: a box a rank, a row for each guidance rank and share of a sequence."""
    cells = [[f"rank {place.rank}", *place.words(layout)] for place in places(layout)]
    width = max(len(line) for cell in cells for line in cell)
    across = max(count for count in divisors(_across(layout)) if count == 1 or count * (width + 3) < _TERMINAL)
    border = "+" + f"{'-' * (width + 2)}+" * across
    lines = [f"{layout}: {layout.world} rank{'s' if layout.world > 1 else ''}", border]
    for start in range(0, len(cells), across):
        row = cells[start : start + across]
        for parts in zip(*row, strict=True):
            lines.append("|" + "".join(f" {part:<{width}} |" for part in parts))
        lines.append(border)
    return "\n".join(lines)


def layout_svg(layout: Layout) -> str:
    """Draw a layout as SVG, legible on light and on dark ground; ranks of one color hold the same tokens."""
    found, across = places(layout), _across(layout)
    rows = -(-len(found) // across)
    cell = max(110, round(_LETTER * max(len(line) for place in found for line in place.words(layout))) + 16)
    high = _HIGH + _LABEL * (len(found[0].words(layout)) - 1) - _LABEL
    legend = _legend(layout)
    width = 2 * _PAD + max(across * (cell + _PAD) - _PAD, round(_LETTER * len(legend)))
    height = _TITLE + _PAD + rows * (high + _PAD)
    title = f"{layout}: {layout.world} rank{'s' if layout.world > 1 else ''}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="10" role="img" aria-label="{escape(title, quote=True)}">',
        f'<text x="{_PAD}" y="{_TITLE - 24}" font-size="13" font-weight="600" fill="#7a828e">{escape(title)}</text>',
        f'<text x="{_PAD}" y="{_TITLE - 8}" fill="#7a828e">{escape(legend)}</text>',
    ]
    for index, place in enumerate(found):
        x, y = _PAD + index % across * (cell + _PAD), _TITLE + index // across * (high + _PAD)
        color = _COLOURS[place.sequence % len(_COLOURS)]
        parts.append(f'<rect x="{x}" y="{y}" width="{cell}" height="{high}" rx="6" fill="{color}"/>')
        lines = [f"rank {place.rank}", *place.words(layout)]
        for line, text in enumerate(lines):
            weight = ' font-weight="700" font-size="12"' if line == 0 else ""
            place_y = y + 18 + line * _LABEL
            parts.append(f'<text x="{x + 8}" y="{place_y}" fill="#fff"{weight}>{escape(text)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _legend(layout: Layout) -> str:
    """Return what a box, a color and a row stand for, with the sizes of the groups."""
    degrees = ", ".join(f"{kind} {degree}" for kind, degree in layout.degrees.items())
    colors = f"one color: the same of {layout.sequence} parts of the tokens" if layout.sequence > 1 else ""
    return "; ".join(filter(None, ("one box: one rank", colors, f"ranks per group: {degrees}" if degrees else "")))


def _across(layout: Layout) -> int:
    """Ranks in a row: neighbors that share matrices, else those that share a sequence, else all."""
    for group in (layout.tp * layout.sequence, layout.world):
        if group > 1:
            return min(group, 4) if group % 4 == 0 else group
    return 1
