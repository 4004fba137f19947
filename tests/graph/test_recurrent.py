"""Recurrent layers lose inputs and hidden units: every kind, stacked, in both directions, projected, and as cells."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.rewriting.rewrite import rewritten_modules
from tests.graph.nets import Net, conv
from tests.oracles import proven_cut, random_masks

KINDS: dict[str, type[nn.RNNBase]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
FORMS: dict[str, dict[str, Any]] = {
    "one layer": {},
    "batch second": {"batch_first": False},
    "stacked": {"num_layers": 2, "dropout": 0.1},
    "both directions": {"bidirectional": True},
    "stacked, both directions": {"num_layers": 2, "bidirectional": True},
    "without bias": {"bias": False},
}


def text_reader(kind: str, **options: Any) -> Net:
    """CRNN: columns of an image are the steps of a sequence."""
    first = options.setdefault("batch_first", True)
    layer = KINDS[kind](8, 6, **options)

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.c(x).relu().mean(2).permute(*((0, 2, 1) if first else (2, 0, 1)))
        y = m.o(m.r(y)[0])
        return y if first else y.transpose(0, 1)

    width = (layer.proj_size or layer.hidden_size) * (2 if layer.bidirectional else 1)
    return Net(forward, c=conv(3, 8, 3), r=layer, o=nn.Linear(width, 5))


def last_state(m: nn.Module, x: Tensor) -> Tensor:
    """Classifies by the state after the last step, of both directions, and the cell."""
    _, (h, c) = m.r(m.c(x).flatten(2).transpose(1, 2))
    return m.o(torch.cat([h.transpose(0, 1).flatten(1), c[-1]], 1))


def sequencer(m: nn.Module, x: Tensor) -> Tensor:
    """Rows and columns are read in both directions, and their results joined: Sequencer2D."""
    y = m.c(x).permute(0, 2, 3, 1)
    n, h, w, c = y.shape
    z = m.n(y)
    down = m.v(z.permute(0, 2, 1, 3).reshape(-1, h, c))[0].view(n, w, h, -1).permute(0, 2, 1, 3)
    right = m.h(z.reshape(-1, w, c))[0].view(n, h, w, -1)
    y = y + m.f(torch.cat([down, right], -1))
    return m.o(y.mean((1, 2)))


def cells(m: nn.Module, x: Tensor) -> Tensor:
    """Steps written out: one cell of each kind, states made in forward and by torch."""
    y = m.c(x).flatten(2)
    h, c = x.new_zeros(len(x), 6), torch.zeros(len(x), 6, dtype=x.dtype)
    g = r = None
    for i in range(3):
        h, c = m.lstm(y[..., i], (h, c))
        g = m.gru(h, g)
        r = m.rnn(torch.cat([h, g], 1), r)
    return m.o(r)


def given_state(m: nn.Module, x: Tensor) -> Tensor:
    """The first state follows from the image's mean, which fixes the hidden width."""
    return m.o(m.r(m.c(x).flatten(2).mT, x.mean((1, 2, 3)).view(1, -1, 1).expand(1, len(x), 6))[0])


def learned_state(m: nn.Module, x: Tensor) -> Tensor:
    return m.o(m.r(m.c(x).flatten(2).mT, m.start.expand(1, len(x), 6).contiguous())[0])


def parts(forward: Callable[..., Tensor], **layers: Any) -> Net:
    return Net(forward, c=conv(3, 8, 3), **layers)


def reader(options: dict[str, Any], kind: str) -> Callable[[], nn.Module]:
    return lambda: text_reader(kind, **options)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    f"{kind}, {form}": (reader(options, kind), {"c": 8, "r": 6})
    for kind in KINDS for form, options in FORMS.items()
} | {
    "rnn, relu": (lambda: text_reader("rnn", nonlinearity="relu"), {"c": 8, "r": 6}),
    "projected": (lambda: text_reader("lstm", proj_size=4), {"c": 8, "r": 4}),
    "projected, stacked, both directions":
        (lambda: text_reader("lstm", proj_size=2, num_layers=2, bidirectional=True), {"c": 8, "r": 2, "r#2": 3}),
    "last state": (lambda: parts(last_state, r=nn.LSTM(8, 6, batch_first=True, bidirectional=True),
                                 o=nn.Linear(18, 5)), {"c": 8, "r": 6}),
    "sequencer": (lambda: parts(sequencer, n=nn.LayerNorm(8), v=nn.LSTM(8, 6, batch_first=True, bidirectional=True),
                                h=nn.LSTM(8, 6, batch_first=True, bidirectional=True), f=nn.Linear(24, 8),
                                o=nn.Linear(8, 5)), {"c": 8, "v": 6, "h": 6}),
    "cells": (lambda: parts(cells, lstm=nn.LSTMCell(8, 6), gru=nn.GRUCell(6, 7), rnn=nn.RNNCell(13, 5),
                            o=nn.Linear(5, 4)), {"c": 8, "lstm": 6, "gru": 7, "rnn": 5}),
    "given state": (lambda: parts(given_state, r=nn.GRU(8, 6, batch_first=True), o=nn.Linear(6, 4)), {"c": 8}),
    "learned state": (lambda: parts(learned_state, r=nn.GRU(8, 6, batch_first=True), o=nn.Linear(6, 4),
                                    start=nn.Parameter(torch.rand(1, 1, 6))), {"c": 8, "r": 6}),
}  # fmt: skip
X = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NETWORKS)
def test_cut_and_masked_network_agree(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, expected = NETWORKS[name]
    model = make().eval()
    graph = sc.analyze(model, X)
    assert {group.name: group.units for group in graph.groups} == expected, str(graph)
    for seed in range(2):
        cut, _ = proven_cut(model, graph, random_masks(graph, seed))
        for before, after in zip(model.modules(), cut.modules(), strict=True):
            if isinstance(after, nn.RNNBase | nn.RNNCellBase):
                follows(before, after)
    # cut more than once, where the network's own forward takes any width
    if not rewritten_modules(cut):
        again = sc.analyze(cut, X)
        twice = sc.cut_(copy.deepcopy(cut), again, plan := sc.Plan.of(again, random_masks(again, 5)))
        assert sc.verify(cut, twice, again, plan).ok
    sc.save(cut, tmp_path / "cut.safetensors")
    torch.manual_seed(1)
    loaded = sc.load(make().eval(), tmp_path / "cut.safetensors")
    more = torch.randn(3, 3, 4, 5)
    assert torch.equal(loaded(more), cut(more))


def follows(before: nn.Module, after: nn.Module) -> None:
    """The numbers that a layer keeps are those of its tensors."""
    stacked = isinstance(after, nn.RNNBase)
    into, state = (after.weight_ih_l0, after.weight_hh_l0) if stacked else (after.weight_ih, after.weight_hh)
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[type(after).__name__.removesuffix("Cell")]
    assert after.input_size == into.shape[1] < before.input_size
    assert into.shape[0] == state.shape[0] == gates * after.hidden_size
    assert state.shape[1] == ((after.proj_size if stacked else 0) or after.hidden_size)


@pytest.mark.parametrize("kind", KINDS)
def test_macs_are_one_product_per_weight_and_step(kind: str) -> None:
    model = text_reader(kind, num_layers=2, bidirectional=True)
    graph = sc.analyze(model, X)
    plan = sc.Plan.of(graph, random_masks(graph, 1))
    cut = sc.cut_(copy.deepcopy(model), graph, plan)
    weights = sum(p.numel() for name, p in cut.r.named_parameters() if "weight" in name)
    macs = 20 * cut.c.weight.numel() + 5 * (weights + cut.o.weight.numel())
    assert sc.Cost(graph).macs(plan.kept(graph)) == macs


@pytest.mark.parametrize("score", ["l2", "taylor", "group-l2"])
def test_pruned_and_trained_by_any_score(score: str) -> None:
    torch.manual_seed(0)
    model = text_reader("lstm", num_layers=2, bidirectional=True)
    data = [(X, torch.randn(2, 5, 5))]
    result = sc.prune(
        model,
        X,
        budget=sc.Budget(macs=0.5),
        method="oneshot",
        score=score,
        data=data,
        loss=nn.functional.mse_loss,
    )
    assert result.proof.ok
    assert result.model.r.hidden_size < 6
    optimizer = torch.optim.SGD(result.model.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        loss = result.model.train()(X).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_methods_that_train_cut_the_state_too() -> None:
    torch.manual_seed(0)
    model = text_reader("gru", bidirectional=True)
    session = sc.methods.Gradual(rounds=2).start(model, X, budget=sc.Budget(macs=0.5), steps=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with session.attach(optimizer):
        for _ in range(8):
            model(X).square().mean().backward()
            session.before_step()
            optimizer.step()
            session.after_step()
            optimizer.zero_grad()
    result = session.finish()
    assert result.proof.ok
    assert result.model.r.hidden_size < 6


@pytest.mark.parametrize("method", [sc.methods.LAPP(bypass="none"), sc.methods.PAAM(streams=True)], ids=str)
def test_methods_with_gates_leave_hidden_units_alone(method: sc.methods.TrainingMethod) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), text_reader("lstm"))
    model[3].c = nn.Sequential(conv(8, 12), nn.BatchNorm2d(12), nn.ReLU(), conv(12, 8))
    session = method.start(model, X, budget=sc.Budget(macs=0.9), steps=10)
    named = {session.graph.groups[number].name for number in session.targets}
    assert "3.c.0" in named
    assert "3.r" not in named
