"""A light second path beside a convolution, so that the layer may become very narrow.

    full:    y = scatter(norm(conv(x))) + side_norm(side(x))       the output keeps its width
    shared:  y = norm(conv(x)) + side_norm(side(x))                both lose the same channels

`side` is depthwise, one k × k filter per output channel, or pointwise, 1 × 1 in four groups. A shared side is linear,
so that it folds into the convolution's own kernel when training is over and costs nothing; a full one stays.

Source: reconstruction; Zhai et al. 2023, arXiv:2309.14157, say that a light bypass stands beside every pruned
convolution, not what it is made of.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import ModelError, unknown

Form = Literal["full", "shared"]
Side = Literal["depthwise", "pointwise"]

SIDES: tuple[Side, ...] = ("depthwise", "pointwise")


class Bypass(nn.Module):
    """Takes the place of a convolution whose batch norm it contains.

    Args:
        conv: the convolution, without groups.
        norm: the batch norm that reads it.
        form: "full" or "shared".
        norm_name: where the norm was.
        kind: of the side.
        start: scale of the side's norm.
    """

    index: Tensor

    def __init__(
        self,
        conv: nn.Conv2d,
        norm: nn.BatchNorm2d,
        form: Form,
        norm_name: str = "",
        kind: Side = "depthwise",
        start: float = 1.0,
    ) -> None:
        super().__init__()
        self.conv, self.norm, self.form, self.norm_name, self.kind = conv, norm, form, norm_name, kind
        width, groups = conv.out_channels, math.gcd(conv.in_channels, conv.out_channels)
        weight, deep = conv.weight, kind == "depthwise"
        self.side = nn.Conv2d(
            conv.in_channels,
            width,
            conv.kernel_size if deep else 1,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding if deep else 0,  # type: ignore[arg-type]
            conv.dilation if deep else 1,  # type: ignore[arg-type]
            groups=groups if deep else math.gcd(4, groups),
            bias=False,
            padding_mode=conv.padding_mode,
            device=weight.device,
            dtype=weight.dtype,
        )
        self.side_norm = nn.BatchNorm2d(
            width, norm.eps, norm.momentum, device=weight.device, dtype=weight.dtype
        )
        nn.init.constant_(self.side_norm.weight, start)
        self.register_buffer("index", torch.arange(width, device=weight.device) if form == "full" else None)

    @property
    def channels(self) -> int:
        """Of the output of a full bypass."""
        return self.side.out_channels

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) to what the convolution and its norm would return, with the side added."""
        main, side = self.norm(self.conv(x)), self.side_norm(self.side(x))
        if self.form == "shared":
            return main + side  # type: ignore[no-any-return]
        if len(self.index) == side.shape[1]:
            if not torch.compiler.is_exporting():
                return main + side  # type: ignore[no-any-return]
            # Analysis must see a scatter here too; onto zeros, since where it fills everything, the ONNX exporter
            # takes it for its source alone.
            return side + torch.zeros_like(side).index_add(1, self.index, main)  # type: ignore[no-any-return]
        return side.index_add(1, self.index, main)  # type: ignore[no-any-return]


def add_bypass_(
    model: nn.Module,
    layers: Sequence[tuple[str, str]],
    form: Form,
    kind: Side = "depthwise",
    start: float = 1.0,
) -> list[str]:
    """Put a bypass beside convolutions; their norms move into it, and an identity takes their place.

    Args:
        model: changed in place.
        layers: (convolution, its batch norm) by name.
        form: "full" or "shared".
        kind: of the side: "depthwise" or "pointwise".
        start: scale of the side's norm: 1 adds it from the start, 0 lets it grow.
    Returns:
        the names of the bypasses: those of the convolutions.
    Raises:
        ModelError: a layer is not a plain 2-d convolution followed by a batch norm, or a pointwise side does not fit
            it; a norm lacks what a shared side folds into; or there is no such kind.
    """
    if kind not in SIDES:
        raise ModelError(unknown("side of a bypass", kind, SIDES))
    modules = dict(model.named_modules())
    for conv_name, norm_name in layers:
        conv, norm = modules.get(conv_name), modules.get(norm_name)
        if type(conv) is not nn.Conv2d or conv.groups > 1 or type(norm) is not nn.BatchNorm2d:
            raise ModelError(
                f"{conv_name}: a bypass needs an ordinary convolution followed by a batch norm; got "
                f"{type(conv).__name__} followed by {type(norm).__name__}. Convert norms, to SyncBatchNorm for one, "
                f"after the bypass is there, or do without one."
            )
        if form == "shared" and (norm.running_var is None or norm.weight is None):
            raise ModelError(
                f"{norm_name}: a shared bypass folds into the norm's scale and running statistics; make the norm with "
                f"affine=True and track_running_stats=True, or use a full bypass or none"
            )
        if kind == "pointwise" and not keeps_size(conv):
            raise ModelError(
                f"{conv_name}: a pointwise bypass needs a convolution whose padding keeps the image's size; use a "
                f"depthwise one"
            )
    for conv_name, norm_name in layers:
        conv, norm = modules[conv_name], modules[norm_name]
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        bypass = Bypass(conv, norm, form, norm_name, kind, start)
        model.set_submodule(conv_name, bypass.train(conv.training))
        model.set_submodule(norm_name, nn.Identity())
    return [name for name, _ in layers]


def remove_bypass_(model: nn.Module, layers: Sequence[tuple[str, str]]) -> None:
    """Put convolutions and norms back where they were; what a bypass computed is lost."""
    for conv_name, norm_name in layers:
        bypass = model.get_submodule(conv_name)
        assert isinstance(bypass, Bypass)
        model.set_submodule(conv_name, bypass.conv)
        model.set_submodule(norm_name, bypass.norm)


def fold_bypass_(model: nn.Module, layers: Sequence[tuple[str, str]]) -> None:
    """Take shared bypasses out again: the convolution and the norm return to their places, the side in them.

    With s = gamma / sqrt(var + eps) and b = beta - s · mean of either norm, in evaluation mode

        norm(conv(x)) + side_norm(side(x)) = (s · W + s' · D) x + b + b'

    where D is the side's kernel written out. The convolution takes the new kernel, and the norm statistics
    under which it only adds b + b'.

    Args:
        model: changed in place.
        layers: as given to `add_bypass_`.
    """
    for conv_name, norm_name in layers:
        bypass = model.get_submodule(conv_name)
        assert isinstance(bypass, Bypass)
        assert bypass.form == "shared"
        conv, norm, side, side_norm = bypass.conv, bypass.norm, bypass.side, bypass.side_norm
        with torch.no_grad():
            scale, shift = affine(norm)
            side_scale, side_shift = affine(side_norm)
            bias = conv.bias.double() if conv.bias is not None else torch.zeros_like(scale)
            kernel = conv.weight.double() * scale.view(-1, 1, 1, 1)
            kernel += written_out(side, conv.kernel_size).double() * side_scale.view(-1, 1, 1, 1)
            total = shift + scale * bias + side_shift
            deviation = (norm.running_var.double() + norm.eps).sqrt()  # type: ignore[union-attr]
            norm.weight.copy_(deviation)
            norm.bias.copy_(total)
            norm.running_mean.zero_()  # type: ignore[union-attr]
            if conv.bias is not None:
                conv.bias.zero_()
            conv.weight.copy_(kernel)
        model.set_submodule(conv_name, conv)
        model.set_submodule(norm_name, norm)


def affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift of a batch norm in evaluation mode, (channels,), float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale, norm.bias.double() - scale * norm.running_mean.double()


def keeps_size(conv: nn.Conv2d) -> bool:
    """Whether the output is as large as the input, up to the stride, and the kernel has a tap for its centre."""
    if any(d > 1 and k % 2 == 0 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)):
        return False
    if isinstance(conv.padding, str):
        return conv.padding == "same" or max(conv.kernel_size) == 1
    return all(
        2 * p == d * (k - 1) for p, d, k in zip(conv.padding, conv.dilation, conv.kernel_size, strict=True)
    )


def written_out(conv: nn.Conv2d, size: Sequence[int]) -> Tensor:
    """The kernel of a grouped convolution as one over all inputs, (o, i, *size), with zeros where it has none."""
    out, each, *kernel = conv.weight.shape
    full = conv.weight.new_zeros(out, conv.in_channels, *kernel)
    per = out // conv.groups
    for group in range(conv.groups):
        rows, columns = slice(group * per, (group + 1) * per), slice(group * each, (group + 1) * each)
        full[rows, columns] = conv.weight[rows]
    (top, down), (left, right) = (((s - k) // 2, (s - k + 1) // 2) for s, k in zip(size, kernel, strict=True))
    return F.pad(full, (left, right, top, down))
