"""What every method gives back."""

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from secateur.graph import Graph
from secateur.plan import Plan
from secateur.proof import Verification
from secateur.surgery import save


@dataclass(frozen=True)
class Pruned:
    """A pruned model and how it came about.

    Attributes:
        model: the user's class, smaller.
        plan: what was removed.
        graph: of the original.
        scores: (units,) per group.
        verification: that the cut model equals the masked original.
        macs: before, after; for one image.
        params: before, after.
        latency: before, after, in milliseconds, where the budget bounds them; None: not measured.
    """

    model: nn.Module
    plan: Plan
    graph: Graph
    scores: list[Tensor]
    verification: Verification
    macs: tuple[int, int]
    params: tuple[int, int]
    latency: tuple[float, float] | None = field(default=None, kw_only=True)

    def save(self, path: str | Path) -> None:
        """Write the model for `secateur.load`."""
        save(self.model, path)

    def __str__(self) -> str:
        counts = [("MACs", *self.macs), ("parameters", *self.params)]
        lines = [
            f"{name}: {before:,} -> {after:,} ({after / before:.1%} kept)" for name, before, after in counts
        ]
        if self.latency:
            lines.append("latency: {:.3g} ms -> {:.3g} ms".format(*self.latency))
        return "\n".join([*lines, str(self.verification)])
