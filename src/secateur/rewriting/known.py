"""Attributes in which modules keep a number that follows a width.

Attention blocks store their number of heads and the like when they are made, and `view` by it; blocks that split
their channels store how many each part has. The new value is read off the captured graph: what became of the old
number in the module's own operators. Where it became several numbers, the attribute stays. Lists of widths in a
configuration (`self.config.hidden_sizes[-1]`) follow too, in a copy that the module alone holds. Nothing is trusted:
the module is run and compared afterwards like any other.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from secateur.graph import mirrored
from secateur.graph.trace import Survivors, Trace
from secateur.rewriting.listing import find_regions
from secateur.rewriting.rewrite import cut_listing, original_class

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
        if shape or (is_size(value) and names_width(name)):
            found[name] = value
    return found | configured_widths(module)


def configured_widths(module: nn.Module) -> dict[str, Number]:
    """The lists of widths that a module's forward reads from its configuration: "config.hidden_sizes" -> (16, 32)."""
    lists = vars(module.__dict__.get("config")) if hasattr(module.__dict__.get("config"), "__dict__") else {}
    code = getattr(inspect.unwrap(original_class(module).forward), "__code__", None) if lists else None
    names = code.co_names if code is not None and "config" in code.co_names else ()
    return {
        f"config.{name}": tuple(value)
        for name in sorted(names)
        if names_width(name)
        and isinstance(value := lists.get(name), list | tuple)
        and value
        and all(map(is_size, value))
    }


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
            new = now(old, became)
            if "." in attribute and isinstance(old, tuple):
                new = tuple(n for width in old if isinstance(n := now(width, became), int))
            if new != old:
                edits.setdefault(name, {})[attribute] = new
    return edits


def now(old: Number, became: Mapping[Number, set[Number]]) -> Number:
    """What a number became; itself, if that is several numbers."""
    new = became.get(old, {old}) - {old}
    return next(iter(new)) if len(new) == 1 else old


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
