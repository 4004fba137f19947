"""Masks of single weights: patterns, files, and zeros that stay through training, checkpoint and resume."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from secateur.errors import CutError, FileError, PlanError
from secateur.plan.bits import pack, unpack
from secateur.plan.weight_plan import WeightPlan, pattern_mask, to_semi_structured_, top
from secateur.recipes.data import load_data
from secateur.recipes.models import build_model
from secateur.recipes.train import TrainConfig, fit
from secateur.surgery import load, save


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )  # fmt: skip


def masks_of(model: nn.Module, keep: float = 0.3) -> dict[str, torch.Tensor]:
    return {
        name: top(p.detach().abs(), round(keep * p.numel()))
        for name, p in model.named_parameters()
        if p.ndim > 1
    }


@pytest.mark.parametrize("shape", [(1,), (8,), (3, 5), (7, 3, 3, 3), (0,)])
def test_bits_round_trip(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.5
    assert torch.equal(unpack(pack(mask), shape), mask)
    with pytest.raises(ValueError):
        unpack(torch.zeros(99, dtype=torch.uint8), shape)


def test_top_keeps_exactly_so_many_and_the_first_of_equals() -> None:
    assert top(torch.ones(2, 3), 4).tolist() == [[True] * 3, [True, False, False]]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_patterns_hold_in_every_block_and_keep_the_best(n: int, m: int) -> None:
    score = torch.rand(6, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    mask = pattern_mask(score, n, m)
    assert mask is not None
    blocks, scores = mask.reshape(-1, m), score.reshape(-1, m)
    assert (blocks.sum(1) == n).all()
    for block, values in zip(blocks, scores, strict=True):
        assert values[block].min() >= values[~block].max()
    assert pattern_mask(torch.rand(4, 3, 3, 3), n, m) is None  # 27 weights per output


def test_no_sparse_kernels_on_a_cpu() -> None:
    with pytest.raises(CutError, match="CUDA"):
        to_semi_structured_(small())


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    model = small()
    plan = WeightPlan.of(model, masks_of(model), {"allocation": "test"})
    plan.save(tmp_path / "masks.safetensors")
    again = WeightPlan.load(tmp_path / "masks.safetensors")
    assert again.origin == plan.origin
    assert again.fingerprint == plan.fingerprint
    assert all(torch.equal(again.masks[name], mask) for name, mask in plan.masks.items())
    assert (again.kept, again.weights) == (plan.kept, plan.weights)
    again.check(model)
    with pytest.raises(PlanError, match="made for model"):
        again.check(nn.Linear(2, 2))
    with pytest.raises(PlanError, match="7"):
        replace(again, masks={**again.masks, "6.weight": torch.ones(7, 7, dtype=torch.bool)}).check(model)
    save(model, tmp_path / "model.safetensors")
    with pytest.raises(FileError, match="format"):
        WeightPlan.load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_masked_weights_are_exactly_zero_after_every_step(optimizer: type[torch.optim.Optimizer]) -> None:
    model = small()
    plan = WeightPlan.of(model, masks_of(model))
    opt = optimizer(model.parameters(), lr=0.1, weight_decay=0.1)
    free = copy.deepcopy(model)
    with plan.holding(model):
        for _ in range(3):
            opt.zero_grad()
            model(torch.randn(4, 1, 8, 8)).square().mean().backward()
            opt.step()
            for name, mask in plan.masks.items():
                assert (model.get_parameter(name)[~mask] == 0).all()
    assert any(not torch.equal(p[plan.masks[n]], free.get_parameter(n)[plan.masks[n]])
               for n, p in model.named_parameters() if n in plan.masks)  # fmt: skip
    opt.zero_grad()
    model(torch.randn(4, 1, 8, 8)).square().mean().backward()
    opt.step()  # outside of the context nothing holds them
    assert any((model.get_parameter(n)[~m] != 0).any() for n, m in plan.masks.items())


class Stop(Exception):
    pass


def test_masks_hold_through_training_checkpoint_and_resume(tmp_path: Path) -> None:
    data = load_data("digits").subset(train_images=160, test_images=40)
    config = TrainConfig.finetune(2, lr=0.05, batch_size=32, checkpoint_every=3, ema=0.9)
    start = _net()
    plan = WeightPlan.of(start, masks_of(start))

    whole = copy.deepcopy(start)
    with plan.holding(whole):
        fit(whole, data, config, tmp_path / "whole", progress=False)

    killed, steps = copy.deepcopy(start), 0

    def kill(*_: object) -> None:
        nonlocal steps
        steps += 1
        if steps == 8:
            raise Stop

    handle = killed.register_forward_pre_hook(kill)
    with pytest.raises(Stop), plan.holding(killed):
        fit(killed, data, config, tmp_path / "killed", progress=False)
    handle.remove()
    resumed = copy.deepcopy(start)
    with plan.holding(resumed):
        fit(resumed, data, config, tmp_path / "killed", resume=True, progress=False)
    for name, p in whole.state_dict().items():
        assert torch.equal(p, resumed.state_dict()[name]), name
    for name, mask in plan.masks.items():
        assert (resumed.get_parameter(name)[~mask] == 0).all()
        assert not torch.equal(resumed.get_parameter(name), start.get_parameter(name))


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 49, 10)
    )


def test_a_sparse_file_is_smaller_and_loads_bit_equal(tmp_path: Path) -> None:
    model = build_model("resnet20", classes=10)
    save(model, tmp_path / "dense.safetensors")
    plan = WeightPlan.of(model, masks_of(model, keep=0.1))
    plan.apply_(model)
    with torch.no_grad():
        model.fc.weight[0, 0] = -0.0  # type: ignore[union-attr,index]
    save(model, tmp_path / "sparse.safetensors")
    again = load(build_model("resnet20", classes=10), tmp_path / "sparse.safetensors")
    for name, tensor in model.state_dict().items():
        other = again.state_dict()[name]
        assert torch.equal(tensor, other), name
        if tensor.is_floating_point():
            assert torch.equal(tensor.signbit(), other.signbit()), name
    dense, sparse = ((tmp_path / f"{name}.safetensors").stat().st_size for name in ("dense", "sparse"))
    assert sparse < 0.2 * dense


def test_a_sparse_file_that_lies_about_its_shape_is_refused(tmp_path: Path) -> None:
    from secateur.files import read_tensors, write_tensors

    model = small()
    WeightPlan.of(model, masks_of(model, 0.1)).apply_(model)
    save(model, tmp_path / "m.safetensors")
    tensors, metadata = read_tensors(tmp_path / "m.safetensors")
    for change in (
        ("[8, 8, 3, 3]", "[800000, 800000, 3, 3]"),
        ("[8, 8, 3, 3]", "[8, 8, 3, 2]"),
        ('"3.weight"', '"9.weight"'),
    ):
        write_tensors(
            tmp_path / "bad.safetensors", tensors, {**metadata, "recipe": metadata["recipe"].replace(*change)}
        )
        with pytest.raises(FileError, match="weight"):
            load(small(), tmp_path / "bad.safetensors")
