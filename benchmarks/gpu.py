"""One command for one GPU: a check against the CPU, seconds per epoch, and rows of papers, in limited time.

    python benchmarks/gpu.py RUNS --data-dir DATA [--weights FILE] [--minutes 12] [--out docs/results/gpu.md]

FILE holds the weights of a ResNet-56 (`--weights-model`), which decay starts from. What is finished is a line of
RUNS/rows.jsonl at once (`--rows` puts it elsewhere), and the page is written anew with each; started again, no line is
repeated, and stopped runs go on from their checkpoints. No run is begun that would not end in time by the epochs
measured so far; one that goes on at the limit is stopped and called unfinished. `benchmarks/pack.py` splits data into
parts, for a machine that takes no more at once.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from epoch import Precision, measure
from in_time import Answer, InTime, Work, run_until

from secateur.compare.cells import Cell, list_cells, run_cell
from secateur.compare.recipe import Comparison
from secateur.compare.results import Outcome
from secateur.compare.schedule import SCHEDULES
from secateur.compare.words import describe_budget, format_percentage
from secateur.cost.latency import device_name
from secateur.files import atomic_write
from secateur.recipes.data import Dataset, load_data
from secateur.recipes.train import TrainConfig, fit
from secateur.runs.task import fresh_model

STARTED = time.monotonic()
RECIPES = Path(__file__).parent / "compare"
Row = dict[str, Any]


@dataclass(frozen=True)
class Check:
    """A way to compute that is held to eager float32 on the CPU.

    Attributes:
        precision, compiled: of the training.
        short: whether convolutions may round float32 to ten bits (TF32), as torch lets them on a GPU.
        tolerance: largest difference of a loss, as a share of it.
    """

    precision: Precision
    compiled: bool
    short: bool
    tolerance: float


CHECKS = {
    "float32, eager": Check("no", False, False, 2e-4),
    "float32, compiled": Check("no", True, False, 2e-4),
    "TF32, eager": Check("no", False, True, 1e-3),
    "TF32, compiled": Check("no", True, True, 1e-3),
    "bfloat16, eager": Check("bf16", False, True, 3e-3),
    "bfloat16, compiled": Check("bf16", True, True, 3e-3),
}
REFERENCE = Check("no", False, False, 0.0)
CHECKED_IMAGES, CHECKED_EPOCHS, CHECKED_LR = 208, 4, 0.001
"""Steps of 128 and of 80 images, as an epoch of CIFAR-10 has them; a higher rate lets any two devices drift apart."""

COLUMNS = (
    *("paper", "network", "budget", "arm", "seed", "accuracy, %", "to dense", "MACs kept", "parameters kept"),
    *("epochs", "s"),
)

SHARE = 0.25
"""Of the time limit, that the check or one measurement may take: what hangs must not cost the rows."""


@dataclass(frozen=True)
class Paper:
    """Rows of a paper: some arms of its recipe."""

    title: str
    recipe: str
    model: str
    budget: dict[str, float]
    arms: tuple[str, ...]
    trained: bool = False


PAPERS = (
    Paper(
        "LAPP",
        "lapp",
        "resnet20",
        {"macs": 0.403},
        (
            "dense",
            "LAPP, no bypass, at once",
            "uniform width",
            "LAPP, no bypass, later",
            "LAPP, shared bypass",
            "LAPP, full bypass",
        ),
    ),
    Paper(
        "PAAM",
        "paam",
        "resnet56",
        {"params": 0.477},
        ("dense", "PAAM, attention, joint", "PAAM, attention", "uniform width"),
    ),
    Paper(
        "Decay Pruning",
        "decay",
        "resnet56_b",
        {"macs": 0.5},
        (
            "DepGraph, one cut",
            "DepGraph, decay over 200 steps",
            "DepGraph, 10 rounds",
            "DepGraph, 10 rounds + decay + restore",
        ),
        trained=True,
    ),
    Paper(
        "PreCropping", "precrop", "resnet20", {"macs": 0.5}, ("cropped", "random weights", "uniform width")
    ),
)


def main() -> None:
    options = parse()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        sys.exit("torch sees no GPU here. Mend that, or rehearse with --device cpu.")
    options.runs.mkdir(parents=True, exist_ok=True)
    bench = Bench(options)
    try:
        for stage in (bench.check, bench.measure, bench.papers):
            stage()
    finally:
        text = bench.write()
    print(text)
    if bench.wrong:
        sys.exit("\n".join(bench.wrong))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, help="the folder of the runs")
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--data-dir", type=Path, help="the folder of the data")
    parser.add_argument("--weights", type=Path, help="of a trained network, for decay; without it, no decay")
    parser.add_argument("--weights-model", default="resnet56_b", help="the network of these weights")
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--jobs", type=int, default=8, help="runs side by side")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--schedule", choices=SCHEDULES, default="standard")
    parser.add_argument("--precision", choices=["no", "bf16"], default="no", help="of epochs and runs")
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"])
    parser.add_argument("--papers", nargs="+", choices=[p.recipe for p in PAPERS], help="only these")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--model", help="in place of all networks, for trying out")
    parser.add_argument("--train-images", type=int, help="so many, for trying out")
    parser.add_argument("--test-images", type=int, help="so many, for trying out")
    parser.add_argument("--rows", type=Path, help="the file of the rows; default: rows.jsonl in RUNS")
    parser.add_argument("--out", type=Path, help="also write the page to this Markdown file")
    return parser.parse_args()


class Bench:
    """All that is done, what is known of it, and the page."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.path = options.rows or options.runs / "rows.jsonl"
        self.rows: list[Row] = (
            list(map(json.loads, self.path.read_text().splitlines())) if self.path.exists() else []
        )
        self.until = STARTED + 60 * options.minutes
        self.wrong: list[str] = []
        self.where = {
            "device": device_name(options.device),
            "data": options.data,
            "train_images": options.train_images,
            "test_images": options.test_images,
        }
        self.cells = dict(self._list_cells())
        models = dict.fromkeys(alike(cell.config.task.model) for _, cell, _ in self.cells.values())
        compiled = [mode == "compiled" for mode in ("eager", "compiled") if mode in options.modes]
        self.checks = {
            f"check of {next(iter(models))}, {way}": check
            for way, check in CHECKS.items()
            if check.compiled in compiled
        }
        self.epochs = {
            f"epoch of {model}, {'compiled' if one else 'eager'}": (model, one)
            for one in compiled
            for model in models
        }

    def check(self) -> None:
        """A few steps of the first network, on the CPU and here, all ways at once."""
        missing = [name for name in self.checks if not self._found("check", name)]
        model, _ = next(iter(self.epochs.values()))
        ways = {"the CPU": ("cpu", REFERENCE)} | {
            name: (self.options.device, self.checks[name]) for name in missing
        }
        homes = {name: self.options.runs / "check" / str(number) for number, name in enumerate(ways)}
        works = [
            Work(name, partial(few_steps, model, self._data(), homes[name], *way))
            for name, way in ways.items()
        ]
        jobs = self.options.jobs if self.options.device == "cpu" else len(works)
        found: dict[str, Answer] = {}
        for answer in self._run(works if missing else [], jobs, share=SHARE):
            found[answer.work.name] = answer
            for name in [name for name in missing if {"the CPU", name} <= found.keys()]:
                missing.remove(name)
                expected, here = found["the CPU"], found[name]
                error = expected.error or here.error
                losses = {"expected": expected.value, "losses": here.value}
                more = {"error": error} if error else losses | {"tolerance": self.checks[name].tolerance}
                self._add("check", name, more)
        for name in missing:
            self._tell(f"{name}: unfinished")
        for row in self._of("check"):
            if (said := verdict(row)) != "equal":
                self.wrong.append(f"{row['name']}: {said}")
                self._tell(f"\n{'!' * 80}\n{self.wrong[-1]}\n{'!' * 80}\n")

    def measure(self) -> None:
        """Seconds per epoch, alone on the device."""
        more: Row = {"precision": self.options.precision}
        for name, (model, compiled) in self.epochs.items():
            if self._found("epoch", name, **more):
                continue
            call = partial(measure_epoch, model, self._data(), self.options.precision, compiled)
            answers = list(self._run([Work(name, call)], 1, share=SHARE))
            for answer in answers:
                known = {"error": answer.error} if answer.error else answer.value
                self._add(
                    "epoch",
                    name,
                    known | more | {"model": model, "compiled": compiled, "wall": answer.seconds},
                )
            if not answers:
                self._tell(f"{name}: unfinished")

    def papers(self) -> None:
        """Runs side by side, as long as they end in time."""
        found = [self._found("epoch", name, precision=self.options.precision) for name in self.epochs]
        epochs = [row for row in found if row and not row["compiled"]]
        alone = {row["model"]: row["seconds"] for row in epochs}
        around = max((row["wall"] - 3 * row["seconds"] for row in epochs), default=0.0)
        works = [
            Work(
                name,
                partial(run_cell, cell, folder),
                alike(cell.config.task.model),
                epochs_of(cell),
                folder / cell.folder,
            )
            for name, (_, cell, folder) in self.cells.items()
            if not self._found_run(name)
        ]
        for network in sorted({work.network for work in works} - alone.keys()):
            self._tell(f"no epoch of {network} was measured, so its runs are not begun")
        gate = InTime(self.until, alone, around)
        for answer in self._run(works, self.options.jobs, gate):
            paper, cell, _ = self.cells[answer.work.name]
            gate.around = max(gate.around, answer.seconds - sum(line["seconds"] for line in answer.work.done))
            outcome: Outcome | None = answer.value
            known = {"error": answer.error} if outcome is None else asdict(outcome)
            known.pop("widths", None)
            about = {"paper": paper.title, "model": cell.config.task.model, "schedule": self.options.schedule}
            self._add("run", answer.work.name, known | about | {"precision": self.options.precision})
            if known["error"]:
                self.wrong.append(f"{answer.work.name}: {known['error']}")

    def _run(
        self, works: Sequence[Work], jobs: int, gate: InTime | None = None, share: float = 1
    ) -> Iterator[Answer]:
        until = min(self.until, time.monotonic() + share * 60 * self.options.minutes)
        start = "spawn" if self.options.device == "cuda" else "fork"
        return run_until(until, works, jobs, gate, start)

    def _list_cells(self) -> Iterator[tuple[str, tuple[Paper, Cell, Path]]]:
        """Name -> paper, run and the folder of its comparison; seed by seed, in the order of the papers."""
        options = self.options
        for seed in range(options.seeds):
            for paper in PAPERS:
                if (paper.trained and not options.weights) or paper.recipe not in (
                    options.papers or paper.recipe
                ):
                    continue
                given = options.weights_model if paper.trained else paper.model
                comparison = Comparison.read(
                    RECIPES / f"{paper.recipe}.toml",
                    model=options.model or given,
                    data=options.data,
                    data_dir=options.data_dir,
                    weights=options.weights if paper.trained else None,
                    train_images=options.train_images,
                    test_images=options.test_images,
                    schedule=options.schedule,
                    precision=options.precision,
                    budgets=[paper.budget],
                    seeds=[seed],
                ).with_arms(paper.arms)
                folder = options.runs / paper.recipe
                for cell in list_cells(comparison):
                    yield f"{paper.recipe}/{cell.name}", (paper, cell, folder)

    def _data(self) -> dict[str, Any]:
        names = ("data", "data_dir", "train_images", "test_images")
        return {name: getattr(self.options, name) for name in names}

    def _of(self, kind: str) -> list[Row]:
        """Rows that were asked for, of this data on this device; some may say why there is no result."""
        names = {"check": self.checks, "epoch": self.epochs, "run": self.cells}[kind]
        return [
            row
            for row in self.rows
            if (row["kind"], row["name"] in names) == (kind, True)
            and all(row[name] == value for name, value in self.where.items())
        ]

    def _found(self, kind: str, name: str, **more: Any) -> Row | None:
        wanted = {"name": name} | more
        rows = [row for row in self._of(kind) if all(row[key] == value for key, value in wanted.items())]
        return next((row for row in rows if not row.get("error")), None)

    def _found_run(self, name: str) -> Row | None:
        cell = self.cells[name][1]
        more = {"model": cell.config.task.model, "schedule": self.options.schedule}
        return self._found("run", name, precision=self.options.precision, **more)

    def _add(self, kind: str, name: str, known: Row) -> None:
        """Keep a row, in place of one that says that it failed; file and page are whole at every moment."""
        self.rows = [row for row in self.rows if not (row["name"] == name and row.get("error"))]
        self.rows.append(
            {"kind": kind, "name": name, **self.where, **known, "at": round(time.monotonic() - STARTED, 1)}
        )
        atomic_write(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self.write()
        self._tell(f"{name}: {known.get('error') or 'done'}")

    def _tell(self, what: str) -> None:
        print(f"{time.monotonic() - STARTED:6.0f} s  {what}", flush=True)

    def write(self) -> str:
        """Write the page, if that is asked for; its text."""
        text = self._page()
        if self.options.out:
            self.options.out.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(self.options.out, text)
        return text

    def _page(self) -> str:
        options = self.options
        words = [f"--minutes {options.minutes:g}", f"--jobs {options.jobs}", f"--seeds {options.seeds}"]
        words += [f"--schedule {options.schedule}", f"--precision {options.precision}"]
        words += ["--weights FILE"] if options.weights else []
        checks = self._of("check")
        epochs = [row for row in self._of("epoch") if row["precision"] == options.precision]
        runs = [row for name in self.cells if (row := self._found_run(name))]
        failed = [row for row in self._of("run") if row["error"]]
        told = {row["name"] for row in [*checks, *epochs, *runs, *failed]}
        open_ = [name for name in [*self.checks, *self.epochs, *self.cells] if name not in told]
        cuda = f", CUDA {torch.version.cuda}" if options.device == "cuda" else ""
        bad = [row for row in checks if verdict(row) != "equal"]
        parts = [
            "# Papers' rows on one GPU",
            f"`python benchmarks/gpu.py RUNS --data-dir DATA {' '.join(words)}`",
            f"{self.where['device']}, {os.cpu_count()} CPU cores, torch {torch.__version__}{cuda}, Python "
            f"{platform.python_version()}.",
        ]
        if options.device == "cpu":
            parts.append("**A rehearsal on a CPU: nothing here is a result.**")
        if bad:
            parts.append("**The check failed: do not trust the numbers below.**")
        of_runs = options.train_images or SCHEDULES[options.schedule].train_images
        parts += [
            "## Does it compute what the CPU does?",
            prose(
                f"Losses of {CHECKED_EPOCHS} short epochs, {2 * CHECKED_EPOCHS} steps in all, from the same seed, "
                "held to eager float32 on the CPU: the largest difference as a share of the loss. With *TF32* "
                "convolutions round float32 to ten bits, as torch lets them on a GPU; epochs and runs in float32 below "
                "do so."
            ),
            table(
                "network and way | losses on the CPU | here | difference | at most | result",
                map(check_line, checks),
            ),
            "## Seconds per epoch",
            prose(
                f"{amount(options.train_images)} training images of {options.data}, 128 per step, augmentation and "
                "loss included, without the test; the last of three epochs, alone on the device. *Start* is what "
                "the first took more."
            ),
            table("network | way | s per epoch | images/s | start, s", map(epoch_line, epochs)),
            "## Rows",
            prose(
                f"Schedule {options.schedule}, {amount(of_runs).lower()} training images"
                f"{', bfloat16' if options.precision == 'bf16' else ''}. One line per run. *To dense* is the "
                "distance to the dense network of the same seed, or to the weights that it started from. Runs side by "
                "side slow each other, so their seconds are no comparison."
            ),
            table(" | ".join(COLUMNS), (run_line(row, runs) for row in runs)),
        ]
        if open_:
            when = f"Unfinished when this was written, {time.monotonic() - STARTED:.0f} s after the start:"
            parts += [when, "\n".join(map(self._unfinished, open_))]
        if failed:
            parts += ["Failed:", "\n".join(f"- {row['name']}: {row['error']}" for row in failed)]
        return "\n\n".join(parts) + "\n"

    def _unfinished(self, name: str) -> str:
        if name not in self.cells:
            return f"- {name}"
        _, cell, folder = self.cells[name]
        done = len(Work(name, print, folder=folder / cell.folder).done)
        return f"- {name}: {done} of {epochs_of(cell)} epochs"


def amount(images: int | None) -> str:
    return f"{images:,}" if images else "All"


def few_steps(model: str, given: dict[str, Any], folder: Path, device: str, check: Check) -> list[float]:
    """The mean loss of each of a few short epochs."""
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU in this process")
    torch.backends.cudnn.allow_tf32 = check.short
    data = load_data(given["data"], given["data_dir"]).subset(train_images=CHECKED_IMAGES, test_images=10)
    config = TrainConfig(
        epochs=CHECKED_EPOCHS,
        lr=CHECKED_LR,
        schedule="constant",
        precision=check.precision,
        compile=check.compiled,
        test_every=CHECKED_EPOCHS,
    )
    shutil.rmtree(folder, ignore_errors=True)
    return [epoch.loss for epoch in fit(fresh(model, data), data, config, folder, progress=False).history]


def measure_epoch(model: str, given: dict[str, Any], precision: Precision, compiled: bool) -> Row:
    data = read(given)
    seconds, rate, start = measure(fresh(model, data), data, precision, True, compiled)
    return {"seconds": seconds, "images_per_second": rate, "start": start}


def read(given: dict[str, Any]) -> Dataset:
    whole = load_data(given["data"], given["data_dir"])
    return whole.subset(train_images=given["train_images"], test_images=given["test_images"])


def fresh(model: str, data: Dataset) -> torch.nn.Module:
    return fresh_model(model, len(data.classes), data.train.images.shape[1], seed=0)


def alike(model: str) -> str:
    """The network whose epochs stand for this one's: the shortcut costs next to nothing."""
    return model.removesuffix("_b")


def epochs_of(cell: Cell) -> int:
    config = cell.config
    return sum(how.epochs for how in (config.train, getattr(config, "finetune", None)) if how)


def difference(row: Row) -> float:
    """The largest, as a share of the loss; infinite if a loss is no number."""
    pairs = zip(row["losses"], row["expected"], strict=True)
    shares = [abs(ours / theirs - 1) for ours, theirs in pairs]
    return max(share if share == share else float("inf") for share in shares)


def verdict(row: Row) -> str:
    if row.get("error"):
        return f"FAILED: {row['error']}"
    if difference(row) <= row["tolerance"]:
        return "equal"
    return f"DIFFERENT: by {difference(row):.1e}, where at most {row['tolerance']:.0e} was expected"


def check_line(row: Row) -> Sequence[str]:
    name = row["name"].removeprefix("check of ")
    if row.get("error"):
        return name, "", "", "", "", verdict(row)
    ends = [f"{losses[0]:.4f} → {losses[-1]:.4f}" for losses in (row["expected"], row["losses"])]
    return name, *ends, f"{difference(row):.1e}", f"{row['tolerance']:.0e}", verdict(row).partition(":")[0]


def epoch_line(row: Row) -> Sequence[str]:
    way = ("bfloat16" if row["precision"] == "bf16" else "float32") + (
        ", compiled" if row["compiled"] else ", eager"
    )
    if row.get("error"):
        return row["model"], way, f"failed: {row['error']}", "", ""
    return (
        row["model"],
        way,
        f"{row['seconds']:.2f}",
        f"{row['images_per_second']:,.0f}",
        f"{row['start']:.1f}",
    )


def run_line(row: Row, runs: Sequence[Row]) -> Sequence[str]:
    dense = row["accuracy_dense"]
    for other in runs:
        if (
            not other["budget"]
            and (other["model"], other["seed"]) == (row["model"], row["seed"])
            and dense is None
        ):
            dense = other["accuracy"]
    to_dense = (
        "" if dense is None or not row["budget"] else format_percentage(row["accuracy"] - dense, sign="+")
    )
    kept = [f"{row['kept'].get(measure, 1):.3f}" for measure in ("macs", "params")]
    budget = describe_budget(row["budget"]) or "none"
    about = (row["paper"], row["model"], budget, row["arm"], str(row["seed"]))
    return (
        *about,
        format_percentage(row["accuracy"]),
        to_dense,
        *kept,
        str(row["epochs"]),
        f"{row['training_seconds']:.0f}",
    )


def prose(text: str) -> str:
    return textwrap.fill(text, 116, break_on_hyphens=False)


def table(heading: str, lines: Iterator[Sequence[str]]) -> str:
    """A Markdown table; nothing but a word if there are no lines."""
    body = [
        "| " + " | ".join(" ".join(cell.replace("|", "/").split()) for cell in line) + " |" for line in lines
    ]
    if not body:
        return "None yet."
    return "\n".join([f"| {heading} |", "|---" * (heading.count("|") + 1) + "|", *body])


if __name__ == "__main__":
    main()
