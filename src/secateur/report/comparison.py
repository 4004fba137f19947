"""What came of a comparison: outcomes of single runs, means over seeds, and what to recommend."""

import csv
import functools
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
from scipy.stats import studentized_range

from secateur.report.data import LatencyPair, Width

MEASURES = {"macs": "MACs", "params": "parameters"}
"""What a budget of a comparison may bound -> as people say it."""

MASKS = (
    "Of masked networks, weights at zero are not counted as kept. Their operations are done all the same, so under a "
    "budget of MACs none is recommended."
)

DENSE = "dense"
"""The arm that trains the dense model, which others are compared with if nothing else is said."""

SAME = 0.05
"""Share by which two costs must differ at least before one is called cheaper."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one run.

    Attributes:
        arm: which method, with its settings.
        budget: shares of the dense model that may stay; empty for the dense model.
        seed: of everything.
        accuracy, accuracy_cut: in the end, and right after the cut; fractions.
        accuracy_dense: of the trained weights that all runs started from, if they did.
        macs, params: shares of the dense model that are left; of a masked one, zeros count as gone.
        against: the arm that the accuracy is compared with.
        masked: whether units are zeros that stay where they are.
        step_macs, step_bytes: of a step of training, shares of the dense model's, where they were measured: MACs, and
            the most memory at once.
        epochs: of training, with the seconds they took.
        training_seconds: of all epochs.
        widths: of every layer that could change.
        latency: of the dense and of this model.
        error: why there is nothing else.
    """

    arm: str
    budget: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    accuracy: float | None = None
    accuracy_cut: float | None = None
    accuracy_dense: float | None = None
    macs: float = 1.0
    params: float = 1.0
    against: str = DENSE
    masked: bool = False
    step_macs: float | None = None
    step_bytes: float | None = None
    epochs: int = 0
    training_seconds: float = 0.0
    widths: Sequence[Width] = ()
    latency: LatencyPair | None = None
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class ComparisonReport:
    """Everything the page of a comparison says.

    Attributes:
        model, dataset: what was pruned, on what.
        training: that all runs had, in words.
        seeds: of the runs.
        missing: runs that are not finished.
        test_images: that accuracy was measured on; None: the whole test set.
        outcomes: of the runs.
        notes: arm -> what the reader must know about it.
        command: as it was typed.
        versions: see `secateur.report.current_versions`.
    """

    model: str
    dataset: str
    training: str
    seeds: Sequence[int]
    outcomes: Sequence[Outcome]
    missing: int = 0
    test_images: int | None = None
    notes: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    versions: Mapping[str, str | int] = field(default_factory=dict)

    @property
    def subject(self) -> str:
        """What was compared."""
        return f"Pruning {self.model} on {self.dataset}"

    @property
    def summary(self) -> str:
        """How it was compared, in a few sentences."""
        seeds = ", ".join(map(str, self.seeds))
        on = f"{self.test_images:,} test images" if self.test_images else "the whole test set"
        return (
            f"{self.model} on {self.dataset}, {self.training}, {'seeds' if len(self.seeds) > 1 else 'seed'} {seeds}. "
            f"Accuracy on {on}, mean ± standard deviation over the seeds; differences are "
            f"paired by seed.{f' {self.unfinished}' if self.missing else ''}"
        )

    @property
    def unfinished(self) -> str:
        """What to say about runs that are missing."""
        return f"{self.missing} of {self.missing + len(self.outcomes)} runs are not finished and left out."


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One arm at one budget: means over the seeds that worked, and sample standard deviations.

    Attributes:
        budget: in words; empty for the dense model.
        difference: to the arm `against`, paired by seed; with its sample standard deviation.
        against: the dense model, or another arm; empty if there is nothing to compare with.
        over: whether it costs more than the budget allows.
        masked: whether units are zeros, with which all operations are done.
        latency_ms: of one pass, as a share of the dense network's, which was measured beside it, times the median of
            all measurements of the dense network: a clock that drifts between runs does not matter.
        latency_spread: sample standard deviation of that over the runs, milliseconds.
        speed_up: dense over this.
        seconds_per_epoch, training_seconds: medians over the seeds.
        failed: what went wrong with the others.
    """

    arm: str
    budget: str
    seeds: int
    macs: float
    params: float
    accuracy: float | None
    spread: float | None
    accuracy_cut: float | None
    difference: float | None
    difference_spread: float | None
    against: str
    step_macs: float | None
    step_bytes: float | None
    latency_ms: float | None
    latency_spread: float | None
    speed_up: float | None
    seconds_per_epoch: float
    training_seconds: float
    over: bool
    masked: bool
    failed: str


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


def standings(outcomes: Sequence[Outcome]) -> list[Standing]:
    """One line per budget and arm: the largest budget first, its best arm first and those over the budget last."""
    dense = dense_accuracies(outcomes)
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((in_words(outcome.budget), outcome.arm), []).append(outcome)
    clock = dense_latency(outcomes)
    by = {(o.arm, in_words(o.budget), o.seed): o.accuracy for o in outcomes if o.accuracy is not None}
    by |= {(DENSE, "", seed): accuracy for seed, accuracy in dense.items()}
    lines = [_standing(budget, arm, found, by, clock) for (budget, arm), found in groups.items()]
    places = {budget: place for place, budget in enumerate(budgets_of(outcomes))}
    return sorted(lines, key=lambda line: (places[line.budget], line.over, -(line.accuracy or 0)))


def budgets_of(outcomes: Sequence[Outcome]) -> list[str]:
    """The budgets in words, the dense model's first and then the largest, whichever cells there are."""
    found = {in_words(o.budget): o.budget for o in outcomes}
    return sorted(found, key=lambda words: (tuple(found[words]), [-share for share in found[words].values()]))


def _standing(
    budget: str,
    arm: str,
    found: Sequence[Outcome],
    by: Mapping[tuple[str, str, int], float],
    clock: float | None,
) -> Standing:
    good = [o for o in found if o.accuracy is not None]
    accuracies = [o.accuracy for o in good if o.accuracy is not None]
    against = found[0].against
    others = [by.get((against, budget, o.seed), by.get((against, "", o.seed))) for o in good]
    paired = [a - b for a, b in zip(accuracies, others, strict=True) if b is not None and against != arm]
    timed = [o.latency for o in good if o.latency and is_steady(o.latency)]
    macs, params = _mean(o.macs for o in good), _mean(o.params for o in good)
    shares, bounds = [1 / pair.speed_up for pair in timed], found[0].budget
    share, share_spread = _mean(shares), _spread(shares)
    return Standing(
        arm=arm,
        budget=budget,
        seeds=len(good),
        macs=macs or 0.0,
        params=params or 0.0,
        accuracy=_mean(accuracies),
        spread=_spread(accuracies),
        accuracy_cut=_mean(o.accuracy_cut for o in good if o.accuracy_cut is not None),
        difference=_mean(paired),
        difference_spread=_spread(paired),
        against=against if paired else "",
        step_macs=_mean(o.step_macs for o in good if o.step_macs is not None),
        step_bytes=_mean(o.step_bytes for o in good if o.step_bytes is not None),
        latency_ms=clock * share if clock and share else None,
        latency_spread=clock * share_spread if clock and share_spread is not None else None,
        speed_up=1 / share if share else None,
        seconds_per_epoch=_median(o.training_seconds / o.epochs for o in good if o.epochs) or 0.0,
        training_seconds=_median(o.training_seconds for o in good) or 0.0,
        over=any(getattr(o, name) > bound + 1e-6 for o in good for name, bound in bounds.items()),
        masked=any(o.masked for o in good),
        failed="; ".join(dict.fromkeys(o.error for o in found if o.error)),
    )


def dense_accuracies(outcomes: Sequence[Outcome]) -> dict[int, float]:
    """Seed -> accuracy of the dense model: trained beside the others, or the one that they started from."""
    given = next((o.accuracy_dense for o in outcomes if o.accuracy_dense is not None), None)
    start = {} if given is None else {o.seed: given for o in outcomes}
    return start | {o.seed: o.accuracy for o in outcomes if not o.budget and o.accuracy is not None}


def is_steady(pair: LatencyPair) -> bool:
    """Whether the machine had nothing else to do: of both networks, one pass in ten was not twice as slow as others."""
    return all(one.p90_ms <= 2 * one.p10_ms for one in (pair.before, pair.after))


def unsteady(outcomes: Sequence[Outcome]) -> str:
    """What to say about measurements that other work disturbed; empty if there are none."""
    found = [o.latency for o in outcomes if o.latency]
    if not (bad := sum(not is_steady(pair) for pair in found)):
        return ""
    return (
        f"Other work disturbed {bad} of {len(found)} measurements of latency, which are left out; the same command, "
        f"on a machine that does nothing else, measures them again."
    )


def dense_latency(outcomes: Sequence[Outcome]) -> float | None:
    """Milliseconds of one pass of the dense network: the median over all measurements that were not disturbed."""
    found = [o.latency.before.median_ms for o in outcomes if o.latency and is_steady(o.latency)]
    return statistics.median(found) if found else None


def advice(outcomes: Sequence[Outcome]) -> list[Advice]:
    """What to take at each budget: the best mean accuracy, and what cannot be told apart from it.

    Arms over the budget do not count, nor do those that lack a seed which others have. Masks save no operation, so a
    budget of MACs takes no masked arm.
    """
    found = []
    table = standings(outcomes)
    for budget in dict.fromkeys(line.budget for line in table if line.budget):
        there = [o for o in outcomes if in_words(o.budget) == budget and o.accuracy is not None]
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
                had = f"“{early.arm}” had more right after its cut, {percentage(early.accuracy_cut)} %"
                one = replace(one, text=f"{one.text} {had}: this training took more than it gave.")
            if fewer := [f"“{line.arm}”" for line in able if line.seeds < seeds]:
                one = replace(one, text=f"{one.text} Left out, since runs are missing: {', '.join(fewer)}.")
            found.append(one)
    return found


def _advice(budget: str, able: Sequence[Standing], outcomes: Sequence[Outcome]) -> Advice:
    best = able[0]
    says = f"“{best.arm}” has the best mean accuracy, {percentage(best.accuracy, best.spread)} %"
    if len(able) == 1:
        return Advice(budget=budget, best=best.arm, text=f"{says}; there is nothing to compare it with.")
    rival, lead = able[1], (best.accuracy or 0) - (able[1].accuracy or 0)
    says += f", {percentage(lead)} points ahead of “{rival.arm}”"
    by = {(o.arm, o.seed): o.accuracy for o in outcomes}
    seeds = dict.fromkeys(o.seed for o in outcomes if o.arm == best.arm)
    close, margin = _contenders(
        able, {line.arm: [by.get((line.arm, seed)) or math.nan for seed in seeds] for line in able}
    )
    cheaper = None
    if margin is None:
        says += "; one seed tells nothing about spread, so no two arms can be told apart."
    else:
        points = percentage(margin)
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
        found = margin_of([accuracies[line.arm] for line in (able[0], *close)])
        if found is None:
            return [], None
        margin = min(margin, found)
        left = [line for line in close if (able[0].accuracy or 0) - (line.accuracy or 0) <= margin]
        if len(left) == len(close):
            break
        close = left
    return close, margin


def margin_of(accuracies: Sequence[Sequence[float]]) -> float | None:
    """How far apart the means of two arms must be to be told apart: Tukey's honest significant difference at 5 %.

    What is left of the accuracies without the means of arms and of seeds is taken for noise, alike in all arms.

    Args:
        accuracies: (arms, seeds); all arms have the same seeds.
    Returns:
        None where one arm, one seed or a missing run leaves no noise to see.
    Source: Tukey 1949, "Comparing individual means in the analysis of variance", for a randomised block design.
    """
    values = np.asarray(accuracies, dtype=float)
    arms, seeds = values.shape
    if arms < 2 or seeds < 2 or not np.isfinite(values).all():
        return None
    rest = values - values.mean(1, keepdims=True) - values.mean(0, keepdims=True) + values.mean()
    freedom = (arms - 1) * (seeds - 1)
    return _quantile(arms, freedom) * math.sqrt((rest**2).sum() / freedom / seeds)


@functools.cache
def _quantile(arms: int, freedom: int) -> float:
    return float(studentized_range.ppf(0.95, arms, freedom))


def _cheapest(lines: Sequence[Standing]) -> tuple[str | None, str]:
    """Which network is cheaper to run than the first, by the clock or else by MACs, if one is; and the numbers.

    A masked network does all operations of the dense one.
    """
    clock = all(line.latency_ms is not None for line in lines)

    def cost(line: Standing) -> float:
        return (line.latency_ms or 0) if clock else 1.0 if line.masked else line.macs

    best, cheap = lines[0], min(lines, key=cost)
    low, high = cost(cheap), cost(best)
    if clock:
        numbers = f"{low:.3g} ms against {high:.3g} ms"
        least = max(SAME * high, (cheap.latency_spread or 0) + (best.latency_spread or 0))
    else:
        numbers = f"{100 * low:.1f} % of the MACs against {100 * high:.1f} %"
        least = SAME * high
    return (cheap.arm if high - low > least else None), numbers


def in_words(budget: Mapping[str, float]) -> str:
    """A budget as a heading.

    >>> in_words({"macs": 0.5, "params": 0.25})
    '50 % of the MACs, 25 % of the parameters'
    """
    parts = [f"{100 * share:g} % of the {MEASURES[name]}" for name, share in budget.items()]
    return ", ".join(parts)


def percentage(mean: float | None, spread: float | None = None, sign: str = "") -> str:
    """Fractions as percentages, without the sign.

    >>> percentage(0.915, 0.0021), percentage(-0.01, sign="+")
    ('91.50 ± 0.21', '−1.00')
    """
    if mean is None:
        return "–"
    text = f"{100 * mean:{sign}.2f}" + ("" if spread is None else f" ± {100 * spread:.2f}")
    return text.replace("-", "−")


def markdown(report: ComparisonReport) -> str:
    """The table of a comparison, with what follows from it."""
    outcomes, dense = report.outcomes, dense_accuracies(report.outcomes)
    lines = [report.summary, ""]
    if dense:
        lines += [
            f"The dense network: {percentage(_mean(dense.values()), _spread([*dense.values()]))} %.",
            "",
        ]
    for one in advice(outcomes):
        lines.append(f"- **At most {one.budget}:** {one.text}")
    if any(o.masked for o in outcomes):
        lines += ["", MASKS]
    lines += [
        "",
        "| budget | arm | MACs kept | params kept | right after the cut | accuracy | difference | ms | "
        "step: MACs, memory | s/epoch | training, s | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in standings(outcomes):
        if row.accuracy is None:
            lines.append(f"| {row.budget} | {row.arm} | | | | failed: {_cell(row.failed)} | | | | | | 0 |")
            continue
        cut = "" if row.accuracy_cut is None else percentage(row.accuracy_cut)
        difference = ""
        if row.difference is not None:
            difference = f"{percentage(row.difference, row.difference_spread, '+')} to {row.against}"
        step = "" if row.step_macs is None else f"{row.step_macs:.2f}, {row.step_bytes:.2f}"
        latency = "" if row.latency_ms is None else milliseconds(row.latency_ms, row.latency_spread)
        lines.append(
            f"| {row.budget or 'dense'} | {row.arm}{' (over the budget)' if row.over else ''} | {row.macs:.3f} | "
            f"{row.params:.3f} | {cut} | {percentage(row.accuracy, row.spread)} | {difference} | {latency} | "
            f"{step} | {_whole(row.seconds_per_epoch)} | {_whole(row.training_seconds)} | "
            f"{row.seeds}{f' ({_cell(row.failed)})' if row.failed else ''} |"
        )
    if note := unsteady(outcomes):
        lines += ["", note]
    lines += ["", *(f"- {arm}: {note}" for arm, note in report.notes.items())]
    return "\n".join(lines).rstrip() + "\n"


_COLUMNS = (
    "macs", "params", "step_macs", "step_bytes", "accuracy_cut", "accuracy", "accuracy_dense", "epochs",
    "training_seconds", "latency_ms", "latency_dense_ms", "error",
)  # fmt: skip


def as_csv(outcomes: Sequence[Outcome]) -> str:
    """One line per run."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("arm", "budget", "seed", *_COLUMNS))
    for o in outcomes:
        values = {f.name: getattr(o, f.name) for f in fields(o)}
        values["latency_ms"] = o.latency.after.median_ms if o.latency else None
        values["latency_dense_ms"] = o.latency.before.median_ms if o.latency else None
        bound = ", ".join(f"{name} {value:g}" for name, value in o.budget.items())
        writer.writerow((o.arm, bound, o.seed, *(values[name] for name in _COLUMNS)))
    return text.getvalue()


def milliseconds(mean: float, spread: float | None) -> str:
    """A latency, with as many digits as its spread.

    >>> milliseconds(1.2345, 0.056), milliseconds(12.345, None)
    ('1.23 ± 0.06', '12.3')
    """
    if spread is None:
        return f"{mean:.3g}"
    digits = max(0, 2 - math.floor(math.log10(mean)))
    return f"{mean:.{digits}f} ± {spread:.{digits}f}"


def _cell(text: str) -> str:
    """A message as one cell of a table."""
    return " ".join(text.replace("|", "\\|").split())


def _whole(seconds: float) -> str:
    return f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.2g}"


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.mean(found) if found else None


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.median(found) if found else None


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None
