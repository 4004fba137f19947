"""PAAM: small attention networks score filters from their weights, all layers at once, while training.

Source: reconstruction of Babaiee, Liebenwein, Hasani, Rus, Grosu 2022, "Pruning by Active Attention
Manipulation", arXiv:2210.11114, and of its earlier form SbF-Pruner, arXiv:2204.07412. What the papers state:
attention over the filters' weights gives analog scores that multiply the layer's own feature maps; an additive
term in the scores joins the task loss; all layers train at once, from scratch, without budgets per layer;
scores start at 1 and are positive through a "leaky exponential"; a global budget on the cumulative scores
selects filters. Formulas and settings are our choice, and options.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.engine.gates import Gates, gateable, last_layers, norms_after, own_groups
from secateur.engine.session import Session
from secateur.engine.state import UNSAVED
from secateur.engine.training_method import TrainingMethod
from secateur.errors import SecateurError
from secateur.settings import option, settings


class Activation(torch.autograd.Function):
    """The leaky exponential: exp(x) up to 0, then 1, with a slope everywhere.

    Positive and at most 1; 1 at x = 0, where scores start; its gradient is never 0 (`leak` above 0), so that
    no score gets stuck. Below -20 it is constant, with the slope there.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, leak: float) -> Tensor:
        y = x.clamp(-20, 0).exp()
        ctx.save_for_backward(torch.where(x > 0, leak, y))
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return gradients[0] * slope, None


class Scorer(nn.Module):
    """One number per filter from the weights of all filters of a group; 0 for all at the start.

    With F the filters as rows, each whitened (so that the size of the weights, which weight decay moves,
    says nothing):

        attention:  C = softmax(F Wq (F Wk)' / sqrt(h)) F Wv,  x = C w + b
        additive:   x_i = mean_j v' tanh(Wq f_i + Wk f_j)
        dot:        x_i = a · mean_j (Wq f_i)' (Wk f_j) / sqrt(h) + b
        linear:     x = F w + b           without attention, as a control
        free:       x learned directly    without the weights, as a control

    Args:
        filters: how many.
        features: weights of each.
        kind: which of these.
        hidden: h.
    """

    def __init__(self, filters: int, features: int, kind: str, hidden: int) -> None:
        super().__init__()
        self.kind, self.scale = kind, hidden**-0.5
        self.shift = nn.Parameter(torch.zeros(filters if kind == "free" else 1))
        if kind in ("attention", "additive", "dot"):
            self.query = nn.Linear(features, hidden, bias=False)
            self.key = nn.Linear(features, hidden, bias=False)
        if kind == "attention":
            self.value = nn.Linear(features, hidden, bias=False)
        sizes = {"attention": hidden, "additive": hidden, "dot": 1, "linear": features}
        if kind in sizes:
            self.out = nn.Parameter(torch.zeros(sizes[kind]))

    def forward(self, filters: Tensor) -> Tensor:
        """(filters, features) to (filters,)."""
        f = F.layer_norm(filters, filters.shape[1:])
        if self.kind == "free":
            return self.shift
        if self.kind == "linear":
            linear: Tensor = f @ self.out / f.shape[1] ** 0.5
            return linear + self.shift
        q, k = self.query(f), self.key(f)
        if self.kind == "attention":
            mixed: Tensor = torch.softmax(q @ k.T * self.scale, dim=1) @ self.value(f) @ self.out
        elif self.kind == "additive":
            mixed = (torch.tanh(q[:, None] + k[None]) @ self.out).mean(1)
        else:
            mixed = self.out * (q @ k.mean(0)) * self.scale
        return mixed + self.shift


@dataclass
class State:
    """What evolves.

    Attributes:
        scorers: a `Scorer` per target group.
        optimizer: of the scorers.
        selected: (units at the start,) bool per target group.
        done: whether the scores are folded in and the rest is cut out.
        norms: layer -> the batch norm behind it.
        still: norms whose statistics rest during this pass, with their momentum.
    """

    scorers: nn.ModuleList
    optimizer: torch.optim.Optimizer
    selected: list[Tensor]
    norms: dict[str, str] = field(metadata=UNSAVED)
    done: bool = False
    still: list[tuple[nn.modules.batchnorm._BatchNorm, float | None]] = field(
        default_factory=list, metadata=UNSAVED
    )


@settings
class PAAM(TrainingMethod):
    """Prune while training from scratch, by scores that attention networks give to filters.

    With x the output of a group's `Scorer` and phi the leaky exponential:

        S = phi(x)                         (units,), 1 at the start
        A' = S · A                         on the group's feature maps, after batch norm
        scorer loss = task + weight · mean(S over all groups)                    `cost="mean"`
                    = task + weight · max(0, cost(n) / dense - target(step))     `cost="widths"`
                      n = (sum S)² / sum S² per group: over how many units its scores are spread
                      target = keep + (1 - keep) · (1 - step / ramp)^3

    "joint": every step trains scorers and weights; at `ramp_share` of the steps the filters with the highest scores of
    the whole network are selected, the others cut out, scores folded into batch norm, and the scorers dropped.
    "alternate": every `scorer_every`-th step trains the scorers only, with all filters present and analog
    scores; the other steps train the weights only, on the filters selected so far, times their scores.
    Every `select_every` steps filters are selected, to a budget that tightens from the dense model to the target over
    `ramp_share` of the steps; unselected ones may return until `return_share` of the steps, when they are cut out.

    The budget bounds MACs, parameters, or both; without one, `mass` decides.

    `streams`: one score vector for all layers that add to one.
    `binary`, `scorer_every`: in the alternating regime only.
    The loss hardly sees a common factor of a group's scores where a batch norm comes after the layer that reads the
    group. The mean score is the papers' form, and only shrinks that factor: with weight 1, all scores of a group fall
    to 0 together and say nothing any more. The number of units that scores are spread over does not see the factor
    either; scores are then compared relative to their group's root mean square. Where `mass` decides, the cost is the
    mean.

    Raises:
        BudgetError: the budget cannot be reached.
    Differs: see the source; results are "PAAM-style", not the paper's.
    """

    name, summary = "paam", "attention networks score the filters of all layers at once"
    needs_budget: ClassVar[bool] = False

    regime: Literal["alternate", "joint"] = option(
        "whether scorers and weights train in turn, or together", default="joint"
    )
    scorer: Literal["attention", "additive", "dot", "linear", "free"] = option(
        "what scores; linear and free are controls", default="attention"
    )
    hidden: int = option("width of the attention", default=32, least=1)
    leak: float = option("slope of phi above 0", default=0.01, above=0)
    cost: Literal["mean", "widths"] = option("what scores are to keep low", default="mean")
    weight: float | None = option(
        "of the cost in the scorers' loss; None: 4 for widths, 0.01 for the mean", default=None, least=0
    )
    lr: float = option("of the scorers (Adam, no weight decay)", default=1e-3, above=0)
    scorer_every: int = option("steps from one that trains scorers to the next", default=5, least=2)
    select_every: int | None = option("steps between selections; None: 1 % of all", default=None, least=1)
    ramp_share: float = option(
        "share of the steps in which the budget tightens", default=0.5, above=0, most=1
    )
    return_share: float = option("share of the steps after which none returns", default=0.6, above=0, most=1)
    mass: float | None = option(
        "share of all scores to keep, in place of a budget",
        default=None,
        above=0,
        below=1,
    )
    streams: bool = option("also score residual streams", default=False)
    binary: bool = option("multiply by 0 or 1, not by scores, while weights train", default=False)
    least: int = option("units that every group keeps at least", default=2, least=1)
    seed: int = option("of the scorers' initial weights", default=0)

    # --- scores --------------------------------------------------------------------------------------------

    def score(self, session: Session[State]) -> list[Tensor]:
        """S of every target group, (units,), with a gradient to the scorers and to nothing else."""
        return [Activation.apply(x, self.leak) for x in _raw(session)]

    def penalty(self, session: Session[State]) -> Tensor:
        """weight · cost, in the steps that train scorers."""
        if not self._scores_at(session, session.step):
            return super().penalty(session)
        scores = session.passed or self.score(session)
        if not self._by_widths:
            return (0.01 if self.weight is None else self.weight) * torch.cat(scores).mean()
        spread = [s.sum().square() / s.square().sum() for s in scores]
        total = torch.zeros((), dtype=torch.float64)
        for share, goal in session.soft_costs(spread, self._ramp(session)):
            total = total + (share - goal).clamp_min(0)
        return (4.0 if self.weight is None else self.weight) * total.to(scores[0])

    def _ramp(self, session: Session[State]) -> float:
        """What of the way from the dense model to the budget is still to go."""
        return session.ramp(max(1, round(self.ramp_share * session.steps)))

    def measure_overhead(self, session: Session[State]) -> dict[str, float]:
        """What scoring costs while training: parameters, their bytes with Adam's, milliseconds per scoring."""
        count = sum(p.numel() for p in session.parameters())
        times = []
        for _ in range(5):
            started = time.perf_counter()
            torch.autograd.backward(torch.cat(self.score(session)).sum())
            times.append(time.perf_counter() - started)
        session.own.optimizer.zero_grad()
        return {"params": count, "bytes": 16 * count, "ms": 1000 * sorted(times)[2]}

    def _scores_at(self, session: Session[State], step: int) -> bool:
        """Whether a step, counted from 0, trains the scorers."""
        every = self.scorer_every
        return not session.own.done and (not self._alternates or step % every == every - 1)

    @property
    def _by_widths(self) -> bool:
        return self.cost == "widths" and self.mass is None

    @property
    def _alternates(self) -> bool:
        return self.regime == "alternate"

    # --- the training --------------------------------------------------------------------------------------

    @contextmanager
    def attached(self, session: Session[State]) -> Iterator[None]:
        """Scores behind the last layer of each group, and selection behind all of them."""
        if session.own.done:
            yield
            return
        graph, targets, norms = session.graph, session.targets, session.own.norms
        analog = Gates(session.model, graph, targets, norms, only=last_layers(graph, targets))
        with session.gated(analog, Gates(session.model, graph, targets, norms)):
            handles = [
                session.model.register_forward_pre_hook(lambda *_: self.before_forward(session)),
                session.model.register_forward_hook(lambda *_: self._after_forward(session)),
            ]
            self._refresh(session)
            yield
            for handle in handles:
                handle.remove()

    def gradients(self, session: Session[State]) -> None:
        """In a scorers' step of the alternating regime, weights have none."""
        if self._alternates and self._scores_at(session, session.step):
            for p in session.model.parameters():
                p.grad = None  # the optimizer leaves what has no gradient alone, momentum and all

    def advance(self, session: Session[State]) -> None:
        if session.own.done:
            return
        if self._scores_at(session, session.step - 1):
            session.own.optimizer.step()
        every = self.select_every or max(1, session.steps // 100)
        end = self.return_share if self._alternates else self.ramp_share
        last = session.step >= max(1, round(end * session.steps))
        if last or (self._alternates and session.step % every == 0):
            self.select(session, last)
        elif session.step % every == 0:
            self._note(session)
        self._refresh(session)

    def before_forward(self, session: Session[State]) -> None:
        """Give the gates what the coming pass needs, and hold statistics still while scorers train."""
        self._refresh(session)
        if session.own.still:
            return  # a pass within a pass, of a module whose forward calls itself
        if self._alternates and self._scores_at(session, session.step) and session.model.training:
            for module in session.model.modules():  # statistics of the whole network, not of what weights see
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
                    session.own.still.append((module, module.momentum))
                    module.momentum = 0.0

    def _after_forward(self, session: Session[State]) -> None:
        for module, momentum in session.own.still:
            module.momentum = momentum
        session.own.still.clear()

    def _refresh(self, session: Session[State]) -> None:
        """Give the gates what the coming pass needs."""
        state = session.own
        if state.done or not session.gates:
            return
        analog, hard = session.gates
        scores = self.score(session)
        ones = [torch.ones_like(s) for s in scores]
        if self._scores_at(session, session.step) and session.model.training:
            session.passed = scores
            analog.set(scores)
            hard.set(ones)
            return
        analog.set(ones if self.binary and self._alternates else [s.detach() for s in scores])
        hard.set([mask.to(s) for mask, s in zip(state.selected, scores, strict=True)])

    def select(self, session: Session[State], last: bool) -> None:
        """Select by the scores as they are now; at last, fold the scores in and cut the rest out."""
        state = session.own
        with torch.no_grad():
            raw, scores = self.rank(session), self.score(session)
        ramp = 0.0 if last else self._ramp(session)
        if self.mass is not None:
            keep = self._select_mass(session, raw, scores, self.mass + (1 - self.mass) * ramp)
        else:
            keep = session.choose(raw, ramp)
        state.selected = [keep[number] for number in session.targets]
        for number, score in zip(session.targets, scores, strict=True):
            session.scores[number] = score.cpu()
        self._note(session)
        if last:
            if not (self.binary and self._alternates):
                analog, _ = session.gates
                for model in (session.model, *session.followers):
                    analog.fold_(model, scores)
            state.done = True
            session.renew()  # without gates, even if nothing goes
            session.cut(keep)

    def rank(self, session: Session[State]) -> list[Tensor]:
        """What units are compared by, (units,) per target group: x, which tells saturated scores apart."""
        raw = _raw(session)
        if not self._by_widths:
            return raw
        return [x - s.square().mean().sqrt().log() for x, s in zip(raw, self.score(session), strict=True)]

    def _select_mass(
        self, session: Session[State], raw: Sequence[Tensor], scores: Sequence[Tensor], share: float
    ) -> list[Tensor]:
        """The fewest units whose scores sum up to a share of all scores."""
        pooled, rank = torch.cat(list(scores)).cpu(), torch.cat(list(raw)).cpu()
        order = rank.argsort(descending=True, stable=True)
        sums = pooled[order].double().cumsum(0)
        count = int((sums < share * sums[-1] - 1e-12).sum()) + 1
        chosen = torch.zeros(len(pooled), dtype=torch.bool)
        chosen[order[:count]] = True
        masks = [torch.ones(len(units), dtype=torch.bool) for units in session.kept]
        parts = torch.split(chosen, [len(s) for s in scores])
        for number, part, x in zip(session.targets, parts, raw, strict=True):
            masks[number] = part.clone()
            masks[number][x.cpu().topk(min(session.least[number], len(x))).indices] = True
            masks[number] = session.filled(number, masks[number], x)
        return masks

    def _note(self, session: Session[State]) -> None:
        counts = [len(units) for units in session.kept]
        for number, mask in zip(session.targets, session.own.selected, strict=True):
            counts[number] = int(mask.sum())
        with torch.no_grad():
            scores = self.score(session)
        names = [session.whole.groups[number].name for number in session.targets]
        rounded = [[round(v, 4) for v in s.tolist()] for s in scores]
        session.note(
            counts,
            score=torch.cat(scores).mean().item(),
            scores=dict(zip(names, rounded, strict=True)),
        )

    # --- the start -----------------------------------------------------------------------------------------

    def check(self) -> None:
        if self.ramp_share > self.return_share and self._alternates:
            raise SecateurError(
                "PAAM: ramp_share is above return_share; the budget must be reached before the cut"
            )

    def prepare(self, session: Session[State]) -> State:
        if (session.budget is None) == (self.mass is None):
            raise SecateurError("PAAM: give either a budget or mass, the share of the scores to keep")
        groups = session.whole.groups
        able = range(len(groups)) if self.streams else own_groups(session.whole, session.model)
        targets = [
            n
            for n in able
            if any(m.role == "out" for m in groups[n].members) and gateable(groups[n], session.model)
        ]
        session.aim(targets, least=self.least)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            scorers = nn.ModuleList(
                Scorer(groups[n].units, _filters(session, n).shape[1], self.scorer, self.hidden)
                for n in targets
            )
        return State(
            scorers=scorers,
            optimizer=torch.optim.Adam(scorers.parameters(), lr=self.lr),
            selected=[torch.ones(groups[n].units, dtype=torch.bool) for n in targets],
            norms=norms_after(session.model, session.inputs),
        )


def _filters(session: Session[State], number: int) -> Tensor:
    """The filters of a group's producers as rows, (units, weights), float32, without gradient."""
    members = [m for m in session.graph.groups[number].members if m.role == "out"]
    return torch.cat([m.take(session.tensors[m.tensor].detach()).float() for m in members], 1)


def _raw(session: Session[State]) -> list[Tensor]:
    """x of every target group, (units,)."""
    pairs = zip(session.own.scorers, session.targets, strict=True)
    return [scorer(_filters(session, number)) for scorer, number in pairs]
