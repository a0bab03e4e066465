"""Problems of a rule set, a checkpoint and a module: one record per gap, one error for all of them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from port_kit.errors import RemapError
from port_kit.remap.names import NUMBER, template_of

#: Problems of one error that are written out, and for which the closest name is searched.
SHOWN = 12


@dataclass(frozen=True)
class Problem:
    """One gap.

    Attributes:
        code: a ``remap_...`` code.
        message: the failure, with the expected and the found value.
        rule: the pattern of the rule, if one is involved.
        source, file, target: the source tensor, its file, and the target tensor.
        near: the closest existing name, if a name does not exist.
        missing: shards of a fused target, or parts of a join, that no source fills.
    """

    code: str
    message: str
    rule: str = ""
    source: str = ""
    file: str = ""
    target: str = ""
    near: str = ""
    missing: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the fields that are set."""
        return {key: value for key, value in asdict(self).items() if value}

    def __str__(self) -> str:
        texts = {f"-> {self.target}": self.target, f"(in {self.file})": self.file, f"[rule {self.rule}]": self.rule}
        added = [text for text, name in texts.items() if name and name not in self.message]
        near = [f"- did you mean {self.near}?"] if self.near else []
        return " ".join([self.message, *added, *near])


HINTS = {
    "remap_ambiguous": "restrict one of the patterns, or give each rule its part of the source (take)",
    "remap_beyond_layers": "the checkpoint has more layers than the module: check the configuration",
    "remap_collision": "two rules must not write the same elements: correct a target or a shard",
    "remap_dead_rule": "correct the pattern, remove the rule, or mark it optional",
    "remap_dtype": "add a cast, set allow_downcast on the rule set, or build the module in the checkpoint's dtype",
    "remap_incomplete_group": "the checkpoint lacks a part, or no rule maps it here",
    "remap_missing": "add a rule for it, or keep it with a reason",
    "remap_mixed": "load either the original or the converted checkpoint, or say which it is (converted=...)",
    "remap_op": "check the op against the shapes in the message",
    "remap_overlap": "check take, into and the sizes of split and concat",
    "remap_shape": "compare the rule with both shapes; the configuration may not be the checkpoint's",
    "remap_slot": "use a shard that the target has, or concat for a plain parameter",
    "remap_tensor": "convert it to a dense tensor in memory before loading",
    "remap_unexpected": "add a rule for it, or drop it with a reason; or say that the names are converted",
    "remap_unused": "use the rest of the source, or drop it with a reason (drop with take)",
}


class Names(dict[str, str]):
    """Names that many others are compared with, each with its layer template."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__((name, template_of(name)) for name in names)

    @cached_property
    def templates(self) -> dict[str, str]:
        """The first name of each template."""
        return {template: name for name, template in reversed(self.items())}


def closest_match(name: str, names: Collection[str], cutoff: float = 0.6) -> str:
    """Return the most similar existing name, or an empty text.

    Names are compared by layer template first: among thousands of names only a few dozen templates differ.
    """
    known = names if isinstance(names, Names) else Names(names)
    found = difflib.get_close_matches(template_of(name), known.templates, n=1, cutoff=cutoff)
    if not found:
        return ""
    numbers = iter(NUMBER.findall(name))
    guess = re.sub("#", lambda match: next(numbers, "0"), found[0])
    return guess if guess in known else known.templates[found[0]]


def raise_problems(problems: Sequence[Problem], subject: str, hint: str = "") -> None:
    """Raise one error for all problems, if there are any. Without a hint, it has that of the first problem.

    Raises:
        RemapError: with the code that all problems share, or ``remap_failed``; the problems are in ``details``.
    """
    if not problems:
        return
    codes = sorted({problem.code for problem in problems})
    code = codes[0] if len(codes) == 1 else "remap_failed"
    shown = [f"  {problem.code.removeprefix('remap_')}: {problem}" for problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        shown.append(f"  ... and {len(problems) - SHOWN} more")
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    raise RemapError(
        "\n".join([f"{subject}: {count}", *shown]),
        code=code,
        hint=hint or HINTS.get(problems[0].code, "see the problems one by one"),
        problems=[problem.to_json() for problem in problems],
    )


def remap_error(code: str, message: str, hint: str = "") -> RemapError:
    """Return an error; without a hint, it has that of its code."""
    return RemapError(message, code=code, hint=hint or HINTS[code])
