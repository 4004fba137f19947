"""What the judge and the proof see."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.graph import named_tensors
from secateur.proof.reference import Reference
from secateur.proof.verify import randomise_
from secateur.rewriting.rewrite import rewritten_modules
from tests.oracles import random_masks
from tests.surgery.fixed_sizes import (
    cut_down,
    cut_once,
)


def test_an_implicit_scale_is_seen_although_everything_runs() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(12, 12) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
            return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    model, x = Heads(), torch.randn(2, 7, 12)
    graph, plan, cut = cut_down(model, x, attention="dims")
    assert cut.q.out_features < 12
    assert list(rewritten_modules(cut)) == [""]
    assert sc.verify(model, cut, graph, plan).ok
    own = copy.deepcopy(cut)
    own.__class__ = Heads
    with torch.no_grad():
        difference = (own(x) - cut(x)).abs().max() / cut(x).abs().max()
    assert 1e-5 < difference < 1  # it runs, and is a little wrong


pytestmark = pytest.mark.xdist_group("rewritten")


class Deep(nn.Module):
    """Residual blocks under an attention whose scale is implicit; its norms must fit what they see."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)) for _ in range(20)
        )
        self.q, self.k, self.v, self.head = (nn.Conv2d(8, n, 1) for n in (8, 8, 8, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        q, k, v = (each(x).flatten(2).transpose(1, 2)[:, None] for each in (self.q, self.k, self.v))
        return self.head(F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)[..., None])


def test_saturation_hides_nothing_from_the_judge() -> None:
    torch.manual_seed(0)
    model, x = Deep().eval(), torch.randn(1, 3, 8, 8)
    graph = sc.analyze(model, x)
    keep = [torch.arange(group.units) < (2 if group.name == "q" else group.units) for group in graph.groups]
    assert "q" in [group.name for group in graph.groups]
    plan = sc.Plan.of(graph, keep)
    proof = sc.verify(model, sc.cut_(copy.deepcopy(model), graph, plan), graph, plan)
    assert proof.ok, proof


def test_statistics_are_over_the_survivors() -> None:
    """By hand: LayerNorm of a width-4 stream of which one channel goes."""
    model = nn.Sequential(nn.Linear(2, 4, bias=False), nn.LayerNorm(4), nn.Linear(4, 1, bias=False))
    x = torch.randn(2, 2)
    graph = sc.analyze(model, x)
    plan = sc.Plan.of(graph, [torch.tensor([True, False, True, True])])
    cut = sc.cut_(copy.deepcopy(model), graph, plan)
    left = [0, 2, 3]
    h = F.layer_norm(x @ model[0].weight[left].T, [3])
    with torch.no_grad():
        torch.testing.assert_close(cut(x), h @ model[2].weight[:, left].T)
    verification = sc.verify(model, cut, graph, plan)
    assert verification.ok
    assert verification.statistics == ("1 (layer_norm)",)
    zeroed = sc.mask_(copy.deepcopy(model), graph, plan)
    with torch.no_grad():
        assert not torch.allclose(zeroed(x), cut(x), atol=1e-3)  # zeros alone say something else


@pytest.mark.parametrize("name", ["resnet8", "mobilenet_v2"])
def test_reference_and_masked_forward_agree_where_both_apply(name: str) -> None:
    from secateur.recipes.models import build_model

    model = randomise_(build_model(f"torchvision/{name}" if "mobile" in name else name), 0).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    graph = sc.analyze(model, x)
    plan = sc.Plan.of(graph, random_masks(graph, 0))
    masked = sc.mask_(copy.deepcopy(model), graph, plan)
    reference = Reference(graph.trace, graph.trace.survivors(plan.masks(graph)))
    result = reference.run(x, dict(named_tensors(masked)))
    assert not reference.sites
    with torch.no_grad():
        expected = masked(x)
    assert (result[0] - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_a_wrong_rewrite_is_not_proven() -> None:
    model, _, graph, plan, cut = cut_once("vit")
    cut = copy.deepcopy(cut)
    with torch.no_grad():
        cut.blocks[0].attn.qkv.weight[0] += 0.1
    assert not sc.verify(model, cut, graph, plan).ok


@torch.library.custom_op("secateur_test::halved", mutates_args=())
def halved(x: Tensor) -> Tensor:
    """It has no gradient."""
    return x / 2


@halved.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def in_place(y: Tensor, training: bool) -> Tensor:
    y = y.sigmoid()
    y *= 2  # sigmoid needs its result for the gradient
    return y


def in_place_view(y: Tensor, training: bool) -> Tensor:
    y = y.exp()
    y[:, :2] *= 2
    return y


def without_gradient(y: Tensor, training: bool) -> Tensor:
    with torch.no_grad():
        return y * 2


def targets_missing(y: Tensor, training: bool) -> Tensor:
    assert not training, "targets should not be none when in training mode"
    return y


UNTRAINABLE = {
    "in place": (in_place, "modified by an inplace operation"),
    "in place, in a view": (in_place_view, "modified by an inplace operation"),
    "custom operator": (lambda y, training: halved(y), "secateur_test.halved"),
    "no gradients": (without_gradient, "its outputs have no gradients"),
    "needs targets": (targets_missing, "targets should not be none"),
    "not finite": (lambda y, training: (y * 0).sqrt(), "its gradients are not finite"),
}


@pytest.mark.parametrize("how", UNTRAINABLE)
def test_what_cannot_be_trained_is_proven_without_a_training_step(how: str) -> None:
    decode, reason = UNTRAINABLE[how]

    class Decoded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.o = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return decode(self.o(self.a(x).relu()), self.training)

    torch.manual_seed(0)
    result = sc.prune(Decoded().eval(), torch.randn(1, 3, 8, 8), budget=sc.Budget(macs=0.5), round_to=1)
    assert result.model.a.out_channels == 8
    assert result.proof.ok
    assert reason in result.proof.untrained
    assert (
        f"no training step was compared, since the original cannot be trained ({result.proof.untrained})"
        in str(result)
    )


def test_a_cut_model_that_alone_cannot_be_trained_is_not_proven() -> None:
    model, _, graph, plan, cut = cut_once("vit")
    assert sc.verify(model, cut, graph, plan).untrained == ""
    spoilt = copy.deepcopy(cut)
    spoilt.register_forward_hook(lambda module, args, y: y.detach())
    proof = sc.verify(model, spoilt, graph, plan)
    assert not proof.trains
    assert not proof.ok
    assert "cannot be trained" in str(proof)


def test_the_training_step_is_taken_without_gradients_too() -> None:
    model, _, graph, plan, cut = cut_once("vit")
    with torch.no_grad():
        proof = sc.verify(model, cut, graph, plan)
    assert proof.trains
    assert not proof.untrained


class Places(nn.Module):
    """Sines of positions, summed up in float32 whatever the default is, as detectors write them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o, self.p = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1), nn.Conv2d(2, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        there = torch.ones(len(x), *x.shape[2:], dtype=torch.bool)
        rows, columns = there.cumsum(1, dtype=torch.float32), there.cumsum(2, dtype=torch.float32)
        places = torch.stack([rows / 3, columns / 7], 1).sin().to(self.p.weight.dtype)
        y, z = (self.a(x) + self.p(places)).view(-1, 16, 8, 8).relu().split(16, 1)[0], 1
        return self.o(y * z)


@pytest.mark.parametrize("default", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_precision_that_forward_names_is_judged_in_its_own(
    default: torch.dtype, dtype: torch.dtype
) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        torch.manual_seed(0)
        model = Places().to(dtype).eval()
        result = sc.prune(model, torch.randn(1, 3, 8, 8, dtype=dtype), budget=sc.Budget(macs=0.5), round_to=1)
    finally:
        torch.set_default_dtype(before)
    assert result.proof.ok
    assert result.proof.rewritten == ("",)
    assert result.model.a.out_channels < 16


def test_a_forward_that_names_no_precision_is_proven_in_float64() -> None:
    """A table of zeros and a quotient of whole numbers are float32 by default, and float64 meets them in a product."""

    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.keys, self.query, self.norm, self.out = (
                nn.Linear(3, 8),
                nn.Linear(8, 8),
                nn.LayerNorm(8),
                nn.Linear(8, 2),
            )

        def forward(self, x: Tensor) -> Tensor:
            queries = torch.zeros(len(x), 4, 8) + (torch.arange(4) / 4)[:, None]
            keys = self.norm(self.keys(x))
            return self.out(torch.softmax(self.query(queries) @ keys.mT, -1) @ keys)

    torch.manual_seed(0)
    model, x = Queries().eval(), torch.randn(1, 5, 3)
    pruned = sc.prune(model, x, budget=0.7, round_to=1)
    assert pruned.proof.ok
    assert not pruned.proof.replayed
    assert pruned.proof.statistics
    assert torch.get_default_dtype() is torch.float32
