"""Lines of each worked port that ``port-kit new`` generated, that were kept, and that were written.

python benchmarks/worked_ports.py            # a table; exit code 1 if less than 80 % of the lines were kept

The models are published on a loopback Hub and a git server, and each port is generated anew by the command of
``docs/port_a_model.md``. Lines of modules, scripts, tests and pages are counted, without blank lines. Files of data are
not: the listed tensors, and the rules, which ``port-kit rules suggest`` proposes.
"""

from __future__ import annotations

import difflib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from port_kit.testing import GitServer, Hub
from port_kit.testing.hub_tree import read_repositories

ROOT = Path(__file__).parents[1]
PORTS = ROOT / "examples" / "worked_ports"
#: Arguments of ``port-kit new`` by the folder of the port; ``--code`` is that of the git server.
COMMANDS = {
    "video": ("driftwood", "--from", "driftwood-ai/driftwood", "--from", "driftwood-ai/projector"),
    "audio": ("murmur", "--output", "audio", "--from", "murmur-audio/murmur", "--from", "murmur-audio/vocoder"),
    "image": ("retouch", "--output", "image", "--from", "retouch-lab/retouch", "--from", "retouch-lab/codec"),
}
LEAST_KEPT = 0.8
_COUNTED = (".py", ".md", ".toml")


@dataclass(frozen=True)
class Lines:
    """Lines of a port.

    Attributes:
        generated: by ``port-kit new``.
        kept: of those, unchanged in the finished port.
        written: in the finished port and not generated.
    """

    generated: int
    kept: int
    written: int

    @property
    def share(self) -> float:
        """Part of the generated lines that was kept."""
        return self.kept / self.generated


def main() -> int:
    """Print the table."""
    print("| port | generated | kept | | written |\n|---|---|---|---|---|")
    counts = dict(count_all())
    for kind, lines in counts.items():
        print(f"| {kind} | {lines.generated} | {lines.kept} | {lines.share:.0%} | {lines.written} |")
    return int(min(lines.share for lines in counts.values()) < LEAST_KEPT)


def count_all() -> Iterator[tuple[str, Lines]]:
    """Generate every port; yield its folder and its lines."""
    with tempfile.TemporaryDirectory(prefix="port-kit-") as scratch:
        folder = Path(scratch)
        subprocess.run([sys.executable, str(PORTS / "publish.py"), str(folder)], check=True, stderr=subprocess.DEVNULL)
        with Hub(read_repositories(folder / "hub", None)) as hub, GitServer(folder / "git") as server:
            environment = {**os.environ, **hub.environment}
            for kind, arguments in COMMANDS.items():
                target, code = folder / "ports" / kind, server.url(arguments[0])
                command = ["-m", "port_kit", "new", *arguments, "--path", "custom", "--code", code]
                subprocess.run(
                    [sys.executable, *command, "--output-dir", str(target)],
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    check=True,
                )
                yield kind, count(target, PORTS / kind)


def count(generated: Path, finished: Path) -> Lines:
    """Compare two folders file by file."""
    old, new = _read(generated), _read(finished)
    kept = 0
    for path, lines in old.items():
        matcher = difflib.SequenceMatcher(None, lines, new.get(path, []), autojunk=False)
        kept += sum(block.size for block in matcher.get_matching_blocks())
    return Lines(sum(map(len, old.values())), kept, sum(map(len, new.values())) - kept)


def _read(folder: Path) -> dict[str, list[str]]:
    """Return the lines of the counted files, by their paths."""
    found = {path.relative_to(folder): path for path in folder.rglob("*") if path.suffix in _COUNTED}
    rules = {path for path in found if path.suffix == ".toml" and path.name != "pyproject.toml"}
    counted = {path: file for path, file in found.items() if path.parts[0] != "original" and path not in rules}
    return {
        path.as_posix(): [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        for path, file in counted.items()
    }


if __name__ == "__main__":
    raise SystemExit(main())
