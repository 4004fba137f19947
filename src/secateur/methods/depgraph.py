"""DepGraph: group importance, group sparse training, and progressive cutting."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.cost import Budget
from secateur.engine.decay import INSTANT, Decay
from secateur.errors import SecateurError
from secateur.graph import Inputs
from secateur.methods.gradual import Gradual
from secateur.scores.table import group_l2, group_slices


class DepGraph(Gradual):
    """Push whole groups towards zero, then cut the lowest, the whole network ranked together.

    In the sparse phase, before each optimizer step, for every group with importances I:

        imp = sqrt(I),  gamma_u = 2^(4 (max imp - imp_u) / (max imp - min imp))      from 1 to 16
        grad(w) += strength · gamma_u · w        for the rows, columns and norm scales of unit u

    and the optimizer's weight decay is off. Then units leave in `rounds`; within a round in `pieces` small
    cuts, each ranked on what the ones before it left.

    Args:
        model: trained; pruned in place.
        inputs: example inputs.
        budget: what the result may cost at most.
        steps: optimizer steps of the whole training.
        sparse_share: share of the steps with the sparse phase; 0: none.
        strength: of the penalty.
        rounds: 1 cuts at once, as the host does; several leave room for a decay.
        prune_share: share of the steps by which the last cohort is gone.
        pieces: small cuts in a round.
        removal: how units go.
        min_keep: units that every group keeps at least.
        freeze: module names or shell patterns that no cut may touch.
    Source: Fang et al. 2023, arXiv:2301.12900, sec. 3.2 and 3.3; settings from the authors' code.
    Differs: the phases share one training of given length; equal importances within a group give gamma = 1.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        *,
        budget: Budget,
        steps: int,
        sparse_share: float = 0.0,
        strength: float = 5e-4,
        rounds: int = 1,
        prune_share: float = 0.5,
        pieces: int = 20,
        removal: Decay = INSTANT,
        min_keep: int = 1,
        freeze: Sequence[str] = (),
    ) -> None:
        if not (0 <= sparse_share < prune_share) or strength < 0 or pieces < 1:
            raise SecateurError(
                f"DepGraph: sparse_share {sparse_share:g}, strength {strength:g}, pieces {pieces}; expected "
                f"0 <= sparse_share < prune_share, strength at least 0 and at least one piece"
            )
        super().__init__(
            model,
            inputs,
            budget=budget,
            steps=steps,
            score="group-l2",
            rounds=rounds,
            start_share=sparse_share,
            prune_share=prune_share,
            removal=removal,
            min_keep=min_keep,
            freeze=freeze,
        )
        self._options |= {"sparse_share": sparse_share, "strength": strength, "pieces": pieces}
        self.sparse_steps = round(sparse_share * steps)
        self._decays: list[float] = []

    def gammas(self, number: int) -> Tensor:
        """How much harder each unit of a group is pushed, (units,), from 1 to 16."""
        slices = group_slices(self.graph.groups[number], self.tensors, {})
        size = group_l2(slices, self._generator).detach().sqrt()
        span = size.max() - size.min()
        return torch.exp2(4 * (size.max() - size) / span) if span > 1e-12 else torch.ones_like(size)

    def install(self) -> None:
        super().install()
        if self.step < self.sparse_steps and self.optimizer is not None:
            self._decays = [group["weight_decay"] for group in self.optimizer.param_groups]
            for group in self.optimizer.param_groups:
                group["weight_decay"] = 0.0

    def uninstall(self) -> None:
        super().uninstall()
        if self._decays and self.optimizer is not None:
            for group, decay in zip(self.optimizer.param_groups, self._decays, strict=True):
                group["weight_decay"] = decay
            self._decays = []

    def before_step(self) -> None:
        super().before_step()  # looks at the task's gradient, before the penalty joins it
        if self.step >= self.sparse_steps:
            return
        for number in self.targets:
            gamma = self._options["strength"] * self.gammas(number)
            for member in self.graph.groups[number].members:
                p = self.tensors.get(member.tensor)
                if p is None or p.grad is None or member.role not in ("out", "depthwise", "scale", "in"):
                    continue
                along = torch.zeros(p.shape[member.dim], dtype=p.dtype, device=p.device)
                index = torch.as_tensor(member.index, device=p.device)
                along[index] = gamma.to(along)[:, None].expand(index.shape)
                shape = [1] * p.ndim
                shape[member.dim] = -1
                p.grad.add_(along.view(shape) * p.detach())

    def advance(self) -> None:
        if self.step == self.sparse_steps:
            self.uninstall()  # the optimizer's own decay is back
            self.install()
        super().advance()

    def pick(self, scores: Sequence[Tensor], slack: float) -> list[Tensor]:
        """In small cuts: each is ranked on the weights that the cuts before it would leave."""
        chosen = [torch.zeros(len(score), dtype=torch.bool) for score in scores]
        start = max(self.cost.of(n, self.standing()) / self.dense.of(n) for n in self.limits)
        end = max(
            (limit + slack * (self.dense.of(n) - limit)) / self.dense.of(n)
            for n, limit in self.limits.items()
        )
        if start <= end:
            return chosen
        full = self.tensors
        pieces: int = self._options["pieces"]
        try:
            for piece in range(1, pieces + 1):
                self.tensors = self._without(full, chosen)
                share = piece / pieces
                goal = dict.fromkeys(self.limits, (1 - share) * start + share * end)
                bound = max(
                    (goal[n] * self.dense.of(n) - limit) / (self.dense.of(n) - limit)
                    for n, limit in self.limits.items()
                )
                ranked = self.rank()
                for score, mask in zip(ranked, chosen, strict=True):
                    score[mask] = -torch.inf
                more = super().pick(ranked, slack if piece == pieces else bound)
                chosen = [a | b for a, b in zip(chosen, more, strict=True)]
        finally:
            self.tensors = full
        return chosen

    def _without(self, tensors: dict[str, Any], chosen: Sequence[Tensor]) -> dict[str, Any]:
        """The parameters with zeros where the chosen units are."""
        found = {name: p.detach().clone() for name, p in tensors.items()}
        for number, mask in zip(self.targets, chosen, strict=True):
            for member in self.graph.groups[number].members:
                if member.tensor in found and mask.any():
                    member.fill_(found[member.tensor], mask, 0.0)
        return found
