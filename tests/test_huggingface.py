"""Hugging Face vision models from small configurations: dataclass outputs, keyword inputs, their own attention."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.graph import Graph
from secateur.proof.verify import randomise_
from secateur.rewriting.rewrite import rewritten_modules
from tests.oracles import random_masks, tensors_of, twin, without_units

transformers = pytest.importorskip("transformers")

SIZE = 32
TOKENS = {"image_size": SIZE, "patch_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDTHS = {"hidden_size": 32, "intermediate_size": 48}


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**TOKENS, **WIDTHS))


def deit() -> nn.Module:
    return transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**TOKENS, **WIDTHS))


def dinov2() -> nn.Module:
    config = transformers.Dinov2Config(**TOKENS, hidden_size=32, mlp_ratio=2)
    return transformers.Dinov2ForImageClassification(config)


def swin() -> nn.Module:
    config = transformers.SwinConfig(
        image_size=SIZE, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4
    )
    return transformers.SwinForImageClassification(config)


def convnext() -> nn.Module:
    config = transformers.ConvNextConfig(num_stages=2, hidden_sizes=[16, 24], depths=[1, 2])
    return transformers.ConvNextForImageClassification(config)


def segformer() -> nn.Module:
    config = transformers.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 32],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[2, 4],
        mlp_ratios=[2, 2],
        decoder_hidden_size=24,
        num_labels=5,
    )
    return transformers.SegformerForSemanticSegmentation(config)


def mobilevit() -> nn.Module:
    config = transformers.MobileViTConfig(
        image_size=64,
        hidden_sizes=[16, 20, 24],
        neck_hidden_sizes=[8, 8, 12, 16, 20, 24, 40],
        num_attention_heads=2,
    )
    model = transformers.MobileViTForImageClassification(config)
    for stage in model.mobilevit.encoder.layer[2:]:
        del stage.transformer.layer[1:]  # their number is no option
    return model


MODELS = {f.__name__: f for f in (vit, deit, dinov2, swin, convnext, segformer, mobilevit)}


@dataclass(frozen=True)
class Case:
    """A model, images, and the analysis that all tests of the model share."""

    name: str
    model: nn.Module
    x: torch.Tensor
    graph: Graph


def marked(name: str) -> object:
    """One process tests a model."""
    return pytest.param(name, marks=[pytest.mark.xdist_group(name), *[pytest.mark.slow] * (name != "vit")])


@pytest.fixture(scope="module", params=[marked(name) for name in MODELS])
def case(request: pytest.FixtureRequest) -> Case:
    model = built(request.param)
    size = getattr(model.config, "image_size", SIZE)
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    return Case(request.param, model, x, sc.analyze(model, {"pixel_values": x}))


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise_(MODELS[name](), 0).double().eval()


def test_a_random_cut_computes_what_is_left(case: Case, tmp_path) -> None:
    model, x, graph = case.model, case.x, case.graph
    plan = sc.Plan.of(graph, random_masks(graph, 0))
    expected = without_units(model, graph, plan, x)
    cut = sc.cut_(twin(model), graph, plan)
    with torch.no_grad():
        found = tensors_of(cut(pixel_values=x))
    for a, b in zip(expected, found, strict=True):
        assert ((a - b).abs().max() / a.abs().max()).item() < 1e-9
    sc.save(cut, tmp_path / "cut.safetensors")
    loaded = sc.load(built(case.name), tmp_path / "cut.safetensors")
    with torch.no_grad():
        for a, b in zip(found, tensors_of(loaded(pixel_values=x)), strict=True):
            assert torch.equal(a, b)


def test_half_of_the_macs(case: Case) -> None:
    model, x = built(case.name).float(), case.x.float()
    pruned = sc.prune(model, {"pixel_values": x}, budget=sc.Budget(macs=0.5), round_to=1)
    assert pruned.proof.ok
    assert 0.4 < pruned.after["macs"] / pruned.before["macs"] <= 0.5
    with torch.no_grad():
        assert type(pruned.model(pixel_values=x)) is type(model(pixel_values=x))


def test_most_of_the_network_is_prunable(case: Case) -> None:
    """With one unit left in every group, less than a quarter of the multiply-adds remain."""
    cost = sc.Cost(case.graph)
    assert cost.macs([1] * len(cost.full)) < 0.25 * cost.macs()


@pytest.mark.slow
def test_a_model_whose_own_forward_reads_widths_from_its_configuration(tmp_path) -> None:
    """The root takes its tokens apart by `config.hidden_sizes`: it keeps its forward, and so its loss."""
    torch.manual_seed(0)
    model = transformers.SegformerForImageClassification(transformers.SegformerConfig()).eval()
    x = torch.randn(1, 3, 128, 128)
    pruned = sc.prune(model, {"pixel_values": x}, budget=sc.Budget(macs=0.5))
    assert pruned.proof.ok
    assert pruned.after["macs"] <= 0.5 * pruned.before["macs"]
    assert all(".attention" in name for name in rewritten_modules(pruned.model))
    assert pruned.model.classifier.in_features == pruned.model.config.hidden_sizes[-1] < 256
    pruned.model(pixel_values=x, labels=torch.tensor([1])).loss.backward()
    pruned.save(tmp_path / "m.safetensors")
    fresh = transformers.SegformerForImageClassification(transformers.SegformerConfig()).eval()
    loaded = sc.load(fresh, tmp_path / "m.safetensors")
    with torch.no_grad():
        expected, found = pruned.model(pixel_values=x), loaded(pixel_values=x)
    assert type(expected) is type(found) is type(model(pixel_values=x))
    assert torch.equal(expected.logits, found.logits)
