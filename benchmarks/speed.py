"""How fast half of the MACs is: networks cut to half their MACs by l2, global, at the default widths and at any width.

    pip install '.[benchmark]'
    OMP_NUM_THREADS=1 python benchmarks/speed.py --peers --out docs/results/speed.md

Weights are fresh: times follow from widths. Dense and cut networks are timed in turn, in one loop, on one thread; a
speed-up is the quotient of the fast tenths, ± is how far thirds of the measurement are apart. Nothing else should run.
"""

import argparse
import copy
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODELS = {
    "resnet20": 32,
    "torchvision/mobilenet_v2": 224,
    "torchvision/resnet50": 224,
    "torchvision/efficientnet_b0": 224,
    "torchvision/convnext_tiny": 224,
    "torchvision/densenet121": 224,
    "torchvision/vit_b_16": 224,
}
"""Name -> side of its images."""

RUNTIMES = ("onnxruntime", "PyTorch")
DEFAULT, ANY, PEER = "default widths", "any width", "Torch-Pruning"


@dataclass(frozen=True)
class Row:
    """One network, runtime and batch.

    Attributes:
        pairs: kind of cut -> dense and cut, timed.
        kept: kind of cut -> share of the MACs that stay.
        why: what the default widths are multiples of.
    """

    model: str
    runtime: str
    batch: int
    pairs: dict[str, Any]
    kept: dict[str, float]
    why: str


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", default=list(MODELS), help="others are taken at 224 pixels")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8])
    parser.add_argument("--keep-macs", type=float, default=0.5)
    parser.add_argument(
        "--peers", action="store_true", help="Torch-Pruning beside it, l2 of first layers, global"
    )
    parser.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    started, rows = time.perf_counter(), []
    for name in options.models:
        rows += measure(name, options)
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    text = render(rows, options, time.perf_counter() - started)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)


def measure(name: str, options: argparse.Namespace) -> list[Row]:
    """Cut a network and time what comes of it."""
    import torch

    from secateur.cost.latency import compare_pairs
    from secateur.export import export_onnx, onnx_runner
    from secateur.recipes.models import build_model

    torch.manual_seed(0)
    dense, side = build_model(name).eval(), MODELS.get(name, 224)
    x = torch.randn(1, 3, side, side)
    cut, kept, why = cuts(dense, x, options)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        runners = {
            kind: onnx_runner(export_onnx(model, x, Path(folder, f"{number}.onnx")).path, threads=1)
            for number, (kind, model) in enumerate({"dense": dense, **cut}.items())
        }
        for runtime, runs in zip(RUNTIMES, (runners, {"dense": dense, **cut}), strict=True):
            for batch in options.batches:
                images = torch.randn(batch, 3, side, side)
                others = {kind: run for kind, run in runs.items() if kind != "dense"}
                pairs = compare_pairs(runs["dense"], others, images, threads=1)
                rows.append(Row(name, runtime, batch, pairs, kept, why))
    return rows


def cuts(dense: Any, x: Any, options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, float], str]:
    """Kind -> the cut network, and the share of the MACs that it keeps; what the default widths are multiples of."""
    from secateur import Budget, prune

    budget = Budget(macs=options.keep_macs)
    found = {
        DEFAULT: prune(dense, x, budget=budget, method="oneshot"),
        ANY: prune(dense, x, budget=budget, method="oneshot", round_to=1),
    }
    models = {kind: pruned.model for kind, pruned in found.items()}
    kept = {kind: pruned.after["macs"] / pruned.before["macs"] for kind, pruned in found.items()}
    if options.peers:
        import peers

        models[PEER] = peers.torch_pruning(copy.deepcopy(dense), x, budget, importance="first-l2").eval()
        kept[PEER] = peers.macs(models[PEER], x) / peers.macs(dense, x)
    return models, kept, found[DEFAULT].plan.origin["multiples"]["why"]


def render(rows: list[Row], options: argparse.Namespace, seconds: float) -> str:
    """The table, and how it was made."""
    import onnxruntime
    import torch

    from secateur.report import current_versions

    versions = current_versions()
    kinds = list(rows[0].pairs)
    words = [*(["--peers"] if options.peers else []), "--out docs/results/speed.md"]
    if list(options.models) != list(MODELS):
        words.insert(0, f"--models {' '.join(options.models)}")
    lines = [
        "# Speed at half the MACs",
        "",
        f"`OMP_NUM_THREADS=1 python benchmarks/speed.py {' '.join(words)}`",
        "",
        f"Networks of fresh weights (seed 0), cut to {options.keep_macs:.0%} of their MACs by `l2`, global. By default",
        "`prune` takes widths that the hardware likes; any width is `round_to=1`. Dense and cut networks are timed",
        "in turn, in one loop, on one thread; × is the quotient of the fast tenths, ± how far thirds of the",
        "measurement are apart; a dash where other work disturbed the clock. The last column: of the MACs that the",
        "default widths save, the share that became time.",
        f"{versions['device']}, torch {torch.__version__}, onnxruntime {onnxruntime.__version__}; {seconds:.0f} s.",
        "",
        f"| network | runtime | batch | dense, ms | {' | '.join(kinds)} | became time |",
        f"|---|---|---|---|{'---|' * len(kinds)}---|",
    ]
    for row in rows:
        cells = [told(row.pairs[kind]) for kind in kinds]
        pair = row.pairs[DEFAULT]
        share = (1 - 1 / pair.speed_up) / (1 - row.kept[DEFAULT])
        lines.append(
            f"| {row.model} | {row.runtime} | {row.batch} | {pair.before.p10_ms:.3g} | {' | '.join(cells)} "
            f"| {f'{100 * share:.0f} %' if pair.steady else '–'} |"
        )
    lines += ["", "MACs kept, and what the default widths are:", ""]
    for row in {row.model: row for row in rows}.values():
        shares = ", ".join(f"{kind} {100 * share:.1f} %" for kind, share in row.kept.items())
        lines.append(f"- {row.model}: {shares}. {row.why}")
    return "\n".join(lines) + "\n"


def told(pair: Any) -> str:
    """The speed-up with its spread, if it can be told."""
    return f"{pair.speed_up:.2f}× ± {pair.spread * pair.speed_up:.2f}" if pair.steady else "–"


if __name__ == "__main__":
    main()
