"""Running a comparison: its cells, their latency, tables and page; or one cell alone."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from secateur.compare.cells import is_finished, list_cells, run_cell, time_cell
from secateur.compare.page import write_page
from secateur.compare.pool import run_cells
from secateur.compare.recipe import Comparison
from secateur.compare.results import Outcome, gather_results
from secateur.compare.tables import write_tables
from secateur.errors import SecateurError, unknown


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
    cells, folder = list_cells(comparison), Path(out)
    runs = len(cells)
    finished = [cell for cell in cells if is_finished(cell, folder)]
    if gather:
        if not finished:
            raise SecateurError(
                f"{folder}: no run of this comparison is finished. Without --gather they are run."
            )
        cells = finished
    folder.mkdir(parents=True, exist_ok=True)
    outcomes: dict[int, Outcome] = {}
    for number, outcome in run_cells(cells, folder, jobs):
        outcomes[number] = outcome
        tell(f"{len(outcomes)}/{len(cells)}  {cells[number].name}: {_describe(outcome)}")
        write_tables(folder, gather_results(comparison, [outcomes[n] for n in sorted(outcomes)], runs))
    tell("Measuring latency")
    found = []
    for n, cell in enumerate(cells):
        pair = None
        try:
            pair = None if outcomes[n].error else time_cell(cell, folder, comparison)
        except Exception as error:  # the page must not be lost for one network
            tell(f"{cell.name}: latency could not be measured ({type(error).__name__}: {error})")
        found.append(replace(outcomes[n], latency=pair))
    results = gather_results(comparison, found, runs, command)
    write_tables(folder, results)
    write_page(folder, results)
    return found


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
    cells = {cell.name: cell for cell in list_cells(comparison)}
    if name not in cells:
        raise SecateurError(unknown("cell", name, cells))
    outcome = run_cell(cells[name], Path(out))
    if outcome.error:
        raise SecateurError(f"{name}: {outcome.error}")
    tell(f"{name}: {_describe(outcome)}")
    return outcome


def _describe(outcome: Outcome) -> str:
    return (
        outcome.error
        or f"{100 * (outcome.accuracy or 0):.2f} %, {outcome.training_seconds:.0f} s of training"
    )
