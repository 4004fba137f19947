"""Many cells at a time: processes that share the CPU and the GPUs, and end with the one that started them."""

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from secateur.compare.cells import Cell, run_cell
from secateur.compare.results import Outcome
from secateur.errors import SecateurError


def run_cells(cells: Sequence[Cell], folder: Path, jobs: int) -> Iterator[tuple[int, Outcome]]:
    """Run all cells; each outcome as soon as it is there, with its cell's place in the list.

    Args:
        cells: of a comparison.
        folder: the comparison's.
        jobs: processes side by side, each on its share of the CPU's threads and with one of the GPUs; 1: this process.
    Raises:
        SecateurError: a process was killed.
    """
    if jobs == 1:
        yield from ((number, run_cell(cell, folder)) for number, cell in enumerate(cells))
        return
    context = multiprocessing.get_context("spawn")
    threads, gpus = max(1, torch.get_num_threads() // jobs), context.SimpleQueue()
    for name in share_gpus(jobs, torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")):
        gpus.put(name)
    with ProcessPoolExecutor(jobs, context, initializer=_begin_worker, initargs=(threads, gpus)) as pool:
        started = {pool.submit(run_cell, cell, folder): n for n, cell in enumerate(cells)}
        try:
            for future in as_completed(started):
                yield started[future], future.result()
        except BrokenProcessPool:
            raise SecateurError(
                f"{folder}: a process that trained was killed from outside, perhaps for want of memory. The same "
                f"command goes on from here; give it fewer jobs if that happens again."
            ) from None


def share_gpus(jobs: int, gpus: int, visible: str | None) -> list[str | None]:
    """Which GPU each job sees, by the name that CUDA_VISIBLE_DEVICES takes; None: whatever there is.

    >>> share_gpus(3, 2, None), share_gpus(3, 2, "4,7"), share_gpus(2, 1, None)
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
    end_with_parent()


def end_with_parent() -> None:
    """From now on this process ends with the one that started it."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)  # in the middle of a step: the run folder is made for that

    threading.Thread(target=watch, daemon=True).start()
