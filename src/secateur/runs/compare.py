"""Methods × budgets × seeds on one model and one data set, with the same training for all."""

import csv
import io
import multiprocessing
import statistics
import tomllib
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from secateur.errors import FileError, SecateurError, unknown
from secateur.files import atomic_write
from secateur.methods import METHODS
from secateur.runs.config import PruneConfig, Task, TrainRunConfig
from secateur.runs.folder import RunFolder
from secateur.runs.prune import prune_run
from secateur.runs.schedules import Schedule, schedule_named
from secateur.runs.train import train_run

DENSE = "dense"
"""The name of the arm that trains the dense model, which all others are compared with."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One row of the comparison: a method with its settings.

    Args:
        method: a name in `METHODS`; None: the dense model, trained.
        before: prune the fresh model and train the small one all the time (for methods that could also prune a
            trained one).
        score, allocation, granularity, options, decay, rectify: as in `PruneConfig`.
        budgets: its own, in place of the comparison's.
        against: the arm that its accuracy is compared with, seed by seed; at the same budget if that arm has one.
    """

    method: str | None = None
    before: bool = False
    score: str = "l2"
    allocation: str = "global"
    granularity: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    decay: int = 1
    rectify: bool = False
    budgets: Sequence[Mapping[str, float]] | None = None
    against: str = DENSE


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What to compare on what.

    Args:
        task: the model and the data; its seed does not count.
        arms: by name.
        budgets: each {"macs": share}, {"params": share}, or both.
        seeds: of weights, order and augmentation: all arms see the same.
        schedule: a name in `SCHEDULES`.
        precision: "no" or "bf16".
    """

    task: Task
    arms: Mapping[str, Arm]
    budgets: Sequence[Mapping[str, float]]
    seeds: Sequence[int] = (0,)
    schedule: str = "short"
    precision: str = "no"

    @classmethod
    def read(cls, path: str | Path, **changes: Any) -> "Comparison":
        """Read a recipe: a TOML file with the fields of `Task` and of this class, and a table per arm.

        Args:
            path: the file.
            changes: of the task, such as `data_dir`, and of the comparison, such as `seeds`.
        Raises:
            FileError: it cannot be read.
            SecateurError: a name or value in it is wrong.
        """
        try:
            given = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise FileError(f"{path}: cannot be read as a recipe ({error})") from None
        arms = given.pop("arms", {})
        given |= {name: value for name, value in changes.items() if value is not None}
        own = {f.name for f in fields(cls)} - {"task", "arms"}
        names = {f.name for f in fields(Task)} | own
        for name in given:
            if name not in names:
                raise SecateurError(f"{path}: {unknown('setting', name, names)}")
        for name in ("weights", "data_dir"):
            if isinstance(given.get(name), str):
                given[name] = Path(given[name])
        try:
            return cls(
                task=Task(**{name: value for name, value in given.items() if name not in own}),
                arms={name: Arm(**settings) for name, settings in arms.items()},
                **{name: value for name, value in given.items() if name in own},
            )
        except TypeError as error:
            raise SecateurError(f"{path}: {error}") from None

    def cells(self) -> "list[Cell]":
        """Everything to run; what is wrong with any of it is raised now."""
        if not self.arms:
            raise SecateurError("compare: no arms; give at least one method")
        for name, arm in self.arms.items():
            if arm.against not in (*self.arms, DENSE):
                raise SecateurError(f"arm {name!r}: against {unknown('arm', arm.against, self.arms)}")
        return [
            cell
            for seed in self.seeds
            for name, arm in self.arms.items()
            for cell in self._of(name, arm, seed)
        ]

    def _of(self, name: str, arm: Arm, seed: int) -> Iterator["Cell"]:
        plan = schedule_named(self.schedule)
        task = _replaced(self.task, seed=seed, train_images=self.task.train_images or plan.train_images)
        if arm.method is None:
            if self.task.weights is None:
                train = TrainRunConfig(task=task, train=plan.train(precision=self.precision))
                yield Cell(name, {}, seed, train, arm.against)
            return
        for budget in self.budgets if arm.budgets is None else arm.budgets:
            yield Cell(name, dict(budget), seed, self._pruning(arm, budget, task, plan), arm.against)

    def _pruning(self, arm: Arm, budget: Mapping[str, float], task: Task, plan: Schedule) -> PruneConfig:
        """Every arm trains for the same number of epochs in all."""
        scratch = task.weights is None
        how: dict[str, Any] = {"precision": self.precision}
        if arm.method not in METHODS:
            raise SecateurError(unknown("method", str(arm.method), METHODS))
        train = finetune = None
        if METHODS[arm.method].when == "during":
            train = plan.train(tune=not scratch, **how)
        elif not scratch:
            finetune = plan.train(tune=True, **how)
        elif arm.before or METHODS[arm.method].when == "before":
            finetune = plan.train(**how)
        else:
            first = max(1, round(plan.dense_share * plan.epochs))
            train = plan.train(epochs=first, **how)
            if plan.epochs > first:
                finetune = plan.train(epochs=plan.epochs - first, tune=True, **how)
        return PruneConfig(
            task=task,
            keep_macs=budget.get("macs"),
            keep_params=budget.get("params"),
            method=arm.method,
            score=arm.score,
            allocation=arm.allocation,
            granularity=arm.granularity,
            options=arm.options,
            decay=arm.decay,
            rectify=arm.rectify,
            train=train,
            finetune=finetune,
            exports=False,
        )


def _replaced(task: Task, **changes: Any) -> Task:
    return Task(**{f.name: getattr(task, f.name) for f in fields(task)} | changes)


@dataclass(frozen=True)
class Cell:
    """One run of a comparison."""

    arm: str
    budget: Mapping[str, float]
    seed: int
    config: PruneConfig | TrainRunConfig
    against: str = DENSE

    @property
    def folder(self) -> Path:
        """Where it goes, relative to the comparison's folder."""
        bound = " ".join(f"{name} {value:g}" for name, value in self.budget.items())
        return Path(_plain(self.arm), _plain(bound or "dense"), f"seed-{self.seed}")


@dataclass(frozen=True)
class Outcome:
    """What came of a cell, or an error.

    Attributes:
        accuracy, accuracy_cut: fractions.
        macs, params: shares of the dense model; of a masked one, zeros count as gone.
        step_macs, step_bytes: of a step of training, shares of the dense model's, where they were measured: MACs, and
            the most memory at once.
        seconds: per epoch.
    """

    cell: Cell
    accuracy: float | None = None
    accuracy_cut: float | None = None
    macs: float = 1.0
    params: float = 1.0
    step_macs: float | None = None
    step_bytes: float | None = None
    seconds: float = 0.0
    error: str = ""


def compare(
    comparison: Comparison,
    out: str | Path,
    *,
    jobs: int = 1,
    tell: Callable[[str], None] = lambda _: None,
) -> list[Outcome]:
    """Run all cells that are not done yet; `out` gets a run folder for each, `table.md` and `table.csv`.

    A cell that fails is reported, and the others go on. Started again, finished cells are not repeated and a
    killed one goes on from its checkpoint.

    Args:
        comparison: what to run.
        out: the folder.
        jobs: runs side by side, each on its share of the CPU's threads.
        tell: is told what is done.
    Raises:
        SecateurError: what is wrong with the comparison, before anything is run.
    """
    cells, folder = comparison.cells(), Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    outcomes: dict[int, Outcome] = {}
    threads = max(1, torch.get_num_threads() // jobs)

    def done(number: int, outcome: Outcome) -> None:
        outcomes[number] = outcome
        said = outcome.error or f"{100 * (outcome.accuracy or 0):.2f} %"
        tell(f"{len(outcomes)}/{len(cells)}  {cells[number].folder}: {said}")
        found = [outcomes[n] for n in sorted(outcomes)]
        atomic_write(folder / "table.md", markdown(comparison, found))
        atomic_write(folder / "table.csv", as_csv(found))

    if jobs == 1:
        for number, cell in enumerate(cells):
            done(number, run_cell(cell, folder))
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(
            jobs, context, initializer=torch.set_num_threads, initargs=(threads,)
        ) as pool:
            started = {pool.submit(run_cell, cell, folder): n for n, cell in enumerate(cells)}
            for future in as_completed(started):
                done(started[future], future.result())
    return [outcomes[number] for number in range(len(cells))]


def run_cell(cell: Cell, folder: Path) -> Outcome:
    """Run one cell, or go on with it; whatever goes wrong is part of the outcome."""
    where = folder / cell.folder
    try:
        if isinstance(cell.config, TrainRunConfig):
            result = train_run(cell.config, where, mode="resume")
            return Outcome(cell, result.accuracy, seconds=result.seconds / len(result.history))
        report = prune_run(cell.config, where, mode="resume")
        assert report is not None
        history = RunFolder(where, "prune", cell.config.to_json(), "resume").metrics()
        left, cost = report.weights, report.training_cost
        return Outcome(
            cell,
            report.accuracy_after,
            report.accuracy_cut,
            (left.macs if left else report.macs_after) / report.macs_before,
            (left.params if left else report.params_after) / report.params_before,
            cost.after.macs / cost.before.macs if cost else None,
            cost.after.peak_bytes / cost.before.peak_bytes if cost else None,
            statistics.mean(line["seconds"] for line in history) if history else 0.0,
        )
    except SecateurError as error:
        return Outcome(cell, error=str(error))
    except Exception as error:  # a bug in one method must not end a night's work
        (folder / "errors").mkdir(exist_ok=True)
        atomic_write(folder / "errors" / f"{_plain(str(cell.folder))}.txt", traceback.format_exc())
        return Outcome(cell, error=f"{type(error).__name__}: {error}")


def rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """One row per arm and budget: means and spreads over the seeds; differences are paired by seed."""
    known = {
        (o.cell.arm, _bound(o.cell), o.cell.seed): o.accuracy for o in outcomes if o.accuracy is not None
    }
    grouped: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        grouped.setdefault((outcome.cell.arm, _bound(outcome.cell)), []).append(outcome)
    table = []
    for (arm, budget), found in grouped.items():
        good = [o for o in found if o.accuracy is not None]
        accuracies = [o.accuracy for o in good if o.accuracy is not None]
        cut = [o.accuracy_cut for o in good if o.accuracy_cut is not None]
        against = found[0].cell.against
        paired = [
            accuracy - other
            for (name, bound, seed), accuracy in known.items()
            if (name, bound) == (arm, budget) and against != arm
            for other in (known.get((against, budget, seed), known.get((against, "", seed))),)
            if other is not None
        ]
        table.append(
            {
                "arm": arm,
                "budget": budget,
                "seeds": len(good),
                "macs": _mean([o.macs for o in good]),
                "params": _mean([o.params for o in good]),
                "step_macs": _mean([o.step_macs for o in good if o.step_macs is not None]),
                "step_bytes": _mean([o.step_bytes for o in good if o.step_bytes is not None]),
                "accuracy_cut": _mean(cut),
                "accuracy": _mean(accuracies),
                "spread": _spread(accuracies),
                "difference": _mean(paired),
                "difference_spread": _spread(paired),
                "against": against if paired else "",
                "seconds_per_epoch": _mean([o.seconds for o in good]),
                "failed": "; ".join(o.error for o in found if o.error),
            }
        )
    return sorted(table, key=lambda row: (row["budget"], -(row["accuracy"] or 0)))


def markdown(comparison: Comparison, outcomes: Sequence[Outcome]) -> str:
    """The table of a report."""
    plan = schedule_named(comparison.schedule)
    lines = [
        f"{comparison.task.model} on {comparison.task.data}, schedule `{comparison.schedule}` ({plan.summary}), "
        f"seeds {', '.join(map(str, comparison.seeds))}. Accuracy on the whole test set, mean ± standard deviation "
        f"over the seeds; differences are paired by seed.",
    ]
    if any(isinstance(o.cell.config, PruneConfig) and o.cell.config.masks for o in outcomes):
        lines += [
            "",
            "Of masked networks, weights at zero are not counted as kept; see what a step costs them.",
        ]
    lines += [
        "",
        "| budget | arm | MACs kept | params kept | right after the cut | accuracy | difference | step: MACs, memory | "
        "s/epoch | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows(outcomes):
        if row["accuracy"] is None:
            lines.append(f"| {row['budget']} | {row['arm']} | | | | failed: {row['failed']} | | | | 0 |")
            continue
        difference = ""
        if row["difference"] is not None:
            change = _plus_minus(row["difference"], row["difference_spread"], "+")
            difference = f"{change} to {row['against']}"
        cut = "" if row["accuracy_cut"] is None else f"{100 * row['accuracy_cut']:.2f}"
        step = "" if row["step_macs"] is None else f"{row['step_macs']:.2f}, {row['step_bytes']:.2f}"
        lines.append(
            f"| {row['budget'] or '–'} | {row['arm']} | {row['macs']:.3f} | {row['params']:.3f} | {cut} | "
            f"{_plus_minus(row['accuracy'], row['spread'])} | {difference} | {step} | {row['seconds_per_epoch']:.0f} | "
            f"{row['seeds']}{' (' + row['failed'] + ')' if row['failed'] else ''} |"
        )
    return "\n".join(lines) + "\n"


def as_csv(outcomes: Sequence[Outcome]) -> str:
    """One line per cell."""
    text = io.StringIO()
    names = (
        "arm",
        "budget",
        "seed",
        "macs",
        "params",
        "step_macs",
        "step_bytes",
        "accuracy_cut",
        "accuracy",
        "seconds_per_epoch",
        "error",
    )
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for o in outcomes:
        line = (
            o.cell.arm,
            _bound(o.cell),
            o.cell.seed,
            o.macs,
            o.params,
            o.step_macs,
            o.step_bytes,
            o.accuracy_cut,
            o.accuracy,
            o.seconds,
            o.error,
        )
        writer.writerow(line)
    return text.getvalue()


def _bound(cell: Cell) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in cell.budget.items())


def _plus_minus(mean: float, spread: float | None, sign: str = "") -> str:
    return f"{100 * mean:{sign}.2f}" + ("" if spread is None else f" ± {100 * spread:.2f}")


def _mean(values: Sequence[float]) -> float | None:
    return statistics.mean(values) if values else None


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _plain(name: str) -> str:
    """A name as a file name.

    >>> _plain("l2, then fine-tune")
    'l2-then-fine-tune'
    """
    return "-".join("".join(c if c.isalnum() or c in "-._" else " " for c in name).split())
