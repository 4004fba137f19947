"""What rd costs and what it keeps, of two versions of the library in one run.

    python benchmarks/rd_cost.py --weights WEIGHTS --data-dir cifar10 --before OLD/src --out docs/results/rd-cost.md

Channels of the published CIFAR-10 ResNets, one shot, no training: CPU seconds of `prune` alone, and accuracy on a part
of the test images, for several draws of calibration images. Every cell is measured in a process of its own and kept as
a file in --runs. `--before` is the `src` folder of another version; its rows are left out without it.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

NETWORKS = {
    "resnet20_b": "cifar10_resnet20_optB_chenyaofo.safetensors",
    "resnet56_b": "cifar10_resnet56_optB_chenyaofo.safetensors",
    "resnet20": "cifar10_resnet20_optA_akamaster.safetensors",
}
CELLS = (("resnet20_b", 0.7), ("resnet20_b", 0.5), ("resnet20_b", 0.3), ("resnet56_b", 0.5))
"""(network, share of the MACs that stays)."""
IMAGES, BATCH = 256, 64


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, required=True, help="folder of published weights")
    parser.add_argument("--data-dir", type=Path, required=True, help="CIFAR-10")
    parser.add_argument("--before", type=Path, help="the src folder of another version")
    parser.add_argument("--runs", type=Path, default=Path("runs/rd-cost"), help="where the cells are kept")
    parser.add_argument("--seeds", type=int, default=3, help="draws of calibration images")
    parser.add_argument(
        "--test", default="5000:10000", help="test images that accuracy is measured on, first:last"
    )
    parser.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--option", action="append", default=[], help="of the method, name=value in JSON")
    parser.add_argument("--only", default="", help="network or network:share; comma-separated")
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(cell(options, *json.loads(options.cell))))
        return
    options.runs.mkdir(parents=True, exist_ok=True)
    versions = {"after": Path(__file__).parents[1] / "src"}
    if options.before:
        versions = {"before": options.before, **versions}
    found: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    wanted = [c for c in CELLS if not options.only or {c[0], f"{c[0]}:{c[1]}"} & {*options.only.split(",")}]
    for seed, (network, keep), version in itertools.product(range(options.seeds), wanted, versions):
        values = measured(options, version, versions[version], network, keep, seed)
        found.setdefault((version, network, keep), []).append(values)
    table = render(options, found)
    print(table)
    if options.out:
        options.out.write_text(table)


def measured(
    options: argparse.Namespace, version: str, source: Path, network: str, keep: float, seed: int
) -> dict[str, Any]:
    """A cell's numbers: from its file, or measured now in a process of its own."""
    path = options.runs / f"{version}.{network}.{keep}.{seed}.json"
    if not path.exists():
        passed = [sys.executable, __file__, *sys.argv[1:], "--cell", json.dumps([network, keep, seed])]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(source)}
        done = subprocess.run(passed, check=True, capture_output=True, text=True, env=environment)
        path.write_text(done.stdout)
        print(version, network, keep, seed, done.stdout.strip(), file=sys.stderr, flush=True)
    return dict(json.loads(path.read_text()))


def cell(options: argparse.Namespace, network: str, keep: float, seed: int) -> dict[str, Any]:
    """Prune once: CPU seconds, accuracy, what was kept and what moved."""
    import torch

    from secateur import Budget, prune
    from secateur.recipes.data import load_data
    from secateur.recipes.models import build_model
    from secateur.recipes.models.weights import load_weights, normalisation_for

    data = load_data("cifar10", options.data_dir)
    weights = options.weights / NETWORKS[network]
    model = build_model(network, classes=10)
    load_weights(model, weights)
    normalise = normalisation_for(weights) or data.normalisation
    model = model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))
    images = normalise(data.train.images[order[:IMAGES]], torch.channels_last)
    batches = list(torch.split(images, BATCH))
    first, last = (int(part) for part in options.test.split(":"))
    tested = {
        "accuracy": (data.test.images[first:last], data.test.labels[first:last]),
        "train_accuracy": (data.train.images[order[-5000:]], data.train.labels[order[-5000:]]),
    }
    given = dict(option.split("=", 1) for option in options.option)
    extra = {"round_to": 1} | {name: json.loads(value) for name, value in given.items()}
    started = time.process_time()
    pruned = prune(
        model, batches[0][:2], budget=Budget(macs=keep), method="rd", data=batches, stream_gain=1.0, **extra
    )
    seconds = time.process_time() - started
    small = pruned.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.no_grad()
    def accuracy(x: torch.Tensor, y: torch.Tensor) -> float:
        right = 0
        for part, labels in zip(torch.split(x, 250), torch.split(y, 250), strict=True):
            right += int((small(normalise(part, torch.channels_last)).argmax(1) == labels).sum())
        return 100 * right / len(x)

    return {
        **{name: accuracy(*pair) for name, pair in tested.items()},
        "seconds": seconds,
        "macs": pruned.after["macs"] / pruned.before["macs"],
        "distortion": pruned.facts["measured"],
        "images": len(tested["accuracy"][0]),
    }


def render(options: argparse.Namespace, found: dict[tuple[str, str, float], list[dict[str, Any]]]) -> str:
    import torch

    from secateur.cost.latency import device_name

    first = next(iter(found.values()))[0]
    before = " --before OLD/src" if options.before else ""
    lines = [
        "# What rd on channels costs",
        "",
        f"`python benchmarks/rd_cost.py --weights weights --data-dir cifar10{before} --out docs/results/rd-cost.md`",
        "",
        f"{device_name('cpu')}, 1 thread, torch {torch.__version__}. CPU seconds of `prune` (analysis, cut and proof",
        f"included), {IMAGES} calibration images, accuracy right after the cut on {first['images']:,} test images",
        f"({options.test} of the test set), mean and range over {options.seeds} draws of calibration images. Each cell",
        "ran in a process of its own, on cores that other work shared; importing `torch.export`, about 1.8 s of each,",
        "is counted. *before* measures nine widths of every group on all images; *after* estimates them.",
        "What the defaults are was chosen on training images, apart from those that calibrate.",
        "",
        "| network | MACs kept | version | accuracy, % | CPU seconds | distortion |",
        "|---|---|---|---|---|---|",
    ]
    for (version, network, keep), cells in found.items():
        columns = []
        for name in ("accuracy", "seconds"):
            values = [c[name] for c in cells]
            digits = 2 if name == "accuracy" else 1
            columns.append(
                f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} – {max(values):.{digits}f})"
            )
        moved = statistics.mean(c["distortion"] for c in cells)
        lines.append(f"| {network} | {keep} | {version} | {columns[0]} | {columns[1]} | {moved:.4f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
