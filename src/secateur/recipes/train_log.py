"""Where a training shows itself: metrics, TensorBoard if it is installed, a progress bar."""

import json
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from secateur.errors import FileError
from secateur.files import atomic_write, explained
from secateur.recipes.checkpoint import Epoch, State


class TrainLog:
    """Where a run shows itself: `metrics.jsonl`, TensorBoard if it is installed, a progress bar.

    Lines of the phase that its history lacks, left by a run that was killed after its last checkpoint, are
    dropped; lines of other phases stay.
    """

    def __init__(self, folder: Path, phase: str, state: State, epochs: int, progress: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.phase, self.epochs, self.metrics = phase, epochs, folder / "metrics.jsonl"
        batches = state.tally.shape[1]
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lines = self.metrics.read_text().splitlines() if self.metrics.exists() else []
            self.scalars = _writer(folder / "tensorboard" / phase, purge_step=state.epoch * batches + 1)
        phases = [self._phase_of(line) for line in lines]
        place = phases.index(phase) if phase in phases else len(phases)
        self.before = lines[:place]
        self.after = [
            line for line, other in zip(lines[place:], phases[place:], strict=True) if other != phase
        ]
        console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not (progress and console.is_terminal),
        )
        done = state.epoch * batches + state.batch
        self.task = self.bar.add_task(phase, total=epochs * batches, completed=done)
        self._write_metrics(state.history)

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        with explained(self.metrics.parent):
            if self.scalars is not None:
                self.scalars.close()

    def step(self) -> None:
        self.bar.advance(self.task)

    def epoch(self, history: list[Epoch]) -> None:
        self._write_metrics(history)
        last = history[-1]
        with explained(self.metrics.parent):
            for name in ("loss", "train_accuracy", "accuracy", "lr", "images_per_second"):
                if self.scalars is not None and (value := getattr(last, name)) is not None:
                    self.scalars.add_scalar(name, value, last.step)
        accuracy = "" if last.accuracy is None else f", accuracy {last.accuracy:.2%}"
        self.bar.update(self.task, description=f"{self.phase}: epoch {last.epoch} of {self.epochs}{accuracy}")

    def _write_metrics(self, history: list[Epoch]) -> None:
        ours = [json.dumps(asdict(epoch)) for epoch in history]
        atomic_write(self.metrics, "".join(f"{line}\n" for line in [*self.before, *ours, *self.after]))

    def _phase_of(self, line: str) -> str:
        try:
            return str(json.loads(line)["phase"])
        except (ValueError, TypeError, KeyError) as error:
            raise FileError(
                f"{self.metrics}: {line[:60]!r} is not a line of metrics (JSON with a phase). Remove "
                f"the line, or use another folder."
            ) from error


def _writer(folder: Path, purge_step: int) -> Any:
    """What writes scalars for TensorBoard; None where that is not installed."""
    if find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=purge_step)
