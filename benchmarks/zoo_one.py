"""One network of the zoo through one tool, in this process: prints a JSON line after every stage.

    python benchmarks/zoo_one.py secateur timm/levit_128s

The last line holds everything that was found out, so that a process that is killed still tells how far it came.
"""

import copy
import functools
import json
import math
import re
import resource
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import zoo_models
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

KEEP = 0.5

Row = dict[str, Any]


def main(tool: str, name: str, seconds: float, memory_gib: float) -> None:
    limit = int(memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    row: Row = {"model": name, "tool": tool, "stage": "build"}
    try:
        built = zoo_models.build(name)
        model = zoo_models.wake_(built.model, built.inputs)
        row |= {"note": built.note, "input": "x".join(map(str, built.inputs.shape[1:]))}
        row["params"] = sum(p.numel() for p in model.parameters())
        allowed = math.ceil(seconds + row["params"] / 2e6)
        resource.setrlimit(resource.RLIMIT_CPU, (allowed, allowed))
        row["limit_s"] = allowed
        row["model_mib"] = sum(t.numel() * t.element_size() for t in model.state_dict().values()) / 2**20
        row["macs"] = counted_macs(model, built.inputs)
        for _ in TOOLS[tool](model, built.inputs, row):
            print(json.dumps(row), flush=True)
        row["stage"] = "done"
    except Exception as error:  # a network that fails is a result
        row |= {"error": type(error).__name__, "message": " ".join(str(error).split())[:400]}
        row["where"] = where(error)
    row["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(row), flush=True)


@functools.cache
def load() -> None:
    """Load what takes a while, so that no network is charged with it."""
    import timm
    import torchvision  # noqa: F401

    import secateur as sc

    timm.list_models()
    sc.analyze(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)), torch.zeros(1, 3, 8, 8))


def secateur(model: nn.Module, x: Tensor, row: Row) -> Any:
    """Analyse, cut half of the units of every group at random, and check the result."""
    import secateur as sc

    load()
    row["stage"] = "capture"
    yield
    before = reset_peak()
    start, cpu = time.perf_counter(), time.process_time()
    graph = sc.analyze(model, x)
    row["groups_cpu_s"] = time.process_time() - cpu
    row |= {
        "groups_s": time.perf_counter() - start,
        "groups_mib": memory_mib("VmHWM") - before,
        "stage": "cut",
    }
    cost = sc.Cost(graph)
    images = 1
    if cost.macs() != row["macs"] and grows(model, x):
        images = 2  # as many as the analysis runs
        row["macs"] = counted_macs(model, x, images)
    row |= {"groups": len(graph.groups), "units": sum(group.units for group in graph.groups)}
    for what, products in (("macs", graph.macs), ("params", graph.params)):
        sizes = [p.factor * math.prod(width(axis, graph) for axis in p.axes) for p in products]
        free = [s for s, p in zip(sizes, products, strict=True) if any(axis.parts for axis in p.axes)]
        row[f"prunable_{what}"] = sum(free) / max(sum(sizes), 1)
        row[f"least_{what}"] = cost.of(what, [1] * len(graph.groups)) / max(sum(sizes), 1)
    row["macs_dense_equal"] = cost.macs() == row["macs"]
    frozen = Counter[str]()
    for item in graph.frozen:
        frozen[re.sub(r" \(in .*\)", "", item.reason)] += item.units
    row["frozen"] = dict(frozen.most_common(12))
    row["frozen_units"] = sum(frozen.values())
    yield
    if not graph.groups:
        raise RuntimeError("no groups")
    generator = torch.Generator().manual_seed(0)
    masks = []
    for group in graph.groups:
        order = torch.randperm(group.units, generator=generator)
        mask = torch.zeros(group.units, dtype=torch.bool)
        mask[order[: math.ceil(KEEP * group.units)]] = True
        masks.append(mask)
    plan = sc.Plan.of(graph, masks)
    cut = copy.deepcopy(model)
    start, cpu = time.perf_counter(), time.process_time()
    cut = sc.cut_(cut, graph, plan)
    row["cut_cpu_s"] = time.process_time() - cpu
    row |= {"cut_s": time.perf_counter() - start, "stage": "verify", **form(cut, model)}
    kept = plan.kept(graph)
    row["params_kept"] = sum(p.numel() for p in cut.parameters()) / row["params"]
    row["macs_predicted"] = cost.macs(kept)
    row["macs_counted"] = counted_macs(cut, x, images)
    row["macs_kept"] = row["macs_counted"] / row["macs"]
    yield
    start, cpu = time.perf_counter(), time.process_time()
    proof = sc.verify(model, cut, graph, plan)
    row["verify_cpu_s"] = time.process_time() - cpu
    row["cpu_s"] = sum(row[f"{what}_cpu_s"] for what in ("groups", "cut", "verify"))
    row |= {
        "verify_s": time.perf_counter() - start,
        "error64": proof.max_rel_error,
        "error32": proof.max_rel_error_float32,
        "sensitivity": proof.sensitivity,
        "trains": proof.trains,
        "verified": proof.ok,
        "tied": list(getattr(proof, "tied", ()))[:4],  # older code is measured by this script too
        "elsewhere": getattr(proof, "sizes", ""),
    }
    yield
    takes = sizes_taken(model, x)
    row["sizes"], row["sizes_lost"] = len(takes), sorted(takes - sizes_taken(cut, x))
    yield


def sizes_taken(model: nn.Module, x: Tensor) -> set[str]:
    """Which of other batches and other image sizes a network runs at: none a multiple of the one given, or square."""
    *_, h, w = x.shape
    sizes = ((3, h, w), (2, h + 32, w + 64), (1, 2 * h, w + 32), (3, h - 32, 2 * w))
    taken = set()
    for n, height, width in sizes:
        try:
            with torch.no_grad():
                model.eval()(torch.zeros(n, x.shape[1], height, width))
        except Exception:  # whatever a network raises at a size that it does not take
            continue
        taken.add(f"{n}x{height}x{width}")
    return taken


def form(cut: nn.Module, model: nn.Module) -> Row:
    """Whether the cut model is the user's own module, or which submodules were rewritten."""
    own = {name: type(module) for name, module in model.named_modules()}
    rewritten = [name for name, module in cut.named_modules() if type(module) is not own.get(name)]
    return {"form": "rewritten" if rewritten else "own", "rewritten": rewritten[:12]}


def width(axis: Any, graph: Any) -> int:
    return int(axis.base + sum(each * graph.groups[group].units for group, each in axis.parts))


def torch_pruning(model: nn.Module, x: Tensor, row: Row) -> Any:
    """The same with Torch-Pruning, out of the box, and an independent check of its result.

    It prunes a float64 twin whose every weight holds its own position, so that the survivors can be traced:
    the pruned model with the surviving weights must compute what the original computes with all other
    weights zero (normalisation over channels: over the survivors only).
    """
    import torch_pruning as tp

    numbered = copy.deepcopy(model).double()
    for tensor in named(numbered).values():
        tensor.data = torch.arange(tensor.numel(), dtype=torch.float64).reshape(tensor.shape)
    heads = [m for m in numbered.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1:]
    row["stage"] = "cut"
    yield
    start = time.perf_counter()
    pruner = tp.pruner.MetaPruner(
        numbered, x.double(), tp.importance.RandomImportance(), pruning_ratio=1 - KEEP, ignored_layers=heads
    )
    row["groups_s"] = time.perf_counter() - start
    pruner.step()
    row |= {"cut_s": time.perf_counter() - start, "stage": "forward"}
    original, survivors = named(model), {k: t.detach() for k, t in named(numbered).items()}
    sizes = {name: t.numel() for name, t in model.named_parameters()}
    changed = [n for name, n in sizes.items() if survivors[name].shape != original[name].shape]
    row["prunable_params"] = sum(changed) / row["params"]
    row["params_kept"] = sum(survivors[name].numel() for name in sizes) / row["params"]
    yield
    alive = {}
    for name, tensor in named(numbered).items():
        index = survivors[name].long()
        whole = original[name].detach().double()
        alive[name] = torch.zeros(whole.numel(), dtype=torch.bool).index_fill_(0, index.flatten(), True)
        tensor.data = whole.flatten()[index]
    images = torch.randn(1, *x.shape[1:], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        result = outputs(numbered.eval()(images))
    row["macs_kept"] = counted_macs(numbered, x.double()) / row["macs"]
    row["stage"] = "verify"
    yield
    masked = copy.deepcopy(model).double().eval()
    parameters = {id(p): alive[name].reshape(p.shape) for name, p in masked.named_parameters()}
    with torch.no_grad():
        for parameter in masked.parameters():
            parameter.mul_(parameters[id(parameter)])
        with SurvivorNorms(parameters):
            reference = outputs(masked(images))
    row["error64"] = max(
        ((a - b).abs().max() / a.abs().max()).item() if a.shape == b.shape else math.inf
        for a, b in zip(reference, result, strict=True)
    )
    row["verified"] = row["error64"] < 1e-9 and row["params_kept"] < 1
    yield


class SurvivorNorms(torch.overrides.TorchFunctionMode):
    """Layer, group and RMS normalisation whose statistics count the surviving channels only."""

    def __init__(self, alive: dict[int, Tensor]) -> None:
        super().__init__()
        self.alive = alive

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        names = {"layer_norm": "normalized_shape", "rms_norm": "normalized_shape", "group_norm": "num_groups"}
        name = getattr(func, "__name__", "")
        bound = dict(zip(("input", names.get(name), "weight", "bias", "eps"), args, strict=False))
        bound |= kwargs or {}
        weight: Any = bound.get("weight")
        alive = self.alive.get(id(weight))
        if name not in names or alive is None or alive.all():
            return func(*args, **(kwargs or {}))
        x, bias, eps = bound["input"], bound.get("bias"), bound.get("eps") or 1e-5
        channel = 1 if name == "group_norm" else x.ndim - 1
        shape = [-1 if dim == channel else 1 for dim in range(x.ndim)]
        count = alive.double().reshape(shape).expand(x.shape)
        groups = bound["num_groups"] if name == "group_norm" else 1
        spread = (x.shape[0], groups, -1) if name == "group_norm" else (*x.shape[:-1], 1, -1)
        grouped, weights = x.reshape(spread), count.reshape(spread)
        total = weights.sum(-1, keepdim=True)
        mean = 0 if name == "rms_norm" else (grouped * weights).sum(-1, keepdim=True) / total
        var = ((grouped - mean).square() * weights).sum(-1, keepdim=True) / total
        y = ((grouped - mean) * (var + eps).rsqrt()).reshape(x.shape) * weight.reshape(shape)
        return y if bias is None else y + bias.reshape(shape)


def named(model: nn.Module) -> dict[str, Tensor]:
    """Floating-point parameters and buffers."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: t for name, t in tensors.items() if t.is_floating_point()}


def outputs(result: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor) and t.is_floating_point()]


def grows(model: nn.Module, x: Tensor) -> bool:
    """Whether each further image costs more than the one before: csatv2 attends between the images of a batch."""
    one, two, three = (images * counted_macs(model, x, images) for images in (1, 2, 3))
    return three - two > two - one


def counted_macs(model: nn.Module, x: Tensor, images: int = 1) -> int:
    """Multiply-adds per image that torch counts for so many; without their values where it needs none."""
    x = torch.cat([x] * images)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # a fused encoder layer would not be counted
    try:
        with torch.device("meta"):
            return count(copy.deepcopy(model).to("meta"), x.to("meta"))
    except Exception:  # its forward looks at values, or keeps tensors where `to` does not find them
        return count(copy.deepcopy(model), x)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def count(model: nn.Module, x: Tensor) -> int:
    model.eval().requires_grad_(False)  # the counter looks for the gradient function of what modules return
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return int(counter.get_total_flops()) // 2 // len(x)


def where(error: BaseException) -> str:
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if "/site-packages/torch/" not in f.filename
    ]
    return " < ".join(f"{f.filename.rpartition('/')[2]}:{f.lineno}" for f in frames[-4:][::-1])


def memory_mib(field: str) -> float:
    """What the kernel says of this process: VmRSS, memory in use, or VmHWM, the most there was since the reset."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"{field}:\s+(\d+)", status)
    assert found is not None
    return int(found[1]) / 1024


def reset_peak() -> float:
    """Let the peak start from the memory in use; returns that."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory_mib("VmRSS")


TOOLS = {"secateur": secateur, "torch-pruning": torch_pruning}

if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(float, sys.argv[3:] or (600, 14)))
