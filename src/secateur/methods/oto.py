"""OTOv2's half-space projection and its exact-budget successor HESSO."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.cost import Budget
from secateur.engine.decay import INSTANT, Decay
from secateur.errors import BudgetError, SecateurError
from secateur.graph import Inputs
from secateur.methods.gradual import Gradual, RemovalMethod


class _Directions(RemovalMethod):
    """Remembers x before an optimizer step, so that v = (x before - x after) / lr is known after it.

    That is the direction of whatever optimizer it is: SGD's momentum, Adam's, AdamW's with its decay.
    """

    def remember(self) -> None:
        """Before the optimizer step."""
        self._x = {number: self.pool.vectors(number) for number in self.targets}

    def rates(self, number: int) -> Tensor:
        """The learning rate of every value of x, (values,)."""
        assert self.optimizer is not None
        lr = {p: float(group["lr"]) for group in self.optimizer.param_groups for p in group["params"]}
        parts = self.pool.parts(number)
        sizes = [m.take(p.detach()).shape[1] for m, p in parts]
        return torch.tensor(
            [lr[p] for (_, p), size in zip(parts, sizes, strict=True) for _ in range(size)]
        ).to(self._x[number])

    def direction(self, number: int) -> Tensor:
        """v of a group's units, (units, values); zero where nothing moved."""
        rates = self.rates(number)
        moved = self._x[number] - self.pool.vectors(number)
        return torch.where(rates > 0, moved / rates.clamp_min(1e-300), 0.0)


class OTO(_Directions):
    """Dual half-space stochastic projected gradient: penalise the redundant units, project what crosses over.

    With x the weights that make a unit, v the optimizer's direction and alpha its rate. Once, at
    `start_share`: redundancy s = cos(x, v) / ||cos|| / 2 + m / ||m|| / 2 with m = 1 / (||x|| / values + 1e-6),
    norms over the network; the most redundant units, as many as the budget asks for and some more, are
    penalised from then on, in every step:

        lambda_u = lambda;  if <x, v> < 0: low = -<x, v> / ||x||, up = -||v||² ||x|| / <x, v>,
                   lambda_u = clip(amplify · low, lambda, lambda · most), or (low + up) / 2 where that is >= up
        x^ = x - alpha v - alpha lambda_u x / ||x||
        x^ -> 0 where <x^, x> < half_space · ||x||²

    until the budget is met; then everything that is left trains on.

    Args:
        model: pruned in place; trained or not.
        inputs: example inputs.
        budget: what the result may cost at most.
        steps: optimizer steps of the whole training.
        start_share: share of the steps before the redundant units are chosen.
        prune_share: share of the steps by which the budget holds; if projection has not got there by then,
            the shortest penalised units leave.
        tolerance: how much of the cost above the budget is penalised beyond it.
        strength: lambda; 1e-3 for SGD, 1e-2 for Adam.
        amplify, most: as above; 2 and 10 for SGD, 20 and 1000 for Adam.
        half_space: from 0 to below 1; higher projects sooner.
        removal: how projected units go; instant is the host.
        min_keep: units that every group keeps at least.
        freeze: module names or shell patterns that no cut may touch.
    Source: Chen et al. 2023 (OTOv2), arXiv:2303.06862, and the authors' released code.
    Differs: the target is a budget, not a share of zero groups, and is met exactly: where more units cross
        over than it needs, those that are furthest over go.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        *,
        budget: Budget,
        steps: int,
        start_share: float = 0.1,
        prune_share: float = 0.6,
        tolerance: float = 0.05,
        strength: float = 1e-3,
        amplify: float = 2.0,
        most: float = 10.0,
        half_space: float = 0.9,
        removal: Decay = INSTANT,
        min_keep: int = 1,
        freeze: Sequence[str] = (),
    ) -> None:
        if not (
            0 <= start_share < prune_share <= 1 and 0 <= half_space < 1 and tolerance >= 0 and strength >= 0
        ):
            raise SecateurError(
                f"OTO: start_share {start_share:g}, prune_share {prune_share:g}, half_space {half_space:g}, tolerance "
                f"{tolerance:g}, strength {strength:g}; expected 0 <= start_share < prune_share <= 1, half_space "
                f"in 0…1 and the others at least 0"
            )
        super().__init__(
            model, inputs, budget=budget, steps=steps, removal=removal, min_keep=min_keep, freeze=freeze
        )
        self._options: dict[str, Any] = {
            "start_share": start_share,
            "prune_share": prune_share,
            "tolerance": tolerance,
            "strength": strength,
            "amplify": amplify,
            "most": most,
            "half_space": half_space,
            "min_keep": min_keep,
        }
        self.begins = max(1, round(start_share * steps))
        self.ends = max(self.begins, round(prune_share * steps) - removal.steps + 1)
        self.penalised = [torch.zeros(group.units, dtype=torch.bool) for group in self.whole.groups]
        self._over = False

    def met(self) -> bool:
        """Whether what stands fits the budget."""
        standing = self.standing()
        return all(self.cost.of(name, standing) <= limit for name, limit in self.limits.items())

    def redundancy(self) -> list[Tensor]:
        """s of every unit, (units,) per group; higher = more redundant."""
        cos, magnitude = [], []
        for number in self.targets:
            x, v = self._x[number], self.direction(number)
            length = x.norm(dim=1)
            cos.append((x * v).sum(1) / (length * v.norm(dim=1)).clamp_min(1e-30))
            magnitude.append(1 / (length / x.shape[1] + 1e-6))
        scale = [torch.cat(parts).norm().clamp_min(1e-30) for parts in (cos, magnitude)]
        return [(c / scale[0] + m / scale[1]) / 2 for c, m in zip(cos, magnitude, strict=True)]

    def lambdas(self, x: Tensor, v: Tensor) -> Tensor:
        """lambda of every unit, (units,)."""
        strength, most = self._options["strength"], self._options["most"]
        product, length = (x * v).sum(1), x.norm(dim=1).clamp_min(1e-30)
        low = -product / length
        up = torch.where(product < 0, -v.square().sum(1) * length / product, torch.inf)
        raised = (self._options["amplify"] * low).clamp(strength, strength * most)
        raised = torch.where(raised >= up, (low + up) / 2, raised)
        return torch.where(product < 0, raised, torch.full_like(raised, strength))

    def before_step(self) -> None:
        super().before_step()
        if not self._over:
            self.remember()

    def advance(self) -> None:
        super().advance()
        if not self._over and self.step >= self.begins:
            if self.step == self.begins:
                self._partition()
            self._project()
            if self.step >= self.ends and not self.met():
                self.pool.rectifying = False
                self.leave(self.pick(self._shortest(), 0.0))
            if self.step >= self.ends or (self.met() and not self._may_return()):
                self.pool.rectifying = False
                self._over = True
                self.note(self.standing())
        if self._over and not self.pool.busy():
            self.drop()

    def _may_return(self) -> bool:
        return self.removal.rectify is not None and self.pool.busy()

    def _partition(self) -> None:
        """Choose the units to penalise."""
        scores = [-s for s in self.redundancy()]
        try:
            chosen = self.pick(scores, -self._options["tolerance"])
        except BudgetError:  # so near to the least that there is no room beyond it
            chosen = self.pick(scores, 0.0)
        for number, mask in zip(self.targets, chosen, strict=True):
            self.penalised[number] = mask

    def _project(self) -> None:
        """The penalty's step, and which units cross over."""
        if self.met():
            return
        across, depth, lengths = [], [], {}
        for number in self.targets:
            pushed = self.penalised[number] & ~self.pool.leaving(number)
            x, v = self._x[number], self.direction(number)
            lengths[number] = x.norm(dim=1)
            on = pushed.to(x.device)
            strength = torch.where(on, self.lambdas(x, v), 0.0) / lengths[number].clamp_min(1e-30)
            self.pool.add_(number, -self.rates(number) * strength[:, None] * x)
            after = self.pool.vectors(number)
            share = (after * x).sum(1) / x.square().sum(1).clamp_min(1e-30)
            over = (share < self._options["half_space"]).cpu() & pushed & self.pool.free(number, self.step)
            across.append(over)
            depth.append(torch.where(over, share.float().cpu(), torch.finfo(torch.float32).max / 2))
        wanted = self.pick(depth, 0.0)
        left = [a & w for a, w in zip(across, wanted, strict=True)]
        enough = all(bool((~w | a).all()) for a, w in zip(across, wanted, strict=True))
        self.leave(left if enough else across, lengths)

    def _shortest(self) -> list[Tensor]:
        """Length per value of every unit, relative to its group; the penalised come before all others."""
        found = []
        for number in self.targets:
            length = self.pool.vectors(number).norm(dim=1).float().cpu()
            found.append(length / length.mean().clamp_min(1e-30) + 1e6 * ~self.penalised[number])
        return found

    def remove(self, masks: Sequence[Tensor]) -> None:
        before = self.graph
        super().remove(masks)
        if self.graph is not before:
            self.penalised = [p[mask.cpu()] for p, mask in zip(self.penalised, masks, strict=True)]

    def settings(self) -> dict[str, Any]:
        return super().settings() | self._options

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, facts = super().state()
        tensors |= {f"penalised.{n}": mask for n, mask in enumerate(self.penalised)}
        return tensors, facts | {"over": self._over}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        super().restore(tensors, facts)
        self.penalised = [tensors[f"penalised.{n}"].clone() for n in range(len(self.penalised))]
        self._over = bool(facts["over"])


class HESSO(Gradual, _Directions):
    """Decay the most redundant units to zero in periods, to an exact budget.

    At the start of each period all units are scored, higher = keep, by a fifth each of ||x||, ||x|| / values,
    cos(x, v) + 1, |<x, v>| and <x, v>² / 2, each divided by its norm over the network. The lowest new ones
    then shrink in every step k of the period of N steps: x <- x (N - k) / (N - k + 1), after the optimizer's.

    Args:
        model: pruned in place; trained or not.
        inputs: example inputs.
        budget: what the result may cost at most.
        steps: optimizer steps of the whole training.
        periods: how many.
        start_share, prune_share: shares of the steps between which the periods lie.
        min_keep: units that every group keeps at least.
        freeze: module names or shell patterns that no cut may touch.
    Source: HESSO in the OTO authors' released code.
    Differs: the target is a budget in costs instead of a share of groups.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        *,
        budget: Budget,
        steps: int,
        periods: int = 10,
        start_share: float = 0.1,
        prune_share: float = 0.6,
        min_keep: int = 1,
        freeze: Sequence[str] = (),
    ) -> None:
        length = (round(prune_share * steps) - max(1, round(start_share * steps)) + 1) // max(1, periods)
        super().__init__(
            model,
            inputs,
            budget=budget,
            steps=steps,
            rounds=periods,
            start_share=start_share,
            prune_share=prune_share,
            removal=Decay(max(1, length), form="factor"),
            min_keep=min_keep,
            freeze=freeze,
        )

    def before_step(self) -> None:
        super().before_step()
        if self.step + 1 in self.when:
            self.remember()

    def rank(self) -> list[Tensor]:
        terms: list[list[Tensor]] = [[] for _ in range(5)]
        for number in self.targets:
            x, v = self._x[number], self.direction(number)
            length, product = x.norm(dim=1), (x * v).sum(1)
            cos = product / (length * v.norm(dim=1)).clamp_min(1e-30)
            for term, value in zip(
                terms,
                (length, length / x.shape[1], cos + 1, product.abs(), product.square() / 2),
                strict=True,
            ):
                term.append(value.cpu())
        norms = [torch.cat(term).norm().clamp_min(1e-30) for term in terms]
        return [
            torch.stack([0.2 * term[i] / norm for term, norm in zip(terms, norms, strict=True)]).sum(0)
            for i in range(len(self.targets))
        ]
