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
from secateur.surgery.listing import regions
from secateur.surgery.rewrite import Rewritten, cut_listing

KNOWN = frozenset(
    """
    num_heads num_attention_heads n_heads heads num_key_value_heads head_dim dim_head attention_head_size
    attn_dim attn_out_dim all_head_size inner_dim hidden_dim embed_dim hidden_size num_features key_dim
    key_attn_dim val_dim val_attn_dim dim_key dim_value out_dim out_channels num_channels num_groups groups
    """.split()
)
"""Names under which these classes keep such numbers."""


def known_attributes(module: nn.Module) -> dict[str, int]:
    """The attributes of one module that may follow a width, as they are now."""
    if (
        isinstance(module, Rewritten)
        or type(module).__module__.startswith("torch.nn.")
        or mirrored(module, {})
    ):
        return {}
    return {name: module.__dict__[name] for name in sorted(KNOWN) if type(module.__dict__.get(name)) is int}


def following(model: nn.Module, trace: Trace, survivors: Survivors) -> dict[str, dict[str, int]]:
    """Module name -> attributes that change with a cut."""
    (before, _), (after, _) = cut_listing(trace, trace.so_far()), cut_listing(trace, survivors)
    places = regions(before)
    edits: dict[str, dict[str, int]] = {}
    for name, module in model.named_modules():
        attributes = known_attributes(module)
        if not attributes:
            continue
        became: dict[int, set[int]] = {}
        for i in places.get((name, 0), []):
            if before.steps[i].module == name:
                note(before.steps[i].args, after.steps[i].args, became)
        for attribute, old in attributes.items():
            new = became.get(old, {old}) - {old}
            if len(new) == 1:
                edits.setdefault(name, {})[attribute] = next(iter(new))
    return edits


def note(before: Any, after: Any, became: dict[int, set[int]]) -> None:
    """Collect what each number of an argument became."""
    if type(before) is int and type(after) is int:
        became.setdefault(before, set()).add(after)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for a, b in zip(before, after, strict=True):
            note(a, b, became)
    elif isinstance(before, dict):
        for key in before.keys() & after.keys():
            note(before[key], after[key], became)
