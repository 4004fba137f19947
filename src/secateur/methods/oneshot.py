"""Score, allocate, cut, verify: pruning a trained model in one step."""

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor, nn

from secateur.allocate import allocate
from secateur.cost import Budget, Cost
from secateur.engine.pruned import Pruned, cut_and_prove
from secateur.graph import Inputs, analyze
from secateur.plan import Plan
from secateur.scores import SCORES, score_groups


def oneshot(
    model: nn.Module,
    inputs: Inputs,
    budget: Budget,
    *,
    score: str = "l2",
    allocation: str = "global",
    data: Iterable[tuple[Tensor, Tensor]] | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
    freeze: Sequence[str] = (),
    attention: str = "heads",
    min_keep: int = 1,
    round_to: int = 1,
    seed: int = 0,
) -> Pruned:
    """Prune a copy of a trained model to a budget, and prove that the cut is right.

    Args:
        model: any vision network; it is only read.
        inputs: example inputs, such as torch.randn(1, 3, 224, 224).
        budget: what the result may cost at most; it lands within one unit below.
        score: a name in `secateur.scores.SCORES`.
        allocation: a name in `secateur.allocate.ALLOCATIONS`.
        data: (inputs, targets) batches, for scores that need gradients.
        loss: of (outputs, targets), a mean over the batch.
        freeze: module names or shell patterns that no cut may touch.
        attention: what attention loses: whole "heads", or the same "dims" of every head.
        min_keep: units that every group keeps at least.
        round_to: kept units per group are a multiple of this, or all of them.
        seed: for random scores and verification.
    Raises:
        CaptureError, BudgetError, ScoreError: see `analyze`, `allocate`, `score_groups`.
        CutError: the model's forward cannot run at other widths, or the result is not equal.
    Source: the common recipe, for example Li et al. 2017, arXiv:1608.08710; fine-tuning is left to the caller.

    >>> import torch
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3))
    >>> pruned = oneshot(model, torch.randn(1, 3, 8, 8), Budget(macs=0.5))
    >>> pruned.before["macs"], pruned.after["macs"], pruned.model[0].out_channels
    (13536, 6768, 4)
    """
    graph = analyze(model, inputs, freeze=freeze, attention=attention)
    scores = score_groups(model, graph, score, seed=seed, data=data, loss=loss)
    cost = Cost(graph)
    relative = not SCORES[score].comparable
    masks = allocate(
        scores, cost, budget, allocation, relative=relative, min_keep=min_keep, round_to=round_to
    )
    origin = {
        "method": "oneshot",
        "score": score,
        "allocation": allocation,
        "budget": budget.given,
        "freeze": list(freeze),
        "attention": attention,
        "min_keep": min_keep,
        "round_to": round_to,
        "seed": seed,
    }
    plan = Plan.of(graph, masks, origin)
    return cut_and_prove(model, graph, plan, scores, seed=seed)
