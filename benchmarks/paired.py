"""Differences between two arms of a comparison, paired by seed, and how large one must be to mean something.

    python benchmarks/paired.py docs/results/precrop.csv "random weights" cropped --without "GraSP masks"

Reads the `table.csv` that `secateur compare` writes. The margin is Tukey's, over all arms of a budget that are not left
out.
"""

import argparse
import csv
import statistics
from collections import defaultdict
from pathlib import Path

from secateur.compare.statistics import find_margin
from secateur.compare.words import format_percentage


def accuracies_of(path: Path) -> dict[str, dict[str, dict[int, float]]]:
    """Budget -> arm -> seed -> accuracy, a fraction; the dense network has the budget ""."""
    found: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["accuracy"]:
                found[row["budget"]][row["arm"]][int(row["seed"])] = float(row["accuracy"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", type=Path, help="the table.csv of a comparison")
    parser.add_argument("arm")
    parser.add_argument("other", help="what the arm is compared with")
    parser.add_argument("--without", nargs="+", default=[], help="arms that the margin leaves out")
    options = parser.parse_args()
    found = accuracies_of(options.table)
    whole = found.pop("", {})
    if missing := {options.arm, options.other, *options.without} - {
        *whole,
        *(a for b in found.values() for a in b),
    }:
        parser.error(f"no such arm: {', '.join(sorted(missing))}")
    for budget, arms in found.items():
        one, two = (arms.get(arm, whole.get(arm, {})) for arm in (options.arm, options.other))
        seeds = sorted(one.keys() & two.keys())
        if not seeds:
            continue
        paired = [one[seed] - two[seed] for seed in seeds]
        difference = format_percentage(
            statistics.mean(paired), statistics.stdev(paired) if len(paired) > 1 else None, "+"
        )
        rest = [arm for name, arm in arms.items() if name not in options.without and arm.keys() >= set(seeds)]
        margin = find_margin([[arm[seed] for seed in seeds] for arm in rest])
        print(
            f"{budget}: {difference} points over seeds {', '.join(map(str, seeds))}; margin {format_percentage(margin)}"
        )


if __name__ == "__main__":
    main()
