"""What a comparison says to take at each budget: the best mean accuracy, and what cannot be told apart from it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from secateur.compare.results import Outcome
from secateur.compare.statistics import Standing, find_margin, rank_arms
from secateur.compare.words import describe_budget, format_percentage

SAME = 0.05
"""Share by which two costs must differ at least before one is called cheaper."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What the table says about one budget.

    Attributes:
        budget: in words.
        best, rival: the two best mean accuracies within the budget.
        lead: difference of the two.
        margin: the least difference that means something; None: not known.
        others: arms that cannot be told apart from the best.
        cheaper: of these, the one that is cheapest to run, if it is cheaper than the best.
        text: all that as sentences.
    """

    budget: str
    best: str
    text: str = ""
    rival: str | None = None
    lead: float | None = None
    margin: float | None = None
    cheaper: str | None = None
    others: tuple[str, ...] = ()


def recommend(outcomes: Sequence[Outcome]) -> list[Advice]:
    """What to take at each budget: the best mean accuracy, and what cannot be told apart from it.

    Arms over the budget do not count, nor do those that lack a seed which others have. Masks save no operation, so a
    budget of MACs takes no masked arm.
    """
    found = []
    table = rank_arms(outcomes)
    for budget in dict.fromkeys(line.budget for line in table if line.budget):
        there = [o for o in outcomes if describe_budget(o.budget) == budget and o.accuracy is not None]
        in_macs = any("macs" in o.budget for o in there)
        able = [
            line for line in table
            if line.budget == budget and line.accuracy is not None and not line.over and not (line.masked and in_macs)
        ]  # fmt: skip
        seeds = max((line.seeds for line in able), default=0)
        if able:
            one = _advice(budget, [line for line in able if line.seeds == seeds], there)
            early = max(able, key=lambda line: line.accuracy_cut or 0)
            if (early.accuracy_cut or 0) > (able[0].accuracy or 0):
                had = f"“{early.arm}” had more right after its cut, {format_percentage(early.accuracy_cut)} %"
                one = replace(one, text=f"{one.text} {had}: this training took more than it gave.")
            if fewer := [f"“{line.arm}”" for line in able if line.seeds < seeds]:
                one = replace(one, text=f"{one.text} Left out, since runs are missing: {', '.join(fewer)}.")
            found.append(one)
    return found


def _advice(budget: str, able: Sequence[Standing], outcomes: Sequence[Outcome]) -> Advice:
    best = able[0]
    says = f"“{best.arm}” has the best mean accuracy, {format_percentage(best.accuracy, best.spread)} %"
    if len(able) == 1:
        return Advice(budget=budget, best=best.arm, text=f"{says}; there is nothing to compare it with.")
    rival, lead = able[1], (best.accuracy or 0) - (able[1].accuracy or 0)
    says += f", {format_percentage(lead)} points ahead of “{rival.arm}”"
    by = {(o.arm, o.seed): o.accuracy for o in outcomes}
    seeds = dict.fromkeys(o.seed for o in outcomes if o.arm == best.arm)
    close, margin = _contenders(
        able, {line.arm: [by.get((line.arm, seed)) or math.nan for seed in seeds] for line in able}
    )
    cheaper = None
    if margin is None:
        says += "; one seed tells nothing about spread, so no two arms can be told apart."
    else:
        points = format_percentage(margin)
        says += f". With these {len(seeds)} seeds means closer than {points} points cannot be told apart"
        if not close:
            says += ", so it is ahead of all others."
        elif len(close) == len(able) - 1:
            says += ", and it is ahead of none of the others by as much."
        else:
            says += f", so it is not ahead of {', '.join(f'“{line.arm}”' for line in close)}."
        cheaper, why = _cheapest([best, *close])
        if cheaper:
            says += f" Of these “{cheaper}” is the cheapest to run: {why}."
    return Advice(
        budget=budget,
        best=best.arm,
        text=says,
        rival=rival.arm,
        lead=lead,
        margin=margin,
        cheaper=cheaper,
        others=tuple(line.arm for line in close),
    )


def _contenders(
    able: Sequence[Standing], accuracies: Mapping[str, Sequence[float]]
) -> tuple[list[Standing], float | None]:
    """The arms behind the best that cannot be told apart from it, and the margin within which they are.

    Arms that fall behind by more than the margin are set aside, and the margin is taken again for those that are left,
    as long as it shrinks and sets some aside: how much an arm that is out of the running scatters has no bearing on the
    others.
    """
    close, margin = list(able[1:]), math.inf
    while close:
        found = find_margin([accuracies[line.arm] for line in (able[0], *close)])
        if found is None:
            return [], None
        margin = min(margin, found)
        left = [line for line in close if (able[0].accuracy or 0) - (line.accuracy or 0) <= margin]
        if len(left) == len(close):
            break
        close = left
    return close, margin


def _cheapest(lines: Sequence[Standing]) -> tuple[str | None, str]:
    """Which network is cheaper to run than the first, by the clock or else by MACs, if one is; and the numbers.

    A masked network does all operations of the dense one.
    """
    clock = all(line.latency_ms is not None for line in lines)

    def cost(line: Standing) -> float:
        return (line.latency_ms or 0) if clock else 1.0 if line.masked else line.kept["macs"]

    best, cheap = lines[0], min(lines, key=cost)
    low, high = cost(cheap), cost(best)
    if clock:
        numbers = f"{low:.3g} ms against {high:.3g} ms"
        least = max(SAME * high, (cheap.latency_spread or 0) + (best.latency_spread or 0))
    else:
        numbers = f"{100 * low:.1f} % of the MACs against {100 * high:.1f} %"
        least = SAME * high
    return (cheap.arm if high - low > least else None), numbers
