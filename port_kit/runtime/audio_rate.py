"""Sample rate of audio results; see ``audio_sample_rate`` in ``patches.md``."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any


def with_short_key(format_output: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Wrap a formatter of audio results to give the sample rate in Hz under ``sr``, too.

    Args:
        format_output: returns a mapping that may have ``audio_sample_rate``.
    """

    @wraps(format_output)
    def run(*arguments: Any, **keywords: Any) -> dict[str, Any]:
        output = format_output(*arguments, **keywords)
        if "audio_sample_rate" in output:
            output.setdefault("sr", output["audio_sample_rate"])
        return output

    return run
