"""An operator with a rule can be rewritten, saved and loaded: every family of the table, at a width written out."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import secateur as sc
from secateur.graph.operators import OPERATORS
from secateur.rewriting import compose
from secateur.rewriting.rewrite import rewritten_modules
from tests.graph.nets import Net, conv
from tests.oracles import random_masks

Function = Callable[[nn.Module, Tensor], Tensor]

FAMILIES: dict[str, dict[str, Function]] = {
    # name of an operator: (module, (n, 8, 4, 4)) -> something that can be added to it
    "elementwise": {
        "relu": lambda m, y: y.relu(),
        "maximum": lambda m, y: torch.maximum(y, 0.1 * y),
        "prelu": lambda m, y: F.prelu(y, m.row),
        "new_zeros": lambda m, y: y.new_zeros(len(y), 8, 4, 4) + 1,
        "arange": lambda m, y: y + torch.arange(4, dtype=y.dtype),
        "view_as_complex": lambda m, y: torch.view_as_complex(torch.stack([y, 2 * y], -1)).imag,
        "view_as_real": lambda m, y: torch.view_as_real(torch.complex(y, 2 * y)).sum(-1),
    },
    "norm": {
        "batch_norm": lambda m, y: m.batch(y),
        "layer_norm": lambda m, y: m.layer(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
        "group_norm": lambda m, y: m.group(y),
        "_weight_norm": lambda m, y: m.weighted(y),
        "amax": lambda m, y: y.amax(1, keepdim=True),
        "logsumexp": lambda m, y: y.logsumexp(1, keepdim=True),
        "prod": lambda m, y: y.prod(1, keepdim=True),
        "median": lambda m, y: y.median(1, keepdim=True).values,
        "softmax": lambda m, y: y.softmax(1),
        "argmax": lambda m, y: 0.1 * y.argmax(3, keepdim=True),
        "cumsum": lambda m, y: y.cumsum(3),
        "glu": lambda m, y: F.glu(torch.cat([y, 2 * y], 1), 1),
        "tril": lambda m, y: y.tril(),
        "cdist": lambda m, y: torch.cdist(m.square, m.square),
    },
    "fourier": {"fft_irfft2": lambda m, y: torch.fft.irfft2(torch.fft.rfft2(y), s=(4, 4))},
    "image": {
        "max_pool2d": lambda m, y: F.max_pool2d(y, 3, 1, 1),
        "max_unpool2d": lambda m, y: F.max_unpool2d(*F.max_pool2d(y, 2, return_indices=True), 2),
        "grid_sampler": lambda m, y: F.grid_sample(y, m.places.expand(len(y), 4, 4, 2), align_corners=False),
        "im2col": lambda m, y: F.unfold(y, 1).unflatten(2, (4, 4)),
        "col2im": lambda m, y: F.fold(F.unfold(y, 2, stride=2), (4, 4), 2, stride=2),
        "pixel_shuffle": lambda m, y: F.pixel_shuffle(F.pixel_unshuffle(y, 2), 2),
        "pixel_unshuffle": lambda m, y: F.pixel_shuffle(2 * F.pixel_unshuffle(y, 2), 2),
        "channel_shuffle": lambda m, y: F.channel_shuffle(y, 8),
    },
    "contract": {
        "conv2d": lambda m, y: m.depthwise(y),
        "conv_transpose2d": lambda m, y: m.transposed(y),
        "linear": lambda m, y: m.line(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
        "matmul": lambda m, y: y @ m.square,
        "outer": lambda m, y: torch.outer(m.row, m.square[0])[:, :, None],
        "addmm": lambda m, y: torch.addmm(m.row, y.mean((2, 3)), m.line.weight)[:, :, None, None],
        "einsum": lambda m, y: torch.einsum("nchw,wv->nchv", y, m.square),
        "scaled_dot_product_attention": lambda m, y: attend(y.flatten(2).mT).mT.unflatten(2, (4, 4)),
    },
    "recurrent": {
        "lstm": lambda m, y: m.lstm(y.mean(1))[0][:, None],
        "gru": lambda m, y: m.gru(y.flatten(2).mT)[0].mT.unflatten(2, (4, 4)),
        "lstm_cell": lambda m, y: m.cell(y.mean((2, 3)))[0][:, :, None, None],
    },
    "shape": {
        "reshape": lambda m, y: y.reshape(-1, 8, 16).reshape(-1, 8, 4, 4),
        "permute": lambda m, y: y.permute(0, 1, 3, 2),
        "transpose": lambda m, y: y.transpose(2, 3),
        "t": lambda m, y: m.square.t(),
        "movedim": lambda m, y: y.movedim(1, 3).movedim(3, 1),
        "unsqueeze": lambda m, y: y.unsqueeze(1).sum(1),
        "squeeze": lambda m, y: y.mean(3, keepdim=True).squeeze(3)[..., None],
        "expand": lambda m, y: m.row[:, None, None].expand(len(y), 8, 4, 4),
        "repeat": lambda m, y: y.repeat(1, 1, 2, 1)[:, :, :4],
        "repeat_interleave": lambda m, y: y.repeat_interleave(2, 3)[..., :4],
        "unfold": lambda m, y: y.unfold(3, 4, 1).squeeze(3),
        "diagonal": lambda m, y: torch.diagonal(y, 0, 2, 3)[..., None],
        "meshgrid": lambda m, y: torch.meshgrid(m.square[0], m.square[1], indexing="ij")[0],
    },
    "select": {
        "cat": lambda m, y: torch.cat([y, y], 2)[:, :, 2:6],
        "stack": lambda m, y: torch.stack([y, 2 * y]).sum(0),
        "split_with_sizes": lambda m, y: torch.cat(y.split([3, 5], 1), 1),
        "unbind": lambda m, y: torch.stack(y.unbind(2)[::-1], 2),
        "slice": lambda m, y: torch.cat([y[:, :3], y[:, 3:]], 1),
        "select": lambda m, y: y.select(2, 1)[:, :, None],
        "index": lambda m, y: y[:, :, m.order],
        "index_add": lambda m, y: y.index_add(2, m.order, y),
        "pad": lambda m, y: F.pad(y[:, :, 1:], (0, 0, 1, 0)),
        "scatter": lambda m, y: m.square.scatter(0, m.order[None], 0.5),
    },
}  # fmt: skip

LAYERS: dict[str, Callable[[], dict[str, nn.Module]]] = {
    "elementwise": lambda: {"row": nn.Parameter(torch.rand(8))},
    "norm": lambda: {
        "batch": nn.BatchNorm2d(8), "layer": nn.LayerNorm(8), "group": nn.GroupNorm(1, 8),
        "weighted": weight_norm(conv(8, 8)),
    },
    "contract": lambda: {
        "row": nn.Parameter(torch.rand(8)), "depthwise": conv(8, 8, groups=8), "line": nn.Linear(8, 8),
        "transposed": nn.ConvTranspose2d(8, 8, 1),
    },
    "recurrent": lambda: {
        "lstm": nn.LSTM(4, 4, batch_first=True), "gru": nn.GRU(8, 8, batch_first=True), "cell": nn.LSTMCell(8, 8),
    },
    "shape": lambda: {"row": nn.Parameter(torch.rand(8))},
}  # fmt: skip


def attend(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, 2 * x, x)


def block(family: str) -> nn.Module:
    """A convolution, its width written out, the sum of what each operator makes of it, and another convolution."""
    torch.manual_seed(0)
    functions = FAMILIES[family].values()

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.a(x).reshape(-1, 8, 4, 4)
        return m.c(torch.stack([(y + function(m, y)) / len(functions) for function in functions]).sum(0))

    inner = Net(
        forward,
        a=conv(3, 8),
        c=conv(8, 4),
        square=torch.rand(4, 4),
        places=torch.rand(1, 4, 4, 2),
        order=torch.tensor([2, 0, 1, 3]),
        **LAYERS.get(family, dict)(),
    )
    return nn.Sequential(inner).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_rewritten_saved_and_loaded(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compose, "choose_calls", lambda *_: [])  # also operators that layers would run
    model, x = block(family), torch.randn(2, 3, 4, 4)
    graph = sc.analyze(model, x)
    assert graph.groups[0].units == 8, str(graph)
    plan = sc.Plan.of(graph, random_masks(graph, 0))
    cut = sc.cut_(copy.deepcopy(model), graph, plan)
    assert sc.verify(model, cut, graph, plan).ok
    program = rewritten_modules(cut)["0"].program
    called = {op.target.removeprefix("aten.").partition(".")[0] for op in program.ops}
    assert not FAMILIES[family].keys() - called
    sc.save(cut, tmp_path / "cut.safetensors")
    loaded = sc.load(block(family), tmp_path / "cut.safetensors")
    more = torch.randn(5, 3, 4, 4)
    assert torch.equal(loaded(more), cut(more))


def test_no_family_is_left_out() -> None:
    callable_rules = {entry.rule for entry in OPERATORS.values() if entry.program}
    tried = {OPERATORS[name].rule for names in FAMILIES.values() for name in names}
    assert {rule.__name__ for rule in callable_rules - tried} == set()


CONVERSIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "device": lambda x: x.to(x.device),
    "device as text": lambda x: x.to("cpu"),
    "dtype": lambda x: x.to(x.dtype),
    "device and dtype": lambda x: x.to(x.device, x.dtype, non_blocking=True),
    "like another": lambda x: x.to(x[:1]),
    "layout": lambda x: x.to(memory_format=torch.channels_last),
    "type as": lambda x: x.type_as(x[:1]),
    "cpu": lambda x: x.cpu(),
    "new": lambda x: x + x.new_zeros(x.shape[1:]),
    "copy": lambda x: torch.empty_like(x).copy_(x),
    "zeros like": lambda x: x + torch.zeros_like(x, device=x.device),
    "full": lambda x: x * torch.full((1,), 1.0, device=x.device, dtype=x.dtype),
}


@pytest.mark.parametrize("how", CONVERSIONS)
def test_conversions_of_every_overload_are_rewritten(how: str) -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y, z = CONVERSIONS[how](m.a(x)).split(8, 1)
        return m.b(y * z)

    torch.manual_seed(0)
    inner = Net(forward, a=conv(16, 16), b=conv(8, 16))
    model = nn.Sequential(conv(3, 16), inner, nn.ReLU(), conv(16, 2)).eval()
    result = sc.prune(model, torch.randn(1, 3, 4, 4), budget=sc.Budget(macs=0.5), round_to=1)
    assert result.proof.ok
    assert result.proof.rewritten == ("1",)
    assert result.model[1].a.out_channels < 16
