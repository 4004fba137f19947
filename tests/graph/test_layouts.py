"""Operators that arrange, join, split and pick: what they leave free, and that the cut network is right."""

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from secateur.graph import Graph
from secateur.proof.verify import randomise_
from tests.graph.nets import Net, conv, patches, tokens
from tests.oracles import counted_macs, random_masks, tensors_of, without_units

INPUT = torch.randn(1, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.xdist_group("graph layouts")  # one process analyses each network
ORDER = torch.randperm(8, generator=torch.Generator().manual_seed(0))


def chain(op, width: int, **parts) -> Net:
    """A layer of 6 channels, an operator, and a layer that reads `width` channels."""
    return Net(lambda m, x: m.c(op(m.a(x), m)), a=conv(3, 6), c=conv(width, 4), **parts)


def selective(m: nn.Module, x: Tensor) -> Tensor:
    """Two branches weighed channel by channel, as in selective kernels."""
    y = torch.stack([m.a(x), m.b(x)], 1)
    gate = m.g(y.sum(1).mean((2, 3), keepdim=True)).view(len(x), 2, 6, 1, 1).softmax(1)
    return m.c((y * gate).sum(1))


def res2(m: nn.Module, x: Tensor) -> Tensor:
    first, second, third = m.a(x).split(4, 1)
    second = m.b(second + first)
    return m.c(torch.cat([first, second, third], 1))


def assigned(m: nn.Module, x: Tensor) -> Tensor:
    y = m.a(x).clone()
    y[:, :, :4] = m.b(x)[:, :, 4:]
    return m.c(y)


def mixer(m: nn.Module, x: Tensor) -> Tensor:
    y = m.e(x)
    y = y + m.out(m.into(y.transpose(1, 2)).relu()).transpose(1, 2)
    return m.head(y.mean(1))


CASES = {
    # name: (network, {group: units}, reasons of frozen channels other than the output)
    "pixel shuffle": (Net(lambda m, x: m.c(F.pixel_shuffle(m.a(x), 2)), a=conv(3, 24), c=conv(6, 4)), {"a": 6}, set()),
    "pixel unshuffle": (chain(lambda y, m: F.pixel_unshuffle(y, 2), 24), {"a": 6}, set()),
    "channel shuffle": (Net(lambda m, x: m.c(F.channel_shuffle(m.a(x), 2)), a=conv(3, 12), c=conv(12, 4)),
                        {"a": 6}, set()),
    "im2col": (Net(lambda m, x: m.c(F.unfold(m.a(x), 2, stride=2).view(len(x), 24, 4, 4)), a=conv(3, 6), c=conv(24, 4)),
               {"a": 6}, set()),
    "col2im": (Net(lambda m, x: m.c(F.fold(m.a(x).flatten(2), 16, 2, stride=2)), a=conv(3, 24), c=conv(6, 4)),
               {"a": 6}, set()),
    "windows along a dim": (chain(lambda y, m: y.unfold(2, 3, 1).mean(-1), 6), {"a": 6}, set()),
    "repeat": (chain(lambda y, m: y.repeat(1, 2, 1, 1), 12), {"a": 6}, set()),
    "tile": (chain(lambda y, m: torch.tile(y, (2, 1, 1)), 12), {"a": 6}, set()),
    "repeat interleave": (chain(lambda y, m: y.repeat_interleave(2, 1), 12), {"a": 6}, set()),
    "flip of an image": (chain(lambda y, m: y.flip(3), 6), {"a": 6}, set()),
    "flip of channels": (chain(lambda y, m: y.flip(1), 6), {}, {"aten.flip over channels"}),
    "roll of an image": (chain(lambda y, m: y.roll((1, -2), (2, 3)), 6), {"a": 6}, set()),
    "narrow": (chain(lambda y, m: y.narrow(1, 1, 3), 3), {"a#2": 3, "a": 3}, set()),
    "slice": (chain(lambda y, m: y[:, :4], 4), {"a": 4, "a#2": 2}, set()),
    "slice of an image": (chain(lambda y, m: y[:, :, 1:-1, ::2], 6), {"a": 6}, set()),
    "every other channel": (chain(lambda y, m: y[:, ::2], 3), {}, {"every other channel is taken"}),
    "split": (chain(lambda y, m: torch.cat(y.split([2, 4], 1)[::-1], 1), 6), {"a": 6}, set()),
    "split and skip": (Net(res2, a=conv(3, 12), b=conv(4, 5), c=conv(13, 4)),
                       {"a": 4, "b": 5, "a#2": 4}, set()),
    "unbind": (Net(lambda m, x: m.c(sum(m.a(x).unbind(1))[:, None]), a=conv(3, 6), c=conv(1, 4)), {},
               {"channels are taken apart one by one"}),
    "unflatten and unbind": (Net(lambda m, x: m.c(torch.mul(*m.a(x).unflatten(1, (2, 6)).unbind(1))), a=conv(3, 12),
                                 c=conv(6, 4)), {"a": 6}, set()),
    "stack and weigh": (Net(selective, a=conv(3, 6), b=conv(3, 6), g=conv(6, 12), c=conv(6, 4)),
                        {"a": 6}, set()),
    "gated linear unit": (Net(lambda m, x: m.c(F.glu(m.a(x), 1)), a=conv(3, 12), c=conv(6, 4)), {"a": 6}, set()),
    "index of an image": (chain(lambda y, m: y[:, :, ORDER][..., [0, 3]], 6), {"a": 6}, set()),
    "index of channels": (chain(lambda y, m: y[:, [4, 2, 0]], 3), {}, {"channels are picked by an index"}),
    "index select": (chain(lambda y, m: y.index_select(2, m.order), 6, order=ORDER), {"a": 6}, set()),
    "index select of channels": (chain(lambda y, m: y.index_select(1, m.few), 4, few=ORDER[[0, 1, 3, 4]]), {"": 4},
                                 {"channels are picked by an index"}),
    "index select of tokens": (Net(lambda m, x: m.c(m.a(x).flatten(2).mT.index_select(1, m.order).mean(1)),
                                   a=conv(3, 6), c=nn.Linear(6, 4), order=ORDER), {"a": 6}, set()),
    "gather": (chain(lambda y, m: y.gather(2, m.order.view(1, 1, 8, 1).expand(len(y), 1, 8, 8)), 1, order=ORDER),
               {}, {"channels are picked by an index"}),
    "gather by copies of an index": (chain(lambda y, m: y.gather(2, m.order.view(1, 1, 8, 1).expand_as(y)), 6,
                                           order=ORDER), {"a": 6}, set()),
    "gather by repeated copies": (chain(lambda y, m: y.gather(2, m.order.view(8, 1).repeat(len(y), 6, 1, 8).cpu()),
                                        6, order=ORDER), {"a": 6}, set()),
    "index add": (chain(lambda y, m: torch.zeros(len(y), 9, 8, 8, dtype=y.dtype).index_add(1, m.order[:6], y), 9,
                        order=ORDER), {"a": 6}, set()),
    "cumulative sum": (chain(lambda y, m: y.cumsum(1) + y.cumsum(2), 6), {}, {"aten.cumsum over channels"}),
    "largest channel": (Net(lambda m, x: m.c(x) * m.a(x).argmax(1, keepdim=True), a=conv(3, 6), c=conv(3, 4)), {},
                        {"aten.argmax over channels"}),
    "expand": (Net(lambda m, x: m.c(m.a(x).mean((2, 3), keepdim=True).expand(-1, -1, 8, 8)), a=conv(3, 6),
                   c=conv(6, 4)),
               {"a": 6}, set()),
    "expand as": (Net(lambda m, x: m.c(m.a(x) / F.normalize(m.a(x), dim=2).abs().clamp(min=1)), a=conv(3, 6),
                      c=conv(6, 4)), {"a": 6}, set()),
    "move dims": (chain(lambda y, m: m.f(y.movedim(1, -1)).movedim(-1, 1), 5, f=nn.Linear(6, 5)),
                  {"a": 6, "f": 5}, set()),
    "grid sample": (Net(lambda m, x: m.c(F.grid_sample(m.a(x), m.g(x).permute(0, 2, 3, 1), align_corners=False)),
                        a=conv(3, 6), g=conv(3, 2), c=conv(6, 4)), {"a": 6}, {"sampling positions"}),
    "resize": (chain(lambda y, m: F.interpolate(y, size=5, mode="bicubic", antialias=True), 6), {"a": 6}, set()),
    "zeros of the same shape": (chain(lambda y, m: torch.where(y > 0, y, torch.zeros_like(y)), 6), {"a": 6}, set()),
    "slice assignment": (Net(assigned, a=conv(3, 6), b=conv(3, 6), c=conv(6, 4)), {"a": 6}, set()),
    "masked fill": (chain(lambda y, m: y.masked_fill(y[:, :, :1] > 0, 0.5), 6), {"a": 6}, set()),
    "einsum": (Net(lambda m, x: m.head(torch.einsum("nchw,ndhw->ncd", m.a(x), m.b(x)).flatten(1)), a=conv(3, 6),
                   b=conv(3, 5), head=nn.Linear(30, 4)), {"a": 6}, {"whole heads|dims of every head"}),
    "matrix parameter": (Net(lambda m, x: m.f(m.a(x).mean((2, 3)) @ m.w), a=conv(3, 6), f=nn.Linear(5, 4),
                             w=nn.Parameter(torch.zeros(6, 5))), {"a": 6, "": 5}, set()),
    "added product": (Net(lambda m, x: m.f(torch.addmm(m.b, m.a(x).mean((2, 3)), m.w.t())), a=conv(3, 6),
                          f=nn.Linear(5, 4), w=nn.Parameter(torch.zeros(5, 6)), b=nn.Parameter(torch.zeros(5))),
                      {"a": 6, "": 5}, set()),
    "einsum with a parameter": (Net(lambda m, x: m.c(torch.einsum("nchw,co->nohw", m.a(x), m.w)), a=conv(3, 6),
                                    c=conv(5, 4), w=nn.Parameter(torch.zeros(6, 5))), {"a": 6, "": 5}, set()),
    "tokens mixed": (Net(mixer, e=patches(8), into=nn.Linear(16, 12), out=nn.Linear(12, 16), head=nn.Linear(8, 4)),
                     {"e.0": 8, "into": 12}, {"meets a tensor whose channels are fixed"}),
    "depthwise transposed": (chain(lambda y, m: m.up(y), 6, up=nn.ConvTranspose2d(6, 6, 2, 2, groups=6)),
                             {"a": 6}, set()),
    "convolution over stacked tokens": (
        Net(lambda m, x: m.f(m.s(torch.stack([m.a(x).mean((2, 3)), m.b(x).mean((2, 3))], 1))[:, 0]), a=conv(3, 6),
            b=conv(3, 6), s=nn.Conv1d(2, 1, 1), f=nn.Linear(6, 4)),
        {"a": 6}, {"a single channel is used on its own"}),
    "embedding": (Net(lambda m, x: m.f(m.a(x).mean((2, 3)) + m.t((x.sum((1, 2, 3)) > 0).long())), a=conv(3, 6),
                      t=nn.Embedding(2, 6), f=nn.Linear(6, 4)), {"a": 6}, set()),
    "two outputs": (Net(lambda m, x: {"out": m.c(m.a(x)), "aux": [m.d(m.a(x))]}, a=conv(3, 6), c=conv(6, 4),
                        d=conv(6, 2)), {"a": 6}, set()),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A network that tests only read, its analysis, and what that should say."""

    model: nn.Module
    graph: Graph
    groups: dict[str, int]
    reasons: set[str]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    model, groups, reasons = CASES[request.param]
    model = randomise_(copy.deepcopy(model), 0).double().eval()
    return Case(model, sc.analyze(model, INPUT), groups, reasons)


def test_groups_and_reasons(case: Case) -> None:
    assert {group.name: group.units for group in case.graph.groups} == case.groups
    found = {item.reason for item in case.graph.frozen} - {"model output"}
    parts = [part for reason in case.reasons for part in reason.split("|")]
    assert all(any(part in reason for part in parts) for reason in found), found
    assert bool(found) == bool(case.reasons)


def test_cut_equals_absent_units(case: Case) -> None:
    model, graph = case.model, case.graph
    assert sc.Cost(graph).macs() == counted_macs(model, INPUT)
    for seed in range(2):
        plan = sc.Plan.of(graph, random_masks(graph, seed))
        cut = sc.cut_(copy.deepcopy(model), graph, plan)
        with torch.no_grad():
            expected = without_units(model, graph, plan, INPUT)
            torch.testing.assert_close(tensors_of(cut(INPUT)), expected, rtol=1e-10, atol=1e-10)
        assert sc.Cost(graph).macs(plan.kept(graph)) == counted_macs(cut, INPUT)


def test_a_block_on_tokens_is_no_dead_end() -> None:
    graph = sc.analyze(tokens(nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))).double(), INPUT)
    assert {group.name: group.units for group in graph.groups} == {"e.0": 8, "a.0": 12}
