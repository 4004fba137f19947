"""Methods × budgets × seeds on one model and one data set, with the same training for all."""

import multiprocessing
import multiprocessing.connection
import os
import threading
import tomllib
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from secateur.cost.latency import compare_latency
from secateur.errors import FileError, SecateurError, unknown
from secateur.files import atomic_write
from secateur.methods import AUTO, method_named
from secateur.report import ComparisonReport, current_versions, write_comparison, write_tables
from secateur.report.comparison import DENSE, MEASURES, Outcome, is_steady
from secateur.report.data import LatencyPair, Width
from secateur.runs.config import PruneConfig, Task, TrainRunConfig
from secateur.runs.folder import RunFolder, SavedRun
from secateur.runs.prune import prune_run
from secateur.runs.result import pair_of
from secateur.runs.schedules import Schedule, schedule_named
from secateur.runs.subject import device, fresh_model, load_into
from secateur.runs.train import train_run

_REPEATS = 100  # timed passes of each network


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One row of the comparison: a method with its settings.

    Args:
        method: as in `PruneConfig`: a name, or `module:function` of your own; None: the dense model, trained as all
            others are: from scratch, or on from the weights.
        before: prune the fresh model and train the small one all the time (for methods that could also prune a
            trained one).
        score, allocation, granularity, freeze, min_keep, round_to, options, decay, rectify: as in `PruneConfig`.
        distill: share of the loss after the cut that is distance to the dense model, 0 to 1.
        budgets: its own, in place of the comparison's.
        against: the arm that its accuracy is compared with, seed by seed; at the same budget if that arm has one.
        note: what a reader of the table must know about this arm.
    """

    method: str | None = None
    before: bool = False
    score: str = "l2"
    allocation: str = "global"
    granularity: str | None = None
    freeze: Sequence[str] = ()
    min_keep: int = 1
    round_to: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    decay: int = 1
    rectify: bool = False
    distill: float = 0.0
    budgets: Sequence[Mapping[str, float]] | None = None
    against: str = DENSE
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What to compare on what.

    Args:
        task: the model and the data; its seed does not count.
        arms: by name.
        budgets: each {"macs": share}, {"params": share}, or both.
        seeds: of weights, order and augmentation: all arms see the same.
        schedule: a name in `SCHEDULES`.
        tune_lr: the highest learning rate of training on from weights; None: the schedule's.
        precision: "no" or "bf16".
        compile: run the steps in which no method prunes through `torch.compile`.
        latency_batch: images per pass where latency is measured.
    """

    task: Task
    arms: Mapping[str, Arm]
    budgets: Sequence[Mapping[str, float]]
    seeds: Sequence[int] = (0,)
    schedule: str = "short"
    tune_lr: float | None = None
    precision: str = "no"
    compile: bool = False
    latency_batch: int = 1

    @property
    def plan(self) -> Schedule:
        """How all arms train."""
        plan = schedule_named(self.schedule)
        return plan if self.tune_lr is None else replace(plan, tune_lr=self.tune_lr)

    @property
    def _how(self) -> dict[str, Any]:
        return {"precision": self.precision, "compile": self.compile}

    @classmethod
    def read(cls, path: str | Path | None, **changes: Any) -> "Comparison":
        """Read a recipe: a TOML file with the fields of `Task` and of this class, and a table per arm.

        Args:
            path: the file; None: `changes` say it all.
            changes: of the task, such as `data_dir`, and of the comparison, such as `seeds` and `arms`.
        Raises:
            FileError: it cannot be read.
            SecateurError: a name or value in it is wrong, or something is missing.
        """
        given: dict[str, Any] = {}
        if path is not None:
            try:
                given = tomllib.loads(Path(path).read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
                raise FileError(f"{path}: cannot be read as a recipe ({error})") from None
        given |= {name: value for name, value in changes.items() if value is not None}
        path, arms = path or "compare", given.pop("arms", {})
        for name, option in (("model", "--model"), ("data", "--data"), ("budgets", "--keep-macs")):
            if name not in given:
                raise SecateurError(f"{path}: no {name}; give {option}, or `{name}` in a recipe")
        _check_types(path, given, arms)
        own = {f.name for f in fields(cls)} - {"task", "arms"}
        names = {f.name for f in fields(Task)} - {"normalisation", "seed"} | own
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

    def with_arms(self, names: Sequence[str]) -> "Comparison":
        """This comparison with some of its arms, in its own order.

        Raises:
            SecateurError: there is no such arm.
        """
        for name in names:
            if name not in self.arms:
                raise SecateurError(unknown("arm", name, self.arms))
        return replace(self, arms={name: arm for name, arm in self.arms.items() if name in names})

    def cells(self) -> "list[Cell]":
        """Everything to run; what is wrong with any of it is raised now."""
        if not self.arms:
            raise SecateurError("compare: no arms; give at least one method")
        folders: dict[str, str] = {}
        for name, arm in self.arms.items():
            folder = _plain(name)
            if not folder.strip("."):
                raise SecateurError(
                    f"arm {name!r}: its runs need a folder; use letters or digits in its name"
                )
            if folders.setdefault(folder, name) != name:
                raise SecateurError(
                    f"arms {folders[folder]!r} and {name!r} would share the folder {folder}; rename one"
                )
            if arm.against not in (*self.arms, DENSE):
                raise SecateurError(f"arm {name!r}: against {unknown('arm', arm.against, self.arms)}")
            if arm.distill and (arm.method is None or arm.before):
                raise SecateurError(
                    f"arm {name!r}: there is no trained dense model to distill from; set distill to 0"
                )
        for budget in (*self.budgets, *(b for arm in self.arms.values() for b in arm.budgets or ())):
            for measure in budget:
                if measure not in MEASURES:
                    raise SecateurError(f"budgets of a comparison: {unknown('measure', measure, MEASURES)}")
                if not 0 < budget[measure] < 1:
                    raise SecateurError(
                        f"budgets of a comparison: {measure} {budget[measure]:g}; expected the share that may stay, "
                        f"above 0 and below 1"
                    )
        return [
            cell
            for seed in self.seeds
            for name, arm in self.arms.items()
            for cell in self._of(name, arm, seed)
        ]

    def _of(self, name: str, arm: Arm, seed: int) -> Iterator["Cell"]:
        plan = self.plan
        task = replace(self.task, seed=seed, train_images=self.task.train_images or plan.train_images)
        if arm.method is None:
            how = plan.train(tune=task.weights is not None, **self._how)
            yield Cell(name, {}, seed, TrainRunConfig(task=task, train=how), arm.against)
            return
        for budget in self.budgets if arm.budgets is None else arm.budgets:
            config = self._pruning(arm, arm.method, budget, task, plan)
            yield Cell(name, dict(budget), seed, config, arm.against)

    def _pruning(
        self, arm: Arm, method: str, budget: Mapping[str, float], task: Task, plan: Schedule
    ) -> PruneConfig:
        """Every arm trains for the same number of epochs in all."""
        scratch, how = task.weights is None, self._how
        taught = how | {"distill_weight": arm.distill}
        when = "after" if method == AUTO else method_named(method).when
        epochs = plan.epochs if scratch else plan.tune_epochs
        train = finetune = None
        if when == "before" or (
            arm.before and when == "after"
        ):  # the weights that others start from are no use
            task = replace(task, weights=None)
            finetune = plan.train(epochs=epochs, **taught)
        elif when == "during":
            train = plan.train(tune=not scratch, **taught)
        elif not scratch:
            finetune = plan.train(tune=True, **taught)
        else:
            first = max(1, round(plan.dense_share * epochs))
            train = plan.train(epochs=first, **how)
            if epochs > first:
                finetune = plan.train(epochs=epochs - first, tune=True, **taught)
        return PruneConfig(
            task=task,
            keep_macs=budget.get("macs"),
            keep_params=budget.get("params"),
            method=method,
            score=arm.score,
            allocation=arm.allocation,
            granularity=arm.granularity,
            freeze=tuple(arm.freeze),
            min_keep=arm.min_keep,
            round_to=arm.round_to,
            options=arm.options,
            decay=arm.decay,
            rectify=arm.rectify,
            train=train,
            finetune=finetune,
            exports=False,
        )


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

    @property
    def name(self) -> str:
        """What `only` calls it."""
        return self.folder.as_posix()


def compare(
    comparison: Comparison,
    out: str | Path,
    *,
    jobs: int = 1,
    gather: bool = False,
    command: str = "",
    tell: Callable[[str], None] = lambda _: None,
) -> list[Outcome]:
    """Run all cells that are not done yet; `out` gets a run folder for each, the tables and `index.html`.

    A cell that fails is reported, and the others go on. Started again, finished cells are not repeated and a
    killed one goes on from its checkpoint. When all are done, latency is measured, one network at a time. Several GPUs
    are shared out among the jobs.

    Args:
        comparison: what to run.
        out: the folder.
        jobs: runs side by side, each on its share of the CPU's threads.
        gather: run nothing: the tables and the page are of the runs that are finished; others may go on meanwhile.
        command: as it was typed, for the page.
        tell: is told what is done.
    Raises:
        SecateurError: what is wrong with the comparison, or the folder holds runs of other settings, or none that is
            finished to gather; nothing has been written then.
    """
    cells, folder = comparison.cells(), Path(out)
    runs = len(cells)
    finished = [cell for cell in cells if "outcome" in _begun(cell, folder).known]
    if gather:
        if not finished:
            raise SecateurError(
                f"{folder}: no run of this comparison is finished. Without --gather they are run."
            )
        cells = finished
    folder.mkdir(parents=True, exist_ok=True)
    outcomes: dict[int, Outcome] = {}
    threads = max(1, torch.get_num_threads() // jobs)

    def done(number: int, outcome: Outcome) -> None:
        outcomes[number] = outcome
        tell(f"{len(outcomes)}/{len(cells)}  {cells[number].name}: {_said(outcome)}")
        write_tables(folder, _report(comparison, [outcomes[n] for n in sorted(outcomes)], runs))

    if jobs == 1:
        for number, cell in enumerate(cells):
            done(number, run_cell(cell, folder))
    else:
        context = multiprocessing.get_context("spawn")
        gpus = context.SimpleQueue()
        for name in shared_out(jobs, torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")):
            gpus.put(name)
        with ProcessPoolExecutor(jobs, context, initializer=_begin_worker, initargs=(threads, gpus)) as pool:
            started = {pool.submit(run_cell, cell, folder): n for n, cell in enumerate(cells)}
            try:
                for future in as_completed(started):
                    done(started[future], future.result())
            except BrokenProcessPool:
                raise SecateurError(
                    f"{folder}: a process that trained was killed from outside, perhaps for want of memory. The same "
                    f"command goes on from here; give it fewer jobs if that happens again."
                ) from None
    tell("Measuring latency")
    found = []
    for n, cell in enumerate(cells):
        pair = None
        try:
            pair = None if outcomes[n].error else timed(cell, folder, comparison.latency_batch)
        except Exception as error:  # the page must not be lost for one network
            tell(f"{cell.name}: latency could not be measured ({type(error).__name__}: {error})")
        found.append(replace(outcomes[n], latency=pair))
    write_comparison(folder, _report(comparison, found, runs, command))
    return found


def _report(
    comparison: Comparison, outcomes: Sequence[Outcome], runs: int, command: str = ""
) -> ComparisonReport:
    plan, task = comparison.plan, comparison.task
    images = task.train_images or plan.train_images
    epochs = (
        f"{plan.epochs} epochs"
        if task.weights is None
        else f"{plan.tune_epochs} epochs on from trained weights at a learning rate of up to {plan.tune_lr:g}"
    )
    return ComparisonReport(
        model=task.model,
        dataset=task.data,
        training=(
            f"{epochs}, {f'{images:,}' if images else 'all'} training images (schedule {comparison.schedule}"
            f"{', bfloat16' if comparison.precision == 'bf16' else ''}"
            f"{', compiled' if comparison.compile else ''})"
        ),
        seeds=comparison.seeds,
        test_images=task.test_images,
        outcomes=outcomes,
        missing=runs - len(outcomes),
        notes={name: arm.note for name, arm in comparison.arms.items() if arm.note},
        command=command,
        versions=current_versions(device()),
    )


def run_only(
    comparison: Comparison, name: str, out: str | Path, *, tell: Callable[[str], None] = lambda _: None
) -> Outcome:
    """Run one cell of a comparison; `compare` gathers what several processes or machines did into one folder.

    Args:
        comparison, out, tell: as for `compare`.
        name: of the cell.
    Raises:
        SecateurError: there is no such cell, or it failed.
    """
    cells = {cell.name: cell for cell in comparison.cells()}
    if name not in cells:
        raise SecateurError(unknown("cell", name, cells))
    outcome = run_cell(cells[name], Path(out))
    if outcome.error:
        raise SecateurError(f"{name}: {outcome.error}")
    tell(f"{name}: {_said(outcome)}")
    return outcome


def _said(outcome: Outcome) -> str:
    return (
        outcome.error
        or f"{100 * (outcome.accuracy or 0):.2f} %, {outcome.training_seconds:.0f} s of training"
    )


def shared_out(jobs: int, gpus: int, visible: str | None) -> list[str | None]:
    """Which GPU each job sees, by the name that CUDA_VISIBLE_DEVICES takes; None: whatever there is.

    >>> shared_out(3, 2, None), shared_out(3, 2, "4,7"), shared_out(2, 1, None)
    (['0', '1', '0'], ['4', '7', '4'], [None, None])
    """
    if gpus < 2:
        return [None] * jobs
    names = [name.strip() for name in visible.split(",")] if visible else [str(n) for n in range(gpus)]
    return [names[n % gpus] for n in range(jobs)]


def _begin_worker(threads: int, gpus: "multiprocessing.queues.SimpleQueue[str | None]") -> None:
    """A process that trains cells has so many threads and one GPU, and ends with the process that started it."""
    if (gpu := gpus.get()) is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)  # in the middle of a step: the run folder is made for that

    threading.Thread(target=watch, daemon=True).start()


def run_cell(cell: Cell, folder: Path) -> Outcome:
    """Run one cell, or go on with it, or read what came of it; whatever goes wrong is part of the outcome."""
    where, trace = folder / cell.folder, folder / "errors" / f"{_plain(cell.name)}.txt"
    who: dict[str, Any] = {
        "arm": cell.arm,
        "budget": cell.budget,
        "seed": cell.seed,
        "against": cell.against,
    }
    try:
        if "outcome" not in _begun(cell, folder).known:
            facts = _facts(cell.config, where, folder / "curves")
            _begun(cell, folder).once("outcome", lambda: facts)
            trace.unlink(missing_ok=True)  # of an earlier try
        known = _begun(cell, folder).known["outcome"]
        return Outcome(**who, **known | {"widths": [Width(**width) for width in known["widths"]]})
    except SecateurError as error:
        return Outcome(**who, error=str(error))
    except Exception as error:  # a bug in one method must not end a night's work
        trace.parent.mkdir(exist_ok=True)
        atomic_write(trace, traceback.format_exc())
        return Outcome(**who, error=f"{type(error).__name__}: {error}")


def _begun(cell: Cell, folder: Path) -> RunFolder:
    """The folder of a cell, for going on with it.

    Raises:
        FileError: it holds something else.
    """
    kind = "train" if isinstance(cell.config, TrainRunConfig) else "prune"
    return RunFolder(folder / cell.folder, kind, cell.config.to_json(), "resume")


def _facts(config: PruneConfig | TrainRunConfig, where: Path, curves: Path) -> dict[str, Any]:
    """Run it; the fields of `Outcome` as plain JSON."""
    if isinstance(config, TrainRunConfig):
        result = train_run(config, where, mode="resume")
        return {
            "accuracy": result.accuracy,
            "epochs": len(result.history),
            "training_seconds": result.seconds,
            "widths": [],
        }
    report = prune_run(config, where, mode="resume", curves=curves)
    assert report is not None
    left, cost = report.weights, report.training_cost
    return {
        "accuracy": report.accuracy_after,
        "accuracy_cut": report.accuracy_cut,
        "accuracy_dense": report.accuracy_before if config.task.weights else None,
        "macs": (left.macs if left else report.macs_after) / report.macs_before,
        "params": (left.params if left else report.params_after) / report.params_before,
        "masked": config.masks,
        "step_macs": cost.after.macs / cost.before.macs if cost else None,
        "step_bytes": cost.after.peak_bytes / cost.before.peak_bytes if cost else None,
        "epochs": len(report.history),
        "training_seconds": sum(line["seconds"] for line in report.history),
        "widths": [asdict(width) for width in report.widths],
    }


def timed(cell: Cell, folder: Path, batch: int) -> LatencyPair | None:
    """Latency of the dense network and of a finished cell's, side by side; kept in the cell's folder unless other work
    disturbed it.

    None if its weights cannot be loaded into the model they came from, as when a method of the user's own changed more
    than widths.
    """
    where = folder / cell.folder
    run, saved = _begun(cell, folder), SavedRun.read(where)
    here, task = device(), cell.config.task
    versions = current_versions(here)
    how = f"{torch.get_num_threads()} threads, torch {versions['torch']}, {versions['device']}"
    name = f"latency at batch {batch}, {how}"
    if name in run.known:
        return pair_of(run.known[name])
    dense, small = (fresh_model(task.model, saved.classes, saved.input_shape[0], task.seed) for _ in range(2))
    try:
        load_into(small, where / "model.safetensors")
    except SecateurError:
        return None
    images = torch.randn(batch, *saved.input_shape, generator=torch.Generator().manual_seed(0)).to(here)
    compared = compare_latency({"before": dense.to(here), "after": small.to(here)}, images, repeats=_REPEATS)
    pair = LatencyPair(compared["before"], compared["after"])
    if is_steady(pair):
        run.once(name, lambda: [pair.before.to_json(), pair.after.to_json()])
    return pair


def _check_types(path: str | Path, given: Mapping[str, Any], arms: Any) -> None:
    """Raise SecateurError for what a recipe's own syntax lets through."""
    tables = isinstance(arms, dict) and all(isinstance(arm, dict) for arm in arms.values())
    each = list(arms.values()) if tables else []
    budgets = [given["budgets"], *(arm["budgets"] for arm in each if "budgets" in arm)]
    seeds, compiled = given.get("seeds", []), given.get("compile", False)
    for name, fits, expected in (
        ("arms", tables, "a table per arm"),
        ("budgets", all(_are_budgets(value) for value in budgets), "a list such as [{ macs = 0.5 }]"),
        ("freeze", all(_are_names(arm.get("freeze", [])) for arm in each), 'a list such as ["layer4"]'),
        ("min_keep", all(type(arm.get("min_keep", 1)) is int for arm in each), "a whole number such as 8"),
        ("round_to", all(type(arm.get("round_to", 1)) is int for arm in each), "a whole number such as 8"),
        ("compile", isinstance(compiled, bool), "true or false"),
        ("tune_lr", type(given.get("tune_lr", 0.0)) in (int, float), "a learning rate such as 0.01"),
        ("seeds", isinstance(seeds, list) and all(type(n) is int for n in seeds), "a list such as [0, 1, 2]"),
    ):
        if not fits:
            raise SecateurError(f"{path}: {name}: expected {expected}")


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _are_budgets(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(budget, dict) and budget and all(type(share) in (int, float) for share in budget.values())
        for budget in value
    )


def _plain(name: str) -> str:
    """A name as a file name.

    >>> _plain("l2, then fine-tune")
    'l2-then-fine-tune'
    """
    return "-".join("".join(c if c.isalnum() or c in "-._" else " " for c in name).split())
