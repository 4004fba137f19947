"""HESSO, the exact-budget successor of OTOv2: redundant units decay to zero in periods."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from secateur.engine.decay import Decay
from secateur.engine.directions import direction, remember
from secateur.engine.rounds import advance_rounds, check_shares, plan_rounds, relative
from secateur.engine.session import Session
from secateur.engine.state import UNSAVED
from secateur.engine.training_method import TrainingMethod
from secateur.settings import option, settings


@dataclass
class State:
    """The steps after which periods start, and the units before the optimizer's step, per target group."""

    when: list[int] = field(metadata=UNSAVED)
    x: dict[int, Tensor] = field(default_factory=dict, metadata=UNSAVED)


@settings
class HESSO(TrainingMethod):
    """Decay the most redundant units to zero in periods, to an exact budget.

    At the start of each period all units are scored, higher = keep, by a fifth each of ||x||, ||x|| / values,
    cos(x, v) + 1, |<x, v>| and <x, v>² / 2. The lowest new ones then shrink in every step k of the period of N steps:
    x <- x (N - k) / (N - k + 1), after the optimizer's. Terms are divided by their mean over the group, and then by
    their norm over the network. `scale="network"` is as published, without the first: it compares layers of different
    sizes by the size of their weights.

    Source: HESSO in the OTO authors' released code.
    Differs: `scale` by default (measured: docs/results/decay.md); the target is a budget in costs instead of a share
        of groups.
    """

    name, summary = "hesso", "decay redundant units to zero in periods"

    periods: int = option("how many; the cost falls by equal parts", default=10, least=1)
    start_share: float = option("share of the steps before the first period", default=0.1, least=0, below=1)
    prune_share: float = option(
        "share of the steps by which the last period ends", default=0.6, above=0, most=1
    )
    scale: Literal["group", "network"] = option("what the terms of a score are divided over", default="group")
    min_keep: int = option("units that every group keeps at least", default=1, least=1)

    def rank(self, session: Session[State]) -> list[Tensor]:
        """The scores, (units,) per group."""
        terms: list[list[Tensor]] = [[] for _ in range(5)]
        for number in session.targets:
            x, v = session.own.x[number], direction(session, number, session.own.x)
            length, product = x.norm(dim=1), (x * v).sum(1)
            cos = product / (length * v.norm(dim=1)).clamp_min(1e-30)
            values = (length, length / x.shape[1], cos + 1, product.abs(), product.square() / 2)
            for term, value in zip(terms, values, strict=True):
                term.append(value.cpu())
        if self.scale == "group":
            terms = [relative(session, term, anchored=False) for term in terms]
        norms = [torch.cat(term).norm().clamp_min(1e-30) for term in terms]
        scores = [
            torch.stack([0.2 * term[i] / norm for term, norm in zip(terms, norms, strict=True)]).sum(0)
            for i in range(len(session.targets))
        ]
        return relative(session, scores) if self.scale == "group" else scores

    def gradients(self, session: Session[State]) -> None:
        """Remember x where a period is to start."""
        if session.step + 1 in session.own.when:
            session.own.x = remember(session)

    def advance(self, session: Session[State]) -> None:
        advance_rounds(session, session.own.when, lambda: self.rank(session))

    def check(self) -> None:
        check_shares(self, self.start_share, self.prune_share)

    def prepare(self, session: Session[State]) -> State:
        start, end = round(self.start_share * session.steps), round(self.prune_share * session.steps)
        removal = Decay(steps=max(1, (end - max(1, start) + 1) // self.periods), form="factor")
        session.aim(least=self.min_keep, removal=removal)
        return State(plan_rounds(session, self.periods, self.start_share, self.prune_share, removal.steps))
