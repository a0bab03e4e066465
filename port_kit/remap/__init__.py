r"""Weight mapping: load the tensors of a checkpoint into a module, with every element accounted for.

A :class:`RuleSet` is data. Compiled against a source and a target manifest it results in a
:class:`~port_kit.remap.plan.Plan` of copy tasks, which loading, coverage, conversion, export and explanations read.

The language, one field of :class:`Rule` per line::

    source    regular expression over a full source name           r"blocks\.(\d+)\.attn\.(q|k|v)\.weight"
    target    template over its groups: \1, \g<name>, {\1 // 4}    r"layers.\1.attn.qkv.weight"
    shard     shard of a fused target, or part of a joining op     r"\2"       q k v, 0 1, expert.w1
    take      the part of the source that is used, before the ops  "[0:3*h, :]"
    into      the part of the target that is written               r"[\2, 0:ffn]"
    op        one op or a list, applied in order:
                reshape(shape)            to these sizes, -1 once; without a shape: to the target's
                transpose(perm)           all axes; without perm: swaps the last two
                rearrange(pattern, ...)   "(h two d) c -> (two h d) c", named sizes as expressions
                reorder(dim, runs) or reorder(dim, parts, order)     slices of one axis in a new order
                split(dim, sizes)         one part per target; without sizes: the targets' own, or equal parts
                concat(dim, parts, sizes) many sources, the part is in shard; without sizes: the sources' own
                stack(dim)                many sources on a new axis, the index is in shard
                fill                      one value in every element (a scale that shards share)
                cast(dtype)               allows a loss of precision that is refused otherwise
                weight_norm(dim)          shard is g or v: direction times magnitude, folded
                any transform registered with port_kit.remap.transforms.transform
    drop      the reason why a source is not used (with take: why that part is not)
    keep      the reason why a target (a regular expression) keeps its initial values
    optional  the rule may match no source
    fallback  tried only on names that no other rule matches
    variant   "choice:spelling": exactly one spelling of a choice is in the checkpoint, e.g. weight_norm:g_v

Sizes are integers or arithmetic (+ - * // %, parentheses) over the rule set's ``sizes``, the ``sizes=`` given to
compile or load, the source's own extents (``in0``, ``in1`` ...), and a rule's numeric groups (``\1`` or by name). A
source that matches two rules is an error, unless each of them has ``take``, or all have the same source pattern: then
the source is copied to each of their targets. ``RuleSet.under(source, target)`` puts a set under prefixes, ``|`` joins,
``extend`` adds, ``override`` inherits and replaces, ``to_toml``/``from_toml`` write and read it.

Files that the kit converts record which names they have (``port_kit.names`` in their metadata), and rules are applied
to original names only. A checkpoint without that record is taken as original, unless all of its names are names of the
target, no rule matches any of them, and the rules only rename.
"""

from port_kit.remap.coverage import coverage
from port_kit.remap.load import WeightLoader, load_components, load_weights
from port_kit.remap.local import load_local
from port_kit.remap.plan import Plan
from port_kit.remap.resolve import CopyTask
from port_kit.remap.rules import Op, Rule, RuleSet
from port_kit.remap.transforms import transform

__all__ = [
    "CopyTask",
    "Op",
    "Plan",
    "Rule",
    "RuleSet",
    "WeightLoader",
    "coverage",
    "load_components",
    "load_local",
    "load_weights",
    "transform",
]
