"""Widths before training: what PreCropping makes of networks at half and a quarter of their MACs and parameters.

    pip install '.[vision]'
    python benchmarks/widths.py --out docs/results/widths.md

Only graphs are read; nothing is trained.
"""

import argparse
import warnings
from pathlib import Path
from typing import Any

BUILT_IN = ("resnet20", "resnet32", "resnet56", "mobilenet_v2_cifar", "shufflenet_v2_x1_0_cifar")
TORCHVISION = ("resnet50", "mobilenet_v2", "shufflenet_v2_x1_0", "efficientnet_b0")
Row = dict[str, Any]

BUDGETS = (("macs", 0.5), ("macs", 0.25), ("params", 0.5), ("params", 0.25))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--round-to", type=int, default=1, help="widths are multiples of this, or what they were"
    )
    parser.add_argument(
        "--models", nargs="*", default=[*BUILT_IN, *(f"torchvision/{n}" for n in TORCHVISION)]
    )
    parser.add_argument("--out", type=Path, help="also write the tables to this Markdown file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    text = render({name: rows(name, options.round_to) for name in options.models}, options)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)


def rows(name: str, round_to: int) -> list[Row]:
    """One design per budget and treatment of residual streams."""
    import torch

    from secateur import Cost, analyze
    from secateur.errors import BudgetError
    from secateur.methods import PreCrop
    from secateur.methods.precrop.design import design
    from secateur.recipes.models import build_model

    torch.manual_seed(0)
    model, side = build_model(name), 224 if "/" in name else 32
    x = torch.randn(1, 3, side, side)
    graph = analyze(model, x)
    cost = Cost(graph)
    found = []
    for measure, share in BUDGETS:
        for streams in ("keep", "shared"):
            row: Row = {
                "budget": f"{share:.0%} {measure}",
                "streams": streams,
                "dense": (cost.macs(), cost.params()),
            }
            try:
                limits = {measure: int(share * cost.of(measure))}
                plan = design(model, x, graph, limits, PreCrop(streams=streams, round_to=round_to))
                row |= {m: (plan.before[m], plan.after[m]) for m in ("macs", "params")}
                row["widths"] = summary(plan.widths)
            except BudgetError as error:
                row["error"] = str(error).split(")")[0] + ")"
            found.append(row)
    return found


def summary(widths: tuple[int, ...]) -> str:
    """Widths in the order of the forward pass; runs of equal ones are counted."""
    runs: list[list[int]] = []
    for width in widths:
        if runs and runs[-1][0] == width:
            runs[-1][1] += 1
        else:
            runs.append([width, 1])
    return " ".join(f"{width}×{count}" if count > 1 else str(width) for width, count in runs)


def render(found: dict[str, list[Row]], options: argparse.Namespace) -> str:
    from importlib.metadata import PackageNotFoundError, version

    import torch

    try:
        vision = f", torchvision {version('torchvision')}"
    except PackageNotFoundError:
        vision = ""
    asked = "" if options.round_to == 1 else f" --round-to {options.round_to}"
    lines = [
        "# Widths before training",
        "",
        f"`python benchmarks/widths.py{asked} --out docs/results/widths.md`",
        "",
        'Densities in closed form (`densities="optimal"`), fitted to widths through the groups of the graph, widths in',
        f"multiples of {options.round_to}. `keep` leaves residual streams as wide as they are, `shared` narrows each",
        "by one factor. Widths are units per group in the order of the forward pass, streams included; `37×3` is three",
        "groups of 37; a channel that is padded or repeated eight times is one unit of eight. Only",
        f"counts are shown, so neither device nor seed matters; torch {torch.__version__}{vision}.",
    ]
    for name, designs in found.items():
        macs, params = designs[0]["dense"]
        lines += ["", f"## {name}", "", f"Dense: {macs:,} MACs, {params:,} parameters.", ""]
        lines += [
            "| budget | streams | MACs kept | parameters kept | units per group |",
            "|---|---|---|---|---|",
        ]
        for row in designs:
            head = f"| {row['budget']} | {row['streams']} "
            if "error" in row:
                lines.append(f"{head}| | | {row['error']} |")
                continue
            shares = [f"{row[m][1]:,} ({row[m][1] / row[m][0]:.2%})" for m in ("macs", "params")]
            lines.append(f"{head}| {' | '.join(shares)} | {row['widths']} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
