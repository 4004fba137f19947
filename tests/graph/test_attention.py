"""Attention in every spelling: heads by default, the same dims of every head on request."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from secateur.graph import Graph
from secateur.proof.verify import randomise_
from tests.graph.nets import Attention, Net, conv, patches, tokens
from tests.oracles import counted_macs, random_masks, tensors_of, without_units

INPUT = torch.randn(1, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.xdist_group("attention")  # one process analyses each network
POSITIONS = torch.randint(7, (16, 16), generator=torch.Generator().manual_seed(0))


def rotate(x: Tensor) -> Tensor:
    """Every pair of dims turned by an angle that depends on the token."""
    angle = torch.arange(16.0, dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.1], dtype=x.dtype)
    angle = angle.repeat_interleave(2, 1)
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
    return x * angle.cos() + turned * angle.sin()


class ChannelAttention(nn.Module):
    """A map of dims by dims in every head, as in XCiT."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 36), nn.Linear(12, 8)
        self.temperature = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        n, count, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, count, 3, 3, 4).permute(2, 0, 3, 4, 1).unbind(0)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        y = ((q @ k.transpose(-2, -1)) * self.temperature).softmax(-1) @ v
        return self.proj(y.permute(0, 3, 1, 2).reshape(n, count, 12))


class Stock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, need_weights=False)[0]


class SharedKey(nn.Module):
    """Several heads of queries, one of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(8, o) for o in (12, 4, 5, 8))
        self.proj = nn.Linear(15, 8)

    def forward(self, x: Tensor) -> Tensor:
        n, count, _ = x.shape
        q = self.q(x).view(n, count, 3, 4).transpose(1, 2)
        scores = q @ self.k(x)[:, None].transpose(-2, -1)
        y = (scores * 0.5).softmax(-1) @ self.v(x)[:, None]
        return self.proj(y.transpose(1, 2).reshape(n, count, 15))


def windows(module: nn.Module, x: Tensor) -> Tensor:
    """Shifted windows of 2 × 2 on a map of 4 × 4, with a mask per window."""
    n, count, c = x.shape
    x = x.view(n, 4, 4, c).roll((-1, -1), (1, 2))
    x = x.view(n, 2, 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
    x = module.inner(x).view(n, 2, 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(n, 4, 4, c)
    return x.roll((1, 1), (1, 2)).view(n, count, c)


def masked(module: Attention, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The windows of each image are folded into the batch; only the map knows which is which."""
    return q * module.mask.repeat(len(q) // 4, 1)[:, None, :, None], k


SPELLINGS = {
    "fused": lambda: Attention(8, 3, 4),
    "fused, written out": lambda: Attention(8, 3, 4, written=True),
    "separate": lambda: Attention(8, 3, 4, fused=False),
    "separate, written out": lambda: Attention(8, 3, 4, fused=False, written=True),
}
HEADS = {
    # name: (block, {group: units} of attention by heads, the same by dims)
    **{name: (make, None, None) for name, make in SPELLINGS.items()},
    "stock": (Stock, {"a.attn": 4}, {"a.attn": 2}),
    "bias per head": (
        lambda: Attention(
            8, 3, 4, table=nn.Parameter(torch.randn(7, 3)), bias=lambda m: m.table[POSITIONS].permute(2, 0, 1)[None]
        ),
        {"a.qkv": 3}, {"a.qkv": 4},
    ),
    "normed queries and keys": (
        lambda: Attention(8, 3, 4, norm=nn.LayerNorm(4), change=lambda m, q, k: (m.norm(q), m.norm(k))),
        {"a.qkv": 3}, {"a.qkv": 4},
    ),
    "rotary": (
        lambda: Attention(8, 3, 4, fused=False, change=lambda m, q, k: (rotate(q), rotate(k))),
        {"a.q": 3}, {"a.v": 4},
    ),
    "scale per head": (
        lambda: Attention(
            8, 3, 4, gain=nn.Parameter(torch.randn(3, 1, 1)),
            change=lambda m, q, k: (F.normalize(q, dim=-1) * m.gain.clamp(max=2.0).exp(), F.normalize(k, dim=-1)),
        ),
        {"a.qkv": 3}, {"a.qkv": 4},
    ),
    "windows": (
        lambda: Net(windows, inner=Attention(8, 3, 4, mask=torch.rand(4, 4).double(), change=masked)),
        {"a.inner.qkv": 3}, {"a.inner.qkv": 4},
    ),
    "dims by dims": (ChannelAttention, {"a.qkv": 3}, {"a.qkv": 4}),
    "one key for all heads": (SharedKey, {"a.q": 3}, {"a.q": 4, "a.v": 5}),
}  # fmt: skip


@functools.cache
def analysed(name: str, attention: str) -> tuple[nn.Module, Graph]:
    """A network that tests only read."""
    model = network(name)
    return model, sc.analyze(model, INPUT, attention=attention)


def units(graph: Graph) -> dict[str, int]:
    """{group: units}, without the residual stream."""
    groups = {group.name: group.units for group in graph.groups}
    assert groups.pop("e.0") == 8
    return groups


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise_(tokens(HEADS[name][0]()), 0).double().eval()


@pytest.mark.parametrize("name", HEADS)
def test_units_of_attention(name: str) -> None:
    _, heads, dims = HEADS[name]
    fused = not name.startswith("separate")
    heads = heads or {"a.qkv" if fused else "a.q": 3}
    dims = dims or ({"a.qkv": 4} if fused else {"a.q": 4, "a.v": 4})
    assert units(analysed(name, "heads")[1]) == heads
    assert units(analysed(name, "dims")[1]) == dims


@pytest.mark.parametrize("attention", ["heads", "dims"])
@pytest.mark.parametrize("name", HEADS)
def test_cut_equals_absent_units(name: str, attention: str) -> None:
    model, graph = analysed(name, attention)
    assert sc.Cost(graph).macs() == counted_macs(model, INPUT)
    for seed in range(2):
        plan = sc.Plan.of(graph, random_masks(graph, seed))
        cut = sc.cut_(copy.deepcopy(model), graph, plan)
        expected = reference(name, attention, model, graph, plan)
        with torch.no_grad():
            torch.testing.assert_close(tensors_of(cut(INPUT)), expected, rtol=1e-10, atol=1e-10)
        assert sc.Cost(graph).macs(plan.kept(graph)) == counted_macs(cut, INPUT)


def reference(name: str, attention: str, model: nn.Module, graph: Graph, plan: sc.Plan) -> list[Tensor]:
    if name == "dims by dims" and attention == "dims":
        pytest.skip("its softmax runs over dims, which the oracle does not know")
    return without_units(model, graph, plan, INPUT)


def test_a_removed_head_is_gone_everywhere() -> None:
    _, graph = analysed("bias per head", "heads")
    head = next(group for group in graph.groups if group.name == "a.qkv")
    where = {(member.tensor, member.dim): member.index[1].tolist() for member in head.members}
    rows = [12 * part + 4 * 1 + dim for part in range(3) for dim in range(4)]
    assert where == {
        ("a.qkv.weight", 0): rows,
        ("a.qkv.bias", 0): rows,
        ("a.proj.weight", 1): [4, 5, 6, 7],
        ("a.table", 1): [1],
    }


def test_heads_mixed_by_a_linear_layer_are_two_groups() -> None:
    """Talking heads: the heads of the map before the mixing and those after it are different ones."""

    class Talking(Attention):
        def forward(self, x: Tensor) -> Tensor:
            n, count, _ = x.shape
            q, k, v = (m(x).view(n, count, 3, 4).transpose(1, 2) for m in (self.q, self.k, self.v))
            scores = self.mix((q @ k.transpose(-2, -1)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, count, 12))

    model = randomise_(tokens(Talking(8, 3, 4, fused=False, mix=nn.Linear(3, 3))), 0).double().eval()
    graph = sc.analyze(model, INPUT)
    assert units(graph) == {"a.q": 3, "a.v": 3}
    plan = sc.Plan.of(graph, random_masks(graph, 1))
    cut = sc.cut_(copy.deepcopy(model), graph, plan)
    with torch.no_grad():
        torch.testing.assert_close(tensors_of(cut(INPUT)), without_units(model, graph, plan, INPUT))


def test_a_stock_layer_stays_itself_where_it_can_express_the_cut() -> None:
    """Two of four heads and half of the stream: what is left is a smaller nn.MultiheadAttention."""
    model, graph = analysed("stock", "heads")
    masks = [torch.arange(group.units) < group.units // 2 for group in graph.groups]
    cut = sc.cut_(copy.deepcopy(model), graph, sc.Plan.of(graph, masks))
    layer = cut.a.attn
    assert type(layer) is nn.MultiheadAttention
    assert (layer.num_heads, layer.head_dim, layer.embed_dim) == (2, 2, 4)
    with torch.no_grad():
        expected = without_units(model, graph, sc.Plan.of(graph, masks), INPUT)
        torch.testing.assert_close(tensors_of(cut(INPUT)), expected)


def test_the_frozen_side_of_a_choice_is_named() -> None:
    reasons = {item.reason for item in analysed("one key for all heads", "heads")[1].frozen}
    assert reasons == {"model output", "whole heads are removed instead (in a)"}
    with pytest.raises(sc.SecateurError, match="expected 'heads' or 'dims'"):
        sc.analyze(network("fused"), INPUT, attention="width")


def test_a_transformer_block_shrinks_everywhere() -> None:
    """Class token, position table, norms, layer scale: all follow the residual stream."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = torch.cat([m.token.expand(len(x), -1, -1), m.e(x)], 1) + m.positions
        y = y + m.gamma * m.a(m.n1(y))
        y = y + m.down(F.gelu(m.up(m.n2(y))))
        return m.head(m.n3(y)[:, 0])

    width = 8
    model = Net(
        forward,
        e=patches(width),
        a=Attention(width, 2, 4),
        up=nn.Linear(width, 20),
        down=nn.Linear(20, width),
        head=nn.Linear(width, 4),
        token=nn.Parameter(torch.zeros(1, 1, width)),
        positions=nn.Parameter(torch.zeros(1, 17, width)),
        gamma=nn.Parameter(torch.ones(width)),
        **{name: nn.LayerNorm(width) for name in ("n1", "n2", "n3")},
    )
    model = randomise_(model, 0).double().eval()
    graph = sc.analyze(model, INPUT)
    assert {group.name: group.units for group in graph.groups} == {"e.0": 8, "a.qkv": 2, "up": 20}
    assert graph.statistics == ("n1 (layer_norm)", "n2 (layer_norm)", "n3 (layer_norm)")
    plan = sc.Plan.of(graph, random_masks(graph, 0))
    cut = sc.cut_(copy.deepcopy(model), graph, plan)
    with torch.no_grad():
        torch.testing.assert_close(tensors_of(cut(INPUT)), without_units(model, graph, plan, INPUT))
    left = plan.kept(graph)[0]
    assert (
        cut.token.shape[-1]
        == cut.positions.shape[-1]
        == len(cut.gamma)
        == cut.n1.normalized_shape[0]
        == left
        < 8
    )


def test_a_mask_over_image_dims_ties_no_channels() -> None:
    model = Net(
        lambda m, x: m.c(m.a(x) * m.mask), a=conv(3, 6), c=conv(6, 4), mask=torch.rand(1, 1, 8, 8).double()
    )
    assert [group.units for group in sc.analyze(model.double(), INPUT).groups] == [6]
