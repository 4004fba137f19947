"""Studies in benchmarks/ that state something exact."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.additivity import Additivity, check_additivity, draw_levels
from secateur.methods.rd.curves import geometric
from secateur.methods.rd.single_weights import FAITHFUL, RDWeights
from tests.small import residual_net

SMALL = RDWeights(levels=4, steps=2, points=20)


def test_additivity_of_a_linear_model_is_exact_where_layers_do_not_meet() -> None:
    """Two branches that are added up, on inputs that do not overlap: distortions add up exactly."""

    class Apart(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(6, 4, bias=False), torch.nn.Linear(6, 4, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.a(x[:, :6]), self.b(x[:, 6:])], 1)

    torch.manual_seed(0)
    method = replace(FAITHFUL, levels=7, reduction="mean")
    found = check_additivity(Apart(), [torch.randn(30, 12)], sparsity=0.5, draws=8, method=method)
    assert found.ratio == pytest.approx(1)
    assert found.rank_correlation == pytest.approx(1)
    assert np.allclose(found.predicted, found.measured)


def test_additivity_is_measured_and_told() -> None:
    model, x = residual_net()
    found = check_additivity(model, [x], sparsity=0.6, draws=5, method=SMALL)
    assert len(found.predicted) == len(found.measured) == 5
    assert -1 <= found.rank_correlation <= 1
    assert found.ratio > 0
    assert found.to_json()["ratio"] == found.ratio
    assert Additivity(0.5, (1.0, 2.0, 3.0), (2.0, 4.0, 5.0)).rank_correlation == pytest.approx(1)
    assert Additivity(0.5, (1.0, 2.0, 3.0), (3.0, 2.0, 1.0)).rank_correlation == pytest.approx(-1)


@pytest.mark.parametrize("seed", range(10))
def test_draws_are_within_the_budget_and_close_to_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    kept = [geometric(int(n), 9, 1) for n in rng.integers(50, 2000, 6)]
    total = int(0.3 * sum(int(k[0]) for k in kept))
    levels = draw_levels(kept, total, rng)
    found = sum(int(k[level]) for k, level in zip(kept, levels, strict=True))
    assert 0.4 * total < found <= total
