"""Coverage: every torchvision and timm architecture through capture, cut and proof, beside Torch-Pruning.

    pip install '.[benchmark]'
    python benchmarks/zoo.py --work runs/zoo --out docs/results/zoo

Every network and tool runs in a process of its own with a limit on processor time and memory. A finished one
is a line in `results.jsonl` in the working folder and is skipped by the next call; `--again` repeats those
that failed. What was not run is taken over from the table that is there, so that a new one can be of one tool:

    python benchmarks/zoo.py --work runs/zoo --tools secateur --out docs/results/zoo

Another version of the package is run with PYTHONPATH=ITS/src and a working folder of its own, and set beside this one
by `--before`.
"""

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import zoo_models
import zoo_one
import zoo_table
from zoo_table import Row

TOOLS = ("secateur", "torch-pruning")

WAIT = 3600
"""Seconds on the clock after which a process is ended, however little processor time it got."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("runs/zoo"), help="folder of the results")
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.csv from all results")
    parser.add_argument(
        "--only", nargs="+", default=["*"], help="shell patterns of networks, such as 'timm/*'"
    )
    parser.add_argument("--tools", nargs="+", default=TOOLS, choices=TOOLS)
    parser.add_argument("--limit", type=int, help="stop after so many runs")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument(
        "--seconds",
        type=float,
        default=120,
        help="processor time of one run, plus 0.5 s per million parameters",
    )
    parser.add_argument("--memory", type=float, default=14, help="memory limit of one process in GiB")
    parser.add_argument("--again", action="store_true", help="repeat runs that did not verify")
    parser.add_argument("--before", type=Path, help="the working folder of another version, for --out")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    names = all_names(options.work / "names.json")
    results = options.work / "results.jsonl"
    rows = read(results)
    todo = [
        (tool, name)
        for name in names
        for tool in options.tools
        if any(fnmatchcase(name, pattern) for pattern in options.only)
        and ((name, tool) not in rows or (options.again and not zoo_table.passed(rows[name, tool])))
    ][: options.limit]
    zoo_one.load()
    with ThreadPoolExecutor(options.jobs) as pool, results.open("a") as file:
        runs = pool.map(lambda job: run(job[0], job[1], options.seconds, options.memory), todo)
        for number, row in enumerate(runs, 1):
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(f"{number}/{len(todo)} {zoo_table.line(row)}", flush=True)
    if options.out:
        taken_over, rows = zoo_table.read(options.out), read(results)
        every = {key: taken_over[key] | {"taken_over": True} for key in taken_over} | rows
        before = read(options.before / "results.jsonl") if options.before else {}
        zoo_table.write(
            options.out,
            [every[name, tool] for name in names for tool in TOOLS if (name, tool) in every],
            [row for (_, tool), row in before.items() if tool == "secateur"],
        )


def all_names(cache: Path) -> list[str]:
    """Finding timm's smallest variants means building all of them, so the list is kept."""
    if not cache.exists():
        cache.write_text(json.dumps(zoo_models.names(), indent=0))
    return list(json.loads(cache.read_text()))


def read(path: Path) -> dict[tuple[str, str], Row]:
    """The last result of every network and tool."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return {(row["model"], row["tool"]): row for row in rows}


def run(tool: str, name: str, seconds: float, memory: float) -> Row:
    """One process; its last line counts, with the reason where it did not end by itself.

    It is a fork of this one, which has loaded all that takes a while.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        printed, errors = Path(folder, "out"), Path(folder, "err")
        process = multiprocessing.get_context("fork").Process(
            target=one, args=(printed, errors, tool, name, seconds, memory)
        )
        process.start()
        process.join(WAIT)
        ended = ""
        if process.exitcode is None:
            process.kill()
            process.join()
            ended = f"not finished after {WAIT} s on the clock"
        elif process.exitcode:
            ended = f"exit code {process.exitcode}: {errors.read_text().strip()[-300:]}"
        lines = [text for text in printed.read_text().splitlines() if text[:1] == "{" and text[-1:] == "}"]
    row: Row = json.loads(lines[-1]) if lines else {"model": name, "tool": tool, "stage": "build"}
    if process.exitcode == -signal.SIGXCPU:
        ended = f"not finished in {row.get('limit_s', seconds):g} s of processor time"
    if ended:
        row |= {"error": "Stopped", "message": ended}
    return row | {"wall_s": time.perf_counter() - start, "code": code()}


def one(printed: Path, errors: Path, *job: Any) -> None:
    """What a process does."""
    for path, stream in ((printed, 1), (errors, 2)):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), stream)
    warnings.simplefilter("ignore")
    zoo_one.main(*job)
    os._exit(0)  # what modules do at the end of a process is no result


def code() -> str:
    """The commit of the package that is measured."""
    import secateur

    folder = Path(secateur.__file__).parent
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=7"], cwd=folder, capture_output=True, text=True
    )
    return described.stdout.strip() or secateur.__version__


if __name__ == "__main__":
    main()
