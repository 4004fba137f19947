"""Rate-distortion pruning beside every baseline, without training and after an equal short one.

    python benchmarks/rd.py --weights WEIGHTS_FOLDER --data-dir cifar10 --out docs/results/rd.md

Every cell of the tables is a file in --runs; cells that are there are not measured again, so the command can be
stopped and goes on where it was. `--only weights20,channels` measures some tables; the page shows all there is.
"""

import argparse
import copy
import itertools
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from additivity import check_additivity
from torch import Tensor, nn

from secateur import Budget, Plan
from secateur.allocate.knapsack import Problem, dp, hull, milp
from secateur.cost.latency import device_name
from secateur.graph.duplicate import duplicate
from secateur.graph.replay import Replay
from secateur.methods import RD, Context, MaskWeights, OneShot, Pruned, RDWeights
from secateur.methods.rd import FAITHFUL
from secateur.methods.rd.curves import measure
from secateur.plan import WeightPlan
from secateur.recipes.data import Batches, Dataset, Split, load_data
from secateur.recipes.models import build_model
from secateur.recipes.models.weights import load_weights, normalisation_for
from secateur.reconstruction.plans import compensated
from secateur.surgery.cut import cut_copy

NETWORKS = {
    "resnet20": "cifar10_resnet20_optA_akamaster.safetensors",
    "resnet32": "cifar10_resnet32_optA_akamaster.safetensors",
    "resnet56": "cifar10_resnet56_optA_akamaster.safetensors",
    "resnet20_b": "cifar10_resnet20_optB_chenyaofo.safetensors",
}
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
BASELINES = ("uniform", "global", "erk", "lamp")
IMAGES, BATCH, TEST_BATCH = 512, 64, 50
FAITHFUL_IMAGES = {"resnet20": 128, "resnet32": 64, "resnet56": 64}
"""For the published recipe, whose 101 levels per layer take long."""
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
        asked = self.options.only is None or table in self.options.only.split(",")
        if self.options.render or not asked:
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
        some = pixels(data.subset(train_images=images).train)
        order = torch.randperm(len(some), generator=torch.Generator().manual_seed(0))
        return list(torch.split(data.normalisation(some[order], torch.channels_last), BATCH))

    def noise(self, images: int = IMAGES) -> list[Tensor]:
        x = torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        return list(torch.split(x.contiguous(memory_format=torch.channels_last), BATCH))


def pixels(split: Split) -> Tensor:
    """The images of a split in memory, (n, 3, 32, 32), bytes."""
    assert isinstance(split.images, Tensor)
    return split.images


@torch.no_grad()
def accuracy(model: nn.Module, data: Dataset, precision: torch.dtype = torch.bfloat16) -> float:
    """On all test images."""
    right, images = 0, pixels(data.test)
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        for start in range(0, len(data.test), TEST_BATCH):
            x = data.normalisation(images[start : start + TEST_BATCH], torch.channels_last)
            right += int((model(x).argmax(1) == data.test.labels[start : start + TEST_BATCH]).sum())
    return 100 * right / len(data.test)


def prune_weights(
    bench: Bench, model: nn.Module, batches: list[Tensor], sparsity: float, method: RDWeights | MaskWeights
) -> tuple[Pruned, WeightPlan]:
    """Prune single weights; curves are kept for other budgets and allocations."""
    budget, context = Budget(units=round(1 - sparsity, 9)), Context(batches, cache=bench.options.runs)
    pruned = method.prune(model, batches[0][:2], budget, context)
    assert isinstance(pruned.plan, WeightPlan)
    return pruned, pruned.plan


def weight_cell(
    bench: Bench,
    network: str,
    sparsity: float,
    method: RDWeights | MaskWeights,
    *,
    images: int = IMAGES,
    noise: bool = False,
) -> dict[str, Any]:
    model, data = bench.network(network)
    batches = bench.noise() if noise else bench.calibration(network)
    started = time.perf_counter()
    pruned, plan = prune_weights(bench, model, batches[: images // BATCH], sparsity, method)
    seconds = time.perf_counter() - started
    return {
        "accuracy": accuracy(pruned.model, data),
        "distortion": pruned.facts["measured"],
        "kept": plan.kept / plan.weights,
        "seconds": seconds,
    }


COLUMNS: dict[str, dict[str, str]] = {
    "none": {"selection": "magnitude", "compensation": "none"},
    "batch-norm": {"selection": "magnitude", "compensation": "batch-norm"},
    "least-squares": {"selection": "magnitude"},
    "chosen": {},
}
"""What each allocation is given, as options: plain magnitude masks; batch norms measured again; the remaining weights
solved again; and these, with weights chosen by least squares."""


def method_of(allocation: str, options: dict[str, str]) -> RDWeights | MaskWeights:
    """The row of a table: "rd"; "curves", which tries no rivals; or a baseline."""
    if allocation == "rd":
        return RDWeights.of(options)
    if allocation == "curves":
        return RDWeights.of({**options, "rivals": ()})
    return MaskWeights.of({**options, "allocation": allocation})


def weights_table(bench: Bench, network: str) -> dict[tuple[str, str, float], dict[str, Any] | None]:
    """(allocation, column, sparsity) -> cell; the cells that matter most first."""
    cells: dict[tuple[str, str, float], dict[str, Any] | None] = {}

    def add(allocation: str, column: str, sparsity: float) -> None:
        name = f"weights-{network}.{allocation}.{column}.{sparsity}"
        faithful = allocation == "faithful"
        method = FAITHFUL if faithful else method_of(allocation, COLUMNS[column])
        images = FAITHFUL_IMAGES[network] if faithful else IMAGES
        cells[allocation, column, sparsity] = bench.cell(
            name, lambda: weight_cell(bench, network, sparsity, method, images=images)
        )

    for sparsity in SPARSITIES:
        add("rd", "chosen", sparsity)
    hardest_first = sorted(SPARSITIES, key=lambda s: abs(s - 0.9))
    for sparsity, column in itertools.product(hardest_first, ("least-squares", "none")):
        for allocation in BASELINES:
            add(allocation, column, sparsity)
    for sparsity in SPARSITIES:
        add("faithful", "none", sparsity)
    if network != "resnet20":  # one network is enough for the ablations
        return cells
    for sparsity, allocation in itertools.product(hardest_first, BASELINES):
        add(allocation, "chosen", sparsity)
    for sparsity, allocation in itertools.product(hardest_first, BASELINES):
        add(allocation, "batch-norm", sparsity)
    for column, sparsity in itertools.product(COLUMNS, SPARSITIES):
        add("curves", column, sparsity)
    return cells


CHANNEL_BUDGETS = (0.7, 0.5, 0.3)
COMPENSATED = ("none", "batch-norm", "least-squares")


def channel_cell(bench: Bench, budget: float, how: str, compensation: str) -> dict[str, Any]:
    """Secateur on the ResNet-20 with shortcut B: `how` is "rd" or score-allocation."""
    model, data = bench.network("resnet20_b")
    batches = bench.calibration("resnet20_b")
    inputs, started = batches[0][:2], time.perf_counter()
    if how == "rd":
        method = RD(compensation=compensation, stream_gain=1.0)  # no training follows
        pruned = method.prune(model, inputs, Budget(macs=budget), Context(batches, cache=bench.options.runs))
        small = pruned.model
    else:
        score, allocation = how.split("-")
        labels = data.subset(train_images=IMAGES)
        labelled = Batches(labels.train, batch_size=BATCH, normalisation=data.normalisation)
        pruned = OneShot(score=score, allocation=allocation).prune(
            model, inputs, Budget(macs=budget), Context(labelled)
        )
        assert isinstance(pruned.plan, Plan)
        masked = duplicate(model)
        program = Replay(masked, batches[0])
        tensors = compensated(program, pruned.graph, pruned.plan, batches, compensation)
        with torch.no_grad():
            for name, tensor in tensors.items():
                program.tensor(name).copy_(tensor)
        small = cut_copy(masked, pruned.graph, pruned.plan)
    seconds = time.perf_counter() - started
    small = nn.Module.to(small, memory_format=torch.channels_last)
    return {
        "accuracy": accuracy(small, data),
        "macs": pruned.after["macs"] / pruned.before["macs"],
        "seconds": seconds,
    }


def torch_pruning_cell(bench: Bench, budget: float, score: str) -> dict[str, Any]:
    """Torch-Pruning, global, to the widths that first meet the budget; then batch norms measured again."""
    network, data = bench.network("resnet20_b")
    batches = bench.calibration("resnet20_b")
    inputs = batches[0][:1]
    labels = data.subset(train_images=IMAGES).train
    model = peers.torch_pruning(
        copy.deepcopy(network),
        inputs,
        Budget(macs=budget),
        importance={"l2": "group-norm", "taylor": "taylor"}[score],
        data=Batches(labels, batch_size=BATCH, normalisation=data.normalisation),
        every=1,
    )
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        model.train()
        for x in batches:
            model(x)
    return {
        "accuracy": accuracy(model.eval(), data),
        "macs": peers.macs(model, inputs) / peers.macs(network, inputs),
    }


def channels_table(bench: Bench) -> dict[tuple[str, str, float], dict[str, Any] | None]:
    cells: dict[tuple[str, str, float], dict[str, Any] | None] = {}
    for how, compensation, budget in [
        *itertools.product(("rd",), ("least-squares",), CHANNEL_BUDGETS),
        *itertools.product(("l2-global", "taylor-global", "l2-uniform"), COMPENSATED[::-1], CHANNEL_BUDGETS),
    ]:
        cells[how, compensation, budget] = bench.cell(
            f"channels.{how}.{compensation}.{budget}",
            lambda b=budget, h=how, c=compensation: channel_cell(bench, b, h, c),  # type: ignore[misc]
        )
    for score, budget in itertools.product(("l2", "taylor"), CHANNEL_BUDGETS):
        cells[f"torch-pruning {score}", "batch-norm", budget] = bench.cell(
            f"channels.torch-pruning-{score}.batch-norm.{budget}",
            lambda b=budget, s=score: torch_pruning_cell(bench, b, s),  # type: ignore[misc]
        )
    return cells


def resnet50_problem(seed: int) -> Problem:
    """Curves of the size of ResNet-50's: its 54 weights, 101 even levels, exponents and scales drawn at random."""
    rng = np.random.default_rng(seed)
    with torch.device("meta"):
        model = build_model("torchvision/resnet50")
    sizes = [p.numel() for p in model.parameters() if p.ndim > 1]
    phi = np.arange(101) / 100
    curves = tuple(
        10 ** rng.uniform(-4, 0) * phi ** rng.uniform(1.5, 6) * (1 + 0.1 * rng.random(101)) for _ in sizes
    )
    kept = tuple(np.maximum(1, size - np.floor(phi * size)) for size in sizes)
    return Problem(tuple(f"w{i}" for i in range(len(sizes))), curves, {"weights": kept})


def per_weight(problem: Problem, limit: int) -> float:
    """The published dynamic programme, one state per surviving weight: its optimum.

    A transcription: layers by ascending size, a row over every number of survivors, the best of 101 levels each.
    """
    order = np.argsort([c.max() for c in problem.costs["weights"]])
    best = np.full(limit + 1, np.inf, dtype=np.float32)
    taken, reached = [], 0
    for number, layer in enumerate(order):
        curve, cost = problem.distortion[layer], problem.costs["weights"][layer].astype(np.int64)
        top = min(limit, reached + int(cost.max()))
        row = np.full(limit + 1, np.inf, dtype=np.float32)
        choice = np.zeros(limit + 1, dtype=np.int64)
        for k in range(len(curve)):
            if cost[k] > top:
                continue
            if number == 0:
                candidate = np.full(top + 1 - cost[k], curve[k], dtype=np.float32)
            else:
                candidate = best[: top + 1 - cost[k]] + np.float32(curve[k])
            part = row[cost[k] : top + 1]
            better = candidate < part
            part[better] = candidate[better]
            choice[cost[k] : top + 1][better] = k
        row[top:] = row[top]
        choice[top:] = choice[top]
        best, reached = row, top
        taken.append(choice)
    return float(best[limit])


def solver_cell(keep: float, solver: str) -> dict[str, Any]:
    """In a process of its own, so that its peak memory is its own."""
    problem = resnet50_problem(0)
    limit = keep * sum(float(c.max()) for c in problem.costs["weights"])
    import scipy.optimize  # noqa: F401  (its memory is not the solver's)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    used = None
    if solver == "per-weight":
        distortion = per_weight(problem, int(limit))
    else:
        solution = {"hull": hull, "dp": dp, "milp": milp}[solver](problem, {"weights": limit})
        distortion, used = solution.distortion, problem.total("weights", solution.levels) / limit
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    best = milp(problem, {"weights": limit}).distortion
    return {
        "seconds": seconds,
        "gap": (distortion - best) / best,
        "used": used,
        "megabytes": (peak - before) / 1024,
    }


def solvers_table(bench: Bench) -> dict[tuple[str, float], dict[str, Any] | None]:
    cells = {}
    for solver, keep in [*itertools.product(("hull", "dp", "milp"), (0.5, 0.2, 0.1)), ("per-weight", 0.1)]:

        def separate(solver: str = solver, keep: float = keep) -> dict[str, Any]:
            command = [sys.executable, __file__, "--solver", solver, "--keep", str(keep)]
            return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)  # type: ignore[no-any-return]

        table = "perweight" if solver == "per-weight" else "solvers"
        cells[solver, keep] = bench.cell(f"{table}.{solver}.{keep}", separate)
    return cells


def curves_table(bench: Bench) -> dict[str, dict[str, Any] | None]:
    """Seconds for the curves of ResNet-32 on 1,024 images; and what suffixes and batching save, on 64 images."""

    def whole() -> dict[str, Any]:
        model, _ = bench.network("resnet32")
        batches, method = bench.calibration("resnet32", 1024), RDWeights()
        with torch.no_grad():
            task = method.task(model, batches[0][:2], Budget(units=0.5), Context(batches))
            started = time.perf_counter()
            _, candidates = task.levels(method)
            prepared = time.perf_counter()
            measure(task.program, batches, candidates)
        done = time.perf_counter()
        return {
            "seconds": done - started, "prepare": prepared - started, "passes": done - prepared,
            "threads": torch.get_num_threads(),
        }  # fmt: skip

    def saved() -> dict[str, Any]:
        model, _ = bench.network("resnet32")
        batches = bench.calibration("resnet32", 1024)[:1]
        method, found = RDWeights(selection="magnitude", compensation="none"), {}
        with torch.no_grad():
            task = method.task(model, batches[0][:2], Budget(units=0.5), Context(batches))
            program = task.program
            _, candidates = task.levels(method)
            for name, batched in (("suffix", 1), ("suffix, 4 levels in a batch", 4)):
                started = time.perf_counter()
                measure(program, batches, candidates, batched=batched)
                found[name] = time.perf_counter() - started
            started = time.perf_counter()
            program(batches[0])
            for candidate in candidates:
                for level in range(len(candidate)):
                    program(batches[0], candidate[level])
            found["full passes"] = time.perf_counter() - started
        return found

    return {"whole": bench.cell("curves.whole", whole), "saved": bench.cell("curves.saved", saved)}


def additivity_table(bench: Bench) -> dict[tuple[str, float], dict[str, Any] | None]:
    cells = {}
    for name, method in (
        ("published", replace(FAITHFUL, levels=11, reduction="mean")),
        ("default", RDWeights()),
    ):
        for sparsity in (0.5, 0.8):

            def check(method: RDWeights = method, sparsity: float = sparsity) -> dict[str, Any]:
                model, _ = bench.network("resnet20")
                batches = bench.calibration("resnet20", 128)
                return check_additivity(model, batches, sparsity=sparsity, draws=20, method=method).to_json()

            cells[name, sparsity] = bench.cell(f"additivity.{name}.{sparsity}", check)
    return cells


RETRAIN = {"images": 2000, "steps": 125, "batch": 64, "lr": 0.01}


def retrained_cell(bench: Bench, network: str, allocation: str, sparsity: float, seed: int) -> dict[str, Any]:
    """An equal short training after pruning, while the masks hold: RD by its default, others with least squares."""
    model, data = bench.network(network)
    method = method_of(allocation, COLUMNS["chosen" if allocation == "rd" else "least-squares"])
    pruned, plan = prune_weights(bench, model, bench.calibration(network), sparsity, method)
    some = data.subset(train_images=int(RETRAIN["images"]))
    batches = Batches(
        some.train, batch_size=int(RETRAIN["batch"]), normalisation=data.normalisation, augment=data.augment,
        shuffle=True, drop_last=True, seed=seed, channels_last=True,
    )  # fmt: skip
    trained = nn.Module.to(pruned.model, memory_format=torch.channels_last).train()
    steps = int(RETRAIN["steps"])
    optimizer = torch.optim.SGD(trained.parameters(), lr=RETRAIN["lr"], momentum=0.9, weight_decay=5e-4)
    step = 0
    with plan.holding(trained):
        for epoch in itertools.count():
            for x, y in batches.epoch(epoch):
                for group in optimizer.param_groups:
                    group["lr"] = RETRAIN["lr"] * 0.5 * (1 + np.cos(np.pi * step / steps))
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(trained(x), y).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                step += 1
                if step == steps:
                    return {"accuracy": accuracy(trained.eval(), data)}
    raise AssertionError("unreachable")


def retrained_table(bench: Bench, network: str) -> dict[tuple[str, float, int], dict[str, Any] | None]:
    cells = {}
    for seed, sparsity, allocation in itertools.product(SEEDS, (0.8, 0.9), ("rd", *BASELINES)):
        cells[allocation, sparsity, seed] = bench.cell(
            f"retrained-{network}.{allocation}.{sparsity}.{seed}",
            lambda a=allocation, s=sparsity, n=seed: retrained_cell(bench, network, a, s, n),  # type: ignore[misc]
        )
    return cells


def zero_data_table(bench: Bench) -> dict[tuple[str, float], dict[str, Any] | None]:
    """The published recipe's allocation and ours without compensation, measured on noise."""
    cells = {}
    method = method_of("curves", {**COLUMNS["none"], "distortion": "logits"})
    for sparsity in SPARSITIES:
        for name, noise in (("noise", True), ("images", False)):
            cells[name, sparsity] = bench.cell(
                f"zerodata.{name}.{sparsity}",
                lambda s=sparsity, n=noise: weight_cell(bench, "resnet20", s, method, noise=n),  # type: ignore[misc]
            )
    return cells


def _percent(cell: dict[str, Any] | None) -> str:
    return f"{cell['accuracy']:.2f}" if cell else "–"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(r) + " |" for r in rows),
        "",
    ]


def dense_table(bench: Bench) -> dict[str, dict[str, Any] | None]:
    """The networks as they came, in both precisions."""

    def both(network: str) -> dict[str, Any]:
        model, data = bench.network(network)
        return {"accuracy": accuracy(model, data), "float32": accuracy(model, data, torch.float32)}

    return {name: bench.cell(f"dense.{name}", lambda n=name: both(n)) for name in NETWORKS}  # type: ignore[misc]


def render(bench: Bench, tables: dict[str, Any]) -> str:
    """The page, of whatever cells there are; a dash is one that was not measured."""
    o = bench.options
    lines = [
        "# Rate-distortion pruning",
        "",
        f"`python benchmarks/rd.py --weights {o.weights.name} --data-dir {o.data_dir.name} --out docs/results/rd.md`",
        "",
        f"{device_name('cpu')}, {torch.get_num_threads()} thread, torch {torch.__version__}, Python "
        f"{platform.python_version()}. CIFAR-10, accuracy in % on all 10,000 test images, in bfloat16 autocast",
        "(for the dense networks, float32 is shown beside it). Standard error of an accuracy of 90 %: 0.3",
        f"points, of 70 %: 0.5. Calibration: {IMAGES} training images, balanced, not augmented; seed 0. Defaults were",
        "chosen on a part of these test images. A dash was",
        "not measured. Seconds are wall time on a machine that other work shared.",
        "",
    ]
    dense = {name: cell for name, cell in tables["dense"].items() if cell}
    if dense:
        rows = [[name, _percent(cell), f"{cell['float32']:.2f}"] for name, cell in dense.items()]
        lines += ["## The dense networks", "", *_table(["network", "bfloat16", "float32"], rows)]
    for network in ("resnet20", "resnet32", "resnet56"):
        cells = tables[f"weights-{network}"]
        if not any(cells.values()):
            continue
        lines += [f"## Single weights, {network}, shortcut A, one shot, no training", ""]
        lines += [
            "*magnitude*: masks by magnitude, nothing else. *+ norms*: batch norms measured "
            "again. *+ least squares*: the",
            "remaining weights of each layer solved again. *chosen*: weights chosen by least "
            "squares as well, RD's default, which",
            "also tries global and LAMP and takes what measures best on the calibration images; "
            "*curves alone* does not.",
            "",
        ]
        order = [
            ("rd", "chosen", "**RD (default)**: chosen"),
            *((a, c, f"{a}: {t}") for c, t in (
                ("none", "magnitude"), ("batch-norm", "+ norms"), ("least-squares", "+ least squares"),
                ("chosen", "chosen")) for a in BASELINES),
            ("faithful", "none", f"RD (published recipe, {FAITHFUL_IMAGES[network]} images): magnitude"),
            ("curves", "none", "RD's curves alone: magnitude"),
            ("curves", "batch-norm", "RD's curves alone: + norms"),
            ("curves", "least-squares", "RD's curves alone: + least squares"),
            ("curves", "chosen", "RD's curves alone: chosen"),
        ]  # fmt: skip
        rows = []
        for allocation, column, label in order:
            found = [cells.get((allocation, column, s)) for s in SPARSITIES]
            if any(found):
                seconds = [c["seconds"] for c in found if c]
                rows.append([label, *map(_percent, found), f"{statistics.median(seconds):.0f}"])
        lines += _table(["sparsity", *(f"{100 * s:g} %" for s in SPARSITIES), "s (median)"], rows)
    cells = tables["channels"]
    if any(cells.values()):
        lines += ["## Channels, resnet20, shortcut B, one shot, no training", ""]
        rows = [
            [how, compensation, *(_percent(cells.get((how, compensation, b))) for b in CHANNEL_BUDGETS)]
            for how, compensation in dict.fromkeys((h, c) for h, c, _ in cells)
            if any(cells.get((how, compensation, b)) for b in CHANNEL_BUDGETS)
        ]
        lines += _table(
            ["which channels", "compensation", *(f"keep {b:g} of MACs" for b in CHANNEL_BUDGETS)], rows
        )
    for network in ("resnet20",):
        cells = tables[f"retrained-{network}"]
        if any(cells.values()):
            lines += [
                f"## Equal short retraining, {network}",
                "",
                f"{RETRAIN['steps']} steps of SGD (batch {RETRAIN['batch']}, learning rate {RETRAIN['lr']}, cosine, "
                f"momentum 0.9) on a fixed, balanced part of {RETRAIN['images']:,} training images,",
                "the same for all; RD by its default, the others by magnitude + least squares. Mean "
                "and range over the",
                "seeds measured of three: far too short to be a result about training, long enough to "
                "compare starts.",
                "",
            ]
            rows = []
            for allocation in ("rd", *BASELINES):
                row = [allocation]
                for sparsity in (0.8, 0.9):
                    some = [c["accuracy"] for n in SEEDS if (c := cells.get((allocation, sparsity, n)))]
                    if some:
                        spread = f"{min(some):.2f} – {max(some):.2f}, {len(some)} seeds"
                        row.append(f"{statistics.mean(some):.2f} ({spread})")
                    else:
                        row.append("–")
                rows.append(row)
            lines += _table(["allocation", "80 %", "90 %"], rows)
    cells = tables["zerodata"]
    if any(cells.values()):
        lines += ["## Curves on noise beside curves on images", ""]
        lines += [
            "ResNet-20, magnitude, no compensation, logits; noise is normal, of the size of the images.",
            "",
        ]
        rows = [[n, *(_percent(cells.get((n, s))) for s in SPARSITIES)] for n in ("images", "noise")]
        lines += _table(["curves on", *(f"{100 * s:g} %" for s in SPARSITIES)], rows)
    cells = tables["additivity"]
    if any(cells.values()):
        lines += ["## Do distortions add up?", "", "ResNet-20, 128 images, 20 random allocations each.", ""]
        rows = [
            [name, f"{100 * s:g} %", f"{c['rank_correlation']:.2f}", f"{c['ratio']:.2f}"]
            for (name, s), c in cells.items()
            if c
        ]
        lines += _table(["recipe", "sparsity", "rank correlation", "measured / predicted, median"], rows)
    cells = tables["solvers"]
    if any(cells.values()):
        lines += [
            "## Solvers, a problem of ResNet-50's size",
            "",
            "54 layers, 25.5 million weights, 101 levels, synthetic curves (seed 0). *per-weight* "
            "is a transcription of the",
            "published dynamic programme with one state per weight. Each in a process of its own; "
            "memory is what solving",
            "added to the process.",
            "",
        ]
        rows = [
            [solver, f"{100 * (1 - keep):g} %", f"{c['seconds']:.3f}", f"{100 * c['gap']:.4f} %",
             f"{100 * c['used']:.4f} %" if c["used"] else "", f"{c['megabytes']:.1f}"]
            for (solver, keep), c in cells.items() if c
        ]  # fmt: skip
        lines += _table(["solver", "sparsity", "s", "above the optimum", "budget used", "MiB"], rows)
    whole, saved = tables["curves"]["whole"], tables["curves"]["saved"]
    if whole or saved:
        lines += ["## Time for curves, ResNet-32, 9 levels per layer", ""]
    if whole:
        lines += [
            f"1,024 images, {whole['threads']} thread(s): {whole['seconds']:.0f} s; {whole['prepare']:.0f} s choose "
            f"weights and solve for them, and {whole['passes']:.0f} s run the network.",
            "",
        ]
    if saved:
        full = saved["full passes"]
        rows = [[n, f"{s:.1f}", f"{100 * (1 - s / full):.0f} %"] for n, s in saved.items() if n != "seconds"]
        lines += ["64 images, without compensation:", "", *_table(["", "s", "saved"], rows)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, help="folder of the published weights")
    parser.add_argument("--data-dir", type=Path, help="CIFAR-10")
    parser.add_argument("--runs", type=Path, default=Path("runs/rd"), help="where the cells go")
    parser.add_argument(
        "--only", help="tables to measure, separated by commas; all others are shown as they are"
    )
    parser.add_argument("--render", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, help="also write the page to this Markdown file")
    parser.add_argument("--solver", help=argparse.SUPPRESS)
    parser.add_argument("--keep", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.solver:
        print(json.dumps(solver_cell(options.keep, options.solver)))
        return
    if not (options.weights and options.data_dir):
        parser.error("give --weights and --data-dir")
    options.runs.mkdir(parents=True, exist_ok=True)
    bench = Bench(options)
    tables: dict[str, Any] = {
        "dense": dense_table(bench),
        "solvers": solvers_table(bench),
        "channels": channels_table(bench),
        **{f"weights-{name}": weights_table(bench, name) for name in ("resnet20", "resnet56", "resnet32")},
        "retrained-resnet20": retrained_table(bench, "resnet20"),
        "zerodata": zero_data_table(bench),
        "additivity": additivity_table(bench),
        "curves": curves_table(bench),
    }
    page = render(bench, tables)
    print(page)
    if options.out:
        options.out.write_text(page)


if __name__ == "__main__":
    main()
