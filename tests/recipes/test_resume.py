"""Training that was killed goes on as if nothing had happened, and what does not fit is refused."""

import copy
import errno
import functools
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.errors import FileError, TrainingError
from secateur.files import read_tensors, write_tensors
from secateur.recipes.train import FitResult, TrainConfig, fit
from tests.processes import start, start_ranks
from tests.recipes.toy import (
    CONFIG,
    CONFIGS,
    Killed,
    assert_same_weights,
    before_step,
    kill,
    lines,
    scalars,
    timeless,
    toy_data,
    toy_model,
)

CHECKPOINT = "train.checkpoint.safetensors"
pytestmark = pytest.mark.xdist_group("resume")  # one process trains what all tests compare with


@dataclass(frozen=True)
class Run:
    """A whole run that was not disturbed; tests only read it."""

    model: nn.Module
    result: FitResult
    folder: Path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """The run of the settings of a name, made when a test first asks for it."""

    @functools.cache
    def run(name: str) -> Run:
        model, folder = toy_model(), tmp_path_factory.mktemp("whole")
        return Run(model, fit(model, toy_data(), CONFIGS[name], folder), folder)

    return run


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("step", [2, 4, 6, 9, 10, 13])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    name: str, step: int, finished: Callable[[str], Run], tmp_path: Path
) -> None:
    config, data = CONFIGS[name], toy_data()
    whole = finished(name)
    killed = toy_model()
    before_step(killed, step, kill)
    with pytest.raises(Killed):
        fit(killed, data, config, tmp_path, resume=True)
    resumed = toy_model(seed=1)
    done = fit(resumed, data, config, tmp_path, resume=True)

    assert_same_weights(resumed, whole.model)
    assert timeless(done.history) == timeless(whole.result.history)
    assert [asdict(epoch) for epoch in done.history] == lines(tmp_path)
    assert read_tensors(tmp_path / CHECKPOINT)[0].keys() == read_tensors(whole.folder / CHECKPOINT)[0].keys()


def test_only_steps_after_the_checkpoint_are_repeated(tmp_path: Path) -> None:
    killed, resumed = toy_model(), toy_model()
    before_step(killed, 11, kill)  # after the second epoch
    with pytest.raises(Killed):
        fit(killed, toy_data(), CONFIG, tmp_path)
    (tmp_path / ".train.checkpoint.0123.tmp.safetensors").touch()  # killed in the middle of a write
    steps: list[int] = []
    resumed.register_forward_pre_hook(lambda module, _: steps.append(1) if module.training else None)
    fit(resumed, toy_data(), CONFIG, tmp_path, resume=True)
    assert len(steps) == 15 - 8  # checkpoint_every is 4
    assert not list(tmp_path.glob(".*"))
    assert [event.step for event in scalars(tmp_path, "accuracy")] == [5, 10, 15]


def test_phases_live_side_by_side_and_are_not_repeated(tmp_path: Path) -> None:
    data = toy_data()
    first = toy_model()
    fit(first, data, CONFIG, tmp_path)
    fit(copy.deepcopy(first), data, TrainConfig.finetune(2, batch_size=16), tmp_path, phase="finetune")
    assert [line["phase"] for line in lines(tmp_path)] == ["train"] * 3 + ["finetune"] * 2

    again = toy_model(seed=1)
    before_step(again, 0, kill)
    before = lines(tmp_path)
    result = fit(again, data, CONFIG, tmp_path, resume=True)
    assert_same_weights(again, first)
    assert lines(tmp_path) == before
    assert [asdict(epoch) for epoch in result.history] == before[:3]

    fit(toy_model(), data, replace(CONFIG, epochs=1), tmp_path)  # afresh: its own lines only are replaced
    assert [line["phase"] for line in lines(tmp_path)] == ["train"] + ["finetune"] * 2


def train_and_die(folder: Path) -> None:
    model = toy_model()
    before_step(model, 7, lambda: os.kill(os.getpid(), signal.SIGKILL))
    fit(model, toy_data(), CONFIG, folder)


@pytest.mark.slow
def test_sigkill(finished: Callable[[str], Run], tmp_path: Path) -> None:
    killed = start(tmp_path / "printed", train_and_die, tmp_path / "killed")
    assert killed.end() == -signal.SIGKILL, killed.err
    resumed, whole = toy_model(seed=1), finished("sgd")
    done = fit(resumed, toy_data(), CONFIG, tmp_path / "killed", resume=True)
    assert_same_weights(resumed, whole.model)
    assert timeless(done.history) == timeless(whole.result.history)


def train_and_resume(config: TrainConfig, folder: Path) -> None:
    seed = int(os.environ["RANK"])  # the first process's weights count
    killed, resumed = toy_model(0, seed), toy_model(0, seed + 2)
    before_step(killed, 9, kill)
    try:
        fit(killed, toy_data(), config, folder)
    except Killed:
        fit(resumed, toy_data(), config, folder, resume=True)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    """With batch norm, a last batch of 7 images that two processes cannot share evenly, and a resumption."""
    config = replace(CONFIG, ema=0.5, clip_norm=0.5)
    two = start_ranks(tmp_path / "printed", train_and_resume, config, tmp_path / "two")
    assert two.end() == 0, two.err

    one = fit(toy_model(dropout=0), toy_data(), config, tmp_path / "one")
    assert [line["loss"] for line in lines(tmp_path / "two")] == pytest.approx([e.loss for e in one.history])
    assert [line["accuracy"] for line in lines(tmp_path / "two")] == [e.accuracy for e in one.history]
    ours, _ = read_tensors(tmp_path / "two" / "train.checkpoint.safetensors")
    theirs, _ = read_tensors(tmp_path / "one" / "train.checkpoint.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    model = toy_model()
    before_step(model, 6, lambda: model[6].bias.data.fill_(torch.nan))
    with pytest.raises(
        TrainingError, match=r"epoch 2, batch 2 of 5: the loss became .* Lower lr \(now 0.05\)"
    ):
        fit(model, toy_data(), CONFIG, tmp_path)
    assert_the_checkpoint_is_good(tmp_path)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    """The loss of step 8 is fine, its update is not, and then comes a checkpoint."""
    model = toy_model()
    before_step(model, 7, lambda: model[6].bias.register_hook(lambda gradient: gradient / 0))
    with pytest.raises(TrainingError, match="epoch 2, batch 3 of 5: the weights became"):
        fit(model, toy_data(), CONFIG, tmp_path)
    assert_the_checkpoint_is_good(tmp_path)


def assert_the_checkpoint_is_good(folder: Path) -> None:
    resumed, whole = toy_model(seed=1), toy_model()
    fit(resumed, toy_data(), CONFIG, folder, resume=True)
    fit(whole, toy_data(), CONFIG, folder / "whole")
    assert_same_weights(resumed, whole)


def test_a_full_disk_keeps_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename, count = os.replace, 0

    def refuse_the_third_checkpoint(source: Path, target: Path) -> None:
        nonlocal count
        count += target.suffix == ".safetensors"
        if count == 3:  # one at the start, one at step 4
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(source, target)

    monkeypatch.setattr(os, "replace", refuse_the_third_checkpoint)
    with pytest.raises(FileError, match="No space left on device"):
        fit(toy_model(), toy_data(), CONFIG, tmp_path)
    monkeypatch.undo()
    assert not list(tmp_path.glob(".*"))
    assert_the_checkpoint_is_good(tmp_path)


def test_a_folder_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match="could not be written"):
        fit(toy_model(), toy_data(), CONFIG, tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m, d, c: (m, d, replace(c, lr=0.1, ema=0.5)),
            "config.lr was 0.05, is now 0.1; config.ema was not given",
        ),
        (
            lambda m, d, c: (nn.Sequential(*m, nn.Linear(3, 3)), d, c),
            r"model.7.weight was not given, is now float32",
        ),
        (lambda m, d, c: (m.requires_grad_(False)[6].requires_grad_().train() and m, d, c), "frozen"),
        (lambda m, d, c: (m, replace(d, name="other"), c), "data.name was toy, is now other"),
        (
            lambda m, d, c: (m, replace(d, train=d.train.take(torch.arange(71).flip(0))), c),
            "data.checksum was",
        ),
    ],
)
def test_another_run_is_refused(
    change: Callable[..., Any], message: str, finished: Callable[[str], Run], tmp_path: Path
) -> None:
    shutil.copytree(finished("sgd").folder, tmp_path, dirs_exist_ok=True)
    before = {file: file.read_bytes() for file in tmp_path.glob("*.*")}
    model, data, config = change(toy_model(seed=1), toy_data(), CONFIG)
    untouched = copy.deepcopy(model)
    with pytest.raises(FileError, match=message):
        fit(model, data, config, tmp_path, resume=True)
    assert_same_weights(model, untouched)
    assert {file: file.read_bytes() for file in tmp_path.glob("*.*")} == before


def damage(tensors: dict[str, Tensor], header: dict[str, str], how: str) -> None:
    position = json.loads(header["position"])
    match how:
        case "no header":
            header.clear()
        case "other format":
            header["format"] = "2"
        case "no json":
            header["position"] = "{"
        case "wrong json":
            header["position"] = "[]"
        case "deep json":
            header["run"] = "[" * 100_000
        case "run is a list":
            header["run"] = "[]"
        case "position beyond":
            header["position"] = json.dumps(position | {"batch": 99})
        case "history too short":
            header["position"] = json.dumps(position | {"history": []})
        case "history of something":
            header["position"] = json.dumps(position | {"history": [{"phase": 1}]})
        case "seconds of text":
            header["position"] = json.dumps(position | {"seconds": "x"})
        case "no weight":
            del tensors["model.0.weight"]
        case "weight of a shape that broadcasts":
            tensors["model.0.weight"] = torch.zeros(1)
        case "weight of another type":
            tensors["model.0.weight"] = tensors["model.0.weight"].double()
        case "no tally":
            del tensors["tally"]
        case "part of the optimizer":
            del tensors["optimizer.step.0.weight"]
        case "optimizer of another shape":
            tensors["optimizer.exp_avg.0.weight"] = torch.zeros(1)


@pytest.mark.parametrize(
    "how",
    [
        "no header",
        "other format",
        "no json",
        "wrong json",
        "deep json",
        "run is a list",
        "position beyond",
        "history too short",
        "history of something",
        "seconds of text",
        "no weight",
        "weight of a shape that broadcasts",
        "weight of another type",
        "no tally",
        "part of the optimizer",
        "optimizer of another shape",
    ],
)
def test_a_damaged_checkpoint_is_refused(how: str, finished: Callable[[str], Run], tmp_path: Path) -> None:
    shutil.copytree(finished("adamw, average").folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / CHECKPOINT
    tensors, header = read_tensors(path)
    damage(tensors, header, how)
    write_tensors(path, tensors, header)
    model = toy_model(seed=1)
    with pytest.raises(FileError, match="not a checkpoint that training can go on from"):
        fit(model, toy_data(), CONFIGS["adamw, average"], tmp_path, resume=True)
    assert_same_weights(model, toy_model(seed=1))


def test_a_truncated_checkpoint_is_refused(finished: Callable[[str], Run], tmp_path: Path) -> None:
    shutil.copytree(finished("sgd").folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FileError, match="not a readable safetensors file"):
        fit(toy_model(), toy_data(), CONFIG, tmp_path, resume=True)


def test_metrics_of_another_kind_are_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("epoch 1: fine\n")
    with pytest.raises(FileError, match=r"'epoch 1: fine' is not a line of metrics"):
        fit(toy_model(), toy_data(), CONFIG, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == "epoch 1: fine\n"
