"""A tiny training in Lightning, on one process or several."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from secateur.integrations.lightning import Prune
from tests.integrations.examples import ACCUMULATE, BATCH, EPOCHS, KEEP, STEPS, images
from tests.methods.examples import Residual


class Module(LightningModule):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.network = Residual(seed)

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.network(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def run(
    method: Any, folder: Path, *, resume: Path | None = None, **options: Any
) -> tuple[Module, Prune, Trainer]:
    """Train with everything on; a checkpoint after every epoch, from whose end Lightning resumes exactly."""
    given, callbacks = options.pop("given", {}), options.pop("callbacks", [])
    module, prune = Module(seed=0 if resume is None else 1), Prune(method, budget=KEEP, **given)
    checkpoints = ModelCheckpoint(
        folder / "saved", "{step}", every_n_train_steps=STEPS // EPOCHS, save_top_k=-1
    )
    trainer = Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": EPOCHS,
            "accumulate_grad_batches": ACCUMULATE,
            "gradient_clip_val": 1.0,
            "logger": CSVLogger(folder, "logs", version=""),
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [prune, *callbacks, checkpoints],
            **options,
        }
    )
    trainer.fit(module, DataLoader(images(), batch_size=BATCH), ckpt_path=resume)
    return module, prune, trainer
