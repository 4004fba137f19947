"""Recurrent layers and cells: LSTM, GRU and RNN, stacked, in both directions and projected."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from secateur.graph.labels import Atoms, Value, along
from secateur.graph.operators.site import Result, Site
from secateur.graph.operators.table import PLAIN, operator

GATES = {"lstm": 4, "gru": 3}
"""Rows of each weight per hidden unit; a plain RNN has one."""


@dataclass(frozen=True)
class State:
    """The hidden units of one layer or cell.

    Attributes:
        hidden: (H,), the units: with them go their rows of every gate.
        shown: (P,), what is passed on: the same, or what a projection makes of them.
    """

    hidden: Atoms
    shown: Atoms


@operator("lstm gru rnn_tanh rnn_relu", PLAIN.but(trains="train"))
def recurrent(site: Site) -> Result:
    """All layers and directions have one width, so a unit is the same position in each of them."""
    labels = site.labels
    x = site.labels.exposed(site["input" if "input" in site.args else "data"])
    rank, hx = len(x.shape), site["hx"]
    factors = site.restrict(x, [rank - 1], "the steps of a sequence")
    into = labels.axis(Value(x.shape, tuple(factors)), rank - 1)
    rows = math.prod(x.shape[:-1])
    directions = 2 if site["bidirectional"] else 1
    cells = list(_cells(site["params"], site["num_layers"] * directions))
    state = _state(site, cells[0])
    for layer in range(site["num_layers"]):
        for cell in cells[layer * directions : (layer + 1) * directions]:
            _label_cell(site, cell, state, into, rows)
        into = np.tile(state.shown, directions)
    first, *others = hx if isinstance(hx, list | tuple) else [hx]
    _start(site, first, state.shown)
    for other in others:
        _start(site, other, state.hidden)
    made = [into, state.shown, state.hidden][: len(site.shapes)]
    return tuple(
        labels.value(shape, [along(atoms, len(shape) - 1, len(shape))])
        for shape, atoms in zip(site.shapes, made, strict=True)
    )


@operator("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell", PLAIN)
def recurrent_cell(site: Site) -> Result:
    """One step of one layer; its state is given, and its result is the next one."""
    labels = site.labels
    x = labels.exposed(site["input"])
    factors = site.restrict(x, [len(x.shape) - 1], "the rows of a batch")
    cell = [site[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh") if site[name] is not None]
    state = _state(site, cell)
    into = labels.axis(Value(x.shape, tuple(factors)), len(x.shape) - 1)
    _label_cell(site, cell, state, into, math.prod(x.shape[:-1]))
    hx = site["hx"]
    for given in hx if isinstance(hx, list | tuple) else [hx]:
        _start(site, given, state.hidden)
    return site.values([along(state.hidden, len(site.shape) - 1, len(site.shape))])


def _cells(params: Sequence[Value], count: int) -> Iterator[Sequence[Value]]:
    """The tensors of each layer and direction."""
    each = len(params) // count
    for start in range(0, len(params), each):
        yield params[start : start + each]


def _gates(site: Site) -> int:
    return GATES.get(site.op.removeprefix("aten.").removesuffix("_cell"), 1)


def _state(site: Site, cell: Sequence[Value]) -> State:
    hidden = site.labels.fresh(cell[0].shape[0] // _gates(site))
    if len(cell) == 2 or len(cell[-1].shape) == 1:
        return State(hidden, hidden)
    shown = site.labels.fresh(cell[-1].shape[0])
    # torch takes a layer whose projection is as wide as its hidden units for one without a projection
    site.labels.pin(
        hidden[: len(shown) + 1], "hidden units before a projection, which must be more than it makes"
    )
    return State(hidden, shown)


def _label_cell(site: Site, cell: Sequence[Value], state: State, into: Atoms, rows: int) -> None:
    """Tie the tensors of one layer and direction to what it reads and to its units."""
    labels, gates = site.labels, _gates(site)
    weights, biases = [v for v in cell if len(v.shape) == 2], [v for v in cell if len(v.shape) == 1]
    for weight, reads, role in zip(weights[:2], (into, state.shown), ("in", "recurrent"), strict=True):
        site.restrict(weight, [0, 1], "positions of a recurrent weight")
        out = labels.axis(weight, 0, "out", unit=True)
        labels.tie(out.reshape(gates, -1), state.hidden)
        labels.tie(labels.axis(weight, 1, role), reads)
        site.count(rows * math.prod(weight.shape), out, reads)
    for projection in weights[2:]:
        labels.tie(labels.axis(projection, 0, "out", unit=True), state.shown)
        labels.tie(labels.axis(projection, 1, "in"), state.hidden)
        site.count(rows * math.prod(projection.shape), state.shown, state.hidden)
    for bias in biases:
        labels.tie(labels.axis(bias, 0, "bias").reshape(gates, -1), state.hidden)


def _start(site: Site, given: Value, units: Atoms) -> None:
    """Tie the state at the first step to the units; one that is given from outside keeps them all."""
    value = site.labels.exposed(given)
    last = len(value.shape) - 1
    factors = site.restrict(value, [last], "the state of a recurrent layer")
    site.labels.tie(site.labels.axis(Value(value.shape, tuple(factors)), last), units)
