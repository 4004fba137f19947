"""Networks as people write them: small ones, each with one thing that pruning tools are reported to fail at.

Each case says in its docstring what is asked, builds the model and its example inputs, and names other inputs that the
pruned model must take. `benchmarks/cases.py` runs them.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

Inputs = Any
Made = tuple[nn.Module, Inputs]


@dataclass(frozen=True)
class Case:
    """One situation.

    Attributes:
        name: short.
        asked: what the user wants, in a sentence.
        make: model and example inputs.
        others: other inputs that the result must take.
        options: of `secateur.prune`, besides the budget.
        budget: share of the MACs that may stay.
        check: what else must hold: (pruned, inputs) -> what is wrong, or "".
        refused: part of the message, where a refusal is the right answer.
    """

    name: str
    asked: str
    make: Callable[[], Made]
    others: Sequence[Inputs] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    budget: Mapping[str, float] = field(default_factory=lambda: {"macs": 0.5})
    check: Callable[[Any, Inputs], str] | None = None
    refused: str = ""


CASES: list[Case] = []


def case(name: str, **about: Any) -> Callable[[Callable[[], Made]], Callable[[], Made]]:
    """Enter a case; the function's docstring is what is asked."""

    def enter(make: Callable[[], Made]) -> Callable[[], Made]:
        CASES.append(Case(name, " ".join((make.__doc__ or "").split()), make, **about))
        return make

    return enter


def images(n: int = 1, side: int = 16, wide: int | None = None, channels: int = 3) -> Tensor:
    return torch.randn(n, channels, side, wide or side, generator=torch.Generator().manual_seed(n + side))


def conv(i: int, o: int, k: int = 3, **more: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, k, padding=k // 2, bias=False, **more), nn.BatchNorm2d(o), nn.ReLU())


class Lambda(nn.Module):
    """A forward of its own around some named modules."""

    def __init__(self, forward: Callable[..., Any], **modules: Any) -> None:
        super().__init__()
        self._call = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(self, *args, **kwargs)


SIZES = (images(3), images(2, 24, 20))

# ---- wiring


@case("C2f block", others=SIZES)
def c2f() -> Made:
    """YOLOv8's block: a convolution, chunked in two, each new piece appended, all concatenated; nothing by hand."""

    class C2f(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cv1, self.cv2 = conv(16, 16, 1), conv(32, 16, 1)
            self.m = nn.ModuleList(conv(8, 8) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            y = list(self.cv1(x).chunk(2, 1))
            y.extend(m(y[-1]) for m in self.m)
            return self.cv2(torch.cat(y, 1))

    return nn.Sequential(conv(3, 16), C2f(), nn.Conv2d(16, 4, 1)), images()


@case("Focus stem", others=SIZES)
def focus() -> Made:
    """YOLOv5's first layer: four strided slices of the image, concatenated."""

    def forward(s: Any, x: Tensor) -> Tensor:
        x = torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)
        return s.head(s.body(x))

    return Lambda(forward, body=conv(12, 16), head=nn.Conv2d(16, 4, 1)), images()


@case("channel shuffle", others=SIZES)
def shuffle() -> Made:
    """A shuffle written with view, transpose and view, between two grouped convolutions."""

    def forward(s: Any, x: Tensor) -> Tensor:
        x = s.a(x)
        n, c, h, w = x.shape
        return s.head(s.b(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)))

    return Lambda(forward, a=conv(3, 16), b=conv(16, 16, groups=2), head=nn.Conv2d(16, 4, 1)), images()


@case("pixel shuffle", others=SIZES)
def pixel_shuffle() -> Made:
    """Super resolution: the channels of the last convolution become pixels; the picture must not change its colours."""
    return nn.Sequential(
        conv(3, 16), conv(16, 16), nn.Conv2d(16, 12, 3, padding=1), nn.PixelShuffle(2)
    ), images()


@case("U-Net with crops", others=SIZES)
def unet() -> Made:
    """An encoder and a decoder with skip concatenation, transposed convolution and interpolation to the skip's size."""

    def forward(s: Any, x: Tensor) -> Tensor:
        a = s.down1(x)
        b = s.down2(F.max_pool2d(a, 2))
        up = F.interpolate(s.up(b), size=a.shape[-2:], mode="bilinear", align_corners=False)
        return s.head(torch.cat([a, up], 1))

    return Lambda(
        forward,
        down1=conv(3, 8), down2=conv(8, 16), up=nn.ConvTranspose2d(16, 8, 2, 2), head=nn.Conv2d(16, 2, 1),
    ), images()  # fmt: skip


@case("two streams, one encoder", others=((images(3), images(3, 16)),))
def siamese() -> Made:
    """A siamese network: one encoder is called on two images and the features are compared."""

    def forward(s: Any, x: Tensor, y: Tensor) -> Tensor:
        a, b = s.encoder(x).mean((2, 3)), s.encoder(y).mean((2, 3))
        return s.head(torch.cat([(a - b).abs(), a * b], 1))

    return Lambda(forward, encoder=nn.Sequential(conv(3, 16), conv(16, 16)), head=nn.Linear(32, 2)), (
        images(), images(),
    )  # fmt: skip


@case("squeeze and excite by hand", others=SIZES)
def squeeze() -> Made:
    """A gate computed with view(b, c) and applied with view(b, c, 1, 1)."""

    def forward(s: Any, x: Tensor) -> Tensor:
        x = s.a(x)
        b, c, _, _ = x.size()
        gate = s.fc(F.adaptive_avg_pool2d(x, 1).view(b, c)).view(b, c, 1, 1)
        return s.head(x * gate)

    fc = nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 16), nn.Sigmoid())
    return Lambda(forward, a=conv(3, 16), fc=fc, head=nn.Conv2d(16, 4, 1)), images()


@case("Res2Net split", others=SIZES)
def res2net() -> Made:
    """A convolution's channels are split in four, each piece is added to the next, and all are concatenated."""

    def forward(s: Any, x: Tensor) -> Tensor:
        parts = torch.split(s.a(x), 4, 1)
        out = [parts[0]]
        for layer, part in zip(s.layers, parts[1:], strict=True):
            out.append(layer(part + out[-1]))
        return s.head(torch.cat(out, 1))

    return Lambda(
        forward, a=conv(3, 16), layers=nn.ModuleList(conv(4, 4) for _ in range(3)), head=nn.Conv2d(16, 4, 1)
    ), images()


@case("unequal split", others=SIZES)
def unequal() -> Made:
    """torch.split at [4, 12], the smaller part passes on as it is."""

    def forward(s: Any, x: Tensor) -> Tensor:
        a, b = torch.split(s.a(x), [4, 12], dim=1)
        return s.head(torch.cat([a, s.b(b)], 1))

    return Lambda(forward, a=conv(3, 16), b=conv(12, 12), head=nn.Conv2d(16, 4, 1)), images()


@case("gated unit", others=SIZES)
def gated() -> Made:
    """chunk(2) in two halves that are multiplied: NAFNet's simple gate."""

    def forward(s: Any, x: Tensor) -> Tensor:
        a, b = s.a(x).chunk(2, dim=1)
        return s.head(a * b)

    return Lambda(forward, a=nn.Conv2d(3, 32, 3, padding=1), head=nn.Conv2d(16, 3, 3, padding=1)), images()


@case("residual with padded shortcut", others=SIZES)
def padded() -> Made:
    """The shortcut takes every second pixel and pads channels with zeros by F.pad."""

    def forward(s: Any, x: Tensor) -> Tensor:
        x = s.stem(x)
        return s.head(F.relu(s.block(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))))

    return Lambda(
        forward,
        stem=conv(3, 8), block=nn.Conv2d(8, 16, 3, 2, 1), head=nn.Conv2d(16, 4, 1),
    ), images()  # fmt: skip


@case("flatten with pixels", others=(images(3),))
def flatten() -> Made:
    """VGG's classifier: the last feature map is flattened, pixels and all, into a linear layer."""
    return nn.Sequential(
        conv(3, 16), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 4)
    ), images()


@case("linear to image", others=(torch.randn(3, 8),))
def generator() -> Made:
    """A generator: a linear layer's outputs are viewed as (−1, 16, 4, 4) with the layer's own attribute."""

    def forward(s: Any, z: Tensor) -> Tensor:
        return s.out(F.relu(s.up(F.relu(s.fc(z)).view(-1, s.up.in_channels, 4, 4))))

    return Lambda(
        forward,
        fc=nn.Linear(8, 256),
        up=nn.ConvTranspose2d(16, 8, 4, 2, 1),
        out=nn.Conv2d(8, 3, 3, padding=1),
    ), torch.randn(1, 8)


@case("selective kernel", others=SIZES)
def selective() -> Made:
    """Branches are stacked, a softmax over the branches weighs them, and they are summed."""

    def forward(s: Any, x: Tensor) -> Tensor:
        x = s.stem(x)
        both = torch.stack([s.a(x), s.b(x)], 1)
        weights = s.fc(both.sum(1).mean((2, 3))).view(x.shape[0], 2, -1).softmax(1)
        return s.head((both * weights[..., None, None]).sum(1))

    return Lambda(
        forward,
        stem=conv(3, 8), a=conv(8, 16), b=conv(8, 16, 5), fc=nn.Linear(16, 32), head=nn.Conv2d(16, 4, 1),
    ), images()  # fmt: skip


@case("bilinear pooling", others=SIZES)
def bilinear() -> Made:
    """Second-order pooling: features times their transpose, flattened into a classifier."""

    def forward(s: Any, x: Tensor) -> Tensor:
        f = s.a(x).flatten(2)
        return s.fc((f @ f.transpose(1, 2) / f.shape[-1]).flatten(1))

    return Lambda(forward, a=nn.Sequential(conv(3, 8), conv(8, 8)), fc=nn.Linear(64, 4)), images()


@case("SegNet unpooling", others=SIZES)
def segnet() -> Made:
    """max_pool2d with indices and max_unpool2d with them."""

    def forward(s: Any, x: Tensor) -> Tensor:
        x = s.a(x)
        y, where = F.max_pool2d(x, 2, return_indices=True)
        return s.head(F.max_unpool2d(s.b(y), where, 2, output_size=x.shape[-2:]))

    return Lambda(forward, a=conv(3, 16), b=conv(16, 16), head=nn.Conv2d(16, 2, 1)), images()


@case("slice by a literal", others=SIZES)
def literal() -> Made:
    """forward writes the width out: x[:, :8] goes one way and x[:, 8:] the other."""

    def forward(s: Any, x: Tensor) -> Tensor:
        x = s.a(x)
        return s.head(torch.cat([s.b(x[:, :8]), x[:, 8:]], 1))

    return Lambda(forward, a=conv(3, 16), b=conv(8, 8), head=nn.Conv2d(16, 4, 1)), images()


@case("width kept as an attribute", others=SIZES)
def attribute() -> Made:
    """The block remembers its width and reshapes by it: view(b, self.heads, self.width // self.heads, …)."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width, self.heads = 16, 4
            self.a, self.b = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            b, _, h, w = x.shape
            y = self.a(x).view(b, self.heads, self.width // self.heads, h, w)
            return self.b((y * y.sigmoid()).view(b, self.width, h, w))

    return nn.Sequential(conv(3, 16), Block(), nn.Conv2d(16, 4, 1)), images()


@case("halves by view and unbind", others=(images(3),))
def halves() -> Made:
    """forward names its widths: view(n, 2, 16, h, w).unbind(1)."""
    return nn.Sequential(nn.Conv2d(3, 16, 3), Halves(), nn.Conv2d(16, 2, 1)), images()


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(16, 32, 1), nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        y, z = self.a(x).view(n, 2, 16, h, w).unbind(1)
        return self.b(y * z)


# ---- attention and tokens


def attention(x: Tensor, qkv: nn.Linear, out: nn.Linear, heads: int) -> Tensor:
    b, n, _ = x.shape
    q, k, v = qkv(x).reshape(b, n, 3, heads, -1).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
    return out((weights @ v).transpose(1, 2).reshape(b, n, -1))


@case("attention by hand", others=(torch.randn(3, 6, 16), torch.randn(2, 9, 16)))
def by_hand() -> Made:
    """Attention with a fused projection and the scale worked out from the width: heads go whole."""

    def forward(s: Any, x: Tensor) -> Tensor:
        return s.head(x + attention(s.norm(x), s.qkv, s.out, 4))

    return Lambda(
        forward, norm=nn.LayerNorm(16), qkv=nn.Linear(16, 48), out=nn.Linear(16, 16), head=nn.Linear(16, 2)
    ), torch.randn(1, 6, 16)


@case("torch's encoder layer", others=(torch.randn(3, 6, 8),))
def encoder() -> Made:
    """nn.TransformerEncoderLayer between two linear layers, with its default dropout."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    return nn.Sequential(nn.Linear(8, 32), layer, nn.Linear(32, 2)), torch.randn(1, 6, 8)


@case("torch's decoder", others=((torch.randn(3, 5, 16), torch.randn(3, 7, 16)),))
def decoder() -> Made:
    """nn.TransformerDecoderLayer, norm first, with cross attention to a memory."""

    def forward(s: Any, x: Tensor, memory: Tensor) -> Tensor:
        return s.head(s.layer(x, s.project(memory)))

    layer = nn.TransformerDecoderLayer(16, 4, 32, batch_first=True, norm_first=True)
    return Lambda(forward, project=nn.Linear(16, 16), layer=layer, head=nn.Linear(16, 2)), (
        torch.randn(1, 5, 16), torch.randn(1, 7, 16),
    )  # fmt: skip


@case("DETR in small", others=SIZES)
def detr() -> Made:
    """Convolutions, positions, an encoder, queries that are parameters, a decoder, and two heads in a dict."""

    class Detr(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.project = conv(3, 16, stride=2), nn.Conv2d(16, 16, 1)
            self.transformer = nn.Transformer(16, 4, 1, 1, 32, batch_first=True)
            self.queries = nn.Parameter(torch.randn(5, 16))
            self.classes, self.boxes = nn.Linear(16, 3), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            tokens = self.project(self.backbone(x)).flatten(2).transpose(1, 2)
            found = self.transformer(tokens, self.queries.expand(len(x), -1, -1))
            return {"logits": self.classes(found), "boxes": self.boxes(found).sigmoid()}

    return Detr(), images()


@case("class token and positions", others=(images(3),))
def vit() -> Made:
    """ViT's embedding: patches, a class token in front, a table of positions added."""

    class Vit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv2d(3, 16, 4, 4)
            self.token, self.table = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 17, 16))
            self.n1, self.n2 = nn.LayerNorm(16), nn.LayerNorm(16)
            self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
            self.mlp = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
            self.head = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.patch(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.table
            x = x + attention(self.n1(x), self.qkv, self.out, 4)
            return self.head((x + self.mlp(self.n2(x)))[:, 0])

    return Vit(), images()


@case("window attention", others=(images(3), images(2, 24, 16)))
def windows() -> Made:
    """Swin's window partition: view in six dims, attention inside windows, and back."""

    def forward(s: Any, x: Tensor) -> Tensor:
        x = s.stem(x).permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        y = x.view(b, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        y = attention(y, s.qkv, s.out, 2)
        y = y.view(b, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return s.head((x + y).mean((1, 2)))

    return Lambda(
        forward, stem=conv(3, 16), qkv=nn.Linear(16, 48), out=nn.Linear(16, 16), head=nn.Linear(16, 4)
    ), images()


@case("transposed attention", others=SIZES)
def restormer() -> Made:
    """Restormer's attention over channels, with a learned temperature per head, for images of any size."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads, self.temperature = 2, nn.Parameter(torch.ones(2, 1, 1))
            self.qkv, self.out = nn.Conv2d(16, 48, 1), nn.Conv2d(16, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            b, c, h, w = x.shape
            q, k, v = (t.reshape(b, self.heads, c // self.heads, h * w) for t in self.qkv(x).chunk(3, 1))
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            y = (q @ k.transpose(-2, -1) * self.temperature).softmax(-1) @ v
            return x + self.out(y.reshape(b, c, h, w))

    return nn.Sequential(conv(3, 16), Block(), nn.Conv2d(16, 3, 3, padding=1)), images()


@case("MLP over tokens", others=(images(3),))
def mixer() -> Made:
    """Mixer: a linear layer over positions between two over channels; positions stay, channels go."""

    def forward(s: Any, x: Tensor) -> Tensor:
        x = s.patch(x).flatten(2)
        x = (x + s.over(x)).transpose(1, 2)
        return s.head((x + s.mlp(x)).mean(1))

    mlp = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
    return Lambda(
        forward, patch=nn.Conv2d(3, 16, 4, 4), over=nn.Linear(16, 16), mlp=mlp, head=nn.Linear(16, 4)
    ), images()


@case("ConvNeXt block", others=SIZES)
def convnext() -> Made:
    """Depthwise convolution, a norm over channels written by hand, layer scale, and a residual."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dw, self.scale = nn.Conv2d(16, 16, 7, padding=3, groups=16), nn.Parameter(torch.rand(16))
            self.weight, self.bias = nn.Parameter(torch.rand(16)), nn.Parameter(torch.rand(16))
            self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

        def forward(self, x: Tensor) -> Tensor:
            y = self.dw(x)
            u = y.mean(1, keepdim=True)
            y = (y - u) / ((y - u).pow(2).mean(1, keepdim=True) + 1e-6).sqrt()
            y = (self.weight[:, None, None] * y + self.bias[:, None, None]).permute(0, 2, 3, 1)
            return x + (self.scale * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)

    return nn.Sequential(conv(3, 16), Block(), nn.Conv2d(16, 4, 1)), images()


# ---- norms


@case("group norm", others=SIZES)
def groups() -> Made:
    """GroupNorm with four groups between convolutions."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 4, 1)
    ), images()


@case("root mean square norm", others=(torch.randn(3, 6, 16),))
def rms() -> Made:
    """RMSNorm written by hand, as Llama's."""

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(32))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    return nn.Sequential(
        nn.Linear(16, 32), Norm(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 4)
    ), torch.randn(1, 6, 16)


@case("frozen batch norm", others=SIZES)
def frozen_norm() -> Made:
    """A batch norm whose four tensors are buffers, as detectors have it."""

    class Frozen(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            for name in ("weight", "bias", "running_mean", "running_var"):
                self.register_buffer(name, torch.rand(width) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            scale = self.weight * (self.running_var + 1e-5).rsqrt()
            return x * scale.reshape(1, -1, 1, 1) + (self.bias - self.running_mean * scale).reshape(
                1, -1, 1, 1
            )

    return nn.Sequential(
        nn.Conv2d(3, 16, 3), Frozen(16), nn.ReLU(), nn.Conv2d(16, 16, 3), Frozen(16), nn.Conv2d(16, 4, 1)
    ), images()


@case("weight norm, parametrised")
def weight_norm() -> Made:
    """parametrizations.weight_norm on a depthwise convolution: pruned, saved and loaded."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), parametrizations.weight_norm(nn.Conv2d(16, 16, 3, groups=16)),
        nn.ReLU(), nn.Conv2d(16, 2, 1),
    ), images()  # fmt: skip


@case("weight norm, by hooks")
def weight_norm_hooks() -> Made:
    """The older torch.nn.utils.weight_norm: pruned, run, saved and loaded."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = nn.utils.weight_norm(nn.Conv2d(3, 16, 3))
    return nn.Sequential(first, nn.ReLU(), nn.Conv2d(16, 2, 1)), images()


@case("spectral norm, parametrised")
def spectral_norm() -> Made:
    """parametrizations.spectral_norm on a convolution of a discriminator."""
    return nn.Sequential(
        parametrizations.spectral_norm(nn.Conv2d(3, 16, 3)), nn.LeakyReLU(0.2),
        parametrizations.spectral_norm(nn.Conv2d(16, 16, 3)), nn.LeakyReLU(0.2), nn.Conv2d(16, 1, 1),
    ), images()  # fmt: skip


# ---- inputs and outputs


@case(
    "class labels beside images",
    others=((images(4), torch.arange(4)), (images(2, 24, 20), torch.tensor([1, 1]))),
)
def conditional() -> Made:
    """An embedding of labels (n,) is added to the features; the result takes any batch."""

    def forward(s: Any, x: Tensor, label: Tensor) -> Tensor:
        return s.o(s.s(s.i(x) + s.e(label)[:, :, None, None]))

    return Lambda(
        forward, i=nn.Conv2d(3, 16, 3), e=nn.Embedding(10, 16), s=Halves(), o=nn.Conv2d(16, 2, 1)
    ), (images(3), torch.tensor([1, 2, 3]))


@case(
    "costs with labels",
    options={"freeze": ["f"]},
    budget={"macs": 0.8},
    others=((images(2, 6), torch.tensor([1, 2])),),
)
def labels_cost() -> Made:
    """One image and one label: layers over the labels are counted as torch counts them, and the budget is met."""

    def forward(s: Any, x: Tensor, label: Tensor) -> Tensor:
        y = s.g(s.f(s.e(label)).relu())[:, :, None, None]
        return s.o((s.i(x) + y).relu())

    return Lambda(
        forward,
        i=nn.Conv2d(3, 16, 3), e=nn.Embedding(10, 64), f=nn.Linear(64, 512), g=nn.Linear(512, 16),
        o=nn.Conv2d(16, 2, 1),
    ), (images(1, 6), torch.tensor([1]))  # fmt: skip


@case("time step of a diffusion model", others=((images(3), torch.tensor([0.1, 0.5, 0.9])),))
def diffusion() -> Made:
    """A scalar time per image becomes sines and cosines, then scale and shift of the features."""

    def forward(s: Any, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * torch.exp(-torch.arange(8, dtype=t.dtype, device=t.device))
        scale, shift = s.time(torch.cat([angles.sin(), angles.cos()], 1))[:, :, None, None].chunk(2, 1)
        return s.b(F.silu(s.a(x) * (1 + scale) + shift))

    return Lambda(
        forward,
        a=nn.Conv2d(3, 16, 3, padding=1), time=nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 32)),
        b=nn.Conv2d(16, 3, 3, padding=1),
    ), (images(), torch.tensor([0.3]))  # fmt: skip


@case("frames in the batch", others=(images(16),))
def frames() -> Made:
    """Temporal shift: eight frames of a clip are folded into the batch, and a part of the channels moves in time."""

    def forward(s: Any, x: Tensor) -> Tensor:
        x = s.a(x)
        nt, c, h, w = x.shape
        y = x.view(nt // 8, 8, c, h, w)
        out = torch.zeros_like(y)
        out[:, :-1, :4] = y[:, 1:, :4]
        out[:, 1:, 4:8] = y[:, :-1, 4:8]
        out[:, :, 8:] = y[:, :, 8:]
        return s.fc(s.b(out.view(nt, c, h, w)).mean((2, 3)))

    return Lambda(forward, a=conv(3, 16), b=conv(16, 16), fc=nn.Linear(16, 4)), images(8)


@case("dict in, dict out", others=({"image": images(3), "mask": images(3, channels=1)},))
def dicts() -> Made:
    """Inputs by keyword, outputs in a dict with None and nested lists."""

    def forward(s: Any, *, image: Tensor, mask: Tensor) -> dict[str, Any]:
        x = s.a(image * mask)
        return {"deep": [s.b(x), {"pooled": x.mean((2, 3))}], "loss": None}

    return Lambda(forward, a=nn.Sequential(conv(3, 16), conv(16, 16)), b=nn.Conv2d(16, 2, 1)), {
        "image": images(), "mask": images(channels=1),
    }  # fmt: skip


@dataclasses.dataclass
class Found:
    boxes: Tensor
    scores: Tensor


@case("dataclass out", others=SIZES)
def dataclasses_out() -> Made:
    """The model returns a dataclass."""

    def forward(s: Any, x: Tensor) -> Found:
        x = s.a(x)
        return Found(s.b(x), s.c(x))

    return Lambda(
        forward, a=nn.Sequential(conv(3, 16), conv(16, 16)), b=nn.Conv2d(16, 4, 1), c=nn.Conv2d(16, 1, 1)
    ), images()


@case("pyramid of features", others=SIZES)
def pyramid() -> Made:
    """A feature pyramid: a tuple of maps of three sizes comes out, for a detector's head."""

    def forward(s: Any, x: Tensor) -> tuple[Tensor, ...]:
        a = s.a(x)
        b = s.b(a)
        top = s.lateral_b(b)
        return s.lateral_a(a) + F.interpolate(top, scale_factor=2.0), top, F.max_pool2d(top, 1, 2)

    return Lambda(
        forward,
        a=conv(3, 16, stride=2), b=conv(16, 32, stride=2), lateral_a=nn.Conv2d(16, 8, 1), lateral_b=nn.Conv2d(32, 8, 1),
    ), images()  # fmt: skip


@case("sound", others=(torch.randn(3, 1, 64), torch.randn(2, 1, 80)))
def sound() -> Made:
    """One-dimensional convolutions over a waveform, with dilation and a residual."""

    def forward(s: Any, x: Tensor) -> Tensor:
        x = F.relu(s.a(x))
        return s.c(x + torch.tanh(s.b(x)))

    return Lambda(
        forward,
        a=nn.Conv1d(1, 16, 9, padding=4),
        b=nn.Conv1d(16, 16, 3, padding=2, dilation=2),
        c=nn.Conv1d(16, 1, 1),
    ), torch.randn(1, 1, 64)


@case("volumes", others=(torch.randn(2, 1, 8, 8, 8),))
def volumes() -> Made:
    """Three-dimensional convolutions for medical images, with instance norm."""
    return nn.Sequential(
        nn.Conv3d(1, 16, 3, padding=1), nn.InstanceNorm3d(16, affine=True), nn.ReLU(), nn.Conv3d(16, 16, 3, padding=1),
        nn.ReLU(), nn.Conv3d(16, 2, 1),
    ), torch.randn(1, 1, 8, 8, 8)  # fmt: skip


@case("text recognition", others=(images(3, 8, 32, 1), images(2, 8, 48, 1)))
def recognition() -> Made:
    """Convolutions, then a bidirectional LSTM over the width: the convolutions shrink, with the LSTM's input."""

    def forward(s: Any, x: Tensor) -> Tensor:
        x = s.conv(x).mean(2).permute(0, 2, 1)
        return s.fc(s.lstm(x)[0])

    lstm = nn.LSTM(32, 16, 2, batch_first=True, bidirectional=True)
    return Lambda(
        forward, conv=nn.Sequential(conv(1, 32), conv(32, 32)), lstm=lstm, fc=nn.Linear(32, 5)
    ), images(1, 8, 32, 1)


# ---- odd code


@case("backward impossible", others=(images(2, 8),))
def inplace_decode() -> Made:
    """The decoded output is changed in place, so that no gradient can flow; proven without a training step."""

    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.o(s.a(x).relu()).sigmoid()
        y *= 2
        return y

    return Lambda(forward, a=nn.Conv2d(3, 16, 3), o=nn.Conv2d(16, 8, 1)), images(1, 8)


@case("conversion that changes nothing", others=(images(3, 8),))
def conversion() -> Made:
    """x.to(x.device) between a layer and a split at a literal width."""

    class S(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(16, 16, 1), nn.Conv2d(8, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            y, z = self.a(x).to(x.device).split(8, 1)
            return self.b(y * z)

    return nn.Sequential(nn.Conv2d(3, 16, 3), S(), nn.ReLU(), nn.Conv2d(16, 2, 1)), images(1, 8)


@case("features kept on the module", others=SIZES, options={"method": "oneshot"})
def remembers() -> Made:
    """forward stores its features as an attribute, for a loss that is computed elsewhere."""

    def forward(s: Any, x: Tensor) -> Tensor:
        s.last = s.a(x)
        return s.b(s.last)

    model = Lambda(forward, a=nn.Sequential(conv(3, 16), conv(16, 16)), b=nn.Conv2d(16, 4, 1))
    model(images())
    return model, images()


@case("gradient checkpoints", others=SIZES)
def checkpoints() -> Made:
    """Blocks run under torch.utils.checkpoint while training."""

    def forward(s: Any, x: Tensor) -> Tensor:
        x = s.a(x)
        x = checkpoint(s.b, x, use_reentrant=False) if s.training else s.b(x)
        return s.c(x)

    return Lambda(forward, a=conv(3, 16), b=conv(16, 16), c=nn.Conv2d(16, 4, 1)), images()


@case("auxiliary head in training", others=SIZES)
def auxiliary() -> Made:
    """In training mode a second head returns a second output; it must follow the trunk."""

    def forward(s: Any, x: Tensor) -> Any:
        x = s.a(x)
        return (s.c(x), s.aux(x)) if s.training else s.c(x)

    return Lambda(
        forward, a=nn.Sequential(conv(3, 16), conv(16, 16)), c=nn.Conv2d(16, 4, 1), aux=nn.Conv2d(16, 4, 3)
    ), images()


@case("stochastic depth", others=SIZES)
def stochastic() -> Made:
    """While training, a block is left out by chance; the evaluated network is what is cut."""

    def forward(s: Any, x: Tensor) -> Tensor:
        x = s.a(x)
        if not s.training or torch.rand(()) < 0.8:
            x = x + s.b(x)
        return s.c(x)

    return Lambda(
        forward, a=conv(3, 16), b=nn.Sequential(conv(16, 32), conv(32, 16)), c=nn.Conv2d(16, 4, 1)
    ), images()


@case("shared layer", others=SIZES)
def shared() -> Made:
    """One convolution under two names, called three times."""
    middle = nn.Conv2d(16, 16, 3, padding=1)
    return nn.Sequential(
        conv(3, 16), middle, nn.ReLU(), middle, nn.ReLU(), middle, nn.Conv2d(16, 4, 1)
    ), images()


@case("tied weights", others=(torch.randint(20, (3, 6)),))
def tied() -> Made:
    """The output layer is the embedding's table."""

    def forward(s: Any, tokens: Tensor) -> Tensor:
        return F.linear(s.mlp(s.table(tokens)), s.table.weight)

    mlp = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
    return Lambda(forward, table=nn.Embedding(20, 16), mlp=mlp), torch.randint(20, (1, 6))


@case("parameters used as weights", others=SIZES)
def functional() -> Made:
    """F.conv2d with a bare parameter, no layer around it."""

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w2 = (
                nn.Parameter(torch.randn(16, 3, 3, 3) / 5),
                nn.Parameter(torch.randn(4, 16, 1, 1) / 4),
            )

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(F.relu(F.conv2d(x, self.w1, padding=1)), self.w2)

    return Bare(), images()


@case("computed kernel", budget={"params": 0.7}, others=((images(3, 8), torch.randn(3, 8)),))
def modulated() -> Made:
    """StyleGAN2's modulated convolution: a kernel per image, groups = batch."""

    class Modulated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.m = nn.Parameter(torch.randn(1, 16, 16, 3, 3) / 12), nn.Linear(8, 16)

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            b, c, h, w = x.shape
            k = (self.w * self.m(z).view(b, 1, c, 1, 1)).view(b * 16, c, 3, 3)
            return F.conv2d(x.reshape(1, b * c, h, w), k, padding=1, groups=b).view(b, 16, h, w)

    def forward(s: Any, x: Tensor, z: Tensor) -> Tensor:
        return s.o(s.c(s.i(x), z).relu())

    return Lambda(forward, i=nn.Conv2d(3, 16, 3, padding=1), c=Modulated(), o=nn.Conv2d(16, 3, 1)), (
        images(1, 8),
        torch.randn(1, 8),
    )


@case("mixture of kernels", others=SIZES)
def dynamic() -> Made:
    """Dynamic convolution: a softmax over four kernels, weighted by the image."""

    class Dynamic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernels, self.route = nn.Parameter(torch.randn(4, 16, 16, 3, 3) / 12), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            b, c, h, w = x.shape
            mix = self.route(x.mean((2, 3))).softmax(1)
            k = torch.einsum("bk,koihw->boihw", mix, self.kernels).reshape(b * 16, c, 3, 3)
            return F.conv2d(x.reshape(1, -1, h, w), k, padding=1, groups=b).view(b, 16, h, w)

    return nn.Sequential(conv(3, 16), Dynamic(), nn.ReLU(), nn.Conv2d(16, 4, 1)), images()


@case("custom autograd function", others=SIZES)
def custom() -> Made:
    """A straight-through sign between convolutions."""

    class Sign(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.sign()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad

    def forward(s: Any, x: Tensor) -> Tensor:
        return s.b(Sign.apply(s.a(x)))

    return Lambda(forward, a=conv(3, 16), b=nn.Conv2d(16, 4, 1)), images()


@case("grid sample", others=SIZES)
def transformer_net() -> Made:
    """A spatial transformer: features steer affine_grid and grid_sample."""

    def forward(s: Any, x: Tensor) -> Tensor:
        theta = s.fc(s.a(x).mean((2, 3))).view(-1, 2, 3)
        return s.b(
            F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)
        )

    return Lambda(
        forward, a=nn.Sequential(conv(3, 16), conv(16, 16)), fc=nn.Linear(16, 6),
        b=nn.Sequential(conv(3, 16), nn.Conv2d(16, 4, 1)),
    ), images()  # fmt: skip


@case("Fourier mixing", others=(torch.randn(3, 8, 16),))
def fourier() -> Made:
    """FNet: the Fourier transform over tokens and channels; channels under the transform stay, the MLP shrinks."""

    def forward(s: Any, x: Tensor) -> Tensor:
        x = x + torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real
        return s.head(x + s.mlp(x))

    mlp = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
    return Lambda(forward, mlp=mlp, head=nn.Linear(16, 4)), torch.randn(1, 8, 16)


@case("half precision", others=(images(3).bfloat16(),))
def half() -> Made:
    """A model in bfloat16."""
    return nn.Sequential(conv(3, 16), conv(16, 16), nn.Conv2d(16, 4, 1)).bfloat16(), images().bfloat16()


@case("forward names a precision", others=SIZES)
def mixed() -> Made:
    """forward computes its softmax in float32 whatever the model is."""

    def forward(s: Any, x: Tensor) -> Tensor:
        x = s.a(x)
        gate = s.g(x.mean((2, 3))).float().softmax(-1).type_as(x)
        return s.b(x * gate[:, :, None, None])

    return Lambda(forward, a=conv(3, 16), g=nn.Linear(16, 16), b=nn.Conv2d(16, 4, 1)), images()


@case("compiled model", options={"method": "oneshot"})
def compiled() -> Made:
    """A model that torch.compile has wrapped: unwrapped, not compiled again for each copy."""
    return torch.compile(nn.Sequential(conv(3, 16), nn.Conv2d(16, 4, 1))), images()


@case("frozen backbone", options={"freeze": ["backbone"]}, budget={"macs": 0.7}, others=SIZES)
def frozen() -> Made:
    """freeze='backbone' leaves that module alone, and the budget is met in the head."""
    return Lambda(
        lambda s, x: s.head(s.backbone(x)),
        backbone=conv(3, 8), head=nn.Sequential(conv(8, 32), conv(32, 32), nn.Conv2d(32, 4, 1)),
    ), images()  # fmt: skip


@case("out of reach", options={"freeze": ["0"]}, budget={"macs": 0.05}, refused="budget")
def out_of_reach() -> Made:
    """A budget below what is frozen is refused, with the largest frozen parts and their reasons."""
    return nn.Sequential(conv(3, 16), conv(16, 16), nn.Conv2d(16, 4, 1)), images()


@case("branch on values", refused="depends on tensor values")
def branches() -> Made:
    """if x.mean() > 0: a program cannot follow both ways; the module is named."""

    def forward(s: Any, x: Tensor) -> Tensor:
        x = s.a(x)
        return s.b(x if x.mean() > 0 else -x)

    return Lambda(forward, a=conv(3, 16), b=nn.Conv2d(16, 4, 1)), images()


# ---- life afterwards


def hooks_fire(pruned: Any, inputs: Inputs) -> str:
    heard = []
    for name, module in pruned.model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *_, name=name: heard.append(name))
    pruned.model(inputs)
    expected = {n for n, m in pruned.model.named_modules() if isinstance(m, nn.Conv2d)}
    return "" if {*heard} == expected else f"hooks on {', '.join(sorted(expected - {*heard}))} do not fire"


@case("hooks after rewriting", check=hooks_fire)
def hooked() -> Made:
    """Hooks on layers inside a module whose forward had to be rewritten still fire."""
    return nn.Sequential(nn.Conv2d(3, 16, 3), Halves(), nn.Conv2d(16, 2, 1)), images()


class Adapted(nn.Module):
    """A layer with a low-rank update beside it, as LoRA does it."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Conv2d(layer.in_channels, 1, 1)
        self.up = nn.Conv2d(1, layer.out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


def adapters_act(pruned: Any, inputs: Inputs) -> str:
    model = pruned.model.eval()
    before = model(inputs)
    model[1].a = Adapted(model[1].a)
    return "the adapter has no effect" if torch.equal(before, model(inputs)) else ""


@case("adapter on an inner layer", check=adapters_act)
def adapted() -> Made:
    """Wrapping a layer inside a rewritten module takes effect."""
    return nn.Sequential(nn.Conv2d(3, 16, 3), Halves(), nn.Conv2d(16, 2, 1)), images()


def quantises(pruned: Any, inputs: Inputs) -> str:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = torch.ao.quantization.quantize_dynamic(pruned.model.eval(), {nn.Linear})
        found = small(inputs)
    error = (found - pruned.model(inputs)).abs().max() / found.abs().max()
    return "" if 0 < error < 0.2 else f"relative difference of {error:.2g} to the model before"


@case("int8 afterwards", check=quantises)
def quantised() -> Made:
    """Dynamic quantisation of a pruned attention block changes its linear layers, also where forward was rewritten."""
    return by_hand()


def compiles(pruned: Any, inputs: Inputs) -> str:
    model = pruned.model.eval()
    found = torch.compile(model, fullgraph=True, backend="eager")(inputs)
    return "" if torch.allclose(found, model(inputs), atol=1e-5) else "the compiled model differs"


@case("compiled afterwards", check=compiles)
def compiled_after() -> Made:
    """torch.compile(fullgraph=True) of the pruned model."""
    return nn.Sequential(nn.Conv2d(3, 16, 3), Halves(), nn.Conv2d(16, 2, 1)), images()


def twice(pruned: Any, inputs: Inputs) -> str:
    import secateur as sc

    again = sc.prune(pruned.model, inputs, budget=sc.Budget(macs=0.6), method="oneshot")
    return "" if again.proof and again.proof.ok else "the second cut is not equal"


@case("pruned again", check=twice)
def again() -> Made:
    """A pruned model with a rewritten forward is pruned once more."""
    return nn.Sequential(nn.Conv2d(3, 16, 3), Halves(), nn.Conv2d(16, 2, 1)), images()


def exports(pruned: Any, inputs: Inputs) -> str:
    import tempfile
    from pathlib import Path

    from secateur.export import export_onnx

    with tempfile.TemporaryDirectory() as folder:
        check = export_onnx(pruned.model, inputs, Path(folder) / "model.onnx")
    return "" if check.max_rel_error < 1e-3 else f"the file differs by {check.max_rel_error:.2g}"


@case("ONNX afterwards", check=exports)
def exported() -> Made:
    """The pruned model as an ONNX file that answers the same."""
    return c2f()


def multiples(pruned: Any, inputs: Inputs) -> str:
    widths = [m.out_channels for m in pruned.model[:-1].modules() if isinstance(m, nn.Conv2d)]
    return "" if all(width % 8 == 0 for width in widths) else f"widths {widths}"


@case("multiples of 8", options={"method": "oneshot", "round_to": 8}, check=multiples)
def rounded() -> Made:
    """All widths are multiples of 8, and the budget is still met."""
    return nn.Sequential(conv(3, 32), conv(32, 64), conv(64, 64), nn.Conv2d(64, 4, 1)), images()


def keeps_optimizing(pruned: Any, inputs: Inputs) -> str:
    model = pruned.model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        loss = model(torch.cat([inputs, inputs + 1])).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return "" if losses[-1] < losses[0] and all(map(math.isfinite, losses)) else f"losses {losses}"


@case("trained on", check=keeps_optimizing)
def trained_on() -> Made:
    """The pruned model trains on, batch norms included."""
    return nn.Sequential(conv(3, 16), Block2(), nn.Conv2d(16, 4, 1)), images()


class Block2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(16, 32), conv(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.a(x))
