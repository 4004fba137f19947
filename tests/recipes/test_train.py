"""Training: what it learns, what it computes in a step, and how it leaves the model."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import ModelError, TrainingError
from secateur.files import read_tensors
from secateur.recipes.data import Batches, Split
from secateur.recipes.train import TrainConfig, _losses, evaluate, fit, learning_rate
from tests.recipes.toy import (
    CONFIG,
    CONFIGS,
    Killed,
    assert_same_weights,
    before_step,
    kill,
    lines,
    scalars,
    toy_data,
    toy_model,
)


def test_few_channels_are_planar_for_strided_1x1_convolutions_on_avx2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In n h w c, PyTorch's backward pass of such a layer writes outside of its memory there."""
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    model = nn.Sequential(
        nn.Conv2d(3, 5, 1),
        nn.Conv2d(5, 12, 1, stride=2),
        nn.Conv2d(12, 3, 1, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    seen: list[bool] = []
    for layer in model[1:3]:
        layer.register_forward_hook(
            lambda _, args, __: seen.append(args[0].is_contiguous()) if args[0].shape[1] < 8 else None
        )
    fit(model, toy_data(), replace(CONFIG, epochs=1), tmp_path)
    assert seen
    assert all(seen)
    assert not model[1]._forward_pre_hooks


def test_it_learns_and_leaves_its_traces(tmp_path: Path) -> None:
    model = toy_model()
    result = fit(model, toy_data(), replace(CONFIG, epochs=8), tmp_path)
    assert result.accuracy == result.history[-1].accuracy >= 0.9
    assert evaluate(model, toy_data()).accuracy == result.accuracy
    assert [asdict(epoch) for epoch in result.history] == lines(tmp_path)
    assert [(e.phase, e.epoch, e.step) for e in result.history] == [("train", k, 5 * k) for k in range(1, 9)]
    assert result.history[-1].loss < result.history[0].loss
    assert result.seconds == sum(epoch.seconds for epoch in result.history)
    assert {file.name for file in tmp_path.iterdir()} == {
        "metrics.jsonl",
        "tensorboard",
        "train.checkpoint.safetensors",
    }


def test_it_tests_as_seldom_as_told_and_learns_the_same(tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=5)
    often = fit(toy_model(), toy_data(), config, tmp_path / "often")
    seldom = fit(toy_model(), toy_data(), replace(config, test_every=2), tmp_path / "seldom")
    assert [epoch.accuracy is None for epoch in seldom.history] == [True, False, True, False, False]
    assert [epoch.loss for epoch in seldom.history] == [epoch.loss for epoch in often.history]
    assert seldom.accuracy == often.accuracy
    assert [event.step for event in scalars(tmp_path / "seldom", "accuracy")] == [10, 20, 25]


def test_images_grow_to_their_side_by_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sides = toy_model(), []
    model.register_forward_pre_hook(
        lambda m, args: sides.append(tuple(args[0].shape[2:])) if m.training else None
    )
    data = toy_data()
    fit(model, data, replace(CONFIG, epochs=4, initial_size=0.5), tmp_path)
    side = data.train.images.shape[-1]
    assert sides[0] == (side // 2, side // 2)
    assert sides == sorted(sides)
    assert sides[10:] == [(side, side)] * 10


@pytest.mark.parametrize(("pools", "least"), [(2, 4), (3, 8)])
def test_images_are_never_too_small_for_the_model(pools: int, least: int, tmp_path: Path) -> None:
    model = toy_model()
    for _ in range(pools):
        model.insert(3, nn.MaxPool2d(2))
    sides: list[int] = []
    model[0].register_forward_pre_hook(
        lambda _, args: sides.append(args[0].shape[-1]) if model.training else None
    )
    data = toy_data()
    state = torch.get_rng_state()
    fit(model, data, replace(CONFIG, epochs=4, initial_size=0.5), tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert min(sides) == sides[0] == least
    assert sides[-1] == data.train.images.shape[-1]


def test_training_needs_no_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.recipes.train_log.find_spec", lambda name: None)
    fit(toy_model(), toy_data(), replace(CONFIG, epochs=1), tmp_path)
    assert (tmp_path / "metrics.jsonl").exists()
    assert not (tmp_path / "tensorboard").exists()


def test_tensorboard_holds_the_metrics(tmp_path: Path) -> None:
    result = fit(toy_model(), toy_data(), CONFIG, tmp_path)
    assert [event.step for event in scalars(tmp_path, "accuracy")] == [5, 10, 15]
    for name in ("loss", "train_accuracy", "accuracy", "lr", "images_per_second"):
        values = [event.value for event in scalars(tmp_path, name)]
        assert values == pytest.approx([getattr(epoch, name) for epoch in result.history])


def test_progress_shows_on_a_terminal_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fit(toy_model(), toy_data(), CONFIG, tmp_path)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    fit(toy_model(), toy_data(), CONFIG, tmp_path, progress=False)
    assert capfd.readouterr() == ("", "")
    result = fit(toy_model(), toy_data(), CONFIG, tmp_path, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert f"train: epoch 3 of 3, accuracy {result.accuracy:.2%}" in err
    assert "15/15" in err


def test_losses_equal_the_formula() -> None:
    torch.manual_seed(0)
    logits, target, y = torch.randn(5, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    config = TrainConfig(epochs=1, label_smoothing=0.3, distill_weight=0.6, distill_temperature=2.0)
    for i in range(5):
        p = logits[i].softmax(0)
        wanted = torch.full((3,), 0.3 / 3)
        wanted[y[i]] += 0.7
        hard = -(wanted * p.log()).sum()
        soft, q = (target[i] / 2).softmax(0), (logits[i] / 2).softmax(0)
        distance = (soft * (soft / q).log()).sum()
        torch.testing.assert_close(_losses(logits, y, None, config)[i], hard)
        torch.testing.assert_close(
            _losses(logits, y, target, config)[i], 0.4 * hard + 0.6 * 2.0**2 * distance
        )


def test_a_teacher_is_approached_and_left_alone(tmp_path: Path) -> None:
    data, teacher = toy_data(), toy_model(dropout=0.9, seed=5)
    teacher[6].weight.data *= 20
    before = copy.deepcopy(teacher)
    student = toy_model()
    result = fit(
        student,
        data,
        replace(CONFIG, epochs=8, distill_weight=1.0),
        tmp_path,
        teacher=teacher,
        progress=False,
    )
    assert result.history[-1].loss < 0.3 * result.history[0].loss
    assert teacher.training
    assert_same_weights(teacher, before)


def oracle(schedule: str) -> Callable[[torch.optim.Optimizer], Any]:
    from torch.optim import lr_scheduler

    return {
        "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 20),
        "steps": lambda o: lr_scheduler.MultiStepLR(o, [10, 15], 0.1),
        "one-cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.5, 20, cycle_momentum=False),
        "constant": lambda o: lr_scheduler.ConstantLR(o, 1.0),
    }[schedule]


@pytest.mark.parametrize("schedule", ["cosine", "steps", "one-cycle", "constant"])
def test_schedules_equal_torchs(schedule: Any) -> None:
    config = TrainConfig(epochs=4, lr=0.5, schedule=schedule)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = oracle(schedule)(optimizer)
    for step in range(20):
        assert learning_rate(config, step, 20) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        optimizer.step()
        scheduler.step()


def test_warm_up_is_linear_and_then_the_whole_schedule_follows() -> None:
    config = TrainConfig(epochs=4, lr=1.0, warmup_epochs=0.5)
    rates = [learning_rate(config, step, 40) for step in range(40)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:] == [learning_rate(TrainConfig(epochs=1, lr=1.0), step, 35) for step in range(35)]


@pytest.mark.parametrize("schedule", ["cosine", "steps", "one-cycle", "constant"])
def test_the_shortest_run_has_a_rate(schedule: Any) -> None:
    for steps in (1, 2, 3):
        rates = [learning_rate(TrainConfig(epochs=1, schedule=schedule), k, steps) for k in range(steps)]
        assert all(0 < rate <= 0.1 for rate in rates)


def test_one_step_equals_sgd_by_hand(tmp_path: Path) -> None:
    data = toy_data()
    data = replace(data, train=data.train.take(torch.arange(16)))
    config = TrainConfig(epochs=1, batch_size=16, lr=0.1, weight_decay=0.2, channels_last=False)
    model = toy_model(dropout=0)
    by_hand = copy.deepcopy(model)
    batches = Batches(
        data.train, batch_size=16, normalisation=data.normalisation, augment=data.augment, shuffle=True
    )
    ((x, y),) = batches.epoch(0)
    F.cross_entropy(by_hand(x), y).backward()
    fit(model, data, config, tmp_path)
    for (name, p), q in zip(by_hand.named_parameters(), model.parameters(), strict=True):
        assert p.grad is not None
        gradient = p.grad + (0.2 * p if p.ndim > 1 else 0)
        torch.testing.assert_close(q, p - 0.1 * (1 + 0.9) * gradient, msg=name)


def test_the_average_follows_the_weights(tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=1, ema=0.3)
    model = toy_model()
    seen: list[Tensor] = []
    model.register_forward_pre_hook(
        lambda module, _: seen.append(module[0].weight.detach().clone()) if module.training else None
    )
    fit(model, toy_data(), config, tmp_path)
    last, _ = read_tensors(tmp_path / "train.checkpoint.safetensors")
    average = seen[0]
    for step, weight in enumerate([*seen[1:], last["model.0.weight"]]):
        decay = min(0.3, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(model[0].weight.detach(), average)
    assert int(model[1].num_batches_tracked) == 5


def test_bf16_trains(tmp_path: Path) -> None:
    model = toy_model()
    seen = set()
    model[0].register_forward_hook(lambda module, _, y: seen.add((module.training, y.dtype)))
    result = fit(model, toy_data(), replace(CONFIG, epochs=8, precision="bf16"), tmp_path)
    assert result.accuracy >= 0.9
    assert seen == {(True, torch.bfloat16), (False, torch.float32)}


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_steps_train_the_same(tmp_path: Path) -> None:
    graphs = torch._dynamo.utils.counters["stats"]
    models, histories = {}, {}
    for compile in (False, True):
        graphs.clear()
        models[compile] = toy_model(dropout=0.0)
        histories[compile] = fit(
            models[compile],
            toy_data(),
            replace(CONFIG, epochs=2, compile=compile, distill_weight=0.5),
            tmp_path / str(compile),
            teacher=toy_model(seed=1),
        ).history
        assert graphs["unique_graphs"] == (4 if compile else 0)  # whole and last batch; the teacher as well
    for plain, compiled in zip(histories[False], histories[True], strict=True):
        assert compiled.loss == pytest.approx(plain.loss, rel=1e-4)
    for name, tensor in models[False].state_dict().items():
        torch.testing.assert_close(models[True].state_dict()[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_machine_that_cannot_compile_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/no/compiler",))
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    torch._dynamo.reset()
    with pytest.raises(
        TrainingError, match=r"torch.compile cannot compile Sequential here. Train without compile"
    ):
        fit(toy_model(), toy_data(), replace(CONFIG, compile=True), tmp_path)


def test_the_model_comes_back_as_it_was(tmp_path: Path) -> None:
    model = toy_model().eval()
    model[5].train()
    model[0].requires_grad_(False)
    frozen = model[0].weight.detach().clone()
    parameters = [id(p) for p in model.parameters()]
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    fit(model, toy_data(), CONFIG, tmp_path)
    assert torch.equal(torch.rand(3), expected), "the caller's random numbers are disturbed"
    assert [module.training for module in model] == [False] * 5 + [True, False]
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True, True, True]
    assert torch.equal(model[0].weight, frozen)
    assert [id(p) for p in model.parameters()] == parameters
    assert all(p.grad is None for p in model.parameters())


def test_the_model_comes_back_as_it_was_after_an_error(tmp_path: Path) -> None:
    model = toy_model().eval()
    before_step(model, 1, kill)
    with pytest.raises(Killed):
        fit(model, toy_data(), CONFIG, tmp_path)
    assert not any(module.training for module in model)
    assert all(p.grad is None for p in model.parameters())


def test_evaluate_equals_the_definition() -> None:
    model, data = toy_model(), toy_data()
    result = evaluate(model, data, batch_size=7)
    assert model.training
    logits = model.eval()(data.normalisation(data.test.images))
    assert result.accuracy == (logits.argmax(1) == data.test.labels).double().mean()
    assert result.loss == pytest.approx(float(F.cross_entropy(logits, data.test.labels).detach()), rel=1e-5)
    assert result.answers.tolist() == logits.argmax(1).tolist()
    assert result.confidences.tolist() == pytest.approx(logits.softmax(1).amax(1).tolist(), rel=1e-4)
    assert evaluate(model, data, "train") != result


def test_evaluation_keeps_nothing_for_gradients_and_takes_few_large_images_at_a_time() -> None:
    seen: list[tuple[int, bool]] = []
    model, data = toy_model(), toy_data()
    model.register_forward_hook(lambda _, inputs, output: seen.append((len(inputs[0]), output.requires_grad)))
    evaluate(model, data)
    assert seen == [(len(data.test), False)]
    large = replace(data, test=Split(torch.zeros(8, 3, 224, 224, dtype=torch.uint8), data.test.labels[:8]))
    evaluate(model, large)
    assert [images for images, _ in seen[1:]] == [5, 3]


def test_a_model_without_logits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"Sequential: returned \(16, 32\) for images \(16, 3, 8, 8\)"):
        fit(toy_model()[:6], toy_data(), replace(CONFIG, ema=None), tmp_path)
    with pytest.raises(ModelError, match=r"expected logits \(30, 3\)"):
        evaluate(toy_model()[:5], toy_data())


def test_settings_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    model, data = toy_model(), toy_data()
    with pytest.raises(TrainingError, match=r"distill_weight is 0.5 with no teacher"):
        fit(model, data, replace(CONFIG, distill_weight=0.5), tmp_path)
    with pytest.raises(TrainingError, match=r"distill_weight is 0.0 with a teacher"):
        fit(model, data, CONFIG, tmp_path, teacher=model)
    with pytest.raises(TrainingError, match=r"phase is '\.\./up'"):
        fit(model, data, CONFIG, tmp_path, phase="../up")
    with pytest.raises(TrainingError, match="all parameters are frozen"):
        fit(toy_model().requires_grad_(False), data, CONFIG, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs is 0; expected a whole number, at least 1"),
        ({"lr": float("nan")}, "lr is nan; expected a number above 0"),
        ({"lr": "0.1"}, "lr is '0.1'; expected a number above 0"),
        ({"optimizer": "adam"}, "optimizer is 'adam'; expected one of sgd, adamw"),
        ({"precision": "fp16"}, "precision is 'fp16'; expected one of no, bf16"),
        ({"schedule": "linear"}, "schedule is 'linear'; expected one of cosine"),
        ({"schedule": "one-cycle", "warmup_epochs": 1}, "rises by itself"),
        ({"momentum": 0.0}, "nesterov is True; expected False where momentum is 0"),
        ({"warmup_epochs": 2}, "warmup_epochs is 2; expected 0 <= warmup_epochs < epochs"),
        ({"milestones": (0.5, 30)}, "milestones is "),
        ({"ema": 1.0}, "ema is 1.0; expected a number, at least 0, below 1, or None"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        TrainConfig(**({"epochs": 2} | settings))


def test_settings_survive_json() -> None:
    for config in (*CONFIGS.values(), TrainConfig.finetune(3, ema=0.5)):
        assert TrainConfig(**json.loads(json.dumps(asdict(config)))) == config
