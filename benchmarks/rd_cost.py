"""What rd costs and what it keeps, of two versions of the library in one run.

    python benchmarks/rd_cost.py --weights WEIGHTS --data-dir cifar10 --imagenet imagenet1k-sample --before OLD/src \
        --out docs/results/rd-cost.md

Channels of published networks, one shot, no training: CPU seconds of `prune` alone, and accuracy on test images, for
several draws of calibration images. Every cell is measured in a process of its own and kept as a file in --runs.
`--before` is the `src` folder of another version; its rows are left out without it, as are those of ImageNet's network
without `--imagenet`, a folder per class. A cell that takes more than --limit CPU seconds ends there, and that version
is not tried on the network again: most of the time goes into curves, which are the same for every share of the MACs.
"""

import argparse
import itertools
import json
import math
import os
import resource
import signal
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
    "timm/tf_efficientnet_lite0": "imagenet_tf_efficientnet_lite0.safetensors",
}
CELLS = (
    *(("resnet20_b", keep) for keep in (0.7, 0.5, 0.3)),
    *(("resnet56_b", keep) for keep in (0.7, 0.5, 0.3)),
    *(("timm/tf_efficientnet_lite0", keep) for keep in (0.7, 0.5, 0.3)),
)
"""(network, share of the MACs that stays)."""

IMAGES, BATCH = 256, 64

VERSIONS = {"2d3bb35": ", which measures nine widths of every group on all images"}
"""Commit -> what it does otherwise."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, required=True, help="folder of published weights")
    parser.add_argument("--data-dir", type=Path, required=True, help="CIFAR-10")
    parser.add_argument("--imagenet", type=Path, help="a folder per class of ImageNet")
    parser.add_argument("--before", type=Path, help="the src folder of another version")
    parser.add_argument("--runs", type=Path, default=Path("runs/rd-cost"), help="where the cells are kept")
    parser.add_argument("--seeds", type=int, default=3, help="draws of calibration images")
    parser.add_argument("--imagenet-seeds", type=int, default=1, help="the same, of ImageNet")
    parser.add_argument("--limit", type=int, default=1500, help="CPU seconds of a cell")
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
    wanted = [
        (network, keep)
        for network, keep in CELLS
        if (not options.only or {network, f"{network}:{keep}"} & {*options.only.split(",")})
        and ("/" not in network or options.imagenet)
    ]
    for (network, keep), version in itertools.product(wanted, versions):
        tried = [*itertools.chain(*(v for k, v in found.items() if k[:2] == (version, network)))]
        if not any("over" in values for values in tried):
            found[version, network, keep] = []
            for seed in range(options.imagenet_seeds if "/" in network else options.seeds):
                values = measured(options, version, versions[version], network, keep, seed)
                found[version, network, keep].append(values)
                if "over" in values:
                    break
    table = render(options, found)
    print(table)
    if options.out:
        options.out.write_text(table)


def measured(
    options: argparse.Namespace, version: str, source: Path, network: str, keep: float, seed: int
) -> dict[str, Any]:
    """A cell's numbers: from its file, or measured now in a process of its own."""
    path = options.runs / f"{version}.{network.replace('/', '-')}.{keep}.{seed}.json"
    if not path.exists():
        passed = [sys.executable, __file__, *sys.argv[1:], "--cell", json.dumps([network, keep, seed])]
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join((str(source), str(Path(__file__).parents[1]))),
        }
        done = subprocess.run(passed, stdout=subprocess.PIPE, text=True, env=environment)
        if done.returncode == -signal.SIGXCPU:
            path.write_text(json.dumps({"over": options.limit}))
        else:
            done.check_returncode()
            path.write_text(done.stdout)
        print(version, network, keep, seed, path.read_text().strip(), file=sys.stderr, flush=True)
    return dict(json.loads(path.read_text()))


def cell(options: argparse.Namespace, network: str, keep: float, seed: int) -> dict[str, Any]:
    """Prune once: CPU seconds, accuracy, what was kept and what moved."""
    import torch

    from secateur import Budget, prune
    from secateur.recipes.models import build_model, load_weights

    weights, of_imagenet = options.weights / NETWORKS[network], "/" in network
    model = build_model(network, **({} if of_imagenet else {"classes": 10}))
    load_weights(model, weights)
    model = model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    normalise, images, tested = (draw_imagenet if of_imagenet else draw_cifar)(options, weights, seed)
    batches = list(torch.split(normalise(images, torch.channels_last), BATCH))
    given = dict(option.split("=", 1) for option in options.option)
    extra = {"round_to": 1} | {name: json.loads(value) for name, value in given.items()}
    started = time.process_time()
    free = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(started + options.limit), free[1]))
    pruned = prune(
        model, batches[0][:2], budget=Budget(macs=keep), method="rd", data=batches, stream_gain=1.0, **extra
    )
    seconds = time.process_time() - started
    resource.setrlimit(resource.RLIMIT_CPU, free)
    small = pruned.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.no_grad()
    def accuracy(x: torch.Tensor, y: torch.Tensor) -> float:
        right = 0
        for part, wanted in zip(torch.split(x, 50), torch.split(y, 50), strict=True):
            right += int((small(normalise(part, torch.channels_last)).argmax(1) == wanted).sum())
        return 100 * right / len(x)

    return {
        "accuracy": accuracy(*tested),
        "seconds": seconds,
        "macs": pruned.after["macs"] / pruned.before["macs"],
        "distortion": pruned.facts["measured"],
        "images": len(tested[0]),
    }


def draw_cifar(options: argparse.Namespace, weights: Path, seed: int) -> tuple[Any, Any, Any]:
    """How images become inputs; images to calibrate on; images to test on, with their classes."""
    import torch

    from secateur.recipes.data import load_data
    from secateur.recipes.models import normalisation_for

    data = load_data("cifar10", options.data_dir)
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))
    first, last = (int(part) for part in options.test.split(":"))
    tested = data.test.images[first:last], data.test.labels[first:last]
    return normalisation_for(weights) or data.normalisation, data.train.images[order[:IMAGES]], tested


def draw_imagenet(options: argparse.Namespace, weights: Path, seed: int) -> tuple[Any, Any, Any]:
    """As `draw_cifar`: a quarter of the folder's images calibrates, the others test."""
    import torch

    from benchmarks.imagenet import sample
    from secateur.recipes.normalisation import Normalisation

    data = sample(options.imagenet)
    parts = [split.batches([(torch.arange(len(split)), None)]) for split in (data.train, data.test)]
    pixels, labels = (torch.cat(each) for each in zip(*itertools.chain(*parts), strict=True))
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
    some, others = order[: len(pixels) // 4], order[len(pixels) // 4 :]
    return Normalisation((0.5,) * 3, (0.5,) * 3), pixels[some], (pixels[others], labels[others])


def render(options: argparse.Namespace, found: dict[tuple[str, str, float], list[dict[str, Any]]]) -> str:
    import torch

    from secateur.cost.latency import device_name

    words = " --imagenet imagenet1k-sample" if options.imagenet else ""
    words += " --before OLD/src" if options.before else ""
    words += f" --seeds {options.seeds}" if options.seeds != 3 else ""
    words += f" --imagenet-seeds {options.imagenet_seeds}" if options.imagenet_seeds != 1 else ""
    words += f" --limit {options.limit}" if options.limit != 1500 else ""
    words += f" --only {options.only}" if options.only else ""
    lines = [
        "# What rd on channels costs",
        "",
        f"`python benchmarks/rd_cost.py --weights weights --data-dir cifar10{words} --out docs/results/rd-cost.md`",
        "",
        f"{device_name('cpu')}, 1 thread, torch {torch.__version__}. CPU seconds of `prune` (analysis, cut and proof",
        f"included), {IMAGES} calibration images (of ImageNet: a quarter of the folder's), accuracy right after the",
        "cut, without training, mean and range over draws of calibration images. CIFAR-10 is tested on images",
        f"{options.test} of its test set; ImageNet on all images of the folder that do not calibrate. Each",
        "cell ran in a process of its own, on cores that other work shared; importing `torch.export`, about 2 s of",
        "each, is counted. Any width may be chosen (`round_to=1`), and streams are protected where that is better",
        "(`stream_gain=1`). What the defaults are was chosen on training images of CIFAR-10, apart from those that",
        "calibrate. Distortion is what the method itself measures on calibration images; two versions may measure it",
        "otherwise.",
    ]
    if options.before:
        lines += [
            "",
            f"*before* is {described(options.before)};",
            "*after* is the version that this page belongs to.",
        ]
    lines += [
        "",
        "| network | MACs kept | version | draws | images tested | accuracy, % | CPU seconds | distortion |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (version, network, keep), cells in found.items():
        if "over" in cells[-1]:
            lines.append(
                f"| {network} | {keep} | {version} | {len(cells)} | | | more than {cells[-1]['over']:,} | |"
            )
            continue
        columns = [
            told([c[name] for c in cells], digits) for name, digits in (("accuracy", 2), ("seconds", 1))
        ]
        moved, images = statistics.mean(c["distortion"] for c in cells), cells[0]["images"]
        lines.append(
            f"| {network} | {keep} | {version} | {len(cells)} | {images:,} | {columns[0]} | {columns[1]} "
            f"| {moved:.4f} |"
        )
    if any("over" in cells[-1] for cells in found.values()):
        lines += [
            "",
            f"A process was ended after {options.limit:,} s of `prune`. That version was not tried on the network at",
            "other shares, where its curves are the same.",
        ]
    if options.before:
        lines += [
            "",
            "After beside before, draw by draw:",
            "",
            "| network | MACs kept | points of accuracy | times as fast |",
            "|---|---|---|---|",
        ]
        for (version, network, keep), cells in found.items():
            others = found.get(("before", network, keep))
            if version == "after" and others:
                lines.append(f"| {network} | {keep} | {' | '.join(compared(others, cells))} |")
    return "\n".join(lines) + "\n"


def compared(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> tuple[str, str]:
    """Points of accuracy gained, and times as fast; of draws that both ended."""
    if "over" in before[-1]:
        return "", f"more than {before[-1]['over'] / statistics.mean(c['seconds'] for c in after):.1f}"
    pairs = list(zip(before, after, strict=True))
    gained = told([b["accuracy"] - a["accuracy"] for a, b in pairs], 2, "+")
    return gained, told([a["seconds"] / b["seconds"] for a, b in pairs], 1)


def described(source: Path) -> str:
    """A version's commit, and what it does if that is known."""
    found = subprocess.run(
        ["git", "-C", str(source), "rev-parse", "--short=7", "HEAD"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    commit = found.stdout.strip()
    return f"commit {commit}{VERSIONS.get(commit, '')}"


def told(values: list[float], digits: int, sign: str = "") -> str:
    """The mean and the range."""
    mean, low, high = (f"{v:{sign}.{digits}f}" for v in (statistics.mean(values), min(values), max(values)))
    return f"{mean} ({low} – {high})" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
