"""Gates: factors on the outputs of layers, one per unit, while a method trains."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from secateur.errors import ModelError
from secateur.graph import Graph, Group, Inputs, Member
from secateur.graph.probe import run_once

DUST = {torch.float16: 1e-4}
"""What a closed gate passes on where asked to, per type; 1e-20 for others: nothing in any sum, but enough for the
gradient of a ReLU behind it, which is 0 at 0 and would hide what the unit is worth. 1e-20 is 0 in half precision."""

_NORMS = (nn.modules.batchnorm._BatchNorm,)


def norms_after(model: nn.Module, inputs: Inputs) -> dict[str, str]:
    """Layer name -> name of the batch norm that reads its output.

    Found by running the model once: the norm is given the very tensor that the layer returned.
    """
    made: dict[int, tuple[str, Tensor]] = {}
    found: dict[str, str] = {}
    handles = []

    def note(name: str, module: nn.Module) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(module, _NORMS) and args and id(args[0]) in made:
                found[made[id(args[0])][0]] = name
            if isinstance(output, Tensor):
                made[id(output)] = (name, output)  # kept alive, so that no other tensor gets its id

        handles.append(module.register_forward_hook(hook))

    for name, module in model.named_modules():
        if not any(True for _ in module.children()):
            note(name, module)
    try:
        run_once(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


class Gate:
    """A hook that multiplies a module's output channels by values that may change from pass to pass.

    Attributes:
        values: (width,); None: the output goes on as it is.
        dust: whether zeros among them let `DUST` through.
    """

    def __init__(self, width: int, dim: int) -> None:
        self.dim = dim
        self.width = width
        self.values: Tensor | None = None
        self.dust = False

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if self.values is None:
            return output
        shape = [1] * output.ndim
        shape[self.dim] = self.width
        values = self.values.to(output.dtype)
        if self.dust:
            values = values + DUST.get(output.dtype, 1e-20) * (values == 0)
        return output * values.view(shape)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copy = type(self)(self.width, self.dim)  # gradients do not reach a copy
        copy.values = None if self.values is None else self.values.detach().clone()
        copy.dust = self.dust
        return copy


class Gates:
    """The gates of some groups of a model: where they stand, and their values.

    A gate multiplies what the group's producers make, after the batch norm that follows them, so that a unit
    with gate 0 adds nothing anywhere and the model equals the cut one.

    Args:
        model: whose outputs are gated.
        graph: of the model as it is now.
        groups: numbers of the groups to gate.
        norms: from `norms_after`.
        only: group number -> the layers to gate. None: everywhere, so also after depthwise convolutions and
            norms that would make something of a zero; for gates that are not 0 or 1 see `last_layers`.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        groups: Sequence[int],
        norms: dict[str, str],
        *,
        only: Mapping[int, set[str]] | None = None,
    ) -> None:
        self._groups = list(groups)
        self._hooks: list[Any] = []
        self._gates: dict[str, Gate] = {}
        self._places: dict[str, dict[int, Member]] = {}
        tensors = dict(model.named_parameters(remove_duplicate=False))
        roles = ("out", "depthwise", "scale") if only is None else ("out", "depthwise")
        for group in self._groups:
            for member in graph.groups[group].members:
                if member.role not in roles or (only is not None and member.module not in only[group]):
                    continue
                name = norms.get(member.module, member.module)
                last = isinstance(model.get_submodule(name), nn.Linear | nn.LayerNorm)
                width = tensors[member.tensor].shape[member.dim]
                self._gates.setdefault(name, Gate(width, -1 if last else 1))
                self._places.setdefault(name, {}).setdefault(group, member)

    @property
    def names(self) -> list[str]:
        """The modules that a gate stands behind."""
        return list(self._gates)

    def set(self, values: Sequence[Tensor], *, dust: bool = False) -> None:
        """Give every gated group its values, (units,), in the order of `groups`; zeros may let dust through."""
        of = dict(zip(self._groups, values, strict=True))
        for name, gate in self._gates.items():
            parts = [member.spread(of[group], gate.width) for group, member in self._places[name].items()]
            gate.values, gate.dust = math.prod(parts[1:], start=parts[0]), dust

    def fold_(self, model: nn.Module, values: Sequence[Tensor]) -> None:
        """Multiply the layers' own weights instead, so that the model computes the same without gates.

        Raises:
            ModelError: a gate stands on a norm without scale and shift.
        """
        self.set(values)
        for name, gate in self._gates.items():
            layer = model.get_submodule(name)
            assert gate.values is not None
            weight, bias, by = layer.weight, layer.bias, gate.values.detach()
            if not isinstance(weight, Tensor) or (isinstance(layer, _NORMS) and bias is None):
                raise ModelError(
                    f"{name}: a norm without scale and shift cannot take scores; use affine=True"
                )
            shape = [1] * weight.ndim
            shape[1 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 0] = gate.width
            with torch.no_grad():
                weight.mul_(by.to(weight).view(shape))
                if isinstance(bias, Tensor):
                    bias.mul_(by.to(bias))

    def install(self, model: nn.Module) -> None:
        """Put the gates on a model of this structure."""
        for name, gate in self._gates.items():
            self._hooks.append(model.get_submodule(name).register_forward_hook(gate))

    def remove(self) -> None:
        """Take all gates off again."""
        for handle in self._hooks:
            handle.remove()
        self._hooks.clear()


def last_layers(graph: Graph, groups: Sequence[int]) -> dict[int, set[str]]:
    """Group number -> the layers behind which a factor on its units acts once, and is not normalised away.

    These are the producers of the units; but where a depthwise convolution follows, the last such one,
    because its batch norm would undo any factor before it.
    """
    order = {product.name: place for place, product in enumerate(graph.macs)}
    found = {}
    for number in groups:
        group = graph.groups[number]
        depthwise = [m.module for m in group.members if m.role == "depthwise"]
        single = len(producers(group)) == 1 and depthwise
        last = {max(depthwise, key=lambda name: order.get(name, -1))} if single else producers(group)
        found[number] = last
    return found


def producers(group: Group) -> set[str]:
    """The layers whose outputs a group's units are."""
    return {member.module for member in group.members if member.role == "out"}


def own_groups(graph: Graph, model: nn.Module) -> list[int]:
    """Groups with one producer, so not part of a residual sum; without the network's first layer."""
    first = graph.macs[0].name
    return [
        n
        for n, group in enumerate(graph.groups)
        if len(p := producers(group)) == 1 and p != {first} and gateable(group, model)
    ]


def gateable(group: Group, model: nn.Module) -> bool:
    """Whether a factor on what its layers return acts on its units: recurrent layers use theirs within, too."""
    within = nn.RNNBase | nn.RNNCellBase
    return not any(isinstance(model.get_submodule(name), within) for name in producers(group))
