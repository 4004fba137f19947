"""Method `auto`: which method to take, from what there is to go by."""

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from secateur.methods.rd.channels import rd

AUTO = "auto"

LARGEST_SIDE = 64
"""Pixels: rd keeps the activations of all calibration images in memory, and was measured on images of 32."""


@dataclass(frozen=True)
class Choice:
    """A method, its options where it cuts channels, and in one sentence why."""

    method: str
    why: str
    options: Mapping[str, Any] = field(default_factory=dict)


def choose(
    *,
    bounds: Collection[str],
    trained: bool,
    data: bool,
    training: bool,
    side: int,
    wanted: Collection[str] = (),
) -> Choice:
    """Choose a method for a budget: rd for trained weights, one bound and small images, else oneshot.

    rd also needs data, and takes not every setting that oneshot has. Right after the cut it is ahead of every score at
    every budget (docs/results/rd.md). After training LAPP is level with it or a little ahead on ResNets and far behind
    on ShuffleNetV2; Gate Decorator is level on ShuffleNetV2 down to half the MACs, far behind at less, and behind on
    ResNet-20 (docs/results/compare.md). So `training` only decides when rd spares residual streams.

    Args:
        bounds: measures that the budget bounds.
        trained: whether the weights are.
        data: whether there are images to measure on.
        training: whether the cut model is trained afterwards.
        side: of the images, in pixels.
        wanted: names of settings that the method must take.
    """
    unknown = sorted(set(wanted) - set(inspect.signature(rd).parameters))
    against = (
        ("the weights are not trained", not trained),
        ("there is no data to measure on", not data),
        (f"the budget has {len(bounds)} bounds, and rd takes one", len(bounds) != 1),
        (f"images of {side} pixels take rd more memory than may be there", side > LARGEST_SIDE),
        (f"rd takes no {', '.join(unknown).replace('_', '-')}", bool(unknown)),
    )
    for reason, holds in against:
        if holds:
            return Choice("oneshot", f"Method auto chose oneshot: {reason}.")
    later = ", and after training no other was ahead on every network measured" if training else ""
    return Choice(
        "rd",
        f"Method auto chose rd: right after the cut it keeps more accuracy than any score of weights{later}.",
        {} if training else {"stream_gain": 1.0},
    )
