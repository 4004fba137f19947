"""All that evolves while training, and one file that holds it: safetensors, no pickle.

Random numbers need no place here: each step seeds the generator from the run's seed and its own number, and
batch k of epoch e is a pure function of (seed, e, k).
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.engine.session import Session
from secateur.errors import FileError
from secateur.files import read_tensors, write_tensors
from secateur.settings import differences

_FORMAT = "secateur-checkpoint-1"
_SLOTS = {  # what an optimizer keeps for a parameter it has stepped
    torch.optim.SGD: {"momentum_buffer"},
    torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"},
}


@dataclass(frozen=True)
class Epoch:
    """What one epoch measured; a line of `metrics.jsonl`.

    Args:
        phase: which training this is part of, such as "train" or "finetune".
        epoch: how many epochs are done, from 1.
        step: how many optimizer steps are done.
        loss: mean training loss over the epoch's images, each measured as it was learnt from.
        train_accuracy: fraction of those images classified correctly, 0..1.
        accuracy: fraction of the test images classified correctly after the epoch, 0..1; None: not tested.
        lr: learning rate of the epoch's last step.
        seconds: time for the epoch, with the test.
        images_per_second: training images over training time.
    """

    phase: str
    epoch: int
    step: int
    loss: float
    train_accuracy: float
    accuracy: float | None
    lr: float
    seconds: float
    images_per_second: float


@dataclass
class State:
    """All that evolves: `epoch` and `batch` say which batch comes next.

    Args:
        model: being trained.
        optimizer: SGD or AdamW over the trainable parameters.
        average: the moving average of the model, if one is kept.
        session: prunes the model meanwhile, if something does.
        tally: (3, batches), float32: loss, correct and images of each batch of the epoch so far.
        seconds: spent on the epoch so far.
        history: the epochs done.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: nn.Module | None
    session: Session[Any] | None
    tally: Tensor
    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0
    history: list[Epoch] = field(default_factory=list)

    def save(self, path: Path, run: Mapping[str, Any]) -> None:
        """Write everything to one file, atomically.

        Args:
            path: the file.
            run: what the run is (JSON): a checkpoint of another run is refused.
        Raises:
            FileError: the file cannot be written; the one before it is unchanged.
        """
        position = {
            "epoch": self.epoch,
            "batch": self.batch,
            "seconds": self.seconds,
            "history": [asdict(epoch) for epoch in self.history],
        }
        tensors = dict(self._tensors())
        if self.session is not None:
            evolved, position["method"] = self.session.state()
            tensors |= {f"method.{name}": tensor for name, tensor in evolved.items()}
        for name, parameter in self._stepped():
            for slot, value in self.optimizer.state[parameter].items():
                if value is not None:
                    tensors[f"optimizer.{slot}.{name}"] = value
        header = {"format": _FORMAT, "run": json.dumps(run), "position": json.dumps(position)}
        write_tensors(path, tensors, header)

    def load(self, path: Path, run: Mapping[str, Any]) -> None:
        """Go on from a file: everything is checked before any value changes.

        Raises:
            FileError: the file is damaged, or of another run; the message says what differs.
        """
        tensors, header = read_tensors(path)
        try:
            if header["format"] != _FORMAT:
                raise ValueError(f"format {header['format']!r}, expected {_FORMAT!r}")
            found = list(differences(json.loads(header["run"]), run))
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise _damaged(path, error) from error
        if found:
            shown = "; ".join(found[:5]) + ("; …" if len(found) > 5 else "")
            raise FileError(
                f"{path}: the checkpoint is of another run: {shown}. Restore these settings, or start "
                f"afresh (resume=False or another folder)."
            )
        try:
            facts = json.loads(header["position"])
            position = self._checked_position(facts)
            if self.session is not None:  # first of all: the model takes the shapes it had
                evolved = {
                    n.removeprefix("method."): t for n, t in tensors.items() if n.startswith("method.")
                }
                self.session.restore(evolved, facts["method"])
            slots = self._checked_tensors(tensors)
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise _damaged(path, error) from error
        for name, tensor in self._tensors():
            tensor.copy_(tensors[name])
        self.optimizer.state.update(slots)
        self.epoch, self.batch, self.seconds, self.history = position

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield "tally", self.tally
        for prefix, module in (("model", self.model), ("average", self.average)):
            for name, tensor in module.state_dict().items() if module else ():
                yield f"{prefix}.{name}", tensor

    def _stepped(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters the optimizer keeps something for, by name."""
        for name, parameter in self.model.named_parameters():
            if parameter in self.optimizer.state:
                yield name, parameter

    def _checked_position(self, position: dict[str, Any]) -> tuple[int, int, float, list[Epoch]]:
        epoch, batch, seconds = position["epoch"], position["batch"], position["seconds"]
        history = [Epoch(**row) for row in position["history"]]
        batches = self.tally.shape[1]
        if not (type(epoch) is type(batch) is int and len(history) == epoch and 0 <= batch <= batches):
            raise ValueError(f"epoch {epoch!r}, batch {batch!r} of {batches}, {len(history)} epochs done")
        return epoch, batch, float(seconds), history

    def _checked_tensors(self, tensors: dict[str, Tensor]) -> dict[Tensor, dict[str, Tensor]]:
        """What the optimizer keeps for each parameter, once all tensors are there with the right shapes."""
        for name, tensor in self._tensors():
            _require_alike(name, tensors[name], tensor)
        names = _SLOTS[type(self.optimizer)]
        kept: dict[Tensor, dict[str, Tensor]] = {}
        for name, parameter in self.model.named_parameters():
            if not any(f"optimizer.{slot}.{name}" in tensors for slot in names):
                continue  # frozen, or not stepped yet
            kept[parameter] = {}
            for slot in names:
                value = tensors[f"optimizer.{slot}.{name}"]
                if slot == "step":  # a count, which stays on the CPU
                    _require_alike(f"optimizer.{slot}.{name}", value, torch.zeros(()))
                    kept[parameter][slot] = value
                else:  # laid out as the parameter, so that a step adds in the same order
                    _require_alike(f"optimizer.{slot}.{name}", value, parameter)
                    kept[parameter][slot] = torch.empty_like(parameter, requires_grad=False).copy_(value)
        return kept


def _require_alike(name: str, found: Tensor, expected: Tensor) -> None:
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        raise ValueError(
            f"{name} is {found.dtype} {tuple(found.shape)}, expected {expected.dtype} {tuple(expected.shape)}"
        )


def _damaged(path: Path, error: Exception) -> FileError:
    return FileError(
        f"{path}: not a checkpoint that training can go on from ({type(error).__name__}: {error}). "
        f"Start afresh (resume=False or another folder)."
    )
