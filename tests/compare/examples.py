"""What comparisons might give, made up from a seed."""

import dataclasses
import random
from typing import Any

from secateur.compare.results import Outcome, Results
from secateur.compare.words import MEASURES
from secateur.report import LatencyPair, Width
from tests.report.examples import latency, resnet20
from tests.report.test_report import HOSTILE


def outcome(arm: str, seed: int, accuracy: float | None, **more: Any) -> Outcome:
    """Of a run at half the MACs, unless told otherwise; costs by their names."""
    kept = {"macs": 0.5} | {measure: more.pop(measure) for measure in MEASURES if measure in more}
    return Outcome(
        **{"arm": arm, "seed": seed, "accuracy": accuracy, "budget": {"macs": 0.5}, "kept": kept} | more
    )


def timed(ms: float) -> LatencyPair:
    return LatencyPair(latency(2.0, "pytorch"), latency(ms, "pytorch"))


ARMS = {
    "rd": 0.0, "rd, not compensated": -0.3, "l2, one shot": -0.9, "l1, one shot": -1.0, "Taylor, one shot": -0.7,
    "batch-norm scale": -1.4, "uniform l2": -1.1, "gradual l2": -0.4, "DepGraph": -0.5, "OTOv2": -1.6, "HESSO": -1.2,
    "Gate Decorator": -0.8, "LAPP": -0.6, "PAAM": -1.9, "PreCrop, from scratch": -6.0, "Torch-Pruning l2": -1.0,
    "Torch-Pruning group norm": -0.9, "Torch-Pruning Taylor": -1.1,
    "torch.nn.utils.prune, global magnitude": 0.4,
}  # fmt: skip
"""Arm -> how far it is behind, in points; made up."""


def results() -> Results:
    """Nineteen arms at three budgets with three seeds, from weights; one arm over the budget, one cell failed."""
    rng = random.Random(0)
    outcomes = []
    for seed in (0, 1, 2):
        for place, (arm, behind) in enumerate(ARMS.items()):
            for keep in (0.7, 0.5, 0.3):
                if (arm, seed) == ("OTOv2", 2):
                    outcomes.append(
                        Outcome(arm=arm, budget={"macs": keep}, seed=seed, error="the loss is not finite")
                    )
                    continue
                accuracy = (
                    0.922 - 0.02 * (1 - keep) ** 2 + 0.01 * behind * (1 - keep) + 0.002 * rng.gauss(0, 1)
                )
                masked = arm.startswith("torch.nn")
                widths = [
                    Width(
                        w.layer, w.before, max(1, round(w.before * rng.uniform(keep / 2, min(1, keep + 0.3))))
                    )
                    for w in resnet20().widths
                ]
                ms = 5.3 * (1 if masked else 0.35 + 0.65 * keep) * (1 + 0.02 * place)
                outcomes.append(
                    Outcome(
                        arm=arm,
                        budget={"macs": keep},
                        seed=seed,
                        accuracy=accuracy,
                        accuracy_cut=0.9 * accuracy * keep**0.2,
                        accuracy_dense=0.926,
                        kept={
                            "macs": 1.0 if masked else keep - 0.001,
                            "params": keep if masked else keep * rng.uniform(0.8, 1.1),
                        },
                        epochs=5,
                        training_seconds=400.0 + 20 * place,
                        widths=widths,
                        latency=LatencyPair(latency(5.31, "pytorch"), latency(ms, "pytorch")),
                    )
                )
    return Results(
        model="resnet20_b",
        dataset="cifar10",
        training="5 epochs on from trained weights, 12,800 training images (schedule short)",
        seeds=(0, 1, 2),
        outcomes=outcomes,
        notes={
            "torch.nn.utils.prune, global magnitude": "weights are masked: fewer parameters, no fewer MACs"
        },
        command="secateur compare benchmarks/compare/compare.toml --weights resnet20_b.safetensors --out runs/main",
        versions=resnet20().versions,
    )


def hostile() -> Results:
    runs = [dataclasses.replace(o, arm=HOSTILE) if o.arm == "rd" else o for o in results().outcomes]
    report = dataclasses.replace(results(), outcomes=runs, notes={HOSTILE: HOSTILE}, command=HOSTILE)
    return dataclasses.replace(report, model=HOSTILE, dataset=HOSTILE)


def nothing_worked() -> Results:
    return dataclasses.replace(results(), outcomes=[outcome("a", 0, None, error="broke")], notes={})
