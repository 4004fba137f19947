"""Attributes in which well-known classes keep a number that follows a width.

Attention blocks of timm, torchvision and transformers store their number of heads and the like when they are
made, and `view` by it. The new value is read off the captured graph: what became of the old number in the
module's own operators. Where it became several numbers, the attribute stays. Nothing is trusted: the module is
run and compared afterwards like any other.
"""

from typing import Any

from torch import nn

from secateur.graph import mirrored
from secateur.graph.trace import Survivors, Trace
from secateur.rewriting.listing import find_regions
from secateur.rewriting.rewrite import Rewritten, cut_listing

KNOWN = frozenset(
    """
    num_heads num_attention_heads n_heads heads num_key_value_heads head_dim dim_head attention_head_size
    attn_dim attn_out_dim all_head_size inner_dim hidden_dim embed_dim hidden_size num_features key_dim
    key_attn_dim val_dim val_attn_dim dim_key dim_value out_dim out_channels num_channels num_groups groups
    """.split()
)
"""Names under which these classes keep such numbers."""

SHAPES = frozenset(("shape", "bias_shape"))
"""Names under which they keep the whole shape of a `view`."""

Number = int | tuple[int, ...]


def known_attributes(module: nn.Module) -> dict[str, Number]:
    """The attributes of one module that may follow a width, as they are now."""
    if (
        isinstance(module, Rewritten)
        or type(module).__module__.startswith("torch.nn.")
        or mirrored(module, {})
    ):
        return {}
    found: dict[str, Number] = {}
    for name in sorted(KNOWN | SHAPES):
        value: Any = module.__dict__.get(name)
        if type(value) is int if name in KNOWN else type(value) is tuple and all(map(is_size, value)):
            found[name] = value
    return found


def is_size(x: Any) -> bool:
    """Whether this is a number of positions."""
    return type(x) is int and x > 0


def following(model: nn.Module, trace: Trace, survivors: Survivors) -> dict[str, dict[str, Number]]:
    """Module name -> attributes that change with a cut."""
    (before, _), (after, _) = cut_listing(trace, trace.so_far()), cut_listing(trace, survivors)
    places = find_regions(before)
    later = {step.node: step for step in after.steps}
    edits: dict[str, dict[str, Number]] = {}
    for name, module in model.named_modules():
        attributes = known_attributes(module)
        if not attributes:
            continue
        became: dict[Number, set[Number]] = {}
        for i in places.get((name, 0), []):
            step = before.steps[i]
            if step.module == name and step.node in later:
                note(step.args, later[step.node].args, became)
        for attribute, old in attributes.items():
            new = became.get(old, {old}) - {old}
            if len(new) == 1:
                edits.setdefault(name, {})[attribute] = next(iter(new))
    return edits


def note(before: Any, after: Any, became: dict[Number, set[Number]]) -> None:
    """Collect what each number, and each list of numbers, of an argument became."""
    if type(before) is int and type(after) is int:
        became.setdefault(before, set()).add(after)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        if all(map(is_size, (*before, *after))):
            became.setdefault(tuple(before), set()).add(tuple(after))
        for a, b in zip(before, after, strict=True):
            note(a, b, became)
    elif isinstance(before, dict):
        for key in before.keys() & after.keys():
            note(before[key], after[key], became)
