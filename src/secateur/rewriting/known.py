"""Attributes in which modules keep a number that follows a width.

Attention blocks store their number of heads and the like when they are made, and `view` by it; blocks that split
their channels store how many each part has. The new value is read off the captured graph: what became of the old
number in the module's own operators. Where it became several numbers, the attribute stays. Nothing is trusted: the
module is run and compared afterwards like any other.
"""

from typing import Any

from torch import nn

from secateur.graph import mirrored
from secateur.graph.trace import Survivors, Trace
from secateur.rewriting.listing import find_regions
from secateur.rewriting.rewrite import cut_listing

WORDS = frozenset(
    """
    c ch chs chan chans channel channels dim dims embed embeds feature features ffn group groups head heads hidden in
    inner inp inplanes key model nh nhead oup out plane planes val value width widths
    """.split()
)
"""Words in the names of attributes that hold a width, a number of heads or of groups, such as `in_chs` or `c1`."""

SHAPES = frozenset(("shape", "bias_shape"))
"""Names under which classes keep the whole shape of a `view`."""

Number = int | tuple[int, ...]


def names_width(attribute: str) -> bool:
    """Whether an attribute is named like a width.

    >>> [names_width(name) for name in ("c", "in_chs", "num_heads", "c2", "kernel_size", "stride")]
    [True, True, True, True, False, False]
    """
    return any(word.rstrip("0123456789") in WORDS for word in attribute.lower().split("_"))


def known_attributes(module: nn.Module) -> dict[str, Number]:
    """The attributes of one module that may follow a width, as they are now."""
    if type(module).__module__.startswith("torch.nn.") or mirrored(module, {}):
        return {}
    found: dict[str, Number] = {}
    for name, value in sorted(module.__dict__.items()):
        shape = name in SHAPES and type(value) is tuple and all(map(is_size, value))
        if shape or (type(value) is int and names_width(name)):
            found[name] = value
    return found


def is_size(x: Any) -> bool:
    """Whether this is a number of positions."""
    return type(x) is int and x > 0


def following(model: nn.Module, trace: Trace, survivors: Survivors) -> dict[str, dict[str, Number]]:
    """Module name -> attributes that change with a cut."""
    (before, _), (after, _) = cut_listing(trace, trace.so_far()), cut_listing(trace, survivors)
    places = find_regions(before)
    edits: dict[str, dict[str, Number]] = {}
    for name, module in model.named_modules():
        attributes = known_attributes(module)
        if not attributes:
            continue
        became: dict[Number, set[Number]] = {}
        for i in places.get((name, 0), []):
            if before.steps[i].module == name:
                note(before.steps[i].args, after.steps[i].args, became)
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
