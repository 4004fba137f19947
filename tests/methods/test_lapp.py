"""LAPP against its equations and the traps of a reconstruction."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur import Budget, Cost, analyze
from secateur.engine.decay import Decay, Restore
from secateur.engine.session import Session
from secateur.errors import ModelError, SecateurError
from secateur.export import export_onnx
from secateur.methods.lapp import LAPP, State, Step
from secateur.recipes.models import build_model
from secateur.surgery.bypass import Bypass, Side, add_bypass_, fold_bypass_, written_out
from tests.methods.examples import INPUTS, STEPS, Residual, lapp
from tests.methods.test_training_methods import loop

SIDE = [("blocks.0.conv1", "blocks.0.bn1"), ("blocks.1.conv1", "blocks.1.bn1")]


def attached(session: Session[State]) -> Session[State]:
    return session.attach(torch.optim.SGD(session.model.parameters(), lr=0.05))


def make(**options: Any) -> Session[State]:
    return lapp(**options)(Residual())


def test_which_layers_lose_units() -> None:
    full = LAPP(bypass="full").start(
        build_model("resnet20"), torch.zeros(1, 3, 32, 32), budget=Budget(macs=0.5), steps=10
    )
    names = {full.whole.groups[n].name for n in full.targets}
    assert names == {f"layer{s}.{b}.conv{c}.conv" for s in (1, 2, 3) for b in range(3) for c in (1, 2)}
    inner = LAPP(bypass="shared").start(
        build_model("resnet20"), torch.zeros(1, 3, 32, 32), budget=Budget(macs=0.5), steps=10
    )
    names = {inner.whole.groups[n].name for n in inner.targets}
    assert names == {f"layer{s}.{b}.conv1" for s in (1, 2, 3) for b in range(3)}


def test_costs_of_the_bypass_are_counted() -> None:
    """3.8 % of the MACs of ResNet-20 for a depthwise bypass beside every 3 × 3 convolution of the blocks."""
    model = build_model("resnet20")
    session = LAPP(bypass="full").start(model, torch.zeros(1, 3, 32, 32), budget=Budget(macs=0.5), steps=10)
    counted = Cost(analyze(model, torch.zeros(1, 3, 32, 32))).macs()
    assert session.cost.macs() == counted
    assert counted / session.dense.macs() == pytest.approx(1.038, abs=5e-4)


def test_gates_equal_removal() -> None:
    """The gated network in evaluation mode is the network with the gated units cut out."""
    for bypass in ("full", "none"):
        session = make(bypass=bypass)
        model = session.model
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):  # a shift that would survive a mask before the norm
                nn.init.normal_(module.bias)
                nn.init.uniform_(module.running_var, 0.5, 2)
        x = torch.randn(4, 3, 8, 8)
        with attached(session), torch.no_grad():
            session.own.threshold.fill_(0.0)
            gated = model.eval()(x)
            keep = [torch.ones(g.units, dtype=torch.bool) for g in session.graph.groups]
            for number, mask in zip(session.targets, session.method.masks(session), strict=True):
                keep[number] = mask >= 0.5
            assert not all(k.all() for k in keep)
            session.cut(keep)
        torch.testing.assert_close(model(x), gated, rtol=1e-5, atol=1e-5)


def test_without_weight_and_task_gradient_thresholds_stay() -> None:
    session = make(weight=0.0, task_gradient=False, prune_share=1.0)
    optimizer = torch.optim.SGD(session.model.parameters(), lr=0.05, weight_decay=0.1)
    with session.attach(optimizer):
        loop(session, optimizer, STEPS - 1)
    assert torch.equal(session.own.threshold, torch.full_like(session.own.threshold, -3.0))


def test_a_higher_weight_raises_thresholds() -> None:
    reached = []
    for weight in (0.5, 50.0):
        session = make(weight=weight, threshold_optimizer="sgd", threshold_lr=0.02, prune_share=1.0)
        optimizer = torch.optim.SGD(session.model.parameters(), lr=0.05)
        with session.attach(optimizer):
            loop(session, optimizer, STEPS - 1)
        reached.append(session.own.threshold.detach()[session.targets].mean().item())
    assert reached[1] > reached[0]


def test_before_thresholds_move_training_is_that_of_the_dense_network_with_bypass() -> None:
    session = make(wait_share=0.9, prune_share=0.1, weight=0.0)
    plain = copy.deepcopy(session.model)
    optimizer = torch.optim.SGD(session.model.parameters(), lr=0.05)
    with session.attach(optimizer):
        loop(session, optimizer, 4)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05)
    torch.manual_seed(0)
    for _ in range(4):
        x, y = torch.randn(16, 3, 8, 8), torch.arange(16) % 3
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
    for a, b in zip(plain.parameters(), session.model.parameters(), strict=True):
        assert torch.equal(a, b)


def separable() -> nn.Sequential:
    """A network whose every hidden unit is an output of its own, so that what one is worth is known."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.Conv2d(4, 16, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 1),
    )
    nn.init.dirac_(model[4].weight)
    return model


@pytest.mark.parametrize(
    ("slope", "make"), [("soft", separable), ("soft", Residual), ("sigmoid", separable), ("dst", separable)]
)
@pytest.mark.parametrize(("goal", "sign"), [(-3.0, 1), (1.0, -1)])
def test_the_task_pulls_thresholds_to_where_they_should_be(
    slope: str, make: Callable[[], nn.Module], goal: float, sign: int
) -> None:
    """The task is what the network computes with one threshold elsewhere: the gradient points there.

    The slope of the soft network is also compared with finite differences of its loss.
    """
    session = LAPP(bypass="none", slope=slope).start(make(), INPUTS, budget=Budget(macs=0.6), steps=9)
    torch.manual_seed(0)
    x = torch.randn(64, 3, 8, 8)
    model = session.model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    with attached(session):
        for number in session.targets:
            with torch.no_grad():
                session.own.threshold.fill_(-3.0)
                session.own.threshold[number] = goal
                wanted = model(x)
                session.own.threshold[number] = here = 0.1 - 0.3 * sign

            def loss(tau: float, number: int = number, wanted: torch.Tensor = wanted) -> torch.Tensor:
                session.own.threshold.data[number] = tau
                return F.mse_loss(model(x), wanted)

            session.own.threshold.grad = None
            loss(here).backward()
            slope_here = session.own.threshold.grad[number].item()
            assert slope_here * sign > 0
            if slope == "soft":
                difference = (loss(here + 1e-2) - loss(here - 1e-2)).item() / 2e-2
                assert slope_here == pytest.approx(difference, rel=0.02)


def test_one_threshold_that_is_not_learned_follows_the_target() -> None:
    session = make(learn=False, prune_share=1.0)
    optimizer = torch.optim.SGD(session.model.parameters(), lr=0.05)
    keep = session.limits["macs"] / session.dense.macs()
    with session.attach(optimizer):
        for step in range(1, STEPS):
            loop(session, optimizer, 1)
            goal = keep + (1 - keep) * (1 - step / STEPS) ** 3
            tau = session.own.threshold[0].item()
            assert (session.own.threshold == tau).all()
            shares = []
            for value in (tau, tau - 0.01):  # just on target; a little lower, over it or no further unit
                session.own.threshold.data.fill_(value)
                counts = [group.units for group in session.whole.groups]
                for number, mask in zip(session.targets, session.method.masks(session), strict=True):
                    counts[number] = int(mask.sum())
                shares.append(session.cost.macs(counts) / session.dense.macs())
            session.own.threshold.data.fill_(tau)
            assert shares[0] <= goal
            assert shares[1] > goal or shares[1] == shares[0]


def test_thresholds_wait_at_first() -> None:
    session = make(wait_share=STEPS // 2 / STEPS, prune_share=0.5)
    optimizer = torch.optim.SGD(session.model.parameters(), lr=0.05)
    with session.attach(optimizer):
        loop(session, optimizer, STEPS // 2)
        assert (session.own.threshold == -3).all()
        loop(session, optimizer, 1)
        assert (session.own.threshold[session.targets] != -3).all()


@pytest.mark.parametrize("form", ["full", "none"])
def test_a_scaled_loss_moves_thresholds_as_an_unscaled_one(form: str) -> None:
    reached = []
    for scale in (1.0, 2.0**16):
        torch.manual_seed(0)
        session = make(bypass=form, threshold_optimizer="sgd", threshold_lr=0.5, prune_share=1.0)
        optimizer = torch.optim.SGD(session.model.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        with session.attach(optimizer, scaler=scaler):
            for step in range(6):
                x, y = torch.randn(16, 3, 8, 8), torch.arange(16) % 3
                scaler.scale(F.cross_entropy(session.model(x), y) + session.penalty()).backward()
                if step == 3:  # overflows of a method's own gradients are not the scaler's to see
                    session.own.threshold.grad[session.targets[0]] = math.inf
                scaler.unscale_(optimizer)
                session.before_step()
                scaler.step(optimizer)
                scaler.update()
                session.after_step()
                optimizer.zero_grad()
        assert session.step == 6
        reached.append(session.own.threshold.detach().clone())
    assert (reached[0][session.targets] != -3).all()
    torch.testing.assert_close(reached[0], reached[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_masked_unit_behind_a_relu_has_a_gradient(dtype: torch.dtype) -> None:
    session = make(bypass="none")
    with attached(session):
        session.own.threshold.data.fill_(0.0)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = session.model.train()(torch.randn(16, 3, 8, 8)).square().sum()
        session.own.threshold.grad = None
        with_masked = torch.autograd.grad(loss, session.passed, retain_graph=True)
        for gradient, mask in zip(with_masked, session.passed, strict=True):
            gone = mask == 0
            assert gone.any()
            assert (gradient[gone] != 0).float().mean() > 0.9


def test_slopes_of_the_step() -> None:
    x = torch.tensor([-2.0, -0.7, -0.2, 0.0, 0.2, 0.7, 2.0], requires_grad=True)
    y = Step.apply(x, "dst", 0.5)
    assert y.tolist() == [0, 0, 0, 1, 1, 1, 1]
    y.sum().backward()
    assert x.grad.tolist() == pytest.approx([0, 0.4, 1.2, 2, 1.2, 0.4, 0])
    x.grad = None
    Step.apply(x, "sigmoid", 0.5).sum().backward()
    q = torch.sigmoid(x.detach() / 0.5)
    torch.testing.assert_close(x.grad, q * (1 - q) / 0.5)


def test_penalty_equals_its_equation() -> None:
    session = make(weight=3.0, prune_share=1.0)
    with attached(session):
        session.step = 14
        with torch.no_grad():
            session.own.threshold.fill_(-0.5)
        session.model(torch.randn(2, 3, 8, 8))
        counts = [group.units for group in session.whole.groups]
        for number, mask in zip(session.targets, session.method.masks(session), strict=True):
            counts[number] = int(mask.sum())
        keep = session.limits["macs"] / session.dense.macs()
        goal = keep + (1 - keep) * (1 - 14 / STEPS) ** 3
        expected = 3.0 * max(0.0, session.cost.macs(counts) / session.dense.macs() - goal)
        assert expected > 0
        assert session.penalty().item() == pytest.approx(expected, rel=1e-5)
        session.penalty().backward()
        assert (session.own.threshold.grad[session.targets] < 0).all()  # raising a threshold makes it cheaper


@pytest.mark.parametrize("kind", ["depthwise", "pointwise"])
@pytest.mark.parametrize("inputs", [8, 12, 6])
@pytest.mark.parametrize("size", [3, (1, 5)])
def test_a_shared_bypass_folds_exactly(inputs: int, kind: Side, size: int | tuple[int, int]) -> None:
    torch.manual_seed(0)
    padding = 1 if size == 3 else (0, 4)
    conv, norm = nn.Conv2d(inputs, 12, size, 2, padding, (1, 1 if size == 3 else 2)), nn.BatchNorm2d(12)
    model = nn.Sequential(conv, norm, nn.ReLU()).double()
    layers = [("0", "1")]
    add_bypass_(model, layers, "shared", kind)
    assert isinstance(model[0], Bypass)
    assert model[0].side.groups == (math.gcd(inputs, 12) if kind == "depthwise" else math.gcd(inputs, 4))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    x = torch.randn(2, inputs, 9, 9, dtype=torch.float64)
    expected = model.eval()(x)
    fold_bypass_(model, layers)
    assert model[0] is conv
    assert model[1] is norm
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Using padding")
def test_a_pointwise_side_needs_a_centre_to_fold_into() -> None:
    for conv in (nn.Conv2d(8, 8, 2, padding=1, dilation=2), nn.Conv2d(8, 8, 2, padding="same", dilation=3)):
        with pytest.raises(ModelError, match="pointwise bypass needs"):
            add_bypass_(nn.Sequential(conv, nn.BatchNorm2d(8)), [("0", "1")], "shared", "pointwise")
    model = nn.Sequential(nn.Conv2d(8, 8, 4, padding="same"), nn.BatchNorm2d(8)).eval()
    add_bypass_(model, [("0", "1")], "shared", "pointwise")
    x = torch.randn(2, 8, 6, 6)
    expected = model(x)
    fold_bypass_(model, [("0", "1")])
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(8, affine=False), nn.BatchNorm2d(8, track_running_stats=False)]
)
def test_a_shared_side_needs_a_norm_to_fold_into(norm: nn.BatchNorm2d) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm)
    with pytest.raises(ModelError, match="affine=True and track_running_stats=True"):
        add_bypass_(model, [("0", "1")], "shared")
    assert type(model[0]) is nn.Conv2d


def test_other_norms_are_converted_afterwards() -> None:
    with pytest.raises(ModelError, match="after the bypass is there"):
        add_bypass_(nn.Sequential(nn.Conv2d(3, 8, 3), nn.SyncBatchNorm(8)), [("0", "1")], "full")


def test_written_out_kernels() -> None:
    conv = nn.Conv2d(6, 4, 3, groups=2, bias=False)
    whole = nn.Conv2d(6, 4, 3, bias=False)
    whole.weight.data = written_out(conv, (3, 3))
    x = torch.randn(1, 6, 5, 5)
    torch.testing.assert_close(whole(x), conv(x))


def test_a_pointwise_side_stands_beside_convolutions_that_keep_the_size() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding="same"), nn.BatchNorm2d(8)
    )
    with pytest.raises(ModelError, match="0: a pointwise bypass needs"):
        add_bypass_(model, [("2", "3"), ("0", "1")], "full", "pointwise")
    assert type(model[2]) is nn.Conv2d
    x = torch.randn(2, 8, 6, 6)
    expected = model.eval()[3](model[2](x))
    add_bypass_(model, [("2", "3")], "full", "pointwise", start=0.0)
    torch.testing.assert_close(model.eval()[2](x), expected)


def test_a_full_bypass_starts_as_a_plain_sum_and_scatters_after_a_cut() -> None:
    session = make(remove_every=2)
    optimizer = torch.optim.SGD(session.model.parameters(), lr=0.05)
    with session.attach(optimizer):
        loop(session, optimizer, STEPS)
    bypasses = [m for m in session.model.modules() if isinstance(m, Bypass)]
    assert any(len(m.index) < m.side.out_channels for m in bypasses)
    for bypass in bypasses:
        assert bypass.conv.out_channels == len(bypass.index) == bypass.norm.num_features
        x = torch.randn(2, bypass.conv.in_channels, 8, 8)
        main, side = bypass.norm(bypass.conv(x)), bypass.side_norm(bypass.side(x))
        expected = side.clone()
        for row, position in enumerate(bypass.index.tolist()):
            expected[:, position] += main[:, row]
        torch.testing.assert_close(bypass(x), expected)


def test_the_history_tells_how_it_went() -> None:
    session = make()
    optimizer = torch.optim.SGD(session.model.parameters(), lr=0.05)
    with session.attach(optimizer):
        loop(session, optimizer, STEPS)
    steps = [point["step"] for point in session.history]
    assert steps == sorted(steps)
    assert steps[-1] == session.own.prune_steps
    assert session.history[-1]["macs"] <= 0.6
    layers = session.history[-1]["layers"]
    assert sum(layers.values()) == session.count("macs")
    assert layers["head"] == session.cost.layers()["head"]
    assert set(session.history[0]["threshold"]) == {session.whole.groups[n].name for n in session.targets}


def test_units_fade_and_come_back_by_equal_steps() -> None:
    """The gate of a unit under its threshold closes over N steps; a unit that comes back opens it again."""
    session = attached(make(removal=Decay(steps=4), bypass="none", learn=False, prune_share=0.8))
    session.limits = {}  # nothing has to go
    number = session.targets[0]
    low = session.method.importance(session, number).argmin()
    gate = []
    for tau in (-9.0, *[0.0] * 3, -9.0, *[0.0] * 6):
        session.own.threshold.data.fill_(tau)
        session.method.move_gates(session)
        gate.append(float(session.own.levels[0][low]))
    assert gate == pytest.approx([1, 0.75, 0.5, 0.25, 0.5, 0.25, 0, 0, 0, 0, 0], abs=1e-5)
    assert gate[6] == 0
    assert session.own.levels[0][session.method.importance(session, number).argmax()] == 1


def test_the_last_units_fade_after_landing() -> None:
    torch.manual_seed(0)
    session = make(removal=Decay(steps=4), wait_share=0.4, prune_share=0.01)
    optimizer = torch.optim.SGD(session.model.parameters(), lr=0.05)
    with session.attach(optimizer):
        loop(session, optimizer, session.own.start + session.own.prune_steps)
        assert session.count("macs") == session.cost.macs()  # decided, not cut
        loop(session, optimizer, 2)
        gone = [~session.own.decided[number] for number in session.targets]  # type: ignore[index]
        assert any(((level > 0) & mask).any() for level, mask in zip(session.own.levels, gone, strict=True))
        loop(session, optimizer, 1)
        assert session.count("macs") <= session.limits["macs"]
        loop(session, optimizer, STEPS - session.step)
    assert session.finish().proof.ok
    with pytest.raises(SecateurError, match="beyond step"):
        make(removal=Decay(steps=STEPS))
    with pytest.raises(SecateurError, match="without restore"):
        make(removal=Decay(steps=2, restore=Restore()))


@pytest.mark.parametrize(
    "options",
    [
        {"bypass": "wide"},
        {"side": "deep"},
        {"side_start": -1},
        {"score": "l3"},
        {"prune_share": 0},
        {"temperature": -1},
        {"weight": "x"},
        {"remove_every": 0},
        {"remove_every": 2.5},
        {"threshold_lr": math.inf},
        {"learn": "no"},
        {"removal": 4},
    ],
)
def test_bad_options_are_named(options: dict[str, object]) -> None:
    with pytest.raises(SecateurError, match=next(iter(options))):
        make(**options)


def test_a_network_without_norms_needs_no_bypass() -> None:
    def plain() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 3))

    with pytest.raises(ModelError, match="bypass='none'"):
        LAPP(bypass="full").start(plain(), INPUTS, budget=Budget(macs=0.8), steps=9)
    session = LAPP(bypass="none", prune_share=0.5).start(plain(), INPUTS, budget=Budget(macs=0.8), steps=9)
    optimizer = torch.optim.SGD(session.model.parameters(), lr=0.01)
    with session.attach(optimizer):
        for _ in range(9):
            optimizer.zero_grad()
            (session.model(torch.randn(4, 3, 8, 8)).square().mean() + session.penalty()).backward()
            session.before_step()
            optimizer.step()
            session.after_step()
    assert session.finish().proof.ok


def test_a_bypass_that_kept_everything_is_exported_with_its_side(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    add_bypass_(model, [("0", "1")], "full")
    check = export_onnx(model.eval(), torch.randn(1, 3, 8, 8), tmp_path / "model.onnx")
    assert check.max_rel_error < 1e-5
