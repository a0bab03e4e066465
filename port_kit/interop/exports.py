"""Write the rules that only rename as Python source for vLLM or transformers.

Both libraries apply all entries in turn. If an entry may match the result of another one, renamed names get a marker
that no entry matches and that the last entry removes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from port_kit.errors import RemapError
from port_kit.interop.imports import Refusals, may_meet, source_head, target_head
from port_kit.remap.patterns import compile_pattern, parse_template
from port_kit.remap.rules import Rule, RuleSet

MARKER = "@renamed@"
#: Characters with a meaning in transformers' targets.
_SPECIAL = re.compile(r"[\\()^$]")
#: Parts of a source that transformers rewrites, and names that its own groups have.
_REREAD = re.compile(r"\*\.|\?P<g\d")


def export_mapping(rules: RuleSet, form: str, *, partial: bool = False) -> tuple[str, Refusals]:
    """Write the rules that only rename.

    Args:
        rules: the rule set.
        form: ``vllm`` or ``transformers``.
        partial: leave out the rules that do more.

    Returns:
        The Python source, and the rules that are left out with the reasons.

    Raises:
        RemapError: ``remap_interop`` for rules that do more than rename.
    """
    counts = Counter(rule.source for rule in rules)
    left_out, kept = Refusals(), []
    for rule in sorted(rules, key=lambda rule: rule.fallback):  # a fallback comes last: it matches the remaining names
        reason = _reason(rule, form, counts[rule.source])
        if reason:
            left_out[rule.label] = reason
        else:
            kept.append(rule)
    if not partial:
        left_out.check("--partial writes the others and lists these")
    marker = MARKER if _chains(kept) else ""
    if any(MARKER in rule.source or MARKER in rule.targets[0] for rule in kept):
        raise RemapError(f"a rule has {MARKER} in a name", code="remap_interop", hint="rename it")
    guard = f"(?!{marker})" if marker else ""
    pairs = [(f"^{guard}(?:{rule.source})$", marker + _replacement(rule, form)) for rule in kept]
    lines = [
        f'"""Weight names of {rules.name}."""',
        "",
        *(f"# left out: {key}: {why}" for key, why in left_out.items()),
    ]
    return "\n".join(lines + (_vllm if form == "vllm" else _transformers)(pairs, marker)) + "\n", left_out


def _vllm(pairs: Sequence[tuple[str, str]], marker: str) -> list[str]:
    return [
        "import re",
        "",
        "from vllm.model_executor.models.utils import WeightsMapper",
        "",
        "MAPPER = WeightsMapper(",
        "    orig_to_new_regex={",
        *(f"        re.compile({_raw(source)}): {_raw(target)}," for source, target in pairs),
        "    },",
        *([f'    orig_to_new_prefix={{"{marker}": ""}},'] if marker else []),
        ")",
    ]


def _transformers(pairs: Sequence[tuple[str, str]], marker: str) -> list[str]:
    # WeightRenaming of transformers 5.19 reads no group but \1, and fails if that one took no part in the match
    return [
        "from transformers.core_model_loading import GroupWeightRename",
        "",
        "MAPPING = [",
        *(f"    GroupWeightRename([{_raw(source)}], [{_raw(target)}])," for source, target in pairs),
        *([f'    GroupWeightRename(["^{marker}"], [""]),'] if marker else []),
        "]",
    ]


def _reason(rule: Rule, form: str, count: int) -> str:
    """Return why a rule cannot be written; empty if it only renames."""
    fields = [name for name in ("drop", "keep", "op", "take", "into", "shard") if getattr(rule, name)]
    if fields:
        return f"it has {' and '.join(fields)}"
    if count > 1 or len(rule.targets) > 1:
        return "its source has several targets"
    parts = parse_template(rule.targets[0]).parts
    if any(not isinstance(part, str) and part[0] == "size" for part in parts):
        return "its target is computed"
    if form == "transformers":
        if _REREAD.search(rule.source):
            return "transformers gives *. and groups named g0 another meaning"
        texts = [part if isinstance(part, str) else "" for part in parts]
        if any(_SPECIAL.search(text) for text in texts) or any(text[:1].isdigit() for text in texts[1:]):
            return "its target has a character that transformers does not take literally"
    return ""


def _chains(rules: Sequence[Rule]) -> bool:
    return any(may_meet(target_head(one), source_head(other)) for one in rules for other in rules if one is not other)


def _replacement(rule: Rule, form: str) -> str:
    """Return the target in the syntax of the library's replacements."""
    text = ""
    for part in parse_template(rule.targets[0]).parts:
        if isinstance(part, str):
            text += part.replace("\\", r"\\")
        elif form == "vllm":
            text += rf"\g<{part[1]}>"
        else:
            groups = compile_pattern(rule.source).groupindex
            text += rf"\{part[1] if part[1].isdigit() else groups[part[1]]}"
    return text


def _raw(text: str) -> str:
    plain = text.isprintable() and '"' not in text and not text.endswith("\\")
    return f'r"{text}"' if plain else repr(text)
