"""One walk saves what evolves, and the way back gives the same."""

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.engine.state import PER_GROUP, PER_TARGET, UNSAVED, follow_cut, learned, load_state, save_state


@dataclass(frozen=True)
class Row:
    name: str
    rate: float | None = None


@dataclass
class Inner:
    count: int
    pair: tuple[Tensor, str]


@dataclass
class State:
    threshold: nn.Parameter
    network: nn.Module
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    inner: Inner
    table: dict[int, dict[str, Tensor]]
    rows: list[Row]
    decided: list[Tensor] | None = None
    done: bool = False
    levels: list[Tensor] = field(
        default_factory=lambda: [torch.arange(3), torch.arange(4)], metadata=PER_GROUP
    )
    some: list[Tensor] = field(default_factory=lambda: [torch.arange(4)], metadata=PER_TARGET)
    hook: Any = field(default=None, metadata=UNSAVED)


def fresh(seed: int) -> State:
    torch.manual_seed(seed)
    threshold, network = nn.Parameter(torch.randn(3)), nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    return State(
        threshold,
        network,
        torch.optim.Adam([threshold, *network.parameters()], lr=0.1),
        torch.Generator().manual_seed(seed),
        Inner(seed, (torch.full((2,), seed), f"seed {seed}")),
        {4: {"unit": torch.arange(seed)}},
        [Row("a", 0.1), Row("b")] * seed,
    )


def train(state: State, steps: int) -> None:
    for _ in range(steps):
        x = torch.randn(4, 2, generator=state.generator)
        state.optimizer.zero_grad()
        (state.network(x).sum() + state.threshold.square().sum()).backward()
        state.optimizer.step()


def test_what_is_loaded_is_what_was_saved_and_goes_on_alike() -> None:
    state, other = fresh(2), fresh(1)
    train(state, 3)
    state.decided, state.done, state.hook = [torch.tensor([True, False])], True, object()
    tensors, facts = save_state(state)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    facts = json.loads(json.dumps(facts))
    threshold = other.threshold
    assert load_state(other, tensors, facts) is other
    assert other.threshold is threshold
    assert other.hook is None
    assert other.rows == state.rows
    assert isinstance(other.inner.pair, tuple)
    for _ in range(2):
        again, said = save_state(other)
        assert said == facts
        assert again.keys() == tensors.keys()
        assert all(torch.equal(again[name], tensors[name]) for name in tensors)
        train(state, 2)
        train(other, 2)
        tensors = save_state(state)[0]


def test_what_cannot_be_saved_is_named() -> None:
    state = fresh(1)
    state.table[4]["unit"] = object()  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r"table.4.unit: a object cannot be saved"):
        save_state(state)


def test_another_shape_is_refused() -> None:
    tensors, facts = save_state(fresh(1))
    for name in ("threshold", "network.0.weight"):
        with pytest.raises(ValueError, match="for what is"):
            load_state(fresh(1), tensors | {name: torch.zeros(1)}, facts)


def test_marked_rows_follow_a_cut() -> None:
    state = fresh(3)
    follow_cut(
        state, [torch.tensor([True, False, True]), torch.tensor([False, True, True, False])], targets=[1]
    )
    assert [t.tolist() for t in state.levels] == [[0, 2], [1, 2]]
    assert [t.tolist() for t in state.some] == [[1, 2]]
    assert len(state.table[4]["unit"]) == 3


def test_what_is_learned_are_parameters_and_those_of_modules() -> None:
    state = fresh(1)
    assert [p.shape for p in learned(state)] == [(3,), (2, 2), (2,), (2,), (2,)]
    assert learned(None) == []
