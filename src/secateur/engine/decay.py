"""How units get to zero while training goes on: at once, or by a decay that restores those that resist.

A method decides which units go and when; a `Pool` does it. At the end of the optimizer step in which a
unit is chosen it starts with length L = ||x||, and after that step and each of the next ones

    x <- x* · L (1 - k/N) / ||x*||,    k = 1 … N

where x* is what the optimizer made of x. At k = N it is exactly zero and stays so: its gradients and moments
are zeroed. N = 1 is instant removal.

Source: Yang et al. 2024, "Decay Pruning Method", arXiv:2406.03879; the linear schedule and everything about
restoring is a reconstruction (see `Restore`).
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.engine.state import UNSAVED
from secateur.graph import Graph, Member
from secateur.report.data import Ending
from secateur.settings import option, settings

PARTS = {
    "zig": ("out", "bias", "depthwise", "scale", "shift"),
    "full": ("out", "bias", "depthwise", "scale", "shift", "in"),
    "gate": ("scale",),
}
"""What x is: everything that makes the unit, so that its output shrinks with x (a filter alone would be
rescaled by the norm behind it); that and the weights that read it; or the norm's scale only."""


@settings
class Restore:
    """When a decaying unit is restored, because the loss wants it longer.

    After step k of N, with g the task's gradient before the optimizer step (weight decay not included):

        "radial":  r = max(0, -<x, g> / ||x||);  length = EMA(r) / median of EMA(r) over all decaying units,
                   rate = share of the steps so far with <x, g> < 0
        "ratio":   length = ||x*|| / L,  rate = (||x*|| - ||x||) / (L / N)
        "norm":    length = sum of (||x*|| - ||x||) / L,  rate = (||x*|| - ||x||) / ||x||

    A unit is restored when k >= max(2, from_share · N), rate > `rate` and length > `length`. It keeps the
    values it has, and cannot be chosen again for `cool_down` steps.

    Source: reconstruction. The paper names two criteria, C_rate and C_len, with thresholds; the formulas are ours.
    """

    criterion: Literal["radial", "ratio", "norm"] = option("what rate and length are", default="radial")
    rate: float = option("rate above which a unit is restored", default=0.6)
    length: float = option("length above which a unit is restored", default=2.5)
    from_share: float = option(
        "share of the decay before which nothing is restored", default=0.4, least=0, most=1
    )
    memory: float = option("of the moving average of gradients", default=0.9, least=0, most=1)
    most: float = option("share of a cohort that is restored at most", default=0.25, least=0)
    cool_down: int | None = option("steps before it is chosen again; None: N", default=None, least=0)
    times: int = option("how often one unit is restored at most", default=2, least=0)


@settings
class Decay:
    """How chosen units go.

    `parts` says what x is, see `PARTS`. The form "length" prescribes ||x||, so that the optimizer can only turn x;
    "factor" multiplies x by (N - k) / (N - k + 1), so that it can also lengthen it (HESSO).
    """

    steps: int = option("N, optimizer steps from choice to zero; 1: at once", default=1, least=1)
    restore: Restore | None = option("whether and when units are restored; None: never", default=None)
    parts: Literal["zig", "full", "gate"] = option("which of a unit's weights shrink", default="zig")
    form: Literal["length", "factor"] = option(
        "whether the length is prescribed, or multiplied", default="length"
    )


_QUANTITIES: dict[str, tuple[torch.dtype, float]] = {
    "unit": (torch.int64, 0),  # its number at the start
    "k": (torch.int64, 0),  # steps of the decay done; 0: not decaying
    "length": (torch.float64, 0),  # L
    "gone": (torch.bool, 0),
    "resistance": (torch.float64, 0),  # EMA(r)
    "against": (torch.int64, 0),  # steps with <x, g> < 0
    "growth": (torch.float64, 0),  # sum of ||x*|| - ||x||
    "waits": (torch.int64, 0),  # the step before which it is not chosen again
    "restored": (torch.int64, 0),
    "since": (torch.int64, 0),  # the step in which it was chosen
}


@dataclass
class Pool:
    """The units of some groups on their way out.

    Args:
        graph: of the model.
        groups: numbers of the groups it looks after.
        tensors: the model's parameters by name.
        decay: how units go.
    Attributes:
        units: per group, what is known of every unit: name of a quantity -> (units,).
        endings: of all decays so far; removal at once is none.
        restoring: whether units that resist are restored now.
    """

    graph: Graph = field(metadata=UNSAVED)
    groups: Sequence[int] = field(metadata=UNSAVED)
    tensors: Mapping[str, nn.Parameter] = field(metadata=UNSAVED)
    decay: Decay = field(metadata=UNSAVED)
    units: dict[int, dict[str, Tensor]] = field(init=False)
    endings: list[Ending] = field(default_factory=list)
    restoring: bool = True
    before: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, metadata=UNSAVED)

    def __post_init__(self) -> None:
        self.units = {
            n: {
                name: torch.full((self.graph.groups[n].units,), v, dtype=t)
                for name, (t, v) in _QUANTITIES.items()
            }
            for n in self.groups
        }
        for units in self.units.values():
            units["unit"] = torch.arange(len(units["unit"]))

    # --- what is known -------------------------------------------------------------------------------------

    def gone(self, number: int) -> Tensor:
        """(units,) bool: zero, for good."""
        return self.units[number]["gone"]

    def leaving(self, number: int) -> Tensor:
        """(units,) bool: decaying or gone; budgets count both as gone."""
        return self.gone(number) | (self.units[number]["k"] > 0)

    def free(self, number: int, step: int) -> Tensor:
        """(units,) bool: may be chosen in this step."""
        return ~self.leaving(number) & (self.units[number]["waits"] <= step)

    def busy(self) -> bool:
        """Whether any unit is decaying."""
        return any(bool((u["k"] > 0).any()) for u in self.units.values())

    def vectors(self, number: int) -> Tensor:
        """x of a group's units, (units, values), float64, without gradient."""
        return torch.cat([m.take(p.detach()).double() for m, p in self.parts(number)], 1)

    def parts(self, number: int) -> list[tuple[Member, nn.Parameter]]:
        """The members that x is made of, with their tensors."""
        roles = PARTS[self.decay.parts]
        members = self.graph.groups[number].members
        return [(m, self.tensors[m.tensor]) for m in members if m.role in roles and m.tensor in self.tensors]

    def add_(self, number: int, change: Tensor) -> None:
        """x += change, (units, values), in place."""
        offset = 0
        for member, p in self.parts(number):
            rows = member.take(p.detach())
            part = change[:, offset : offset + rows.shape[1]].to(p.dtype)
            offset += rows.shape[1]
            moved = p.detach().movedim(member.dim, 0)  # a view
            index = torch.as_tensor(member.index, device=p.device)
            moved.index_add_(0, index.flatten(), part.reshape(index.numel(), *moved.shape[1:]))

    # --- what happens --------------------------------------------------------------------------------------

    def start(
        self,
        number: int,
        chosen: Tensor,
        step: int,
        optimizer: Optimizer | None,
        length: Tensor | None = None,
    ) -> None:
        """Send units on their way, and do the first step of their decay.

        Args:
            number: of the group.
            chosen: (units,) bool; those that are leaving already go on as they are.
            step: the optimizer step just taken.
            optimizer: whose moments are zeroed with the unit.
            length: L, (units,); None: ||x|| as it is.
        """
        units = self.units[number]
        new = chosen.cpu() & ~self.leaving(number)
        if not new.any():
            return
        found = self.vectors(number).norm(dim=1).cpu() if length is None else length.double().cpu()
        units["length"] = torch.where(new, found, units["length"])
        for name in ("resistance", "against", "growth"):
            units[name][new] = 0
        units["since"][new] = step
        self._shrink(number, new, step, optimizer)

    def observe(self) -> None:
        """Before the optimizer step: look at the gradients of decaying units, and zero those of gone ones."""
        self.before.clear()
        for number, units in self.units.items():
            decaying = units["k"] > 0
            if decaying.any():
                x = self.vectors(number)
                g = torch.cat(
                    [
                        m.take(torch.zeros_like(p) if p.grad is None else p.grad).double()
                        for m, p in self.parts(number)
                    ],
                    1,
                )
                self.before[number] = ((x * g).sum(1).cpu(), x.norm(dim=1).cpu())
            if units["gone"].any():
                for member, p in self.parts(number):
                    if p.grad is not None:
                        member.fill_(p.grad, units["gone"], 0.0)

    def advance(self, step: int, optimizer: Optimizer | None) -> None:
        """After the optimizer step: restore what resists, and shrink the rest of what is decaying."""
        lengths = {number: self.vectors(number).norm(dim=1).cpu() for number in self.before}
        for number, (product, before) in self.before.items():
            units, now = self.units[number], lengths[number]
            decaying = units["k"] > 0
            resistance = (-product / before.clamp_min(1e-300)).clamp_min(0)
            memory = self.decay.restore.memory if self.decay.restore else 0.9
            average = torch.where(
                units["k"] == 1, resistance, memory * units["resistance"] + (1 - memory) * resistance
            )
            units["resistance"] = torch.where(decaying, average, units["resistance"])
            units["against"] += decaying & (product < 0)
            units["growth"] += torch.where(decaying, now - before, 0.0)
        seen = self.statistics(lengths)
        if self.decay.restore and self.restoring:
            self._restore(step, self.decay.restore, seen)
        for number in self.before:
            self._shrink(number, self.units[number]["k"] > 0, step, optimizer, seen.get(number))

    def statistics(self, lengths: Mapping[int, Tensor]) -> dict[int, tuple[Tensor, Tensor]]:
        """(rate, length) of the test for restoring, (units,), per group with decaying units.

        Args:
            lengths: ||x*||, (units,), of the groups that were observed before the optimizer step.
        """
        restore = self.decay.restore or Restore()
        decaying = {n: u["k"] > 0 for n, u in self.units.items() if (u["k"] > 0).any()}
        pooled = [self.units[n]["resistance"][mask] for n, mask in decaying.items()]
        median = torch.cat(pooled).median().clamp_min(1e-300) if pooled else torch.ones(())
        found = {}
        for number in decaying:
            if number not in lengths:
                continue
            units, (_, before), now = self.units[number], self.before[number], lengths[number]
            start = units["length"].clamp_min(1e-300)
            if restore.criterion == "radial":
                found[number] = (units["against"] / units["k"].clamp_min(1), units["resistance"] / median)
            elif restore.criterion == "ratio":
                found[number] = ((now - before) / (start / self.decay.steps), now / start)
            else:
                found[number] = ((now - before) / before.clamp_min(1e-300), units["growth"] / start)
        return found

    def _restore(self, step: int, restore: Restore, seen: Mapping[int, tuple[Tensor, Tensor]]) -> None:
        earliest = max(2, math.ceil(restore.from_share * self.decay.steps))
        candidates = []
        for number, (rate, length) in seen.items():
            units = self.units[number]
            fit = (units["k"] >= earliest) & (units["restored"] < restore.times)
            fit &= (rate > restore.rate) & (length > restore.length)
            candidates += [(-length[u].item(), number, u) for u in fit.nonzero().flatten().tolist()]
        if not candidates:
            return
        cohorts = Counter(e.start for e in self.endings)
        for units in self.units.values():
            cohorts.update(units["since"][units["k"] > 0].tolist())
        done = Counter(e.start for e in self.endings if e.restored)
        room = {since: math.floor(restore.most * count) - done[since] for since, count in cohorts.items()}
        for _, number, unit in sorted(candidates):  # those that resist most, first
            units = self.units[number]
            since = int(units["since"][unit])
            if room[since] > 0:
                room[since] -= 1
                units["k"][unit] = 0
                units["restored"][unit] += 1
                cool_down = self.decay.steps if restore.cool_down is None else restore.cool_down
                units["waits"][unit] = step + cool_down
                self._ended(number, unit, step, True, seen[number])

    def _shrink(
        self,
        number: int,
        which: Tensor,
        step: int,
        optimizer: Optimizer | None,
        seen: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        if not which.any():
            return
        units = self.units[number]
        units["k"] += which
        k, n = units["k"].double(), self.decay.steps
        now = self.vectors(number).norm(dim=1).cpu()
        if self.decay.form == "length":
            factor = units["length"] * (1 - k / n) / now.clamp_min(1e-300)
        else:
            factor = (n - k) / (n - k + 1)
        ends = which & ((units["k"] >= n) | (now < 1e-12))
        factor = torch.where(ends, 0.0, torch.where(which, factor, 1.0))
        for member, p in self.parts(number):
            along = member.spread(factor.to(p.device), p.shape[member.dim])
            shape = [1] * p.ndim
            shape[member.dim] = -1
            with torch.no_grad():
                p.mul_(along.to(p.dtype).view(shape))
                if ends.any():
                    member.fill_(p, ends, 0.0)  # also of what was not finite
            if ends.any() and optimizer is not None:
                for value in optimizer.state.get(p, {}).values():
                    if isinstance(value, Tensor) and value.shape == p.shape:
                        member.fill_(value, ends, 0.0)
        if ends.any():
            units["gone"] |= ends
            units["k"][ends] = 0
            for unit in ends.nonzero().flatten().tolist() if n > 1 else ():
                self._ended(number, unit, step, False, seen)

    def _ended(
        self, number: int, unit: int, step: int, restored: bool, seen: tuple[Tensor, Tensor] | None
    ) -> None:
        units = self.units[number]
        rate, length = (None, None) if seen is None else (float(f"{values[unit]:.4g}") for values in seen)
        start = int(units["since"][unit])
        group = self.graph.groups[number].name
        self.endings.append(Ending(group, int(units["unit"][unit]), start, step, restored, rate, length))

    # --- cuts --------------------------------------------------------------------------------------------

    def cut(self, graph: Graph, masks: Sequence[Tensor]) -> None:
        """Follow a cut of the model: (units,) bool per group, True = kept."""
        self.graph = graph
        for number, units in self.units.items():
            self.units[number] = {name: value[masks[number]] for name, value in units.items()}
        self.before.clear()
