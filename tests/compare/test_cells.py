"""Which runs a comparison has: equal training for every arm."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from secateur.compare.cells import Cell, list_cells
from secateur.compare.recipe import Arm, Comparison
from secateur.compare.schedule import SCHEDULES
from secateur.errors import SecateurError
from secateur.recipes.train_config import TrainConfig
from secateur.runs.config import PruneConfig, TrainRunConfig

from .conftest import RECIPE, Finished

pytestmark = pytest.mark.xdist_group("comparison")

Write = Callable[..., Path]


def epochs(cell: Cell) -> int:
    config = cell.config
    phases = [config.train] if isinstance(config, TrainRunConfig) else [config.train, config.finetune]
    return sum(phase.epochs for phase in phases if phase)


def pruning(cells: list[Cell], arm: str) -> PruneConfig:
    config = next(cell.config for cell in cells if cell.arm == arm)
    assert isinstance(config, PruneConfig)
    return config


def test_every_arm_trains_equally_long(recipe: Write) -> None:
    for schedule, plan in SCHEDULES.items():
        cells = list_cells(Comparison.read(recipe(), schedule=schedule, seeds=[0, 1]))
        assert {epochs(cell) for cell in cells} == {plan.epochs}
        assert len(cells) == 2 * 5
    split = pruning(cells, "l2, fine-tuned")
    assert split.train is not None
    assert split.finetune is not None
    before = pruning(cells, "uniform width")
    assert before.train is None
    assert before.finetune is not None
    assert before.finetune.lr == plan.lr


def test_cells_come_seed_by_seed_and_budget_by_budget(recipe: Write) -> None:
    budgets = [{"macs": 0.3}, {"macs": 0.7, "params": 0.5}]
    arms = {"dense": {}, "a": {"method": "oneshot"}, "b": {"method": "rd", "budgets": [{"params": 0.25}]}}
    cells = list_cells(Comparison.read(recipe(), budgets=budgets, arms=arms, seeds=[0, 2]))
    assert [cell.name for cell in cells] == [
        f"{name}/seed-{seed}"
        for seed in (0, 2)
        for name in ("dense/dense", "a/macs-0.3", "a/macs-0.7-params-0.5", "b/params-0.25")
    ]
    assert [(cell.config.task.seed, dict(cell.budget)) for cell in cells[:4]] == [
        (0, {}),
        (0, budgets[0]),
        (0, budgets[1]),
        (0, {"params": 0.25}),
    ]


def test_methods_that_choose_widths_before_training_take_no_trained_weights(
    recipe: Write, tmp_path: Path
) -> None:
    weights = tmp_path / "weights.safetensors"
    weights.touch()
    path, plan = recipe(RECIPE + '[arms.precrop]\nmethod = "precrop"\n'), SCHEDULES["short"]
    cells = list_cells(Comparison.read(path, schedule="short", weights=str(weights)))
    for cell in cells:
        if isinstance(cell.config, TrainRunConfig):
            assert (cell.arm, cell.config.task.weights) == ("dense", weights)
            assert (cell.config.train.epochs, cell.config.train.lr) == (plan.tune_epochs, plan.tune_lr)
            continue
        scratch = cell.arm in ("precrop", "random weights", "uniform width")
        assert (cell.config.task.weights is None) == scratch
        (phase,) = [phase for phase in (cell.config.train, cell.config.finetune) if phase]
        assert (phase.epochs, phase.lr) == (plan.tune_epochs, plan.lr if scratch else plan.tune_lr)
    slower = list_cells(Comparison.read(path, weights=str(weights), tune_lr=0.001, lr_shape="cosine"))
    assert {
        (c.config.train.lr, c.config.train.schedule) for c in slower if isinstance(c.config, TrainRunConfig)
    } == {(0.001, "cosine")}
    longer = list_cells(Comparison.read(path, weights=str(weights), epochs=7))
    phases = [[c.config.train, getattr(c.config, "finetune", None)] for c in longer]
    assert {sum(phase.epochs for phase in both if phase) for both in phases} == {7}
    assert {cell.arm for cell in cells} == {
        "dense", "precrop", "random weights", "uniform width", "l2, fine-tuned", "gradual"
    }  # fmt: skip


def test_an_arm_may_learn_from_the_dense_model(recipe: Write) -> None:
    def finetune(text: str, arm: str) -> TrainConfig:
        found = pruning(list_cells(Comparison.read(recipe(RECIPE + text))), arm).finetune
        assert found is not None
        return found

    plain = finetune("", "l2, fine-tuned")
    taught = finetune('[arms.taught]\nmethod = "oneshot"\ndistill = 0.7\n', "taught")
    assert taught == replace(plain, distill_weight=0.7)
    for wrong in ("", 'method = "oneshot"\nbefore = true\n', 'method = "lapp"\n'):
        with pytest.raises(SecateurError, match="distill"):
            finetune(f"[arms.wrong]\n{wrong}distill = 0.7\n", "wrong")


def test_two_phases_see_what_one_of_their_length_sees(finished: Finished) -> None:
    """Methods that cut in between get neither the first epochs' order nor their augmentation again."""
    assert finished.epochs["dense/dense/seed-0"] == [0, 1]
    assert finished.epochs["l2-fine-tuned/macs-0.6/seed-0"] == [0, 1]
    assert finished.epochs["gradual/macs-0.6/seed-0"] == [0, 1]


def test_an_arm_has_the_defaults_of_its_method() -> None:
    assert Arm(method="oneshot").options == {}
