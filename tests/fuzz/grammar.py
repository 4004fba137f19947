"""A grammar of small networks: a recipe is a list of blocks, and every block fits behind every other.

Blocks take and return images (n, c, h, w) of any width; token blocks flatten the image and restore it. What a
block looks like inside is drawn from its own seed, so that blocks can be left out without changing the others.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIZE = 8
"""Height and width of the images."""

CLASSES = 3


@dataclass(frozen=True)
class Block:
    """One production of the grammar: which kind, and the seed of its details."""

    kind: str
    seed: int


@dataclass(frozen=True)
class Recipe:
    """Everything a network is made from."""

    width: int
    blocks: tuple[Block, ...]
    tail: Block


class Fuzzed(nn.Module):
    """A stem, the blocks of a recipe and a tail."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, recipe.width, 3, padding=1)
        channels = recipe.width
        self.blocks = nn.ModuleList()
        for block in recipe.blocks:
            self.blocks.append(BLOCKS[block.kind](channels, random.Random(block.seed)))
            channels = self.blocks[-1].channels
        self.tail = TAILS[recipe.tail.kind](channels, random.Random(recipe.tail.seed))

    def forward(self, x: Tensor) -> object:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.tail(x)


def draw(seed: int) -> Recipe:
    """The recipe of a seed: a width, one to five blocks, a tail."""
    rng = random.Random(seed)
    kinds = [rng.choice(list(BLOCKS)) for _ in range(rng.randint(1, 5))]
    blocks = tuple(Block(kind, rng.randrange(10**6)) for kind in kinds)
    return Recipe(rng.choice((8, 12, 16)), blocks, Block(rng.choice(list(TAILS)), rng.randrange(10**6)))


def build(recipe: Recipe) -> nn.Module:
    """The network of a recipe in float64 and evaluation mode, with no parameter that hides an error."""
    torch.manual_seed(0)
    model = Fuzzed(recipe).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if tensor.is_floating_point() and tensor.ndim < 2:
                positive = name.endswith(("weight", "running_var"))
                tensor.copy_(1 + 0.5 * noise.tanh() if positive else 0.3 * noise)
    return model


def shrink(recipe: Recipe, fails: Callable[[Recipe], bool]) -> Recipe:
    """The recipe without every block, and as narrow as possible, that is not needed for the failure."""
    smaller = True
    while smaller:
        smaller = False
        blocks = recipe.blocks
        candidates = [
            Recipe(recipe.width, blocks[:i] + blocks[i + 1 :], recipe.tail) for i in range(len(blocks))
        ]
        if recipe.tail.kind != "pool":
            candidates.append(Recipe(recipe.width, blocks, Block("pool", 0)))
        if recipe.width > 8:
            candidates.append(Recipe(8, blocks, recipe.tail))
        for candidate in candidates:
            if fails(candidate):
                recipe, smaller = candidate, True
                break
    return recipe


class Piece(nn.Module):
    """A block; `channels` is the width it returns."""

    channels: int


BLOCKS: dict[str, Callable[[int, random.Random], Piece]] = {}
TAILS: dict[str, Callable[[int, random.Random], nn.Module]] = {}


def block(cls: type[Piece]) -> type[Piece]:
    BLOCKS[cls.__name__] = cls
    return cls


def norm(channels: int, rng: random.Random) -> nn.Module:
    groups = rng.choice([g for g in (1, 2, 4) if channels % g == 0])
    return rng.choice(
        [nn.BatchNorm2d(channels), nn.GroupNorm(groups, channels), ChannelNorm(channels), nn.Identity()]
    )


def activation(rng: random.Random) -> nn.Module:
    return rng.choice([nn.ReLU(), nn.GELU(), nn.Hardswish(), nn.ReLU(inplace=True), nn.SiLU()])


def unit(into: int, out: int, rng: random.Random) -> nn.Sequential:
    """Convolution, norm, activation."""
    kernel = rng.choice((1, 3))
    conv = nn.Conv2d(into, out, kernel, padding=kernel // 2, bias=rng.random() < 0.5)
    return nn.Sequential(conv, norm(out, rng), activation(rng))


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of an image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@block
class Plain(Piece):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__()
        self.channels = rng.choice((8, 12, 16))
        self.unit = unit(channels, self.channels, rng)

    def forward(self, x: Tensor) -> Tensor:
        return self.unit(x)


@block
class Residual(Piece):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__()
        self.channels, hidden = channels, rng.choice((4, 8))
        self.body = nn.Sequential(unit(channels, hidden, rng), unit(hidden, channels, rng))
        self.scale = nn.Parameter(torch.ones(channels, 1, 1)) if rng.random() < 0.4 else 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.body(x)


@block
class Dense(Piece):
    """DenseNet: what is new is appended."""

    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__()
        growth = rng.choice((4, 6))
        self.channels, self.first = channels + growth, rng.random() < 0.5
        self.unit = unit(channels, growth, rng)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.unit(x)] if self.first else [self.unit(x), x], 1)


@block
class Halves(Piece):
    """ShuffleNet, C2f: one half goes through a branch."""

    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__()
        self.channels, self.half = channels, channels // 2
        self.how = rng.choice(("chunk", "split", "slice", "uneven"))
        self.keep = channels // 4 if self.how == "uneven" else channels - self.half
        self.branch = unit(channels - self.keep, channels - self.keep, rng)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "chunk" and self.channels % 2 == 0:
            a, b = x.chunk(2, dim=1)
        elif self.how == "slice":
            a, b = x[:, : self.keep], x[:, self.keep :]
        else:
            a, b = x.split([self.keep, self.channels - self.keep], dim=1)
        return torch.cat([a, self.branch(b)], 1)


@block
class Shuffle(Piece):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__()
        self.channels = channels
        self.groups = rng.choice([g for g in (2, 3, 4) if channels % g == 0] or [1])

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)


@block
class SqueezeExcite(Piece):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__()
        self.channels, self.linear = channels, rng.random() < 0.5
        make = nn.Linear if self.linear else lambda a, b: nn.Conv2d(a, b, 1)
        self.down, self.up = make(channels, 4), make(4, channels)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3), keepdim=not self.linear)
        gate = self.up(self.down(pooled).relu()).sigmoid()
        return x * (gate[:, :, None, None] if self.linear else gate)


@block
class SpatialGate(Piece):
    """A (n, 1, h, w) mask, which ties no channels."""

    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__()
        self.channels = channels
        self.gate = nn.Conv2d(channels, 1, rng.choice((1, 3)), padding="same")

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x).sigmoid()


@block
class Grouped(Piece):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__()
        groups = rng.choice([g for g in (2, 4) if channels % g == 0] or [1])
        self.channels = groups * rng.choice((2, 4, 5))
        self.conv = nn.Conv2d(channels, self.channels, 3, padding=1, groups=groups)
        self.norm = norm(self.channels, rng)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()


@block
class Inverted(Piece):
    """MobileNetV2: expand, depthwise, project; a depthwise multiplier now and then."""

    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__()
        self.channels, hidden, times = channels, rng.choice((8, 12)), rng.choice((1, 1, 2))
        self.expand = unit(channels, hidden, rng)
        self.depthwise = nn.Conv2d(hidden, hidden * times, 3, padding=1, groups=hidden)
        self.project = nn.Conv2d(hidden * times, channels, 1)
        self.skip = rng.random() < 0.7

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(F.relu6(self.depthwise(self.expand(x))))
        return x + y if self.skip else y


@block
class Ghost(Piece):
    """Cheap features made of others, both concatenated and cropped."""

    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__()
        self.channels, first = rng.choice((10, 15)), 8
        self.primary, self.cheap = (
            unit(channels, first, rng),
            nn.Conv2d(first, first, 3, padding=1, groups=first),
        )

    def forward(self, x: Tensor) -> Tensor:
        a = self.primary(x)
        return torch.cat([a, self.cheap(a)], 1)[:, : self.channels]


@block
class Selective(Piece):
    """SKNet: two branches, weighted by a softmax over branches."""

    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__()
        self.channels = channels
        self.branches = nn.ModuleList([unit(channels, channels, rng) for _ in range(2)])
        self.attend = nn.Conv2d(channels, 2 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        paths = torch.stack([branch(x) for branch in self.branches], 1)
        logits = self.attend(paths.sum(1).mean((2, 3), keepdim=True))
        n, _, h, w = logits.shape
        return (paths * logits.view(n, 2, -1, h, w).softmax(1)).sum(1)


@block
class Resample(Piece):
    """Changes of resolution and back: pooling, transposed convolution, pixel shuffle, interpolation."""

    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__()
        self.how = rng.choice(("pool", "transposed", "pixels", "patches", "interpolate"))
        self.channels = channels if self.how in ("pool", "interpolate") else rng.choice((4, 8))
        into, out = channels, self.channels
        if self.how == "transposed":
            self.conv = nn.ConvTranspose2d(into, out, 2, stride=2)
        elif self.how == "pixels":
            self.conv = nn.Conv2d(into, out * 4, 1)
        elif self.how == "patches":
            self.conv = nn.Conv2d(into * 4, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "pool":
            return F.interpolate(F.max_pool2d(x, 2), scale_factor=2)
        if self.how == "interpolate":
            return F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
        if self.how == "transposed":
            return F.avg_pool2d(self.conv(x), 2)
        if self.how == "pixels":
            return F.pixel_shuffle(self.conv(x), 2)[:, :, ::2, ::2]
        return F.interpolate(self.conv(F.pixel_unshuffle(x, 2)), scale_factor=2)


@block
class Merging(Piece):
    """Swin: the four neighbours of a pixel become channels, by strided slices, then norm and linear."""

    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__()
        self.channels = rng.choice((8, 12))
        self.norm = nn.LayerNorm(4 * channels)
        self.reduce = nn.Linear(4 * channels, self.channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return F.interpolate(self.reduce(self.norm(x)).permute(0, 3, 1, 2), scale_factor=2)


@block
class Regroup(Piece):
    """A chain of reshapes that returns to the channels it came from."""

    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__()
        self.channels, self.conv = channels, nn.Conv2d(channels, channels, 1)
        self.how = rng.choice(("tokens", "halves", "expand") if channels % 2 == 0 else ("tokens", "expand"))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = self.conv(x)
        if self.how == "tokens":
            return y.flatten(2).transpose(1, 2).reshape(n, h, w, c).permute(0, 3, 1, 2)
        if self.how == "halves":
            return y.reshape(n, 2, c // 2, h * w).flatten(1, 2).unflatten(2, (h, w))
        return y.unsqueeze(1).expand(-1, 2, -1, -1, -1).mean(1) + x


@block
class Twice(Piece):
    """One module called twice."""

    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__()
        self.channels, self.unit = channels, unit(channels, channels, rng)

    def forward(self, x: Tensor) -> Tensor:
        return self.unit(self.unit(x))


@block
class Tied(Piece):
    """Two modules with one weight."""

    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__()
        self.channels = channels
        self.a, self.b = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1, bias=False)
        self.b.weight = self.a.weight
        self.chained = rng.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu()) if self.chained else self.a(x) + self.b(x.relu())


@block
class Gated(Piece):
    """A gated unit: one linear layer, its halves multiplied."""

    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__()
        self.channels, hidden = channels, rng.choice((6, 10))
        self.up, self.down = nn.Conv2d(channels, 2 * hidden, 1), nn.Conv2d(hidden, channels, 1)
        self.prelu = nn.PReLU(hidden)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up(x).chunk(2, 1)
        return x + self.down(self.prelu(a) * b)


class Tokens(Piece):
    """Runs `mix` on (n, tokens, channels), with a norm before and the sum after."""

    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__()
        self.channels = channels
        self.norm = rng.choice([nn.LayerNorm(channels), nn.RMSNorm(channels)])

    def mix(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.mix(self.norm(tokens))
        return tokens.transpose(1, 2).reshape(x.shape)


@block
class Mlp(Tokens):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels, rng)
        hidden = rng.choice((8, 12))
        self.up, self.down = nn.Linear(channels, hidden), nn.Linear(hidden, channels)

    def mix(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


@block
class MixedTokens(Tokens):
    """Mixer: a linear layer over the tokens."""

    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels, rng)
        self.up, self.down = nn.Linear(SIZE * SIZE, 6), nn.Linear(6, SIZE * SIZE)

    def mix(self, x: Tensor) -> Tensor:
        return self.down(self.up(x.transpose(1, 2)).relu()).transpose(1, 2)


@block
class Attention(Tokens):
    """Self-attention: fused or separate projections, heads by reshape or chunk, library or handwritten."""

    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels, rng)
        self.heads, self.width = rng.choice((1, 2, 3)), rng.choice((2, 4))
        self.fused, self.library = rng.random() < 0.6, rng.random() < 0.5
        inner = self.heads * self.width
        self.qkv = nn.Linear(channels, 3 * inner) if self.fused else None
        self.parts = nn.ModuleList([] if self.fused else [nn.Linear(channels, inner) for _ in range(3)])
        self.project = nn.Linear(inner, channels)
        self.bias = nn.Parameter(torch.randn(self.heads, 1, SIZE * SIZE)) if rng.random() < 0.4 else None
        self.derived = rng.random() < 0.5  # sizes and scale worked out from the tensors at hand

    def mix(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        width = -1 if self.derived else self.width
        if self.qkv is not None:
            q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, width).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (part(x).view(n, t, self.heads, width).transpose(1, 2) for part in self.parts)
        if self.library:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        else:
            scores = q @ k.transpose(-2, -1) * (q.shape[-1] if self.derived else self.width) ** -0.5
            y = (scores if self.bias is None else scores + self.bias).softmax(-1) @ v
        return self.project(y.transpose(1, 2).flatten(2))


@block
class StockAttention(Tokens):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels, rng)
        heads = rng.choice([h for h in (2, 3, 5) if channels % h == 0] or [1])
        self.attention = nn.MultiheadAttention(channels, heads, batch_first=True)

    def mix(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


@block
class Window(Piece):
    """Swin: attention in shifted windows with a table of relative positions, one column per head."""

    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__()
        self.channels, self.heads, self.side = channels, rng.choice((1, 2)), rng.choice((2, 4))
        self.shift = rng.choice((0, 1))
        self.norm = nn.LayerNorm(channels)
        self.qkv, self.project = nn.Linear(channels, 3 * 4 * self.heads), nn.Linear(4 * self.heads, channels)
        span = 2 * self.side - 1
        self.table = nn.Parameter(torch.randn(span * span, self.heads))
        place = torch.cartesian_prod(torch.arange(self.side), torch.arange(self.side))
        offset = place[:, None] - place[None] + self.side - 1
        self.register_buffer("index", offset[..., 0] * span + offset[..., 1])

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        s, count = self.side, self.side * self.side
        y = torch.roll(self.norm(x.permute(0, 2, 3, 1)), (-self.shift, -self.shift), (1, 2))
        y = y.view(n, h // s, s, w // s, s, c).transpose(2, 3).reshape(-1, count, c)
        q, k, v = self.qkv(y).view(len(y), count, 3, self.heads, 4).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index.view(-1)].view(count, count, self.heads).permute(2, 0, 1)
        y = (
            ((q @ k.transpose(-2, -1) * 0.5 + bias).softmax(-1) @ v)
            .transpose(1, 2)
            .reshape(len(y), count, -1)
        )
        y = self.project(y).view(n, h // s, w // s, s, s, c).transpose(2, 3).reshape(n, h, w, c)
        return x + torch.roll(y, (self.shift, self.shift), (1, 2)).permute(0, 3, 1, 2)


@block
class Unfolded(Piece):
    """A convolution spelled out: neighbourhoods become channels, and a matrix mixes them."""

    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__()
        self.channels = rng.choice((4, 8))
        self.weight = nn.Linear(channels * 9, self.channels)

    def forward(self, x: Tensor) -> Tensor:
        columns = F.unfold(x, 3, padding=1).transpose(1, 2)
        return self.weight(columns).transpose(1, 2).unflatten(2, x.shape[2:]).relu()


@block
class CrossCovariance(Tokens):
    """XCiT: attention between channels, by einsum."""

    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__(channels, rng)
        self.heads, self.width = 2, 4
        self.qkv = nn.Linear(channels, 3 * 8, bias=False)
        self.project = nn.Linear(8, channels)
        self.temperature = nn.Parameter(torch.ones(2, 1, 1))

    def mix(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, 2, 4).unbind(2)
        scores = torch.einsum("nthd,nthe->nhde", q.softmax(1), k) * self.temperature
        return self.project(torch.einsum("nhde,nthe->nthd", scores, v).flatten(2))


class PoolTail(nn.Module):
    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__()
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> object:
        return self.head(x.mean((2, 3)))


class FlatTail(nn.Module):
    """VGG: every pixel of every channel is a feature."""

    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(channels * 16, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> object:
        return self.head(self.hidden(F.adaptive_avg_pool2d(x, 4).flatten(1)).relu())


class TokenTail(nn.Module):
    """ViT: a class token, position embeddings, and a norm."""

    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, channels))
        self.position = nn.Parameter(torch.randn(1, SIZE * SIZE + 1, channels))
        self.mlp = Mlp(channels, rng)
        self.norm, self.head = nn.LayerNorm(channels), nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> object:
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        x = x + self.mlp.mix(self.mlp.norm(x))
        return self.head(self.norm(x)[:, 0])


class TwoHeads(nn.Module):
    """A classifier and a map, as a dict."""

    def __init__(self, channels: int, rng: random.Random) -> None:
        super().__init__()
        self.label, self.map = nn.Linear(channels, CLASSES), nn.Conv2d(channels, 2, 1)

    def forward(self, x: Tensor) -> object:
        return {"label": self.label(x.mean((2, 3))), "map": self.map(x)}


TAILS |= {"pool": PoolTail, "flat": FlatTail, "token": TokenTail, "two": TwoHeads}
