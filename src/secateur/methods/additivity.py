"""Does the distortion of several layers pruned together equal the sum of each one's alone?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from secateur.errors import BudgetError
from secateur.graph.replay import Replay
from secateur.methods.rd.curves import Tick, joint, measure
from secateur.methods.rd.single_weights import RDSettings, passes, task_of


@dataclass(frozen=True)
class Additivity:
    """Predicted and measured distortion of random allocations at one budget.

    Attributes:
        sparsity: of all of them, at least.
        predicted: (draws,), the sum over layers of each layer's own mean distortion.
        measured: (draws,), with all layers pruned together.
    """

    sparsity: float
    predicted: tuple[float, ...]
    measured: tuple[float, ...]

    @property
    def rank_correlation(self) -> float:
        """Spearman's: 1 if the sum orders allocations as the measurement does."""
        a, b = (_ranks(np.array(values)) for values in (self.predicted, self.measured))
        a, b = a - a.mean(), b - b.mean()
        scale = float(np.sqrt((a @ a) * (b @ b)))
        return float(a @ b) / scale if scale else 0.0

    @property
    def ratio(self) -> float:
        """Median of measured over predicted: above 1, errors of different layers add to one another."""
        return float(np.median(np.array(self.measured) / np.maximum(self.predicted, 1e-30)))

    def to_json(self) -> dict[str, Any]:
        """The fields by name, with both figures."""
        return {**self.__dict__, "rank_correlation": self.rank_correlation, "ratio": self.ratio}


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Ranks from 0; equal values share the mean of theirs."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    first = np.cumsum(counts) - counts
    return np.asarray((first + (counts - 1) / 2)[group], dtype=np.float64)


@torch.no_grad()
def check_additivity(
    model: nn.Module,
    batches: Sequence[Tensor],
    *,
    sparsity: float,
    draws: int = 30,
    settings: RDSettings | None = None,
    seed: int = 0,
    tick: Tick | None = None,
) -> Additivity:
    """Draw random allocations at a budget and compare the sum of curves with what is measured.

    Args:
        model: one image tensor in, logits out; it is only read.
        batches: calibration images, (n, …) each.
        sparsity: share of the weights that goes.
        draws: how many allocations.
        settings: what a layer's levels are and how distortion is measured; see `RDSettings`.
        seed: of the draws.
        tick: is told (passes done, of how many) while curves are measured.
    Raises:
        BudgetError: the sparsity is out of reach of the measured levels.
    """
    settings = settings or RDSettings()
    program = Replay(model.eval(), batches[0])
    task = task_of(program, batches, sparsity, settings, tick=tick)
    kept, candidates = task.levels()
    images = measure(
        program, batches, candidates, distortion=settings.distortion, batched=passes(batches[0]), tick=tick
    )
    alone = [np.concatenate([[0.0], values.mean(1)]) for values in images]
    if task.total < sum(int(k[-1]) for k in kept):
        raise BudgetError(
            f"sparsity {sparsity:g}: the levels keep at least {sum(int(k[-1]) for k in kept):,} weights, "
            f"{task.total:,} are allowed; ask for less"
        )
    generator = np.random.default_rng(seed)
    predicted, measured = [], []
    for _ in range(draws):
        levels = drawn(kept, task.total, generator)
        tensors: dict[str, Tensor] = {}
        for candidate, level in zip(candidates, levels, strict=True):
            if level:
                tensors |= candidate[level - 1]
        predicted.append(sum(float(curve[level]) for curve, level in zip(alone, levels, strict=True)))
        measured.append(float(joint(program, batches, tensors, distortion=settings.distortion).mean()))
    return Additivity(sparsity, tuple(predicted), tuple(measured))


def drawn(kept: Sequence[npt.NDArray[np.int64]], total: int, generator: np.random.Generator) -> list[int]:
    """Random levels that keep at most `total` weights, and about that many.

    Layers draw how strongly they resist, and give up levels in turn, the least resistant first.
    """
    strength = generator.lognormal(0.0, 1.0, len(kept))
    levels = [0] * len(kept)
    left = sum(int(k[0]) for k in kept) - total
    while left > 0:
        cost = [
            (levels[i] + 1) / len(kept[i]) * strength[i] if levels[i] + 1 < len(kept[i]) else np.inf
            for i in range(len(kept))
        ]
        i = int(np.argmin(cost))
        left -= int(kept[i][levels[i]] - kept[i][levels[i] + 1])
        levels[i] += 1
    for i in generator.permutation(len(kept)).tolist():  # what the last step took too much goes back
        while levels[i] and int(kept[i][levels[i] - 1] - kept[i][levels[i]]) <= -left:
            left += int(kept[i][levels[i] - 1] - kept[i][levels[i]])
            levels[i] -= 1
    return levels
