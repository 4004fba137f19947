"""One table: ATen operator -> all that is decided about it.

An entry says what the operator does to labels, how its numbers follow a cut, what its result is when only the
positions that stay may count, and whether the program of a saved file may call it. Nothing is left open: an entry
without one of these decisions cannot be made. An operator that is not in the table freezes what it reads, and no
program may call it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from secateur.graph.labels import Value
from secateur.graph.operators.site import Result, Site, short_name, without_rule
from secateur.graph.operators.step import CutSite, LiveSite, Step

Rule = Callable[[Site], Result]


@dataclass(frozen=True)
class Constants:
    """What becomes of an operator's numbers.

    Attributes:
        write: the same operator with the numbers that PyTorch would work out from widths; it may change the step,
            or return another one.
        cut: sets the numbers that follow widths to those after a cut.
    """

    write: Callable[[Step], Step] | None = None
    cut: Callable[[CutSite], None] | None = None


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """What is decided about an operator besides its rule.

    Attributes:
        constants: what becomes of its numbers.
        survivors: its result where only positions that stay count; None: zeros for the others do.
        program: whether the program of a saved file may call it. Files are untrusted: True only for operators that
            compute tensors from tensors and numbers, write nothing but their first one, and make none larger than
            their inputs and numbers say.
        trains: the argument that says whether its module trains.
        repeats: it may make one tensor as many as there are images.
    """

    constants: Constants
    survivors: Callable[[LiveSite], Any] | None
    program: bool
    trains: str | None = None
    repeats: bool = False

    def but(self, **changed: Any) -> "Decisions":
        """The same with some decisions changed."""
        return replace(self, **changed)


PLAIN = Decisions(constants=Constants(), survivors=None, program=True)
"""No number names a width that may be cut, zeros do for positions that go, and a saved program may call it."""

FORBIDDEN = PLAIN.but(program=False)
"""The same, but no saved program may call it."""


@dataclass(frozen=True, kw_only=True)
class Operator(Decisions):
    """One operator: its decisions and its rule.

    Attributes:
        rule: what it does to labels; `without_rule`: it freezes what it reads.
    """

    rule: Rule


OPERATORS: dict[str, Operator] = {}
"""Name without overload -> entry. ATen's operators go without their namespace, such as "conv2d"."""


def operator(names: str, decided: Decisions) -> Callable[[Rule], Rule]:
    """Enter a rule in the table under each name, separated by spaces, with all else that is decided about them."""

    def enter(rule: Rule) -> Rule:
        for name in names.split():
            assert name not in OPERATORS, f"{name} is in the table twice"
            OPERATORS[name] = Operator(rule=rule, **vars(decided))
        return rule

    return enter


def label(site: Site) -> Result:
    """The labelled outputs of an operator."""
    entry = OPERATORS.get(short_name(site.op))
    result = entry.rule(site) if entry else without_rule(site)
    operands = site.operands
    repeated = entry is not None and entry.repeats and repeats_per_image(site)
    per_image = max((float(repeated), *(value.per_image for value in operands)))
    data = per_image > 0 or any(value.data for value in operands)
    weight = not data and any(v.weight or v.tensor in site.labels.parameters for v in operands)
    if isinstance(result, Value):
        return replace(result, weight=weight, data=data, per_image=per_image)
    return tuple(replace(value, weight=weight, data=data, per_image=per_image) for value in result)


def repeats_per_image(site: Site) -> bool:
    """Whether an operator repeats one tensor for every image of the traced batch."""
    shape, images = site.operands[0].shape, site.labels.images
    lead = (1,) * (len(site.shape) - len(shape)) + tuple(shape)
    return bool(lead) and lead[0] == 1 and site.shape[0] == images > 1
