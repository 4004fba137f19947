"""Where the units of a group lie in a tensor, against loops over every position."""

import numpy as np
import pytest
import torch

from secateur.graph.groups import Member

INDEX = np.array([[4, 1], [0, 3]])  # two units at two positions each; 2 and 5 belong to neither


@pytest.fixture(params=[0, 1, 2, 3])
def member(request: pytest.FixtureRequest) -> tuple[Member, torch.Tensor]:
    dim = request.param
    shape = [2, 3, 4, 5]
    shape[dim] = 6
    return Member("weight", dim, "in", INDEX), torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_take_gives_every_unit_its_own_elements(member) -> None:
    member, t = member
    taken = member.take(t)
    assert taken.shape == (2, 2 * t.numel() // 6)
    for unit, row in zip(INDEX, taken, strict=True):
        parts = [t.select(member.dim, int(position)).flatten() for position in unit]
        assert torch.equal(row, torch.cat(parts))


def test_spread_puts_values_at_the_positions_of_their_units(member) -> None:
    member, _ = member
    assert member.spread(torch.tensor([2.0, 3.0]), 6).tolist() == [3, 2, 1, 3, 2, 1]
    assert member.spread(torch.tensor([2.0, 3.0]), 6, fill=0.0).tolist() == [3, 2, 0, 3, 2, 0]


def test_fill_reaches_the_removed_units_and_nothing_else(member) -> None:
    member, t = member
    filled = t.clone()
    member.fill_(filled, torch.tensor([True, False]), 7.0)
    for position in range(6):
        there, before = filled.select(member.dim, position), t.select(member.dim, position)
        assert (there == 7).all() if position in INDEX[0] else torch.equal(there, before)
