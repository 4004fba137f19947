"""In each of two processes: forms of methods in a trainer, in DistributedDataParallel, and their results."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.engine import method
from tests.integrations.examples import EPOCHS, FEW, METHODS, check
from tests.methods.examples import analyze_once


def digest(network: nn.Module, prune: Any) -> list[Any]:
    """What must be alike in all processes: units, the course, what the method learns, and weights.

    A shared bypass would fold in the statistics of batch norms, which are each process's own until the next pass.
    """
    learned = [p.detach().double().sum().item() for p in prune.running.parameters()]
    weights = [p.detach().double().sum().item() for p in network.parameters()]
    return [[units.tolist() for units in prune.running.kept], prune.running.history, learned, weights]


def main(framework: str, run: Callable[..., Any], folder: Path) -> None:
    method.analyze = analyze_once  # type: ignore[assignment]
    epochs = 2 * EPOCHS  # as many steps as on one process
    options: dict[str, Any] = {
        "lightning": {"devices": 2, "strategy": "ddp", "max_epochs": epochs},
        "transformers": {"save_strategy": "no", "num_train_epochs": epochs},
    }[framework]
    found = {}
    for name in FEW:
        model, prune, _ = run(METHODS[name], folder / name, **options)
        network = prune.running.model
        check(prune.pruned, network)
        assert network in model.modules()
        assert prune.running.wrapped is not None
        found[name] = digest(network, prune)
    rank = torch.distributed.get_rank()
    (folder / f"{framework}.{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
