"""Blocks, channels or both: what rd leaves of the accuracy right after the cut, at equal MACs and at equal times.

    pip install '.[benchmark]'
    OMP_NUM_THREADS=1 python benchmarks/blocks.py --data DATA_FOLDER --out docs/results/blocks.md

Milliseconds are those of onnxruntime, batch 1, one thread; every model is timed in turn with the dense one, and nothing
else should run. Each cell is kept in `--runs`, so that a run that was stopped goes on where it was; `--render` writes
the page of those there are.
"""

import argparse
import functools
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import secateur as sc
from secateur.cost.latency import compare_pairs, device_name
from secateur.export import export_onnx, onnx_runner
from secateur.methods import RD, OneShot
from secateur.methods.latency import Clock
from secateur.onnx_clock import in_onnxruntime
from secateur.recipes.data import load_data
from secateur.recipes.data.image_files import read_image
from secateur.recipes.models import build_model
from secateur.recipes.models.weights import load_weights, normalisation_for

GRANULARITIES = ("channels", "blocks", "both")
SHARES = (0.7, 0.5)
VIT = "vit_b_16"
BOUNDS = {"macs": "MACs", "ms": "milliseconds"}
CALIBRATION, TEST = 256, 2000


@dataclass(frozen=True)
class Network:
    """A trained network with images to measure on.

    Attributes:
        model: dense, in evaluation mode.
        calibration: batches of images.
        test: batches of images and labels.
    """

    model: nn.Module
    calibration: list[Tensor]
    test: list[tuple[Tensor, Tensor]]


def resnet(name: str, data: Path) -> Network:
    """A ResNet on CIFAR-10; images of the training set calibrate, the first of the test set tell."""
    weights = data / "weights" / f"cifar10_{name}_optA_akamaster.safetensors"
    images = load_data("cifar10", data / "cifar10")
    model = build_model(name, classes=10).eval()
    load_weights(model, weights)
    prepare = normalisation_for(weights) or images.normalisation
    train = images.subset(train_images=CALIBRATION).train.images
    assert isinstance(train, Tensor)
    assert isinstance(images.test.images, Tensor)
    test = prepare(images.test.images[:TEST]).split(250)
    return Network(
        model,
        list(prepare(train).split(64)),
        list(zip(test, images.test.labels[:TEST].split(250), strict=True)),
    )


def efficientnet(data: Path) -> Network:
    """EfficientNet-Lite0 on a sample of ImageNet: every fourth image calibrates, the others tell."""
    model = build_model("timm/tf_efficientnet_lite0", classes=1000).eval()
    load_weights(model, data / "weights" / "imagenet_tf_efficientnet_lite0.safetensors")
    files = sorted((data / "imagenet1k-sample").glob("*/*.jpg"))
    pixels = torch.stack([read_image(file, 224) for file in files])
    labels = torch.arange(len(files))
    first = labels % 4 == 0

    def prepared(some: Tensor) -> Tensor:
        return (some.float() / 255 - 0.5) / 0.5

    test = list(zip(pixels[~first].split(50), labels[~first].split(50), strict=True))
    calibration = prepared(pixels[first])
    return Network(model, list(calibration.split(25)), [(prepared(x), y) for x, y in test])


NETWORKS: dict[str, Callable[[Path], Network]] = {
    "resnet20": functools.partial(resnet, "resnet20"),
    "resnet56": functools.partial(resnet, "resnet56"),
    "tf_efficientnet_lite0": efficientnet,
}


def in_runtime(model: nn.Module, image: Tensor) -> Callable[..., Any]:
    """A model in onnxruntime on one thread."""
    with tempfile.TemporaryDirectory() as folder:
        return onnx_runner(export_onnx(model, image, Path(folder, "model.onnx")).path, threads=1)


@torch.no_grad()
def accuracy(model: nn.Module, test: list[tuple[Tensor, Tensor]]) -> float:
    """Per cent of the test images."""
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in test)
    return 100 * right / sum(len(y) for _, y in test)


def measured_cell(at_hand: Callable[[], "AtHand"], bound: str, share: float, kind: str) -> dict[str, Any]:
    """Prune to a share of the dense MACs or milliseconds."""
    it = at_hand()
    clock = it.clock if bound == "ms" else None
    budget = sc.Budget(latency_ms=share * clock(it.network.model)) if clock else sc.Budget(macs=share)
    pruned = sc.prune(
        it.network.model,
        it.network.calibration[0][:2],
        budget=budget,
        method=RD(granularity=kind, exponents=(0.5, 1.0)),  # type: ignore[arg-type]
        data=it.network.calibration,
        clock=clock,
        cache=it.runs,
    )
    assert isinstance(pruned.plan, sc.Plan)
    assert pruned.proof is not None
    blocks = [name for name in pruned.plan.removed if name.endswith(" (block)")]
    found = {
        "macs": pruned.after["macs"] / pruned.before["macs"],
        "blocks": len(blocks),
        "groups": len(pruned.plan.removed) - len(blocks),
        "accuracy": accuracy(pruned.model, it.network.test),
        "equal": pruned.proof.ok,
    }
    return found | (timed(it.dense, pruned.model, it.image) if clock else {})


def timed(dense: Callable[..., Any], model: nn.Module, image: Tensor) -> dict[str, Any]:
    """How fast a model is beside the dense one, in turn in one loop."""
    pair = compare_pairs(dense, {"after": in_runtime(model, image)}, image, threads=1)["after"]
    return {
        "dense": pair.before.p10_ms,
        "speed_up": pair.speed_up,
        "spread": pair.spread,
        "steady": pair.steady,
    }


@dataclass
class AtHand:
    """A network, loaded, and what is timed of it."""

    network: Network
    runs: Path

    @property
    def image(self) -> Tensor:
        return self.network.calibration[0][:1]

    @functools.cached_property
    def clock(self) -> Clock:
        """Milliseconds of the network's models."""
        return in_onnxruntime(self.network.model, self.image, threads=1)

    @functools.cached_property
    def dense(self) -> Callable[..., Any]:
        return in_runtime(self.network.model, self.image)


def vit_cell(kind: str) -> dict[str, Any]:
    """ViT-B at half of its MACs, of fresh weights: what becomes time."""
    torch.manual_seed(0)
    dense, x = build_model("torchvision/vit_b_16").eval(), torch.randn(1, 3, 224, 224)
    pruned = sc.prune(dense, x, budget=0.5, method=OneShot(granularity=kind))  # type: ignore[arg-type]
    return timed(in_runtime(dense, x), pruned.model, x) | {
        "macs": pruned.after["macs"] / pruned.before["macs"]
    }


class Cells:
    """What was measured, one file each."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.options.runs.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """Of its file, or measured now; None: only a page is asked for, and there is no file."""
        path = self.options.runs / f"{name}.json"
        if path.exists():
            return json.loads(path.read_text())  # type: ignore[no-any-return]
        if self.options.render:
            return None
        started = time.process_time()
        found = measure() | {"seconds": time.process_time() - started}
        path.write_text(json.dumps(found))
        print(time.strftime("%X"), name, found, file=sys.stderr, flush=True)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="holds cifar10, imagenet1k-sample and weights"
    )
    parser.add_argument("--only", nargs="*", default=[*NETWORKS, VIT])
    parser.add_argument("--bounds", nargs="*", default=list(BOUNDS), choices=list(BOUNDS))
    parser.add_argument("--shares", nargs="*", type=float, default=list(SHARES))
    parser.add_argument("--runs", type=Path, default=Path("runs/blocks"))
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--out", type=Path, help="also write the page to this Markdown file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    text = page(options)
    print(text)
    if options.out:
        options.out.write_text(text)


def page(options: argparse.Namespace) -> str:
    """Measure what is missing, and tell all of it."""
    cells = Cells(options)
    every = {"only": [*NETWORKS, VIT], "bounds": list(BOUNDS), "shares": list(SHARES)}
    chosen = {name: getattr(options, name) for name, all_ in every.items() if getattr(options, name) != all_}
    asked = "".join(f" --{name} {' '.join(map(str, some))}" for name, some in chosen.items())
    lines = [
        "# Blocks, channels or both",
        "",
        f"`OMP_NUM_THREADS=1 python benchmarks/blocks.py --data DATA_FOLDER{asked} --out docs/results/blocks.md`",
        "",
        "`rd` prunes to a bound: by channels only, by whole residual branches only, or by both. Accuracy is right",
        f"after the cut, without fine-tuning; {CALIBRATION} training images of CIFAR-10, or 250 of an ImageNet sample,",
        f"calibrate, and {TEST:,} test images, or the other 750, tell. Milliseconds are those of onnxruntime, batch 1,",
        "one thread; dense and pruned are timed in turn, × is the quotient of the fast tenths, ± how far thirds of the",
        "measurement are apart; a dash where other work disturbed the clock.",
        f"{device_name('cpu')}, torch {torch.__version__}.",
        "",
    ]
    for name in [name for name in options.only if name in NETWORKS]:
        lines += table(name, cells, options)
    if VIT in options.only:
        found = {
            kind: cells.get(f"{VIT}-{kind}", lambda kind=kind: vit_cell(kind)) for kind in GRANULARITIES[:2]
        }  # type: ignore[misc]
        if any(found.values()):
            lines += ["## ViT-B/16, fresh weights, by `l2`: what half of the MACs becomes", ""]
            lines += ["| what goes | MACs kept | × |", "|---|---|---|"]
            lines += [f"| {kind} | {100 * c['macs']:.1f} % | {told(c)} |" for kind, c in found.items() if c]
            lines += [""]
    return "\n".join(lines)


def table(name: str, cells: Cells, options: argparse.Namespace) -> list[str]:
    """One network."""
    made: list[AtHand] = []

    def at_hand() -> AtHand:
        if not made:
            made.append(AtHand(NETWORKS[name](options.data), options.runs))
        return made[0]

    def dense() -> dict[str, Any]:
        network = at_hand().network
        return {"accuracy": accuracy(network.model, network.test)}

    known = cells.get(f"{name}-dense", dense)
    lines = [f"## {name}: {known['accuracy']:.1f} % dense", ""] if known else []
    for bound in options.bounds:
        rows = []
        for share in options.shares:
            for kind in GRANULARITIES:
                cell = cells.get(
                    f"{name}-{bound}-{share}-{kind}",
                    lambda bound=bound, share=share, kind=kind: measured_cell(at_hand, bound, share, kind),  # type: ignore[misc]
                )
                if cell:
                    time_ = f" {told(cell)} |" if bound == "ms" else ""
                    rows.append(
                        f"| {share:.0%} | {kind} | {cell['accuracy']:.1f} % |{time_} {100 * cell['macs']:.1f} % "
                        f"| {cell['blocks']} | {cell['groups']} |"
                    )
        if rows:
            more = (" × |", "---|") if bound == "ms" else ("", "")
            lines += [
                f"| {BOUNDS[bound]} | what may go | accuracy |{more[0]} MACs kept | blocks gone | groups narrower |",
                f"|---|---|---|{more[1]}---|---|---|",
                *rows,
                "",
            ]
    return lines


def told(cell: dict[str, Any]) -> str:
    """The speed-up with its spread, if it can be told."""
    return f"{cell['speed_up']:.2f}× ± {cell['spread'] * cell['speed_up']:.2f}" if cell["steady"] else "–"


if __name__ == "__main__":
    main()
