"""CPU seconds and peak memory from a model to its graph, to the cut model and to its proof, beside Torch-Pruning.

    pip install '.[benchmark]'
    python benchmarks/graph.py --repeats 3 --out docs/results/graph.md

Every measurement runs in a process of its own, on one thread, the tools in turn. Both remove half of the channels of
every group by L1 norm, with no fine-tuning; imports and building the model are not counted. CPU seconds hardly depend
on what else the machine does, and divided by those of one forward pass, hardly on the machine.
"""

import argparse
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MODELS = ("resnet50", "densenet121", "vit_b_16", "swin_t", "convnext_tiny", "vit_l_16")
STEPS = ("analyse", "cut", "prove")
SECONDS, MEMORY = 300, 12 * 2**30
"""Processor time and bytes that one process may use."""


class Meter:
    """CPU seconds, seconds of these in `torch.export`, and peak memory, step by step."""

    def __init__(self) -> None:
        import torch

        self.steps: dict[str, dict[str, float]] = {}
        self._exporting = 0.0
        export = torch.export.export

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return export(*args, **kwargs)
            finally:
                self._exporting += time.process_time() - start

        torch.export.export = timed

    def __call__(self, step: str, work: Callable[[], Any]) -> Any:
        """What the work gives."""
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before, exporting, start = memory("VmRSS"), self._exporting, time.process_time()
        result = work()
        self.steps[step] = {
            "seconds": time.process_time() - start,
            "export": self._exporting - exporting,
            "bytes": memory("VmHWM") - before,
        }
        return result


def memory(line: str) -> int:
    """Bytes of this process, by the name that Linux has for them."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(text.split()[1]) * 1024 for text in status if text.startswith(line))


def secateur_steps(model: Any, x: Any, meter: Meter) -> Any:
    import secateur as sc
    from secateur.allocate import allocate
    from secateur.scores import score_groups
    from secateur.surgery.cut import cut_copy

    graph = meter("analyse", lambda: sc.analyze(model, x))
    masks = allocate(score_groups(model, graph, "l1"), sc.Cost(graph), sc.Budget(units=0.5), "uniform")
    plan = sc.Plan.of(graph, masks)
    small = meter("cut", lambda: cut_copy(model, graph, plan))
    proof = meter("prove", lambda: sc.verify(model, small, graph, plan))
    assert proof.ok, proof
    assert not proof.randomised, proof  # else it was compared twice
    return small


def torch_pruning_steps(model: Any, x: Any, meter: Meter) -> Any:
    import torch
    import torch_pruning as tp
    from peers import follow_, heads_of

    head = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
    graph = meter("analyse", lambda: tp.DependencyGraph().build_dependency(model, x))
    del graph  # the pruner makes its own
    heads = heads_of(model)

    def cut() -> None:
        pruner = tp.pruner.MagnitudePruner(
            model,
            x,
            tp.importance.MagnitudeImportance(p=1),
            pruning_ratio=0.5,
            ignored_layers=[head],
            num_heads=heads,
            prune_num_heads=bool(heads),
            head_pruning_ratio=0.5,
        )
        pruner.step()
        follow_(model)
        with torch.no_grad():
            model(x)

    meter("cut", cut)
    return model


TOOLS = {"Secateur": secateur_steps, "Torch-Pruning": torch_pruning_steps}


def measure(tool: str, name: str) -> dict[str, Any]:
    """One run in this process."""
    import torch
    import torchvision

    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():  # such as heads: a trained network tells images apart
            torch.nn.init.normal_(parameter, std=0.02)
    x = torch.randn(1, 3, 224, 224)
    passes = []
    with torch.no_grad():
        for _ in range(4):
            start = time.process_time()
            model(x)
            passes.append(time.process_time() - start)
    params = sum(p.numel() for p in model.parameters())
    weights = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    meter = Meter()
    try:
        small = TOOLS[tool](model, x, meter)
    except Exception as error:  # a peer that fails is a result
        return {"error": ": ".join([type(error).__name__, *str(error).splitlines()[:1]])[:80]}
    return {
        "forward": min(passes),
        "steps": meter.steps,
        "copies": max(step["bytes"] for step in meter.steps.values()) / weights,
        "kept": sum(p.numel() for p in small.parameters()) / params,
    }


def run_alone(cell: tuple[str, str]) -> dict[str, Any]:
    """One run in a process of its own."""
    name, tool = cell
    command = [sys.executable, "-W", "ignore", __file__, "--one", tool, name]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=alone)
    if found.returncode == -signal.SIGXCPU:
        return {"error": f"not finished in {SECONDS} s"}
    if found.returncode:  # such as C++ that ends the process when memory is refused
        return {"error": f"ended with code {found.returncode}"}
    return dict(json.loads(found.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help="of torchvision")
    parser.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    parser.add_argument("--one", nargs=2, metavar=("TOOL", "MODEL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 9))
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        print(json.dumps(measure(*options.one)))
        return
    cells = [(name, tool) for name in options.models for tool in TOOLS]
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {cell: [] for cell in cells}
    with ThreadPoolExecutor(options.jobs) as pool:
        for _ in range(options.repeats):
            left = [cell for cell in cells if not any("error" in found for found in runs[cell])]
            for cell, found in zip(left, pool.map(run_alone, left), strict=True):
                runs[cell].append(found)
                print(*cell, found, file=sys.stderr, flush=True)
    table = render(runs, options.repeats)
    print(table)
    if options.out:
        options.out.write_text(table)


def render(runs: dict[tuple[str, str], list[dict[str, Any]]], repeats: int) -> str:
    import platform
    from importlib.metadata import version

    import torch

    from secateur.cost.latency import device_name

    lines = [
        "# From a model to its graph, to the cut model, and to its proof",
        "",
        f"`python benchmarks/graph.py --repeats {repeats} --out docs/results/graph.md`",
        "",
        f"Median of {repeats} processes, {device_name(torch.device('cpu'))}, 1 thread, torch {torch.__version__}, "
        f"Torch-Pruning {version('torch-pruning')}, Python {platform.python_version()}, 224 × 224. Half of the "
        "channels of every group go, by L1 norm. Seconds are CPU seconds; a forward pass is one of the whole network, "
        "of one image, in float32. Memory is the peak beyond the loaded model. A process may use "
        f"{SECONDS} s and {MEMORY / 2**30:.0f} GiB.",
        "",
        "| network (one forward pass, s) | tool | analyse, s | cut, s | prove, s | cut + prove without `torch.export`, "
        "forward passes | memory, copies of the weights | parameters kept |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (name, tool), rows in runs.items():
        failed = [row for row in rows if "error" in row]
        if failed:
            lines.append(f"| {name} | {tool} | {failed[0]['error']} | | | | | |")
            continue

        def median(of: Callable[[dict[str, Any]], float], rows: list[dict[str, Any]] = rows) -> float:
            return statistics.median(map(of, rows))

        def seconds(step: str, rows: list[dict[str, Any]] = rows) -> str:
            found = [row["steps"][step]["seconds"] for row in rows if step in row["steps"]]
            return f"{statistics.median(found):.2f}" if found else ""

        def passes(row: dict[str, Any]) -> float:
            done = [row["steps"][step] for step in STEPS[1:] if step in row["steps"]]
            return float(sum(step["seconds"] - step["export"] for step in done) / row["forward"])

        cells = [
            *map(seconds, STEPS),
            f"{median(passes):.1f}",
            f"{median(lambda row: row['copies']):.1f}",
            f"{median(lambda row: row['kept']):.1%}",
        ]
        forward = median(lambda row: row["forward"])
        lines.append(f"| {name} ({forward:.2f}) | {tool} | {' | '.join(cells)} |")
    lines += [
        "",
        "Most of the analysis is `torch.export`, which also captures networks that a trace of autograd misreads. A "
        "proof captures the network once more, at another size, where statistics run over channels that are cut. "
        "Torch-Pruning makes its graph again as it cuts, and has no counterpart for the proof.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
