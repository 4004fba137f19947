"""DepGraph: group importance, group sparse training, and progressive cutting."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import Optimizer

from secateur.engine.decay import Decay
from secateur.engine.rounds import advance_rounds, check_shares, importance, plan_rounds, relative
from secateur.engine.session import Session
from secateur.engine.state import UNSAVED
from secateur.engine.training_method import TrainingMethod
from secateur.settings import option, settings


@dataclass
class State:
    """What the method goes by: the steps of its rounds, and the last step of the sparse phase.

    Attributes:
        when: the steps after which units are chosen.
        sparse_steps: the last step of the sparse phase.
        decays: the optimizer's weight decay per group of parameters, which the sparse phase takes away.
    """

    when: list[int] = field(metadata=UNSAVED)
    sparse_steps: int = field(metadata=UNSAVED)
    decays: list[float] | None = None


@settings
class DepGraph(TrainingMethod):
    """Push whole groups towards zero, then cut the lowest, the whole network ranked together.

    In the sparse phase, before each optimizer step, for every group with importances I:

        imp = sqrt(I),  gamma_u = 2^(4 (max imp - imp_u) / (max imp - min imp))      from 1 to 16
        grad(w) += strength · gamma_u · w        for the rows, columns and norm scales of unit u

    and the optimizer's weight decay is off. Then units leave in `rounds`; within a round in `pieces` small
    cuts, each ranked on what the ones before it left.

    Source: Fang et al. 2023, arXiv:2301.12900, sec. 3.2 and 3.3; settings from the authors' code.
    Differs: the phases share one training of given length; equal importances within a group give gamma = 1.
    """

    name, summary = "depgraph", "push whole groups towards zero, then cut the lowest"

    sparse_share: float = option(
        "share of the steps with the sparse phase; 0: none", default=0.0, least=0, below=1
    )
    strength: float = option("of the penalty", default=5e-4, least=0)
    rounds: int = option("how many; 1 cuts at once, as the paper does", default=1, least=1)
    prune_share: float | None = option(
        "share of the steps by which the last are gone; None: at once, or in rounds over half of what follows the "
        "sparse phase",
        default=None,
        above=0,
        most=1,
    )
    pieces: int = option("small cuts in a round", default=20, least=1)
    removal: Decay = option("how units go; must fit between two rounds", default=Decay())
    min_keep: int = option("units that every group keeps at least", default=1, least=1)

    def gammas(self, session: Session[State], number: int) -> Tensor:
        """How much harder each unit of a group is pushed, (units,), from 1 to 16."""
        size = importance(session, number, session.tensors).sqrt()
        span = size.max() - size.min()
        return torch.exp2(4 * (size.max() - size) / span) if span > 1e-12 else torch.ones_like(size)

    def gradients(self, session: Session[State]) -> None:
        """grad(w) += strength · gamma · w, in the sparse phase."""
        for number in session.targets if session.step < session.own.sparse_steps else ():
            gamma = self.strength * self.gammas(session, number)
            for member in session.graph.groups[number].members:
                p = session.tensors.get(member.tensor)
                if (
                    p is None
                    or p.grad is None
                    or member.role not in ("out", "depthwise", "scale", "in", "recurrent")
                ):
                    continue
                along = member.spread(gamma.to(p), p.shape[member.dim], 0.0)
                shape = [1] * p.ndim
                shape[member.dim] = -1
                p.grad.add_(along.view(shape) * p.detach())

    def advance(self, session: Session[State]) -> None:
        if session.step == session.own.sparse_steps:
            session.renew()  # the optimizer's own decay is back
        tensors = session.tensors
        advance_rounds(
            session,
            session.own.when,
            lambda: self.rank(session, tensors),
            lambda _, slack: self.pick(session, slack),
        )

    def rank(self, session: Session[State], tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """I relative to its group's mean, (units,) per group."""
        return relative(session, [importance(session, n, tensors).cpu() for n in session.targets])

    def pick(self, session: Session[State], slack: float) -> list[Tensor]:
        """As `Session.pick`, in small cuts: each is ranked on the weights that the cuts before it would leave."""
        chosen = [torch.zeros(len(session.kept[n]), dtype=torch.bool) for n in session.targets]
        dense, limits = {n: session.dense.of(n) for n in session.limits}, session.limits
        standing = session.standing()
        start = max(session.cost.of(n, standing) / dense[n] for n in limits)
        end = max((limit + slack * (dense[n] - limit)) / dense[n] for n, limit in limits.items())
        if start <= end:
            return chosen
        for piece in range(1, self.pieces + 1):
            share = piece / self.pieces
            goal = (1 - share) * start + share * end
            bound = max((goal * dense[n] - limit) / (dense[n] - limit) for n, limit in limits.items())
            ranked = self.rank(session, _without(session, chosen))
            for score, mask in zip(ranked, chosen, strict=True):
                score[mask] = -torch.inf
            more = session.pick(ranked, slack if piece == self.pieces else bound)
            chosen = [a | b for a, b in zip(chosen, more, strict=True)]
        return chosen

    @contextmanager
    def attached(self, session: Session[State]) -> Iterator[None]:
        """Without the optimizer's weight decay in the sparse phase."""
        state, optimizer = session.own, session.optimizer
        assert optimizer is not None
        if session.step >= state.sparse_steps:
            yield
            return
        if state.decays is None:  # a checkpoint of the optimizer may hold those of the sparse phase
            state.decays = [group.get("weight_decay", 0.0) for group in optimizer.param_groups]
        _set_decays(optimizer, [0.0] * len(state.decays))
        yield
        _set_decays(optimizer, state.decays)

    def check(self) -> None:
        if self.prune_share is not None:
            check_shares(self, self.sparse_share, self.prune_share, "sparse_share")

    def prepare(self, session: Session[State]) -> State:
        session.aim(least=self.min_keep, removal=self.removal)
        end = self.prune_share
        if end is None and self.rounds > 1:
            end = (1 + self.sparse_share) / 2
        elif end is None:
            first = max(1, round(self.sparse_share * session.steps))
            end = min(1.0, (first + self.removal.steps - 1) / session.steps)
        when = plan_rounds(session, self.rounds, self.sparse_share, end, self.removal.steps)
        return State(when, round(self.sparse_share * session.steps))


def _set_decays(optimizer: Optimizer, decays: Sequence[float]) -> None:
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        if "weight_decay" in group:
            group["weight_decay"] = decay


def _without(session: Session[State], chosen: Sequence[Tensor]) -> dict[str, Tensor]:
    """The parameters with zeros where the chosen units are."""
    found = {name: p.detach().clone() for name, p in session.tensors.items()}
    for number, mask in zip(session.targets, chosen, strict=True):
        for member in session.graph.groups[number].members:
            if member.tensor in found and mask.any():
                member.fill_(found[member.tensor], mask, 0.0)
    return found
