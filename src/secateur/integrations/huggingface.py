"""Prune while a Hugging Face Trainer trains.

trainer = Trainer(model, arguments, train_dataset=data, callbacks=[Prune("lapp", budget=0.5)])
trainer.train()
"""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from secateur.errors import SecateurError, TrainingError
from secateur.graph import Inputs
from secateur.methods.in_trainer import InTrainer, read_state

FILE = "secateur.safetensors"
"""What a checkpoint's folder holds besides the Trainer's own files."""


class Prune(InTrainer, TrainerCallback):
    """Prunes the Trainer's model while it trains; the Trainer keeps it, smaller.

    It goes with accumulation, clipping, mixed precision and several processes (`torchrun`). Checkpoint folders hold its
    state, and `train(resume_from_checkpoint=…)` goes on from there. The course of the method goes where the Trainer's
    own numbers go.

    Args:
        method: a method that prunes while the model trains, or its name.
        given: budget, inputs, steps, followers and options of the method, as for `InTrainer`. Without inputs they are
            the first example of the training set, without its labels.
    Raises:
        TrainingError: the Trainer shards, compiles or replaces the model, or is to load an earlier, larger one at last.
    """

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start before the optimizer is made, and before weights of a checkpoint are loaded."""
        trainer = self._trainer = _calling_trainer()
        if args.load_best_model_at_end:
            raise TrainingError(
                "load_best_model_at_end may load a checkpoint from before the last cut, which is larger; leave it out"
            )
        make, train = trainer.create_optimizer, trainer.train

        def create_optimizer(*given: Any, **named: Any) -> Any:
            if self.session is None:
                self.start(trainer.model, self._inputs(), trainer.state.max_steps)
            elif self.running.steps != (self.steps or trainer.state.max_steps):
                raise TrainingError(
                    f"the checkpoint is of a training of {self.running.steps} steps; this one has "
                    f"{trainer.state.max_steps}. Restore what decides on their number, or start afresh"
                )
            return make(*given, **named)

        def run(resume_from_checkpoint: Any = None, *given: Any, **named: Any) -> Any:
            self.check_unused()
            folder = resume_from_checkpoint
            if folder is True:
                folder = get_last_checkpoint(args.output_dir)
            if folder:
                if trainer.model_init is not None:
                    raise TrainingError(
                        "a Trainer with model_init cannot resume: the model would be made anew. Pass model=…"
                    )
                saved = read_state(Path(folder) / FILE)
                self.start(trainer.model, self._inputs(), saved["record"]["steps"])
                self.restore(saved)
            try:
                return train(resume_from_checkpoint, *given, **named)
            finally:
                self.leave()

        trainer.create_optimizer, trainer.train = create_optimizer, run

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Everything is made, and loaded."""
        trainer = self._trainer
        self.enter(
            trainer.optimizer.optimizer,  # in Accelerate's
            scaler=trainer.accelerator.scaler,
            wrapped=None if trainer.model_wrapped is trainer.model else trainer.model_wrapped,
        )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        due = control.should_log  # the Trainer's own numbers, which a log of others would put off
        for numbers in self.news():
            self._trainer.log(numbers)
        control.should_log = due

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the state beside the Trainer's files."""
        if args.should_save:
            self.write(Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prove the result, in the precision of its weights."""
        self.leave()
        self._trainer.accelerator.unwrap_model(self._trainer.model, keep_fp32_wrapper=False)
        self.finish()

    def _inputs(self) -> Inputs:
        if self.inputs is not None:
            return self.inputs
        trainer, data = self._trainer, self._trainer.train_dataset
        if not hasattr(data, "__getitem__"):
            raise TrainingError("the training set has no first example; say inputs=…")
        with torch.random.fork_rng(devices=[]):
            batch = trainer.data_collator([data[0]])
        able = inspect.signature(trainer.model.forward).parameters
        found = {
            name: x
            for name, x in batch.items()
            if isinstance(x, Tensor) and name in able and name not in trainer.label_names
        }
        if not isinstance(batch, Mapping) or not found:
            raise TrainingError(
                "the first example of the training set has no tensor that the model takes; say inputs=…"
            )
        return found


def _calling_trainer() -> Trainer:
    """The Trainer whose code is running: callbacks are told of its model and optimizer, but not of itself."""
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(found := frame.f_locals.get("self"), Trainer):
            return found
        frame = frame.f_back
    raise SecateurError("this callback is for a transformers Trainer; pass it as Trainer(callbacks=[…])")
