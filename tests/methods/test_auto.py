"""Method auto: its rules, and that a run says what it chose."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from secateur import save
from secateur.errors import SecateurError
from secateur.methods import METHODS, Choice, choose
from secateur.recipes.train_config import TrainConfig
from secateur.runs import PruneConfig, Task, fresh_model, load_subject, prune_run
from secateur.runs.auto import resolved

ENOUGH: dict[str, Any] = {"bounds": ["macs"], "trained": True, "data": True, "training": False, "side": 32}
TASK = Task(model="resnet8", data="digits", image_size=8, train_images=100, test_images=100)


def test_trained_weights_and_data_are_measured_on():
    untrained, trained = choose(**ENOUGH), choose(**ENOUGH | {"training": True})
    assert untrained.method == trained.method == "rd"
    assert (untrained.options, trained.options) == ({"stream_gain": 1.0}, {})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"trained": False}, "weights are not trained"),
        ({"data": False}, "no data"),
        ({"bounds": ["macs", "params"]}, "2 bounds"),
        ({"side": 224}, "224 pixels"),
        ({"wanted": ["attention"]}, "rd takes no attention"),
    ],
)
def test_otherwise_scores_of_weights_do(change: dict[str, Any], reason: str):
    choice = choose(**ENOUGH | change)
    assert choice.method == "oneshot"
    assert reason in choice.why


def test_every_choice_can_be_carried_out():
    for change in ({}, {"trained": False}, {"side": 224}):
        choice = choose(**ENOUGH | change)
        METHODS[choice.method].check(choice.method, choice.options)


def test_a_choice_that_prunes_during_training_takes_the_training(monkeypatch: pytest.MonkeyPatch):
    choice = Choice("gradual", "because", {"rounds": 2})
    monkeypatch.setattr("secateur.runs.auto.choose", lambda **_: choice)
    config = PruneConfig(task=TASK, keep_macs=0.5, method="auto", finetune=TrainConfig(epochs=2))
    found, subject = resolved(config, load_subject(TASK))
    assert (found.method, found.options, found.finetune) == ("gradual", {"rounds": 2}, None)
    assert found.train == config.finetune
    assert subject.notes[-1] == "because"


def test_the_report_says_which_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    weights = tmp_path / "weights.safetensors"
    save(fresh_model("resnet8", 10, 1, 0), weights)
    config = PruneConfig(task=replace(TASK, weights=weights), keep_macs=0.5, method="auto", exports=False)
    config = replace(config, calibration_images=64)
    report = prune_run(config, tmp_path / "out")
    assert report is not None
    assert report.method == "rd, stream_gain 1.0"
    assert any("Method auto chose rd" in note for note in report.notes)
    again = prune_run(config, tmp_path / "out", mode="resume")
    assert again is not None
    assert again.method == report.method


def test_options_for_channels_are_not_for_single_weights(tmp_path: Path):
    weights = tmp_path / "weights.safetensors"
    save(fresh_model("resnet8", 10, 1, 0), weights)
    task = replace(TASK, weights=weights)
    config = PruneConfig(task=task, sparsity=0.5, granularity="weights", method="auto")
    found, _ = resolved(config, load_subject(task))
    assert (found.method, found.options) == ("rd", {})


def test_auto_has_no_options_of_its_own():
    with pytest.raises(SecateurError, match="method auto takes no rounds; name the method"):
        PruneConfig(task=TASK, keep_macs=0.5, method="auto", options={"rounds": 2})
