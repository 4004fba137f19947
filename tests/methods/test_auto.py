"""Method auto: its rules, and that a run says what it chose."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from secateur import save
from secateur.errors import SecateurError
from secateur.methods import RD, Auto, OneShot, PreCrop, choose, method_named
from secateur.runs.config import PruneConfig, Task
from secateur.runs.pipeline import prune_run
from secateur.runs.task import fresh_model

ENOUGH: dict[str, Any] = {"bounds": ["macs"], "trained": True, "data": True, "training": False}
TASK = Task(model="resnet8", data="digits", image_size=8, train_images=100, test_images=100)


def test_trained_weights_and_data_are_measured_on():
    untrained, trained = choose(Auto(), **ENOUGH), choose(Auto(), **ENOUGH | {"training": True})
    assert untrained.method == RD(stream_gain=1.0)
    assert trained.method == RD()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"trained": False}, "weights are not trained"),
        ({"data": False}, "no data"),
        ({"bounds": ["macs", "params"]}, "2 bounds"),
        ({"bounds": ["activations"]}, "a peak"),
        ({"auto": Auto(options={"attention": "dims"})}, "rd takes no attention"),
    ],
)
def test_otherwise_scores_of_weights_do(change: dict[str, Any], reason: str):
    choice = choose(**{"auto": Auto()} | ENOUGH | change)
    assert isinstance(choice.method, OneShot)
    assert reason in choice.why


def test_before_a_training_fresh_weights_are_given_other_widths():
    fresh = ENOUGH | {"trained": False, "training": True}
    assert choose(Auto(), **fresh).method == PreCrop()
    assert choose(Auto(options={"streams": "shared"}), **fresh).method == PreCrop(streams="shared")
    assert choose(Auto(), **fresh | {"bounds": ["macs", "params"]}).method == PreCrop()
    assert isinstance(choose(Auto(), **fresh | {"bounds": ["activations"]}).method, OneShot)
    assert isinstance(choose(Auto(options={"score": "l1"}), **fresh).method, OneShot)


def test_options_and_frozen_modules_reach_the_chosen_method():
    auto = method_named("auto", {"score": "l1", "freeze": ["conv1"]})
    expected = OneShot(score="l1", freeze=("conv1",), compensation="least-squares")
    assert choose(auto, **ENOUGH).method == expected
    assert choose(auto, **ENOUGH | {"data": False}).method == OneShot(score="l1", freeze=("conv1",))
    assert choose(method_named("auto", {"levels": 5}), **ENOUGH).method == RD(levels=5, stream_gain=1.0)


def test_the_report_says_which_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    weights = tmp_path / "weights.safetensors"
    save(fresh_model("resnet8", 10, 1, 0), weights)
    config = PruneConfig(
        task=replace(TASK, weights=weights),
        budget={"macs": 0.5},
        method="auto",
        options={"levels": 3},
        calibration_images=16,
        exports=False,
    )
    report = prune_run(config, tmp_path / "out")
    assert report is not None
    assert report.method == "rd, stream_gain 1.0, levels 3"
    assert any("Method auto chose rd" in note for note in report.notes)
    again = prune_run(config, tmp_path / "out", mode="resume")
    assert again is not None
    assert again.method == report.method


def test_auto_has_no_options_of_its_own():
    with pytest.raises(SecateurError, match="method auto takes no rounds; name the method"):
        PruneConfig(task=TASK, budget={"macs": 0.5}, method="auto", options={"rounds": 2})
    with pytest.raises(SecateurError, match="score is 'l7'; expected one of"):
        PruneConfig(task=TASK, budget={"macs": 0.5}, method="auto", options={"score": "l7"})
