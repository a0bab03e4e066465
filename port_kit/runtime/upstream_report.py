"""Changes of the used upstream surface: ``python -m port_kit.runtime.upstream_report``.

It compares the installed vLLM-Omni, of any version, with the recorded surface of its series, or of the newest recorded
series if its own has no record. The exit status is 1 if a used name is gone, a signature differs or a precondition of
the registry does not hold. Changed bodies are listed for review.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from port_kit.errors import PortKitError
from port_kit.upstream.checks import differences
from port_kit.upstream.registry import REGISTRY
from port_kit.upstream.series import SERIES
from port_kit.upstream.surface import (
    Described,
    Surface,
    read_installed,
    read_record,
    record_path,
    recorded_series,
    write_record,
)
from port_kit.upstream.used_names import UsedNames, used_names


@dataclass(frozen=True)
class Gone:
    """Used name that does not exist: the error of its import, and its users."""

    error: str
    users: Sequence[str]


@dataclass(frozen=True)
class Report:
    """Differences of an installed release from a recorded one.

    Attributes:
        release: installed version of vLLM-Omni.
        against: version of the record.
        names: number of used names that exist.
        gone: used names that do not exist.
        signatures: kind and signature before and after, by name.
        bodies: names whose source differs and whose signature does not.
        unrecorded: used names that exist and are not in the record.
        guards: number of entries of the registry.
        failing: differences, by entry of the registry.
    """

    release: str
    against: str
    names: int
    gone: Mapping[str, Gone]
    signatures: Mapping[str, tuple[str, str]]
    bodies: Sequence[str]
    unrecorded: Sequence[str]
    guards: int
    failing: Mapping[str, Sequence[str]]

    @property
    def ok(self) -> bool:
        """True if no name is gone, no signature differs and all preconditions hold."""
        return not (self.gone or self.signatures or self.failing)

    def describe(self) -> str:
        """Return the report as text."""
        lines = [f"vLLM-Omni {self.release}, compared with the recorded {self.against}: {self.names} used names"]
        lines += _section(
            "gone", [f"{name} ({one.error})\n    in {', '.join(one.users)}" for name, one in self.gone.items()]
        )
        changes = [f"{name}{_changed_parts(*both)}" for name, both in self.signatures.items()]
        lines += _section("signature changed", changes)
        lines += _section("body changed", self.bodies)
        lines += _section("not recorded", self.unrecorded)
        lines.append(f"guards: {self.guards - len(self.failing)} of {self.guards} hold")
        lines += [f"  {name}: {found}" for name, each in self.failing.items() for found in each]
        return "\n".join(lines)


def _changed_parts(before: str, after: str) -> str:
    """Return a line for the removed and one for the added parameters, or both texts if only the order differs."""
    old, new = before.removesuffix(")").split(", "), after.removesuffix(")").split(", ")
    removed = ", ".join(part for part in old if part not in new)
    added = ", ".join(part for part in new if part not in old)
    if not removed and not added:
        removed, added = before, after
    return (f"\n    - {removed}" if removed else "") + (f"\n    + {added}" if added else "")


def _section(title: str, items: Sequence[str]) -> Iterator[str]:
    yield f"{title}: {len(items)}"
    yield from (f"  {item}" for item in items)


def compare(used: UsedNames, installed: Surface, record: Surface, failing: Mapping[str, Sequence[str]]) -> Report:
    """Compare the installed surface with a recorded one. Recorded names that the kit no longer uses do not count."""
    both = installed.names.keys() & record.names.keys()
    signatures = {
        name: (before, after)
        for name in sorted(both)
        if (before := _shape(record.names[name])) != (after := _shape(installed.names[name]))
    }
    changed = (name for name in both if record.names[name].digest != installed.names[name].digest)
    return Report(
        release=installed.release,
        against=record.release,
        names=len(installed.names),
        gone=dict(_gone(used, installed, record)),
        signatures=signatures,
        bodies=sorted(name for name in changed if name not in signatures),
        unrecorded=sorted(installed.names.keys() - record.names.keys()),
        guards=len(REGISTRY),
        failing=failing,
    )


def _gone(used: UsedNames, installed: Surface, record: Surface) -> Iterator[tuple[str, Gone]]:
    for name in sorted({*installed.missing, *record.names} - installed.names.keys()):
        if users := used.users(name):
            yield name, Gone(installed.missing.get(name, "its class has no such method"), users)


def _shape(described: Described) -> str:
    return f"{described.kind} {described.signature}".strip()


def failing_guards(series: str) -> dict[str, list[str]]:
    """Return the differences of the installed release from the values of a series, by entry of the registry."""
    found = {name: [str(each) for each in differences(entry, series)] for name, entry in REGISTRY.items()}
    return {name: each for name, each in found.items() if each}


def installed_surface(used: UsedNames) -> Surface:
    """Return the surface of the installed vLLM-Omni, supported or not.

    Plugins stay off in this process (``VLLM_PLUGINS``): the kit's own refuse an unsupported version.
    """
    os.environ["VLLM_PLUGINS"] = ""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    release = version("vllm-omni")
    with redirect_stdout(sys.stderr):  # vLLM logs to stdout, which is reserved for data
        return read_installed(used, release)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report, or record the installed surface; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m port_kit.runtime.upstream_report", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--record", action="store_true", help="record the surface of the installed series")
    parser.add_argument("--against", metavar="SERIES", help=f"recorded series: {', '.join(recorded_series())}")
    options = parser.parse_args(arguments)
    series = ".".join(version("vllm-omni").split(".")[:2])
    expected = series if series in SERIES else SERIES[-1]
    used = used_names(expected)
    installed = installed_surface(used)
    if options.record:
        print(write_record(installed, series))
        return 0
    own = series if record_path(series).is_file() else recorded_series()[-1]
    report = compare(used, installed, read_record(options.against or own), failing_guards(expected))
    print(json.dumps(_as_json(report), indent=1) if options.json else report.describe())
    return 0 if report.ok else 1


def _as_json(report: Report) -> dict[str, Any]:
    return {"ok": report.ok, **asdict(report)}


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PortKitError as error:
        sys.exit(f"[{error.code}] {error.message} {error.hint}")
