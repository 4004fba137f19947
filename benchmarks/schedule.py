"""What each ingredient of the schedule `cpu` is worth: the schedule against itself with one change, on CIFAR-10.

    python benchmarks/schedule.py RUNS --data-dir DATA [--epochs 8] [--seeds 0] [--out docs/results/schedule.md]

A finished row is a line of RUNS/rows.jsonl; started again, what is there is not repeated. Seconds are of the processor,
data and test included, so that other work on the machine changes them little.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from secateur.compare.schedule import SCHEDULES
from secateur.cost.latency import device_name
from secateur.recipes.data import Dataset, load_data
from secateur.recipes.train import fit
from secateur.runs.task import fresh_model

CHANGES: dict[str, dict[str, Any]] = {
    "the schedule itself": {},
    "whole images from the start": {"initial_size": 1.0},
    "flips by chance": {"alternate_flips": False},
    "no moving average": {"ema": None},
    "label smoothing 0.1": {"label_smoothing": 0.1},
    "half the peak rate": {"lr": 0.1},
    "twice the peak rate": {"lr": 0.4},
    "64 images per step, half the rate": {"batch_size": 64, "lr": 0.1},
    "256 images per step, twice the rate": {"batch_size": 256, "lr": 0.4},
    "half the weight decay": {"weight_decay": 2.5e-4},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, help="the folder of the runs")
    parser.add_argument("--data-dir", type=Path, required=True, help="the folder of CIFAR-10")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--changes", nargs="+", choices=CHANGES, default=list(CHANGES))
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--out", type=Path, help="write the table to this Markdown file")
    options = parser.parse_args()
    data = load_data("cifar10", options.data_dir)
    options.runs.mkdir(parents=True, exist_ok=True)
    rows = options.runs / "rows.jsonl"
    rows.touch()
    for seed in options.seeds:
        for change in options.changes:
            if not any(same(row, options, change, seed) for row in read(rows)):
                row = run(options, data, change, seed)
                with rows.open("a", encoding="utf-8") as file:
                    print(json.dumps(row), file=file)
                print(row, flush=True)
    text = page(read(rows), options)
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


def read(rows: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]


def same(row: dict[str, Any], options: argparse.Namespace, change: str, seed: int) -> bool:
    wanted = (options.model, options.epochs, options.precision, change, seed)
    return (row["model"], row["epochs"], row["precision"], row["change"], row["seed"]) == wanted


def run(options: argparse.Namespace, data: Dataset, change: str, seed: int) -> dict[str, Any]:
    given = {"epochs": options.epochs, "precision": options.precision, "seed": seed} | CHANGES[change]
    config = SCHEDULES["cpu"].make_config(**given)
    model = fresh_model(options.model, len(data.classes), 3, seed)
    kind = f"{options.model} {options.epochs} {options.precision}"
    folder = options.runs / f"{kind} {list(CHANGES).index(change)} {seed}"
    started = time.process_time()
    result = fit(model, data, config, folder, resume=True)
    return {
        "model": options.model,
        "epochs": options.epochs,
        "precision": options.precision,
        "change": change,
        "seed": seed,
        "accuracy": result.accuracy,
        "seconds": time.process_time() - started,
        "device": device_name(torch.device("cpu")),
    }


def page(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    kind = (options.model, options.epochs, options.precision)
    rows = [row for row in rows if (row["model"], row["epochs"], row["precision"]) == kind]
    base = {row["seed"]: row["accuracy"] for row in rows if row["change"] == "the schedule itself"}
    lines = []
    for change in CHANGES:
        found = {row["seed"]: row for row in rows if row["change"] == change}
        if not found:
            continue
        accuracy = 100 * statistics.mean(row["accuracy"] for row in found.values())
        paired = [100 * (row["accuracy"] - base[seed]) for seed, row in found.items() if seed in base]
        difference = f"{statistics.mean(paired):+.2f}" if change != "the schedule itself" and paired else ""
        seconds = statistics.mean(row["seconds"] for row in found.values())
        lines.append(f"| {change} | {accuracy:.2f} | {difference} | {seconds:,.0f} | {len(found)} |")
    return "\n".join(
        [
            "# The schedule for CPUs",
            "",
            f"`python benchmarks/schedule.py RUNS --data-dir DATA --model {options.model} --epochs {options.epochs} "
            f"--precision {options.precision} --seeds {' '.join(map(str, options.seeds))}`",
            "",
            f"{options.model} on CIFAR-10, all 50,000 images, {options.epochs} epochs of the schedule `cpu`, once as",
            "it is and once with each change; accuracy on the 10,000 test images. *Difference* is paired by seed.",
            f"{' and '.join(sorted({row['device'] for row in rows}))}, "
            f"{torch.get_num_threads()} CPU thread(s), "
            f"torch {torch.__version__}, Python {platform.python_version()}.",
            "",
            "| | accuracy, % | difference, points | processor seconds | seeds |",
            "|---|---|---|---|---|",
            *lines,
            "",
        ]
    )


if __name__ == "__main__":
    main()
