"""PAAM: small attention networks score filters from their weights, all layers at once, while training.

Source: reconstruction of Babaiee, Liebenwein, Hasani, Rus, Grosu 2022, "Pruning by Active Attention
Manipulation", arXiv:2210.11114, and of its earlier form SbF-Pruner, arXiv:2204.07412. What the papers state:
attention over the filters' weights gives analog scores that multiply the layer's own feature maps; an additive
term in the scores joins the task loss; all layers train at once, from scratch, without budgets per layer;
scores start at 1 and are positive through a "leaky exponential"; a global budget on the cumulative scores
selects filters. Formulas and settings are our choice, and options.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.cost import Budget
from secateur.engine.gates import Gates, last_layers, norms_after
from secateur.engine.options import Numbers, check_options
from secateur.engine.pruned import Pruned
from secateur.engine.structured import StructuredMethod, own_groups
from secateur.errors import SecateurError
from secateur.graph import Inputs


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


class PAAM(StructuredMethod):
    """Prune while training from scratch, by scores that attention networks give to filters.

    With x the output of a group's `Scorer` and phi the leaky exponential:

        S = phi(x)                         (units,), 1 at the start
        A' = S · A                         on the group's feature maps, after batch norm
        scorer loss = task + weight · mean(S over all groups)

    "alternate": every `scorer_every`-th step trains the scorers only, with all filters present and analog
    scores; the other steps train the weights only, on the filters selected so far, times their scores.
    Every `select_every` steps the filters with the highest scores of the whole network are selected, to a
    budget that tightens from the dense model to the target over `ramp_share` of the steps; unselected ones
    may return until `return_share` of the steps, when they are cut out, scores are folded into batch norm,
    and the scorers are dropped. "joint": every step trains both; selection, fold and cut once, at
    `ramp_share`.

    Args:
        model: freshly initialised; pruned in place.
        inputs: example inputs.
        budget: in MACs, parameters, or both. None: `mass` decides.
        steps: optimizer steps of the whole training.
        regime: "alternate" or "joint".
        scorer: "attention", "additive", "dot", or the controls "linear" and "free"; see `Scorer`.
        hidden: width of the attention.
        leak: slope of phi above 0.
        weight: of the mean score in the scorer's loss; the same for all layers. Small, because the loss hardly sees a
            common factor of a group's scores where a batch norm comes after the layer that reads the group: with
            weight 1, all scores of a group fall to 0 together and say nothing any more. At the right weight the mean
            score is about the share that stays when selection ends.
        lr: of the scorers (Adam, no weight decay).
        scorer_every: in the alternating regime; the default trains scorers in a fifth of the steps.
        select_every: steps between selections; None: a hundredth of the training.
        ramp_share, return_share: shares of the steps.
        mass: share of the summed scores that the selected filters hold, above 0 and below 1.
        streams: also score residual streams, with one score vector for all layers that add to one.
        binary: multiply by 0 or 1 instead of the score while weights train (alternating regime only).
        least: units that every group keeps at least.
        seed: of the scorers' initial weights.
        freeze: module names or shell patterns that no cut may touch.
    Raises:
        BudgetError: the budget cannot be reached.
    Differs: see the source; results are "PAAM-style", not the paper's.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        *,
        budget: Budget | None = None,
        steps: int,
        regime: Literal["alternate", "joint"] = "alternate",
        scorer: Literal["attention", "additive", "dot", "linear", "free"] = "attention",
        hidden: int = 32,
        leak: float = 0.01,
        weight: float = 0.01,
        lr: float = 1e-3,
        scorer_every: int = 5,
        select_every: int | None = None,
        ramp_share: float = 0.5,
        return_share: float = 0.6,
        mass: float | None = None,
        streams: bool = False,
        binary: bool = False,
        least: int = 2,
        seed: int = 0,
        freeze: Sequence[str] = (),
    ) -> None:
        self._options: dict[str, Any] = {
            "regime": regime,
            "scorer": scorer,
            "hidden": hidden,
            "leak": leak,
            "weight": weight,
            "lr": lr,
            "scorer_every": scorer_every,
            "select_every": select_every,
            "ramp_share": ramp_share,
            "return_share": return_share,
            "mass": mass,
            "streams": streams,
            "binary": binary,
            "least": least,
            "seed": seed,
        }
        check_options("PAAM", self._options, _NAMES, _NUMBERS)
        if (
            self._options["ramp_share"] > self._options["return_share"]
            and self._options["regime"] == "alternate"
        ):
            raise SecateurError(
                "PAAM: ramp_share is above return_share; the budget must be reached before the cut"
            )
        if (budget is None) == (mass is None):
            raise SecateurError("PAAM: give either a budget or mass, the share of the scores to keep")
        super().__init__(model, inputs, budget=budget, steps=steps, freeze=freeze)
        groups = self.whole.groups
        targets = list(range(len(groups))) if streams else own_groups(self.whole)
        makers = [[m for m in groups[n].members if m.role == "out"] for n in targets]
        targets = [n for n, found in zip(targets, makers, strict=True) if found]
        self.aim(targets, [min(least, group.units) for group in groups])
        self._norms = norms_after(model, inputs)
        self._tensors = dict(model.named_parameters())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.scorers = nn.ModuleList(
                Scorer(groups[n].units, self._filters(n).shape[1], scorer, hidden) for n in targets
            )
        self._optimizer = torch.optim.Adam(self.scorers.parameters(), lr=lr)
        self._selected = [torch.ones(groups[n].units, dtype=torch.bool) for n in targets]
        self._scores: list[Tensor] = []
        self._forward_hooks: list[Any] = []
        self._still: list[tuple[nn.modules.batchnorm._BatchNorm, float | None]] = []
        self.done = False

    # --- scores --------------------------------------------------------------------------------------------

    def score(self) -> list[Tensor]:
        """S of every target group, (units,), with a gradient to the scorers and to nothing else."""
        leak = self._options["leak"]
        return [Activation.apply(x, leak) for x in self._raw()]

    def overhead(self) -> dict[str, float]:
        """What scoring costs while training: parameters, their bytes with Adam's, milliseconds per scoring."""
        count = sum(p.numel() for p in self.scorers.parameters())
        times = []
        for _ in range(5):
            started = time.perf_counter()
            sum(s.sum() for s in self.score()).backward()  # type: ignore[union-attr]
            times.append(time.perf_counter() - started)
        self._optimizer.zero_grad()
        return {"params": count, "bytes": 16 * count, "ms": 1000 * sorted(times)[2]}

    def _filters(self, number: int) -> Tensor:
        members = [m for m in self.graph.groups[number].members if m.role == "out"]
        return torch.cat([m.take(self._tensors[m.tensor].detach()).float() for m in members], 1)

    def _raw(self) -> list[Tensor]:
        return [
            scorer(self._filters(number)) for scorer, number in zip(self.scorers, self.targets, strict=True)
        ]

    def _scoring(self) -> bool:
        """Whether the coming step trains the scorers."""
        if self.done:
            return False
        every: int = self._options["scorer_every"]
        return not self._alternates() or self.step % every == every - 1

    def _alternates(self) -> bool:
        return bool(self._options["regime"] == "alternate")

    # --- the course of a training --------------------------------------------------------------------------

    def install(self) -> None:
        self.scorers.to(next(self.model.parameters()).device)
        super().install()
        self._forward_hooks = [
            self.model.register_forward_pre_hook(lambda *_: self._before_forward()),
            self.model.register_forward_hook(lambda *_: self._after_forward()),
        ]
        self._refresh()

    def uninstall(self) -> None:
        for handle in self._forward_hooks:
            handle.remove()
        super().uninstall()

    def make_gates(self) -> tuple[Gates, ...]:
        if self.done:
            return ()
        last = last_layers(self.graph, self.targets)
        analog = Gates(self.model, self.graph, self.targets, self._norms, only=last)
        hard = Gates(self.model, self.graph, self.targets, self._norms)
        return (analog, hard)

    def parameters(self) -> list[nn.Parameter]:
        return list(self.scorers.parameters())

    def penalty(self) -> Tensor:
        """weight · mean(S), in the steps that train scorers."""
        if not self._scoring() or not self._scores:
            return super().penalty()
        weight: float = self._options["weight"]
        return weight * torch.cat(self._scores).mean()

    def before_step(self) -> None:
        super().before_step()
        if self._scoring() and self._alternates():
            for p in self.model.parameters():
                p.grad = None  # the optimizer leaves what has no gradient alone, momentum and all

    def after_step(self) -> None:
        super().after_step()
        self._optimizer.zero_grad()

    def advance(self) -> None:
        if self.done:
            return
        self.step -= 1  # the step that was taken
        scoring = self._scoring()
        self.step += 1
        if scoring:
            self._optimizer.step()
        every = self._options["select_every"] or max(1, self.steps // 100)
        end = self._options["return_share" if self._alternates() else "ramp_share"]
        last = self.step >= max(1, round(end * self.steps))
        if last or (self._alternates() and self.step % every == 0):
            self._select(last)
        elif self.step % every == 0:
            self._note()
        self._refresh()

    def settings(self) -> dict[str, Any]:
        return super().settings() | self._options

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, facts = super().state()
        tensors |= {f"scorers.{name}": p.detach() for name, p in self.scorers.named_parameters()}
        tensors |= {f"selected.{number}": mask for number, mask in enumerate(self._selected)}
        for name, p in self.scorers.named_parameters():
            for slot, value in self._optimizer.state.get(p, {}).items():
                tensors[f"optimizer.{slot}.{name}"] = value
        return tensors, facts | {"done": self.done}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        self.done = bool(facts["done"])
        super().restore(tensors, facts)
        with torch.no_grad():
            for name, p in self.scorers.named_parameters():
                p.copy_(tensors[f"scorers.{name}"])
                slots = {
                    slot: tensors[f"optimizer.{slot}.{name}"].clone()
                    for slot in ("step", "exp_avg", "exp_avg_sq")
                    if f"optimizer.{slot}.{name}" in tensors
                }
                if slots:
                    self._optimizer.state[p] = {
                        k: v if k == "step" else v.to(p.device) for k, v in slots.items()
                    }
        self._selected = [tensors[f"selected.{n}"].clone() for n in range(len(self._selected))]

    def finish(self) -> Pruned:
        self._scores = []
        return super().finish()

    def _before_forward(self) -> None:
        self._refresh()
        if self._scoring() and self._alternates() and self.model.training:
            for module in self.model.modules():  # statistics of the whole network, not of what weights see
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
                    self._still.append((module, module.momentum))
                    module.momentum = 0.0

    def _after_forward(self) -> None:
        for module, momentum in self._still:
            module.momentum = momentum
        self._still.clear()

    def _refresh(self) -> None:
        """Give the gates what the coming pass needs."""
        if self.done or not self.gates:
            return
        analog, hard = self.gates
        scores = self.score()
        if self._scoring() and self.model.training:
            self._scores = scores
            analog.set(scores)
            hard.set([torch.ones_like(s) for s in scores])
            return
        detached = [s.detach() for s in scores]
        if self._options["binary"] and self._alternates():
            detached = [torch.ones_like(s) for s in scores]
        analog.set(detached)
        hard.set([mask.to(s) for mask, s in zip(self._selected, scores, strict=True)])

    def _select(self, last: bool) -> None:
        """Select by the scores as they are now; at last, fold the scores in and cut the rest out."""
        with torch.no_grad():
            raw, scores = self._raw(), self.score()
        ramp = (1 - min(1.0, self.step / max(1, round(self._options["ramp_share"] * self.steps)))) ** 3
        if last:
            ramp = 0.0
        if self._options["mass"] is not None:
            keep = self._by_mass(raw, scores, self._options["mass"] + (1 - self._options["mass"]) * ramp)
        else:
            keep = self.choose(raw, ramp)  # phi is monotone: x ranks like S, and tells saturated ones apart
        self._selected = [keep[number] for number in self.targets]
        for number, score in zip(self.targets, scores, strict=True):
            self.scores[number] = score.cpu()
        self._note()
        if last:
            if not (self._options["binary"] and self._alternates()):
                analog, _ = self.gates
                for model in (self.model, *self.followers):
                    analog.fold_(model, scores)
            self.done = True
            self.remove(keep)

    def _by_mass(self, raw: Sequence[Tensor], scores: Sequence[Tensor], share: float) -> list[Tensor]:
        """The fewest units whose scores sum up to a share of all scores."""
        pooled, rank = torch.cat(list(scores)).cpu(), torch.cat(list(raw)).cpu()
        order = rank.argsort(descending=True, stable=True)
        sums = pooled[order].double().cumsum(0)
        count = int((sums < share * sums[-1] - 1e-12).sum()) + 1
        chosen = torch.zeros(len(pooled), dtype=torch.bool)
        chosen[order[:count]] = True
        masks = [torch.ones(len(units), dtype=torch.bool) for units in self.kept]
        parts = torch.split(chosen, [len(s) for s in scores])
        for number, own, x in zip(self.targets, parts, raw, strict=True):
            masks[number] = own.clone()
            masks[number][x.cpu().topk(min(self.least[number], len(x))).indices] = True
        return masks

    def _note(self) -> None:
        counts = [len(units) for units in self.kept]
        for number, mask in zip(self.targets, self._selected, strict=True):
            counts[number] = int(mask.sum())
        with torch.no_grad():
            scores = self.score()
        names = [self.whole.groups[number].name for number in self.targets]
        rounded = [[round(v, 4) for v in s.tolist()] for s in scores]
        self.note(
            counts,
            score=torch.cat(scores).mean().item(),
            scores=dict(zip(names, rounded, strict=True)),
        )


_NAMES = {
    "regime": ("alternate", "joint"),
    "scorer": ("attention", "additive", "dot", "linear", "free"),
}
_NUMBERS: Numbers = {
    "hidden": (lambda v: v >= 1, "at least 1"),
    "leak": (lambda v: v > 0, "above 0"),
    "weight": (lambda v: v >= 0, "at least 0"),
    "lr": (lambda v: v > 0, "above 0"),
    "scorer_every": (lambda v: v >= 2, "at least 2"),
    "select_every": (lambda v: v is None or v >= 1, "None or a number of steps"),
    "ramp_share": (lambda v: 0 < v <= 1, "above 0, at most 1"),
    "return_share": (lambda v: 0 < v <= 1, "above 0, at most 1"),
    "mass": (lambda v: v is None or 0 < v < 1, "None or above 0 and below 1"),
    "least": (lambda v: v >= 1, "at least 1"),
}
