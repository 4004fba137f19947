"""Where the time of `secateur prune --method auto` goes on images of ImageNet: CPU seconds and memory by step.

    pip install '.[benchmark]'
    python benchmarks/rd_steps.py --data-dir imagenet1k-sample --weights imagenet_tf_efficientnet_lite0.safetensors \
        --out docs/results/rd-steps.md

EfficientNet-Lite0 with its weights, and ResNet-50 from a checkpoint of random ones, whose cost is that of trained ones:
each one call of the command line in a process of its own, on one thread.
"""

import argparse
import functools
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STEPS = {
    "load the data and the model": ("secateur.runs.pipeline", "load_task"),
    "analysis": ("secateur.engine.method", "Method.analyze"),
    "capture of the passes": ("secateur.methods.rd.channels", "Replay.__init__"),
    "what goes into every layer": ("secateur.methods.rd.channels", "Task.see"),
    "ranking of the units": ("secateur.methods.rd.channels", "Task.rank"),
    "curves": ("secateur.methods.rd.channels", "measure_curves"),
    "search over widths": ("secateur.methods.rd.channels", "choose_widths_by"),
    "trials, weights solved again": ("secateur.methods.rd.channels", "Task.tried"),
    "cut and proof": ("secateur.methods.rd.channels", "cut_and_prove"),
    "accuracy": ("secateur.runs.pipeline", "measure_accuracy"),
}
"""Step -> module, and the function or method of it that takes the step. None calls another."""

MODELS = ("timm/tf_efficientnet_lite0", "torchvision/resnet50")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, required=True, help="a folder per class of ImageNet")
    parser.add_argument("--weights", type=Path, required=True, help="of EfficientNet-Lite0")
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--keep-macs", type=float, default=0.5)
    parser.add_argument("--out", type=Path, help="also write the page to this Markdown file")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        options.inside.write_text(json.dumps(run(options.words)))
        return
    text = render(options, {name: measure(name, options) for name in options.models})
    print(text)
    if options.out:
        options.out.write_text(text)


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The steps of one call of the command line."""
    with tempfile.TemporaryDirectory() as folder:
        weights, found = options.weights, Path(folder, "found.json")
        if name != MODELS[0]:
            from safetensors.torch import save_file

            from secateur.recipes.models import build_model

            weights = Path(folder, "weights.safetensors")
            save_file(build_model(name).state_dict(), weights)
        words = (
            f"prune --model {name} --weights {weights} --data benchmarks.imagenet:sample --data-dir {options.data_dir} "
            f"--keep-macs {options.keep_macs} --no-exports --no-progress --out {folder}/run"
        ).split()
        roots = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, roots)),
        }
        inside = [sys.executable, __file__, *sys.argv[1:], "--inside", str(found), "--", *words]
        subprocess.run(inside, check=True, env=environment, stdout=sys.stderr)
        return dict(json.loads(found.read_text()))


def run(words: list[str]) -> dict[str, Any]:
    """Call the command line, and tell per step its CPU seconds and how much memory had been taken when it ended."""
    steps: dict[str, list[float]] = {}

    def timed(name: str, function: Any) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                before = steps.get(name, [0.0, 0.0])[0]
                steps[name] = [before + time.process_time() - started, peak()]

        return call

    for name, (module, path) in STEPS.items():
        owner: Any = importlib.import_module(module)
        *inner, last = path.split(".")
        for part in inner:
            owner = getattr(owner, part)
        setattr(owner, last, timed(name, getattr(owner, last)))
    from secateur.cli import app

    started = time.process_time()
    app(words, standalone_mode=False)
    return {"steps": steps, "seconds": time.process_time() - started, "peak": peak()}


def peak() -> float:
    """The most memory that the process has taken so far, in gigabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def render(options: argparse.Namespace, found: dict[str, dict[str, Any]]) -> str:
    import torch

    from secateur.cost.latency import device_name

    lines = [
        "# Where the time of rd goes at 224 px",
        "",
        f"`python benchmarks/rd_steps.py --data-dir {options.data_dir.name} --weights {options.weights.name} "
        "--out docs/results/rd-steps.md`",
        "",
        f"{device_name('cpu')}, 1 thread, torch {torch.__version__}.",
        f"`secateur prune --keep-macs {options.keep_macs:g}` by its default method, `auto`, which takes rd; 250 images",
        "of ImageNet calibrate and 750 test. EfficientNet-Lite0 has published weights, other networks random ones.",
        "CPU seconds, importing included in the first step that needs it, and the most memory that the process had",
        "taken when the step last ended. Accuracy is measured of the dense and of the cut network. Everything else",
        "includes reading the images, the dense network's outputs, and solving the chosen network's weights on all",
        "images.",
    ]
    for name, row in found.items():
        lines += ["", f"## {name}", "", "| step | CPU s | peak so far, GB |", "|---|---|---|"]
        for step in STEPS:
            if step in row["steps"]:
                seconds, memory = row["steps"][step]
                lines.append(f"| {step} | {seconds:.1f} | {memory:.1f} |")
        rest = row["seconds"] - sum(seconds for seconds, _ in row["steps"].values())
        lines += [
            f"| everything else | {rest:.1f} | |",
            f"| **in all** | {row['seconds']:.1f} | {row['peak']:.1f} |",
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
