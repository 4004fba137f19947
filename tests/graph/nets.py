"""Small networks made of layers by name and a forward given as a function."""

import torch.nn.functional as F
from torch import Tensor, nn


class Net(nn.Module):
    """Layers and parameters by keyword, and a forward given as a function of (layers, x)."""

    def __init__(self, forward, **parts: nn.Module | nn.Parameter | Tensor) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, nn.Parameter):
                self.register_parameter(name, part)
            elif isinstance(part, Tensor):
                self.register_buffer(name, part)
            else:
                self.add_module(name, part)
        self._function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._function(self, x)


def conv(i: int, o: int, k: int = 1, **options) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, **options)


def patches(width: int) -> nn.Module:
    """(n, 3, 8, 8) to (n, 16, width) tokens."""
    return nn.Sequential(nn.Conv2d(3, width, 2, 2), nn.Flatten(2), Turn())


class Turn(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class Attention(nn.Module):
    """Attention in its usual spellings.

    Args:
        width: of the residual stream.
        heads: number of heads.
        dim: width of a head.
        fused: one layer makes queries, keys and values.
        written: softmax and matrix products written out instead of one operator.
        change: called with (self, queries, keys) of shape (n, heads, tokens, dim); returns them.
        bias: called with self; added to the map before its softmax.
    """

    def __init__(
        self, width: int, heads: int, dim: int, *, fused=True, written=False, change=None, bias=None, **parts
    ) -> None:
        super().__init__()
        self.heads, self.dim, self.written, self.change, self.bias = heads, dim, written, change, bias
        self.names = ["qkv"] if fused else ["q", "k", "v"]
        for name in self.names:
            self.add_module(name, nn.Linear(width, heads * dim * len(name)))
        self.proj = nn.Linear(heads * dim, width)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, _ = x.shape
        if len(self.names) == 1:
            q, k, v = self.qkv(x).reshape(n, tokens, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            made = [getattr(self, name)(x) for name in self.names]
            q, k, v = (y.view(n, tokens, self.heads, self.dim).transpose(1, 2) for y in made)
        if self.change is not None:
            q, k = self.change(self, q, k)
        added = None if self.bias is None else self.bias(self)
        if self.written:
            scores = (q * self.dim**-0.5) @ k.transpose(-2, -1)
            y = (scores if added is None else scores + added).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=added)
        return self.proj(y.transpose(1, 2).reshape(n, tokens, self.heads * self.dim))


def tokens(block: nn.Module, width: int = 8, **parts) -> Net:
    """Patches, a residual block, a mean over the tokens and a classifier."""
    return Net(
        lambda m, x: m.head((m.e(x) + m.a(m.e(x))).mean(1)),
        e=patches(width),
        a=block,
        head=nn.Linear(width, 4),
        **parts,
    )
