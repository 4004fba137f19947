"""Removal in rounds: when they are, what one does, and scores that groups can be ranked by together."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from secateur.engine.session import Session
from secateur.errors import SecateurError
from secateur.scores.table import group_l2, group_slices


def plan_rounds(
    session: Session[Any], rounds: int, start_share: float, prune_share: float, each: int
) -> list[int]:
    """The steps after which units are chosen.

    Args:
        rounds: how many.
        start_share: share of the steps before the first round.
        prune_share: share of the steps by which the last cohort is gone.
        each: steps from choice to zero.
    Raises:
        SecateurError: they do not fit.
    """
    end = round(prune_share * session.steps)
    first, last = max(1, round(start_share * session.steps)), end - each + 1
    gap = (last - first) // max(1, rounds - 1) if rounds > 1 else each
    if last < first or gap < each:
        raise SecateurError(
            f"{session.name}: {rounds} rounds of {each} steps do not fit into steps {first} to {end}; use fewer "
            f"rounds, a shorter removal, or a later prune_share"
        )
    return [last - gap * (rounds - 1 - r) for r in range(rounds)]


def advance_rounds(
    session: Session[Any],
    when: Sequence[int],
    rank: Callable[[], list[Tensor]],
    pick: Callable[[Sequence[Tensor], float], list[Tensor]] | None = None,
) -> None:
    """In a round, cut out the cohort before it and choose the next, so that the cost falls by equal parts.

    Args:
        when: from `plan_rounds`.
        rank: scores of the units as they are now, (units,) per target group.
        pick: as `Session.pick`, which is the default.
    """
    if session.step in when:
        number = when.index(session.step)
        ranked, gone = rank(), [session.pool.gone(n) for n in session.targets]
        session.cut_gone()  # the cohort before this one
        ranked = [score[~mask.to(score.device)] for score, mask in zip(ranked, gone, strict=True)]
        session.pool.restoring = (
            number < len(when) - 1
        )  # nobody could take the place of the last to be restored
        session.remove((pick or session.pick)(ranked, 1 - (number + 1) / len(when)))
        session.note(session.standing())
    if session.step == when[-1] + session.pool.decay.steps - 1:
        session.cut_gone()


def importance(session: Session[Any], number: int, tensors: Mapping[str, Tensor]) -> Tensor:
    """DepGraph's importance of a group's units, (units,): of all weights that make or read a unit, in these tensors."""
    slices = group_slices(session.graph.groups[number], tensors, {})
    return group_l2(slices, torch.Generator()).detach()


def relative(session: Session[Any], scores: Sequence[Tensor], *, anchored: bool = True) -> list[Tensor]:
    """Scores on a scale that groups share, (units,) per target group: divided by their group's mean.

    Units that are leaving do not count. Without an anchor the mean is of those that are left, so a group that lost its
    lowest units looks worse than before and loses still more; anchored to the scores by which units were last chosen,
    those that are left keep their mean.
    """
    found = []
    for number, score in zip(session.targets, scores, strict=True):
        counts, level = ~session.pool.leaving(number), 1.0
        before = session.scores[number][session.kept[number]]
        if anchored and before.any():
            counts &= before.isfinite()
            level = float(before[counts].abs().mean())
        mean = score[counts.to(score.device)].abs().mean()
        found.append(score * (level / mean.clamp_min(1e-30)) if counts.any() else score)
    return found


def check_shares(method: object, start: float, end: float, name: str = "start_share") -> None:
    """Raise SecateurError unless pruning starts before it ends."""
    if start >= end:
        raise SecateurError(
            f"{type(method).__name__}: {name} is {start:g} and prune_share {end:g}; expected {name} below prune_share"
        )
