"""LAPP: a learned threshold per layer, a cost constraint, and a light bypass, while training from scratch.

Source: reconstruction of Zhai, Guo, Liu, Xing, Xu 2023, arXiv:2309.14157, "Layer Adaptive Progressive Pruning".
What the paper states: one learnable threshold per layer, driven by the task loss and by a constraint on the
network's FLOPs; a light bypass beside every pruned convolution; compression in the first epochs, from scratch.
Everything else is our choice, and an option.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secateur.cost import Budget, Cost
from secateur.engine.decay import INSTANT, Decay
from secateur.engine.gates import Gates, norms_after
from secateur.engine.options import Numbers, check_options
from secateur.engine.pruned import Pruned
from secateur.engine.structured import StructuredMethod, makers, own_groups
from secateur.errors import BudgetError, ModelError, SecateurError
from secateur.graph import Graph, Inputs, analyze
from secateur.surgery.bypass import SIDES, Side, add_bypass_, fold_bypass_, keeps_size

_NAMES = {
    "bypass": ("full", "shared", "none"),
    "side": SIDES,
    "score": ("l2", "gamma", "taylor"),
    "slope": ("sigmoid", "dst", "soft"),
    "constraint": ("linear", "log"),
    "threshold_optimizer": ("adam", "sgd"),
}
_NUMBERS: Numbers = {
    "prune_share": (lambda v: 0 < v <= 1, "above 0, at most 1"),
    "hold_share": (lambda v: 0 <= v < 1, "at least 0, below 1"),
    "temperature": (lambda v: v > 0, "above 0"),
    "weight": (lambda v: v >= 0, "at least 0"),
    "threshold_lr": (lambda v: v is None or 0 < v < math.inf, "None or above 0"),
    "remove_every": (lambda v: v is None or (isinstance(v, int) and v >= 1), "None or a number of steps"),
    "min_share": (lambda v: 0 <= v < 1, "at least 0, below 1"),
    "side_start": (lambda v: v >= 0, "at least 0"),
    "learn": (lambda v: isinstance(v, bool), "True or False"),
    "task_gradient": (lambda v: isinstance(v, bool), "True or False"),
}


class LAPP(StructuredMethod):
    """Prune while training from scratch, with one learned threshold per group of units.

    In every step, for each pruned group with importances I, threshold tau and temperature t:

        z_i  = (I_i - mean(I)) / std(I)                      over the group's original units
        m_i  = 1 if z_i >= tau else 0                        backward: the slope of sigmoid((z_i - tau) / t)
        y_i  = m_i · norm(conv(x))_i                         then the bypass, if there is one
        loss = task + weight · max(0, cost(m) / dense - target(step))
        target(s) = keep + (1 - keep) · (1 - s / S)^3        over the first S = prune_share · steps steps

    so that the task pulls thresholds down where the units near them help, and the constraint pushes them up
    where units are dear. After S steps the units with the lowest z - tau leave until the budget holds
    exactly, and plain training goes on.

    Args:
        model: freshly initialised; pruned in place. It gets a bypass here, before the optimizer is made.
        inputs: example inputs.
        budget: in MACs, parameters or both. Shares refer to the model without bypass, and the costs of a
            bypass that stays count.
        steps: optimizer steps of the whole training.
        prune_share: share of the steps in which thresholds move (10 of 200 epochs).
        hold_share: share of those in which they wait until importances say something.
        bypass: "full" keeps each layer's output width, so that a layer may become narrow and residual sums
            need no alignment; "shared" loses the channels its layer loses, and folds away at the end; "none".
        side: what the bypass computes: "depthwise", one filter of the layer's size per output channel; or "pointwise",
            1 × 1 in four groups, beside the layers whose padding keeps the image's size.
        side_start: scale of the batch norm behind it, at the start; anything but 0 disturbs a trained model.
        score: importance of a unit: "l2" norm of its filter, "gamma", the size of its batch-norm scale, or
            "taylor", a moving average of (gamma · dL/dgamma)².
        slope: backward of the mask: "sigmoid"; "dst", the piecewise slope of Liu et al. 2020,
            arXiv:2005.06870; or "soft", the sigmoid itself, forward as well, until the budget is landed on.
        temperature: t.
        constraint: "linear", or "log" for log(cost / (target · dense)).
        weight: of the constraint.
        learn: False: one threshold for all groups that follows the target, as a control.
        task_gradient: whether the task loss moves thresholds; False, as a control.
        threshold_optimizer: "adam" or "sgd".
        threshold_lr: None: such that a threshold can travel 7.8 standard deviations within the pruning steps.
        remove_every: steps after which units below their threshold are cut out for good; None: only at the
            end of pruning. Not with a shared bypass. Once a group has lost units, its mean and std stay.
        min_share: share of its units that every group keeps.
        removal: how units go. With `Decay(N)` the gate of a unit that falls below its threshold closes over N steps,
            and opens again as gradually if the unit comes back before; the last ones close after landing on the
            budget. Here thresholds let units return, so `rectify` has no part in it.
        freeze: module names or shell patterns that no cut may touch.
    Raises:
        ModelError: a bypass is wanted where no convolution is followed by a batch norm.
        BudgetError: the budget cannot be reached, or bounds something else.
    Differs: see the source; results are "LAPP-style", not the paper's.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        *,
        budget: Budget,
        steps: int,
        prune_share: float = 0.05,
        hold_share: float = 0.05,
        bypass: Literal["full", "shared", "none"] = "full",
        side: Side = "depthwise",
        side_start: float = 0.0,
        score: Literal["l2", "gamma", "taylor"] = "l2",
        slope: Literal["sigmoid", "dst", "soft"] = "sigmoid",
        temperature: float = 0.5,
        constraint: Literal["linear", "log"] = "linear",
        weight: float = 4.0,
        learn: bool = True,
        task_gradient: bool = True,
        threshold_optimizer: Literal["adam", "sgd"] = "adam",
        threshold_lr: float | None = None,
        remove_every: int | None = None,
        min_share: float = 0.05,
        removal: Decay = INSTANT,
        freeze: Sequence[str] = (),
    ) -> None:
        self._options: dict[str, Any] = {
            "prune_share": prune_share,
            "hold_share": hold_share,
            "bypass": bypass,
            "side": side,
            "side_start": side_start,
            "score": score,
            "slope": slope,
            "temperature": temperature,
            "constraint": constraint,
            "weight": weight,
            "learn": learn,
            "task_gradient": task_gradient,
            "threshold_optimizer": threshold_optimizer,
            "threshold_lr": threshold_lr,
            "remove_every": remove_every,
            "min_share": min_share,
        }
        check_options("LAPP", self._options, _NAMES, _NUMBERS)
        if not isinstance(removal, Decay):
            raise SecateurError(f"LAPP: removal is {removal!r}; expected Decay(steps) from secateur.methods")
        self._options["removal"] = asdict(removal)
        if self._options["remove_every"] and self._options["bypass"] == "shared":
            raise SecateurError(
                "LAPP: remove_every does not go with bypass='shared', whose units leave at the end"
            )
        if removal.rectify is not None:
            raise SecateurError(
                "LAPP: its thresholds let units return that are worth it; use a removal without rectify"
            )
        if budget.units is not None:
            raise BudgetError("LAPP: the budget bounds units; expected macs, params or both")
        plain = analyze(model, inputs, freeze=freeze)
        norms = norms_after(model, inputs)
        self._bypasses = _candidates(model, plain, norms, bypass, side, freeze)
        if bypass == "full":
            add_bypass_(model, self._bypasses, "full", side, side_start)
            norms = norms_after(model, inputs)
        super().__init__(model, inputs, budget=budget, steps=steps, dense=Cost(plain), freeze=freeze)
        self._norms, self._tensors = norms, dict(model.named_parameters())
        if bypass == "full":
            beside = {f"{conv}.conv" for conv, _ in self._bypasses}
            targets = [n for n, g in enumerate(self.whole.groups) if len(m := makers(g)) == 1 and m <= beside]
        else:
            targets = own_groups(self.whole)
        self.aim(targets, [max(1, math.ceil(min_share * group.units)) for group in self.whole.groups])
        if bypass == "shared":
            add_bypass_(model, self._bypasses, "shared", side, side_start)
        self.prune_steps = max(1, round(prune_share * steps))
        self._last = self.prune_steps + removal.steps - 1  # the step after which all that leave are zero
        if self._last > steps:
            raise SecateurError(
                f"LAPP: pruning ends after step {self.prune_steps}, and {removal.steps} steps of removal then go "
                f"beyond step {steps}; use a smaller prune_share, a shorter removal, or more steps"
            )
        self._fades = removal.steps > 1
        self._fade = (1 + 1e-6) / removal.steps  # rounding must leave nothing of a unit after the last step
        self._levels = [torch.ones(self.whole.groups[number].units) for number in targets]

        self.threshold = nn.Parameter(torch.full((len(self.whole.groups),), -3.0))
        lr = 7.8 / self.prune_steps if threshold_lr is None else threshold_lr
        make = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[threshold_optimizer]
        self._threshold_optimizer = make([self.threshold], lr=lr)
        self._saliency = [torch.zeros(group.units) for group in self.whole.groups]
        self._moments = torch.zeros(len(self.whole.groups), 2)
        self._decided: list[Tensor] | None = None
        self._passed: list[Tensor] = []
        self._look: list[tuple[int, Tensor]] = []
        self._forward_hook: Any = None

    # --- the equations -------------------------------------------------------------------------------------

    def importance(self, number: int) -> Tensor:
        """I of the units that a group has now, (units,), float32, without gradient."""
        group = self.graph.groups[number]
        if self._options["score"] == "taylor":
            return self._saliency[number][self.kept[number]].to(self.threshold.device)
        role = "scale" if self._options["score"] == "gamma" else "out"
        rows = [m.take(self._tensors[m.tensor].detach()).float() for m in group.members if m.role == role]
        if not rows:
            raise ModelError(f"LAPP: group {group.name!r} has no batch-norm scale; use score='l2'")
        norm: Tensor = torch.linalg.vector_norm(torch.cat(rows, 1), dim=1)
        return norm

    def distance(self, number: int) -> Tensor:
        """z - tau of the units that a group has now, with a gradient to tau."""
        value = self.importance(number)
        if len(value) == self.whole.groups[number].units:
            self._moments[number] = torch.stack([value.mean(), value.std(correction=0)]).cpu()
        mean, std = self._moments[number].tolist()
        z: Tensor = (value - mean) / (std + 1e-8)
        return z - self.threshold[number]

    def masks(self) -> list[Tensor]:
        """m of every target group, (units,), with the chosen slope towards tau."""
        found = []
        slope, t = self._options["slope"], self._options["temperature"]
        for number in self.targets:
            x = self.distance(number)
            mask = torch.sigmoid(x / t) if slope == "soft" else Step.apply(x, slope, t)
            best = x.detach().topk(min(self.least[number], len(x))).indices
            stays = torch.zeros_like(x, dtype=torch.bool).index_fill(0, best, True)
            found.append(torch.where(stays, 1.0, mask))
        return found

    def penalty(self) -> Tensor:
        """weight · (cost - target), at least 0; of the masks of the last pass. 0 once the budget is met."""
        if self._decided is not None or not self._passed:
            return super().penalty()
        kept = torch.tensor([len(units) for units in self.kept], dtype=torch.float64)
        counts = torch.stack([mask.sum() for mask in self._passed]).double().cpu()
        soft = kept.index_put((torch.tensor(self.targets),), counts)
        ramp = (1 - min(1.0, self.step / self.prune_steps)) ** 3
        total = torch.zeros((), dtype=torch.float64)
        for name, limit in self.limits.items():
            dense = self.dense.of(name)
            goal = limit / dense + (1 - limit / dense) * ramp
            share = self.cost.soft(name, soft) / dense
            over = torch.log(share / goal) if self._options["constraint"] == "log" else share - goal
            total = total + over.clamp_min(0)
        weight: float = self._options["weight"]
        return weight * total.to(self.threshold)

    # --- the course of a training --------------------------------------------------------------------------

    def install(self) -> None:
        device = next(self.model.parameters()).device
        self.threshold.data = self.threshold.data.to(device)
        super().install()
        self._forward_hook = self.model.register_forward_pre_hook(lambda *_: self._refresh())
        self._refresh()

    def uninstall(self) -> None:
        if self._forward_hook is not None:
            self._forward_hook.remove()
        super().uninstall()

    def make_gates(self) -> tuple[Gates, ...]:
        shared = self._options["bypass"] == "shared"
        if self._decided is not None and not shared and self.step >= self._last:
            return ()  # the units are gone
        return (Gates(self.original if shared else self.model, self.graph, self.targets, self._norms),)

    def parameters(self) -> list[nn.Parameter]:
        return [self.threshold]

    def before_step(self) -> None:
        super().before_step()
        self._look = []
        if self._options["score"] != "taylor" or self._decided is not None:
            return
        for number in self.targets:
            scales = [m for m in self.graph.groups[number].members if m.role == "scale"]
            pairs = [(m, p, p.grad) for m in scales if (p := self._tensors[m.tensor]).grad is not None]
            if pairs:
                change = torch.stack([(m.take(p.detach()) * m.take(g)).float().sum(1) for m, p, g in pairs])
                self._look.append((number, change.sum(0).square().cpu()))

    def after_step(self) -> None:
        super().after_step()
        self.threshold.grad = None  # also that of a step which the scaler skipped

    def advance(self) -> None:
        if self._decided is None:
            self._prune()
        elif self.step > self._last:
            return
        if self._fades or self._decided is not None:
            self._move()
        if self.step == self._last and self._options["bypass"] != "shared":
            assert self._decided is not None
            self.remove(self._decided)
        self._refresh()
        if self.step % max(1, self.prune_steps // 100) == 0 or self.step == self._last:
            self._note()

    def _prune(self) -> None:
        """One step of the thresholds, and what follows from it."""
        for number, change in self._look:
            rows, memory = self.kept[number], self._saliency[number]
            memory[rows] = torch.lerp(memory[rows], change, 0.01 if self.step > 1 else 1.0)
        if not self._options["learn"]:
            self._follow_target()
        elif self.step > self._options["hold_share"] * self.prune_steps:
            self._threshold_optimizer.step()
        every = self._options["remove_every"]
        if self.step >= self.prune_steps:
            self._decided = self._landing()
        elif every and self.step % every == 0:
            self._remove_below()

    def _move(self) -> None:
        """Open or close the gates a little further, towards the masks as they are now."""
        if self._decided is None:
            goals = [mask.detach().cpu() for mask in self.masks()]
        else:
            goals = [self._decided[number].float() for number in self.targets]
        self._levels = [
            level + (goal - level).clamp(-self._fade, self._fade)
            for level, goal in zip(self._levels, goals, strict=True)
        ]

    def remove(self, masks: Sequence[Tensor]) -> None:
        cut = [masks[number].cpu() for number in self.targets]
        self._levels = [level[mask] for level, mask in zip(self._levels, cut, strict=True)]
        super().remove(masks)

    def finish(self) -> Pruned:
        """Prove the result, after a shared bypass has been folded in and the units are cut.

        Followers keep their shared bypasses. A folded norm's statistics serve evaluation: train on, if at all, before.
        """
        if self._options["bypass"] == "shared" and self._decided is not None and self._handle is None:
            fold_bypass_(self.model, self._bypasses)
            self.followers, self._bypasses = (), []
            self.remove(self._decided)
            self._decided = None
        return super().finish()

    def settings(self) -> dict[str, Any]:
        return super().settings() | self._options

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, facts = super().state()
        tensors |= {"threshold": self.threshold.detach(), "moments": self._moments}
        for number, saliency in enumerate(self._saliency):
            tensors[f"saliency.{number}"] = saliency
        for slot, value in self._threshold_optimizer.state.get(self.threshold, {}).items():
            if value is not None:
                tensors[f"optimizer.{slot}"] = value
        for number, mask in enumerate(self._decided or ()):
            tensors[f"decided.{number}"] = mask
        for place, level in enumerate(self._levels):
            tensors[f"level.{place}"] = level
        return tensors, facts

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        super().restore(tensors, facts)
        device = self.threshold.device
        self.threshold.data = tensors["threshold"].clone().to(device)
        self._moments = tensors["moments"].clone()
        self._saliency = [tensors[f"saliency.{n}"].clone() for n in range(len(self._saliency))]
        slots = {
            k.removeprefix("optimizer."): v.clone() for k, v in tensors.items() if k.startswith("optimizer.")
        }
        if slots:
            on = {k: v if k == "step" else v.to(device) for k, v in slots.items()}
            self._threshold_optimizer.state[self.threshold] = on
        self._levels = [tensors[f"level.{place}"].clone() for place in range(len(self._levels))]
        if "decided.0" in tensors:
            self._decided = [tensors[f"decided.{n}"].clone() for n in range(len(self._saliency))]

    def _refresh(self) -> None:
        """Give the gates the masks of the weights and thresholds as they are now."""
        if not self.gates:
            return
        (gates,) = self.gates
        levels = [level.to(self.threshold) for level in self._levels]
        if self._decided is not None:
            gates.set(levels)
            return
        self._passed = self.masks()
        passed = self._passed if self._options["task_gradient"] else [mask.detach() for mask in self._passed]
        if self._fades:
            passed = [level + (mask - mask.detach()) for level, mask in zip(levels, passed, strict=True)]
        gates.set(passed, dust=self.model.training)

    def _landing(self) -> list[Tensor]:
        """Which units stay if the budget were to be met now: one common offset on all thresholds."""
        return self.choose([self.distance(number) for number in self.targets])

    def _remove_below(self) -> None:
        """Cut out what is below its threshold and has faded, but nothing that the budget would let stay."""
        keep = self._landing()
        for number, mask, level in zip(self.targets, self.masks(), self._levels, strict=True):
            mask = mask.detach().cpu()
            keep[number] |= (mask >= 0.5) | ((level > mask + 1e-6) & self._fades)
        for number in set(range(len(keep))) - set(self.targets):
            keep[number][:] = True
        self.remove(keep)

    def _follow_target(self) -> None:
        """One threshold for all groups: the lowest at which the cost is on target."""
        ramp = (1 - min(1.0, self.step / self.prune_steps)) ** 3
        low, high = -4.0, 8.0
        for _ in range(30):
            self.threshold.data.fill_((low + high) / 2)
            counts = [len(units) for units in self.kept]
            for number, mask in zip(self.targets, self.masks(), strict=True):
                counts[number] = int((mask >= 0.5).sum())
            fits = all(
                self.cost.of(name, counts) <= limit + (self.dense.of(name) - limit) * ramp
                for name, limit in self.limits.items()
            )
            low, high = (low, (low + high) / 2) if fits else ((low + high) / 2, high)
        self.threshold.data.fill_(high)

    def _note(self) -> None:
        counts = [len(units) for units in self.kept]
        if self._decided is None:
            for number, mask in zip(self.targets, self._passed, strict=True):
                counts[number] = int((mask.detach() >= 0.5).sum())
        elif self._options["bypass"] == "shared" or self.step < self._last:
            counts = [int(mask.sum()) for mask in self._decided]
        names = [self.whole.groups[number].name for number in self.targets]
        values = self.threshold.detach()[self.targets].tolist()
        self.note(counts, threshold=dict(zip(names, values, strict=True)))


class Step(torch.autograd.Function):
    """1 where x >= 0, else 0; backward a slope that says how near x is to the step."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: str, temperature: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.slope, ctx.temperature = slope, temperature
        return (x >= 0).to(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        if ctx.slope == "sigmoid":
            q = torch.sigmoid(x / ctx.temperature)
            slope = q * (1 - q) / ctx.temperature
        else:
            size = x.abs()
            slope = torch.where(size <= 0.4, 2 - 4 * size, torch.where(size <= 1, 0.4, 0.0))
        return gradients[0] * slope, None, None


def _candidates(
    model: nn.Module, graph: Graph, norms: Mapping[str, str], bypass: str, side: Side, freeze: Sequence[str]
) -> list[tuple[str, str]]:
    """Convolutions to put a bypass beside, with their norms.

    All that make units of their own; with a full bypass also larger kernels that add to a residual stream,
    but no 1 × 1 convolution that does (projections, the last of a bottleneck), and never the first layer.
    """
    if bypass == "none":
        return []
    own = {maker for number in own_groups(graph) for maker in makers(graph.groups[number])}
    found = []
    for name in dict.fromkeys(product.name for product in graph.macs):
        conv = model.get_submodule(name)
        if type(conv) is not nn.Conv2d or conv.groups > 1 or name not in norms or name == graph.macs[0].name:
            continue
        if side == "pointwise" and not keeps_size(conv):
            continue
        frozen = any(fnmatchcase(name, f) or fnmatchcase(name, f"{f}.*") for f in freeze)
        if not frozen and (name in own or (bypass == "full" and max(conv.kernel_size) > 1)):
            found.append((name, norms[name]))
    if not found:
        raise ModelError("LAPP: no prunable convolution is followed by a batch norm; use bypass='none'")
    return found
