"""Does the distortion of several layers pruned together equal the sum of each one's alone?

python benchmarks/additivity.py --model resnet20 --weights resnet20.safetensors --data cifar10 --data-dir cifar10
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from secateur import Budget
from secateur.engine.method import Context
from secateur.errors import BudgetError
from secateur.methods.rd import RDWeights
from secateur.methods.rd.curves import joint, measure
from secateur.methods.rd.single_weights import passes
from secateur.runs.config import Task
from secateur.runs.task import load_task


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
        return float(spearmanr(self.predicted, self.measured).statistic)

    @property
    def ratio(self) -> float:
        """Median of measured over predicted: above 1, errors of different layers add to one another."""
        return float(np.median(np.array(self.measured) / np.maximum(self.predicted, 1e-30)))

    def to_json(self) -> dict[str, Any]:
        """The fields by name, with both figures."""
        return {**asdict(self), "rank_correlation": self.rank_correlation, "ratio": self.ratio}


@torch.no_grad()
def check_additivity(
    model: nn.Module,
    batches: Sequence[Tensor],
    *,
    sparsity: float,
    draws: int = 30,
    method: RDWeights | None = None,
    seed: int = 0,
) -> Additivity:
    """Draw random allocations at a budget and compare the sum of curves with what is measured.

    Args:
        model: one image tensor in, logits out; it is only read.
        batches: calibration images, (n, …) each.
        sparsity: share of the weights that goes.
        draws: how many allocations.
        method: what a layer's levels are and how distortion is measured.
        seed: of the draws.
    Raises:
        BudgetError: the sparsity is out of reach of the measured levels.
    """
    method = method or RDWeights()
    budget = Budget(units=round(1 - sparsity, 9))
    task = method.task(model.eval(), batches[0][:2], budget, Context(batches))
    kept, candidates = task.levels(method)
    images = measure(
        task.program, batches, candidates, distortion=method.distortion, batched=passes(task.program)
    )
    alone = [np.concatenate([[0.0], values.mean(1)]) for values in images]
    if task.total < (least := sum(int(k[-1]) for k in kept)):
        raise BudgetError(
            f"sparsity {sparsity:g}: the levels keep at least {least:,} weights, {task.total:,} are allowed; ask for "
            f"less"
        )
    generator = np.random.default_rng(seed)
    predicted, measured = [], []
    for _ in range(draws):
        levels = draw_levels(kept, task.total, generator)
        tensors: dict[str, Tensor] = {}
        for candidate, level in zip(candidates, levels, strict=True):
            if level:
                tensors |= candidate[level - 1]
        predicted.append(sum(float(curve[level]) for curve, level in zip(alone, levels, strict=True)))
        measured.append(float(joint(task.program, batches, tensors, distortion=method.distortion).mean()))
    return Additivity(sparsity, tuple(predicted), tuple(measured))


def draw_levels(
    kept: Sequence[npt.NDArray[np.int64]], total: int, generator: np.random.Generator
) -> list[int]:
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


def main() -> None:
    """Print what was found as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--draws", type=int, default=30)
    parser.add_argument("--compensation", default="least-squares")
    parser.add_argument("--images", type=int, default=512)
    given = parser.parse_args()
    task = load_task(Task(model=given.model, weights=given.weights, data=given.data, data_dir=given.data_dir))
    batches = [x for x, _ in task.batches(given.images, shuffle=True)]
    method = RDWeights(compensation=given.compensation)
    found = check_additivity(task.model, batches, sparsity=given.sparsity, draws=given.draws, method=method)
    print(json.dumps(found.to_json(), indent=2))


if __name__ == "__main__":
    main()
