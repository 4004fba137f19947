"""Weights of one layer that reproduce its target with some of them gone, by least squares.

With inputs x (k,) and targets t (o,) over many rows, A = cov(x, x) and B = cov(t, x), each output's weights w
on its support S minimise

    E (t - w x - b)^2 + d * |w - w0|^2    =>    w[S] = (A[S, S] + d I)^-1 (B[S] + d w0[S])

so that one pair of matrices serves every mask of the layer. How far the weights are drawn to those before depends on
how much A differs between images: d is what makes A + d I, but for its scale, the best estimate of the true moments.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.errors import ScoreError
from secateur.plan.weight_plan import top

DAMPING = 1e-3
"""The least d, as a share of the mean of A's diagonal."""

_MOST = 0.99  # of shrinkage: what is known badly is drawn to what was, and never given up

_WIDE = (
    1024  # inputs above which units are ranked in float32, which is twice as fast and enough to compare them
)

_ROWS = 16  # outputs solved at a time: k * k numbers each


@dataclass(frozen=True)
class Moments:
    """What least squares needs to know of one layer, (or of one of the groups of a grouped layer).

    Attributes:
        a: (k, k), float64, second moments of the inputs, centred if the layer has an offset.
        b: (o, k), the same of targets and inputs.
        power: (o,), the same of targets.
        mean_x: (k,), mean input; zero if the layer has no offset.
        mean_t: (o,), mean target; zero likewise.
        before: (o, k), the weights the layer came with: the solution is drawn towards them.
        noise: the squared error of `a` that is to be expected, summed over its entries.
    """

    a: Tensor
    b: Tensor
    power: Tensor
    mean_x: Tensor
    mean_t: Tensor
    before: Tensor
    noise: float = 0.0

    @property
    def damping(self) -> float:
        """What d is."""
        return damping(self.a, self.noise)

    def error(self, w: Tensor) -> float:
        """Mean squared error of the outputs, summed over them, as a share of their power."""
        w = w.double()
        error = self.power - 2 * (w * self.b).sum(1) + ((w @ self.a) * w).sum(1)
        return float(error.sum().clamp_min(0) / self.power.sum().clamp_min(1e-30))

    def offset(self, w: Tensor) -> Tensor:
        """The offset that gives the outputs the targets' means, (o,)."""
        return self.mean_t - w.double() @ self.mean_x


def damping(a: Tensor, noise: float) -> float:
    """The d for which a + d I is, but for its scale, the best estimate of the true moments.

        noise / (|a|^2 - k mean^2) = s,    d = mean * s / (1 - s),    mean = trace(a) / k

    Args:
        a: (k, k), moments of a sample.
        noise: the squared error of a that is to be expected, summed over its entries.
    Source: Ledoit & Wolf 2004, a well-conditioned estimator for large-dimensional covariance matrices.
    Differs: d is at least `DAMPING` of the mean, and s at most 0.99.
    """
    mean = float(a.diagonal().mean())
    apart = float(a.square().sum()) - len(a) * mean**2
    share = min(_MOST, noise / apart) if apart > 0 else 0.0
    return max(DAMPING, share / (1 - share)) * mean or DAMPING


def solve(moments: Moments, mask: Tensor) -> Tensor:
    """The best weights on a mask.

    Args:
        mask: (o, k), True = keep.
    Returns:
        (o, k), float64, exactly zero off the mask.
    """
    w = torch.zeros(mask.shape, dtype=torch.float64)
    for rows, index, found, _ in _systems(moments, mask, torch.float64):
        w[rows] = w[rows].scatter(1, index, found)
    return w * mask


def choose(moments: Sequence[Moments], count: int, *, steps: int = 8, mask: Tensor | None = None) -> Tensor:
    """Which `count` weights of a layer to keep, by eliminating those that cost least once the rest is re-solved.

    Removing weight j of an output and re-solving the others costs w[j]^2 / inverse(A[S, S])[j, j]. In each of
    the steps, which shrink the layer by equal ratios, the cheapest of all outputs go together.

    Args:
        moments: of the layer, or of each of its groups.
        mask: (o, k): only these may stay.
    Returns:
        (o, k) bool.
    Source: Hassibi & Stork 1993, second-order derivatives for network pruning; per layer as in Frantar & Alistarh
        2022, arXiv:2208.11580.
    Differs: many weights leave at once, several rows compete, and the inverse is made anew in every step.
    """
    shape = sum(len(m.b) for m in moments), moments[0].b.shape[1]
    mask = torch.ones(shape, dtype=torch.bool) if mask is None else mask
    alive = int(mask.sum())
    for step in range(1, steps + 1):
        goal = max(count, round(alive * (count / alive) ** (step / steps))) if count else 0
        if goal < int(mask.sum()):
            price = torch.cat(
                [prices(m, part) for m, part in zip(moments, mask.chunk(len(moments)), strict=True)]
            )
            mask = top(price, goal)
    return mask


def prices(moments: Moments, mask: Tensor) -> Tensor:
    """What removing each weight alone costs once the others are re-solved, (o, k); -1 off the mask."""
    price = torch.full(mask.shape, -1.0, dtype=torch.float64)
    for rows, index, found, spread in _systems(moments, mask, torch.float32):
        price[rows] = price[rows].scatter(1, index, (found.square() / spread).double())
    return price.masked_fill(~mask, -1.0)


class Elimination:
    """A layer's solution while blocks of its inputs leave: what each costs, and what is left of the weights.

    Removing inputs c costs the outputs together

        sum over outputs of importance * w[c]^T inverse(H[c, c]) w[c],    H = inverse(A[S, S] + d I)

    and leaves, on the others, w - H[:, c] inverse(H[c, c]) w[c] and H - H[:, c] inverse(H[c, c]) H[c, :]. So there is
    one inverse, and it is downdated.

    Args:
        a: (k, k), float64, second moments of the inputs.
        damping: d.
        weights: (o, k), the solution with all inputs.
        blocks: (units, positions), the inputs of each unit; other inputs stay.
        importance: (o,), what the squared error of each output counts; default: 1.
    Source: Hassibi & Stork 1993, second-order derivatives for network pruning. Differs: blocks of weights, of all
        outputs together.

    Attributes:
        weights: (o, inputs that are left), float64, or float32 in wide layers.
        columns: (inputs that are left,), their places in the layer.
    """

    def __init__(
        self, a: Tensor, damping: float, weights: Tensor, blocks: Tensor, importance: Tensor | None = None
    ) -> None:
        dtype = torch.float32 if len(a) > _WIDE else torch.float64
        self.weights, self.columns = weights.to(dtype), torch.arange(len(a))
        self._blocks, self._size = blocks, len(a)
        self._importance = torch.ones(len(weights)) if importance is None else importance
        self._importance = self._importance.to(dtype)
        self._gone = torch.zeros(len(blocks), dtype=torch.bool)
        system = a.to(dtype, copy=True)
        system.diagonal().add_(damping)
        self._inverse = torch.cholesky_inverse(_factor(system))

    def prices(self) -> Tensor:
        """What removing each block alone costs, (units,); infinite for blocks that are gone."""
        at = self._places()[self._blocks[~self._gone]]  # live units, positions
        price = torch.full((len(self._blocks),), float("inf"), dtype=torch.float64)
        price[~self._gone] = self._costs(at).double()
        return price

    def remove(self, units: Tensor) -> float:
        """Remove blocks together; what that costs."""
        gone = self._places()[self._blocks[units]].flatten()
        self._gone[units] = True
        stays = torch.ones(len(self.columns), dtype=torch.bool)
        stays[gone] = False
        h, w = self._inverse, self.weights
        factor = _factor(h[gone[:, None], gone])
        cross, lost = h[gone][:, stays], w[:, gone].T  # (gone, stays), (gone, outputs)
        solved = torch.cholesky_solve(torch.cat([cross, lost], 1), factor)
        cross_solved, lost_solved = solved[:, : cross.shape[1]], solved[:, cross.shape[1] :]
        self.weights = w[:, stays] - lost_solved.T @ cross
        self._inverse = h[stays][:, stays].addmm_(cross.T, cross_solved, alpha=-1)
        self.columns = self.columns[stays]
        return float((lost * lost_solved).sum(0) @ self._importance)

    def full(self) -> Tensor:
        """The weights with zeros where inputs are gone, (o, k)."""
        return self.weights.new_zeros(len(self.weights), self._size).index_copy_(
            1, self.columns, self.weights
        )

    def _places(self) -> Tensor:
        place = torch.full((self._size,), -1, dtype=torch.long)
        place[self.columns] = torch.arange(len(self.columns))
        return place

    def _costs(self, at: Tensor) -> Tensor:
        inner = self._inverse[at[:, :, None], at[:, None, :]]
        parts = self.weights[:, at].permute(1, 2, 0)  # live units, positions, outputs
        each: Tensor = (parts * torch.linalg.solve(inner, parts)).sum(1)
        return each @ self._importance


def _systems(
    moments: Moments, mask: Tensor, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Outputs by the batch: (rows, support, weights on it, diagonal of the inverse); supports are padded.

    In float32, which is enough to rank weights; in float64 without the inverse, to solve for them.
    """
    outputs, size = mask.shape
    ranking = dtype == torch.float32
    a = (moments.a + moments.damping * torch.eye(size, dtype=torch.float64)).to(dtype)
    b = (moments.b + moments.damping * moments.before.double()).to(dtype)
    patterns, pattern = torch.unique(mask, dim=0, return_inverse=True)
    if 2 * len(patterns) <= outputs + 1:  # outputs share systems, as where whole inputs and outputs are gone
        for number, shared in enumerate(patterns):
            columns, rows = shared.nonzero().flatten(), (pattern == number).nonzero().flatten()
            if len(columns):
                factor = _factor(a[columns[:, None], columns])
                found = torch.cholesky_solve(b[rows[:, None], columns].T, factor).T
                spread = torch.cholesky_inverse(factor).diagonal() if ranking else torch.ones_like(found[0])
                yield rows, columns.expand(len(rows), -1), found, spread.expand(len(rows), -1)
        return
    counts = mask.sum(1)
    order = mask.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices
    by_length = counts.sort(stable=True).indices  # rows of one length share a batch without padding
    for start in range(0, outputs, _ROWS):
        rows = by_length[start : start + _ROWS]
        longest = int(counts[rows].max())
        if not longest:
            continue
        index = order[rows, :longest]
        real = (torch.arange(longest) < counts[rows, None]).to(dtype)
        system = a[index[:, :, None], index[:, None, :]] * real[:, :, None] * real[:, None, :]
        factor = _factor(system + torch.diag_embed(1 - real))
        found = torch.cholesky_solve((b[rows].gather(1, index) * real)[:, :, None], factor)[:, :, 0] * real
        spread = torch.ones_like(found)
        if ranking:  # squared columns of the inverse factor
            half = torch.linalg.solve_triangular(
                factor, torch.eye(longest, dtype=dtype).expand_as(factor), upper=False
            )
            spread = half.square().sum(1)
        yield rows, index, found, spread


def _factor(system: Tensor) -> Tensor:
    """The Cholesky factor; where rounding has made a system indefinite, of the system with more damping.

    Raises:
        ScoreError: no damping helps, as where numbers are not finite.
    """
    factor, info = torch.linalg.cholesky_ex(system)
    share = 1e-4
    while bool(info.any()):
        if share > 1e3 or not bool(system.isfinite().all()):
            raise ScoreError(
                "least squares: a layer's moments on the calibration images are not finite or not those of real "
                "numbers; check the weights and the images for NaN, and pass more images"
            )
        mean = system.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        eye = torch.eye(system.shape[-1], dtype=system.dtype)
        factor, info = torch.linalg.cholesky_ex(system + share * mean * eye)
        share *= 10
    result: Tensor = factor
    return result
