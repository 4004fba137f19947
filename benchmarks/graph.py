"""Seconds and peak memory from a model to its groups and to the cut model, beside Torch-Pruning.

    pip install '.[benchmark]'
    python benchmarks/graph.py --repeats 5

Every measurement runs in a process of its own, the tools in turn. Both remove half of the channels of every
group by L1 norm, with no fine-tuning; times exclude imports and building the model. "groups" is the analysis
alone, "cut" everything from the model to the smaller model that has run once.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MODELS = ("resnet50", "densenet121", "efficientnet_b0", "shufflenet_v2_x1_0")


def secateur_times(model: Any, x: Any) -> dict[str, float]:
    import torch

    import secateur as sc
    from secateur.allocate import allocate
    from secateur.scores import score_groups

    start = time.perf_counter()
    graph = sc.analyze(model, x)
    groups = time.perf_counter()
    scores = score_groups(model, graph, "l1")
    masks = allocate(scores, sc.Cost(graph), sc.Budget(units=0.5), "uniform")
    sc.cut_(model, graph, sc.Plan.of(graph, masks))
    with torch.no_grad():
        model(x)
    return {"groups": groups - start, "cut": time.perf_counter() - start}


def torch_pruning_times(model: Any, x: Any) -> dict[str, float]:
    import torch
    import torch_pruning as tp

    head = list(model.modules())[-1]
    start = time.perf_counter()
    graph = tp.DependencyGraph().build_dependency(model, x)
    list(graph.get_all_groups(ignored_layers=[head]))
    groups = time.perf_counter()
    pruner = tp.pruner.MagnitudePruner(
        model, x, tp.importance.MagnitudeImportance(p=1), pruning_ratio=0.5, ignored_layers=[head]
    )
    pruner.step()
    with torch.no_grad():
        model(x)
    return {"groups": groups - start, "cut": time.perf_counter() - groups}


TIMES = {"secateur": secateur_times, "torch-pruning": torch_pruning_times}


def measure(tool: str, name: str) -> dict[str, object]:
    """One run in this process; peak memory is what the process gained on the loaded model."""
    import torch
    import torchvision

    model = getattr(torchvision.models, name)(weights=None).eval()
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        model(x)
    params = sum(p.numel() for p in model.parameters())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        result: dict[str, object] = dict(TIMES[tool](model, x))
    except Exception as error:  # a peer that fails is a result
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"}
    result["MiB"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    result["params kept"] = sum(p.numel() for p in model.parameters()) / params
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    parser.add_argument("--one", nargs=2, metavar=("TOOL", "MODEL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one)))
        return
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for _ in range(options.repeats):
        for name in MODELS:
            for tool in TIMES:
                command = [sys.executable, "-W", "ignore", __file__, "--one", tool, name]
                line = subprocess.run(
                    command, capture_output=True, text=True, check=True
                ).stdout.splitlines()[-1]
                runs.setdefault((name, tool), []).append(json.loads(line))
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
        "# From a model to its groups, and to the cut model",
        "",
        "`python benchmarks/graph.py --repeats " + str(repeats) + " --out docs/results/graph.md`",
        "",
        f"Median (minimum – maximum) of {repeats} processes, {device_name(torch.device('cpu'))}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, Torch-Pruning {version('torch-pruning')}, "
        f"Python {platform.python_version()}, 224×224. Half of the channels of every group go, by L1 norm. Peak memory "
        "is what the process needed beyond the loaded model after one forward pass.",
        "",
        "| network | tool | model → groups, s | model → cut model, s | peak memory, MiB | parameters kept |",
        "|---|---|---|---|---|---|",
    ]
    for (name, tool), rows in runs.items():
        failed = [row for row in rows if "error" in row]
        if failed:
            lines.append(f"| {name} | {tool} | {failed[0]['error']} | | | |")
            continue

        def spread(key: str, digits: int, rows: list[dict[str, Any]] = rows) -> str:
            values = [row[key] for row in rows]
            return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} – {max(values):.{digits}f})"

        kept = statistics.median(row["params kept"] for row in rows)
        cells = [spread("groups", 2), spread("cut", 2), spread("MiB", 0), f"{kept:.1%}"]
        lines.append(f"| {name} | {tool} | {' | '.join(cells)} |")
    lines += [
        "",
        "Most of Secateur's time is `torch.export`, which also captures networks that a trace of autograd misreads.",
        "`verify` is not included; Torch-Pruning has no counterpart for it.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
