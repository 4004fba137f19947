"""Making up for what was removed, without training: on calibration images, the remaining weights of each
convolution and linear layer are solved again, in the order of the forward pass, so that the pruned network
stays close to the dense one.

Both networks run side by side, step by step. At each layer the inputs are the pruned network's, with all that
went wrong before, and the target is the dense network's output; where the output is then added to another
branch, the target is such that the sum is right.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from secateur.graph import Inputs
from secateur.graph.capture import batch_of
from secateur.graph.replay import Call, Replay, Tensors, Values
from secateur.reconstruction.held import Held
from secateur.reconstruction.leastsquares import Moments, choose, solve

POSITIONS = 32
"""Positions of each image that a convolution is fitted on: more of one image add little."""

WIDEST = 8192
"""Inputs per output above which a layer is not solved again: its moments alone would take half a gigabyte."""

KNOWN = 32
"""Inputs per output below which the moments of any images are exact enough."""

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
        columns: the inputs that the moments are of; None: all.
    """

    layer: Layer
    moments: tuple[Moments, ...]
    dense: Tensor | None
    device: torch.device

    columns: Tensor | None = None

    def solved(self, mask: Tensor) -> dict[str, Tensor]:
        """The layer's tensors for a mask of its weight, (o, i, …)."""
        flat = mask.cpu().flatten(1)
        rows = (flat if self.columns is None else flat[:, self.columns]).chunk(len(self.moments))
        weights = [solve(m, part) for m, part in zip(self.moments, rows, strict=True)]
        return self.tensors(torch.cat(weights), mask.shape)

    def tensors(self, w: Tensor, shape: torch.Size) -> dict[str, Tensor]:
        """Weight and offset as they go into the model, for solved weights (o, k)."""
        wide = w
        if self.columns is not None:
            wide = w.new_zeros(len(w), shape[1:].numel()).index_copy_(1, self.columns, w)
        layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        dtype = self.moments[0].before.dtype
        found = {self.layer.weight: wide.view(shape).to(self.device, dtype).contiguous(memory_format=layout)}
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

    A weight that several calls share is left out: no one least-squares problem is its own. So is one of more than
    `WIDEST` inputs.
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
    return [
        layer
        for layer in found
        if times.count(layer.weight) == 1 and replay.tensor(layer.weight)[0].numel() <= WIDEST
    ]


@torch.no_grad()
def compensate(
    replay: Replay,
    batches: Sequence[Inputs],
    choices: Mapping[str, Tensor | ChooseMask],
    *,
    start: Tensors | None = None,
    keep: Mapping[str, Tensor] | None = None,
    tick: Callable[[], None] | None = None,
) -> Compensated:
    """Prune the layers of a network one after the other, and solve what remains of each again.

    Memory is bounded: what the two networks have computed of each batch lies on the disk where it is too much.

    Args:
        replay: of the dense model, whose outputs are the target.
        batches: calibration images.
        choices: weight name -> its mask, or how to choose it at the point where it is solved.
        start: tensors that the pruned network already differs in.
        keep: name -> bool of a tensor's shape; where it is False the tensor is zero and stays so. Inputs of a layer
            that are zero for all of its outputs are left out of its problem, and the layer out of `fitted`.
        tick: is called after every layer.
    Source: layerwise reconstruction as in He et al. 2017, arXiv:1707.06168, with the pruned network's inputs and
        the dense network's targets.
    Differs: the targets of branches that are added up make up for one another; offsets go into biases or norms.
    """
    result = Compensated(dict(start or {}), {}, {})
    at = {layer.call.node: layer for layer in layers(replay, list(choices))}
    last: Layer | None = None
    begun = 0
    with TemporaryDirectory(prefix="secateur-") as folder:
        held = Held(folder)
        for number, call in enumerate(replay.calls):
            if call.node not in at:
                continue
            layer = at[call.node]
            choice = choices[layer.weight]
            channels = None
            if keep is not None and isinstance(choice, Tensor) and layer.groups == 1:
                read = choice.transpose(0, 1).flatten(1).any(1)
                channels = None if read.all() else read.nonzero().flatten()
            sums = Sums(replay, layer, channels)
            for batch, x in enumerate(batches):
                theirs, ours = held.take(batch) if begun else (replay.begin(x), replay.begin(x))
                if last is not None:  # the dense network has run it already
                    replay.run(last.call, ours, result.tensors)
                for between in replay.calls[begun:number]:
                    replay.run(between, theirs)
                    replay.run(between, ours, result.tensors)
                target = replay.run(call, theirs) + correction(replay, layer, theirs, ours)
                sums.add(ours[call.node.args[0]], target, batch, batch_of(x))  # type: ignore[index]
                held.put(batch, (theirs, ours))
            fitted = sums.fitted(result.tensors)
            if channels is None:
                mask = choice if isinstance(choice, Tensor) else choice(fitted)
                result.fitted[layer.weight], result.masks[layer.weight] = fitted, mask
                found = fitted.solved(mask)
            else:
                assert isinstance(choice, Tensor)
                found = fitted.solved(choice)
            result.tensors.update({n: t * keep[n] if keep and n in keep else t for n, t in found.items()})
            last, begun = layer, number + 1
            if tick:
                tick()
    return result


class Sums:
    """The moments of a layer's inputs and targets, batch by batch.

    Args:
        replay: of the dense model.
        layer: one of its layers.
        channels: of the inputs, those that count; None: all.
    """

    def __init__(self, replay: Replay, layer: Layer, channels: Tensor | None = None) -> None:
        self.replay, self.layer, self.channels = replay, layer, channels
        self.weight = replay.tensor(layer.weight).detach()
        self.columns: Tensor | None = None
        if channels is not None:
            each = self.weight[0, 0].numel()
            self.columns = (channels.cpu()[:, None] * each + torch.arange(each)).flatten()
        self._sums: list[Tensor] = []
        self._squares = torch.zeros(layer.groups, dtype=torch.float64)
        self._shift: Tensor | None = None
        self.rows = self.images = 0

    def add(self, x: Tensor, target: Tensor | None, number: int, images: int) -> None:
        """Take in a batch of images: the layer's input, and what its output is to be, unless only inputs are asked
        for.
        """
        if self.channels is not None:
            x = x.index_select(
                -1 if self.layer.call.node.target in _LINEAR else 1, self.channels.to(x.device)
            )
        rows, targets = rows_of(self.layer, x, target, self.weight, number)
        if self._shift is None:  # near the mean, so that what is centred later is known more exactly
            mean = rows.mean(1, keepdim=True)
            self._shift = mean if self.layer.offset else torch.zeros_like(mean)
        rows = rows - self._shift
        self.rows += rows.shape[1]
        self.images += images
        self._squares += self._squared(rows, images)
        # float32 products of one batch, summed up in float64
        new = [rows.transpose(1, 2) @ rows, rows.sum(1)]
        if targets is not None:
            tg = targets.view(len(targets), len(rows), -1).permute(1, 2, 0)  # groups, outputs, rows
            new += [tg @ rows, tg.square().sum(2), tg.sum(2)]
        if not self._sums:
            self._sums = [value.double() for value in new]
        else:
            for total, value in zip(self._sums, new, strict=True):
                total += value

    def _squared(self, rows: Tensor, images: int) -> Tensor:
        """Per group, over the images of a batch, the sum of their own moments' squared entries: (groups,)."""
        groups, count, k = rows.shape
        if k < KNOWN:
            return self._squares.new_zeros(groups)
        each = rows.view(groups * images, -1, k) if count % images == 0 else rows.view(groups * count, 1, k)
        size = each.shape[1]
        own = each @ each.transpose(1, 2) if size < k else each.transpose(1, 2) @ each
        return own.square().sum((1, 2)).view(groups, -1).double().sum(1).cpu() * (images / count) ** 2

    def inputs(self) -> list["Inner"]:
        """Per group of the layer, what is known of the inputs."""
        a, mean = (total.div_(self.rows).cpu() for total in self._sums[:2])
        assert self._shift is not None
        shift = self._shift[:, 0].double().cpu()
        found = []
        for own, away, near, squares in zip(a, mean, shift, self._squares.tolist(), strict=True):
            between = squares / self.images - float(own.square().sum())
            noise = max(0.0, between / max(1, self.images - 1)) if len(own) >= KNOWN else 0.0
            if self.layer.offset is not None:
                own.addr_(away, away, alpha=-1)
                found.append(Inner(own, away + near, noise))
            else:
                found.append(Inner(own, torch.zeros_like(away), noise))
        return found

    def fitted(self, tensors: Tensors) -> Fitted:
        """The layer's problem, for weights that are drawn towards those it has now."""
        before = tensors.get(self.layer.weight, self.weight).flatten(1)
        before = before.cpu() if self.columns is None else before.cpu()[:, self.columns]
        others = [total.cpu() / self.rows for total in self._sums[2:]]
        means = self._sums[1].cpu() / self.rows  # from the shift
        moments = []
        parts = before.chunk(self.layer.groups)
        for inner, b, power, mean_t, away, part in zip(self.inputs(), *others, means, parts, strict=True):
            if self.layer.offset is None:
                mean_t = torch.zeros_like(mean_t)
            b, power = b.addr(mean_t, away, alpha=-1), power - mean_t.square()
            moments.append(Moments(inner.a, b, power, inner.mean, mean_t, part, inner.noise))
        return Fitted(self.layer, tuple(moments), self.dense_offset, self.weight.device, self.columns)

    @property
    def dense_offset(self) -> Tensor | None:
        """What the tensor that holds the offset is in the dense network."""
        return self.replay.tensor(self.layer.offset).detach().cpu() if self.layer.offset else None


@dataclass(frozen=True)
class Inner:
    """What is known of the inputs of a layer, or of one of the groups of a grouped layer.

    Attributes:
        a: (k, k), float64, their second moments, centred if the layer has an offset.
        mean: (k,), zero if it has none.
        noise: the squared error of `a` that is to be expected, from how much the images differ.
    """

    a: Tensor
    mean: Tensor
    noise: float


@dataclass(frozen=True)
class Seen:
    """The inputs of one layer of the dense network.

    Attributes:
        layer: which.
        inputs: per group of the layer.
        weight: of the layer, (o, k).
        offset: the tensor that holds its offset, if it has one.
        shape: of the weight in the model.
        device: where the model is; the rest is on the CPU.
    """

    layer: Layer
    inputs: tuple[Inner, ...]
    weight: Tensor
    offset: Tensor | None
    shape: torch.Size
    device: torch.device

    def fitted(self) -> Fitted:
        """The layer's problem: its own outputs are the target."""
        moments: list[Moments] = []
        for inner, part in zip(self.inputs, self.weight.chunk(len(self.inputs)), strict=True):
            w = part.double()
            b = w @ inner.a
            mean_t = w @ inner.mean
            if self.layer.sign > 0 and self.offset is not None:
                mean_t = mean_t + self.offset.chunk(len(self.inputs))[len(moments)]
            moments.append(Moments(inner.a, b, (b * w).sum(1), inner.mean, mean_t, part, inner.noise))
        return Fitted(self.layer, tuple(moments), self.offset, self.device)

    def tensors(self, w: Tensor) -> dict[str, Tensor]:
        """Weight and offset as they go into the model, for weights (o, k) of a layer of one group."""
        layout = torch.channels_last if len(self.shape) == 4 else torch.contiguous_format
        weight = w.view(self.shape).to(self.device, self.weight.dtype)
        found = {self.layer.weight: weight.contiguous(memory_format=layout)}
        if self.layer.offset and self.offset is not None:
            missing = (self.weight.double() - w.double()) @ self.inputs[0].mean
            found[self.layer.offset] = (self.offset.double() + self.layer.sign * missing).to(
                self.device, self.offset.dtype
            )
        return found


@torch.no_grad()
def see(replay: Replay, batches: Sequence[Inputs], tick: Callable[[], None] | None = None) -> dict[str, Seen]:
    """What goes into every layer of the dense network, batch by batch: weight name -> its moments."""
    sums = {layer.call.node: Sums(replay, layer) for layer in layers(replay)}
    for number, x in enumerate(batches):
        values = replay.begin(x)
        for call in replay.calls:
            if call.node in sums:
                sums[call.node].add(values[call.node.args[0]], None, number, batch_of(x))  # type: ignore[index]
            replay.run(call, values)
        if tick:
            tick()
    return {
        s.layer.weight: Seen(
            s.layer,
            tuple(s.inputs()),
            s.weight.flatten(1).cpu(),
            s.dense_offset,
            s.weight.shape,
            s.weight.device,
        )
        for s in sums.values()
    }


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


def rows_of(
    layer: Layer, x: Tensor, t: Tensor | None, weight: Tensor, phase: int
) -> tuple[Tensor, Tensor | None]:
    """Inputs and targets of some positions: (groups, rows, k) and (rows, o); no targets if none are given.

    Positions lie on a grid that moves with `phase`.
    """
    if layer.call.node.target in _LINEAR:
        return x.reshape(1, -1, x.shape[-1]), None if t is None else t.reshape(-1, t.shape[-1])
    args = [*layer.call.node.args, *[None] * 7]
    if x.ndim == 3:  # a convolution of lines is one of images of height 1
        x, t, weight = x[:, :, None], None if t is None else t[:, :, None], weight[:, :, None]
    stride, padding, dilation = (
        _pair(value, default, weight) for value, default in ((args[3], 1), (args[4], 0), (args[5], 1))
    )
    h, w = (
        (size + 2 * pad - gap * (kernel - 1) - 1) // jump + 1
        for size, pad, gap, kernel, jump in zip(
            x.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True
        )
    )
    steps = (
        max(1, round((h * w / POSITIONS) ** 0.5)) if h > 1 else 1,
        max(1, round((h * w / POSITIONS) ** 0.5)),
    )
    begin = [phase % step for step in steps]
    some = F.pad(x, (padding[1], padding[1], padding[0], padding[0])) if any(padding) else x
    some = some[:, :, begin[0] * stride[0] :, begin[1] * stride[1] :]
    for dim in (0, 1):  # a view: only what lies on the grid is copied
        reach = dilation[dim] * (weight.shape[2 + dim] - 1) + 1
        some = some.unfold(2 + dim, reach, stride[dim] * steps[dim])[..., :: dilation[dim]]
    n, _, down, across = some.shape[:4]
    some = torch.unflatten(some, 1, (layer.groups, -1))  # n, groups, i, down, across, kh, kw
    rows = some.permute(1, 0, 3, 4, 2, 5, 6).reshape(layer.groups, n * down * across, -1)
    if t is None:
        return rows, None
    targets = t[:, :, begin[0] :: steps[0], begin[1] :: steps[1]]
    return rows, targets.permute(0, 2, 3, 1).reshape(-1, t.shape[1])


def _pair(value: object, default: int, weight: Tensor) -> tuple[int, int]:
    """An argument of a convolution for both dims of an image."""
    given = [default] if value is None else [int(v) for v in value]  # type: ignore[attr-defined]
    if len(given) == 1:
        lines = weight.shape[2] == 1
        given = [1 if default == 1 and lines else 0 if lines else given[0], given[0]]
    return given[0], given[1]


@torch.no_grad()
def reestimate(replay: Replay, batches: Sequence[Inputs], tensors: Tensors) -> dict[str, Tensor]:
    """Means and variances of all batch norms, measured in the pruned network; `tensors` with these replaced.

    Memory is bounded as in `compensate`.
    """
    result = dict(tensors)
    begun = 0
    with TemporaryDirectory(prefix="secateur-") as folder:
        held = Held(folder)
        for number, call in enumerate(replay.calls):
            if call.node.target not in _NORMS:
                continue
            names = [replay.owner(call.node.args[i]) for i in (3, 4)]
            if None in names:
                continue
            statistics = Statistics()
            for batch, x in enumerate(batches):
                values = held.take(batch) if begun else replay.begin(x)
                for between in replay.calls[begun:number]:
                    replay.run(between, values, result)
                statistics.add(values[call.node.args[0]])  # type: ignore[index]
                held.put(batch, values)
            for name, value in zip(names, (statistics.mean, statistics.variance), strict=True):
                assert name is not None
                result[name] = value.to(replay.tensor(name).dtype)
            begun = number
    return result


class Statistics:
    """Mean and variance per channel over batches (n, c, …), in float64.

    Attributes:
        mean: (c,).
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor = torch.zeros(())
        self._spread: Tensor = torch.zeros(())

    def add(self, x: Tensor) -> None:
        """Take in a batch."""
        dims = [d for d in range(x.ndim) if d != 1]
        shape = [1, -1, *[1] * (x.ndim - 2)]
        count, x = x.numel() // x.shape[1], x.double()
        mean = x.mean(dims)
        total = self.count + count
        away = mean - self.mean.to(mean)
        spread = (x - mean.view(shape)).square().sum(dims)
        self._spread = self._spread.to(mean) + spread + away.square() * (self.count * count / total)
        self.mean = self.mean.to(mean) + away * (count / total)
        self.count = total

    @property
    def variance(self) -> Tensor:
        """(c,), not corrected for the number of values."""
        return self._spread / self.count
