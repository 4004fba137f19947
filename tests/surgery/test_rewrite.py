"""Forwards with sizes written into them: rewritten where they must be, proven, and as usable as before."""

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.errors import CutError, FileError
from secateur.export import export_onnx, export_program
from secateur.files import read_tensors, write_tensors
from secateur.graph import Graph, named_tensors
from secateur.graph.capture import capture
from secateur.proof.reference import Reference
from secateur.proof.verify import randomise_
from secateur.rewriting import draft
from secateur.rewriting.rewrite import Rewritten, rewritten_modules
from tests.oracles import random_masks


class Attention(nn.Module):
    """Its widths per head are worked out from the width of the input, and its scale from that."""

    def __init__(self, width: int, heads: int, drop: float = 0.0) -> None:
        super().__init__()
        self.count = heads  # no name that attention classes use
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.drop = drop
        self.register_buffer("table", torch.linspace(0, 1, heads))

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.count, c // self.count).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(F.dropout(y.transpose(1, 2).reshape(b, n, c), self.drop, self.training))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, drop: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads, drop)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TinyViT(nn.Module):
    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 24, 4, 4)
        self.position = nn.Parameter(torch.randn(1, 16, 24))
        self.blocks = nn.Sequential(Block(24, 4, drop), Block(24, 4, drop))
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


class Splits(nn.Module):
    """Splits channels at numbers, unevenly."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 12, 3), nn.Conv2d(4, 8, 1), nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(x).relu().split([4, 8], dim=1)
        return self.c(torch.cat([self.b(left) + right, right[:, 0:8]], 1))


class Slices(nn.Module):
    """Takes channels by number, and pads some on."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 10, 3), nn.Conv2d(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        return self.b(y[:, 2:8]) + y.mean((1, 2, 3), keepdim=True)


class Partial(nn.Module):
    """Convolves some of its channels; which forward it runs, the instance decides."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.forward = self.forward_split

    def forward_split(self, features: Tensor) -> Tensor:
        left, right = features.split([4, 8], dim=1)
        return torch.cat([self.conv(left), right], 1)


class Chosen(nn.Module):
    """A submodule has its forward as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.partial, self.b = nn.Conv2d(3, 12, 3), Partial(), nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.partial(features=self.a(x).relu()))


class Grouped(nn.Module):
    """GroupNorm called by number of groups, and a channel shuffle with all its sizes written out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 5, 1)
        self.scale, self.shift = nn.Parameter(torch.randn(16)), nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        y = F.group_norm(self.a(x), 4, self.scale, self.shift).relu()
        y = y.view(-1, 4, 4, 6, 6).transpose(1, 2).reshape(-1, 16, 6, 6)
        return self.c(self.b(y).sigmoid())


class FixedView(nn.Module):
    """Its forward has a size written into it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).view(-1, 6, 64).view(-1, 6, 8, 8))


NETWORKS = {
    "vit": (TinyViT, 16),
    "splits": (Splits, 8),
    "slices": (Slices, 8),
    "chosen": (Chosen, 8),
    "grouped": (Grouped, 8),
    "view": (FixedView, 8),
}


def make(name: str) -> tuple[nn.Module, Tensor]:
    cls, size = NETWORKS[name]
    torch.manual_seed(0)
    return randomise_(cls(), 0).eval(), torch.randn(2, 3, size, size)


def cut_down(model: nn.Module, x: Tensor, seed: int = 0, **options: str) -> tuple[Graph, sc.Plan, nn.Module]:
    graph = sc.analyze(model, x, **options)
    assert graph.groups
    plan = sc.Plan.of(graph, random_masks(graph, seed))
    return graph, plan, sc.cut_(copy.deepcopy(model), graph, plan)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", NETWORKS)
def test_the_cut_equals_the_original_without_the_units(name: str, seed: int) -> None:
    model, x = make(name)
    graph, plan, cut = cut_down(model, x, seed)
    verification = sc.verify(model, cut, graph, plan)
    assert verification.ok, verification
    kept = plan.kept(graph)
    again = sc.Cost(sc.analyze(cut, x))
    assert (again.macs(), again.params()) == (sc.Cost(graph).macs(kept), sc.Cost(graph).params(kept))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_batch_size_and_precision(name: str) -> None:
    model, x = make(name)
    _, _, cut = cut_down(model, x)
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
    model, x = make("vit")
    graph, plan, cut = cut_down(model, x)
    verification = sc.verify(model, cut, graph, plan)
    assert verification.rewritten == ("blocks.0.attn", "blocks.1.attn")
    assert "blocks.0.attn" in str(verification)
    assert isinstance(cut.blocks[0].attn, Attention)
    assert isinstance(cut.blocks[0].attn, Rewritten)
    assert [name for name, _ in named_tensors(cut)] == [name for name, _ in named_tensors(model)]
    assert cut.state_dict().keys() == model.state_dict().keys()


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
    model, x = make("vit")
    graph, plan, cut = cut_down(model, x)
    with torch.no_grad():
        cut.blocks[0].attn.qkv.weight[0] += 0.1
    assert not sc.verify(model, cut, graph, plan).ok


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
    model, x = make("vit")
    _, _, cut = cut_down(model, x)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(cut)(x), cut(x))
        with torch.autocast("cpu", torch.bfloat16):
            assert cut.blocks[0].attn(torch.randn(2, 16, cut.patch.out_channels)).dtype == torch.bfloat16
    graph = sc.analyze(cut, x)
    plan = sc.Plan.of(graph, random_masks(graph, 5))
    twice = sc.cut_(copy.deepcopy(cut), graph, plan)
    assert twice.patch.out_channels < cut.patch.out_channels
    assert sc.verify(cut, twice, graph, plan).ok


def test_the_original_call_signature_stays() -> None:
    model, x = make("vit")
    _, _, cut = cut_down(model, x)
    attention, tokens = cut.blocks[0].attn, torch.randn(2, 16, cut.patch.out_channels)
    with torch.no_grad():
        assert torch.equal(attention(x=tokens), attention(tokens))
    with pytest.raises(TypeError):
        attention()


@pytest.mark.parametrize("name", ["vit", "grouped"])
def test_exports_agree(name: str, tmp_path) -> None:
    model, x = make(name)
    _, _, cut = cut_down(model, x)
    onnx = export_onnx(cut, x, tmp_path / "m.onnx")
    assert onnx.static_because is None
    program = export_program(cut, x, tmp_path / "m.pt2")
    assert program.static_because is None


@pytest.mark.parametrize("name", NETWORKS)
def test_saved_and_loaded_bit_for_bit(name: str, tmp_path) -> None:
    model, x = make(name)
    _, _, cut = cut_down(model, x)
    sc.save(cut, tmp_path / "m.safetensors")
    loaded = sc.load(NETWORKS[name][0](), tmp_path / "m.safetensors").eval()
    assert rewritten_modules(loaded).keys() == rewritten_modules(cut).keys()
    for key, module in rewritten_modules(cut).items():
        assert rewritten_modules(loaded)[key].program == module.program
    with torch.no_grad():
        for batch in (x, x[:1]):
            assert torch.equal(loaded(batch), cut(batch))
    sc.save(loaded, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "m.safetensors").read_bytes()


def test_tensors_without_a_name_travel_along(tmp_path) -> None:
    class Toned(FixedView):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.tensor([1.0, -2.0, 3.0, 0.5]).view(4, 1, 1)

    model, x = Toned().eval(), torch.randn(2, 3, 8, 8)
    _, _, cut = cut_down(model, x)
    assert cut.state_dict().keys() == model.state_dict().keys()
    sc.save(cut, tmp_path / "m.safetensors")
    loaded = sc.load(Toned(), tmp_path / "m.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(loaded(x), cut(x))


def damaged(path, change) -> None:
    tensors, metadata = read_tensors(path)
    recipe = json.loads(metadata["recipe"])
    change(recipe["rewritten"])
    write_tensors(path, tensors, metadata | {"recipe": json.dumps(recipe)})


def op(index: int, value):
    return lambda r: r[""]["program"]["ops"].__setitem__(index, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (op(0, ["aten.from_file.default", ["/etc/passwd"], {"dict": {}}]), "is not one that a rewritten"),
        (op(0, ["os.system", ["true"], {"dict": {}}]), "is not one that a rewritten forward may call"),
        (op(0, ["aten.relu.out", [{"ref": 0}], {"dict": {}}]), "does not exist"),
        (op(0, ["aten.relu.__class__", [{"ref": 0}], {"dict": {}}]), "does not exist"),
        (op(0, ["aten.zeros.default", [[2**20, 2**20]], {"dict": {}}]), "larger than any a vision network needs"),
        (op(0, ["aten.zeros.default", [[2**40]], {"dict": {}}]), "is no number a program may hold"),
        (op(0, ["aten.relu.default", [{"ref": 10**6}], {"dict": {}}]), "an argument cannot be"),
        (op(0, ["aten.relu.default", [{"ref": -1}], {"dict": {}}]), "an argument cannot be"),
        (op(0, ["aten.relu.default", [{"code": "1"}], {"dict": {}}]), "an argument cannot be"),
        (op(0, ["aten.relu.default", [{"named": ["dtype", "__class__"]}], {"dict": {}}]), "is not known"),
        (op(0, ["aten.dropout.default", [{"ref": 0}, 0.5, {"training": ["x.y", True, False]}], {"dict": {}}]), "can"),
        (op(0, ["aten.relu.default", [{"ref": 0}], {"dict": {"out": {"ref": 0}}}]), "takes other arguments"),
        (op(0, "aten.relu.default"), "an operator is a name"),
        (lambda r: r[""]["program"].update(tensors=["__class__", "a.bias", "b.weight", "b.bias"]), "does not have"),
        (lambda r: r[""]["program"].update(ops=5), "must be a list"),
        (lambda r: r[""]["program"].update(inputs=10**9), "expected a number in 0…1000"),
        (lambda r: r[""]["program"].pop("output"), "has exactly the fields"),
        (lambda r: r.update({"a.nothing": {"program": {}}}), "has no such module"),
        (lambda r: r.update({"": 5}), "its recipe is damaged"),
    ],
)  # fmt: skip
def test_hostile_programs_are_refused(change, message: str, tmp_path) -> None:
    model, x = make("view")
    _, _, cut = cut_down(model, x)
    sc.save(cut, tmp_path / "m.safetensors")
    damaged(tmp_path / "m.safetensors", change)
    fresh = FixedView()
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(FileError, match=message):
        sc.load(fresh, tmp_path / "m.safetensors")
    assert type(fresh) is FixedView
    torch.testing.assert_close(fresh.state_dict(), before, rtol=0, atol=0)


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
