"""The graph of a model as pruning sees it: groups of units, what is frozen and why, and what things cost."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from secateur.errors import CaptureError, PlanError
from secateur.graph.activations import Buffer, find_buffers
from secateur.graph.axes import Axis, Product
from secateur.graph.branches import Branch, find_branches
from secateur.graph.capture import Capture, Inputs, Parted, WholeError, capture
from secateur.graph.guard import uncompiled
from secateur.graph.labels import Atoms, Labels, first
from secateur.graph.modules import pad_attributes
from secateur.graph.parts import Parts, capture_parts
from secateur.graph.propagate import propagate
from secateur.graph.samples import nearest_size, takes
from secateur.graph.solve import Solution, solve
from secateur.graph.trace import Trace
from secateur.graph.unread import follow
from secateur.settings import checked

Granularity: TypeAlias = Literal["channels", "blocks", "both"]
"""What a unit is: channels (heads, neurons), a residual branch as a whole, or either."""


BLOCK = " (block)"
"""How the name of a block ends."""

MAKING = ("out", "bias", "scale", "shift", "depthwise")
"""Roles of tensors that make what a layer returns."""


@dataclass(frozen=True)
class Member:
    """The positions of one tensor dim that belong to the units of a group.

    Attributes:
        tensor: name of a parameter or buffer.
        dim: the dim that shrinks.
        role: "out" (makes the unit), "in" (reads it), "recurrent" (reads it at the next step),
            "depthwise", "bias", "scale", "shift", "statistic", "other".
        index: (units, positions), the positions along `dim` of each unit.
    """

    tensor: str
    dim: int
    role: str
    index: Atoms

    @property
    def module(self) -> str:
        return self.tensor.rpartition(".")[0]

    def take(self, t: Tensor) -> Tensor:
        """The group's part of a tensor of this shape, (units, rest)."""
        index = torch.as_tensor(self.index, device=t.device)
        return t.index_select(self.dim, index.flatten()).movedim(self.dim, 0).reshape(len(index), -1)

    def spread(self, values: Tensor, size: int, fill: float = 1.0) -> Tensor:
        """Values of the units, (units,), at their positions along a dim of this size, (size,); `fill` elsewhere."""
        index = torch.as_tensor(self.index, device=values.device)
        along = torch.full((size,), fill, dtype=values.dtype, device=values.device)
        return along.index_put((index,), values[:, None].expand(index.shape))

    def fill_(self, t: Tensor, removed: Tensor, value: float) -> None:
        """Set the positions of the removed units, (units,) bool, to a value."""
        index = torch.as_tensor(self.index, device=t.device)[removed.to(t.device)].flatten()
        t.index_fill_(self.dim, index, value)


@dataclass(frozen=True)
class Group:
    """Units that can each be removed from every member at once.

    Attributes:
        name: the first layer that makes the units; of a block, its module.
        units: how many there are.
        members: every tensor dim that shrinks with them; of a block, every tensor that goes with it.
        branch: the part of the network that is the only unit, if the group is a block.
    """

    name: str
    units: int
    members: tuple[Member, ...]
    branch: Branch | None = None

    @property
    def least(self) -> int:
        """Units that must stay."""
        return 0 if self.branch else 1


@dataclass(frozen=True)
class Frozen:
    """Output channels of a layer that stay, and why."""

    name: str
    units: int
    reason: str


@dataclass(frozen=True)
class PadSite:
    """Zeros that a module pads on one side of the channels, as many as one of its attributes says.

    Attributes:
        base: padded channels that stay.
        units: (group number, unit) of every other padded channel.
    """

    module: str
    attribute: str
    base: int
    units: tuple[tuple[int, int], ...]


@dataclass(frozen=True, repr=False)
class Graph:
    """What may be cut together in one model, at the shapes it had when it was analysed.

    Attributes:
        groups: in the order of the forward pass: first those of channels, then blocks.
        frozen: layers with outputs that stay, and why.
        params: one product per parameter: its number of elements.
        macs: one product per contraction: its multiply-adds on one image.
        activations: the memory of every tensor that the forward pass makes, and when it is needed.
        pads: modules that pad channels with zeros.
        statistics: "module (operator)" wherever something is computed over channels that may be removed (the
            mean of a layer norm, the sum of a softmax): without them it is computed over the others.
        unused: parameters that no forward pass reads, and whose widths are no other's; they are left alone.
        fingerprint: identifies the names and shapes of the model's tensors.
        inputs: the example inputs.
        trace: the captured graph with every node's labels, for surgery; no part of what a graph equals.
        parts: the submodules that were captured, where the model as a whole cannot be; None: it was.
    """

    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    params: tuple[Product, ...]
    macs: tuple[Product, ...]
    activations: tuple[Buffer, ...]
    pads: tuple[PadSite, ...]
    statistics: tuple[str, ...]
    unused: tuple[str, ...]
    fingerprint: str
    inputs: Inputs
    trace: Trace | None = field(default=None, compare=False)
    parts: Parts | None = field(default=None, compare=False)

    def view(self, model: nn.Module) -> nn.Module:
        """What of a model the captured graph computes: the model itself, or its parts."""
        return model if self.parts is None or isinstance(model, Parted) else self.parts.view(model)

    @property
    def given(self) -> Inputs:
        """Example inputs of the view."""
        return self.inputs if self.parts is None else self.parts.inputs

    def on(self, device: torch.device) -> "Graph":
        """The graph with its example inputs on a device."""

        def moved(tree: Any) -> Any:
            return pytree.tree_map_only(Tensor, lambda x: x.to(device), tree)

        parts = self.parts and replace(
            self.parts, inputs=moved(self.parts.inputs), example=moved(self.parts.example)
        )
        return replace(self, inputs=moved(self.inputs), parts=parts)

    def __repr__(self) -> str:
        units = sum(group.units for group in self.groups)
        return f"<Graph: {len(self.groups)} groups, {units} units, {len(self.frozen)} layers frozen>"

    def __str__(self) -> str:
        units = sum(group.units for group in self.groups)
        lines = [f"{len(self.groups)} groups, {units} units"]
        lines += [
            f"  {group.name}: {group.units} units, {len(group.members)} tensors" for group in self.groups
        ]
        lines += [f"  {item.name}: {item.units} channels stay ({item.reason})" for item in self.frozen]
        lines += str(self.parts).splitlines() if self.parts else []
        return "\n".join(lines)


@uncompiled
@checked(CaptureError, but=("inputs",))
def analyze(
    model: nn.Module,
    inputs: Inputs,
    *,
    freeze: Sequence[str] = (),
    attention: str = "heads",
    scope: Sequence[str] = (),
    granularity: Granularity = "channels",
) -> Graph:
    """Find what may be cut together in a model.

    The model is only read: modes, hooks, gradients and buffers stay as they are.

    Args:
        model: any module that `torch.export` can capture, or that has parts it can capture, such as a detector.
        inputs: example inputs: a tensor, a list of images, a tuple of arguments, or a dict of keyword arguments.
        freeze: module names or shell patterns ("layer4.*"); no tensor inside them is changed.
        attention: what attention loses: whole "heads", or the same "dims" of every head (queries with keys,
            values with the output projection).
        scope: names of the modules to prune, each captured by itself, and the rest left as it is; none: the model, or
            if it cannot be captured, its largest submodules that can.
        granularity: what a unit is: "channels"; "blocks", a whole residual branch; or "both".
    Raises:
        CaptureError: the graph cannot be read, or a `freeze` pattern or `scope` names no module.
    """
    if attention not in ("heads", "dims"):
        raise CaptureError(f"attention={attention!r}: expected 'heads' or 'dims'")
    return find_groups(model, inputs, freeze, attention, granularity=granularity, scope=scope)


def capture_inputs(model: nn.Module, inputs: Inputs) -> Capture:
    """The captured graph.

    Raises:
        CaptureError: it cannot be captured; if the model takes images of another size, the message says which.
    """
    try:
        return capture(model, inputs)
    except WholeError:
        raise
    except CaptureError as error:
        shape = None if takes(model, inputs) else nearest_size(model, inputs)
        if shape is None:
            raise
        raise CaptureError(f"{error} It does run on images of shape {shape}.") from error


def find_groups(
    model: nn.Module,
    inputs: Inputs,
    freeze: Sequence[str] = (),
    attention: str = "heads",
    going: Mapping[tuple[str, int], Atoms] | None = None,
    scope: Sequence[str] = (),
    granularity: Granularity = "channels",
) -> Graph:
    """What `analyze` finds.

    Args:
        going: (tensor, dim) -> positions that are about to be removed: where there is a choice, groups are made so
            that this can be done.
    """
    parts, given, whole = None, inputs, None
    try:
        if not scope:
            captured = capture_inputs(model, inputs)
    except WholeError as error:
        whole = error
    if scope or whole:
        parts, captured = capture_parts(model, inputs, scope, whole)
        model, given = parts.view(model), parts.inputs
    labels = Labels(frozenset(name for name, _ in model.named_parameters()))
    names = canonical_names(model)
    values = propagate(model, captured, labels, names)
    passes = [values]
    counted = len(labels.contractions)
    aside = unused = unread(model, labels, names)
    if unused:  # such as auxiliary heads, which only the training-mode forward pass runs
        try:
            passes.append(propagate(model, capture(model, given, training=True), labels, names))
            del labels.contractions[counted:]
            unused = unread(model, labels, names)
        except CaptureError:
            pass  # what training would read is unknown, but so is it to the user: the names are reported
    pin_modules(model, labels, names, freeze)
    if parts is not None:  # what stands between the parts may read others in any way
        aside = tuple(name for name in aside if is_inside(name, parts.names))
    following = follow(model, aside, passes, labels) if aside else set()
    unused = tuple(name for name in unused if names[name] not in following)
    wanted = np.zeros(labels.count, dtype=bool)
    for key, positions in (going or {}).items():
        if key in labels.tensors:
            wanted[labels.tensors[key][positions]] = True
    solution = solve(labels, attention, wanted if going else None)
    branches: dict[str, Branch] = {}
    if granularity != "channels":
        owned = is_frozen_by(names, freeze)
        found = find_branches(model, captured, values, labels, names)
        branches = {
            name: branch
            for name, branch in zip(block_names(model, found), found, strict=True)
            if not any(map(owned, branch.tensors))
        }
    channels = granularity != "blocks"
    graph = build(model, inputs, labels, solution, captured, values, unused, branches, channels)
    if whole and not graph.groups:
        raise whole
    return replace(graph, parts=parts)


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Name of every parameter and buffer -> the first name of the same tensor (tied weights have several)."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in named_tensors(model)}


def named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Every parameter and buffer under every name it has."""
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def unread(model: nn.Module, labels: Labels, names: dict[str, str]) -> tuple[str, ...]:
    """Parameters that no operator so far has asked labels for."""
    seen = {name for name, _ in labels.tensors}
    return tuple(name for name, p in model.named_parameters() if p.ndim and names[name] not in seen)


def is_inside(tensor: str, modules: Iterable[str]) -> bool:
    """Whether a tensor belongs to one of these modules, by name."""
    return any(tensor.startswith(f"{module}.") for module in modules)


def is_frozen(name: str, freeze: Sequence[str]) -> bool:
    """Whether a module or one that it is part of has a name that one of the patterns matches.

    >>> is_frozen("layer4.0.conv1", ["layer4"]), is_frozen("layer4.0.conv1", ["*.conv2"])
    (True, False)
    """
    parts = name.split(".")
    paths = [".".join(parts[: n + 1]) for n in range(len(parts))]
    return any(fnmatchcase(path, pattern) for path in paths for pattern in freeze)


def is_frozen_by(names: Mapping[str, str], freeze: Sequence[str]) -> Callable[[str], bool]:
    """Whether a tensor, by its first name, is in a module that one of the patterns matches."""
    owners: dict[str, set[str]] = {}
    for alias, name in names.items():
        owners.setdefault(name, set()).add(alias.rpartition(".")[0])
    return lambda tensor: any(is_frozen(owner, freeze) for owner in owners[tensor])


def pin_modules(model: nn.Module, labels: Labels, names: dict[str, str], freeze: Sequence[str]) -> None:
    modules = [name for name, _ in model.named_modules() if name]
    for pattern in freeze:
        if not any(is_frozen(name, [pattern]) for name in modules):
            some = ", ".join(modules[:8])
            raise CaptureError(f"freeze={pattern!r} matches no module; the model has {some}, …")
        frozen = is_frozen_by(names, [pattern])
        for (tensor, _), atoms in labels.tensors.items():
            if frozen(tensor):
                labels.module = tensor.rpartition(".")[0]
                labels.pin(atoms, "frozen by the user")


def fingerprint(model: nn.Module) -> str:
    """Hash of the names and shapes of a model's parameters and buffers; precision and values do not count."""
    described = sorted(f"{name} {tuple(t.shape)}" for name, t in named_tensors(model))
    return hashlib.sha256("\n".join(described).encode()).hexdigest()[:16]


def check_model(model: nn.Module, graph: Graph) -> None:
    """Raise PlanError unless a graph was made from a model with the same tensors."""
    if fingerprint(model) != graph.fingerprint:
        raise PlanError("the graph was made from a model with other tensors; analyse this model again")


def build(
    model: nn.Module,
    inputs: Inputs,
    labels: Labels,
    solution: Solution,
    captured: Capture,
    values: dict[fx.Node, Any],
    unused: tuple[str, ...],
    branches: Mapping[str, Branch] = MappingProxyType({}),
    channels: bool = True,
) -> Graph:
    """Collect units with the same members into groups, and express every width by them.

    Args:
        branches: become groups of one unit each, by their names.
        channels: without, these are all the groups there are.
    """
    keys = list(labels.tensors)
    arrays = list(labels.tensors.values())
    tensor_axes = {key: index for index, key in enumerate(keys)}
    number: dict[bytes, int] = {}
    for key, atoms in labels.tensors.items():
        number.setdefault(solution.root[atoms].tobytes(), tensor_axes[key])

    def axis_number(atoms: Atoms) -> int:
        """An axis whose positions belong to the same units may stand for this one."""
        axis = number.setdefault(solution.root[atoms].tobytes(), len(arrays))
        if axis == len(arrays):
            arrays.append(atoms)
        return axis

    def is_weighed(axes: Iterable[int]) -> bool:
        """Whether a weight makes or reads the units, so that zeros in it can take them away; an index cannot."""
        roles = {labels.roles[keys[axis]] for axis in axes if axis < len(keys)}
        return not roles.isdisjoint(("out", "in"))

    mac_axes = [[axis_number(atoms) for atoms in item.axes] for item in labels.contractions]
    able = [unit_set for unit_set in collect(arrays, solution) if is_weighed(unit_set)]
    unit_sets = able if channels else []
    groups: list[Group] = []
    axes = [Axis(len(atoms)) for atoms in arrays]
    for unit_set in unit_sets:
        members = tuple(
            Member(*keys[axis], labels.roles[keys[axis]], index)
            for axis, index in unit_set.items()
            if axis < len(keys)
        )
        for axis, index in unit_set.items():
            units, each = index.shape
            axes[axis] = Axis(axes[axis].base - units * each, (*axes[axis].parts, (len(groups), each)))
        producers = [member.module for member in members if member.role == "out"]
        name = producers[0] if producers else members[0].module
        copies = sum(group.name.partition("#")[0] == name for group in groups)
        groups.append(Group(f"{name}#{copies + 1}" if copies else name, units, members))

    first_block = len(groups)
    groups += [
        Group(name, 1, block_members(model, branch, labels), branch) for name, branch in branches.items()
    ]

    def inside(tensor: str = "", node: str = "") -> tuple[Axis, ...]:
        """A width of 0 or 1 for every block that a tensor or an operator belongs to."""
        return tuple(
            Axis(0, ((first_block + number, 1),))
            for number, branch in enumerate(branches.values())
            if tensor in branch.tensors or node in branch.steps
        )

    params = []
    for name, parameter in model.named_parameters():
        shape = parameter.shape
        cut = [tensor_axes[name, dim] for dim in range(len(shape)) if (name, dim) in tensor_axes]
        fixed = [size for dim, size in enumerate(shape) if (name, dim) not in tensor_axes]
        params.append(Product(name, int(np.prod(fixed)), (*(axes[i] for i in cut), *inside(tensor=name))))
    macs = []
    for item, indices in zip(labels.contractions, mac_axes, strict=True):
        full = int(np.prod([len(arrays[i]) for i in indices]))
        times, images = (item.per_image, captured.batch) if item.per_image else (1.0, 1)
        widths = (*(axes[i] for i in indices), *inside(node=item.node))
        macs.append(Product(item.module, item.macs * times / (full * images), widths))
    blocks = {first_block + number: branch for number, branch in enumerate(branches.values())}
    trace = Trace(captured, values, labels.tensors, unit_numbers(solution, unit_sets, arrays), blocks)
    return Graph(
        groups=tuple(groups),
        frozen=frozen_layers(labels, solution, able, arrays),
        params=tuple(params),
        macs=tuple(macs),
        activations=find_buffers(trace, [group.units for group in groups[:first_block]]),
        pads=pad_sites(model, labels, solution, unit_sets, arrays),
        statistics=statistic_sites(labels, solution) if channels else (),
        unused=unused,
        fingerprint=fingerprint(model),
        inputs=inputs,
        trace=trace,
    )


def block_names(model: nn.Module, branches: Sequence[Branch]) -> list[str]:
    """A name for every branch: that of its module, or, of several in one module, that of its largest part."""
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in model.named_modules()}
    modules = [branch.module for branch in branches]
    names: list[str] = []
    for branch in branches:
        name = branch.module
        if branch.parts and (not name or modules.count(name) > 1):
            name = max(branch.parts, key=sizes.__getitem__)
        copies = sum(other.partition(BLOCK)[0] == name for other in names)
        names.append(f"{name}{BLOCK}" + (f"#{copies + 1}" if copies else ""))
    return names


def block_members(model: nn.Module, branch: Branch, labels: Labels) -> tuple[Member, ...]:
    """Every tensor that goes with a branch; those that its output is made with have the roles they have there."""
    tensors = dict(named_tensors(model))
    members = []
    for name in branch.tensors:
        shape = tensors[name].shape
        if not shape or not all(shape):
            continue
        known = {dim: labels.roles.get((name, dim), "other") for dim in range(len(shape))}
        telling = [dim for dim, role in known.items() if role in MAKING] if name in branch.last else []
        dim = telling[0] if telling else 0
        role = known[dim] if telling else "other"
        members.append(Member(name, dim, role, np.arange(shape[dim])[None]))
    return tuple(members)


def unit_numbers(solution: Solution, unit_sets: Sequence[dict[int, Atoms]], arrays: Sequence[Atoms]) -> Atoms:
    """(atoms,): the number of each atom's unit, counted over all groups; -1 for atoms that stay."""
    number = np.full(len(solution.root), -1)
    count = 0
    for unit_set in unit_sets:
        axis, index = next(iter(unit_set.items()))
        number[solution.root[arrays[axis][index[:, 0]]]] = count + np.arange(len(index))
        count += len(index)
    result: Atoms = number[solution.root]
    return result


def collect(arrays: Sequence[Atoms], solution: Solution) -> list[dict[int, Atoms]]:
    """Classes of atoms with the same members, as axis number -> (units, positions).

    Two units belong to one group when they have equally many positions on the same axes; then every width
    is a constant times the number of units kept. Groups of a single unit are left out: it can never go.
    """
    axis = np.repeat(np.arange(len(arrays)), [len(atoms) for atoms in arrays])
    position = np.concatenate([np.arange(len(atoms)) for atoms in arrays] or [np.zeros(0, dtype=np.int64)])
    unit = solution.root[np.concatenate([*arrays, np.zeros(0, dtype=np.int64)]).astype(np.int64)]
    free = solution.removable[unit]
    axis, position, unit = axis[free], position[free], unit[free]
    order = np.lexsort((position, axis, unit))
    axis, position, unit = axis[order], position[order], unit[order]
    if not len(unit):
        return []
    starts = np.flatnonzero(np.r_[True, unit[1:] != unit[:-1]])
    ends = np.r_[starts[1:], len(unit)]
    alike: dict[bytes, list[int]] = {}
    for number, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        alike.setdefault(axis[start:end].tobytes(), []).append(number)
    result = []
    for numbers in alike.values():
        if len(numbers) < 2:
            continue
        rows = position[starts[numbers][:, None] + np.arange(ends[numbers[0]] - starts[numbers[0]])]
        columns = axis[starts[numbers[0]] : ends[numbers[0]]]
        result.append({int(a): rows[:, columns == a] for a in np.unique(columns)})
    return result


def pad_sites(
    model: nn.Module,
    labels: Labels,
    solution: Solution,
    unit_sets: Sequence[dict[int, Atoms]],
    arrays: Sequence[Atoms],
) -> tuple[PadSite, ...]:
    """For every side of every editable pad: which of its channels belong to which unit."""
    unit_of: dict[int, tuple[int, int]] = {}
    for group, unit_set in enumerate(unit_sets):
        axis, index = next(iter(unit_set.items()))
        roots = solution.root[arrays[axis][index[:, 0]]].tolist()
        unit_of |= {root: (group, unit) for unit, root in enumerate(roots)}
    sites = []
    for pad in labels.pads:
        for attribute, atoms in zip(
            pad_attributes(model, pad.module) or (), (pad.before, pad.after), strict=True
        ):
            units = [unit_of[root] for root in solution.root[atoms].tolist() if root in unit_of]
            sites.append(PadSite(pad.module, attribute, len(atoms) - len(units), tuple(units)))
    return tuple(sites)


def statistic_sites(labels: Labels, solution: Solution) -> tuple[str, ...]:
    """Where a statistic is computed over dims along which something may be removed."""
    sites: dict[str, None] = {}
    for item in labels.statistics:
        root = solution.root[item.factor]
        rest = first(root, [dim for dim in range(root.ndim) if dim not in item.dims])
        if ((root != rest) & (solution.removable[root] | solution.removable[rest])).any():
            op = item.op.rpartition(".")[2]
            sites[f"{item.module} ({op})" if item.module else op] = None
    return tuple(sites)


def frozen_layers(
    labels: Labels, solution: Solution, unit_sets: Iterable[dict[int, Atoms]], arrays: Sequence[Atoms]
) -> tuple[Frozen, ...]:
    """For every layer that makes channels: those in no group, counted by reason."""
    grouped = np.zeros(labels.count, dtype=bool)
    for unit_set in unit_sets:
        for axis, index in unit_set.items():
            grouped[arrays[axis][index]] = True
    frozen = []
    for (tensor, dim), role in labels.roles.items():
        if role != "out":
            continue
        atoms = labels.tensors[tensor, dim]
        counts: dict[str, int] = {}
        for root in solution.root[atoms[~grouped[atoms]]].tolist():
            if root in solution.reasons:
                reason, module = solution.reasons[root]
                reason += f" (in {module})" if module else ""
            else:
                reason = "all its channels are tied to one another"
            counts[reason] = counts.get(reason, 0) + 1
        frozen += [Frozen(tensor.rpartition(".")[0], units, reason) for reason, units in counts.items()]
    return tuple(frozen)
