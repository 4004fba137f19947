"""Masks before training: what they keep, what they cost, and runs that train under them."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from secateur import Budget
from secateur.cli import app
from secateur.errors import BudgetError, ScoreError, SecateurError
from secateur.files import read_tensors
from secateur.graph import Graph, analyze
from secateur.methods import AtInit, Pruned, prune
from secateur.plan.weight_plan import WeightPlan
from secateur.recipes.models import build_model
from secateur.recipes.models.mobilenet import CifarMobileNetV2
from secateur.recipes.train_config import TrainConfig
from secateur.runs.config import PruneConfig, Task
from secateur.runs.pipeline import prune_run
from secateur.surgery import load
from tests.oracles import counted_params

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
DATA = [(X, torch.tensor([0, 1]))]
NETS: dict[str, Callable[[], nn.Module]] = {
    "resnet8": lambda: build_model("resnet8"),
    "mobilenet": lambda: CifarMobileNetV2(width=0.25),
}
BUDGETS = [Budget(macs=0.4), Budget(params=0.4), Budget(macs=0.5, params=0.4)]
MASKS: dict[str, Callable[[nn.Module, Budget], Pruned]] = {
    "synflow": lambda m, b: prune(m, X, budget=b, method="synflow", rounds=5),
    "synflow, shuffled": lambda m, b: prune(m, X, budget=b, method="synflow", rounds=5, shuffle="weights"),
    "synflow, filters": lambda m, b: prune(m, X, budget=b, method="synflow", rounds=5, shuffle="filters"),
    "snip": lambda m, b: prune(m, X, budget=b, method="snip", data=DATA),
    "grasp": lambda m, b: prune(m, X, budget=b, method="grasp", data=DATA),
    "random weights": lambda m, b: prune(m, X, budget=b, method="random-weights", round_to=1),
    "random filters": lambda m, b: prune(m, X, budget=b, method="random-filters", round_to=1),
}


@pytest.fixture(scope="module", params=NETS)
def net(request: pytest.FixtureRequest) -> Iterator[nn.Module]:
    """A network that is analysed once, whatever masks it gets."""
    torch.manual_seed(0)
    model = NETS[request.param]()
    graph = analyze(model, X)

    def analyze_once(
        given: nn.Module, inputs: torch.Tensor, freeze: tuple[str, ...], scope: tuple[str, ...]
    ) -> Graph:
        return graph if given is model and not freeze else analyze(given, inputs, freeze=freeze)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secateur.engine.method.analyze", analyze_once)
        yield model


def counted_by_hand(model: nn.Module, masks: WeightPlan | None = None) -> int:
    """MACs of one image, weights outside of the masks left out."""
    kept = {name: int(mask.sum()) for name, mask in masks.masks.items()} if masks else {}
    total = 0
    hooks = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):

            def count(layer: nn.Module, _: object, y: torch.Tensor, name: str = name) -> None:
                nonlocal total
                total += kept.get(f"{name}.weight", layer.weight.numel()) * y[0].numel() // y.shape[1]

            hooks.append(layer.register_forward_hook(count))
    model.eval()(X)
    for hook in hooks:
        hook.remove()
    return total


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("make", MASKS.values(), ids=MASKS)
def test_every_mask_meets_budgets_in_both_currencies(
    net: nn.Module, make: Callable[[nn.Module, Budget], Pruned], budget: Budget
) -> None:
    sparse = make(net, budget)
    left = {
        "macs": counted_by_hand(net, sparse.plan),
        "params": counted_params(net) - (sparse.plan.weights - sparse.plan.kept),
    }
    assert left == {m: sparse.after[m] for m in left}
    dense = {"macs": counted_by_hand(net), "params": counted_params(net)}
    shares = {m: left[m] / dense[m] for m in budget.bounds}
    assert all(shares[m] <= bound for m, bound in budget.bounds.items())
    assert any(shares[m] > 0.95 * bound for m, bound in budget.bounds.items())


@pytest.mark.parametrize("streams", ["keep", "shared"])
@pytest.mark.parametrize("budget", BUDGETS[:2], ids=str)
def test_three_granularities_are_equally_dense_in_every_layer(
    net: nn.Module, budget: Budget, streams: str
) -> None:
    wanted = prune(net, X, budget=budget, method="precrop", streams=streams).plan.origin["densities"]
    wanted = {name: p for name, p in wanted.items() if p < 1}
    classifier = [name for name, m in net.named_modules() if isinstance(m, nn.Linear)]
    factor = 1.0
    if budget.params is not None:  # a crop narrows norms, a mask does not: its weights pay for them
        sizes = {name: net.get_parameter(f"{name}.weight").numel() for name in wanted}
        gone = (1 - budget.params) * counted_params(net)
        factor = min(1.0, (sum(sizes.values()) - gone) / sum(p * sizes[name] for name, p in wanted.items()))
        assert factor > 0.9
    for granularity in ("weights", "filters"):
        sparse = prune(net, X, budget=budget, method=f"random-{granularity}", streams=streams)
        assert wanted.keys() == sparse.facts["densities"].keys()
        for name, share in sparse.facts["densities"].items():
            mask = sparse.plan.masks[f"{name}.weight"].flatten(1)
            unit = 1 / (len(mask) if granularity == "filters" else mask.numel())
            assert factor * wanted[name] - 1.01 * unit <= share <= wanted[name] + 1.01 * unit, name
            whole = mask.all(1) | ~mask.any(1)
            if name in classifier:
                assert mask.any(1).all()  # inputs go, no class does
            elif granularity == "filters":
                assert whole.all(), name
            elif share < 0.9 and mask.shape[1] > 9:
                assert not whole.all(), name


@pytest.mark.parametrize("seed", [0, 1])
def test_a_classifier_keeps_the_inputs_that_filters_still_produce(net: nn.Module, seed: int) -> None:
    name = next(name for name, m in net.named_modules() if isinstance(m, nn.Linear))
    budget = Budget(params=0.4)
    sparse = prune(net, X, budget=budget, method="random-filters", streams="shared", seed=seed)
    seen: list[torch.Tensor] = []
    sparse.model.get_submodule(name).register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    sparse.model.train()(X)
    read, made = sparse.plan.masks[f"{name}.weight"].any(0), (seen[0] != 0).any(0)
    assert 0 < made.sum() < len(made)
    assert 0 < read.sum() < len(read)
    assert (made & read).sum() == min(made.sum(), read.sum())


def test_a_shuffle_keeps_as_many_weights_of_each_layer_elsewhere() -> None:
    model = build_model("resnet8")
    chosen, shuffled, again = (
        prune(model, X, budget=Budget(params=0.3), method="synflow", rounds=5, shuffle=shuffle, seed=seed)
        for shuffle, seed in (("none", 0), ("weights", 0), ("weights", 1))
    )
    assert shuffled.facts["densities"] == again.facts["densities"] == chosen.facts["densities"]
    name = "block3.conv1.weight"
    assert not torch.equal(chosen.plan.masks[name], shuffled.plan.masks[name])
    assert not torch.equal(again.plan.masks[name], shuffled.plan.masks[name])
    with pytest.raises(SecateurError, match="none, weights, filters"):
        AtInit(shuffle="all")
    with pytest.raises(ScoreError, match="data="):
        prune(model, X, budget=Budget(params=0.3), method="snip")


TASK = Task(model="resnet8", data="digits", image_size=8, train_images=100, test_images=100)
RUN = PruneConfig(
    task=TASK,
    method="synflow",
    budget={"params": 0.3},
    options={"rounds": 5},
    finetune=TrainConfig(epochs=2, batch_size=20, checkpoint_every=3),
)


@pytest.mark.parametrize(
    "config",
    [RUN, replace(RUN, method="random-filters", options={})],
    ids=["synflow", "random filters"],
)
def test_masks_hold_through_a_run_and_a_killed_run_goes_on(
    config: PruneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from secateur.recipes import train

    report = prune_run(config, tmp_path / "whole")
    assert report is not None
    rate = train.learning_rate

    def interrupted(how: TrainConfig, step: int, steps: int) -> float:
        if step == 7:
            raise KeyboardInterrupt
        return rate(how, step, steps)

    with monkeypatch.context() as patch:
        patch.setattr(train, "learning_rate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prune_run(config, tmp_path / "killed")
    with monkeypatch.context() as patch:
        patch.setattr(WeightPlan, "of", None)  # what was decided is not decided again
        prune_run(config, tmp_path / "killed", mode="resume")
    plan = WeightPlan.load(tmp_path / "whole" / "masks.safetensors")
    fresh, trained, resumed = (
        load(build_model("resnet8", classes=10, in_channels=1), tmp_path / path)
        for path in ("whole/cut.safetensors", "whole/model.safetensors", "killed/model.safetensors")
    )
    for name, mask in plan.masks.items():
        w = trained.get_parameter(name)
        assert (w[~mask] == 0).all()
        assert (w != fresh.get_parameter(name))[mask].float().mean() > 0.9
    ours, theirs = trained.state_dict(), resumed.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert report.weights is not None
    assert report.weights.params <= 0.3 * report.before["params"]
    assert report.training_cost is not None
    assert report.training_cost.after.macs == report.training_cost.before.macs


def test_synflow_from_the_command_line(tmp_path: Path) -> None:
    command = (
        "prune --model resnet8 --data digits --image-size 8 --train-images 100 --test-images 50 --no-progress "
        f"--method synflow --keep-macs 0.3 --option rounds=5 --epochs 1 --out {tmp_path / 'run'}"
    )
    result = CliRunner().invoke(app, command.split(), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "weights that are not zero" in result.output
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["budget"] == {"macs": 0.3}
    assert 0.29 < report["weights"]["macs"] / report["before"]["macs"] <= 0.3
    assert [line["phase"] for line in report["history"]] == ["train"]
    assert report["history"][0]["lr"] > 0
    assert "MACs per training step" in (tmp_path / "run" / "report.html").read_text()
    stored = read_tensors(tmp_path / "run" / "model.safetensors")[0]
    assert any(name.endswith(":values") for name in stored)


def test_a_narrower_network_is_cheaper_to_train(tmp_path: Path) -> None:
    config = PruneConfig(
        task=TASK,
        method="precrop",
        budget={"macs": 0.4},
        finetune=TrainConfig(epochs=1, batch_size=20),
        exports=False,
    )
    report = prune_run(config, tmp_path)
    assert report is not None
    cost = report.training_cost
    assert cost is not None
    assert cost.after.macs < 0.45 * cost.before.macs
    assert cost.after.peak_bytes < 0.9 * cost.before.peak_bytes
    assert cost.after.batch == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": {"units": 0.5}}, "keep-macs or keep-params"),
        ({"budget": {"params": 1.5}}, "above 0 and below 1|neither a share below 1 nor a whole number"),
        ({"options": {"score": "snip"}}, "score is 'snip'; expected one of synflow"),
        ({"options": {"streams": "shared"}}, "unknown option 'streams'; choose one of: .*rounds"),
        ({"options": {"min_keep": 4}}, "unknown option 'min_keep'"),
        ({"method": "weights", "options": {}, "budget": {"macs": 0.5}}, "the budget is sparsity"),
    ],
)
def test_mistakes_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        replace(RUN, **options)


def test_a_budget_out_of_reach_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="Raise the budget"):
        prune_run(replace(RUN, budget={"params": 0.001}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
