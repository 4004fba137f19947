"""Processes side by side until a moment, and whether a further training would end by then.

`secateur compare --jobs` runs everything to its end. Here each piece of work has a process of its own, so that it can
be stopped alone, and none is started that would not be done in time.
"""

import importlib
import json
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

import torch

from secateur.compare.pool import end_with_parent

SHARED = (
    "accelerate",
    "scipy.optimize",
    "torch._dynamo",
    "torch._export",
    "torch.onnx",
    "secateur.compare.cells",
)
"""What takes long to import and trainings need: before processes fork, so that it is done once."""

LOOK = 1.0
"""Seconds between looks at how far runs are."""


@dataclass(frozen=True)
class Work:
    """A piece of work.

    Attributes:
        name: of it, unique.
        call: does it, in a process; what it returns must be picklable.
        network: that it trains.
        epochs: that it trains for.
        folder: of its run, where `metrics.jsonl` gets a line per epoch.
    """

    name: str
    call: Callable[[], Any]
    network: str = ""
    epochs: int = 0
    folder: Path = Path()

    @property
    def done(self) -> list[dict[str, Any]]:
        """Its epochs so far, those of an earlier start included."""
        path = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


@dataclass(frozen=True)
class Answer:
    """What came of a piece of work: what it returned, or why it did not."""

    work: Work
    value: Any
    error: str
    seconds: float


@dataclass(frozen=True)
class Job:
    """Work that goes on."""

    work: Work
    process: BaseProcess
    answers: Connection
    started: float


class Gate(Protocol):
    """Decides whether work may begin."""

    def watch(self, running: Sequence[Work]) -> None:
        """Look at what goes on; called about once in a second."""

    def lets(self, work: Work, running: Sequence[Work]) -> bool:
        """Whether it may begin beside the others now."""


def run_until(
    until: float, works: Sequence[Work], jobs: int, gate: Gate | None = None, start: str = "spawn"
) -> Iterator[Answer]:
    """Do the works, each in a process; answers come as they are there.

    It ends when all are done, when the gate lets none of the others begin while nothing goes on, or at `until`; what
    goes on then is stopped.

    Args:
        until: a moment of `time.monotonic()`.
        works: in the order in which they should begin.
        jobs: at most so many at a time, each on its share of the processor's threads.
        gate: None lets all begin.
        start: how processes start. `fork` is quicker, but only for the CPU: a process that has looked at a GPU leaves
            none to those that it forks.
    """
    if start == "fork":
        for name in SHARED:
            importlib.import_module(name)
    context = multiprocessing.get_context(start)
    threads = max(1, torch.get_num_threads() // jobs)
    waiting, running = list(works), list[Job]()
    try:
        while (left := until - time.monotonic()) > 0:
            if gate:
                gate.watch([job.work for job in running])
            for work in list(waiting):
                now = [job.work for job in running]
                if len(running) < jobs and (gate is None or gate.lets(work, now)):
                    waiting.remove(work)
                    running.append(_begin(context, work, threads))
            if not running:
                return
            ready = wait([job.answers for job in running], min(LOOK, left))
            for job in [job for job in running if job.answers in ready]:
                running.remove(job)
                yield _end(job)
    finally:
        for job in running:
            job.process.kill()
            job.process.join()


def _begin(context: Any, work: Work, threads: int) -> Job:
    answers, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(work.call, threads, theirs))
    process.start()
    theirs.close()
    return Job(work, process, answers, time.monotonic())


def _end(job: Job) -> Answer:
    try:
        value, error = job.answers.recv()
    except EOFError:
        value, error = None, "its process was killed from outside, perhaps for want of memory"
    job.process.join()
    return Answer(job.work, value, error, time.monotonic() - job.started)


def _work(call: Callable[[], Any], threads: int, answers: Connection) -> None:
    torch.set_num_threads(threads)
    end_with_parent()
    try:
        answers.send((call(), ""))
    except Exception as error:
        traceback.print_exc()
        answers.send((None, f"{type(error).__name__}: {error}"))


@dataclass
class Pace:
    """How fast a run goes.

    Attributes:
        first: epochs that it had when it was first seen; an earlier start made them.
        epochs: that it has.
        seconds: of the last of them.
        beside: runs that trained side by side during that epoch, itself included; 0: no epoch is over yet.
        least: the fewest that trained side by side since.
    """

    first: int
    epochs: int
    seconds: float = 0.0
    beside: int = 0
    least: int = 1


@dataclass
class InTime:
    """A gate that lets a run begin if it and all that go on would end in time, by the epochs measured so far.

    With more runs side by side than were when an epoch was measured, each is taken to be slower in proportion, as if
    one filled the GPU. That is the worst case, and once they have trained side by side for an epoch, it is measured.

    Args:
        until: a moment of `time.monotonic()`.
        alone: network -> seconds per epoch, with the GPU to itself.
        around: seconds that a run takes beside its epochs: to load, to prove, to write.
    """

    until: float
    alone: dict[str, float]
    around: float
    paces: dict[str, Pace] = field(default_factory=dict)

    def watch(self, running: Sequence[Work]) -> None:
        """Note the epochs that are over."""
        known = {work.name: work.done for work in running}
        for name, epochs in known.items():
            self.paces.setdefault(name, Pace(len(epochs), len(epochs)))
        self.paces = {name: self.paces[name] for name in known}
        for name, epochs in known.items():
            pace = self.paces[name]
            if len(epochs) > pace.epochs:
                pace.epochs, pace.seconds = len(epochs), epochs[-1]["seconds"]
                pace.beside, pace.least = max(1, pace.least), len(running)
        training = sum(pace.epochs > pace.first for pace in self.paces.values())
        for pace in self.paces.values():
            pace.least = min(pace.least, training)

    def lets(self, work: Work, running: Sequence[Work]) -> bool:
        """Whether all would end in time."""
        if work.network not in self.alone:
            return False
        side_by_side, left = [*running, work], self.until - time.monotonic()
        return all(self.needs(one, side_by_side) <= left for one in side_by_side)

    def needs(self, work: Work, side_by_side: Sequence[Work]) -> float:
        """Seconds until it is done, beside these and itself."""
        return self.around + (work.epochs - len(work.done)) * self._per_epoch(work, side_by_side)

    def _per_epoch(self, work: Work, side_by_side: Sequence[Work]) -> float:
        jobs = len(side_by_side)
        own = self.paces.get(work.name)
        if own and own.beside:
            return own.seconds * max(1.0, jobs / own.beside)
        slower = [
            pace.seconds / self.alone[other.network] * max(1.0, jobs / pace.beside)
            for other in side_by_side
            if (pace := self.paces.get(other.name)) and pace.beside
        ]
        return self.alone[work.network] * max(slower, default=jobs)
