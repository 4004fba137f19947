"""Prune while a Lightning Trainer trains.

trainer = Trainer(max_epochs=10, callbacks=[Prune("lapp", budget=0.5)])
trainer.fit(module, loader)
"""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn

from secateur.errors import TrainingError
from secateur.graph import Inputs
from secateur.methods import MethodLike
from secateur.methods.in_trainer import InTrainer


class Prune(InTrainer, Callback):
    """Prunes the network of a LightningModule while it trains; the module keeps it, smaller.

    It goes with accumulation, clipping, mixed precision, `WeightAveraging` (list that one after this), and several
    processes (strategy "ddp"). Checkpoints hold its state, and `fit(…, ckpt_path=…)` goes on from there. The course of
    the method goes to the trainer's loggers.

    Args:
        method: a method that prunes while the model trains, or its name.
        network: name of the submodule to prune; None: the one submodule that has all the parameters, or the module
            itself if there is none.
        given: budget, inputs, steps, followers and options of the method, as for `InTrainer`. Without inputs they are
            the module's `example_input_array`, or from the first batch.
    Raises:
        TrainingError: the trainer shards the model, or has several optimizers.
    """

    def __init__(self, method: MethodLike, *, network: str | None = None, **given: Any) -> None:
        super().__init__(method, **given)
        self._network = network
        self._due = False  # the optimizer was called since `after_step`

    # --- from start to end ---------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start the method: the network is there, and neither wrapped nor known to an optimizer."""
        if stage != "fit":
            return
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise TrainingError(
                f"the strategy is {type(trainer.strategy).__name__}; each process must hold the whole model to cut it. "
                f"Use one device, or strategy='ddp'"
            )
        self._name, self._callbacks = self._name_of_network(pl_module), trainer.callbacks
        steps = self.steps or trainer.estimated_stepping_batches
        self.start(pl_module.get_submodule(self._name), self._inputs(trainer, pl_module), steps)

        inner = pl_module.on_load_checkpoint

        def cut_first(checkpoint: dict[str, Any]) -> None:  # weights are loaded next
            self.restore(checkpoint.get("callbacks", {}).get(self.state_key, {}))
            inner(checkpoint)

        pl_module.on_load_checkpoint = cut_first

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checkpoints are loaded."""
        if len(trainer.optimizers) != 1:
            raise TrainingError(f"the module has {len(trainer.optimizers)} optimizers; expected one")
        wrapped = trainer.strategy.model
        self.enter(
            trainer.optimizers[0],
            scaler=self._scaler(trainer),
            wrapped=None if wrapped is pl_module else wrapped,
            hooked=False,  # its step may first run the closure with forward and backward pass
        )

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """The gradients are there, and will be clipped."""
        self._after_step(trainer)
        scaler = self._scaler(trainer)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(optimizer)  # which Lightning leaves to a fused optimizer
        self.before_step()
        self._due = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._after_step(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prove the result; averages are copied into the module by now."""
        self.finish()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take everything off, because `teardown` is not called then."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.leave()
        vars(pl_module).pop("on_load_checkpoint", None)

    def state_dict(self) -> dict[str, Any]:
        """What the checkpoint holds."""
        return self.state() if self.session is not None else {}

    # --- what Lightning knows ------------------------------------------------------------------------------

    def followers(self) -> list[nn.Module]:
        """Also the averages that Lightning keeps."""
        averages = [c._average_model for c in self._callbacks if isinstance(c, WeightAveraging)]
        kept = [average.module.get_submodule(self._name) for average in averages if average is not None]
        return [*super().followers(), *kept]

    def _after_step(self, trainer: Trainer) -> None:
        if self._due:
            self._due = False
            self.after_step()
            for numbers in self.news():
                for logger in trainer.loggers:
                    logger.log_metrics(numbers, step=trainer.global_step)

    def _name_of_network(self, module: LightningModule) -> str:
        if self._network is not None:
            return self._network
        total = sum(1 for _ in module.parameters())
        whole = [
            name for name, child in module.named_children() if sum(1 for _ in child.parameters()) == total
        ]
        return whole[0] if whole else ""

    def _inputs(self, trainer: Trainer, module: LightningModule) -> Inputs:
        if self.inputs is not None:
            return self.inputs
        example = module.example_input_array
        if example is None:
            if trainer.train_dataloader is None:
                trainer.fit_loop.setup_data()
            with torch.random.fork_rng(devices=[]):
                batch = next(iter(trainer.train_dataloader))
            example = batch[0] if isinstance(batch, tuple | list) else batch
        if not isinstance(example, Tensor):
            raise TrainingError(f"the first batch starts with a {type(example).__name__}; say inputs=…")
        return example[:2]

    @staticmethod
    def _scaler(trainer: Trainer) -> torch.amp.GradScaler | None:
        return getattr(trainer.precision_plugin, "scaler", None)
