"""Vision transformers of real widths at half their multiply-adds: what shrinks, and that the rest of the world agrees.

Their images are small and their blocks few: neither changes what is cut in a block.
"""

from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import secateur as sc
from secateur.export import export_onnx, onnx_runner
from secateur.methods import Pruned
from secateur.proof.verify import training_fails

NETWORKS = {
    "vit": lambda: timm.create_model("vit_small_patch16_224", img_size=64, depth=3),
    "swin": lambda: torchvision.models.SwinTransformer(
        patch_size=[4, 4], embed_dim=96, depths=[1, 2], num_heads=[3, 6], window_size=[7, 7]
    ),
}
X = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def shapes(name: str, model: nn.Module) -> dict[str, int]:
    """The sizes that matter: head channels of queries, keys and values, MLP width, embedding width."""
    sizes = dict(model.named_parameters())
    if name == "vit":
        block, embedding = "blocks.2", sizes["pos_embed"].shape[-1]
        attention, mlp = sizes[f"{block}.attn.qkv.weight"], sizes[f"{block}.mlp.fc1.weight"]
    else:
        block, embedding = "features.3.1", sizes["features.2.reduction.weight"].shape[0]
        attention, mlp = sizes[f"{block}.attn.qkv.weight"], sizes[f"{block}.mlp.0.weight"]
    assert attention.shape[1] == mlp.shape[1] == embedding
    return {"attention": attention.shape[0], "mlp": mlp.shape[0], "embedding": embedding}


@pytest.fixture(scope="module", params=NETWORKS)
def case(request: pytest.FixtureRequest) -> tuple[str, nn.Module, Pruned]:
    torch.manual_seed(0)
    model = NETWORKS[request.param]().eval()
    return request.param, model, sc.prune(model, X, budget=sc.Budget(macs=0.5), allocation="uniform")


HEAD = {"vit": 64, "swin": 32}
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("token networks")]


def test_heads_mlp_and_embedding_shrink(case: tuple[str, nn.Module, Pruned]) -> None:
    name, model, pruned = case
    before, after = shapes(name, model), shapes(name, pruned.model)
    assert 0.48 < pruned.after["macs"] / pruned.before["macs"] <= 0.5
    assert all(after[what] < 0.9 * before[what] for what in before), (before, after)
    assert after["attention"] % (3 * HEAD[name]) == 0  # whole heads
    assert pruned.proof.ok


def test_the_cut_model_trains(case: tuple[str, nn.Module, Pruned]) -> None:
    _, _, pruned = case
    assert not training_fails(pruned.model, pruned.graph, seed=0)


def test_onnx_agrees(case: tuple[str, nn.Module, Pruned], tmp_path: Path) -> None:
    _, _, pruned = case
    check = export_onnx(pruned.model, X, tmp_path / "cut.onnx")
    assert check.max_rel_error < 1e-4
    assert relative_error(pruned.model(X), onnx_runner(tmp_path / "cut.onnx")(X)[0]) < 1e-4


def relative_error(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / a.abs().max()).item()
