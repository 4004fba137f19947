"""OTOv2: half-space projection of penalised units."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from secateur.engine.decay import Decay
from secateur.engine.directions import direction, learning_rates, remember
from secateur.engine.rounds import check_shares, importance, relative
from secateur.engine.session import Session
from secateur.engine.state import PER_GROUP, PER_TARGET, UNSAVED
from secateur.engine.training_method import TrainingMethod
from secateur.errors import BudgetError
from secateur.settings import option, settings


@dataclass
class State:
    """What evolves.

    Attributes:
        begins, ends: the steps after which units are penalised, and by which the budget holds.
        penalised: (units,) bool per group.
        length: ||x|| as the penalty began, (units,) per target group.
        over: whether all that had to leave has been chosen.
        x: the units before the optimizer's step, (units, values) per target group.
    """

    begins: int = field(metadata=UNSAVED)
    ends: int = field(metadata=UNSAVED)
    penalised: list[Tensor] = field(metadata=PER_GROUP)
    length: list[Tensor] = field(metadata=PER_TARGET)
    over: bool = False
    x: dict[int, Tensor] = field(default_factory=dict, metadata=UNSAVED)


@settings
class OTO(TrainingMethod):
    """Dual half-space stochastic projected gradient: penalise the redundant units, project what crosses over.

    With x the weights that make a unit, v the optimizer's direction and alpha its rate. Once, at `start_share`, the
    most redundant units are chosen, as many as the budget asks for and some more. `score` says what redundant is:

        "size":       s = -I / mean(I) over the group, with DepGraph's importance I
        "published":  s = cos(x, v) / ||cos|| / 2 + m / ||m|| / 2 with m = 1 / (||x|| / values + 1e-6), norms over
                      the network

    They are penalised from then on, in every step:

        lambda_u = lambda;  if <x, v> < 0: low = -<x, v> / ||x||, up = -||v||² ||x|| / <x, v>,
                   lambda_u = clip(amplify · low, lambda, lambda · most), or (low + up) / 2 where that is >= up
        x^ = x - alpha v - alpha lambda_u x / ||x||
        x^ -> 0 where <x^, x> < half_space · ||x||²

    until the budget is met; then everything that is left trains on. Without `strength` lambda is, for each unit,
    ||x|| at the start / (alpha · steps of the phase), which brings it to zero by then, however short the training; the
    published number needs some ten thousand steps. If projection has not got there by `prune_share`,
    the shortest penalised units leave.

    Source: Chen et al. 2023 (OTOv2), arXiv:2303.06862, and the authors' released code.
    Differs: `score` and `strength` by default (measured: docs/results/decay.md); the target is a budget, not a share of
        zero groups, and is met exactly: where more units cross over than it needs, those that are furthest over go.
    """

    name, summary = "oto", "penalise redundant units and project them to zero (OTOv2)"

    start_share: float = option(
        "share of the steps before units are penalised", default=0.1, least=0, below=1
    )
    prune_share: float = option("share of the steps by which the budget holds", default=0.6, above=0, most=1)
    tolerance: float = option("share of the excess cost that is penalised beyond it", default=0.05, least=0)
    score: Literal["size", "published"] = option("which units are redundant", default="size")
    strength: float | None = option(
        "lambda; published are 1e-3 for SGD, 1e-2 for Adam; None: as the phase is long", default=None, least=0
    )
    amplify: float = option("of the pull on units that grow; 2 for SGD, 20 for Adam", default=2.0, least=0)
    most: float = option("highest lambda, in lambdas; 10 for SGD, 1000 for Adam", default=10.0, least=0)
    half_space: float = option("higher projects sooner", default=0.9, least=0, below=1)
    removal: Decay = option("how projected units go; at once is the host", default=Decay())
    min_keep: int = option("units that every group keeps at least", default=1, least=1)

    def redundancy(self, session: Session[State]) -> list[Tensor]:
        """s of every unit, (units,) per group; higher = more redundant."""
        if self.score == "size":
            found = [importance(session, number, session.tensors).cpu() for number in session.targets]
            return [-s for s in relative(session, found)]
        cos, magnitude = [], []
        for number in session.targets:
            x, v = session.own.x[number], direction(session, number, session.own.x)
            length = x.norm(dim=1)
            cos.append((x * v).sum(1) / (length * v.norm(dim=1)).clamp_min(1e-30))
            magnitude.append(1 / (length / x.shape[1] + 1e-6))
        scale = [torch.cat(parts).norm().clamp_min(1e-30) for parts in (cos, magnitude)]
        return [(c / scale[0] + m / scale[1]) / 2 for c, m in zip(cos, magnitude, strict=True)]

    def lambdas(self, x: Tensor, v: Tensor, strength: Tensor) -> Tensor:
        """lambda_u of every unit, (units,), from its lambda."""
        product, length = (x * v).sum(1), x.norm(dim=1).clamp_min(1e-30)
        low = -product / length
        up = torch.where(product < 0, -v.square().sum(1) * length / product, torch.inf)
        raised = (self.amplify * low).clamp(strength, strength * self.most)
        raised = torch.where(raised >= up, (low + up) / 2, raised)
        return torch.where(product < 0, raised, strength)

    def gradients(self, session: Session[State]) -> None:
        """Remember x, from which the optimizer's direction follows."""
        if not session.own.over:
            session.own.x = remember(session)

    def advance(self, session: Session[State]) -> None:
        state, pool = session.own, session.pool
        if not state.over and session.step >= state.begins:
            if session.step == state.begins:
                self._penalise(session)
            self._project(session)
            if session.step >= state.ends and not self.met(session):
                pool.restoring = False
                session.remove(session.pick(self._shortest(session), 0.0))
            may_return = self.removal.restore is not None and pool.busy()
            if session.step >= state.ends or (self.met(session) and not may_return):
                pool.restoring = False
                state.over = True
                session.note(session.standing())
        if state.over and not pool.busy():
            session.cut_gone()

    def met(self, session: Session[State]) -> bool:
        """Whether what stands fits the budget."""
        standing = session.standing()
        return all(session.cost.of(name, standing) <= limit for name, limit in session.limits.items())

    def _penalise(self, session: Session[State]) -> None:
        """Choose the units to penalise."""
        scores = [-s for s in self.redundancy(session)]
        try:
            chosen = session.pick(scores, -self.tolerance)
        except BudgetError:  # so near to the least that there is no room beyond it
            chosen = session.pick(scores, 0.0)
        for number, mask in zip(session.targets, chosen, strict=True):
            session.own.penalised[number] = mask
        session.own.length = [session.own.x[number].norm(dim=1) for number in session.targets]

    def _project(self, session: Session[State]) -> None:
        """The penalty's step, and which units cross over."""
        if self.met(session):
            return
        pool, across, depth, lengths = session.pool, [], [], {}
        steps = max(1, session.own.ends - session.own.begins)
        for number, length in zip(session.targets, session.own.length, strict=True):
            pushed = session.own.penalised[number] & ~pool.leaving(number)
            x, v = session.own.x[number], direction(session, number, session.own.x)
            lengths[number] = x.norm(dim=1)
            rates = learning_rates(session, number)
            strength = length / (rates.max() * steps).clamp_min(1e-30)
            if self.strength is not None:
                strength = torch.full_like(strength, self.strength)
            pull = torch.where(pushed.to(x.device), self.lambdas(x, v, strength), 0.0)
            pool.add_(number, -rates * (pull / lengths[number].clamp_min(1e-30))[:, None] * x)
            after = pool.vectors(number)
            share = (after * x).sum(1) / x.square().sum(1).clamp_min(1e-30)
            over = (share < self.half_space).cpu() & pushed & pool.free(number, session.step)
            across.append(over)
            depth.append(torch.where(over, share.float().cpu(), torch.finfo(torch.float32).max / 2))
        wanted = session.pick(depth, 0.0)
        left = []
        for number, crossed, away, score in zip(session.targets, across, wanted, depth, strict=True):
            leaving = pool.leaving(number)
            stays = session.filled(
                number, ~(leaving | crossed & away), score.masked_fill(leaving, -torch.inf)
            )
            left.append(~stays & ~leaving)
        session.remove(left, lengths)

    def _shortest(self, session: Session[State]) -> list[Tensor]:
        """Length per value of every unit, relative to its group; the penalised come before all others."""
        found = []
        for number in session.targets:
            length = session.pool.vectors(number).norm(dim=1).float().cpu()
            found.append(length / length.mean().clamp_min(1e-30) + 1e6 * ~session.own.penalised[number])
        return found

    def check(self) -> None:
        check_shares(self, self.start_share, self.prune_share)

    def prepare(self, session: Session[State]) -> State:
        session.aim(least=self.min_keep, removal=self.removal)
        begins = max(1, round(self.start_share * session.steps))
        ends = max(begins, round(self.prune_share * session.steps) - self.removal.steps + 1)
        groups = session.whole.groups
        return State(
            begins,
            ends,
            penalised=[torch.zeros(group.units, dtype=torch.bool) for group in groups],
            length=[torch.zeros(groups[number].units) for number in session.targets],
        )
