"""Gate Decorator: batch norms as gates, pruned by what a first-order look says they are worth."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.engine.decay import Decay
from secateur.engine.session import Session
from secateur.engine.state import UNSAVED
from secateur.engine.training_method import TrainingMethod
from secateur.errors import ModelError, SecateurError
from secateur.settings import option, settings


class GatedBatchNorm2d(nn.BatchNorm2d):
    """y = phi (x^ + b'), with phi in `weight` and b' in `bias`: phi = 0 closes the channel, shift and all."""

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) to the same shape."""
        self._check_input_dim(x)
        momentum = self.momentum or 0.0
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        batch = self.training or self.running_mean is None
        y = F.batch_norm(x, self.running_mean, self.running_var, None, None, batch, momentum, self.eps)
        return (y + self.bias.view(1, -1, 1, 1)) * self.weight.view(1, -1, 1, 1)


def gate_(model: nn.Module) -> None:
    """Turn every affine batch norm of images into a gated one; it computes what it did, if |beta| <= 10 |gamma|."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d and module.affine:
            with torch.no_grad():
                safe = torch.where(module.weight == 0, torch.ones_like(module.weight), module.weight)
                module.bias.copy_((module.bias / safe).clamp(-10, 10))
            module.__class__ = GatedBatchNorm2d


def melt_(model: nn.Module) -> None:
    """Turn gated norms back into ordinary ones, exactly."""
    for norm in ordinary_(model):
        with torch.no_grad():
            norm.bias.mul_(norm.weight)


def ordinary_(model: nn.Module) -> list[nn.BatchNorm2d]:
    """Make gated norms ordinary ones with the same tensors, and say which they were."""
    found = [module for module in model.modules() if type(module) is GatedBatchNorm2d]
    for module in found:
        module.__class__ = nn.BatchNorm2d  # type: ignore[assignment]
    return found  # type: ignore[return-value]


@dataclass
class State:
    """What evolves.

    Attributes:
        phases: what each step is for: "tock", "tick", or "close", a tick's last; plain training follows.
        worth: (units at the start,) per group, the sum of |phi dL/dphi| over the steps of a Tick.
        melted: whether the norms are ordinary ones again.
        look: what the gradients of this step say, with the group's number.
    """

    phases: list[str] = field(metadata=UNSAVED)
    worth: list[Tensor]
    melted: bool = False
    look: list[tuple[int, Tensor]] = field(default_factory=list, metadata=UNSAVED)


@settings
class GateDecorator(TrainingMethod):
    """Tick: freeze convolutions, train the gates, add up |phi dL/dphi|, close the lowest. Tock: train everything.

    Ticks close gates so that the cost falls by equal parts; before every `ticks_per_tock` of them one Tock
    trains all weights, with strength · sum |phi| added to the loss. A Tock takes as many steps as the Ticks that
    follow it. Layers whose outputs are added share their gates' fate: their scores add up. The batch norms of the
    model are gated until the budget is met.

    Source: You et al. 2019, arXiv:1909.08174, and the authors' released code.
    Differs: equal parts of the cost per Tick, instead of a fixed share of the filters until it is met; the
        learning rate is the caller's throughout.
    """

    name, summary = "gate-decorator", "batch norms as gates that close one after another"

    ticks: int = option("how many", default=20, least=1)
    ticks_per_tock: int = option("Ticks between two Tocks", default=10, least=1)
    prune_share: float = option("share of the steps for Ticks and Tocks", default=0.6, above=0, most=1)
    strength: float = option("of the penalty on gates", default=1e-3, least=0)
    keep_share: float = option("share of its units that every group keeps", default=0.1, least=0, below=1)
    removal: Decay = option("how gates close; its parts are always the gate", default=Decay())

    def penalty(self, session: Session[State]) -> Tensor:
        """strength · sum |phi| over the gates that can close, in a Tock."""
        if _phase(session, session.step) != "tock":
            return super().penalty(session)
        groups = [session.graph.groups[number] for number in session.targets]
        scales = sorted({m.tensor for group in groups for m in group.members if m.role == "scale"})
        return self.strength * torch.stack([session.tensors[name].abs().sum() for name in scales]).sum()

    def gradients(self, session: Session[State]) -> None:
        """In a Tick: look at |phi dL/dphi|, and leave convolutions alone."""
        session.own.look = []
        if _phase(session, session.step) not in ("tick", "close"):
            return
        for number in session.targets:
            for member in session.graph.groups[number].members:
                p = session.tensors.get(member.tensor)
                if member.role == "scale" and p is not None and p.grad is not None:
                    product = (member.take(p.detach()) * member.take(p.grad)).abs().sum(1)
                    session.own.look.append((number, product.float().cpu()))
        for module in session.model.modules():
            if isinstance(module, nn.modules.conv._ConvNd):
                module.weight.grad = None

    def advance(self, session: Session[State]) -> None:
        state, pool = session.own, session.pool
        for number, product in state.look:
            state.worth[number][session.kept[number]] += product
        if _phase(session, session.step - 1) == "close":
            left = self.ticks - state.phases[: session.step].count("close")
            session.cut_gone()  # those of the tick before
            pool.restoring = left > 0
            scores = [state.worth[n][session.kept[n]] for n in session.targets]
            session.remove(session.pick(scores, left / self.ticks))
            for worth in state.worth:
                worth.zero_()
            session.note(session.standing())
        if _phase(session, session.step) == "tune" and not state.melted and not pool.busy():
            session.cut_gone()
            _melt(session)

    @contextmanager
    def attached(self, session: Session[State]) -> Iterator[None]:
        """With ordinary norms again if it goes on from a state that had them."""
        for model in (session.model, *session.followers) if session.own.melted else ():
            ordinary_(model)
        yield

    @contextmanager
    def cutting(self, session: Session[State]) -> Iterator[None]:
        """With ordinary norms in place, which the graph was made with: the tensors are the same."""
        norms = [norm for model in (session.model, *session.followers) for norm in ordinary_(model)]
        try:
            yield
        finally:
            for norm in norms:
                norm.__class__ = GatedBatchNorm2d

    def finish(self, session: Session[State]) -> None:
        (ordinary_ if session.own.melted else melt_)(session.model)

    def prepare(self, session: Session[State]) -> State:
        groups = session.whole.groups
        gated = [n for n, g in enumerate(groups) if any(m.role == "scale" for m in g.members)]
        if not gated:
            raise ModelError(
                "GateDecorator: no prunable layer is followed by a batch norm, which it makes gates of"
            )
        least = [max(1, round(self.keep_share * group.units)) for group in groups]
        session.aim(gated, least=least, removal=replace(self.removal, parts="gate"))
        tocks = -(-self.ticks // self.ticks_per_tock)
        each = round(self.prune_share * session.steps) // (self.ticks + tocks * self.ticks_per_tock)
        if each < self.removal.steps:
            raise SecateurError(
                f"GateDecorator: {self.ticks} ticks with {self.ticks_per_tock} per tock leave {each} steps for one, "
                f"removal takes {self.removal.steps}; use fewer ticks, a shorter removal, or more steps"
            )
        gate_(session.model)
        return State(list(self._phases(each)), [torch.zeros(group.units) for group in groups])

    def _phases(self, each: int) -> Iterator[str]:
        """What each step is for, with so many for one Tick."""
        for tick in range(self.ticks):
            if tick % self.ticks_per_tock == 0:
                yield from ["tock"] * (self.ticks_per_tock * each)
            yield from ["tick"] * (each - 1)
            yield "close"


def _phase(session: Session[State], step: int) -> str:
    """What a step is for, counted from 0; "tune" after the last Tick."""
    phases = session.own.phases
    return phases[step] if step < len(phases) else "tune"


def _melt(session: Session[State]) -> None:
    """Back to ordinary batch norms; their shifts start afresh in the optimizer."""
    for model in (session.model, *session.followers):
        melt_(model)
    session.own.melted = True
    assert session.optimizer is not None
    for module in session.model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            for value in session.optimizer.state.get(module.bias, {}).values():
                if isinstance(value, Tensor) and value.ndim:
                    value.zero_()
