"""Models of the frameworks that people work with: pruned, trained on, saved and loaded, exported.

    python benchmarks/ecosystem.py --work runs/ecosystem --out docs/results/ecosystem.md

Every model runs in a process of its own with a limit on processor time. A finished one is a file in the working folder
and is skipped by the next call; `--again` repeats those that were not equal in all.
"""

import argparse
import importlib
import json
import multiprocessing
import platform
import re
import signal
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from importlib.metadata import version
from multiprocessing import connection
from pathlib import Path
from typing import Any

import ecosystem_one
import torch
from ecosystem_one import BUDGET

from secateur.cost.latency import device_name

Row = dict[str, Any]
Key = tuple[str, str]
"""Framework and model."""

FRAMEWORKS = {
    "huggingface": ("Hugging Face Transformers", "transformers", 35),
    "segmentation": ("segmentation_models_pytorch", "segmentation_models_pytorch", 10),
    "detectors": ("torchvision detection", "torchvision", 8),
    "ultralytics": ("Ultralytics", "ultralytics", 12),
}
"""Module `ecosystem_NAME` -> what it is called, its package, and how many models it should have at least."""

NOTES = {
    (
        "huggingface",
        "VideoMAE",
    ): """Its table of positions is a plain tensor that the module holds, neither parameter
nor buffer: it is in no state dict, so that a cut of it could not be saved with the model, and the channels that it is
added to stay. With `register_buffer` in its place, 0.70 of the MACs are reached and the result is equal.""",
}
"""Why a model is not as it should be, where its message does not say all."""

ABOUT = """Small configurations of each framework's own classes, with random weights that hide nothing; nothing is
downloaded. *Pruned*: `secateur.prune` to 0.7 of the MACs, the same share of every group, gives a result, and
torch's counter finds no more; models in parts, whose regions depend on the weights, are counted by
`benchmarks/ecosystem_detectors.py`. *Equal*: the proof holds: in float64 and float32, at other batches and
image sizes, and for a training step. *Trains on*: every parameter that gets a gradient in the original gets
one, and the loss falls within four steps of Adam, if the original's does (Hugging Face classifiers and the
detectors: the framework's own loss; others: the mean square of all outputs). *Resumes*: the result, saved and
loaded into a fresh model, gives the same bits, and so does one more step of training with the optimizer's
state loaded. *Exports*: to ONNX, compared with ONNX Runtime; Ultralytics models with their own exporter.
*Refused*: one of our errors, with its reason. *Wrong*: anything that does not hold, other exceptions
included; an export that fails for the original too is not counted. *Tied*: a submodule takes fewer image
sizes than before, and says so."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("runs/ecosystem"), help="folder of the results")
    parser.add_argument("--out", type=Path, help="write the page from all results")
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns, such as 'huggingface/*'")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--seconds", type=int, default=300, help="processor time of one model")
    parser.add_argument("--again", action="store_true", help="repeat what was not equal in all")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    listed, missing = all_models()
    rows = read(options.work)
    todo = [
        key
        for key in listed
        if any(fnmatchcase("/".join(key), pattern) for pattern in options.only)
        and (key not in rows or (options.again and verdict(rows[key]) != "equal"))
    ]
    for number, row in enumerate(run(todo, options.work, options.seconds, options.jobs), 1):
        print(f"{number}/{len(todo)} {line(row)}", flush=True)
    if options.out:
        rows = read(options.work)
        unmeasured = ["/".join(key) for key in listed if key not in rows]
        options.out.write_text(page([rows[key] for key in listed if key in rows], missing, unmeasured))
    for name, why in missing.items():
        print(f"missing: {name}: {why}")


def run(todo: Sequence[Key], work: Path, seconds: int, jobs: int) -> Iterator[Row]:
    """Run each of these models in a process of its own; its row, as it ends.

    The processes are forked, since loading the frameworks would take most of the time.
    """
    ecosystem_one.warm_up()
    context = multiprocessing.get_context("fork")
    waiting, running = list(todo), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            key = waiting.pop(0)
            file = work / f"{re.sub('[^a-zA-Z0-9.+]+', '-', '-'.join(key))}.json"
            process = context.Process(target=ecosystem_one.main, args=(*key, seconds, file))
            process.start()
            running[process.sentinel] = process, file
        for sentinel in connection.wait(list(running)):
            process, file = running.pop(sentinel)
            process.join()
            row = json.loads(file.read_text())
            if process.exitcode:
                limit = process.exitcode == -signal.SIGXCPU
                why = (
                    f"not finished in {seconds} s of processor time"
                    if limit
                    else f"exit code {process.exitcode}"
                )
                row |= {"error": "Stopped", "message": why, "cpu_s": seconds, "ended": True}
                file.write_text(json.dumps(row))
            yield row


def all_models() -> tuple[list[Key], dict[str, str]]:
    """(framework, model) of every model, and why a framework is missing."""
    listed, missing = [], {}
    for framework, (title, _, _) in FRAMEWORKS.items():
        try:
            module = importlib.import_module(f"ecosystem_{framework}")
        except ImportError as error:
            missing[title] = str(error)
        else:
            listed += [(framework, name) for name in module.CASES]
    return listed, missing


def read(work: Path) -> dict[Key, Row]:
    """The results of the models that have ended."""
    rows = [json.loads(file.read_text()) for file in work.glob("*.json")]
    return {(row["framework"], row["model"]): row for row in rows if row.get("ended")}


def problems(row: Row) -> list[str]:
    """What does not hold, in words."""
    if "error" in row:
        return [f"{row['error']} in stage {row['stage']}: {row['message']}"]
    found = []
    if row["macs_counted"] > BUDGET or row["macs"] > BUDGET:
        found.append(f"{max(row['macs'], row['macs_counted']):.3f} of the MACs are left")
    if not row["proven"]:
        found.append(
            f"the proof does not hold: {row['error64']:.0e} in float64, {row['error32']:.0e} in float32"
        )
    if not row["trains"]:
        unreached = f"; no gradients for {', '.join(row['unreached'])}" if row["unreached"] else ""
        found.append(f"it does not train on: losses {row['losses']}{unreached}")
    if not row["resumes"]:
        found.append("loaded into a fresh model, it is another")
    if row["exports"] != "yes" and not row["exports"].startswith("as little"):
        found.append(f"export: {row['exports']}")
    return found


def verdict(row: Row) -> str:
    """Equal, refused or wrong."""
    if row.get("refused"):
        return "refused"
    return "wrong" if problems(row) else "equal"


def line(row: Row) -> str:
    """For the terminal."""
    tied = f"tied: {row['tied'][0]}" if row.get("tied") else ""
    cells = (
        f"{row['framework']}/{row['model']}",
        verdict(row),
        f"{row.get('cpu_s', 0):.0f} s",
        *problems(row),
        tied,
    )
    return "  ".join(filter(None, cells))[:400]


def page(rows: Sequence[Row], missing: dict[str, str], unmeasured: Sequence[str] = ()) -> str:
    """The page of results.

    Args:
        rows: what was measured.
        missing: frameworks that cannot be loaded, and why.
        unmeasured: models that were not run.
    """
    words = {word: sum(verdict(row) == word for row in rows) for word in ("equal", "refused", "wrong")}
    packages = [package for title, package, _ in FRAMEWORKS.values() if title not in missing]
    versions = [f"{package} {version(package)}" for package in packages]
    minutes = sum(row.get("cpu_s", 0) for row in rows) / 60
    lines = [
        "# The ecosystem",
        "",
        "`python benchmarks/ecosystem.py --work runs/ecosystem --out docs/results/ecosystem.md`",
        "",
        f"{len(rows)} models: {', '.join(f'{count} {word}' for word, count in words.items())}. "
        f"torch {torch.__version__}, {', '.join(versions)}, {device_name('cpu')}, one thread, "
        f"Python {platform.python_version()}; {minutes:.0f} minutes of processor time.",
        "",
        " ".join(ABOUT.split()),
        "",
        "| framework | models | equal | refused | wrong | exported | tied to sizes | own forward |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for framework, (title, _, least) in FRAMEWORKS.items():
        own = [row for row in rows if row["framework"] == framework]
        counts = [sum(verdict(row) == word for row in own) for word in words]
        good = [row for row in own if "exports" in row]
        more = [
            sum(row["exports"] == "yes" for row in good),
            sum(bool(row["tied"]) for row in good),
            sum(not row["rewritten"] for row in good),
        ]
        few = "" if len(own) >= least else f" (fewer than {least})"
        lines.append(f"| {title} | {len(own)}{few} | {' | '.join(map(str, [*counts, *more]))} |")
    lines += [f"\nMissing: {title}: {why}." for title, why in missing.items()]
    lines += [f"\nNot measured yet: {', '.join(unmeasured)}."] if unmeasured else []
    lines += ["", "## What is not as it should be", ""]
    bad = [row for row in rows if verdict(row) != "equal"]
    lines += [
        f"- {FRAMEWORKS[row['framework']][0]}, {row['model']}: {verdict(row)}. {'; '.join(problems(row))}"
        + " ".join(["", *NOTES.get((row["framework"], row["model"]), "").split()])
        for row in bad
    ]
    lines += [] if bad else ["Nothing."]
    lines += ["", "## Exports that fail for the original too", ""]
    late = [row for row in rows if row.get("exports", "yes").startswith("as little")]
    lines += [f"- {row['model']}: {row['exports'].partition(': ')[2]}" for row in late] if late else ["None."]
    lines += ["", "## Tied to sizes", ""]
    tied = [row for row in rows if row.get("tied")]
    lines += [f"- {row['model']}: {'; '.join(row['tied'])}" for row in tied] if tied else ["None."]
    lines += [
        "",
        "## Every model",
        "",
        "| framework | model | parameters | pruned | MACs left | equal | trains on | resumes | exports | rewritten "
        "| tied | s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def cells(row: Row) -> list[str]:
    """One line of the table."""

    def yes(key: str) -> str:
        return "" if key not in row else "yes" if row[key] is True or row[key] == "yes" else "no"

    return [
        FRAMEWORKS[row["framework"]][0],
        row["model"],
        f"{row['params']:,}" if "params" in row else "",
        "yes" if "macs_counted" in row else "no",
        f"{row['macs_counted']:.2f}" if "macs_counted" in row else "",
        yes("proven"),
        yes("trains"),
        yes("resumes"),
        yes("exports"),
        str(len(row["rewritten"])) if "rewritten" in row else "",
        str(len(row["tied"])) if "tied" in row else "",
        f"{row.get('cpu_s', 0):.0f}",
    ]


if __name__ == "__main__":
    main()
