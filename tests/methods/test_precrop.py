"""PreCropping, PreConfig, and the arms they are compared with."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import secateur as sc
from secateur import Budget, Cost, analyze, prune
from secateur.engine.method import Context
from secateur.errors import BudgetError, SecateurError
from secateur.export import export_onnx
from secateur.graph import Graph
from secateur.methods.at_init import draw_filters, draw_weights
from secateur.methods.precrop import PreConfig, PreCrop
from secateur.methods.precrop.design import DENSITIES, design
from secateur.recipes.models import build_model
from secateur.recipes.models.densenet import CifarDenseNet
from secateur.recipes.models.mobilenet import CifarMobileNetV2
from secateur.recipes.models.resnet import CifarResNet
from secateur.recipes.models.shufflenet import CifarShuffleNetV2
from secateur.recipes.models.vgg import CifarVGG16
from secateur.scores.at_init import WEIGHT_SCORES
from secateur.surgery.part import Part
from tests.oracles import counted_macs, counted_params

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
DATA = [(X, torch.tensor([0, 1]))]


@pytest.fixture(scope="module")
def resnet8() -> nn.Module:
    torch.manual_seed(0)
    return build_model("resnet8")


@pytest.fixture(scope="module")
def graph(resnet8: nn.Module) -> Graph:
    return analyze(resnet8, X)


@pytest.mark.parametrize("densities", DENSITIES)
@pytest.mark.parametrize(
    "budget", [Budget(macs=0.5), Budget(params=0.5), Budget(macs=0.6, params=0.5)], ids=str
)
def test_every_source_of_densities_meets_every_budget(
    resnet8: nn.Module, graph: Graph, densities: str, budget: Budget
) -> None:
    limits = budget.limits({m: Cost(graph).of(m) for m in budget.bounds})
    found = design(
        resnet8, X, graph, limits, PreCrop(densities=densities, draws=1, round_to=1), Context(DATA)
    )
    spent = {"macs": found.after["macs"], "params": found.after["params"]}
    assert all(spent[m] <= limit for m, limit in limits.items())
    assert any(spent[m] > 0.97 * limit for m, limit in limits.items())
    assert all(0 < p <= 1 for p in found.densities.values())


@pytest.mark.parametrize("streams", ["keep", "shared"])
def test_the_narrow_network_is_what_the_design_says(resnet8: nn.Module, streams: str) -> None:
    before = {name: t.clone() for name, t in resnet8.state_dict().items()}
    pruned = prune(resnet8, X, budget=Budget(macs=0.4), method="precrop", streams=streams, seed=5)
    assert pruned.proof.ok
    assert counted_macs(pruned.model, X) == pruned.after["macs"] <= 0.4 * pruned.before["macs"]
    assert counted_params(pruned.model) == pruned.after["params"]
    assert (pruned.model.block1.conv2.out_channels == 16) == (streams == "keep")
    w = pruned.model.block3.conv1.weight
    assert w.std().item() == pytest.approx((2 / (9 * w.shape[0])) ** 0.5, rel=0.1)  # by its new fan-out
    assert all(torch.equal(t, before[name]) for name, t in resnet8.state_dict().items())
    again = prune(resnet8, X, budget=Budget(macs=0.4), method="precrop", streams=streams, seed=5)
    assert all(
        torch.equal(p, q) for p, q in zip(pruned.model.parameters(), again.model.parameters(), strict=True)
    )


FAMILIES = {
    "resnet": lambda: CifarResNet(1, "B"),
    "mobilenet": lambda: CifarMobileNetV2(width=0.25),
    "densenet": lambda: CifarDenseNet(4, (2, 2, 2)),
    "shufflenet": lambda: CifarShuffleNetV2((8, 16, 32), last=64),
    "vgg": lambda: CifarVGG16(widths=(8, 8, 12, 12, 16, 16, 16, 24, 24, 24, 24, 24, 24)),
    "grouped": lambda: nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        Block(nn.Conv2d(16, 12, 1), nn.Conv2d(12, 24, 3, padding=1, groups=3), nn.Conv2d(24, 16, 1)),
        nn.Conv2d(16, 128, 3, stride=8),
        nn.Conv2d(128, 16, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    ),
}


class Block(nn.Module):
    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


@pytest.mark.parametrize("method", ["precrop", "preconfig"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_block_changes_its_widths(family: str, method: str) -> None:
    torch.manual_seed(0)
    model, x = (
        FAMILIES[family](),
        torch.randn(2, 3, 32 if family == "vgg" else 16, 32 if family == "vgg" else 16),
    )
    pruned = prune(model, x, budget=Budget(params=0.6), method=method, round_to=1)
    assert pruned.proof.ok
    assert counted_macs(pruned.model, x) == pruned.after["macs"]
    assert counted_params(pruned.model) == pruned.after["params"]
    assert 0.5 < pruned.after["params"] / pruned.before["params"] <= 0.6
    assert pruned.after["macs"] <= pruned.before["macs"]
    if method == "preconfig":
        widths = pruned.plan.origin["widths"]
        units = {group.name: group.units for group in analyze(model, x).groups}
        assert any(widths[name] > units[name] for name in units)
    loss = pruned.model.train()(x).square().mean()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in pruned.model.parameters() if p.grad is not None)


@pytest.mark.parametrize("family", ["resnet", "mobilenet", "grouped"])
def test_layers_read_and_write_the_first_channels_of_a_stream(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = FAMILIES[family](), torch.randn(2, 3, 16, 16)
    pruned = prune(model, x, budget=Budget(macs=0.4), method="precrop", streams="part", round_to=1)
    assert pruned.proof.ok
    assert counted_macs(pruned.model, x) == pruned.after["macs"] <= 0.4 * pruned.before["macs"]
    assert counted_params(pruned.model) == pruned.after["params"]
    parts = [m for m in pruned.model.modules() if isinstance(m, Part)]
    assert {part.side for part in parts} == {"reads", "writes"}
    assert all(part.index.equal(torch.arange(len(part.index))) for part in parts)
    written = next(part for part in parts if part.stream and len(part.index) < part.stream)
    seen: list[torch.Tensor] = []
    written.register_forward_hook(lambda _, __, y: seen.append(y))
    answer = pruned.model.eval()(x)
    assert seen[0].shape[1] == written.stream
    assert not seen[0][:, len(written.index) :].any()
    assert seen[0][:, : len(written.index)].any()
    sc.save(pruned.model, tmp_path / "m.safetensors")
    again = sc.load(FAMILIES[family](), tmp_path / "m.safetensors")
    assert torch.equal(again.eval()(x), answer)
    assert export_onnx(again, x, tmp_path / "m.onnx").static_because is None


def test_given_densities_are_of_the_layers_as_the_model_names_them() -> None:
    layers = ["layer2.0.conv1", "layer2.0.conv2"]
    torch.manual_seed(0)
    how = PreCrop(densities=dict.fromkeys(layers, 0.25), streams="part", round_to=1)
    pruned = how.prune(CifarResNet(2, "B"), X, None, Context())
    conv = pruned.model.layer2[0].conv1.layer
    assert (conv.in_channels, conv.out_channels) == (8, 16)
    assert pruned.model.layer2[0].conv2.out_channels == 16
    assert pruned.model.layer3[1].conv1.layer.in_channels == 64


def test_the_gates_of_squeeze_excitation_are_no_residual_stream() -> None:
    vision = pytest.importorskip("torchvision")
    model, x = vision.models.regnet_y_400mf(), torch.randn(1, 3, 64, 64)  # no stage at 1 × 1
    g = analyze(model, x)
    found = design(model, x, g, {"macs": Cost(g).macs() // 2}, PreCrop(round_to=1))
    widths = dict(zip((group.name for group in g.groups), found.widths, strict=True))
    units = {group.name: group.units for group in g.groups}
    for name, count in units.items():
        share = widths[name] / count
        if name.endswith("se.fc1"):  # follows the hidden width, up to rounding
            hidden = widths.get(name[: -len("se.fc1")] + "b.0", widths[name[: -len("se.fc1")] + "a.0"])
            whole = units.get(name[: -len("se.fc1")] + "b.0", units[name[: -len("se.fc1")] + "a.0"])
            assert abs(share - hidden / whole) < 2 / count + 2 / whole
        elif name.startswith("stem") or name.endswith("proj.0"):
            assert share == 1
    assert any(widths[name] < count for name, count in units.items() if name.endswith("f.a.0"))


def test_a_shared_share_of_a_residual_network_is_the_plain_narrow_one() -> None:
    dense, narrow = CifarResNet(1), CifarResNet(1, widths=(8, 16, 32))
    names = [name for name, m in dense.named_modules() if isinstance(m, nn.Conv2d)]
    budget = Budget(params=counted_params(narrow))
    pruned = prune(
        dense, X, budget=budget, method="precrop", densities=dict.fromkeys(names, 0.25), streams="shared"
    )
    theirs = {name: t.shape for name, t in narrow.state_dict().items()}
    assert {name: t.shape for name, t in pruned.model.state_dict().items()} == theirs
    narrow.load_state_dict(pruned.model.state_dict())
    assert torch.equal(narrow.eval()(X), pruned.model.eval()(X))


def test_equal_layers_get_equal_widths() -> None:
    dense = CifarResNet(3)
    g = analyze(dense, X)
    found = design(dense, X, g, {"macs": Cost(g).macs() // 2}, PreCrop(round_to=4))
    widths = dict(zip((group.name for group in g.groups), found.widths, strict=True))
    assert abs(widths["layer1.0.conv1"] - widths["layer1.1.conv1"]) <= 4
    assert abs(widths["layer3.1.conv1"] - widths["layer3.2.conv1"]) <= 4


@pytest.mark.parametrize("densities", [0.5, 0.2])
def test_the_arms_of_the_comparison_keep_as_many_weights(resnet8: nn.Module, densities: float) -> None:
    pruned = prune(resnet8, X, budget=Budget(params=densities), method="precrop")
    p = pruned.plan.origin["densities"]
    cropped = sum(m.weight.numel() for n, m in pruned.model.named_modules() if n in p)
    for make in (draw_weights, draw_filters):
        plan = make(resnet8, p, seed=1)
        assert plan.kept == pytest.approx(cropped, rel=0.05)
        for name, share in p.items():
            mask = plan.masks[f"{name}.weight"]
            step = 1 / len(mask) if make is draw_filters else 1 / mask.numel()
            assert abs(mask.float().mean().item() - share) <= step
        masked = copy.deepcopy(resnet8)
        with plan.holding(masked):
            optimizer = torch.optim.SGD(masked.parameters(), 0.1, momentum=0.9)
            for _ in range(2):
                nn.functional.cross_entropy(masked(X), DATA[0][1]).backward()
                optimizer.step()
        assert all((dict(masked.named_parameters())[n][~mask] == 0).all() for n, mask in plan.masks.items())
    filters = draw_filters(resnet8, p).masks["block3.conv2.weight"].flatten(1).float().mean(1)
    assert set(filters.tolist()) <= {0.0, 1.0}


def test_given_densities_need_no_budget(resnet8: nn.Module) -> None:
    p = {"block3.conv1": 0.3, "block3.conv2": 0.5}
    pruned = PreCrop(densities=p, round_to=1).prune(resnet8, X, None, Context())
    sizes = {name: dict(resnet8.named_parameters())[f"{name}.weight"].numel() for name in p}
    gone = sum((1 - p[name]) * size for name, size in sizes.items())
    assert pruned.before["params"] - pruned.after["params"] >= gone
    assert pruned.before["params"] - pruned.after["params"] < gone + 1000  # one channel of the last block
    assert pruned.model.block1.conv1.out_channels == 16


@pytest.mark.parametrize("score", WEIGHT_SCORES)
@pytest.mark.parametrize("budget", [Budget(macs=0.3), Budget(params=0.1)], ids=str)
def test_masks_before_training_meet_the_budget(resnet8: nn.Module, score: str, budget: Budget) -> None:
    sparse = prune(resnet8, X, budget=budget, method="at-init", score=score, data=DATA, rounds=5)
    ((measure, share),) = budget.bounds.items()
    before, after = sparse.before[measure], sparse.after[measure]
    assert 0.99 * share < after / before <= share
    zeros = sum(int((p == 0).sum()) for n, p in sparse.model.named_parameters() if n in sparse.plan.masks)
    assert zeros == sparse.plan.weights - sparse.plan.kept == sparse.before["params"] - sparse.after["params"]


def test_frozen_layers_keep_their_weights(resnet8: nn.Module) -> None:
    sparse = prune(
        resnet8,
        X,
        budget=Budget(params=0.8),
        method="at-init",
        score="magnitude",
        freeze=["block1", "*.conv2"],
    )
    assert not {"block1.conv1", "block2.conv2"} & sparse.facts["densities"].keys()
    assert "block2.conv1" in sparse.facts["densities"]


def test_preconfig_grows_some_layers_within_both_budgets() -> None:
    dense = CifarResNet(1)
    pruned = prune(dense, X, budget=Budget(params=0.7), method="preconfig", cap=2.0, round_to=1)
    widths = pruned.plan.origin["widths"]
    assert widths["layer1.0.conv1"] > 16
    assert widths["layer3.0.conv1"] < 64
    assert pruned.proof.ok
    assert (
        counted_macs(pruned.model, X)
        == pruned.after["macs"]
        <= pruned.before["macs"]
        == counted_macs(dense, X)
    )
    assert counted_params(pruned.model) == pruned.after["params"] <= 0.7 * pruned.before["params"]
    assert pruned.model(X).shape == (2, 10)
    assert (
        max(
            prune(dense, X, budget=Budget(params=0.7), method="preconfig", cap=1.0)
            .plan.origin["widths"]
            .values()
        )
        <= 64
    )


def test_densities_of_layers_that_cannot_change_have_no_say(resnet8: nn.Module, graph: Graph) -> None:
    """Streams are kept, so the first layer and the classifier are as they are; others do not pay for them."""
    own = {"block3.conv1": 0.5}
    assert design(
        resnet8, X, graph, {}, PreCrop(densities=own | {"conv1": 0.1, "fc": 0.1}, round_to=1)
    ).widths == (design(resnet8, X, graph, {}, PreCrop(densities=own, round_to=1)).widths)


def test_frozen_weights_are_scored_as_others(resnet8: nn.Module, graph: Graph) -> None:
    limits = {"params": Cost(graph).params() // 4}
    how = PreCrop(densities="synflow", draws=1)
    expected = design(resnet8, X, graph, limits, how)
    still = copy.deepcopy(resnet8)
    still.fc.requires_grad_(False)
    assert design(still, X, graph, limits, how).widths == expected.widths
    assert not still.fc.weight.requires_grad


def test_two_budgets_are_both_used() -> None:
    model = CifarResNet(3)
    graph = analyze(model, X)
    cost = Cost(graph)
    limits = {"macs": cost.macs(), "params": int(0.8 * cost.params())}
    found = design(model, X, graph, limits, PreConfig(cap=2.0, round_to=1))
    assert 0.99 < found.after["macs"] / limits["macs"] <= 1
    assert 0.99 < found.after["params"] / limits["params"] <= 1


def test_measured_latency_is_a_budget_too(resnet8: nn.Module, graph: Graph) -> None:
    times = {"block1.conv1": 3.0, "block1.conv2": 3.0, "block3.conv1": 1.0}
    found = design(resnet8, X, graph, {}, PreCrop(latency=(times, 4.0), round_to=1))
    spent = sum(t * found.densities[name] for name, t in times.items())
    assert 3.5 < spent <= 4.0
    assert found.densities["block1.conv1"] < found.densities["block3.conv1"]
    assert found.densities["block2.conv1"] == 1


def test_mistakes_say_what_to_do(resnet8: nn.Module) -> None:
    with pytest.raises(SecateurError, match="optimal, synflow, snip, grasp, erk"):
        prune(resnet8, X, budget=Budget(macs=0.5), method="precrop", densities="best")
    with pytest.raises(SecateurError, match="keep, shared"):
        prune(resnet8, X, budget=Budget(macs=0.5), method="precrop", streams="crop")
    for method in ("preconfig", "random-weights", "random-filters"):
        with pytest.raises(BudgetError, match="which only precrop takes"):
            prune(resnet8, X, budget=Budget(macs=0.5), method=method, streams="part")
    with pytest.raises(BudgetError, match="no layer reads or writes a residual stream"):
        prune(
            FAMILIES["vgg"](),
            torch.randn(2, 3, 32, 32),
            budget=Budget(macs=0.5),
            method="precrop",
            streams="part",
        )
    with pytest.raises(BudgetError, match="no growth"):
        prune(resnet8, X, budget=Budget(macs=0.5), method="preconfig", densities="erk")
    with pytest.raises(BudgetError, match="no budget"):
        PreCrop().prune(resnet8, X, None, Context())
    with pytest.raises(BudgetError, match="one of: macs, params"):
        prune(resnet8, X, budget=Budget(units=0.5), method="precrop")
    with pytest.raises(BudgetError, match="one of: macs, params"):
        prune(resnet8, X, budget=Budget(units=0.5), method="precrop", densities={"block3.conv1": 0.1})
    for wrong in (float("nan"), -0.1, 0, 1.5):
        with pytest.raises(BudgetError, match="expected above 0, at most 1"):
            PreCrop(densities={"block3.conv1": wrong}).prune(resnet8, X, None, Context())
    with pytest.raises(BudgetError, match="blokc3"):
        PreCrop(densities={"blokc3.conv1": 0.3}).prune(resnet8, X, None, Context())
    for name in ("min_keep", "round_to"):
        with pytest.raises(SecateurError, match=f"{name} is 0"):
            prune(resnet8, X, budget=Budget(macs=0.5), method="precrop", **{name: 0})
    for cap in (0.5, float("inf"), float("nan")):
        with pytest.raises(SecateurError, match="cap is"):
            prune(resnet8, X, budget=Budget(macs=0.5), method="preconfig", cap=cap)
    with pytest.raises(SecateurError, match="draws is 0"):
        prune(resnet8, X, budget=Budget(macs=0.5), method="precrop", densities="synflow", draws=0)
    with pytest.raises(BudgetError, match="stem"):
        PreCrop(latency=({"stem": 1.0}, 0.5)).prune(resnet8, X, None, Context())
    with pytest.raises(BudgetError, match="nan ms"):
        PreCrop(latency=({"block3.conv1": float("nan")}, 0.5)).prune(resnet8, X, None, Context())
    with pytest.raises(BudgetError, match="expected a layer"):
        draw_weights(resnet8, {"conv9": 0.5})
