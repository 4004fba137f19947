"""Training methods on networks too large to train here: a few steps each, from fresh weights to the exported file.

    pip install '.[vision]'
    python benchmarks/run_through.py --out docs/results/run-through.md

Random images; nothing is learned. Shown is that budgets are met, that the result is proven and exported, and what
a step costs. Every row runs in a process of its own, so that its peak memory is its own.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

ROWS = (
    ("lapp", "torchvision/resnet18", 32, {"macs": 0.444}),
    ("lapp", "vgg16_bn_cifar", 32, {"macs": 0.4}),
    ("lapp", "torchvision/resnet18", 224, {"macs": 0.444}),
    ("paam", "resnet56", 32, {"params": 0.477}),
    ("paam", "resnet110", 32, {"params": 0.46}),
    ("paam", "torchvision/resnet50", 224, {"params": 0.489}),
    ("oto", "vgg16_bn_cifar", 32, {"macs": 0.265}),
    ("depgraph", "resnet56", 32, {"macs": 0.47}),
    ("gate-decorator", "vgg16_bn_cifar", 32, {"macs": 0.1}),
)
"""Method, network, side of the images, budget: what the papers' own tables keep."""

BATCHES = {32: 128, 224: 8}
"""Side of the images -> images per step."""

OPTIONS: dict[str, dict[str, Any]] = {
    "lapp": {"prune_share": 0.5, "bypass": "full"},
    "gate-decorator": {"ticks": 2, "ticks_per_tock": 2},
}
"""Where the defaults need more than a few steps."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    parser.add_argument("--row", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row is not None:
        print(json.dumps(measure(*ROWS[options.row], options.steps)))
        return
    found = []
    for number in range(len(ROWS)):
        command = [
            sys.executable,
            "-W",
            "ignore",
            __file__,
            "--row",
            str(number),
            "--steps",
            str(options.steps),
        ]
        run = subprocess.run(command, check=True, capture_output=True, text=True)
        found.append(json.loads(run.stdout.splitlines()[-1]))
        print(found[-1], flush=True)
    text = render(found, options.steps)
    print(text)
    if options.out:
        options.out.write_text(text)


def measure(name: str, network: str, side: int, budget: dict[str, float], steps: int) -> dict[str, Any]:
    """One method on one network."""
    import torch

    from secateur import Budget
    from secateur.cost.latency import compare_latency
    from secateur.export import export_onnx
    from secateur.methods import PAAM, TrainingMethod, method_named
    from secateur.recipes.models import build_model

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model, batch = build_model(network), BATCHES[side]
    dense = build_model(network)
    x, y = torch.randn(batch, 3, side, side), torch.randint(0, 10, (batch,))
    plain = statistics.median(step_seconds(dense, x, y, 3)[0])
    started = time.perf_counter()
    method = method_named(name, OPTIONS.get(name, {}))
    assert isinstance(method, TrainingMethod)
    session = method.start(model, x[:1], budget=Budget(**budget), steps=steps)
    made = time.perf_counter() - started
    seconds, loss = step_seconds(model, x, y, steps, session)
    pruned = session.finish()
    assert pruned.proof is not None
    with tempfile.TemporaryDirectory() as folder:
        check = export_onnx(model, x[:1], Path(folder) / "model.onnx")
    times = compare_latency({"dense": dense, "pruned": model}, x[:1], repeats=20)
    row = {
        "method": name, "network": network, "side": side, "batch": batch, "budget": budget,
        "macs": pruned.after["macs"] / pruned.before["macs"],
        "params": pruned.after["params"] / pruned.before["params"],
        "proof": pruned.proof.max_rel_error, "ok": pruned.proof.ok,
        "onnx": check.max_rel_error, "made_s": made, "dense_step_s": plain,
        "first_step_s": statistics.median(seconds[: steps // 4]),
        "last_step_s": statistics.median(seconds[-(steps // 4) :]),
        "finite": loss == loss, "dense_ms": times["dense"].median_ms, "pruned_ms": times["pruned"].median_ms,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }  # fmt: skip
    if isinstance(method, PAAM):
        fresh = method.start(build_model(network), x[:1], budget=Budget(**budget), steps=steps)
        row["scorers"] = method.measure_overhead(fresh)
    return row


def step_seconds(model: Any, x: Any, y: Any, steps: int, session: Any = None) -> tuple[list[float], float]:
    """Seconds of every step, and the last loss."""
    import contextlib

    import torch

    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.01, momentum=0.9)
    seconds = []
    with contextlib.nullcontext() if session is None else session.attach(optimizer):
        for _ in range(steps):
            started = time.perf_counter()
            loss = torch.nn.functional.cross_entropy(model(x), y)
            (loss if session is None else loss + session.penalty()).backward()
            if session is not None:
                session.before_step()
            optimizer.step()
            if session is not None:
                session.after_step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - started)
    return seconds, loss.item()


def render(found: list[dict[str, Any]], steps: int) -> str:
    """The page."""
    import torch

    from secateur.cost.latency import device_name

    lines = [
        "# Training methods on larger networks, a few steps each",
        "",
        "`python benchmarks/run_through.py --out docs/results/run-through.md`",
        "",
        f"{device_name('cpu')}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python "
        f"{platform.python_version()}, seed 0. Random images, fresh weights, {steps} steps of SGD, float32; "
        "batch 128 at side 32,",
        "8 at side 224. Budgets are those of the papers' own rows. Nothing is learned here: the table shows that "
        "budgets are met, that",
        "every result is proven equal to its masked original and to its ONNX file, and what a step costs at the "
        "start and at the end.",
        "",
        "| method | network, side | budget | MACs kept | params kept | proof, float64 | ONNX, relative | analysis, s "
        "| s/step: dense | first quarter | last quarter | ms, batch 1: dense | pruned | peak, MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        bound = ", ".join(f"{name} {share:g}" for name, share in row["budget"].items())
        cells = (
            row["method"], f"{row['network']}, {row['side']}", bound, f"{row['macs']:.4f}", f"{row['params']:.4f}",
            f"{row['proof']:.0e}" + ("" if row["ok"] else " (NOT equal)"), f"{row['onnx']:.0e}",
            f"{row['made_s']:.1f}", f"{row['dense_step_s']:.2f}", f"{row['first_step_s']:.2f}",
            f"{row['last_step_s']:.2f}", f"{row['dense_ms']:.1f}", f"{row['pruned_ms']:.1f}",
            f"{row['peak_mib']:.0f}",
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    scored = [row for row in found if "scorers" in row]
    if scored:
        lines += ["", "What PAAM's attention adds while training, all of it gone at the end:", ""]
        lines += [
            "| network | parameters of the scorers | with Adam's, MiB | ms to score once |",
            "|---|---|---|---|",
        ]
        for row in scored:
            cost = row["scorers"]
            lines.append(
                f"| {row['network']} | {cost['params']:,} | {cost['bytes'] / 2**20:.1f} | {cost['ms']:.0f} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
