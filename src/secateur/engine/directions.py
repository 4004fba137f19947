"""The direction in which an optimizer moves units: v = (x before - x after) / lr.

That is the direction of whatever optimizer it is: SGD's momentum, Adam's, AdamW's with its decay.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from secateur.engine.session import Session


def remember(session: Session[Any]) -> dict[int, Tensor]:
    """x of all units before the optimizer step, (units, values) per target group."""
    return {number: session.pool.vectors(number) for number in session.targets}


def learning_rates(session: Session[Any], number: int) -> Tensor:
    """The learning rate of every value of x of a group, (values,), float64; 0 where the optimizer moves nothing."""
    assert session.optimizer is not None
    groups = session.optimizer.param_groups
    lr = {p: float(group["lr"]) for group in groups for p in group["params"] if p.requires_grad}
    parts = session.pool.parts(number)
    sizes = [m.take(p.detach()).shape[1] for m, p in parts]
    rates = torch.tensor(
        [lr.get(p, 0.0) for (_, p), size in zip(parts, sizes, strict=True) for _ in range(size)]
    )
    return rates.to(device=session.device, dtype=torch.float64)


def direction(session: Session[Any], number: int, before: Mapping[int, Tensor]) -> Tensor:
    """v of a group's units after the optimizer step, (units, values); zero where nothing moved."""
    rates = learning_rates(session, number)
    moved = before[number] - session.pool.vectors(number)
    return torch.where(rates > 0, moved / rates.clamp_min(1e-300), 0.0)
