r"""Import the weight mappings of other libraries as rule sets.

Three forms are read: vLLM's ``WeightsMapper``, transformers' lists of ``WeightRenaming`` and ``WeightConverter``, and
SGLang's ``param_names_mapping`` dictionaries. All of them apply several rewrites to one name in turn, while a rule
matches complete names and a name matches one rule. Hence two ways to import:

* With the names of a checkpoint, the mapping itself is applied to each name, and rules are written that give the same
  results: one rule for the names that differ in numbers alone.
* Without names, each entry becomes one rule. Entries must be anchored at the start of the name, and the literal text
  that they start with must show that no name meets two of them. Everything else is refused.

An entry that has no equivalent is refused with its name and the reason (``remap_interop``). The libraries are not
imported here: objects are recognized by their attributes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from port_kit.errors import PortKitError, RemapError
from port_kit.escape import quoted, reason_of
from port_kit.interop.generalize import Route, generalize
from port_kit.interop.transformers_lists import converted_routes
from port_kit.manifest import Manifest
from port_kit.port import resolve
from port_kit.remap.matching_time import parse_pattern, sre
from port_kit.remap.patterns import parse_template
from port_kit.remap.rules import Op, Rule, RuleSet

_HINT = "give a WeightsMapper, a list of WeightRenaming and WeightConverter, or a dictionary of name patterns"
_REPLACEMENT = re.compile(r"(\\[1-9]\d?(?!\d)|\\g<(?!0>)\w+>|\\\\)|([{}])|\\", re.DOTALL)


class Refusals(dict[str, str]):
    """The entries that have no equivalent, with the reason."""

    def check(self, hint: str) -> None:
        """Raise ``remap_interop`` if there are any."""
        if self:
            listed = "\n".join(f"  {label}: {why}" for label, why in self.items())
            raise RemapError(f"not expressible:\n{listed}", code="remap_interop", hint=hint, refused=dict(self))


def import_mapping(mapping: object, source: Manifest | None = None, *, name: str = "imported") -> RuleSet:
    """Translate a mapping of another library into rules.

    Args:
        mapping: a ``WeightsMapper``, a list of ``WeightRenaming`` and ``WeightConverter``, or a dictionary of patterns.
        source: names and shapes of the checkpoint; without it only mappings whose entries are independent are accepted.
        name: name of the rule set.

    Raises:
        RemapError: ``remap_interop`` for entries that rules cannot express, ``remap_rules`` for other objects.
    """
    refused = Refusals()
    form = _form(mapping)
    refused.check(_HINT)
    if source is None:
        rules = [_rule(*entry, refused) for entry in _entries(mapping, form, refused)]
        _check_independence([rule for rule in rules if rule is not None], refused)
        refused.check("name the checkpoint with --source: its names are then mapped by the library's own code")
        fallback = Rule(r"(.*)", r"\1", optional=True, fallback=True, note="names that no entry matches")
        return RuleSet(name, (*(rule for rule in rules if rule is not None), fallback))
    if form == "transformers":
        routes = converted_routes(mapping, source, refused)
    else:
        route: Callable[..., tuple[Route, ...]] = _vllm_route if form == "vllm" else _sglang_route
        routes = {text: route(mapping, text, source, refused) for text in source}
    refused.check("write the rules for these entries by hand")
    return RuleSet(name, tuple(generalize(routes)))


def read_mapping(reference: str) -> object:
    """Return the mapping that ``module:attribute`` or ``transformers:MODEL_TYPE`` refers to.

    The attribute may have dots and may be a callable without arguments, such as a class with ``param_names_mapping``.

    Raises:
        RemapError: ``remap_rules`` if there is none.
    """
    module, _, attribute = reference.partition(":")
    first, *rest = attribute.split(".")
    try:
        if module == "transformers":
            registry: Any = resolve("transformers.conversion_mapping:get_checkpoint_conversion_mapping")
            if (listed := registry(attribute)) is not None:
                return [*listed, *(registry("legacy") or ())]  # the loader adds these to every model's
        found: Any = resolve(f"{module}:{first}")
        for part in rest:
            found = getattr(found, part)
        found = found() if callable(found) else found
    except PortKitError:
        raise
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        hint = "give module:attribute of a mapping, or transformers:MODEL_TYPE"
        raise RemapError(f"{reference} cannot be read: {reason_of(error)}", code="remap_rules", hint=hint) from error
    return getattr(found, "param_names_mapping", found)


def _form(mapping: Any) -> str:
    """Return the name of the library that a mapping is made for."""
    if hasattr(mapping, "orig_to_new_prefix") and hasattr(mapping, "apply"):
        return "vllm"
    if isinstance(mapping, (list, tuple)) and all(hasattr(item, "rename_source_key") for item in mapping):
        return "transformers"
    if isinstance(mapping, Mapping) and all(isinstance(key, str) for key in mapping):
        Refusals(
            {key: f"its value is {quoted(value)}" for key, value in mapping.items() if not _is_value(value)}
        ).check("a value is a replacement, a list of them, or (replacement, index, count)")
        try:
            all(map(re.compile, mapping))
        except re.error as error:
            raise RemapError(f"{quoted(error.pattern)}: {reason_of(error)}", code="remap_rules", hint=_HINT) from error
        return "sglang"
    raise RemapError(f"a {type(mapping).__name__} is no mapping of weights", code="remap_rules", hint=_HINT)


def _is_value(value: Any) -> bool:
    if isinstance(value, tuple):
        return [type(part) for part in value] == [str, int, int] and 0 <= value[1] < value[2]
    return all(isinstance(one, str) for one in value) if isinstance(value, list) else isinstance(value, str)


# -- with names ----------------------------------------------------------------------------------------------------


def _vllm_route(mapper: Any, name: str, source: Manifest, refused: Refusals) -> tuple[Route, ...]:
    tensor = SimpleNamespace(shard_id="")  # the mapper leaves the shard on the tensor
    targets = tuple(target for target, _ in mapper.apply([(name, tensor)]))
    if not isinstance(tensor.shard_id, (str, int)):
        label = next(key for key, (_, shard) in mapper.orig_to_new_stacked.items() if shard == tensor.shard_id)
        refused[f"orig_to_new_stacked[{quoted(label)}]"] = f"one tensor for the shards {tensor.shard_id}"
    return (Route(targets, shard=str(tensor.shard_id)),)


def _sglang_route(entries: Mapping[str, Any], name: str, source: Manifest, refused: Refusals) -> tuple[Route, ...]:
    target, place = _rewritten(entries, name)
    if isinstance(target, str) and place is not None and target:
        parts = tuple(map(str, range(place[1])))
        return (Route((target,), parts[place[0]], (Op.of("concat", dim=0, parts=parts),)),)
    if isinstance(target, str):
        return (Route((target,) if target else ()),)
    spec, count = source[name], len(target)
    if count > 1 and spec.numel > 1 and spec.shape[0] % count == 0:
        return (Route(tuple(target), op=(Op.of("split", dim=0, sizes=(f"in0 // {count}",) * count),)),)
    return tuple(Route((one,)) for one in target)  # a copy for each


def _rewritten(entries: Mapping[str, Any], name: str) -> tuple[str | list[str], tuple[int, int] | None]:
    """Apply a dictionary as SGLang does: entries in turn, each at most once, until no entry changes the name.

    Returns:
        The target, or the targets of a split, and which part of how many of the target the tensor is.
    """
    seen, used, place = {name}, set[str](), None
    for _ in range(max(8, 2 * len(entries))):
        for pattern, value in entries.items():
            if pattern in used or re.match(pattern, name) is None:
                continue
            if isinstance(value, list):
                names = [re.sub(pattern, one, name) for one in value]
                if name not in names:
                    return names, None
                continue
            renamed = re.sub(pattern, value[0] if isinstance(value, tuple) else value, name)
            if renamed != name:
                break
        else:
            break
        used.add(pattern)
        name, place = renamed, value[1:] if isinstance(value, tuple) else place
        if name in seen:
            break
        seen.add(name)
    return name, place


# -- without names -------------------------------------------------------------------------------------------------


def _entries(mapping: Any, form: str, refused: Refusals) -> Iterator[tuple[str, str, Any]]:
    """Yield label, pattern and value of the entries that may be anchored at the start of a name; refuse the others."""
    if form == "sglang":  # an empty name drops the tensor
        yield from ((key, key, None if value == "" and key.endswith("$") else value) for key, value in mapping.items())
        return
    for item in mapping if form == "transformers" else mapping.orig_to_new_renaming:
        refused[f"{type(item).__name__}({item.source_patterns})"] = "it depends on the names of the checkpoint"
    for field in ("regex", "substr", "stacked", "prefix", "suffix") if form == "vllm" else ():
        for key, value in getattr(mapping, f"orig_to_new_{field}").items():
            text = getattr(key, "pattern", key)
            label = f"orig_to_new_{field}[{quoted(text)}]"
            if field == "prefix":
                yield label, f"^{re.escape(text)}", value and value.replace("\\", r"\\")
            elif field == "regex" and key.flags == re.compile("").flags:
                yield label, text, value
            else:
                refused[label] = "it is not anchored at the start of a name"


def _rule(label: str, pattern: str, value: Any, refused: Refusals) -> Rule | None:
    """Turn a pattern that is searched in a name into a rule over the complete name."""
    tree = list(parse_pattern(pattern))
    if not tree or tree[0] != (sre.AT, sre.AT_BEGINNING):
        refused[label] = "it is not anchored at the start of a name"
    elif isinstance(value, (list, tuple)):
        refused[label] = "how it splits or joins depends on the checkpoint"
    elif value is not None and any(match[0] == "\\" for match in _REPLACEMENT.finditer(value)):
        refused[label] = f"its replacement {quoted(value)} has an escape that templates do not have"
    else:
        closed = tree[-1] == (sre.AT, sre.AT_END)
        source = pattern[1:-1] if closed else f"{pattern[1:]}(.*)"
        if value is None:
            return Rule(source, drop="the imported mapping drops it", optional=True, note=label)
        template = _REPLACEMENT.sub(lambda match: match[1] or f"\\{match[2]}", value)
        template += "" if closed else rf"\{re.compile(pattern).groups + 1}"
        return Rule(source, template, optional=True, note=label)
    return None


def _check_independence(rules: list[Rule], refused: Refusals) -> None:
    """Refuse entries that may match one name together, or match the result of another one."""
    for rule in rules:
        for other in rules:
            head = source_head(other)
            if other is not rule and (may_meet(source_head(rule), head) or may_meet(target_head(rule), head)):
                refused[rule.note] = f"names that it matches or makes may match {other.note}"


def may_meet(one: str | None, other: str) -> bool:
    """Return True if a name may start with both texts."""
    return one is not None and (one.startswith(other) or other.startswith(one))


def source_head(rule: Rule) -> str:
    """Return the literal text that all names start with that a rule matches."""
    head = ""
    for code, value in parse_pattern(rule.source):
        if code is not sre.LITERAL:
            break
        head += chr(value)
    return head


def target_head(rule: Rule) -> str | None:
    """Return the literal text that all names start with that a rule makes; None for a rule that drops."""
    if rule.drop:
        return None
    first = parse_template(rule.targets[0]).parts[0]
    return first if isinstance(first, str) else ""
