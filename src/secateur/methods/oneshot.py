"""Score, allocate, cut, prove: pruning a trained model in one step."""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

from torch import nn

from secateur.allocate import ALLOCATIONS, allocate
from secateur.cost import Budget, Cost
from secateur.cost.multiples import AUTO, ROUND_TO, ROUND_TO_HELP, choose_multiples
from secateur.engine.method import GRANULARITY_HELP, Context, Method, images_of, pairs_of
from secateur.engine.pruned import Pruned, cut_and_prove
from secateur.errors import ScoreError
from secateur.graph import Granularity, Inputs
from secateur.plan import Plan
from secateur.reconstruction.plans import COMPENSATIONS, compensated_copy
from secateur.scores import SCORES, score_groups, score_named
from secateur.settings import option, settings


@settings
class OneShot(Method):
    """Score every unit of a trained model once, and remove the lowest.

    Raises:
        CaptureError, BudgetError, ScoreError: see `analyze`, `allocate`, `score_groups`.
        CutError: the model's forward cannot run at other widths, or the result is not equal.
    Source: the common recipe, for example Li et al. 2017, arXiv:1608.08710; fine-tuning is left to the caller.

    >>> import torch
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3))
    >>> pruned = OneShot(score="l1").prune(model, torch.randn(1, 3, 8, 8), Budget(macs=0.5), Context())
    >>> pruned.before["macs"], pruned.after["macs"], pruned.model[0].out_channels
    (13536, 6768, 4)
    """

    name: ClassVar[str] = "oneshot"
    summary: ClassVar[str] = "score every unit of the trained model once, remove the lowest"

    score: str | Callable[..., Any] = option("which units matter", default="l2", choices=SCORES, custom=True)
    allocation: str | Callable[..., Any] = option(
        "how much goes from each group", default="global", choices=ALLOCATIONS, custom=True
    )
    granularity: Granularity = option(GRANULARITY_HELP, default="channels")
    attention: Literal["heads", "dims"] = option(
        "what attention loses: whole heads, or the same dims of every head", default="heads"
    )
    compensation: str = option(
        "what the remaining weights do, without training, on the data", default="none", choices=COMPENSATIONS
    )
    min_keep: int = option("units that every group keeps at least", default=1, least=1)
    round_to: int | str = option(ROUND_TO_HELP, default=AUTO, choices=ROUND_TO, least=1)
    seed: int = option("of random scores and of the images for the proof", default=0, least=0)

    @property
    def needs_data(self) -> bool:
        return score_named(self.score).needs_data or self.compensation != "none"

    def prune(self, model: nn.Module, inputs: Inputs, budget: Budget, context: Context) -> Pruned:
        data = None if context.data is None else list(context.data)
        if data is None and self.compensation != "none":
            raise ScoreError(f"compensation {self.compensation!r} needs data: pass data=, batches of images")
        graph = context.graph or self.analyze(model, inputs)
        scores = score_groups(
            model,
            graph,
            self.score,
            seed=self.seed,
            data=None if data is None else pairs_of(data),
            loss=context.loss,
        )
        cost = Cost(graph)
        multiples = choose_multiples(
            model, graph, self.round_to, partial(cost.within, cost.limits(budget)), min_keep=self.min_keep
        )
        masks = allocate(
            scores,
            cost,
            budget,
            self.allocation,
            relative=not score_named(self.score).comparable,
            min_keep=self.min_keep,
            round_to=multiples.units,
        )
        plan = Plan.of(graph, masks, self.record() | multiples.record(graph) | {"budget": budget.given})
        if data is not None and self.compensation != "none":
            model = compensated_copy(model, graph, plan, images_of(data), self.compensation)
        return cut_and_prove(model, graph, plan, scores, seed=self.seed, prove=context.prove)
