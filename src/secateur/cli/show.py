"""What people see: steps as they happen, the summary at the end, errors."""

import contextlib
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from secateur.runs.folder import Watch, is_main_process

if TYPE_CHECKING:
    from secateur.report import LatencyPair, Report


def explain(message: str) -> None:
    """Say what the user has to change."""
    console = Console(stderr=True, soft_wrap=True)
    console.print(f"[bold red]Error:[/] {escape(message)}", highlight=False)


def typed_command() -> str:
    """The command line as it was typed."""
    return shlex.join(["secateur", *sys.argv[1:]])


class Steps(Watch):
    """Tells on stderr what a run is doing: with a spinner on a terminal, else in plain lines."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self.bars = True

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        if not self._console.is_terminal:
            self.tell(what)
            yield
            return
        with self._console.status(f"{escape(what)} …"):
            yield
        self._console.print(f"[green]✓[/] {escape(what)} [dim]{time.perf_counter() - started:.1f} s[/]")

    def tell(self, what: str) -> None:
        self._console.print(escape(what), soft_wrap=True)


def watch(no_progress: bool) -> Watch:
    """What a run shall tell in this process."""
    return Watch() if no_progress or not is_main_process() else Steps()


@contextlib.contextmanager
def interruptible(out: Path, resume: str) -> Iterator[None]:
    """Turn Ctrl-C into one line that says how to go on, and exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        begun = (out / "config.json").is_file()
        advice = f"What is done is kept; go on with: {resume}" if begun else "Nothing was written."
        Console(stderr=True, soft_wrap=True).print(f"Interrupted. {escape(advice)}", highlight=False)
        sys.exit(130)


def resume_command() -> str:
    """The command that goes on with the run this process was started for."""
    words = [word for word in sys.argv[1:] if word not in ("--overwrite", "--resume")]
    return shlex.join(["secateur", *words, "--resume"])


def print_table(table: Table) -> None:
    Console().print(table)


def say(line: str) -> None:
    """A line on stdout, which is never wrapped."""
    Console(soft_wrap=True).print(escape(line), highlight=False)


def table(title: str, columns: Sequence[str], right: Sequence[str] = ()) -> Table:
    """An empty table; the columns in `right` are set flush right."""
    made = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def summary(report: "Report", out: Path) -> None:
    """The end of a pruning run."""
    from secateur.report.html import percent, points, si, speed

    rows = table(report.title, ("", "before", "after", "change"), right=("before", "after"))
    before, cut, after = report.accuracy_before, report.accuracy_cut, report.accuracy_after
    if before is not None and cut is not None and after is not None:
        rows.add_row(
            "accuracy, right after the cut", percent(before, 2), percent(cut, 2), points(before, cut)
        )
        if report.finetune_epochs:
            rows.add_row("accuracy, in the end", percent(before, 2), percent(after, 2), points(before, after))
    elif after is not None:
        start = "–" if before is None else percent(before, 2)
        rows.add_row("accuracy", start, percent(after, 2), points(before, after))
    facts = report.weights
    for name, old, new, unit in (
        ("weights that are not zero", facts and facts.total, facts and facts.kept, ""),
        *report.costs,
        ("weights file", report.weights_bytes_before, report.weights_bytes_after, "B"),
        ("ONNX file", report.onnx_bytes_before, report.onnx_bytes_after, "B"),
    ):
        if old and new:
            rows.add_row(name, si(old, unit), si(new, unit), f"{percent(new / old)} kept")

    def latency(name: str, pair: "LatencyPair | None") -> None:
        if pair:
            old, new = (f"{one.median_ms:.3g} ms" for one in (pair.before, pair.after))
            rows.add_row(name, old, new, speed(pair))

    latency("latency, PyTorch", report.latency_pytorch)
    latency("latency, onnxruntime", report.latency_onnxruntime)
    print_table(rows)
    if report.verify_max_abs_error is not None:
        say(f"Verified: equal to the masked model, max error {report.verify_max_abs_error:.1e} in float64.")
    for note in report.notes:
        say(f"Note: {note}")
    say(f"Report: {out / 'report.html'}")
    say("Load the model:")
    for line in report.loading:
        say(f"  {line}")
