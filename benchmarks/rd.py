"""Rate-distortion pruning beside every baseline, without training and after an equal short one.

    python benchmarks/rd.py --weights WEIGHTS_FOLDER --data-dir cifar10 --out docs/results/rd.md

Every cell of the tables is a file in --runs; cells that are there are not measured again, so the command can be
stopped and goes on where it was. `--only weights20,channels` measures some tables; the page shows all there is.
"""

import argparse
import copy
import hashlib
import itertools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.allocate.knapsack import Problem, dp, hull, milp
from secateur.graph.replay import Program
from secateur.methods.rd import FAITHFUL, RDSettings, prune_weights
from secateur.recipes.data import Dataset, load_data
from secateur.recipes.models import build_model
from secateur.recipes.models.weights import load_weights, normalisation_for

NETWORKS = {
    "resnet20": "cifar10_resnet20_optA_akamaster.safetensors",
    "resnet32": "cifar10_resnet32_optA_akamaster.safetensors",
    "resnet56": "cifar10_resnet56_optA_akamaster.safetensors",
    "resnet20_b": "cifar10_resnet20_optB_chenyaofo.safetensors",
}
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
BASELINES = ("uniform", "global", "erk", "lamp")
IMAGES, BATCH, TEST_BATCH = 512, 64, 50
SEEDS = (0, 1, 2)


class Bench:
    """Cells in a folder; networks and data are loaded when the first cell needs them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.data: Dataset | None = None
        self.models: dict[str, tuple[nn.Module, Dataset]] = {}

    def cell(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """A cell's numbers: from its file, or measured now, or None if this table is not asked for."""
        path = self.options.runs / f"{name}.json"
        if path.exists():
            return json.loads(path.read_text())  # type: ignore[no-any-return]
        table = name.split(".")[0]
        if self.options.only and table not in self.options.only.split(",") or self.options.render:
            return None
        started = time.perf_counter()
        found = measure()
        found.setdefault("seconds", time.perf_counter() - started)
        path.write_text(json.dumps(found))
        print(
            time.strftime("%X"),
            name,
            {k: round(v, 4) for k, v in found.items() if isinstance(v, float)},
            flush=True,
        )
        return found

    def network(self, name: str) -> tuple[nn.Module, Dataset]:
        if self.data is None:
            self.data = load_data("cifar10", self.options.data_dir)
        if name not in self.models:
            path = self.options.weights / NETWORKS[name]
            model = build_model(name, classes=10)
            load_weights(model, path)
            normalisation = normalisation_for(path) or self.data.normalisation
            model = model.eval().to(memory_format=torch.channels_last)
            self.models = {name: (model, replace(self.data, normalisation=normalisation))}
        return self.models[name]

    def calibration(self, name: str, images: int = IMAGES) -> list[Tensor]:
        """A fixed part of the training images, balanced over the classes, without augmentation."""
        _, data = self.network(name)
        some = data.subset(train_images=images).train.images
        order = torch.randperm(len(some), generator=torch.Generator().manual_seed(0))
        return list(data.normalisation(some[order], torch.channels_last).split(BATCH))

    def noise(self, images: int = IMAGES) -> list[Tensor]:
        x = torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        return list(x.contiguous(memory_format=torch.channels_last).split(BATCH))


@torch.no_grad()
def accuracy(model: nn.Module, data: Dataset, precision: torch.dtype = torch.bfloat16) -> float:
    """On all test images."""
    right = 0
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        for start in range(0, len(data.test), TEST_BATCH):
            x = data.normalisation(data.test.images[start : start + TEST_BATCH], torch.channels_last)
            right += int((model(x).argmax(1) == data.test.labels[start : start + TEST_BATCH]).sum())
    return 100 * right / len(data.test)


def weight_cell(
    bench: Bench, network: str, sparsity: float, allocation: str, settings: RDSettings, noise: bool = False
) -> dict[str, Any]:
    model, data = bench.network(network)
    batches = bench.noise() if noise else bench.calibration(network)
    curves = None
    if allocation == "faithful":
        allocation, batches = "rd", batches[: len(batches) // 4]
    if allocation == "rd":
        relevant = repr(
            replace(settings, exponent=1.0, solver="hull", reduction="mean", steps=1, corrections=0)
        )
        digest = hashlib.sha256(f"{network} {noise} {relevant}".encode()).hexdigest()[:12]
        curves = bench.options.runs / f"curves-{network}-{digest}.safetensors"
    started = time.perf_counter()
    pruned = prune_weights(
        model, batches, sparsity=sparsity, allocation=allocation, settings=settings, curves=curves
    )
    seconds = time.perf_counter() - started
    return {
        "accuracy": accuracy(pruned.model, data),
        "distortion": pruned.measured,
        "kept": pruned.plan.kept / pruned.plan.weights,
        "seconds": seconds,
    }


COLUMNS = {
    "none": RDSettings(selection="magnitude", compensation="none"),
    "batch-norm": RDSettings(selection="magnitude", compensation="batch-norm"),
    "least-squares": RDSettings(selection="magnitude"),
    "chosen": RDSettings(),
}
"""What each allocation is given: plain magnitude masks; batch norms measured again; the remaining weights solved
again; and these, with weights chosen by least squares."""


def weights_table(bench: Bench, network: str) -> dict[tuple[str, str, float], dict[str, Any] | None]:
    """(allocation, column, sparsity) -> cell; the cells that matter most first."""
    cells: dict[tuple[str, str, float], dict[str, Any] | None] = {}

    def add(allocation: str, column: str, sparsity: float, settings: RDSettings) -> None:
        name = f"weights-{network}.{allocation}.{column}.{sparsity}"
        cells[allocation, column, sparsity] = bench.cell(
            name, lambda: weight_cell(bench, network, sparsity, allocation, settings)
        )

    for sparsity in SPARSITIES:
        add("rd", "chosen", sparsity, COLUMNS["chosen"])
    for column, sparsity in itertools.product(("least-squares", "batch-norm", "none"), SPARSITIES):
        for allocation in BASELINES:
            add(allocation, column, sparsity, COLUMNS[column])
    for sparsity in SPARSITIES:
        add("faithful", "none", sparsity, FAITHFUL)
    for allocation, sparsity in itertools.product(("global", "lamp", "erk", "uniform"), SPARSITIES):
        add(allocation, "chosen", sparsity, COLUMNS["chosen"])
    for column, sparsity in itertools.product(("none", "batch-norm", "least-squares"), SPARSITIES):
        add("rd", column, sparsity, COLUMNS[column])
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, required=True, help="folder of the published weights")
    parser.add_argument("--data-dir", type=Path, required=True, help="CIFAR-10")
    parser.add_argument("--runs", type=Path, default=Path("runs/rd"), help="where the cells go")
    parser.add_argument(
        "--only", help="tables to measure, separated by commas; all others are shown as they are"
    )
    parser.add_argument("--render", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, help="also write the page to this Markdown file")
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    bench = Bench(options)
    for network in ("resnet20", "resnet56", "resnet32"):
        weights_table(bench, network)


if __name__ == "__main__":
    main()
