"""Widths that hardware likes: kernels take channels in blocks, so widths in between cost as much as the next multiple.

On one thread half the MACs of MobileNetV2 make onnxruntime 1.0 times as fast with widths as they fall; 1.8 times with
multiples of 8 and 1.9 times with multiples of 16 on AVX-512, 1.9 times with multiples of 8 on AVX2. The table is fixed,
not measured at run time: a clock that other work disturbs would give two runs of one command different networks.
"""

import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.errors import BudgetError, unknown
from secateur.graph import Graph, Group

AUTO = "auto"
"""The hardware that the model is on."""


@dataclass(frozen=True)
class Hardware:
    """What computes a model.

    Attributes:
        multiple: channels that its kernels take at once.
        label: in text for people.
    """

    multiple: int
    label: str


HARDWARE = {
    "avx512": Hardware(16, "AVX-512"),  # 16 floats a register; onnxruntime blocks channels by as many
    "avx2": Hardware(8, "AVX2"),  # likewise 8
    "arm": Hardware(8, "ARM"),  # two registers of 4 floats, or one of 8 halves
    "gpu": Hardware(8, "GPU"),  # tensor cores at half precision
}
"""By name. Measured on AVX-512 and AVX2; the other numbers are those that vendors and runtimes ask for."""

ROUND_TO = (AUTO, *HARDWARE)
"""Names that options `round_to` take beside a number."""

ROUND_TO_HELP = (
    "kept units are a multiple of this, or all of them; by the name of hardware, widths are multiples of the channels "
    "that it takes at once, fewer in narrow groups and where the budget asks for it"
)


@dataclass(frozen=True)
class Multiples:
    """What widths are multiples of.

    Attributes:
        round_to: a number of units, or the name of hardware.
        units: per group.
        why: a sentence for people; empty where widths may be any.
    """

    round_to: int | str
    units: tuple[int, ...]
    why: str

    def record(self, graph: Graph) -> dict[str, Any]:
        """For the origin of a plan, as plain JSON."""
        steps = {group.name: step for group, step in zip(graph.groups, self.units, strict=True)}
        return {"round_to": self.round_to, "multiples": {"why": self.why, "units": steps}}


def hardware_of(model: nn.Module) -> str:
    """The name in `HARDWARE` of what the model is on."""
    device = next((tensor.device.type for tensor in model.parameters()), "cpu")
    if device != "cpu":
        return "gpu"
    if platform.machine().lower() in ("arm64", "aarch64"):
        return "arm"
    return "avx512" if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else "avx2"


def choose_multiples(
    model: nn.Module,
    graph: Graph,
    round_to: int | str,
    fits: Callable[[Sequence[int]], bool],
    *,
    min_keep: int = 1,
) -> Multiples:
    """What the kept units of each group shall be a multiple of.

    A number holds for all groups. With hardware, a width counts in channels: units of many, such as heads, may be any
    number. Every group can be halved: one that is too narrow for that takes 8, 4, 2 or 1. If no such widths meet the
    budget, all take less. Blocks go or stay.

    Args:
        model: that the graph is of; only its device is read.
        graph: from `analyze`.
        round_to: a number, "auto" or a name in `HARDWARE`.
        fits: whether widths meet the budget: (groups,) units -> bool.
        min_keep: units that every group keeps at least.
    Raises:
        BudgetError: there is no hardware of this name.

    >>> from secateur.graph import analyze
    >>> model = nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 64, 3), nn.ReLU(), nn.Conv2d(64, 5, 3))
    >>> graph = analyze(model, torch.zeros(1, 3, 9, 9))
    >>> choose_multiples(model, graph, "avx512", lambda kept: True).units
    (8, 16)
    >>> choose_multiples(model, graph, "avx512", lambda kept: sum(kept) <= 10).why
    'Widths are multiples of 4, for AVX-512; with 16, the budget would be out of reach.'
    """
    if isinstance(round_to, int):
        why = f"Widths are multiples of {round_to}, as asked for." if round_to > 1 else ""
        return Multiples(round_to, tuple(1 if g.branch else round_to for g in graph.groups), why)
    round_to = hardware_of(model) if round_to == AUTO else round_to
    if round_to not in HARDWARE:
        raise BudgetError(unknown("hardware", round_to, HARDWARE))
    hardware = HARDWARE[round_to]
    channels = [1 if group.branch else contiguous(group) for group in graph.groups]
    multiple = hardware.multiple
    while True:
        wanted = [
            _narrowed(multiple, group.units * each)
            for group, each in zip(graph.groups, channels, strict=True)
        ]
        units = tuple(many // math.gcd(many, each) for many, each in zip(wanted, channels, strict=True))
        least = [
            min(group.least and group.units, -(-min_keep // step) * step)
            for group, step in zip(graph.groups, units, strict=True)
        ]
        if multiple == 1 or fits(least):
            break
        multiple //= 2
    wanted = [many for many, group in zip(wanted, graph.groups, strict=True) if not group.branch]
    return Multiples(round_to, units, _why(hardware, multiple, wanted) if wanted else "")


def contiguous(group: Group) -> int:
    """Channels that lie side by side in every tensor for one unit: 1, or the width of a head.

    Units at the same place of several heads, halves or convolution groups count once: what is computed at once is as
    wide as one of these.
    """
    runs = []
    for member in group.members:
        breaks = np.flatnonzero(np.diff(member.index[0]) != 1)
        edges = np.r_[0, breaks + 1, member.index.shape[1]]
        runs += np.diff(edges).tolist()
    return math.gcd(*runs)


def _narrowed(multiple: int, width: int) -> int:
    while multiple > 1 and 2 * multiple > width:
        multiple //= 2
    return multiple


def _why(hardware: Hardware, multiple: int, wanted: Sequence[int]) -> str:
    if multiple == 1:
        return f"Widths may be any number: with multiples for {hardware.label}, the budget would be out of reach."
    said = f"Widths are multiples of {multiple}, for {hardware.label}"
    if narrow := sorted({many for many in wanted if many < multiple}, reverse=True):
        count = sum(many < multiple for many in wanted)
        said += f" ({' or '.join(map(str, narrow))} in {count} of {len(wanted)} groups, which are narrow)"
    if multiple < hardware.multiple:
        said += f"; with {hardware.multiple}, the budget would be out of reach"
    return said + "."
