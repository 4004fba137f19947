"""Removal in rounds while the model trains: the classic loop, and what hosts of Decay Pruning share.

Units are chosen in a few rounds by any score; each cohort goes as its `Decay` says, while training continues.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from secateur.cost import Budget
from secateur.engine.decay import INSTANT, Decay, Ending, Pool
from secateur.engine.pruned import Pruned
from secateur.engine.structured import StructuredMethod
from secateur.errors import ScoreError, SecateurError, unknown
from secateur.graph import Inputs
from secateur.scores import SCORES
from secateur.scores.table import group_slices


class RemovalMethod(StructuredMethod):
    """A method whose units leave through a pool.

    Args:
        removal: how chosen units go.
        Else as `StructuredMethod`.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        *,
        budget: Budget,
        steps: int,
        removal: Decay,
        min_keep: int = 1,
        freeze: Sequence[str] = (),
    ) -> None:
        super().__init__(model, inputs, budget=budget, steps=steps, freeze=freeze)
        self.removal = removal
        groups = self.whole.groups
        self.tensors = dict(model.named_parameters())
        self.aim(self.prunable(), [min(min_keep, group.units) for group in groups])
        self.pool = Pool(self.graph, self.targets, self.tensors, removal)

    def prunable(self) -> list[int]:
        """Numbers of the groups that may lose units."""
        return list(range(len(self.whole.groups)))

    def standing(self) -> list[int]:
        """Units per group that are not leaving."""
        counts = [len(units) for units in self.kept]
        for number in self.targets:
            counts[number] = int((~self.pool.leaving(number)).sum())
        return counts

    def pick(self, scores: Sequence[Tensor], slack: float) -> list[Tensor]:
        """Which further units must leave, so that what stands costs at most the budget plus some slack.

        Args:
            scores: (units,) per group; higher = keep. Put on a common scale by the caller.
            slack: from 0, the budget, to 1, the dense model.
        Returns:
            (units,) bool per group, True = leave.
        """
        ranked = []
        for number, score in zip(self.targets, scores, strict=True):
            score = score.detach().float().cpu().clone()
            score[~self.pool.free(number, self.step)] = torch.finfo(score.dtype).max  # released not long ago
            score[self.pool.leaving(number)] = -torch.inf  # gone already, as far as budgets are concerned
            ranked.append(score)
        keep = self.choose(ranked, slack)
        for number, score in zip(self.targets, scores, strict=True):
            self.scores[number][self.kept[number]] = score.detach().float().cpu()
        return [~keep[number] & self.pool.free(number, self.step) for number in self.targets]

    def leave(self, chosen: Sequence[Tensor], lengths: Mapping[int, Tensor] | None = None) -> None:
        """Send units on their way."""
        for number, mask in zip(self.targets, chosen, strict=True):
            length = None if lengths is None else lengths[number]
            self.pool.start(number, mask, self.step, self.optimizer, length)

    def endings(self) -> Sequence[Ending]:
        return self.pool.endings

    def drop(self) -> None:
        """Cut out what is gone."""
        masks = [torch.ones(len(units), dtype=torch.bool) for units in self.kept]
        for number in self.targets:
            masks[number] = ~self.pool.gone(number)
        self.remove(masks)

    def remove(self, masks: Sequence[Tensor]) -> None:
        before = self.graph
        super().remove(masks)
        if self.graph is not before:
            self.pool.cut(self.graph, [mask.cpu() for mask in masks])

    def before_step(self) -> None:
        super().before_step()
        self.pool.observe()

    def advance(self) -> None:
        self.pool.advance(self.step, self.optimizer)

    def finish(self) -> Pruned:
        self.drop()
        return super().finish()

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"removal": asdict(self.removal)}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, facts = super().state()
        held, pool = self.pool.state()
        return tensors | {f"pool.{name}": t for name, t in held.items()}, facts | {"pool": pool}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        super().restore(tensors, facts)
        held = {n.removeprefix("pool."): t for n, t in tensors.items() if n.startswith("pool.")}
        self.pool.restore(self.graph, held, facts["pool"])


class Gradual(RemovalMethod):
    """Remove the lowest-scoring units in rounds, and train on in between.

    Args:
        model: trained or not; pruned in place.
        inputs: example inputs.
        budget: what the result may cost at most.
        steps: optimizer steps of the whole training.
        score: a name in `secateur.scores.SCORES`; those that need gradients see the training's own.
        rounds: how many; the cost falls by equal parts.
        start_share: share of the steps before the first round.
        prune_share: share of the steps by which the last cohort is gone.
        removal: how units go; must fit between two rounds.
        memory: of the moving average of scores that need gradients, 0..1.
        min_keep: units that every group keeps at least.
        seed: of random scores.
        freeze: module names or shell patterns that no cut may touch.
    Source: iterative pruning, for example Molchanov et al. 2017, arXiv:1611.06440; with decay, Yang et al.
        2024, arXiv:2406.03879.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        *,
        budget: Budget,
        steps: int,
        score: str = "l2",
        rounds: int = 10,
        start_share: float = 0.0,
        prune_share: float = 0.5,
        removal: Decay = INSTANT,
        memory: float = 0.9,
        min_keep: int = 1,
        seed: int = 0,
        freeze: Sequence[str] = (),
    ) -> None:
        if score not in SCORES:
            raise ScoreError(unknown("score", score, SCORES))
        if not (rounds >= 1 and 0 <= start_share < prune_share <= 1):
            raise SecateurError(
                f"{type(self).__name__}: rounds {rounds}, start_share {start_share:g}, prune_share {prune_share:g}; "
                f"expected at least one round and 0 <= start_share < prune_share <= 1"
            )
        super().__init__(
            model, inputs, budget=budget, steps=steps, removal=removal, min_keep=min_keep, freeze=freeze
        )
        self._options: dict[str, Any] = {
            "score": score,
            "rounds": rounds,
            "start_share": start_share,
            "prune_share": prune_share,
            "memory": memory,
            "min_keep": min_keep,
            "seed": seed,
        }
        first, last = max(1, round(start_share * steps)), round(prune_share * steps) - removal.steps + 1
        gap = (last - first) // max(1, rounds - 1) if rounds > 1 else removal.steps
        if last < first or gap < removal.steps:
            raise SecateurError(
                f"{type(self).__name__}: {rounds} rounds of {removal.steps} steps do not fit into steps {first} to "
                f"{round(prune_share * steps)}; use fewer rounds, a shorter removal, or a later prune_share"
            )
        self.when = [last - gap * (rounds - 1 - r) for r in range(rounds)]
        self.score, self.entry = score, SCORES[score]
        self._generator = torch.Generator().manual_seed(seed)
        self._seen = [torch.zeros(group.units) for group in self.whole.groups]
        self._now: list[Tensor] = []
        self._looks = 0

    def rank(self) -> list[Tensor]:
        """Scores of the units as they are now, (units,) per group, on a scale that groups share."""
        if self.entry.needs_data:
            found = [seen[kept] for seen, kept in zip(self._seen, self.kept, strict=True)]
        else:
            found = [
                self.entry.function(group_slices(group, self.tensors, {}), self._generator).detach().cpu()
                for group in self.graph.groups
            ]
        if self.entry.comparable:
            return [found[number] for number in self.targets]
        standing = [~self.pool.leaving(number) for number in self.targets]
        found = [found[number] for number in self.targets]
        return [
            s / s[mask].abs().mean().clamp_min(1e-30) if mask.any() else s
            for s, mask in zip(found, standing, strict=True)
        ]

    def before_step(self) -> None:
        super().before_step()
        self._now = []
        if self.entry.needs_data and self.step < self.when[-1]:
            grads = {name: p.grad for name, p in self.tensors.items() if p.grad is not None}
            self._now = [
                self.entry.function(group_slices(group, self.tensors, grads), self._generator).detach()
                for group in self.graph.groups
            ]

    def advance(self) -> None:
        memory = self._options["memory"] if self._looks else 0.0
        for now, seen, kept in zip(self._now, self._seen, self.kept, strict=False):
            seen[kept] = torch.lerp(now.float().cpu(), seen[kept], memory)
        self._looks += bool(self._now)
        super().advance()
        if self.step in self.when:
            number = self.when.index(self.step)
            ranked, gone = self.rank(), [self.pool.gone(n) for n in self.targets]
            self.drop()  # the cohort before this one
            ranked = [score[~mask.to(score.device)] for score, mask in zip(ranked, gone, strict=True)]
            rounds = self._options["rounds"]
            self.pool.rectifying = number < rounds - 1  # nobody could take the place of the last to be let go
            self.leave(self.pick(ranked, 1 - (number + 1) / rounds))
            self.note(self.standing())
        if self.step == self.when[-1] + self.removal.steps - 1:
            self.drop()

    def settings(self) -> dict[str, Any]:
        return super().settings() | self._options

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, facts = super().state()
        tensors |= {f"seen.{n}": seen for n, seen in enumerate(self._seen)}
        tensors["generator"] = self._generator.get_state()
        return tensors, facts | {"looks": self._looks}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        super().restore(tensors, facts)
        self._seen = [tensors[f"seen.{n}"].clone() for n in range(len(self._seen))]
        self._generator.set_state(tensors["generator"])
        self._looks = int(facts["looks"])
