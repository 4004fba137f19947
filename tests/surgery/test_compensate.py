"""Least squares against the textbook, and compensation against what it promises."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur.graph.replay import Replay
from secateur.plan.weight_plan import top
from secateur.reconstruction.compensate import compensate, layers, reestimate, rows_of, see
from secateur.reconstruction.leastsquares import DAMPING, Moments, choose, solve
from tests.small import residual_net


def moments(
    rows: int = 200, k: int = 7, outputs: int = 4, seed: int = 0
) -> tuple[Moments, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=g, dtype=torch.float64) @ torch.randn(
        k, k, generator=g, dtype=torch.float64
    )
    w = torch.randn(outputs, k, generator=g, dtype=torch.float64)
    t = x @ w.T + 0.1 * torch.randn(rows, outputs, generator=g, dtype=torch.float64)
    zero = torch.zeros(k, dtype=torch.float64), torch.zeros(outputs, dtype=torch.float64)
    return Moments(x.T @ x / rows, t.T @ x / rows, t.square().mean(0), *zero, w), x, t


@pytest.mark.parametrize("shared", [False, True], ids=["each its own", "inputs and outputs gone"])
def test_each_output_is_the_least_squares_solution_on_its_support(shared: bool) -> None:
    m, x, t = moments()
    mask = torch.rand(1 if shared else 4, 7, generator=torch.Generator().manual_seed(1)) > 0.4
    mask = mask.repeat(4 // len(mask), 1)
    mask[2] = False
    found = solve(m, mask)
    damping = (DAMPING * m.a.diagonal().mean() * len(x)).sqrt()
    for w, before, keep, target in zip(found, m.before, mask, t.T, strict=True):
        assert (w[~keep] == 0).all()
        if keep.any():
            rows = torch.cat([x[:, keep], damping * torch.eye(int(keep.sum()), dtype=torch.float64)])
            goal = torch.cat([target, damping * before[keep]])
            assert torch.allclose(w[keep], torch.linalg.lstsq(rows, goal[:, None]).solution[:, 0], atol=1e-8)


def test_what_differs_between_images_is_trusted_less() -> None:
    """Weights solved on few images, rows of one image alike: on other images they err less than if all rows counted."""
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(48, 24, 1, bias=False).requires_grad_(False)
    mixing = torch.randn(48, 48, generator=g) * torch.linspace(0.1, 1, 48)

    def images(count: int) -> torch.Tensor:  # all positions of an image nearly the same
        x = torch.randn(count, 48, 1, 1, generator=g) + 0.1 * torch.randn(count, 48, 6, 6, generator=g)
        return torch.einsum("nihw,oi->nohw", x, mixing)

    few, others = images(24), images(300)
    replay = Replay(conv, few)
    mask = torch.ones_like(conv.weight, dtype=torch.bool)
    mask[:, ::2] = False
    (fitted,) = compensate(replay, list(few.split(16)), {"weight": mask}).fitted.values()
    (m,) = fitted.moments

    def missed(w: torch.Tensor) -> float:
        return float((F.conv2d(others, w.float().view_as(conv.weight)) - conv(others)).square().mean())

    errors = {
        share: missed(solve(replace(m, noise=share * m.noise), mask.flatten(1))) for share in (0, 1, 100)
    }
    assert m.damping > 20 * replace(m, noise=0.0).damping
    assert errors[1] < 0.7 * errors[0]
    assert errors[1] < errors[100]


def test_the_noise_of_moments_is_their_variance_over_draws_of_images() -> None:
    g = torch.Generator().manual_seed(0)
    mixing = torch.randn(40, 40, generator=g)
    linear = nn.Linear(40, 3)
    replay = Replay(linear, torch.zeros(2, 40))
    drawn = [torch.randn(50, 40, generator=g) @ mixing for _ in range(40)]
    found = [see(replay, list(x.split(25)))["weight"].inputs[0] for x in drawn]
    true = mixing.T.double() @ mixing.double()
    squared = [float((inner.a - true).square().sum()) for inner in found]
    noise = [inner.noise for inner in found]
    assert sum(noise) == pytest.approx(sum(squared), rel=0.1)


@pytest.mark.parametrize("seed", range(5))
def test_elimination_takes_the_weight_whose_loss_costs_least(seed: int) -> None:
    """Removing one weight at a time: each step's choice against trying every weight."""
    m, _, _ = moments(seed=seed, outputs=2, k=5)
    size = m.b.numel()
    mask = choose([m], size - 1, steps=1)
    costs = {}
    for row in range(2):
        for column in range(5):
            trial = torch.ones(2, 5, dtype=torch.bool)
            trial[row, column] = False
            costs[row, column] = m.error(solve(m, trial))
    assert tuple((~mask).nonzero()[0].tolist()) == min(costs, key=costs.__getitem__)


def test_masks_are_nested_and_exact() -> None:
    m, _, _ = moments()
    mask = choose([m], 20, steps=3)
    fewer = choose([m], 6, steps=3, mask=mask)
    assert (int(mask.sum()), int(fewer.sum())) == (20, 6)
    assert (fewer <= mask).all()
    assert not choose([m], 0).any()


def test_choosing_beats_magnitude_on_correlated_inputs() -> None:
    errors = []
    for seed in range(10):
        m, _, _ = moments(seed=seed)
        errors.append([m.error(solve(m, mask)) for mask in (choose([m], 10), top(m.before.abs(), 10))])
    ours, magnitude = torch.tensor(errors).mean(0)
    assert ours < 0.8 * magnitude


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, (3, 1), stride=(2, 1), padding=(1, 0)),
        nn.Conv2d(4, 6, 3, dilation=2, bias=False),
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.Conv1d(4, 6, 3, padding=1),
        nn.Linear(4, 6),
    ],
    ids=str,
)
@torch.no_grad()
def test_rows_times_weights_are_the_layers_outputs(layer: nn.Module) -> None:
    shape = {nn.Linear: (3, 4), nn.Conv1d: (3, 4, 30)}.get(type(layer), (3, 4, 20, 20))
    x = torch.randn(shape)
    program = Replay(layer.eval(), x)
    (found,) = layers(program)
    weight = program.tensor("weight")
    for phase in range(4):
        rows, targets = rows_of(found, x, layer(x), weight, phase)
        parts = [r @ w.T for r, w in zip(rows, weight.flatten(1).chunk(found.groups), strict=True)]
        bias = layer.bias if layer.bias is not None else 0.0
        assert torch.allclose(torch.cat(parts, 1) + bias, targets, atol=1e-5)


@torch.no_grad()
def test_the_dense_network_stays_as_it_is() -> None:
    model, x = residual_net()
    program = Replay(model, x)
    whole = {
        layer.weight: torch.ones_like(program.tensor(layer.weight), dtype=torch.bool)
        for layer in layers(program)
    }
    assert set(whole) == {"stem.weight", "block.conv1.weight", "block.conv2.weight", "fc.weight"}
    result = compensate(program, [x[:8], x[8:]], whole)
    assert torch.allclose(program(x, result.tensors), model(x), atol=1e-3)


def masked(model: nn.Module, program: Replay, keep: float) -> dict[str, torch.Tensor]:
    return {
        layer.weight: top(
            program.tensor(layer.weight).detach().abs(), round(keep * program.tensor(layer.weight).numel())
        )
        for layer in layers(program)
    }


@pytest.mark.parametrize("keep", [0.3, 0.6])
@torch.no_grad()
def test_no_layer_is_reconstructed_worse_than_without(keep: float) -> None:
    model, x = residual_net()
    program = Replay(model, x)
    masks = masked(model, program, keep)
    result = compensate(program, [x], masks)
    for name, fitted in result.fitted.items():
        plain = program.tensor(name) * masks[name]
        assert (result.tensors[name][~masks[name]] == 0).all()
        assert fitted.error(result.tensors[name]) <= fitted.error(plain) + 1e-6
    plain = {name: program.tensor(name) * mask for name, mask in masks.items()}
    wrong, right = (F.mse_loss(program(x, t), model(x)) for t in (plain, result.tensors))
    assert right < 0.5 * wrong


@torch.no_grad()
def test_a_sum_makes_up_for_what_its_other_branch_lost() -> None:
    """Only the stem is pruned; solving the whole block's second convolution again repairs part of the sum."""
    model, x = residual_net()
    program = Replay(model, x)
    masks = masked(model, program, 0.3)
    one = compensate(program, [x], {"stem.weight": masks["stem.weight"]})
    whole = torch.ones_like(masks["block.conv2.weight"])
    two = compensate(program, [x], {"stem.weight": masks["stem.weight"], "block.conv2.weight": whole})
    assert F.mse_loss(program(x, two.tensors), model(x)) < F.mse_loss(program(x, one.tensors), model(x))


@torch.no_grad()
def test_reestimated_norms_have_the_statistics_of_their_inputs() -> None:
    model, x = residual_net()
    program = Replay(model, x)
    change = {"stem.weight": 0.5 * program.tensor("stem.weight")}
    result = reestimate(program, [x[:8], x[8:]], change)
    other = copy.deepcopy(model)
    other.load_state_dict(model.state_dict() | change)
    for module in other.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    other.bn.train()  # type: ignore[union-attr,operator]
    other(x)
    expected = other.bn.running_mean  # type: ignore[union-attr]
    assert torch.allclose(result["bn.running_mean"], expected, atol=1e-5)
    assert set(result) - set(change) == {
        f"{bn}.running_{s}" for bn in ("bn", "block.bn1", "block.bn2") for s in ("mean", "var")
    }
    assert not torch.equal(program(x, result), program(x, change))


@torch.no_grad()
def test_the_model_is_only_read() -> None:
    model, x = residual_net()
    before = copy.deepcopy(model.state_dict())
    program = Replay(model, x)
    compensate(program, [x], masked(model, program, 0.4))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
