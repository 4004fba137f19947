"""Attention that was rewritten for fewer heads, called with masks that the example did not have."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.errors import CutError, FileError
from secateur.files import read_tensors, write_tensors
from secateur.rewriting.rewrite import rewritten_modules


class Attending(nn.Module):
    """Torch's own attention, masked in training only, as detectors that learn to denoise do it."""

    def __init__(self, weights: bool = True) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.weights = weights

    def forward(self, x: Tensor, **masks: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.attention(x, x, x, need_weights=self.weights, **masks)[0])


class Own(nn.Module):
    """Attention with a number of heads written into its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (layer(x).view(batch, length, 4, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = q @ k.transpose(2, 3) / 2
        if mask is not None:
            scores = scores + mask
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width))


class Padded(nn.Module):
    """Leaves a mask out that hides nothing, unless it is being captured, where that cannot be known."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention, self.head = nn.Linear(6, 16), Own(), nn.Linear(16, 3)

    def forward(self, x: Tensor, shown: Tensor) -> Tensor:
        mask = None
        if torch.compiler.is_exporting() or not shown.all():
            mask = torch.zeros(shown.shape, dtype=x.dtype).masked_fill(~shown, -1e4)[:, None, None]
        x = self.embed(x)
        return self.head(x + self.attention(x, mask))


def without_a_head(model: nn.Module, inputs: Any) -> tuple[nn.Module, nn.Module]:
    """The original with zeros for one head of the attention and some of the stream, and the same cut."""
    graph = sc.analyze(model, inputs)
    masks = [torch.arange(group.units) > 0 for group in graph.groups]
    plan = sc.Plan.of(graph, masks)
    assert any(group.units == 4 for group in graph.groups)  # heads
    masked = sc.mask_(copy.deepcopy(model), graph, plan)
    return masked, sc.cut_(copy.deepcopy(model), graph, plan)


HIDING: dict[str, Callable[[], dict[str, Tensor]]] = {
    "none": dict,
    "bool": lambda: {"attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(1)},
    "float": lambda: {"attn_mask": torch.randn(5, 5)},
}


@pytest.mark.parametrize("weights", [True, False])
def test_attention_of_torch_takes_masks_after_a_cut(weights: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Attending(weights).eval(), torch.randn(2, 5, 6)
    masked, cut = without_a_head(model, x)
    assert list(rewritten_modules(cut)) == ["attention"]
    sc.save(cut, tmp_path / "cut.safetensors")
    loaded = sc.load(Attending(weights).eval(), tmp_path / "cut.safetensors")
    outputs = []
    for make in HIDING.values():
        given = make()
        outputs.append(cut(x, **given))
        torch.testing.assert_close(outputs[-1], masked(x, **given))
        assert torch.equal(loaded(x, **given), outputs[-1])
    assert not torch.allclose(outputs[0], outputs[1])
    more = torch.randn(3, 7, 6), torch.ones(7, 7, dtype=torch.bool).tril(-1)  # other sizes
    torch.testing.assert_close(cut(more[0], attn_mask=more[1]), masked(more[0], attn_mask=more[1]))
    cut.train()(x, **HIDING["bool"]()).sum().backward()
    assert cut.attention.in_proj_weight.grad.any()
    with pytest.raises(CutError, match="for other arguments"):
        cut(x, key_padding_mask=torch.zeros(2, 5), attn_mask=torch.zeros(5, 5))


def test_a_mask_that_is_there_only_in_a_capture(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Padded().eval(), torch.randn(2, 5, 6)
    shown = torch.ones(2, 5, dtype=torch.bool)
    masked, cut = without_a_head(model, {"x": x, "shown": shown})
    assert list(rewritten_modules(cut)) == ["attention"]
    hiding = shown & (torch.arange(5) != 3)
    for given in (shown, hiding):
        torch.testing.assert_close(cut(x, given), masked(x, given))
    assert not torch.allclose(cut(x, shown), cut(x, hiding))
    captured = torch.export.export(cut, (x, shown), strict=False).module()
    torch.testing.assert_close(captured(x, hiding), cut(x, hiding))


@pytest.mark.parametrize("others", [5, [{}] * 9, [{"kinds": ["what"]}]])
def test_programs_for_other_arguments_are_checked(others: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Attending().eval(), torch.randn(2, 5, 6)
    _, cut = without_a_head(model, x)
    path = tmp_path / "cut.safetensors"
    sc.save(cut, path)
    tensors, metadata = read_tensors(path)
    recipe = json.loads(metadata["recipe"])
    entry = recipe["rewritten"]["attention"]
    entry["others"] = [entry["program"] | other for other in others] if isinstance(others, list) else others
    write_tensors(path, tensors, metadata | {"recipe": json.dumps(recipe)})
    with pytest.raises(FileError, match=r"others must be a list|kinds must be a list"):
        sc.load(Attending().eval(), path)
