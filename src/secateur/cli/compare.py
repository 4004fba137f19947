"""`secateur compare`."""

import shlex
import sys
from pathlib import Path

from typer import Exit

from secateur.cli.flags import RUN, Flags, Given, argument, command, flag
from secateur.compare.recipe import Comparison
from secateur.compare.words import MEASURES
from secateur.errors import SecateurError
from secateur.runs.config import Task

RECIPES = "the recipe's"
OF_TASK = ["model", "weights", "data", "data_dir", "train_images", "test_images"]
OF_COMPARISON = ["schedule", "epochs", "tune_lr", "lr_shape", "precision", "compile", "latency_runtime"]


@command(
    argument(
        "recipe",
        Path,
        "RECIPE",
        "TOML file: model, data, budgets, seeds, arms. What follows takes the place of what it says.",
    ),
    Flags(
        Task,
        only=OF_TASK,
        shown={
            "model": RECIPES,
            "data": RECIPES,
            "train_images": f"{RECIPES}, else the schedule's",
            "test_images": f"{RECIPES}, else all",
        },
    ),
    Flags(
        Comparison,
        only=OF_COMPARISON,
        shown={
            "schedule": f"{RECIPES}, else short",
            "epochs": f"{RECIPES}, else the schedule's",
            "tune_lr": f"{RECIPES}, else the schedule's",
            "lr_shape": f"{RECIPES}, else the schedule's",
            "precision": f"{RECIPES}, else no",
            "latency_runtime": f"{RECIPES}, else pytorch",
        },
    ),
    flag(
        "method",
        list[str],
        "An arm of the comparison: a method with its defaults, or dense. Repeat it for several.",
        panel=RUN,
        shown="the recipe's arms",
        metavar="NAME",
    ),
    flag(
        "arm",
        list[str],
        "Of the recipe's arms, this one. Repeat it for several.",
        panel=RUN,
        shown="all",
        metavar="NAME",
    ),
    *(
        flag(
            f"keep_{measure}",
            list[float],
            f"A budget: this share of the {label} may stay. Repeat it for several.",
            panel=RUN,
            shown="the recipe's budgets",
            metavar="X",
        )
        for measure, label in MEASURES.items()
    ),
    flag("seeds", int, "Run seeds 0 to N - 1.", panel=RUN, shown=f"{RECIPES}, else 1", metavar="N"),
    flag("jobs", int, "Runs side by side.", panel=RUN, shown="1", metavar="N"),
    flag("list", bool, "Run nothing: print one command per run, for other devices or machines.", panel=RUN),
    flag(
        "only",
        str,
        "Run this one alone, as [bold]--list[/] names it; without it, the same command gathers all.",
        panel=RUN,
        metavar="RUN",
    ),
    flag(
        "gather",
        bool,
        "Run nothing: write table and page of the runs that are finished; others may go on meanwhile.",
        panel=RUN,
    ),
    flag(
        "out",
        Path,
        "Folder for the table, the page and a folder per run; it may hold runs of this comparison.",
        panel=RUN,
        metavar="DIR",
    ),
)
def compare(given: Given) -> None:
    """Compare methods at equal training and equal budgets; write a page and a table of means over seeds.

    Run it again to go on after an interruption: finished runs are not repeated.
    """
    from secateur.cli.show import say, typed_command
    from secateur.compare.cells import list_cells
    from secateur.compare.run import compare as run
    from secateur.compare.run import run_only

    if sum(name in given for name in ("list", "gather", "only")) > 1:
        raise SecateurError("--list, --only and --gather do different things; give one of them")
    if "out" not in given:
        raise SecateurError("no out: give --out, the folder for the table, the page and a folder per run")
    out, changes = given["out"], {name: given.get(name) for name in [*OF_TASK, *OF_COMPARISON]}
    budgets = [{m: x} for m in MEASURES for x in given.get(f"keep_{m}", ())]
    if "method" in given:
        changes["arms"] = {name: {} if name == "dense" else {"method": name} for name in given["method"]}
    comparison = Comparison.read(
        given.get("recipe"),
        **changes,
        budgets=budgets or None,
        seeds=list(range(given["seeds"])) if "seeds" in given else None,
    )
    if "arm" in given:
        comparison = comparison.with_arms(given["arm"])
    if "list" in given:
        words = [word for word in sys.argv[1:] if word != "--list"]
        for cell in list_cells(comparison):
            say(shlex.join(["secateur", *words, "--only", cell.name]))
    elif "only" in given:
        run_only(comparison, given["only"], out, tell=say)
    else:
        outcomes = run(
            comparison,
            out,
            jobs=given.get("jobs", 1),
            gather="gather" in given,
            command=typed_command(),
            tell=say,
        )
        say(f"Table: {out / 'table.md'}")
        say(f"Page: {out / 'index.html'}")
        if failed := sum(bool(outcome.error) for outcome in outcomes):
            say(
                f"{failed} of {len(outcomes)} runs failed; the table says why, and the same command tries them again."
            )
            raise Exit(1)
