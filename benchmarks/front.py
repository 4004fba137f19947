"""A picture of a comparison for a page or a paper: accuracy over latency, or the MACs or parameters that are kept.

    pip install '.[benchmark]'
    python benchmarks/front.py runs/compare/table.csv --out front.svg --arms l2 rd

Reads the `table.csv` that `secateur compare` writes. The arms named are drawn in colour, with bars of one standard
deviation over the seeds; all others are thin grey lines behind them. Runs over their budget are left out.
"""

import argparse
import csv
import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

COLORS = ("#159a9c", "#e2703a", "#7a6fd0", "#c94f7c", "#5b9a3c", "#b58a1b")
TITLES = {"macs": "MACs kept, %", "params": "parameters kept, %", "latency": "latency, ms"}

Line = list[tuple[float, float, float]]


def lines_of(path: Path, cost: str) -> tuple[dict[str, Line], float | None]:
    """Accuracies in per cent: arm -> (cost, mean, standard deviation) per budget; and the dense network's.

    That is the one trained beside the others, or the one they started from. A latency is a share of the dense network's
    beside it, times the median of that; other costs are in per cent.
    """
    costs, accuracies, start, dense = defaultdict(list), defaultdict(list), [], []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if cost == "latency":
        rows = [row for row in rows if row["latency_ms"] or not row["budget"]]
        clock = statistics.median(float(row["latency_dense_ms"]) for row in rows if row["latency_dense_ms"])
    for row in rows:
        if row["accuracy_dense"]:
            start.append(100 * float(row["accuracy_dense"]))
        if not row["accuracy"]:
            continue
        if not row["budget"]:
            dense.append(100 * float(row["accuracy"]))
            continue
        bounds = (bound.split() for bound in row["budget"].split(", "))
        if any(float(row[measure]) > float(share) + 1e-6 for measure, share in bounds):
            continue
        key = (row["arm"], row["budget"])
        if cost == "latency":
            costs[key].append(clock * float(row["latency_ms"]) / float(row["latency_dense_ms"]))
        else:
            costs[key].append(100 * float(row[cost]))
        accuracies[key].append(100 * float(row["accuracy"]))
    lines: dict[str, Line] = defaultdict(list)
    for (arm, budget), found in accuracies.items():
        spread = statistics.stdev(found) if len(found) > 1 else 0.0
        lines[arm].append((statistics.mean(costs[arm, budget]), statistics.mean(found), spread))
    whole = dense or start
    return {arm: sorted(points) for arm, points in lines.items()}, statistics.mean(whole) if whole else None


def draw(lines: dict[str, Line], dense: float | None, arms: list[str], cost: str, out: Path) -> None:
    pyplot.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "secateur", "font.family": "sans-serif"}
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for arm, points in lines.items():
        if arm not in arms:
            x, y, _ = zip(*points, strict=True)
            axes.plot(x, y, color="#c4cad0", linewidth=1, marker=".", zorder=1)
    for place, arm in enumerate(arms):
        x, y, spread = zip(*lines[arm], strict=True)
        axes.errorbar(
            x,
            y,
            spread,
            color=COLORS[place % len(COLORS)],
            linestyle="-" if place < len(COLORS) else "--",
            marker="o",
            markersize=5,
            capsize=3,
            label=arm,
            zorder=3,
        )
    if dense is not None:
        axes.axhline(dense, color="#6b7785", linewidth=1, linestyle=":", label="dense", zorder=2)
    axes.set_xlabel(TITLES[cost])
    axes.set_ylabel("accuracy, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e8ebee")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", type=Path, help="the table.csv of a comparison")
    parser.add_argument("--out", type=Path, required=True, help="an SVG file")
    parser.add_argument("--arms", nargs="+", required=True, help="to draw in colour")
    parser.add_argument("--without", nargs="+", default=[], help="to leave out")
    parser.add_argument("--cost", choices=sorted(TITLES), default="macs")
    options = parser.parse_args()
    lines, dense = lines_of(options.table, options.cost)
    if missing := [arm for arm in (*options.arms, *options.without) if arm not in lines]:
        parser.error(f"no such arm: {', '.join(missing)}; there are {', '.join(lines)}")
    lines = {arm: points for arm, points in lines.items() if arm not in options.without}
    draw(lines, dense, options.arms, options.cost, options.out)


if __name__ == "__main__":
    main()
