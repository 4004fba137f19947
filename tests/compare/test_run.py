"""Comparisons from end to end: outcomes, failures, going on, gathering."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from secateur.compare.recipe import Comparison
from secateur.compare.run import compare, run_only
from secateur.compare.statistics import rank_arms
from secateur.errors import FileError, SecateurError

from .conftest import ABLE, Finished

pytestmark = pytest.mark.xdist_group("comparison")  # one process makes the comparison that tests read

Write = Callable[..., Path]


def test_every_arm_has_an_outcome(finished: Finished) -> None:
    cells = len(finished.all)
    assert [line.split()[0] for line in finished.said[:cells]] == [
        f"{n}/{cells}" for n in range(1, cells + 1)
    ]
    assert finished.said[cells:] == ["Measuring latency"]
    for arm in ("dense", "l2, fine-tuned", "uniform width", "random weights", "gradual"):
        o = finished.outcomes[arm]
        assert o.error == ""
        assert o.share("macs") == 1 if arm == "dense" else 0.5 < o.share("macs") <= 0.6
        assert o.latency is not None
        masked = arm == "random weights"
        assert (o.step_macs, o.step_bytes, o.masked) == ((1.0, 1.0, True) if masked else (None, None, False))
        assert (o.epochs, o.training_seconds > 0) == (2, True)
    assert len({o.accuracy for o in finished.all}) > 5  # else equal accuracies would say nothing


@pytest.mark.parametrize("name", ABLE)
def test_every_method_can_be_an_arm(finished: Finished, name: str) -> None:
    pruned = [o for o in finished.all if finished.comparison.arms[o.arm].method == name and not o.error]
    assert pruned
    assert all(o.share("macs") <= o.budget["macs"] for o in pruned)
    assert all(o.masked or any(width.after < width.before for width in o.widths) for o in pruned)


def test_tables_page_and_runs_say_the_same(finished: Finished) -> None:
    outcomes, out = finished.all, finished.out
    progress = json.loads((out / "gradual" / "macs-0.6" / "seed-0" / "progress.json").read_text())
    assert progress["outcome"]["accuracy"] == finished.outcomes["gradual"].accuracy
    lines = list(csv.DictReader((out / "table.csv").read_text().splitlines()))
    assert [(line["arm"], line["error"]) for line in lines] == [(o.arm, o.error) for o in outcomes]
    assert [float(line["macs"]) for line in lines] == [o.share("macs") for o in outcomes]
    rows = [line for line in (out / "table.md").read_text().splitlines() if line.count("|") > 10]
    assert len(rows) == 2 + len(outcomes)  # the heading and the line below it
    page = (out / "index.html").read_text()
    assert all(arm in page for arm in finished.comparison.arms)


def test_a_failed_cell_does_not_stop_the_rest(finished: Finished) -> None:
    failed = {arm: o.error for arm, o in finished.outcomes.items() if o.error}
    assert list(failed) == ["impossible", "nothing", "broken"]
    assert "do not fit" in failed["impossible"]
    assert "got NoneType, expected the smaller model" in failed["nothing"]
    table = (finished.out / "table.md").read_text()
    assert all(text in table for text in ("do not fit", "got NoneType"))


def test_a_bug_in_a_method_is_kept_with_its_traceback(finished: Finished) -> None:
    assert finished.outcomes["broken"].error == "ZeroDivisionError: division by zero"
    (trace,) = (finished.out / "errors").iterdir()
    assert "code_of_mine.py" in trace.read_text()


def test_curves_are_measured_once_for_all_budgets(finished: Finished) -> None:
    first, second = (finished.curves[f"two-budgets/macs-{share}/seed-0"] for share in (0.7, 0.6))
    assert first
    assert second == first


def test_methods_of_ones_own(finished: Finished) -> None:
    masked, cut, proven = (finished.outcomes[arm] for arm in ("masked", "cut", "proven"))
    assert (masked.error, cut.error, proven.error) == ("", "", "")
    assert masked.share("macs") == 1.0
    assert masked.share("params") == pytest.approx(0.5, abs=0.04)  # and so still after fine-tuning
    assert (cut.kept, cut.widths) == (proven.kept, proven.widths)
    assert cut.accuracy == proven.accuracy
    assert cut.latency is not None

    def report(arm: str) -> dict[str, Any]:
        return json.loads((finished.out / arm / "macs-0.6" / "seed-0" / "report.json").read_text())  # type: ignore[no-any-return]

    assert report("cut")["verify_max_abs_error"] is None
    assert any("does not say which units went" in note for note in report("cut")["notes"])
    assert report("proven")["verify_max_abs_error"] < 1e-10
    assert any("budget is not met: 1.0000 of the MACs" in note for note in report("masked")["notes"])
    assert "| masked (over the budget) |" in (finished.out / "table.md").read_text()


def test_a_method_that_is_not_there_is_named(recipe: Write) -> None:
    with pytest.raises(SecateurError, match="has no function 'lost'"):
        run_only(Comparison.read(recipe(), arms={"a": {"method": "code_of_mine:lost"}}), "a", "out")


def test_going_on_repeats_nothing(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = ["dense", "gradual"]
    out, few = finished.copy(arms, tmp_path / "out"), finished.comparison.with_arms(arms)
    for name in ("prune_run", "train_run"):  # nothing is left to run
        monkeypatch.setattr(f"secateur.compare.cells.{name}", None)
    for again in (compare(few, out), compare(few, out, gather=True)):
        for o in again:
            before = finished.outcomes[o.arm]
            assert (o.accuracy, o.kept, o.widths) == (before.accuracy, before.kept, before.widths)
            if before.latency and before.latency.steady:
                assert o.latency == before.latency
    assert (out / "table.csv").read_text().count("\n") == 3


def test_cells_run_one_by_one_are_gathered(finished: Finished, tmp_path: Path) -> None:
    few, out = finished.comparison.with_arms(["dense", "random weights"]), tmp_path / "out"
    with pytest.raises(SecateurError, match="no run of this comparison is finished"):
        compare(few, out, gather=True)
    assert not out.exists()
    alone = run_only(few, "random-weights/macs-0.6/seed-0", out)
    assert alone.accuracy == finished.outcomes["random weights"].accuracy
    assert not (out / "table.md").exists()
    (some,) = compare(few, out, gather=True)
    assert (some.arm, some.accuracy) == ("random weights", alone.accuracy)
    assert "1 of 2 runs are not finished and left out." in (out / "table.md").read_text()
    assert "<dd>1 of 2</dd>" in (out / "index.html").read_text()
    finished.copy(["dense"], out)
    assert [o.accuracy for o in compare(few, out)] == [finished.outcomes["dense"].accuracy, alone.accuracy]
    assert "not finished" not in (out / "table.md").read_text()
    with pytest.raises(SecateurError, match="unknown cell 'gradual'; choose one of: dense/dense/seed-0"):
        run_only(few, "gradual", out)


def test_runs_of_other_settings_are_left_alone(finished: Finished, workshop: Path, tmp_path: Path) -> None:
    out = finished.copy(["dense", "random-weights"], tmp_path / "out")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    recipe = workshop / "all.toml"
    for arm, change, message in (
        ("dense", {"train_images": 90}, "train_images was 100, is now 90"),
        ("random weights", {"tune_lr": 0.001, "schedule": "short"}, "epochs was 2, is now 10"),
    ):
        other = Comparison.read(recipe, **change).with_arms([arm])
        for gather in (False, True):
            with pytest.raises(FileError, match=message):
                compare(other, out, gather=gather)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_latency_in_onnxruntime(finished: Finished, workshop: Path, tmp_path: Path) -> None:
    out = finished.copy(["dense", "l2-fine-tuned"], tmp_path)
    few = Comparison.read(workshop / "all.toml", latency_runtime="onnxruntime")
    found = compare(few.with_arms(["dense", "l2, fine-tuned"]), out)
    assert [o.accuracy for o in found] == [finished.outcomes[o.arm].accuracy for o in found]
    assert {o.latency.after.runtime for o in found if o.latency} == {"onnxruntime"}


def test_a_latency_that_cannot_be_measured_costs_no_page(
    finished: Finished, workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("secateur.compare.cells.compare_pair", broken)
    out, said = finished.copy(["dense"], tmp_path), []
    other = Comparison.read(workshop / "all.toml", latency_batch=2).with_arms(["dense"])
    (outcome,) = compare(other, out, tell=said.append)
    assert outcome.accuracy is not None
    assert outcome.latency is None
    assert "latency could not be measured (MemoryError: )" in said[-1]
    assert (out / "index.html").exists()


def test_with_weights_the_dense_arm_trains_on_as_others_do(
    finished: Finished, recipe: Write, tmp_path: Path
) -> None:
    weights = finished.out / "dense" / "dense" / "seed-0" / "model.safetensors"
    arms = {"dense": {}, "l2": {"method": "oneshot"}}
    comparison = Comparison.read(recipe(), arms=arms, weights=str(weights), tune_lr=0.1)
    dense, l2 = compare(comparison, tmp_path / "on")
    assert (dense.error, l2.error) == ("", "")
    assert l2.accuracy_dense == finished.outcomes["dense"].accuracy != dense.accuracy
    row = next(row for row in rank_arms([dense, l2]) if row.arm == "l2")
    assert row.difference == pytest.approx((l2.accuracy or 0) - (dense.accuracy or 0))
