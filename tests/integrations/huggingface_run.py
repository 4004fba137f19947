"""A tiny training in Hugging Face's Trainer, on one process or several."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from secateur.integrations.huggingface import Prune
from tests.integrations.examples import ACCUMULATE, BATCH, EPOCHS, KEEP, images
from tests.methods.examples import Residual


class Model(nn.Module):
    """As models of that library: keyword arguments, and the loss where there are labels."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.network = Residual(seed)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.network(pixel_values)
        return (
            {"logits": logits}
            if labels is None
            else {"loss": F.cross_entropy(logits, labels), "logits": logits}
        )


def run(
    method: Any, folder: Path, *, resume: Path | bool | None = None, **options: Any
) -> tuple[Model, Prune, Trainer]:
    """Train with everything on; a checkpoint after every fourth step."""
    given, optimizers = options.pop("given", {}), options.pop("optimizers", None)
    model, prune = Model(seed=0 if resume is None else 1), Prune(method, budget=KEEP, **given)
    arguments: dict[str, Any] = {
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATE,
        "max_grad_norm": 1.0,
        "learning_rate": 0.02,
        "weight_decay": 0.01,
        "optim": "adamw_torch",
        "save_steps": 4,
        "logging_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    trainer = Trainer(
        model,
        TrainingArguments(str(folder), **{**arguments, **options}),
        train_dataset=[{"pixel_values": x, "labels": y} for x, y in images()],
        callbacks=[prune],
        optimizers=(None, None) if optimizers is None else (optimizers(model), None),
    )
    trainer.train(
        resume_from_checkpoint=None if resume is None else resume if resume is True else str(resume)
    )
    return model, prune, trainer


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05)
