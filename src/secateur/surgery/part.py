"""Layers that read or write a part of a residual stream, which stays as wide as it is.

    reads:   y = layer(x[index])
    writes:  y = 0, y[index] = layer(x)

An index loses entries as its layer loses channels, so that every layer at a stream has a width of its own.

Source: reconstruction; Cai et al. 2022, arXiv:2203.02549, crop what residual layers read and what they are added to.
"""

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from secateur.errors import ModelError, unknown
from secateur.graph import Graph
from secateur.graph.groups import MAKING

Side = Literal["reads", "writes"]
SIDES: tuple[Side, ...] = ("reads", "writes")


class Part(nn.Module):
    """Takes the place of a layer, which it contains.

    Args:
        layer: a convolution without groups or a linear layer; or a batch norm, if it writes.
        side: what it does with the stream.
    Raises:
        ModelError: it is another layer.
    """

    index: Tensor

    def __init__(self, layer: nn.Module, side: str) -> None:
        super().__init__()
        self.layer, self.side = layer, side
        self.dim, stream = _channels(layer, side)
        self.stream = stream if side == "writes" else None
        weight = next(layer.parameters())
        self.register_buffer("index", torch.arange(stream, device=weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """Channels last or behind the batch, as the layer takes and returns them; the stream's side has all of them."""
        if self.stream is None:
            return self.layer(x.index_select(self.dim, self.index))  # type: ignore[no-any-return]
        y: Tensor = self.layer(x)
        shape = list(y.shape)
        shape[self.dim] = self.stream
        return y.new_zeros(shape).index_add(self.dim, self.index, y)

    @property
    def channels(self) -> int:
        """Of the stream, at its side."""
        return self.stream or _channels(self.layer, self.side)[1]

    def extra_repr(self) -> str:
        return f"{self.side} {len(self.index)}{f' of {self.stream}' if self.stream else ''} channels"


def find_parts(graph: Graph) -> dict[str, Side]:
    """Layers that can read or write a part of a stream: those of residual branches at the channels around these.

    What a branch returns is written in part only where one layer makes it.

    Args:
        graph: with channels and blocks, `granularity="both"`.
    Returns:
        names of the layers, or of the batch norms behind them.
    """
    sides: dict[str, Side] = {}
    for branch in (group.branch for group in graph.groups):
        if branch is None:
            continue
        inside, makers, norms = set(branch.tensors), dict[str, None](), dict[str, None]()
        for group in graph.groups:
            if group.branch or all(m.tensor in inside for m in group.members):
                continue
            for member in (m for m in group.members if m.tensor in inside):
                if member.role == "in":
                    sides[member.module] = "reads"
                elif member.tensor in branch.last and member.role in MAKING:
                    (norms if member.role in ("scale", "shift") else makers)[member.module] = None
        if len(makers) == 1 and len(norms) < 2:
            (last,) = norms or makers
            sides.setdefault(last, "writes")
    return sides


def add_parts_(model: nn.Module, sides: Mapping[str, str]) -> None:
    """Let layers read or write a part of a stream: at first all of it, which changes nothing.

    Args:
        model: changed in place.
        sides: layer -> "reads" or "writes".
    Raises:
        ModelError: a layer is missing, or of a kind that cannot; the model is as it was.
    """
    modules = dict(model.named_modules())
    if missing := [name for name in sides if not name or name not in modules]:
        raise ModelError(
            f"{missing[0] or 'the model'}: no layer of this name can read or write a part of a stream"
        )
    parts = {}
    for name, side in sides.items():
        try:
            parts[name] = Part(modules[name], side).train(modules[name].training)
        except ModelError as error:
            raise ModelError(f"{name}: {error}") from None
    for name, part in parts.items():
        model.set_submodule(name, part)


def remove_parts_(model: nn.Module, names: Iterable[str]) -> None:
    """Put the layers back where they were."""
    for name in names:
        part = model.get_submodule(name)
        assert isinstance(part, Part)
        model.set_submodule(name, part.layer)


def can_part(layer: nn.Module, side: Side) -> bool:
    """Whether a layer can read or write a part of a stream."""
    try:
        _channels(layer, side)
    except ModelError:
        return False
    return True


def _channels(layer: nn.Module, side: str) -> tuple[int, int]:
    """The dim of a layer's channels on one side, and how many there are."""
    if side not in SIDES:
        raise ModelError(unknown("side of a stream", side, SIDES))
    reads = side == "reads"
    called = not isinstance(
        layer, NonDynamicallyQuantizableLinear
    )  # torch's attention only reads its weights
    if isinstance(layer, nn.Linear) and called:
        return -1, layer.in_features if reads else layer.out_features
    if isinstance(layer, _ConvNd) and layer.groups == 1:
        return 1, layer.in_channels if reads else layer.out_channels
    if isinstance(layer, _BatchNorm) and side == "writes" and layer.affine:
        return 1, layer.num_features
    raise ModelError(
        f"a {type(layer).__name__} that {side} a part of a stream; expected a convolution without groups, a linear "
        f"layer, or a batch norm that writes"
    )
