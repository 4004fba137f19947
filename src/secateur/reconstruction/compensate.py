"""Making up for what was removed, without training: on calibration images, the remaining weights of each
convolution and linear layer are solved again, in the order of the forward pass, so that the pruned network
stays close to the dense one.

Both networks run side by side, step by step. At each layer the inputs are the pruned network's, with all that
went wrong before, and the target is the dense network's output; where the output is then added to another
branch, the target is such that the sum is right.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from secateur.graph.replay import Call, Replay, Tensors, Values
from secateur.reconstruction.leastsquares import Moments, choose, solve

POSITIONS = 32
"""Positions of each image that a convolution is fitted on: more of one image add little."""

_FLOOR = 1e-2  # of a norm's scale, where its inverse amplifies what other branches got wrong

_ATEN = torch.ops.aten
_CONVOLUTIONS = {_ATEN.conv1d.default, _ATEN.conv2d.default}
_LINEAR = {_ATEN.linear.default}
_NORMS = {_ATEN.batch_norm.default}
_SUMS = {_ATEN.add.Tensor, _ATEN.add_.Tensor}


@dataclass(frozen=True)
class Layer:
    """A call that multiplies by a weight, and where its offset goes.

    Attributes:
        call: of the operator.
        weight: name of its weight, (o, k/groups, …).
        groups: of a grouped convolution.
        offset: name of its bias, or of the running mean of the norm that follows; None: it has no offset.
        sign: 1 if adding to that tensor adds to the output, -1 if it subtracts.
        norm: the norm that follows and reads nothing else, if there is one.
        beside: the other operand of the sum that the output goes into, if it does.
    """

    call: Call
    weight: str
    groups: int
    offset: str | None
    sign: int
    norm: Call | None
    beside: fx.Node | None


@dataclass(frozen=True)
class Fitted:
    """One layer at the point where it was solved, so that other masks of it can be tried.

    Attributes:
        layer: which.
        moments: one per group of the layer.
        dense: what the tensor that holds the offset was before.
        device: where the model is; moments are on the CPU.
    """

    layer: Layer
    moments: tuple[Moments, ...]
    dense: Tensor | None
    device: torch.device

    def solved(self, mask: Tensor) -> dict[str, Tensor]:
        """The layer's tensors for a mask of its weight, (o, i, …)."""
        rows = mask.cpu().flatten(1).chunk(len(self.moments))
        weights = [solve(m, part) for m, part in zip(self.moments, rows, strict=True)]
        return self.tensors(torch.cat(weights), mask.shape)

    def tensors(self, w: Tensor, shape: torch.Size) -> dict[str, Tensor]:
        """Weight and offset as they go into the model, for solved weights (o, k)."""
        layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        dtype = self.moments[0].before.dtype
        found = {self.layer.weight: w.view(shape).to(self.device, dtype).contiguous(memory_format=layout)}
        if self.layer.offset and self.dense is not None:
            offset = torch.cat(
                [m.offset(part) for m, part in zip(self.moments, w.chunk(len(self.moments)), strict=True)]
            )
            start = 0.0 if self.layer.sign > 0 else self.dense.double()
            found[self.layer.offset] = (start + self.layer.sign * offset).to(self.device, self.dense.dtype)
        return found

    def error(self, w: Tensor) -> float:
        """Share of the target's power that weights (o, …) miss, offset included."""
        parts = w.cpu().flatten(1).chunk(len(self.moments))
        power = sum(float(m.power.sum()) for m in self.moments)
        missed = sum(
            m.error(part) * float(m.power.sum()) for m, part in zip(self.moments, parts, strict=True)
        )
        return missed / max(power, 1e-30)

    def chosen(self, count: int, mask: Tensor, steps: int) -> Tensor:
        """Mask of `count` weights within a mask, chosen by what their removal costs."""
        return choose(self.moments, count, steps=steps, mask=mask.cpu().flatten(1)).view(mask.shape)


@dataclass(frozen=True)
class Compensated:
    """A pruned network whose remaining weights were solved again.

    Attributes:
        tensors: name -> what takes the place of the model's tensor.
        masks: name -> mask of each weight that was pruned.
        fitted: weight name -> the layer at the point where it was solved.
    """

    tensors: dict[str, Tensor]
    masks: dict[str, Tensor]
    fitted: dict[str, Fitted]


ChooseMask = Callable[[Fitted], Tensor]
"""From a layer at the point where it is solved to its mask."""


def layers(replay: Replay, names: Sequence[str] | None = None) -> list[Layer]:
    """The convolutions and linear layers of a forward pass whose weight is a parameter, in order of execution.

    A weight that several calls share is left out: no one least-squares problem is its own.
    """
    users: dict[fx.Node, list[Call]] = {}
    for call in replay.calls:
        for node in call.node.all_input_nodes:
            users.setdefault(node, []).append(call)
    found: list[Layer] = []
    for call in replay.calls:
        node = call.node
        if node.target not in _CONVOLUTIONS | _LINEAR:
            continue
        weight = replay.owner(node.args[1])
        if weight is None or (names is not None and weight not in names):
            continue
        bias = replay.owner(node.args[2]) if len(node.args) > 2 else None
        many = node.args[6] if node.target in _CONVOLUTIONS and len(node.args) > 6 else 1
        groups = many if isinstance(many, int) else 1
        after = users.get(node, [])
        norm = after[0] if len(after) == 1 and after[0].node.target in _NORMS else None
        mean = replay.owner(norm.node.args[3]) if norm else None
        last = norm or call
        sums = users.get(last.node, [])
        beside = None
        if len(sums) == 1 and sums[0].node.target in _SUMS and not sums[0].node.kwargs:
            a, b = sums[0].node.args[:2]
            other = b if a is last.node else a
            beside = other if isinstance(other, fx.Node) else None
        found.append(Layer(call, weight, groups, bias or mean, 1 if bias else -1, norm, beside))
    times = [layer.weight for layer in found]
    return [layer for layer in found if times.count(layer.weight) == 1]


@torch.no_grad()
def compensate(
    replay: Replay,
    batches: Sequence[Tensor],
    choices: Mapping[str, Tensor | ChooseMask],
    *,
    start: Tensors | None = None,
    keep: Mapping[str, Tensor] | None = None,
) -> Compensated:
    """Prune the layers of a network one after the other, and solve what remains of each again.

    Args:
        replay: of the dense model, whose outputs are the target.
        batches: calibration images, (n, …) each.
        choices: weight name -> its mask, or how to choose it at the point where it is solved.
        start: tensors that the pruned network already differs in.
        keep: name -> bool of a tensor's shape; where it is False the tensor is zero and stays so.
    Source: layerwise reconstruction as in He et al. 2017, arXiv:1707.06168, with the pruned network's inputs and
        the dense network's targets.
    Differs: the targets of branches that are added up make up for one another; offsets go into biases or norms.
    """
    result = Compensated(dict(start or {}), {}, {})
    at = {layer.call.node: layer for layer in layers(replay, list(choices))}
    dense, pruned = [replay.begin(x) for x in batches], [replay.begin(x) for x in batches]
    for call in replay.calls:
        if call.node in at:
            layer = at[call.node]
            fitted = measure(replay, layer, dense, pruned, result.tensors)
            choice = choices[layer.weight]
            mask = choice if isinstance(choice, Tensor) else choice(fitted)
            result.fitted[layer.weight], result.masks[layer.weight] = fitted, mask
            found = fitted.solved(mask)
            result.tensors.update({n: t * keep[n] if keep and n in keep else t for n, t in found.items()})
        for ours, theirs in zip(pruned, dense, strict=True):
            replay.run(call, theirs)
            replay.run(call, ours, result.tensors)
    return result


def measure(
    replay: Replay, layer: Layer, dense: Sequence[Values], pruned: Sequence[Values], tensors: Tensors
) -> Fitted:
    """The moments of a layer's inputs in the pruned network and of its targets."""
    weight = replay.tensor(layer.weight)
    before = tensors.get(layer.weight, weight).flatten(1)
    parts = before.chunk(layer.groups)
    sums: list[list[Tensor]] = [[] for _ in parts]
    count = 0
    for number, (theirs, ours) in enumerate(zip(dense, pruned, strict=True)):
        target = replay.compute(layer.call, theirs) + correction(replay, layer, theirs, ours)
        x, t = rows_of(layer, ours[layer.call.node.args[0]], target, weight, number)  # type: ignore[index]
        count += x.shape[1]
        for total, xg, tg in zip(sums, x, t.chunk(layer.groups, 1), strict=True):
            # float32 products of one batch, summed up in float64
            new = [xg.T @ xg, tg.T @ xg, tg.square().sum(0), xg.sum(0), tg.sum(0)]
            for i, value in enumerate(new):
                if len(total) <= i:
                    total.append(value.double())
                else:
                    total[i] += value
    offset = layer.offset is not None
    moments = []
    for (a, b, power, mean_x, mean_t), part in zip(sums, parts, strict=True):
        a, b, power, mean_x, mean_t = (value.cpu() / count for value in (a, b, power, mean_x, mean_t))
        if offset:
            a, b = a - torch.outer(mean_x, mean_x), b - torch.outer(mean_t, mean_x)
            power = power - mean_t.square()
        else:
            mean_x, mean_t = torch.zeros_like(mean_x), torch.zeros_like(mean_t)
        moments.append(Moments(a, b, power, mean_x, mean_t, part.cpu()))
    before_offset = replay.tensor(layer.offset).cpu() if layer.offset else None
    return Fitted(layer, tuple(moments), before_offset, weight.device)


def correction(replay: Replay, layer: Layer, dense: Values, pruned: Values) -> Tensor | float:
    """What the layer's output must have more than the dense one's, so that the sum it goes into is right."""
    if layer.beside is None or layer.beside not in dense or layer.beside not in pruned:
        return 0.0
    missing: Tensor = dense[layer.beside] - pruned[layer.beside]
    if layer.norm is None:
        return missing
    args = layer.norm.node.args
    scale, var = (replay.owner(args[i]) for i in (1, 4))
    if scale is None or var is None:
        return 0.0
    gamma = replay.tensor(scale)
    gamma = torch.where(gamma.abs() < _FLOOR, torch.full_like(gamma, _FLOOR), gamma)
    factor = (replay.tensor(var) + float(args[7])).sqrt() / gamma  # type: ignore[arg-type]
    result: Tensor = missing * factor.view(-1, *[1] * (missing.ndim - 2))
    return result


def rows_of(layer: Layer, x: Tensor, t: Tensor, weight: Tensor, phase: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of some positions: (groups, rows, k) and (rows, o).

    Positions lie on a grid that moves with `phase`.
    """
    if layer.call.node.target in _LINEAR:
        return x.reshape(1, -1, x.shape[-1]), t.reshape(-1, t.shape[-1])
    args = [*layer.call.node.args, *[None] * 7]
    if x.ndim == 3:  # a convolution of lines is one of images of height 1
        x, t, weight = x[:, :, None], t[:, :, None], weight[:, :, None]
    stride, padding, dilation = (
        _pair(value, default, weight) for value, default in ((args[3], 1), (args[4], 0), (args[5], 1))
    )
    h, w = t.shape[2:]
    steps = (
        max(1, round((h * w / POSITIONS) ** 0.5)) if h > 1 else 1,
        max(1, round((h * w / POSITIONS) ** 0.5)),
    )
    begin = [phase % step for step in steps]
    padded = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    padded = padded[:, :, begin[0] * stride[0] :, begin[1] * stride[1] :]
    jump = stride[0] * steps[0], stride[1] * steps[1]
    some = F.unfold(padded, weight.shape[2:], dilation=dilation, stride=jump)  # n, i * kh * kw, positions
    targets = t[:, :, begin[0] :: steps[0], begin[1] :: steps[1]]
    n, size, positions = some.shape
    rows = some.view(n, layer.groups, size // layer.groups, positions).permute(1, 0, 3, 2)
    return (
        rows.reshape(layer.groups, -1, size // layer.groups),
        targets.permute(0, 2, 3, 1).reshape(-1, t.shape[1]),
    )


def _pair(value: object, default: int, weight: Tensor) -> tuple[int, int]:
    """An argument of a convolution for both dims of an image."""
    given = [default] if value is None else [int(v) for v in value]  # type: ignore[attr-defined]
    if len(given) == 1:
        lines = weight.shape[2] == 1
        given = [1 if default == 1 and lines else 0 if lines else given[0], given[0]]
    return given[0], given[1]


@torch.no_grad()
def reestimate(replay: Replay, batches: Sequence[Tensor], tensors: Tensors) -> dict[str, Tensor]:
    """Means and variances of all batch norms, measured in the pruned network; `tensors` with these replaced."""
    result = dict(tensors)
    values = [replay.begin(x) for x in batches]
    for call in replay.calls:
        if call.node.target in _NORMS:
            names = [replay.owner(call.node.args[i]) for i in (3, 4)]
            inputs = [v[call.node.args[0]] for v in values]  # type: ignore[index]
            if None not in names:
                found = statistics(inputs)
                for name, value in zip(names, found, strict=True):
                    assert name is not None
                    result[name] = value.to(replay.tensor(name).dtype)
        for v in values:
            replay.run(call, v, result)
    return result


def statistics(inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance per channel over batches (n, c, …), in float64."""
    dims = [d for d in range(inputs[0].ndim) if d != 1]
    count = sum(x.numel() // x.shape[1] for x in inputs)
    mean = torch.stack([x.double().sum(dims) for x in inputs]).sum(0) / count
    shape = [1, -1, *[1] * (inputs[0].ndim - 2)]
    spread = [(x.double() - mean.view(shape)).square().sum(dims) for x in inputs]
    return mean, torch.stack(spread).sum(0) / count
