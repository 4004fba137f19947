"""Reports as runs would give them, made up from a seed."""

import random
from dataclasses import replace
from typing import Any

from secateur.cost.latency import Latency
from secateur.report import (
    FrozenGroup,
    Group,
    LatencyPair,
    Report,
    Width,
)
from secateur.report.data import (
    Bin,
    Calibration,
    ChangedImage,
    ClassAccuracy,
    Ending,
    LayerCost,
    LayerCurve,
    OutputFile,
)


def latency(median_ms: float, runtime: str) -> Latency:
    return Latency(median_ms, 0.93 * median_ms, 1.21 * median_ms, 30, 1, 2, "AMD EPYC 9654", runtime)


def group(name: str, units: int, keep: float, rng: random.Random) -> Group:
    scores = [rng.lognormvariate(0, 0.5) for _ in range(units)]
    threshold = sorted(scores)[round((1 - keep) * units)] if keep < 1 else 0
    return Group(name, [score >= threshold for score in scores], scores)


def history() -> list[dict[str, Any]]:
    lines = []
    for phase, epochs, start, end in (("train", 20, 0.32, 0.917), ("finetune", 5, 0.895, 0.911)):
        for epoch in range(1, epochs + 1):
            accuracy = end - (end - start) * 0.8 ** (epoch - 1)
            lines.append(
                {
                    "phase": phase,
                    "epoch": epoch,
                    "step": 391 * epoch,
                    "loss": 2.2 * (1 - accuracy) + 0.04,
                    "train_accuracy": min(1.0, accuracy + 0.03 * epoch / epochs),
                    "accuracy": accuracy,
                    "lr": 0.1 * (1 - epoch / (epochs + 1)),
                    "seconds": 14.2,
                    "images_per_second": 3520.0,
                }
            )
    return lines


PICTURE = "data:image/png;base64," + (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)
"""One pixel."""


def answered() -> dict[str, Any]:
    """What became of the answers."""
    before = Calibration([Bin(0, 0.0, 0.0), Bin(40, 0.5, 0.6), Bin(60, 0.9, 0.85)])
    after = Calibration([Bin(4, 0.3, 0.5), Bin(36, 0.5, 0.4), Bin(60, 0.9, 0.8)])
    return {
        "classes": [
            ClassAccuracy("cat", 50, 0.9, 0.6, True),
            ClassAccuracy("dog", 50, 0.8, 0.82, False),
        ],
        "answers": {"lost": 16, "won": 2, "other": 3, "same": 79},
        "calibration": {"before": before, "after": after},
        "changed": [ChangedImage(7, "cat", "cat", "dog", 0.7, 0.8, PICTURE)],
    }


def resnet20() -> Report:
    """A small network with everything there is to tell."""
    rng = random.Random(0)
    widths, groups = [], []
    for stage, units in ((1, 16), (2, 32), (3, 64)):
        stream = group(f"layer{stage} residual stream", units, rng.uniform(0.6, 0.95), rng)
        groups.append(stream)
        for block in range(3):
            inner = group(f"layer{stage}.{block}.conv1", units, rng.uniform(0.25, 0.9), rng)
            groups.append(inner)
            widths.append(Width(f"layer{stage}.{block}.conv1", units, inner.kept))
            widths.append(Width(f"layer{stage}.{block}.conv2", units, stream.kept))
    return Report(
        model="resnet20",
        dataset="cifar10",
        method="taylor",
        budget={"macs": 0.5},
        seed=0,
        command="secateur prune resnet20 --data cifar10 --method taylor --macs 0.5 --epochs 5 --out run",
        before={"macs": 40_813_184, "params": 272_474},
        after={"macs": 20_398_720, "params": 141_882},
        accuracy_before=0.9173,
        accuracy_cut=0.7418,
        accuracy_after=0.911,
        verify_max_abs_error=2.3e-13,
        verify_rel_error_float32=1.1e-6,
        verify_rel_error_float64=4.1e-15,
        latency_pytorch=LatencyPair(latency(5.31, "pytorch"), latency(3.92, "pytorch")),
        latency_onnxruntime=LatencyPair(latency(1.87, "onnxruntime"), latency(1.11, "onnxruntime")),
        weights_bytes_before=1_113_296,
        weights_bytes_after=590_104,
        onnx_bytes_before=1_102_377,
        onnx_bytes_after=579_240,
        widths=widths,
        groups=groups,
        frozen=[
            FrozenGroup("fc", "its outputs are the model's outputs", 650, 640),
            FrozenGroup("conv1 (input channels)", "its inputs are the model's inputs", 432, 442_368),
        ],
        history=history(),
        layers=[
            LayerCost("conv1", 442_368, 442_368, 0.21, 0.2),
            LayerCost("layer1.0.conv1", 2_359_296, 1_032_192, 0.4, 0.25),
            LayerCost("BatchNorm2d (19×)", None, None, 0.6, 0.55),
            LayerCost("Identity (1×)", None, None, 0.01, None),
        ],
        **answered(),
        files=[OutputFile("model.safetensors", 590_104, "the pruned model")],
        loading=["import secateur as sc", "model = sc.load(dense, 'run/model.safetensors')"],
        repeat="secateur prune resnet20 --data cifar10 --method taylor --macs 0.5 --epochs 5 --out run-again",
        versions={
            "secateur": "0.1.0",
            "torch": "2.15.0",
            "python": "3.11.7",
            "platform": "Linux-6.1.0-x86_64-with-glibc2.36",
            "device": "AMD EPYC 9654 96-Core Processor",
            "threads": 2,
        },
    )


def faded() -> Report:
    """The same, pruned in four rounds while it was trained; units faded over ten steps, and some were restored."""
    report, rng = resnet20(), random.Random(2)
    names = [group.name for group in report.groups]
    history = [
        {
            "step": 50 * n,
            "units": {
                group.name: group.units - n * (group.units - group.kept) // 4 for group in report.groups
            },
            "layers": {group.name: 10_000 * (8 - n) // 8 for group in report.groups},
            "macs": 1 - 0.125 * n,
            "params": 1 - 0.12 * n,
        }
        for n in range(5)
    ]
    decays = []
    for n in range(40):
        start, restored = 50 * (n // 10), n % 8 == 7
        end = start + (6 if restored else 9)
        rate, length = rng.uniform(0.61, 1) if restored else rng.random(), 3.0 if restored else rng.random()
        decays.append(Ending(names[n % len(names)], n % 16, start, end, restored, rate, length))
    decays[0] = replace(decays[0], rate=None, length=None)
    above = {"rate": 0.6, "length": 2.5}
    return replace(report, method="gradual", pruning_history=history, decays=decays, restore_above=above)


def measured() -> Report:
    """The same, cut along distortion curves."""
    curves = [
        LayerCurve(group.name, [group.units, group.kept, 1], [0.0, 0.1 / group.kept, 2.0])
        for group in resnet20().groups
    ]
    return replace(
        resnet20(), method="rd", curves=curves, distortion_predicted=0.05, distortion_measured=0.04
    )


def deep() -> Report:
    """150 layers in 120 groups, no data: nothing was trained and no accuracy is known."""
    rng = random.Random(1)
    names = [f"features.denseblock{i // 38 + 1}.denselayer{i % 38 + 1}.conv{i % 2 + 1}" for i in range(150)]
    groups = [group(name, 32 * rng.choice([1, 2, 4, 8]), rng.uniform(0.2, 1), rng) for name in names[:120]]
    groups[7] = Group(groups[7].name, groups[7].mask, None)
    widths = [Width(g.name, g.units, g.kept) for g in groups] + [Width(n, 128, 128) for n in names[120:]]
    frozen = [
        FrozenGroup(name, "no rule for the operator torchvision.deform_conv2d", 147_456, 28_901_376)
        for name in names[120:]
    ]
    return Report(
        model="densenet_with_a_rather_long_name_150",
        method="l1",
        budget={"macs": 0.6, "latency_ms": 12},
        seed=3,
        command="secateur prune my_package.models:densenet_with_a_rather_long_name_150 --macs 0.6",
        before={"macs": 7_728_120_320, "params": 28_681_000},
        after={"macs": 4_611_022_848, "params": 17_003_511},
        verify_max_abs_error=3.1e-5,
        verify_rel_error_float32=2.0e-6,
        widths=widths,
        groups=groups,
        frozen=frozen,
        notes=["LayerNorm at norm0 takes its mean over the survivors only."],
    )
