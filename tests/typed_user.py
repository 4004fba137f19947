"""What a type checker sees of Secateur in a user's code; `scripts/check` runs mypy on it in strict mode."""

from typing import assert_type

import torch
from torch import nn

import secateur as sc


def prune_half(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """The short way."""
    pruned = sc.prune(model, images, budget=sc.Budget(macs=0.5), method="oneshot", score="l2")
    assert_type(pruned, sc.Pruned)
    assert_type(pruned.model, nn.Module)
    pruned.save("model.safetensors")
    return sc.load(model, "model.safetensors")


def look(model: nn.Module, images: torch.Tensor) -> list[str]:
    """Analysis, costs and a plan of one's own."""
    graph = sc.analyze(model, images)
    assert_type(graph, sc.Graph)
    assert_type(sc.Cost(graph).macs(), int)
    return [group.name for group in graph.groups]


def train(model: nn.Module, images: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Pruning during one's own training."""
    session = sc.methods.LAPP(bypass="none").start(model, images, budget=sc.Budget(macs=0.5), steps=100)
    session.attach(optimizer)
    with session:
        loss = model(images).sum() + session.penalty()
        torch.autograd.backward(loss)
        session.before_step()
        optimizer.step()
        session.after_step()
    assert_type(session.finish(), sc.Pruned)
