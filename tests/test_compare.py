"""Comparisons: equal training for every arm, tables, failures, going on."""

import csv
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from secateur.errors import FileError, SecateurError
from secateur.methods import METHODS
from secateur.recipes.data import Batches
from secateur.recipes.train_config import TrainConfig
from secateur.report.comparison import is_steady, standings
from secateur.runs import PruneConfig, TrainRunConfig
from secateur.runs.compare import Arm, Cell, Comparison, compare, run_only
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


def test_methods_that_choose_widths_before_training_take_no_trained_weights(tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    weights.touch()
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE + '[arms.precrop]\nmethod = "precrop"\n')
    plan = SCHEDULES["short"]
    cells = Comparison.read(path, schedule="short", weights=str(weights)).cells()
    for cell in cells:
        if isinstance(cell.config, TrainRunConfig):
            assert (cell.arm, cell.config.task.weights) == ("dense", weights)
            assert (cell.config.train.epochs, cell.config.train.lr) == (plan.tune_epochs, plan.tune_lr)
            continue
        scratch = cell.arm in ("precrop", "random weights", "uniform width")
        assert (cell.config.task.weights is None) == scratch
        (phase,) = [phase for phase in (cell.config.train, cell.config.finetune) if phase]
        assert (phase.epochs, phase.lr) == (plan.tune_epochs, plan.lr if scratch else plan.tune_lr)
    slower = Comparison.read(path, weights=str(weights), tune_lr=0.001).cells()
    assert {c.config.train.lr for c in slower if isinstance(c.config, TrainRunConfig)} == {0.001}
    assert {cell.arm for cell in cells} == {
        "dense", "precrop", "random weights", "uniform width", "l2, fine-tuned", "gradual"
    }  # fmt: skip


def test_an_arm_may_learn_from_the_dense_model(recipe: Path) -> None:
    def finetune(text: str, arm: str) -> TrainConfig:
        recipe.write_text(RECIPE + text)
        config = next(cell.config for cell in Comparison.read(recipe).cells() if cell.arm == arm)
        assert isinstance(config, PruneConfig)
        assert config.finetune is not None
        return config.finetune

    plain = finetune("", "l2, fine-tuned")
    taught = finetune('[arms.taught]\nmethod = "oneshot"\ndistill = 0.7\n', "taught")
    assert taught == replace(plain, distill_weight=0.7)
    for wrong in ("", 'method = "oneshot"\nbefore = true\n', 'method = "lapp"\n'):
        with pytest.raises(SecateurError, match="distill"):
            finetune(f"[arms.wrong]\n{wrong}distill = 0.7\n", "wrong")


def test_a_comparison_from_end_to_end_and_on(recipe: Path, tmp_path: Path) -> None:
    comparison, said = Comparison.read(recipe), []
    outcomes = compare(comparison, tmp_path / "out", tell=said.append)
    assert all(not o.error for o in outcomes), [o.error for o in outcomes]
    assert len(said) == 10 + 1
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.count("\n| ") == 1 + 5
    for o in outcomes:
        assert o.macs == 1 if o.arm == "dense" else 0.5 < o.macs <= 0.6
        assert o.latency is not None
        masked = o.arm == "random weights"
        assert (o.step_macs, o.step_bytes, o.masked) == ((1.0, 1.0, True) if masked else (None, None, False))
        assert (o.epochs, o.training_seconds > 0) == (2, True)
    page = (tmp_path / "out" / "index.html").read_text()
    assert all(arm in page for arm in comparison.arms)
    progress = json.loads(
        (tmp_path / "out" / "gradual" / "macs-0.6" / "seed-1" / "progress.json").read_text()
    )
    assert progress["outcome"]["accuracy"] in [
        o.accuracy for o in outcomes if (o.arm, o.seed) == ("gradual", 1)
    ]
    lines = list(csv.DictReader((tmp_path / "out" / "table.csv").read_text().splitlines()))
    assert len(lines) == 10
    model = tmp_path / "out" / "gradual" / "macs-0.6" / "seed-1" / "model.safetensors"
    written = model.stat().st_mtime_ns
    again = compare(comparison, tmp_path / "out")
    assert [o.accuracy for o in again] == [o.accuracy for o in outcomes]
    assert (tmp_path / "out" / "table.csv").read_text().count("\n") == 11
    assert model.stat().st_mtime_ns == written
    kept = [
        (o.latency, n.latency)
        for o, n in zip(outcomes, again, strict=True)
        if o.latency and is_steady(o.latency)
    ]
    assert all(first == second for first, second in kept)


def test_processes_end_with_the_command_that_started_them_and_it_says_when_one_is_killed(
    recipe: Path, tmp_path: Path
) -> None:
    psutil = pytest.importorskip("psutil")
    out, errors = tmp_path / "out", tmp_path / "errors"
    command = [sys.executable, "-m", "secateur.cli", "compare", str(recipe), "--out", str(out), "--jobs", "2"]

    def started() -> tuple[Any, list[Any]]:
        """The command, and its workers once they train."""
        done = len(list(out.glob("*/*/*/config.json")))
        with errors.open("w") as stderr:
            process = psutil.Popen(command, stderr=stderr)
        while len(list(out.glob("*/*/*/config.json"))) < done + 2:
            assert process.poll() is None, errors.read_text()
            time.sleep(0.05)
        workers = [p for p in process.children(recursive=True) if "spawn_main" in " ".join(p.cmdline())]
        assert len(workers) == 2
        return process, workers

    process, workers = started()
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive

    process, workers = started()
    workers[0].kill()
    assert process.wait(timeout=60)
    assert "killed from outside" in " ".join(errors.read_text().split())

    outcomes = compare(Comparison.read(recipe), out, jobs=2)
    assert all(not o.error for o in outcomes), [o.error for o in outcomes]


def test_cells_run_one_by_one_are_gathered(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison, out = Comparison.read(recipe, seeds=[0]), tmp_path / "out"
    with pytest.raises(SecateurError, match="no run of this comparison is finished"):
        compare(comparison, out, gather=True)
    assert not out.exists()
    first, *rest = comparison.cells()
    alone = [run_only(comparison, first.name, out)]
    some = compare(comparison, out, gather=True)
    assert [(o.arm, o.accuracy) for o in some] == [(first.arm, alone[0].accuracy)]
    assert "4 of 5 runs are not finished and left out." in (out / "table.md").read_text()
    assert "<dd>1 of 5</dd>" in (out / "index.html").read_text()
    alone += [run_only(comparison, cell.name, out) for cell in rest]
    for name in ("prune_run", "train_run"):  # nothing is left to run
        monkeypatch.setattr(sys.modules["secateur.runs.compare"], name, None)
    gathered = compare(comparison, out)
    assert [o.accuracy for o in gathered] == [o.accuracy for o in alone]
    assert "not finished" not in (out / "table.md").read_text()
    with pytest.raises(SecateurError, match="unknown cell 'gradual'; choose one of: dense/dense/seed-0"):
        run_only(comparison, "gradual", out)


def test_curves_are_measured_once_for_all_budgets(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    channels, calls = sys.modules["secateur.methods.rd.channels"], []
    honest = channels.measured
    monkeypatch.setattr(channels, "measured", lambda *args: calls.append(1) or honest(*args))
    arms, budgets = {"rd": {"method": "rd"}}, [{"macs": 0.7}, {"macs": 0.6}]
    outcomes = compare(Comparison.read(recipe, arms=arms, budgets=budgets, seeds=[0]), tmp_path / "out")
    assert [o.error for o in outcomes] == ["", ""]
    assert len(calls) == 1


OWN = """
import torch

def masked(model, inputs, budget, *, share=0.5):
    for p in model.parameters():
        if p.ndim > 1:
            mask = p.detach().abs() > p.detach().abs().flatten().quantile(share)
            p.data *= mask
            p.register_hook(lambda g, mask=mask: g * mask)
    return model

def cut(model, inputs, budget, *, data, freeze=()):
    from secateur import prune
    assert next(iter(data))[0].shape[1:] == inputs.shape[1:]
    return prune(model, inputs, budget=budget, freeze=freeze).model

def proven(model, inputs, budget):
    from secateur import prune
    return prune(model, inputs, budget=budget)

def nothing(model, inputs, budget):
    return None
"""


def test_methods_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pruners_of_mine.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.toml"
    head = RECIPE[: RECIPE.index("[arms.")]
    arms = [
        f'[arms.{name}]\nmethod = "pruners_of_mine:{name}"\n'
        for name in ("masked", "cut", "proven", "nothing")
    ]
    path.write_text(head + "".join(arms))
    masked, cut, proven, nothing = compare(Comparison.read(path, seeds=[0]), tmp_path / "out")
    assert (masked.error, cut.error, proven.error) == ("", "", "")
    assert masked.macs == 1.0
    assert masked.params == pytest.approx(0.5, abs=0.02)  # and so still after fine-tuning
    assert (cut.macs, cut.widths) == (proven.macs, proven.widths)
    assert cut.accuracy == proven.accuracy
    assert cut.latency is not None
    assert "got NoneType, expected the smaller model" in nothing.error

    def report(arm: str) -> dict[str, Any]:
        return json.loads((tmp_path / "out" / arm / "macs-0.6" / "seed-0" / "report.json").read_text())  # type: ignore[no-any-return]

    assert report("cut")["verify_max_abs_error"] is None
    assert any("does not say which units went" in note for note in report("cut")["notes"])
    assert report("proven")["verify_max_abs_error"] < 1e-10
    assert any("budget is not met: 1.0000 of the MACs" in note for note in report("masked")["notes"])
    assert "(over the budget)" in (tmp_path / "out" / "table.md").read_text()
    with pytest.raises(SecateurError, match="has no function 'lost'"):
        PruneConfig(task=Comparison.read(path).task, keep_macs=0.5, method="pruners_of_mine:lost")


def test_a_bug_in_a_method_is_kept_with_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_pruner.py").write_text("def it(model, inputs, budget):\n    return 1 / 0\n")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE[: RECIPE.index("[arms.")] + '[arms.broken]\nmethod = "broken_pruner:it"\n')
    (outcome,) = compare(Comparison.read(path, seeds=[0]), tmp_path / "out")
    assert outcome.error == "ZeroDivisionError: division by zero"
    (trace,) = (tmp_path / "out" / "errors").iterdir()
    assert "broken_pruner.py" in trace.read_text()


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
        assert not o.error, (o.arm, o.error)
        assert o.macs <= 0.6


def test_a_failed_cell_does_not_stop_the_rest(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(RECIPE.replace("rounds = 1", "rounds = 1000"))
    outcomes = compare(Comparison.read(recipe, seeds=[0]), tmp_path / "out")
    failed = {o.arm: o.error for o in outcomes if o.error}
    assert list(failed) == ["gradual"]
    assert "do not fit" in failed["gradual"]
    assert "do not fit" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"oneshot"', '"onshot"', "unknown method 'onshot'"),
        ("seeds", "sedes", "unknown setting 'sedes'"),
        ('score = "random"', 'scor = "random"', "scor"),
        ('"tiny"', '"tinny"', "unknown schedule 'tinny'"),
        ("decay = 2", 'against = "l1"', "unknown arm 'l1'"),
        ("rounds", "runds", "unknown option 'runds'"),
        ("macs = ", "flops = ", "unknown measure 'flops'; choose one of: macs, params"),
        ("[arms.dense]", "[arms.dense", "cannot be read as a recipe"),
        ("{ macs = 0.6 }", "0.6", "budgets: expected a list such as"),
        ("macs = 0.6", 'macs = "0.6"', "budgets: expected a list such as"),
        ("macs = 0.6", "macs = 1.5", "macs 1.5; expected the share that may stay"),
        ("[0, 1]", "3", "seeds: expected a list such as"),
        ("[arms.dense]", "[arms.dense]\nbudgets = 3", "budgets: expected a list such as"),
        ("[arms.gradual]", '[arms."random, weights"]', "would share the folder random-weights"),
        ("[arms.gradual]", '[arms.".."]', "need a folder"),
        ("rounds = 1 }", 'rounds = 1 }\nfreeze = "conv1"', "freeze: expected a list such as"),
        ("rounds = 1 }", "rounds = 1 }\nmin_keep = 1.5", "min_keep: expected a whole number"),
        ("rounds = 1 }", "rounds = 1 }\nround_to = 8", "method gradual takes no round-to"),
        ('model = "resnet8"', "", "no model; give --model"),
    ],
)
def test_mistakes_in_a_recipe_are_named(recipe: Path, old: str, new: str, message: str) -> None:
    recipe.write_text(RECIPE.replace(old, new))
    with pytest.raises((SecateurError, FileError), match=message):
        Comparison.read(recipe).cells()


def test_arms_are_tables(recipe: Path) -> None:
    recipe.write_text(RECIPE.partition("[arms.dense]")[0] + "arms = 3\n")
    with pytest.raises(SecateurError, match="arms: expected a table per arm"):
        Comparison.read(recipe)


def test_runs_of_other_settings_are_left_alone(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    comparison = Comparison.read(recipe, seeds=[0], arms={"dense": {}})
    compare(comparison, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(FileError, match="train_images was 100, is now 90"):
        compare(Comparison.read(recipe, seeds=[0], train_images=90), out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_latency_that_cannot_be_measured_costs_no_page(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(sys.modules["secateur.runs.compare"], "compare_latency", broken)
    said: list[str] = []
    (outcome,) = compare(Comparison.read(recipe, seeds=[0], arms={"dense": {}}), tmp_path, tell=said.append)
    assert outcome.accuracy is not None
    assert outcome.latency is None
    assert "latency could not be measured (MemoryError: )" in said[-1]
    assert (tmp_path / "index.html").exists()


def test_two_phases_see_what_one_of_their_length_sees(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Methods that cut in between get neither the first epochs' order nor their augmentation again."""
    seen: list[int] = []
    epoch = Batches.epoch

    def noted(self: Batches, number: int, **more: int) -> object:
        if self.shuffle:
            seen.append(number)
        return epoch(self, number, **more)

    monkeypatch.setattr(Batches, "epoch", noted)
    for cell in Comparison.read(recipe, seeds=[0]).cells()[:2]:
        seen.clear()
        run_only(Comparison.read(recipe, seeds=[0]), cell.name, tmp_path / "out")
        assert seen == [0, 1], cell.name


def test_with_weights_the_dense_arm_trains_on_as_others_do(tmp_path: Path, recipe: Path) -> None:
    first = Comparison.read(recipe, seeds=[0], arms={"dense": {}})
    compare(first, tmp_path / "scratch")
    weights = tmp_path / "scratch" / "dense" / "dense" / "seed-0" / "model.safetensors"
    second = Comparison.read(recipe, arms={"dense": {}, "l2": {"method": "oneshot"}}, weights=str(weights))
    assert all(epochs(cell) == SCHEDULES["tiny"].tune_epochs for cell in second.cells())
    outcomes = compare(second, tmp_path / "on")
    assert all(not o.error for o in outcomes), [o.error for o in outcomes]
    dense = {o.seed: o.accuracy for o in outcomes if o.arm == "dense"}
    for o in outcomes:
        if o.arm == "l2":
            assert o.accuracy_dense is not None
    row = next(row for row in standings(outcomes) if row.arm == "l2")
    pairs = [(o.accuracy or 0) - (dense[o.seed] or 0) for o in outcomes if o.arm == "l2"]
    assert row.difference == pytest.approx(sum(pairs) / 2)


def test_the_committed_recipes_are_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])  # for the peers
    folder = Path("benchmarks") / "compare"
    recipes = sorted(folder.glob("*.toml"))
    assert recipes
    for path in recipes:
        assert Comparison.read(path).cells()


def test_an_arm_has_the_defaults_of_the_command_line() -> None:
    assert Arm(method="oneshot").score == "l2"
