"""Recipes: what they say, and what is wrong with them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from secateur.compare.cells import list_cells
from secateur.compare.recipe import Comparison
from secateur.errors import FileError, SecateurError

from .conftest import HEAD, RECIPE

Write = Callable[..., Path]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"oneshot"', '"onshot"', "unknown method 'onshot'"),
        ("seeds", "sedes", "unknown setting 'sedes'"),
        ("before = true", "befor = true", "arm 'uniform width': Arm: unknown option 'befor'"),
        ("before = true", "before = 1", "arm 'uniform width': Arm: before is 1; expected True or False"),
        ('"tiny"', '"tinny"', "schedule is 'tinny'; expected one of tiny, short, cpu, standard"),
        ("before = true", 'against = "l1"', "unknown arm 'l1'"),
        ("rounds", "runds", "unknown option 'runds'"),
        ("macs = ", "flops = ", "unknown measure 'flops'; choose one of: macs, params"),
        ("[arms.dense]", "[arms.dense", "cannot be read as a recipe"),
        ("{ macs = 0.6 }", "0.6", r"budgets is \[0.6\]; expected a list"),
        ("{ macs = 0.6 }", "{}", "budgets: one of them is empty"),
        ("macs = 0.6", 'macs = "0.6"', "macs is '0.6'; expected the share that may stay"),
        ("macs = 0.6", "macs = 1.5", "macs is 1.5; expected the share that may stay"),
        ("[0]", "3", "seeds is 3; expected a list"),
        ("[0]", "[-1]", r"seeds is \[-1\]; expected a list of numbers, each at least 0"),
        ("[arms.dense]", "[arms.dense]\nbudgets = 3", "arm 'dense': Arm: budgets is 3; expected a list"),
        ("[arms.dense]", "[arms.dense]\nbudgets = [{ macs = 2 }]", "arm 'dense': .* macs is 2; expected"),
        (
            "[arms.dense]",
            "[arms.dense]\noptions = { rounds = 1 }",
            "arm 'dense': options are those of a method",
        ),
        ("[arms.gradual]", '[arms."random, weights"]', "would share the folder random-weights"),
        ("[arms.gradual]", '[arms.".."]', "need a folder"),
        ('score = "random"', "min_keep = 0", "min.keep"),
        ("rounds = 1", "rounds = 1, ticks = 8", "ticks"),
        ('model = "code_of_mine:network"', "", "no model; give --model"),
        ('schedule = "tiny"', "tune_lr = 0", "tune_lr is 0; expected a number above 0, or None"),
        ('schedule = "tiny"', "latency_batch = 0", "latency_batch is 0; expected a whole number, at least 1"),
        ('schedule = "tiny"', 'precision = "bf8"', "precision is 'bf8'; expected one of no, bf16"),
        ('schedule = "tiny"', "compile = 1", "compile is 1; expected True or False"),
    ],
)
def test_mistakes_are_named(recipe: Write, old: str, new: str, message: str) -> None:
    assert old in RECIPE
    with pytest.raises((SecateurError, FileError), match=message):
        list_cells(Comparison.read(recipe(RECIPE.replace(old, new))))


def test_arms_are_tables(recipe: Write) -> None:
    for arms in ("arms = 3\n", "[arms]\ndense = 3\n"):
        with pytest.raises(SecateurError, match="arms: expected a table per arm"):
            Comparison.read(recipe(HEAD + arms))
    with pytest.raises(SecateurError, match="no arms; give at least one method"):
        Comparison.read(recipe(HEAD))


def test_changes_take_the_place_of_what_the_file_says(recipe: Write) -> None:
    comparison = Comparison.read(recipe(), seeds=[3, 4], schedule=None, arms={"l1": {"method": "oneshot"}})
    assert (comparison.seeds, comparison.schedule, list(comparison.arms)) == ((3, 4), "tiny", ["l1"])


def test_some_of_the_arms(recipe: Write) -> None:
    comparison = Comparison.read(recipe())
    assert list(comparison.with_arms(["gradual", "dense"]).arms) == ["dense", "gradual"]
    with pytest.raises(SecateurError, match="unknown arm 'l1'; choose one of: dense, gradual"):
        comparison.with_arms(["l1"])


def test_the_committed_recipes_are_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])  # for the peers
    recipes = sorted(Path("benchmarks", "compare").glob("*.toml"))
    assert recipes
    for path in recipes:
        assert list_cells(Comparison.read(path, seeds=[0]))


def test_the_recipe_in_the_guide_is_sound(recipe: Write) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "compare.md").read_text()
    text = guide.partition("```toml\n")[2].partition("```")[0]
    assert {cell.arm for cell in list_cells(Comparison.read(recipe(text)))} == {
        "dense", "l1, fine-tuned", "DepGraph + decay", "l2 of fresh weights"
    }  # fmt: skip
