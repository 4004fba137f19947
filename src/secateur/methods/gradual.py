"""Removal in rounds while the model trains: the classic loop, by any score."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from secateur.engine.decay import Decay
from secateur.engine.rounds import advance_rounds, check_shares, plan_rounds, relative
from secateur.engine.session import Session
from secateur.engine.state import UNSAVED
from secateur.engine.training_method import TrainingMethod
from secateur.scores import SCORES, score_named
from secateur.scores.table import ScoreFunction, group_slices
from secateur.settings import option, settings


@dataclass
class State:
    """What evolves.

    Attributes:
        when: the steps after which units are chosen.
        seen: (units at the start,) per group: moving averages of scores that need gradients.
        looks: how many steps they come from.
        now: the scores of this step, (units,) per group.
        generator: of random scores.
    """

    when: list[int] = field(metadata=UNSAVED)
    seen: list[Tensor]
    generator: torch.Generator
    looks: int = 0
    now: list[Tensor] = field(default_factory=list, metadata=UNSAVED)


@settings
class Gradual(TrainingMethod):
    """Remove the lowest-scoring units in rounds, and train on in between.

    In each round the units with the lowest scores of the whole network go as `removal` says, so many that the cost
    falls by equal parts from round to round. Scores that need gradients see the training's own:

        seen <- memory · seen + (1 - memory) · score(weights, gradients)      in every step

    Source: iterative pruning, for example Molchanov et al. 2017, arXiv:1611.06440; with decay, Yang et al.
        2024, arXiv:2406.03879.
    """

    name, summary = "gradual", "remove the lowest units in rounds while training"

    score: str | ScoreFunction = option("what ranks units", default="l2", choices=SCORES, custom=True)
    rounds: int = option("how many; the cost falls by equal parts", default=10, least=1)
    start_share: float = option("share of the steps before the first round", default=0.0, least=0, below=1)
    prune_share: float = option("share of the steps by which the last are gone", default=0.5, above=0, most=1)
    removal: Decay = option("how units go; must fit between two rounds", default=Decay())
    memory: float = option("of the average of scores with gradients", default=0.9, least=0, most=1)
    min_keep: int = option("units that every group keeps at least", default=1, least=1)
    seed: int = option("of random scores", default=0)

    def advance(self, session: Session[State]) -> None:
        """seen <- memory · seen + (1 - memory) · score; then the round, if there is one."""
        state = session.own
        memory = self.memory if state.looks else 0.0
        for now, seen, kept in zip(state.now, state.seen, session.kept, strict=False):
            seen[kept] = torch.lerp(now.float().cpu(), seen[kept], memory)
        state.looks += bool(state.now)
        advance_rounds(session, state.when, lambda: self.rank(session))

    def gradients(self, session: Session[State]) -> None:
        """Score with the gradients of this step."""
        state, needs_data = session.own, score_named(self.score).needs_data
        state.now = self.scores(session) if needs_data and session.step < state.when[-1] else []

    def scores(self, session: Session[State]) -> list[Tensor]:
        """Of the units as they are now, (units,) per group."""
        grads = {name: p.grad for name, p in session.tensors.items() if p.grad is not None}
        slices = (group_slices(group, session.tensors, grads) for group in session.graph.groups)
        return [score_named(self.score).function(s, session.own.generator).detach() for s in slices]

    def rank(self, session: Session[State]) -> list[Tensor]:
        """Scores on a scale that groups share, (units,) per group."""
        score = score_named(self.score)
        if score.needs_data:
            found = [seen[kept] for seen, kept in zip(session.own.seen, session.kept, strict=True)]
        else:
            found = [s.cpu() for s in self.scores(session)]
        return found if score.comparable else relative(session, found)

    def check(self) -> None:
        check_shares(self, self.start_share, self.prune_share)

    def prepare(self, session: Session[State]) -> State:
        session.aim(least=self.min_keep, removal=self.removal)
        when = plan_rounds(session, self.rounds, self.start_share, self.prune_share, self.removal.steps)
        seen = [torch.zeros(group.units) for group in session.whole.groups]
        return State(when, seen, torch.Generator().manual_seed(self.seed))
