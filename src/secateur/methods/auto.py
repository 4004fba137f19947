"""Method `auto`: which method to take, from what there is to go by."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from secateur.engine.method import Method
from secateur.errors import SecateurError
from secateur.measures import MEASURES
from secateur.methods.oneshot import OneShot
from secateur.methods.precrop import PreCrop
from secateur.methods.rd import RD
from secateur.settings import option, options_of, settings

CROPPED = {"macs", "params", "latency_ms"}
"""What precrop takes as bounds of a budget; milliseconds become MACs."""


@settings
class Auto(Method):
    """Take what does best with what there is: weights, data, budget. `choose` says which method that is, and why."""

    name: ClassVar[str] = "auto"
    summary: ClassVar[str] = "what does best with what there is: weights, data, budget"

    options: Mapping[str, Any] = option("options that the method must take", default={})

    def check(self) -> None:
        able = [method for method in (OneShot, RD, PreCrop) if set(self.options) <= set(options_of(method))]
        if not able:
            strange = next(name for name in self.options if name not in options_of(OneShot))
            raise SecateurError(
                f"method auto takes no {strange}; name the method, or choose one of: {', '.join(options_of(OneShot))}"
            )
        for method in able:
            method.of(self.options)


@dataclass(frozen=True)
class Selection:
    """A method, and in one sentence why."""

    method: Method
    why: str


def choose(auto: Auto, *, bounds: Collection[str], trained: bool, data: bool, training: bool) -> Selection:
    """Choose a method for a budget: rd for trained weights and one bound, precrop before a training, else oneshot.

    rd also needs data, and takes not every option that oneshot has. Where there are trained weights and data, oneshot
    solves the remaining weights again. Right after the cut it is ahead of every score at
    every budget (docs/results/rd.md). After training LAPP is level with it or a little ahead on ResNets and far behind
    on ShuffleNetV2; Gate Decorator is level on ShuffleNetV2 down to half the MACs, far behind at less, and behind on
    ResNet-20 (docs/results/compare.md). So `training` only decides when rd protects residual streams.

    Fresh weights say nothing about filters. What trains the dense network for half of the time and then cuts it is
    behind narrower networks that train all of it, and LAPP by its default is not significantly
    ahead of these (docs/results/lapp.md; if it prunes later it is, at 1.3 times the training); of such networks
    precrop's are level with uniform ones or ahead (docs/results/precrop.md).

    Args:
        auto: with options that the method must take.
        bounds: measures that the budget bounds.
        trained: whether the weights are; if not, and they are trained afterwards, they may be drawn again.
        data: whether there are images to measure on.
        training: whether the cut model is trained afterwards.
    Raises:
        SecateurError: neither of them takes the options.
    """
    given = {"freeze": auto.freeze, "scope": auto.scope, **auto.options}
    if training and not trained and set(bounds) <= CROPPED and set(auto.options) <= set(options_of(PreCrop)):
        return Selection(
            PreCrop.of(given),
            "Method auto chose precrop: the weights are fresh, so the network is made narrower before its training.",
        )
    strange = sorted(set(auto.options) - set(options_of(RD)))
    against = (
        ("the weights are not trained", not trained),
        ("there is no data to measure on", not data),
        (f"the budget has {len(bounds)} bounds, and rd takes one", len(bounds) != 1),
        ("the budget bounds a peak, and rd needs a sum over layers", any(MEASURES[b].peak for b in bounds)),
        (f"rd takes no {', '.join(strange)}", bool(strange)),
    )
    for reason, holds in against:
        if holds:
            if not (trained and data):
                return Selection(OneShot.of(given), f"Method auto chose oneshot: {reason}.")
            return Selection(
                OneShot.of({"compensation": "least-squares", **given}),
                f"Method auto chose oneshot: {reason}. The remaining weights are solved again on the data.",
            )
    later = ", and after training no other was ahead on every network measured" if training else ""
    return Selection(
        RD.of(given if training else {"stream_gain": 1.0, **given}),
        f"Method auto chose rd: right after the cut it keeps more accuracy than any score of weights{later}.",
    )
