"""The table of the zoo: one line per network, totals, and every failure with its reason."""

import ast
import csv
import platform
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from secateur.cost.latency import device_name

Row = dict[str, Any]

COLUMNS = (
    "model tool stage verified error message where note input params macs groups units prunable_macs "
    "prunable_params least_macs least_params macs_kept params_kept macs_predicted macs_counted macs_dense_equal "
    "form rewritten error64 error32 sensitivity trains frozen_units frozen groups_s groups_cpu_s cut_s verify_s "
    "groups_mib model_mib peak_mib limit_s wall_s cut_cpu_s verify_cpu_s cpu_s tied elsewhere sizes sizes_lost code"
).split()

FAMILIES = {
    "torchvision": "torchvision classification",
    "segmentation": "torchvision segmentation",
    "detection": "torchvision detection (dense part)",
    "timm": "timm",
}


def passed(row: Row) -> bool:
    """Captured, cut, equal to the masked original, trainable, and of exactly the predicted cost."""
    if "error" in row or not row.get("verified"):
        return False
    return row["tool"] != "secateur" or (
        row["macs_predicted"] == row["macs_counted"] and bool(row["macs_dense_equal"])
    )


def outcome(row: Row) -> str:
    """What became of one network, in a few words."""
    if passed(row):
        return "exact"
    if "error" in row:
        what = "not finished" if row["error"] == "Stopped" else row["error"]
        return f"{what} in {row['stage']}"
    if not row.get("verified"):
        return "wrong output" if row.get("error64", 1) > 1e-9 else "float32 or training"
    return "MACs differ"


def line(row: Row) -> str:
    """For the terminal."""
    share = row.get("prunable_macs", row.get("prunable_params"))
    shown = f"{share:.0%} prunable" if share is not None else ""
    cells = (
        row["tool"],
        row["model"],
        outcome(row),
        shown,
        f"{row.get('wall_s', 0):.0f} s",
        row.get("message", ""),
    )
    return "  ".join(filter(None, cells))[:240]


def read(path: Path) -> dict[tuple[str, str], Row]:
    """The rows of PATH.csv by network and tool, if there is one."""
    file = path.with_suffix(".csv")
    if not file.exists():
        return {}
    with file.open(newline="") as lines:
        rows = [{k: value(v) for k, v in row.items() if v} for row in csv.DictReader(lines)]
    return {(row["model"], row["tool"]): row for row in rows}


def value(text: str) -> Any:
    """A cell of a CSV file.

    >>> value("0.5"), value("True"), value("{'model output': 10}"), value("timm/vgg11")
    (0.5, True, {'model output': 10}, 'timm/vgg11')
    """
    try:
        return float(text) if text in ("nan", "inf") else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def write(path: Path, rows: list[Row], before: list[Row]) -> None:
    """PATH.csv with every column, PATH.md to be read.

    Args:
        before: the same networks by another version of the package.
    """
    with path.with_suffix(".csv").open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        for row in rows:
            table.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})
    path.with_suffix(".md").write_text(render(rows, before))


def render(rows: list[Row], before: list[Row]) -> str:
    ours = [row for row in rows if row["tool"] == "secateur"]
    peer = {row["model"]: row for row in rows if row["tool"] == "torch-pruning"}
    lines = [
        "# Coverage",
        "",
        "`python benchmarks/zoo.py --work runs/zoo --out docs/results/zoo`",
        "",
        f"{len(ours)} networks, {device_name(torch.device('cpu'))}, one thread per process, torch "
        f"{torch.__version__}, torchvision {version('torchvision')}, timm {version('timm')}, Torch-Pruning "
        f"{version('torch-pruning')}, Python {platform.python_version()}, seed 0.",
        "",
        "Random weights; parameters that start constant are drawn too, and batch norms hold the statistics of random "
        "images. Images of 128×128 where the network takes them, otherwise "
        "of its own size (column *input* of the CSV). Half of the units of every group go, chosen at random. *Exact*: "
        "the largest difference between the cut model and the masked original is below 1e-9 of the largest output in "
        "float64 and 1e-3 in float32, a training step gives finite gradients, and the MACs predicted before the cut "
        "are the ones that torch counts after it (for one image; for two where images attend to one another). "
        "Prunable MACs: share in layers that at least one group shrinks; "
        "least MACs: what is left with one unit per group. Torch-Pruning runs with its defaults; its survivors are "
        "traced, and its result is compared in float64 with the original in which all other weights are zero "
        "(normalisation over channels: over the survivors only). A process may use 120 s of processor time plus half a "
        "second per million parameters, everything included, and 14 GiB.",
        "",
        *totals(ours, peer),
        "",
        *failures(ours),
        "",
        *(beside(before, ours) if before else ()),
        *frozen(ours),
        "",
        "## Every network",
        "",
        "| network | Secateur | groups | prunable MACs | least MACs | prunable params | error, float64 | form "
        "| s to groups | s to cut | analysis, MiB | model, MiB | Torch-Pruning |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in ours:
        cells = (
            row["model"],
            outcome(row),
            row.get("groups", ""),
            percent(row, "prunable_macs"),
            percent(row, "least_macs"),
            percent(row, "prunable_params"),
            number(row, "error64", ".0e"),
            row.get("form", ""),
            number(row, "groups_s", ".2f"),
            number(row, "cut_s", ".2f"),
            number(row, "groups_mib", ".0f"),
            number(row, "model_mib", ".0f"),
            outcome(peer[row["model"]]) if row["model"] in peer else "",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def totals(ours: list[Row], peer: dict[str, Row]) -> list[str]:
    """Counts and medians per source."""
    lines = [
        "## Totals",
        "",
        "| source | networks | captured | exact | share | prunable MACs, median (lowest) | s to groups, median "
        "(largest), clock | processor | analysis memory ÷ model, median (largest) | Torch-Pruning exact |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    by_source: dict[str, list[Row]] = defaultdict(list)
    for row in ours:
        by_source[FAMILIES[row["model"].partition("/")[0]]].append(row)
        by_source["all"].append(row)
    for source, rows in [*((k, v) for k, v in by_source.items() if k != "all"), ("all", by_source["all"])]:
        good = [row for row in rows if passed(row)]
        captured = [row for row in rows if "groups" in row]
        compared = [peer[row["model"]] for row in rows if row["model"] in peer]
        shares = [row["prunable_macs"] for row in captured] or [0.0]
        seconds = [row["groups_s"] for row in captured] or [0.0]
        busy = [row["groups_cpu_s"] for row in captured] or [0.0]
        memory = [row["groups_mib"] / row["model_mib"] for row in captured] or [0.0]
        lines.append(
            f"| {source} | {len(rows)} | {len(captured)} | {len(good)} | {len(good) / len(rows):.1%} "
            f"| {median(shares):.1%} ({min(shares):.1%}) | {median(seconds):.2f} ({max(seconds):.1f}) "
            f"| {median(busy):.2f} ({max(busy):.1f}) "
            f"| {median(memory):.1f} ({max(memory):.1f}) | {sum(map(passed, compared))} of {len(compared)} |"
        )
    ends = Counter(re.sub(r" in .*", "", outcome(row)) + stage(row) for row in peer.values())
    lines += [
        "",
        f"Torch-Pruning, run on {len(peer)} of the {len(ours)} networks: "
        + ", ".join(f"{count} {name}" for name, count in ends.most_common())
        + "."
        + (" These rows are of an earlier run." if all("taken_over" in row for row in peer.values()) else ""),
    ]
    forms = Counter(row["form"] for row in ours if passed(row))
    lines += ["", "Form of the exact results: " + ", ".join(f"{n} {f}" for f, n in forms.most_common()) + "."]
    measured = [row for row in ours if "sizes_lost" in row]
    lost = sum(bool(row["sizes_lost"]) for row in measured)
    tied = sum(bool(row["tied"]) for row in measured)
    busy = [row["cpu_s"] for row in measured] or [0.0]
    lines += [
        "",
        f"Other sizes were tried for {len(measured)} networks: three images, and three other image sizes. {tied} "
        f"results say that they are tied to sizes; {lost} do not run at one of these at which the network did. "
        f"Analysis, cut and proof: {median(busy):.1f} CPU seconds in the median, {max(busy):.0f} at most. Commits: "
        + ", ".join(
            f"{count} {code}" for code, count in Counter(row["code"] for row in measured).most_common()
        )
        + ".",
    ]
    return lines


def beside(before: list[Row], ours: list[Row]) -> list[str]:
    """Another version and this one, on the networks that both did."""
    now = {row["model"]: row for row in ours if passed(row) and "sizes_lost" in row}
    pairs = [(row, now[row["model"]]) for row in before if row["model"] in now]
    both = [(old, new) for old, new in pairs if passed(old)]
    codes = [
        Counter(row.get("code", "") for row in rows).most_common(1)[0][0] for rows in zip(*pairs, strict=True)
    ]

    def counts(what: str, test: Callable[[Row], bool]) -> str:
        return f"| {what} | {sum(test(old) for old, _ in pairs)} | {sum(test(new) for _, new in pairs)} |"

    def seconds(what: str, form: str) -> str:
        some = [(old["cpu_s"], new["cpu_s"]) for old, new in both if new["form"] == form]
        old_s, new_s = (median(each) for each in zip(*some, strict=True))
        ratio = median(new / old for old, new in some)
        return f"| CPU seconds, median of {len(some)} {what} | {old_s:.1f} | {new_s:.1f}, {ratio:.2f} times as many |"

    return [
        "## Beside another version",
        "",
        f"| {len(pairs)} of these networks | {codes[0]} | {codes[1]} |",
        "|---|---|---|",
        counts("exact", passed),
        counts("with rewritten modules", lambda row: row.get("form") == "rewritten"),
        counts("do not run at a size at which the network did", lambda row: bool(row.get("sizes_lost"))),
        counts("say that they are tied to sizes", lambda row: bool(row.get("tied"))),
        seconds("that keep their own forward", "own"),
        seconds("with rewritten modules", "rewritten"),
        "",
        "`--before` names the folder in which the other version was run. Seconds are those of analysis, cut and proof, "
        "on cores that other work shared; the ratio is the median of the networks' own.",
        "",
    ]


def stage(row: Row) -> str:
    return f" in {row['stage']}" if "error" in row else ""


def failures(ours: list[Row]) -> list[str]:
    lines = ["## Failures", ""]
    rows = [row for row in ours if not passed(row)]
    lines += [f"- {row['model']}: {outcome(row)}. {row.get('message', '')}".rstrip() for row in rows]
    return lines if rows else [*lines, "None."]


def frozen(ours: list[Row]) -> list[str]:
    """What stays, over the whole zoo, by reason."""
    networks: dict[str, set[str]] = defaultdict(set)
    units = Counter[str]()
    for row in ours:
        for reason, count in (row.get("frozen") or {}).items():
            networks[reason].add(row["model"])
            units[reason] += count
    lines = ["## What stays, and why", "", "| reason | networks | channels |", "|---|---|---|"]
    for reason in sorted(networks, key=lambda r: -len(networks[r])):
        lines.append(f"| {reason} | {len(networks[reason])} | {units[reason]:,} |")
    return lines


def percent(row: Row, key: str) -> str:
    return f"{row[key]:.1%}" if key in row else ""


def number(row: Row, key: str, form: str) -> str:
    return format(row[key], form) if key in row else ""
