"""The decision, as data: which units of which groups go. A plan knows no module."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur import __version__
from secateur.errors import FileError, PlanError
from secateur.files import atomic_write
from secateur.graph import Graph
from secateur.settings import checked

FORMAT = 1
LARGEST = 64 * 2**20
"""Bytes of a plan file that are read at most."""


@dataclass(frozen=True, repr=False)
class Plan:
    """Which units to remove from which groups of one model.

    Attributes:
        fingerprint: of the model the plan was made for.
        removed: group name -> sorted numbers of the units that go; groups that stay whole are left out.
        units: group name -> units it had, for every group.
        origin: how the plan was made (method, score, budget, …), for people and reports.
    """

    fingerprint: str
    removed: Mapping[str, tuple[int, ...]]
    units: Mapping[str, int]
    origin: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        gone = sum(map(len, self.removed.values()))
        groups = f"{len(self.removed)} of {len(self.units)} groups"
        return f"<Plan: {gone} of {sum(self.units.values())} units go, from {groups}>"

    @classmethod
    @checked(PlanError)
    def of(cls, graph: Graph, masks: Sequence[Tensor], origin: Mapping[str, Any] | None = None) -> "Plan":
        """The plan that keeps the units marked True, one (units,) bool mask per group of the graph."""
        _check_masks(graph, masks)
        removed = {}
        for group, mask in zip(graph.groups, masks, strict=True):
            gone = tuple(torch.nonzero(~mask.cpu()).flatten().tolist())
            if gone:
                removed[group.name] = gone
        plan = cls(graph.fingerprint, removed, {g.name: g.units for g in graph.groups}, dict(origin or {}))
        plan.check(graph)
        return plan

    @checked(PlanError)
    def check(self, graph: Graph) -> None:
        """Raise PlanError unless the plan fits the graph of the model it is to be applied to."""
        if self.fingerprint != graph.fingerprint:
            raise PlanError(
                f"the plan was made for model {self.fingerprint}, this one is {graph.fingerprint}: names or shapes "
                f"of its tensors differ. Apply the plan to the unpruned model it was made for."
            )
        units = {group.name: group.units for group in graph.groups}
        least = {group.name: group.least for group in graph.groups}
        if dict(self.units) != units:
            other = sorted(set(self.units.items()) ^ set(units.items()))[:4]
            raise PlanError(
                f"the plan's groups differ from the model's: {other}. Analyse with the same freeze= and granularity=."
            )
        for name, gone in self.removed.items():
            if name not in units:
                raise PlanError(f"the plan names group {name!r}, which the model does not have")
            if not gone or list(gone) != sorted(set(gone)) or gone[0] < 0 or gone[-1] >= units[name]:
                raise PlanError(
                    f"group {name!r} ({units[name]} units): removed units must be distinct, ascending and in "
                    f"0…{units[name] - 1}; got {list(gone)[:6]}"
                )
            if units[name] - len(gone) < least[name]:
                raise PlanError(
                    f"group {name!r} ({units[name]} units): the plan removes all {units[name]}; at least 1 must "
                    f"stay. Raise the budget or freeze this group."
                )

    @checked(PlanError)
    def masks(self, graph: Graph) -> list[Tensor]:
        """(units,) bool per group, True = keep."""
        self.check(graph)
        result = []
        for group in graph.groups:
            mask = torch.ones(group.units, dtype=torch.bool)
            mask[list(self.removed.get(group.name, ()))] = False
            result.append(mask)
        return result

    @checked(PlanError)
    def kept(self, graph: Graph) -> list[int]:
        """Units kept per group of the graph."""
        return [int(mask.sum()) for mask in self.masks(graph)]

    def to_json(self) -> str:
        """The plan as readable JSON, one group a line."""
        rows = ",\n".join(
            f"    {json.dumps(name)}: {json.dumps({'units': units, 'removed': list(self.removed.get(name, ()))})}"
            for name, units in self.units.items()
        )
        head = {
            "format": FORMAT,
            "secateur": __version__,
            "fingerprint": self.fingerprint,
            "origin": dict(self.origin),
        }
        lines = json.dumps(head, indent=2)
        return f'{lines[:-2]},\n  "groups": {{\n{rows}\n  }}\n}}\n'

    @classmethod
    @checked(PlanError)
    def from_json(cls, text: str) -> "Plan":
        """Read a plan; anything that is not one raises PlanError."""
        try:
            data = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise PlanError(f"not a plan: {error}") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise PlanError(f"not a plan of format {FORMAT}: found {found!r}")
        groups, origin = data.get("groups"), data.get("origin", {})
        if not (
            isinstance(groups, dict) and isinstance(origin, dict) and isinstance(data.get("fingerprint"), str)
        ):
            raise PlanError("not a plan: 'groups' and 'origin' must be objects and 'fingerprint' a string")
        removed: dict[str, tuple[int, ...]] = {}
        units: dict[str, int] = {}
        for name, row in groups.items():
            gone = row.get("removed") if isinstance(row, dict) else None
            count = row.get("units") if isinstance(row, dict) else None
            if type(count) is not int or not isinstance(gone, list) or any(type(u) is not int for u in gone):
                raise PlanError(
                    f"not a plan: group {name!r} needs 'units', a number, and 'removed', a list of numbers"
                )
            units[name] = count
            if gone:
                removed[name] = tuple(gone)
        return cls(data["fingerprint"], removed, units, origin)

    @checked(PlanError)
    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, atomically."""
        atomic_write(path, self.to_json())

    @classmethod
    @checked(PlanError)
    def load(cls, path: str | Path) -> "Plan":
        """Read a plan file."""
        path = Path(path)
        try:
            if path.stat().st_size > LARGEST:
                raise FileError(f"{path}: larger than {LARGEST >> 20} MiB, which no plan is")
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise FileError(f"{path}: cannot be read as a plan ({error})") from None
        return cls.from_json(text)


def _check_masks(graph: Graph, masks: Sequence[Tensor]) -> None:
    """Raise PlanError unless there is a bool mask per group, as long as it has units."""
    if len(masks) != len(graph.groups):
        raise PlanError(
            f"got {len(masks)} masks; the graph has {len(graph.groups)} groups, and each needs one"
        )
    for group, mask in zip(graph.groups, masks, strict=True):
        if mask.dtype != torch.bool or mask.shape != (group.units,):
            raise PlanError(
                f"group {group.name!r}: got a mask of shape {tuple(mask.shape)} and {mask.dtype}; expected "
                f"({group.units},) and torch.bool, True = keep"
            )
