"""Comparisons: equal training for every arm, tables, failures, going on."""

import csv
import sys
from pathlib import Path

import pytest

from secateur.errors import FileError, SecateurError
from secateur.methods import METHODS
from secateur.runs import PruneConfig, TrainRunConfig
from secateur.runs.compare import Arm, Cell, Comparison, Outcome, compare, markdown, rows
from secateur.runs.schedules import SCHEDULES

RECIPE = """
model = "resnet8"
data = "digits"
image_size = 8
train_images = 100
test_images = 100
budgets = [{ macs = 0.6 }]
seeds = [0, 1]
schedule = "tiny"

[arms.dense]

[arms."l2, fine-tuned"]
method = "oneshot"

[arms."uniform width"]
method = "oneshot"
score = "random"
allocation = "uniform"
before = true

[arms."random weights"]
method = "precrop"
granularity = "weights"

[arms.gradual]
method = "gradual"
options = { rounds = 1 }
decay = 2
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def epochs(cell: Cell) -> int:
    config = cell.config
    phases = [config.train] if isinstance(config, TrainRunConfig) else [config.train, config.finetune]
    return sum(phase.epochs for phase in phases if phase)


def test_every_arm_trains_equally_long(recipe: Path) -> None:
    for schedule, plan in SCHEDULES.items():
        cells = Comparison.read(recipe, schedule=schedule).cells()
        assert {epochs(cell) for cell in cells} == {plan.epochs}
        assert len(cells) == 2 * 5
    split = next(c.config for c in cells if c.arm == "l2, fine-tuned")
    assert isinstance(split, PruneConfig)
    assert split.train is not None
    assert split.finetune is not None
    before = next(c.config for c in cells if c.arm == "uniform width")
    assert isinstance(before, PruneConfig)
    assert before.train is None
    assert before.finetune is not None
    assert before.finetune.lr == plan.lr


def test_a_comparison_from_end_to_end_and_on(recipe: Path, tmp_path: Path) -> None:
    comparison, said = Comparison.read(recipe), []
    outcomes = compare(comparison, tmp_path / "out", tell=said.append)
    assert all(not o.error for o in outcomes), [o.error for o in outcomes]
    assert len(said) == 10
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.count("\n| ") == 1 + 5
    for o in outcomes:
        assert o.macs == 1 if o.cell.arm == "dense" else 0.5 < o.macs <= 0.6
        masked = o.cell.arm == "random weights"
        assert (o.step_macs, o.step_bytes) == ((1.0, 1.0) if masked else (None, None))
    assert "weights at zero are not counted as kept" in table
    lines = list(csv.DictReader((tmp_path / "out" / "table.csv").read_text().splitlines()))
    assert len(lines) == 10
    model = tmp_path / "out" / "gradual" / "macs-0.6" / "seed-1" / "model.safetensors"
    written = model.stat().st_mtime_ns
    again = compare(comparison, tmp_path / "out")
    assert [o.accuracy for o in again] == [o.accuracy for o in outcomes]
    assert (tmp_path / "out" / "table.md").read_text() == table
    assert model.stat().st_mtime_ns >= written


def test_a_failed_cell_does_not_stop_the_rest(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(RECIPE.replace("rounds = 1", "rounds = 1000"))
    outcomes = compare(Comparison.read(recipe, seeds=[0]), tmp_path / "out")
    failed = {o.cell.arm: o.error for o in outcomes if o.error}
    assert list(failed) == ["gradual"]
    assert "do not fit" in failed["gradual"]
    assert "do not fit" in (tmp_path / "out" / "table.md").read_text()


def test_a_bug_in_a_cell_leaves_its_traceback(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(sys.modules["secateur.runs.compare"], "prune_run", broken)
    outcomes = compare(Comparison.read(recipe, seeds=[0]), tmp_path / "out")
    assert [o.error for o in outcomes if o.error] == ["ZeroDivisionError: planted"] * 3
    texts = [path.read_text() for path in (tmp_path / "out" / "errors").iterdir()]
    assert len(texts) == 3
    assert all("in run_cell" in text for text in texts)


def test_every_method_can_be_an_arm(recipe: Path, tmp_path: Path) -> None:
    arms = "".join(f'[arms."{name}"]\nmethod = "{name}"\n' for name in METHODS)
    rounds = dict.fromkeys(("gradual", "depgraph"), "{ rounds = 1 }") | {"hesso": "{ periods = 1 }"}
    short = {**rounds, "gate-decorator": "{ ticks = 1, ticks_per_tock = 1 }"}
    for name, options in short.items():
        arms = arms.replace(f'method = "{name}"\n', f'method = "{name}"\noptions = {options}\n')
    recipe.write_text(RECIPE.partition("[arms.dense]")[0] + arms)
    outcomes = compare(Comparison.read(recipe, seeds=[0]), tmp_path / "out")
    assert len(outcomes) == len(METHODS)
    for o in outcomes:
        assert not o.error, (o.cell.arm, o.error)
        assert o.macs <= 0.6


def test_rows_pair_by_seed() -> None:
    def cell(arm: str, seed: int, **budget: float) -> Cell:
        against = "a" if arm == "b" else "dense"
        return Cell(arm, budget, seed, None, against)  # type: ignore[arg-type]

    found = rows(
        [
            Outcome(cell("dense", 0), 0.9),
            Outcome(cell("dense", 1), 0.8),
            Outcome(cell("a", 0, macs=0.5), 0.85, macs=0.5),
            Outcome(cell("a", 1, macs=0.5), 0.79, macs=0.4),
            Outcome(cell("a", 2, macs=0.5), error="broke"),
            Outcome(cell("a", 0, macs=0.3), 0.5, macs=0.3),
            Outcome(cell("b", 0, macs=0.5), 0.82, macs=0.5),
            Outcome(cell("b", 1, macs=0.5), 0.8, macs=0.5),
        ]
    )
    dense, _, row, other = found
    assert dense["difference"] is None
    assert other["difference"] == pytest.approx((0.82 - 0.85 + 0.8 - 0.79) / 2)
    assert other["against"] == "a"
    assert row["accuracy"] == pytest.approx(0.82)
    assert row["macs"] == pytest.approx(0.45)
    assert row["difference"] == pytest.approx(-0.03)
    assert row["difference_spread"] == pytest.approx(0.0283, abs=1e-4)
    assert row["seeds"] == 2
    assert row["failed"] == "broke"


def test_the_table_says_how_it_was_made(recipe: Path) -> None:
    text = markdown(Comparison.read(recipe), [])
    assert "schedule `tiny`" in text
    assert "seeds 0, 1" in text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"oneshot"', '"onshot"', "unknown method 'onshot'"),
        ("seeds", "sedes", "unknown setting 'sedes'"),
        ('score = "random"', 'scor = "random"', "scor"),
        ('"tiny"', '"tinny"', "unknown schedule 'tinny'"),
        ("decay = 2", 'against = "l1"', "unknown arm 'l1'"),
        ("rounds", "runds", "unknown option 'runds'"),
        ("[arms.dense]", "[arms.dense", "cannot be read as a recipe"),
    ],
)
def test_mistakes_in_a_recipe_are_named(recipe: Path, old: str, new: str, message: str) -> None:
    recipe.write_text(RECIPE.replace(old, new))
    with pytest.raises((SecateurError, FileError), match=message):
        Comparison.read(recipe).cells()


def test_the_committed_recipes_are_sound() -> None:
    folder = Path(__file__).parents[1] / "benchmarks" / "compare"
    recipes = sorted(folder.glob("*.toml"))
    assert recipes
    for path in recipes:
        assert Comparison.read(path).cells()


def test_an_arm_has_the_defaults_of_the_command_line() -> None:
    assert Arm(method="oneshot").score == "l2"
