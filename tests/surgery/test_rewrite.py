"""Forwards with sizes written into them: rewritten where they must be, proven, and as usable as before."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.errors import CutError
from secateur.graph import named_tensors
from secateur.graph.capture import capture
from secateur.graph.shrink import shrink
from secateur.rewriting import draft
from secateur.rewriting.rewrite import Rewritten, rewritten_modules
from tests.oracles import random_masks
from tests.surgery.fixed_sizes import (
    NETWORKS,
    Attention,
    FixedView,
    TinyViT,
    cut_down,
    cut_once,
    make,
)

pytestmark = pytest.mark.xdist_group("rewritten")  # one process cuts each network


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NETWORKS)
def test_the_cut_equals_the_original_without_the_units(name: str, seed: int) -> None:
    model, x, graph, plan, cut = cut_once(name, seed)
    verification = sc.verify(model, cut, graph, plan)
    assert verification.ok, verification
    kept = plan.kept(graph)
    again = sc.Cost(sc.analyze(cut, x))
    assert (again.macs(), again.params()) == (sc.Cost(graph).macs(kept), sc.Cost(graph).params(kept))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_batch_size_and_precision(name: str) -> None:
    _, x, _, _, cut = cut_once(name)
    for batch in (1, 3, 5):
        images = torch.randn(batch, *x.shape[1:])
        with torch.no_grad():
            together, one = cut(images), torch.cat([cut(image[None]) for image in images])
        torch.testing.assert_close(together, one, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        double = copy.deepcopy(cut).double()(x.double())
        half = copy.deepcopy(cut).bfloat16()(x.bfloat16())
    assert double.dtype == torch.float64
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(double.float(), cut(x), rtol=1e-3, atol=1e-4)


def test_only_the_smallest_submodule_is_rewritten() -> None:
    model, _, graph, plan, cut = cut_once("vit")
    verification = sc.verify(model, cut, graph, plan)
    assert verification.rewritten == ("blocks.0.attn", "blocks.1.attn")
    assert "blocks.0.attn" in str(verification)
    assert isinstance(cut.blocks[0].attn, Attention)
    assert isinstance(cut.blocks[0].attn, Rewritten)
    assert [name for name, _ in named_tensors(cut)] == [name for name, _ in named_tensors(model)]
    assert cut.state_dict().keys() == model.state_dict().keys()


def test_training_goes_on() -> None:
    torch.manual_seed(0)
    model = TinyViT(drop=0.5)
    x = torch.randn(4, 3, 16, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(x).square().mean().backward()
    optimizer.step()
    graph = sc.analyze(model, x)
    calls = []
    model.blocks[0].attn.register_forward_hook(lambda *_: calls.append(1))
    parameters = list(model.parameters())
    cut = sc.cut_(model, graph, sc.Plan.of(graph, random_masks(graph, 0)), optimizer=optimizer)
    assert cut is model
    assert rewritten_modules(cut)["blocks.0.attn"].lost == ""
    assert all(a is b for a, b in zip(parameters, cut.parameters(), strict=True))
    calls.clear()
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = cut.train()(x).square().mean()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in cut.blocks[0].attn.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert len(calls) == 30
    assert losses[-1] < losses[0] / 2
    with torch.no_grad():
        assert not torch.equal(cut(x), cut(x))  # dropout, in training
        assert torch.equal(cut.eval()(x), cut(x))


def test_batch_norm_in_a_rewritten_module_follows_the_mode() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.bn, self.b = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.bn(self.a(x)).view(-1, 8, 16).view(-1, 8, 4, 4))

    torch.manual_seed(0)
    model, x = Normed(), 3 + torch.randn(4, 3, 4, 4)
    _, _, cut = cut_down(model, x)
    assert rewritten_modules(cut)[""].lost == ""
    before = cut.bn.running_mean.clone()
    cut.eval()(x)
    assert torch.equal(cut.bn.running_mean, before)
    cut.train()(x)
    moved = cut.bn.running_mean.clone()
    assert not torch.equal(moved, before)
    cut.bn.eval()
    cut(x)
    assert torch.equal(cut.bn.running_mean, moved)


def test_what_only_training_does_is_named() -> None:
    class Deep(FixedView):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y * torch.bernoulli(torch.full((len(y), 1, 1, 1), 0.9)) / 0.9 if self.training else y

    model, x = Deep().eval(), torch.randn(2, 3, 8, 8)
    graph, plan, cut = cut_down(model, x)
    assert "bernoulli" in rewritten_modules(cut)[""].lost
    assert "bernoulli" in sc.verify(model, cut, graph, plan).form


def test_copies_autocast_and_two_cuts() -> None:
    _, x, _, _, cut = cut_once("vit")
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(cut)(x), cut(x))
        with torch.autocast("cpu", torch.bfloat16):
            assert cut.blocks[0].attn(torch.randn(2, 16, cut.patch.out_channels)).dtype == torch.bfloat16
    graph = sc.analyze(cut, x)
    plan = sc.Plan.of(graph, random_masks(graph, 5))
    twice = sc.cut_(copy.deepcopy(cut), graph, plan)
    assert twice.patch.out_channels < cut.patch.out_channels
    assert sc.verify(cut, twice, graph, plan).ok


@pytest.mark.parametrize("name", NETWORKS)
def test_cut_again_by_the_graph_of_the_first_cut(name: str) -> None:
    """As methods do that remove in steps: the graph is derived, not captured again."""
    model, x = make(name)
    graph = now = sc.analyze(model, x)
    kept = [torch.arange(group.units) for group in graph.groups]
    cut = copy.deepcopy(model)
    for seed in range(3):
        masks = random_masks(now, seed)
        sc.cut_(cut, now, sc.Plan.of(now, masks))
        now = shrink(now, cut, masks)
        kept = [units[mask] for units, mask in zip(kept, masks, strict=True)]
    whole = [torch.zeros(group.units, dtype=torch.bool) for group in graph.groups]
    for mask, units in zip(whole, kept, strict=True):
        mask[units] = True
    plan = sc.Plan.of(graph, whole)
    assert sc.verify(model, cut, graph, plan).ok
    at_once = sc.cut_(copy.deepcopy(model), graph, plan)
    assert rewritten_modules(cut).keys() == rewritten_modules(at_once).keys()
    with torch.no_grad():
        torch.testing.assert_close(cut(x), at_once(x))


def test_what_was_pruned_can_be_pruned_again(tmp_path: Path) -> None:
    model, x = make("vit")
    first = sc.prune(model, x, budget=sc.Budget(macs=0.7), score="l2")
    second = sc.prune(first.model, x, budget=sc.Budget(macs=0.7), score="l2")
    third = sc.prune(second.model, x, budget=sc.Budget(macs=0.7), score="l2")
    assert all(pruned.proof.ok for pruned in (first, second, third))
    assert third.after["macs"] <= 0.35 * first.before["macs"]
    assert third.proof.rewritten == ("blocks.0.attn", "blocks.1.attn")
    third.save(tmp_path / "m.safetensors")
    loaded = sc.load(TinyViT(), tmp_path / "m.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(loaded(x), third.model(x))


@pytest.mark.parametrize("name", ["vit", "splits", "grouped"])
def test_a_method_that_removes_in_steps(name: str) -> None:
    model, x = make(name)
    session = sc.methods.Gradual(rounds=3).start(model, x, budget=sc.Budget(macs=0.5), steps=20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    widths = set()
    with session.attach(optimizer):
        for _ in range(20):
            model.train()(torch.randn(4, *x.shape[1:])).square().mean().backward()
            session.before_step()
            optimizer.step()
            session.after_step()
            optimizer.zero_grad()
            widths.add(sum(p.numel() for p in model.parameters()))
    pruned = session.finish()
    assert len(widths) > 2
    assert pruned.proof.ok
    assert pruned.proof.rewritten
    assert pruned.after["macs"] <= 0.5 * pruned.before["macs"]


def test_the_original_call_signature_stays() -> None:
    cut = cut_once("vit")[-1]
    attention, tokens = cut.blocks[0].attn, torch.randn(2, 16, cut.patch.out_channels)
    with torch.no_grad():
        assert torch.equal(attention(x=tokens), attention(tokens))
    with pytest.raises(TypeError):
        attention()


def test_other_arguments_are_refused_and_not_ignored() -> None:
    class Optional(FixedView):
        def forward(self, x: Tensor, flip: bool = False) -> Tensor:
            y = super().forward(x)
            return -y if flip else y

    model, x = Optional().eval(), torch.randn(2, 3, 8, 8)
    _, _, cut = cut_down(model, x)
    with torch.no_grad():
        cut(x, False)
        with pytest.raises(
            CutError, match=r"expected False, got True.*Analyse and cut the model with the inputs"
        ):
            cut(x, True)


def test_a_module_that_cannot_be_rewritten_is_named() -> None:
    class Odd(FixedView):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.linalg.det(x[:, 0, :2, :2]).view(-1, 1, 1, 1)

    model = nn.Sequential(Odd(), nn.ReLU()).eval()
    x = torch.randn(2, 3, 8, 8)
    graph = sc.analyze(model, x)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CutError, match=r"^0: its forward .*linalg_det.*freeze='0'.*unchanged"):
        sc.cut_(model, graph, sc.Plan.of(graph, random_masks(graph, 0)))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert type(model[0]) is Odd


def test_a_submodule_that_is_handed_a_buffer_is_rewritten_by_itself() -> None:
    class Toned(FixedView):
        def forward(self, x: Tensor, tone: Tensor) -> Tensor:
            return super().forward(x) * tone

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Toned()
            self.register_buffer("tone", torch.linspace(1, 2, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, self.tone)

    model, x = Outer().eval(), torch.randn(2, 3, 8, 8)
    graph, plan, cut = cut_down(model, x)
    assert list(rewritten_modules(cut)) == ["inner"]
    assert sc.verify(model, cut, graph, plan).ok


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_a_buffer_that_forward_counts_in_keeps_its_value(dtype: torch.dtype) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = FixedView()
            self.register_buffer("calls", torch.zeros(1, dtype=dtype))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.inner(x).float() * self.calls

    model, x = Counting().eval(), torch.randn(2, 3, 8, 8)
    graph, plan, cut = cut_down(model, x)
    assert sc.verify(model, cut, graph, plan).ok
    assert model.calls == cut.calls == 0


def test_a_stored_shape_follows() -> None:
    class Scale(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.shape = (width, 1, 1)
            self.scale = nn.Parameter(torch.rand(width))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale.view(self.shape)

    model = nn.Sequential(nn.Conv2d(3, 8, 3), Scale(8), nn.Conv2d(8, 4, 1)).eval()
    x = torch.randn(2, 3, 8, 8)
    graph, plan, cut = cut_down(model, x)
    assert not rewritten_modules(cut)
    assert cut[1].shape == (cut[1].scale.numel(), 1, 1)
    assert sc.verify(model, cut, graph, plan).ok


def test_blocks_that_are_alike_are_captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = []

    def counting(*args: Any, **kwargs: Any) -> Any:
        captured.append(args)
        return capture(*args, **kwargs)

    monkeypatch.setattr(draft, "capture", counting)
    model, x = TinyViT().eval(), torch.randn(2, 3, 16, 16)
    cut_down(model, x)
    once = len(captured)
    model.blocks[1].attn.drop = 0.5
    _, _, cut = cut_down(model, x)
    assert len(captured) - once == 2 * once
    attention = cut.train().blocks[1].attn
    same, other = (cut.blocks[i].attn.program for i in (0, 1))
    assert same != other
    tokens = torch.randn(2, 16, attention.qkv.in_features)
    assert not torch.equal(attention(tokens), attention(tokens))


def test_a_submodule_with_two_names_is_rewritten_by_itself() -> None:
    class Sharing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.last = FixedView(), nn.Conv2d(4, 3, 1)
            self.other = nn.Sequential(self.last, self.one)

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.other[1](x))

    model, x = Sharing().eval(), torch.randn(2, 3, 8, 8)
    graph, plan, cut = cut_down(model, x)
    assert list(rewritten_modules(cut)) == ["one"]
    assert sc.verify(model, cut, graph, plan).ok
