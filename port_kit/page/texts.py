"""Parts of the page as HTML: progress, settings of a clip, errors. What servers and users wrote is escaped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import Any

#: Fields of a record that the settings of a clip show, in this order, with their names.
_SHOWN = {"seed": "seed", "num_inference_steps": "steps", "size": "size", "seconds": "seconds", "model": "model"}
_LONGEST = 600


def progress_text(record: Mapping[str, Any], elapsed: float) -> str:
    """Return one line on a job that is not finished.

    Args:
        record: of the job; fields that the server does not have are left out.
        elapsed: seconds since it was submitted.
    """
    ahead, step, steps = (record.get(name) for name in ("queue_position", "step", "steps"))
    if ahead:
        parts = [f"Waiting for {ahead} other request{'s' if ahead > 1 else ''}"]
    elif record.get("status") == "queued":
        parts = ["Waiting"]
    elif step is not None and steps:
        parts = ["Decoding" if step >= steps else f"Step {step} of {steps}"]
    else:
        parts = ["Running"]
    remaining = record.get("remaining_seconds")
    if remaining is not None:
        parts.append(f"about {duration(remaining)} left")
    return " · ".join([*parts, f"{duration(elapsed)} so far"])


def duration(seconds: float) -> str:
    """Return a number of seconds as ``8 s`` or ``2 min 5 s``."""
    whole = max(0, round(seconds))
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60} s"


def progress_html(text: str, percent: float | None) -> str:
    """Return a bar with a line below it; without a percentage, the bar moves."""
    known = percent is not None
    width = f"width:{min(100.0, max(0.0, percent or 0.0)):g}%" if known else ""
    bar = f'<div class="pk-bar{"" if known else " pk-moving"}"><div style="{width}"></div></div>'
    return f'<div class="pk-progress" role="status">{bar}<p>{escape(text)}</p></div>'


def note_html(text: str, kind: str = "note") -> str:
    """Return a line of text; ``kind`` is ``note``, ``good`` or ``error``."""
    role = "alert" if kind == "error" else "status"
    return f'<div class="pk-{kind}" role="{role}">{escape(text)}</div>'


def settings_of(record: Mapping[str, Any], form: Mapping[str, str], seconds: float) -> dict[str, str]:
    """Return the settings of a clip by name: those of the record, then those that the request gave."""
    found = {name: str(record[key]) for key, name in _SHOWN.items() if record.get(key) not in (None, "")}
    found["model"] = found.get("model", "").rstrip("/").rpartition("/")[2]
    options = json.loads(form.get("extra_params", "{}"))
    given = {name: value for name, value in form.items() if name not in ("extra_params", *_SHOWN)}
    if {"width", "height"} <= set(given):
        found.setdefault("size", f"{given.pop('width')}x{given.pop('height')}")
    found |= {name: str(value) for name, value in {**given, **options}.items() if name != "prompt"}
    found |= {"made in": duration(seconds), "prompt": form["prompt"]}
    return {name: value for name, value in found.items() if value}


def settings_html(settings: Mapping[str, str]) -> str:
    """Return settings as a list of names and values."""
    rows = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(_short(value))}</dd></div>" for name, value in settings.items()
    )
    return f'<dl class="pk-settings">{rows}</dl>'


def caption_of(settings: Mapping[str, str]) -> str:
    """Return the caption of a clip in the gallery."""
    return " · ".join(f"{name} {settings[name]}" for name in ("seed", "steps") if name in settings)


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
