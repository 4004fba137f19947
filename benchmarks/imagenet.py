"""A network trained on ImageNet, pruned without training and after a short one: rd, plain scores and Torch-Pruning.

    pip install '.[benchmark]'
    python benchmarks/imagenet.py --data imagenet1k-sample --weights imagenet_tf_efficientnet_lite0.safetensors \
        --out docs/results/imagenet.md
    python benchmarks/imagenet.py --data imagenet --model torchvision/resnet50 --runs runs/resnet50 --out resnet50.md

DATA is ImageNet itself, `train/CLASS/*` and `val/CLASS/*`, or a folder `CLASS/*` for each of its classes: of that,
every fourth image calibrates and the others test. Without `--weights` the library's own are downloaded. Every cell is
kept in a file of --runs as soon as it is measured, so that a run can go on later, or with other --keep, --methods and
--widths.
"""

import argparse
import copy
import itertools
import json
import shlex
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur import Budget, prune
from secateur.recipes.data.dataset import Dataset, Split
from secateur.recipes.normalisation import Normalisation

METHODS: dict[str, dict[str, Any]] = {
    "rd": {"method": "rd"},
    "l2, least squares": {"score": "l2", "compensation": "least-squares"},
    "l2, norms": {"score": "l2", "compensation": "batch-norm"},
    "Taylor, least squares": {"score": "taylor", "compensation": "least-squares"},
    "Taylor, norms": {"score": "taylor", "compensation": "batch-norm"},
    "Torch-Pruning, l2, norms": {"peer": "first-l2"},
    "Torch-Pruning, group norm, norms": {"peer": "group-norm"},
    "Torch-Pruning, Taylor, norms": {"peer": "taylor"},
}
"""Name -> options of `secateur.prune`; or Torch-Pruning's importance."""

WIDTHS: dict[str, int | str] = {"default": "auto", "any": 1}
"""Name -> `round_to`."""

RATE = 2e-4
"""Of the training after the cut: low, because batch norms keep their statistics."""

KEEP = (0.9, 0.8, 0.7, 0.6, 0.5)
BATCH = 50


@dataclass(frozen=True)
class Task:
    """A network and its images.

    Attributes:
        model: dense, in evaluation mode.
        calibrate, test: normalised images in batches, with their classes.
        teacher: of the calibration batches, as they are and mirrored: the dense network's outputs.
    """

    model: nn.Module
    calibrate: list[tuple[Tensor, Tensor]]
    test: list[tuple[Tensor, Tensor]]
    teacher: list[tuple[Tensor, Tensor]]

    @property
    def example(self) -> Tensor:
        return self.calibrate[0][0][:2]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="ImageNet, or a folder per class")
    parser.add_argument("--model", default="timm/tf_efficientnet_lite0")
    parser.add_argument("--weights", type=Path, help="safetensors; default: the library's own, downloaded")
    parser.add_argument("--normalisation", help="MEAN/STD, or imagenet; default: as the library says")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--calibrate", type=int, default=250, help="images at most")
    parser.add_argument("--test", type=int, default=750, help="images at most")
    parser.add_argument("--epochs", type=int, default=4, help="over the calibration images, after the cut")
    parser.add_argument(
        "--tune", nargs="*", type=float, default=[0.7, 0.5], help="shares of the MACs that are tuned"
    )
    parser.add_argument("--keep", nargs="*", type=float, default=list(KEEP), help="shares of the MACs")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS, metavar="NAME")
    parser.add_argument("--widths", nargs="*", default=list(WIDTHS), choices=WIDTHS)
    parser.add_argument("--no-times", action="store_true", help="leave the milliseconds for a later run")
    parser.add_argument("--runs", type=Path, default=Path("runs/imagenet"), help="where the cells are kept")
    parser.add_argument("--out", type=Path, help="also write the page to this Markdown file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    options.runs.mkdir(parents=True, exist_ok=True)
    fill(options)
    text = render(options, read(options.runs))
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)


def sample(folder: Path | str | None, image_size: int = 224) -> Dataset:
    """A folder per class as a data set (`--data benchmarks.imagenet:sample`): every fourth image calibrates."""
    from secateur.recipes.data.image_files import ImageFiles

    home = Path(folder or ".")
    classes = tuple(sorted(child.name for child in home.iterdir() if child.is_dir()))
    found = [(path, label) for label, name in enumerate(classes) for path in sorted((home / name).glob("*"))]
    every = Split(
        ImageFiles(tuple(path for path, _ in found), image_size), torch.tensor([label for _, label in found])
    )
    place = torch.arange(len(found))
    some, others = every.take(place[place % 4 == 0]), every.take(place[place % 4 != 0])
    return Dataset("sample", some, others, classes, Normalisation.parse("imagenet"), "crop+flip")


def load(options: argparse.Namespace) -> Task:
    """The dense network, and the images in memory."""
    from secateur.recipes.data import load_data

    model, normalise = load_model(options)
    if (options.data / "train").is_dir():
        data = load_data("imagefolder", options.data, image_size=options.image_size)
    else:
        data = sample(options.data, options.image_size)
    data = data.subset(
        train_images=min(options.calibrate, len(data.train)), test_images=min(options.test, len(data.test))
    )

    def batches(split: Split) -> list[tuple[Tensor, Tensor]]:
        parts = [(indices, None) for indices in torch.arange(len(split)).split(BATCH)]
        return [(normalise(x, torch.channels_last), y) for x, y in split.batches(parts)]

    calibrate = batches(data.train)
    teacher = []
    if options.epochs and options.tune:
        with torch.no_grad():
            teacher = [(model(x), model(x.flip(3))) for x, _ in calibrate]
    return Task(model, calibrate, batches(data.test), teacher)


def load_model(options: argparse.Namespace) -> tuple[nn.Module, Normalisation]:
    """The dense network with its weights, and how it takes images."""
    from secateur.recipes.models import build_model, load_weights, normalisation_for

    library = options.model.partition("/")[0]
    own = {"torchvision": {"weights": "DEFAULT"}, "timm": {"pretrained": True}}.get(library, {})
    model = build_model(options.model, **({} if options.weights else own))
    normalise = Normalisation.parse(options.normalisation or "imagenet")
    if options.weights:
        load_weights(model, options.weights)
        normalise = normalisation_for(options.weights) or normalise
    return model.eval().to(memory_format=torch.channels_last), normalise  # type: ignore[call-overload]


def fill(options: argparse.Namespace) -> None:
    """Measure what is asked for and not there yet; then the milliseconds, one network at a time."""
    wanted = [
        (keep, widths, method)
        for widths, keep, method in itertools.product(options.widths, options.keep, options.methods)
        if not path_of(options.runs, method, widths, keep).exists()
    ]
    dense = options.runs / "dense.json"
    waiting = [path for path in options.runs.glob("*.onnx") if path.stem != "dense" and not options.no_times]
    if not wanted and dense.exists() and not waiting:
        return
    task = load(options)
    if not dense.exists():
        write(dense, {"right": answers(task.model, task), **about(task)})
    there, now = json.loads(dense.read_text()), about(task)
    if any(there[name] != now[name] for name in ("calibrate", "test", "params")):
        raise SystemExit(
            f"{options.runs}: holds cells of other images or of another network; name another folder"
        )
    for keep, widths, method in wanted:
        path = path_of(options.runs, method, widths, keep)
        try:
            found = measure(task, options, method, widths, keep, path.with_suffix(".onnx"))
        except Exception as error:  # a peer that breaks is a result
            if "peer" not in METHODS[method]:
                raise
            found = {"failed": f"{type(error).__name__}: {error}"}
        write(path, {"method": method, "widths": widths, "keep": keep, **found})
        shown = {name: value for name, value in found.items() if name not in ("right", "tuned")}
        accuracy = share(found["right"])[0] if "right" in found else None
        print(method, widths, keep, accuracy, shown, file=sys.stderr, flush=True)
    if not options.no_times:
        take_times(task, options.runs)


def measure(
    task: Task, options: argparse.Namespace, method: str, widths: str, keep: float, file: Path
) -> dict[str, Any]:
    """Prune once; CPU seconds, and which test images are right at once and after tuning. Leaves an ONNX file."""
    from secateur.export import export_onnx

    started = time.process_time()
    model, macs = cut(task, METHODS[method], WIDTHS[widths], keep, options.runs)
    seconds = time.process_time() - started
    model = model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    found: dict[str, Any] = {"seconds": seconds, "macs": macs, "right": answers(model, task)}
    export_onnx(model, task.example[:1], file)
    if options.epochs and keep in options.tune:
        tune(model, task, options.epochs)
        found["tuned"] = answers(model, task)
    return found


def cut(
    task: Task, given: dict[str, Any], round_to: int | str, keep: float, runs: Path
) -> tuple[nn.Module, float]:
    """The cut network, and the share of the MACs that stays."""
    from secateur.cost import Cost
    from secateur.graph import analyze

    budget = Budget(macs=keep)
    if "peer" not in given:
        options = {"method": "oneshot", "round_to": round_to} | given
        if options["method"] == "rd":
            options |= {"stream_gain": 1.0, "cache": runs}
        pruned = prune(task.model, task.example, budget=budget, data=task.calibrate, **options)
        return pruned.model, pruned.after["macs"] / pruned.before["macs"]
    from benchmarks import peers

    model = peers.torch_pruning(
        copy.deepcopy(task.model), task.example, budget, importance=given["peer"], data=task.calibrate, every=50,
        round_to=round_to if round_to == "auto" else None,
    )  # fmt: skip
    measure_norms(model, task)
    dense, small = (Cost(analyze(m, task.example)).macs() for m in (task.model, model.eval()))
    return model, small / dense


@torch.no_grad()
def measure_norms(model: nn.Module, task: Task) -> None:
    """Means and variances of all batch norms again, on the calibration images."""
    model.eval()
    for norm in (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    for x, _ in task.calibrate:
        model(x)
    model.eval()


def tune(model: nn.Module, task: Task, epochs: int) -> None:
    """A short training on the calibration images, mirrored at random, towards the dense network's outputs.

    Batch norms keep their statistics.
    """
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    steps = epochs * 2 * len(task.calibrate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for (x, _), outputs in zip(task.calibrate, task.teacher, strict=True):
            mirrored = torch.rand(len(x), generator=generator) < 0.5
            images = torch.where(mirrored[:, None, None, None], x.flip(3), x)
            wanted = torch.where(mirrored[:, None], outputs[1], outputs[0]).softmax(1)
            for part in torch.arange(len(x)).chunk(2):
                loss = nn.functional.cross_entropy(model(images[part]), wanted[part])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()


@torch.no_grad()
def answers(model: nn.Module, task: Task) -> str:
    """Which test images are right: a 1 or 0 for each."""
    found = torch.cat([model(x).argmax(1) == y for x, y in task.test])
    return "".join(str(int(right)) for right in found)


def take_times(task: Task, runs: Path) -> None:
    """Dense and cut networks in turn, one image at a time, in onnxruntime; an ONNX file goes once its time is known."""
    from secateur.cost.latency import compare_pair
    from secateur.export import export_onnx, onnx_runner

    dense = runs / "dense.onnx"
    for file in sorted(runs.glob("*.onnx")):
        if file == dense:
            continue
        if not dense.exists():
            export_onnx(task.model, task.example[:1], dense)
        pair = compare_pair(
            onnx_runner(dense, threads=1), onnx_runner(file, threads=1), task.example[:1], threads=1
        )
        row = json.loads(file.with_suffix(".json").read_text())
        times = {"dense_ms": pair.before.p10_ms, "ms": pair.after.p10_ms, "steady": pair.steady}
        write(file.with_suffix(".json"), {**row, **times})
        file.unlink()


def about(task: Task) -> dict[str, Any]:
    """What the page says about where and on what this was measured."""
    from secateur.report import current_versions

    return {
        "calibrate": sum(len(x) for x, _ in task.calibrate),
        "test": sum(len(x) for x, _ in task.test),
        "params": sum(p.numel() for p in task.model.parameters()),
        "versions": current_versions(),
    }


def path_of(runs: Path, method: str, widths: str, keep: float) -> Path:
    name = "-".join(method.lower().replace(",", "").split())
    return runs / f"{widths}-{100 * keep:g}-{name}.json"


def write(path: Path, found: dict[str, Any]) -> None:
    from secateur.files import atomic_write

    atomic_write(path, json.dumps(found))


def read(runs: Path) -> dict[Any, dict[str, Any]]:
    """All cells so far, by (method, widths, keep); the dense network by None."""
    rows = [json.loads(path.read_text()) for path in sorted(runs.glob("*.json"))]
    return {(row["method"], row["widths"], row["keep"]) if "method" in row else None: row for row in rows}


def share(right: str) -> tuple[float, float]:
    """Accuracy in percent, and its standard error from the number of images."""
    p = right.count("1") / len(right)
    return 100 * p, 100 * (p * (1 - p) / len(right)) ** 0.5


def ahead(a: str, b: str) -> tuple[float, float]:
    """By how many points a is ahead of b on the same images, and the standard error of that."""
    apart = torch.tensor([int(x) - int(y) for x, y in zip(a, b, strict=True)], dtype=torch.float64)
    return 100 * float(apart.mean()), 100 * float(apart.std(correction=0)) / len(apart) ** 0.5


def render(options: argparse.Namespace, rows: dict[Any, dict[str, Any]]) -> str:
    dense = rows[None]
    versions, (accuracy, error) = dense["versions"], share(dense["right"])
    model = options.model.rpartition("/")[2]
    words = f" --weights {options.weights.name}" if options.weights else ""
    words += f" --model {options.model}" if options.model != "timm/tf_efficientnet_lite0" else ""
    for name, default in (("calibrate", 250), ("test", 750), ("epochs", 4)):
        words += f" --{name} {getattr(options, name)}" if getattr(options, name) != default else ""
    for name, default_ in (("keep", KEEP), ("widths", WIDTHS), ("methods", METHODS)):
        some = getattr(options, name)
        words += f" --{name} {shlex.join(map(str, some))}" if list(some) != list(default_) else ""
    lines = [
        "# A network trained on ImageNet",
        "",
        f"`python benchmarks/imagenet.py --data {options.data.name}{words} --out docs/results/imagenet.md`",
        "",
        f"{model}, {dense['params']:,} parameters, {options.image_size} px. {dense['calibrate']} images calibrate,",
        f"{len(dense['right'])} others test; the dense network has {accuracy:.1f} ± {error:.1f} %. ± is the standard",
        "error from the number of images; methods are compared on the same images, so that differences between them",
        "are known better than that.",
        "Without any training, one shot: what remains is solved again by *least squares*, or only batch *norms* are",
        "measured again, on the calibration images. *tuned*: "
        f"{options.epochs} epochs on the calibration images with the dense network as teacher.",
        f"{versions['device']}, one thread, torch {versions['torch']}. Seconds are CPU seconds of pruning, on cores",
        "that other work shared; rd measures its curves once for all budgets, in its first cell.",
    ]
    if not (options.data / "train").is_dir():
        lines += [
            "",
            "The images seem to be training images of ImageNet, one per class: this is no ImageNet score. It ranks",
            "pruned networks against their own dense one.",
        ]
    for widths in WIDTHS:
        if any(key and key[1] == widths for key in rows):
            lines += section(widths, rows)
    return "\n".join(lines) + "\n"


def section(widths: str, rows: dict[Any, dict[str, Any]]) -> list[str]:
    """The tables of one kind of widths."""
    titles = {
        "default": "Widths that the hardware likes (the default)",
        "any": "Any width (`round_to=1`)",
    }
    methods = [m for m in METHODS if any(key and key[:2] == (m, widths) for key in rows)]
    keeps = sorted({key[2] for key in rows if key and key[1] == widths}, reverse=True)
    lines = ["", f"## {titles[widths]}", ""]

    def table(title: str, kept: Sequence[float], cell: Any) -> list[str]:
        head = f"| {title} | " + " | ".join(f"{keep:.0%} of the MACs" for keep in kept) + " |"
        body = [
            f"| {m} | " + " | ".join(cell(rows.get((m, widths, keep), {})) for keep in kept) + " |"
            for m in methods
        ]
        return [head, "|---|" + "---|" * len(kept), *body, ""]

    def accuracy(name: str) -> Any:
        def told(row: dict[str, Any]) -> str:
            if "failed" in row:
                return "fails"
            return "{:.1f} ± {:.1f}".format(*share(row[name])) if name in row else "–"

        return told

    def times(row: dict[str, Any]) -> str:
        if "ms" not in row:
            return "–"
        return f"{row['ms']:.2f} ({row['dense_ms'] / row['ms']:.2f}×)" if row["steady"] else "disturbed"

    lines += table("accuracy, %, no training", keeps, accuracy("right"))
    tuned = [keep for keep in keeps if any("tuned" in rows.get((m, widths, keep), {}) for m in methods)]
    if tuned:
        lines += table("accuracy, %, tuned", tuned, accuracy("tuned"))
    lines += table("CPU seconds to prune", keeps, lambda r: f"{r['seconds']:.0f}" if "seconds" in r else "–")
    if any("ms" in row for row in rows.values()):
        lines += table("ms, onnxruntime, batch 1 (times as fast as dense)", keeps, times)
    lines += table("MACs kept, %", keeps, lambda r: f"{100 * r['macs']:.1f}" if "macs" in r else "–")
    if "rd" in methods:
        lines += leads(widths, rows, methods, keeps)
    failed = sorted({f"{key[0]}: {row['failed']}" for key, row in rows.items() if key and "failed" in row})
    return [*lines, *(f"- {line}" for line in failed)]


def leads(
    widths: str, rows: dict[Any, dict[str, Any]], methods: Sequence[str], keeps: Sequence[float]
) -> list[str]:
    """By how much rd is ahead of the best of the others, on the same images."""
    found = []
    for keep, name in itertools.product(keeps, ("right", "tuned")):
        own = rows.get(("rd", widths, keep), {})
        others = {m: rows.get((m, widths, keep), {}) for m in methods if m != "rd"}
        others = {m: row for m, row in others.items() if name in row}
        if name in own and others:
            best = max(others, key=lambda m: others[m][name].count("1"))
            points, error = ahead(own[name], others[best][name])
            when = "" if name == "right" else ", tuned"
            found.append(f"- {keep:.0%}{when}: {points:+.1f} ± {error:.1f} ({best})")
    return (
        ["rd beside the best of the others, points of accuracy on the same images:", "", *found]
        if found
        else []
    )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
