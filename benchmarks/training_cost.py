"""What a step of training costs: dense networks, narrower ones, and ones that are masked to the same MACs.

    python benchmarks/training_cost.py --out docs/results/training-cost.md

Steps of all networks of one model are timed in turn, so a machine that slows down does so for all of them.
"""

import argparse
import platform
import statistics
from pathlib import Path
from typing import Any

EPOCH = 50_000
"""Images of an epoch."""

Measured = dict[str, list[Any]]
"""Network -> its `TrainingCost`s, one per repetition."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", default=["resnet20", "mobilenet_v2_cifar"])
    parser.add_argument("--macs", nargs="*", type=float, default=[0.5, 0.25], help="shares that stay")
    parser.add_argument("--batch", type=int, default=128, help="images per step")
    parser.add_argument("--steps", type=int, default=10, help="timed per repetition")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--device", help="such as cuda; default: the accelerator, if there is one")
    parser.add_argument("--threads", type=int, help="of the CPU; default: as PyTorch is set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    options = parser.parse_args()

    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device is None:
        found = torch.accelerator.current_accelerator(check_available=True)
        options.device = "cpu" if found is None else found.type
    text = render({name: measure(name, options) for name in options.models}, options)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)


def measure(name: str, options: argparse.Namespace) -> Measured:
    """The dense network, and for each share a cropped and a masked one, over the repetitions."""
    import torch

    from secateur import Budget
    from secateur.cost.training import compare_training
    from secateur.methods import Context, PreCrop, RandomWeights
    from secateur.plan import WeightPlan
    from secateur.recipes.models import build_model

    torch.manual_seed(options.seed)
    dense, x = build_model(name, classes=10), torch.zeros(1, 3, 32, 32)
    models, holding = {"dense": dense}, {}
    for share in options.macs:
        budget, seed = Budget(macs=share), options.seed
        models[f"cropped to {share:.0%}"] = (
            PreCrop(seed=seed, round_to=1).prune(dense, x, budget, Context()).model
        )
        sparse = RandomWeights(seed=seed, round_to=1).prune(dense, x, budget, Context())
        assert isinstance(sparse.plan, WeightPlan)
        models[f"masked to {share:.0%}"] = sparse.model
        holding[f"masked to {share:.0%}"] = sparse.plan.holding
    for model in models.values():
        model.to(options.device).to(memory_format=torch.channels_last)
    images = torch.randn(options.batch, 3, 32, 32).to(options.device, memory_format=torch.channels_last)
    labels = (torch.arange(options.batch) % 10).to(options.device)
    measured: Measured = {network: [] for network in models}
    for _ in range(options.repetitions):
        found = compare_training(models, (images, labels), holding=holding, steps=options.steps)
        for network, cost in found.items():
            measured[network].append(cost)
    return measured


def render(found: dict[str, Measured], options: argparse.Namespace) -> str:
    import torch

    device = next(iter(next(iter(found.values())).values()))[0].device
    cpu = options.device == "cpu"
    if cpu:
        device += f" ({torch.get_num_threads()} threads)"
    asked = "".join(
        f" --{name} {given}"
        for name, given, default in (
            ("models", " ".join(options.models), "resnet20 mobilenet_v2_cifar"),
            ("macs", " ".join(map(str, options.macs)), "0.5 0.25"),
            ("batch", options.batch, 128),
            ("steps", options.steps, 10),
            ("repetitions", options.repetitions, 5),
            ("seed", options.seed, 0),
        )
        if given != default
    )
    lines = [
        "# What a step of training costs",
        "",
        f"`python benchmarks/training_cost.py{asked} --out docs/results/training-cost.md`",
        "",
        f"One step of SGD with momentum on {options.batch} images of 32 × 32 in float32, channels last, on {device};",
        f"Python {platform.python_version()}, torch {torch.__version__}, seed {options.seed}.",
        "",
        "Cropped and masked networks have the same densities: widths by `precrop`, or as many single weights at random",
        "by `random-weights`. MACs are of the forward and backward pass. Peak memory is that of weights, gradients,",
        f"momentum, activations and the batch{', without masks and work space inside operators' if cpu else ''}.",
        f"Time is the median over {options.repetitions} repetitions of the median of {options.steps} steps, all",
        "networks of one model in turn; in brackets the fastest and the slowest repetition. An epoch is the steps over",
        f"{EPOCH:,} images, as CIFAR-10 has, without reading them.",
    ]
    for name, measured in found.items():
        lines += [
            "",
            f"## {name}",
            "",
            "| network | MACs per step | peak MiB | ms per step | s per epoch | MACs | memory | time |",
            "|---|---|---|---|---|---|---|---|",
        ]
        base = measured["dense"]
        for network, costs in measured.items():
            times = [1e3 * cost.seconds for cost in costs]
            quotients = [cost.seconds / dense.seconds for cost, dense in zip(costs, base, strict=True)]
            peak = max(cost.peak_bytes for cost in costs)
            lines.append(
                f"| {network} | {costs[0].macs / 1e9:.2f} G | {peak / 2**20:.1f} "
                f"| {statistics.median(times):.1f} ({min(times):.1f} – {max(times):.1f}) "
                f"| {statistics.median(times) / 1e3 * EPOCH / options.batch:.0f} "
                f"| {costs[0].macs / base[0].macs:.2f} | {peak / max(c.peak_bytes for c in base):.2f} "
                f"| {statistics.median(quotients):.2f} ({min(quotients):.2f} – {max(quotients):.2f}) |"
            )
    lines += [
        "",
        "The last three columns are shares of the dense network; those of time are within a repetition.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
