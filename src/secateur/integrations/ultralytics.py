"""Prune while Ultralytics trains.

model = YOLO("yolo11n.yaml")
prune = Prune("lapp", budget=0.5).add_to(model)
model.train(data="coco8.yaml", epochs=100)
model.model = prune.pruned.model
"""

import functools
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from ultralytics.engine.model import Model
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.utils.torch_utils import ModelEMA, unwrap_model

from secateur.engine.wrapper import renew_wrapper
from secateur.errors import TrainingError
from secateur.graph import Inputs
from secateur.methods.in_trainer import InTrainer, read_state

EVENTS = (
    "on_pretrain_routine_start",
    "on_pretrain_routine_end",
    "on_train_epoch_end",
    "on_model_save",
    "on_train_end",
    "teardown",
)
"""What the callback listens to."""


class Prune(InTrainer):
    """Prunes the network of an Ultralytics model while it trains.

    It goes with accumulation, clipping, mixed precision and the moving average; at the end the network has the weights
    of the average, as in `last.pt`. Beside `last.pt` stands its state, and `train(resume=True)` goes on from there, as
    far as Ultralytics itself does: it saves the average in half precision. `best.pt` is the best since the last cut.
    The shares of MACs and parameters that are left go into `results.csv` and to the loggers.

    Args:
        method: a method that prunes while the model trains, or its name; one that adds no layers.
        given: budget, inputs, steps, followers and options of the method, as for `InTrainer`. Without inputs they are
            one image of the training's size.
    Raises:
        TrainingError: the method adds layers, such as a bypass, which Ultralytics cannot fuse; or the training is
            limited by time.
    """

    def add_to(self, model: Model) -> Self:
        """Listen to the next training of a model, such as a `YOLO`."""
        for event in EVENTS:
            model.add_callback(event, getattr(self, event))
        return self

    # --- from start to end ---------------------------------------------------------------------------------

    def on_pretrain_routine_start(self, trainer: BaseTrainer) -> None:
        """To resume, cut the network before weights are loaded and the optimizer is made."""
        if not trainer.resume:
            return
        make = trainer.setup_model

        def setup_model() -> Any:
            checkpoint = make()  # at full width, with those of the weights that fit
            saved = read_state(_state_of(Path(trainer.args.model)))
            self._start(trainer, trainer.model, saved["record"]["steps"])
            self.restore(saved)
            trainer.model.load_state_dict(checkpoint["ema"].float().state_dict())
            return checkpoint

        trainer.setup_model = setup_model

    def on_pretrain_routine_end(self, trainer: BaseTrainer) -> None:
        """Everything is made, and loaded: start, if this is no resumed training, and stand around its steps."""
        model = unwrap_model(trainer.model)
        wrapped = None if trainer.model is model else trainer.model
        if self.session is None:
            self._start(trainer, model, self.steps or _steps(trainer))
            for tensor in model.state_dict().values() if wrapped is not None else ():
                dist.broadcast(tensor, src=0)
            if wrapped is not None:
                renew_wrapper(wrapped)
            trainer.ema = ModelEMA(trainer.model)
        self._graph = self.running.graph
        self._trainer = trainer
        scaler = trainer.scaler if trainer.scaler.is_enabled() else None
        self.enter(trainer.optimizer, scaler=scaler, wrapped=wrapped)
        trainer.optimizer_step = functools.partial(self._step, trainer, trainer.optimizer_step)

    def _step(self, trainer: BaseTrainer, step: Any) -> None:
        """The trainer's own step, with the update of the average, then the method's."""
        session, graph = self.running, self.running.graph
        step()
        session.followers = tuple(self.followers())  # after a loss of NaN the trainer makes a new one
        self.after_step()
        if session.graph is not graph:
            trainer.ema._pairs = None  # it had noted where the tensors lie

    def on_train_epoch_end(self, trainer: BaseTrainer) -> None:
        """Log what is left, and let the best network be one of the present size."""
        trainer.lr |= self.left()  # what loggers and results.csv take besides losses and metrics
        session = self.running
        if session.graph is not self._graph or session.gates:
            self._graph = session.graph
            trainer.best_fitness = None
            trainer.stopper.best_fitness, trainer.stopper.best_epoch = 0.0, trainer.epoch

    def on_model_save(self, trainer: BaseTrainer) -> None:
        """Put the state beside the checkpoints."""
        for checkpoint in (trainer.last, trainer.wdir / f"epoch{trainer.epoch}.pt"):
            if checkpoint.exists():
                self.write(_state_of(checkpoint))

    def on_train_end(self, trainer: BaseTrainer) -> None:
        """Prove the result, with the weights of the average."""
        self.leave()
        model: Any = self.running.model
        model.load_state_dict(trainer.ema.ema.state_dict())
        self.finish()
        model.args, model.task = (
            dict(trainer.args),
            trainer.args.task,
        )  # as in a model that Ultralytics has loaded

    def teardown(self, trainer: BaseTrainer) -> None:
        """Also after an error."""
        self.leave()

    def followers(self) -> list[nn.Module]:
        """Also the moving average."""
        average = self._trainer.ema  # not there yet when a run resumes
        return [*super().followers(), *([] if average is None else [average.ema])]

    # --- what Ultralytics knows ----------------------------------------------------------------------------

    def _start(self, trainer: BaseTrainer, model: nn.Module, steps: int) -> None:
        self._trainer = trainer
        before = model.state_dict().keys()
        self.start(model, self._inputs(trainer), steps)
        if model.state_dict().keys() != before:
            raise TrainingError(
                f"{self.running.name}: it adds layers, which Ultralytics cannot fuse; use bypass='none'"
            )

    def _inputs(self, trainer: BaseTrainer) -> Inputs:
        if self.inputs is not None:
            return self.inputs
        side = trainer.args.imgsz
        return torch.zeros(1, trainer.data.get("channels", 3), side, side, device=trainer.device)


def _state_of(checkpoint: Path) -> Path:
    """`last.pt` -> `last.secateur.safetensors`."""
    return checkpoint.with_suffix(".secateur.safetensors")


def _steps(trainer: BaseTrainer) -> int:
    """Optimizer steps of the whole training, counted as the trainer's loop does, with its warm-up."""
    if trainer.args.time:
        raise TrainingError(
            "a training that is limited by time has no known number of steps; say epochs=…, or steps=…"
        )
    batches = len(trainer.train_loader)
    warm, most = trainer._get_warmup_iterations(batches), trainer.accumulate
    steps, last = 0, -1
    for number in range(trainer.epochs * batches):
        several = most
        if warm and number <= warm:
            several = max(1, int(np.interp(number, [0, warm], [1, most]).round()))
        if number - last >= several:
            steps, last = steps + 1, number
    return steps
