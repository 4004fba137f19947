"""A rewritten module calls its submodules: their hooks fire, they can be replaced, and they train as before."""

import copy
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import secateur as sc
from secateur.errors import CutError
from secateur.export import export_onnx
from secateur.rewriting.program import Call, Program
from secateur.rewriting.rewrite import rewritten_modules
from tests.surgery.fixed_sizes import FixedView, cut_down, cut_once

pytestmark = pytest.mark.xdist_group("rewritten")


def lines(program: Program) -> list[str]:
    """What a program does: submodules by name, operators in angle brackets."""
    return [
        op.module if isinstance(op, Call) else f"<{op.target.removeprefix('aten.').partition('.')[0]}>"
        for op in program.ops
    ]


def vit() -> tuple[nn.Module, Tensor]:
    """A cut network of two rewritten attention blocks, a copy of its own, and images."""
    _, x, _, _, cut = cut_once("vit")
    return copy.deepcopy(cut), x


def test_only_what_lies_between_submodules_is_written_out() -> None:
    program = vit()[0].blocks[0].attn.program
    assert lines(program) == [
        "qkv", "<reshape>", "<permute>", "<unbind>", "<getitem>", "<getitem>", "<getitem>",
        "<scaled_dot_product_attention>", "<transpose>", "<reshape>", "<dropout>", "proj",
    ]  # fmt: skip
    assert program.tensors == ()


def test_hooks_of_inner_layers_fire() -> None:
    cut, _ = vit()
    seen: dict[str, tuple[int, ...]] = {}
    attention = cut.blocks[0].attn
    for name in ("qkv", "proj"):
        layer = getattr(attention, name)
        layer.register_forward_hook(lambda m, args, y, name=name: seen.update({name: tuple(y.shape)}))
    attention.proj.register_forward_pre_hook(lambda m, args: (2 * args[0],))
    with torch.no_grad():
        tokens = torch.randn(2, 16, attention.qkv.in_features)
        doubled = attention(tokens)
        plain = vit()[0].blocks[0].attn(tokens)
    assert seen == {
        "qkv": (2, 16, attention.qkv.out_features),
        "proj": (2, 16, attention.proj.out_features),
    }
    bias = attention.proj.bias
    torch.testing.assert_close(doubled - bias, 2 * (plain - bias), rtol=1e-4, atol=1e-5)


class LowRank(nn.Module):
    """A layer with a learnt product of two thin matrices beside it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


def test_a_layer_can_be_wrapped() -> None:
    cut, _ = vit()
    attention = cut.blocks[0].attn
    tokens = torch.randn(2, 16, attention.qkv.in_features)
    before, inside = attention(tokens), []
    handle = attention.proj.register_forward_pre_hook(lambda m, args: inside.append(args[0]))
    attention(tokens)
    handle.remove()
    attention.proj = LowRank(attention.proj)
    found = attention(tokens)
    torch.testing.assert_close(found - before, attention.proj.up(attention.proj.down(inside[0])))
    found.sum().backward()
    assert attention.proj.up.weight.grad is not None


def test_a_parametrisation_takes_effect() -> None:
    class Halved(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / 2

    cut, _ = vit()
    attention = cut.blocks[0].attn
    tokens = torch.randn(2, 16, attention.qkv.in_features)
    bias = attention.proj.bias
    before = attention(tokens)
    parametrize.register_parametrization(attention.proj, "weight", Halved())
    torch.testing.assert_close(attention(tokens) - bias, (before - bias) / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # torch's own, of its old quantisation
def test_quantised_layers_take_the_place_of_the_others() -> None:
    cut, x = vit()
    quantised = torch.ao.quantization.quantize_dynamic(cut, {nn.Linear}, dtype=torch.qint8)
    assert "quantized" in type(quantised.blocks[0].attn.qkv).__module__
    with torch.no_grad():
        expected, found = cut(x), quantised(x)
    assert 0 < (found - expected).abs().max() < 0.1 * expected.abs().max()


def test_compiles_as_one_graph() -> None:
    cut, x = vit()
    compiled = torch.compile(cut.train(False), fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), cut(x))


def test_the_average_of_a_batch_norm_stays_cumulative() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.bn, self.b = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, momentum=None), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.bn(self.a(x)).view(-1, 8, 16).view(-1, 8, 4, 4))

    torch.manual_seed(0)
    model, x = Normed().eval(), torch.randn(4, 3, 4, 4)
    _, _, cut = cut_down(model, x)
    assert lines(cut.program) == ["a", "bn", "<reshape>", "<reshape>", "b"]
    cut.train()
    batches = [torch.randn(4, 3, 4, 4) for _ in range(3)]
    for batch in batches:
        cut(batch)
    means = torch.stack([cut.a(batch).mean((0, 2, 3)) for batch in batches])
    torch.testing.assert_close(cut.bn.running_mean, means.mean(0))


class Depth(nn.Module):
    """Drops a whole branch of some images in training; in evaluation mode it runs no operator."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = torch.bernoulli(torch.full((len(x), 1, 1, 1), 1 - self.p))
        return x * keep / (1 - self.p)


def test_what_a_submodule_does_in_training_only_is_kept() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.depth = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1), Depth(0.5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(self.a(x).view(-1, 8, 16).view(-1, 8, 4, 4))
            return x + self.depth(y) + 0 * y

    torch.manual_seed(0)
    model, x = Branch().eval(), torch.randn(64, 3, 4, 4)
    _, _, cut = cut_down(model, x)
    assert rewritten_modules(cut)[""].lost == ""
    assert "depth" in cut.program.calls
    with torch.no_grad():
        y = (cut.eval()(x) - x).flatten(1)
        found = (cut.train()(x) - x).flatten(1)
    dropped = found.abs().amax(1) < 1e-6
    assert 16 < dropped.sum() < 48
    torch.testing.assert_close(found[~dropped], 2 * y[~dropped], rtol=1e-4, atol=1e-5)


def test_layers_that_cannot_be_called_are_named() -> None:
    class Told(nn.Module):
        """Takes a text, which a file may not hand to a submodule."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(6, 4, 1)

        def forward(self, x: Tensor, mode: str) -> Tensor:
            return self.conv(x) if mode == "plain" else x

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.told = nn.Conv2d(3, 6, 3, padding=1), Told()

        def forward(self, x: Tensor) -> Tensor:
            return self.told(self.a(x).view(-1, 6, 64).view(-1, 6, 8, 8), "plain")

    model, x = Outer().eval(), torch.randn(2, 3, 8, 8)
    graph, plan, cut = cut_down(model, x)
    assert lines(cut.program) == ["a", "<reshape>", "<reshape>", "told.conv"]
    assert "hooks on told" in sc.verify(model, cut, graph, plan).form


def test_replacing_a_layer_whose_tensors_are_read_is_refused() -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x).view(-1, 6, 64).view(-1, 6, 8, 8)
            return F.conv2d(y, self.b.weight, self.b.bias)

    class Other(nn.Conv2d):
        pass

    model, x = Weighted().eval(), torch.randn(2, 3, 8, 8)
    _, _, cut = cut_down(model, x)
    width = cut.b.in_channels
    other = copy.deepcopy(cut)
    cut.b = Other(width, 4, 1)
    with pytest.raises(CutError, match=r"reads the tensors of 'b' itself, so that a Other"):
        cut(x)
    nn.utils.parametrizations.weight_norm(other.b)
    with pytest.raises(CutError, match="'b'"):
        other(x)


def test_a_module_inside_a_rewritten_one_is_rewritten_by_itself() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = FixedView(), nn.Conv2d(4, 6, 1)
            self.out = nn.Conv2d(6, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.last(self.inner(x)).view(-1, 6, 64).view(-1, 6, 8, 8))

    model, x = Nested().eval(), torch.randn(2, 3, 8, 8)
    graph, plan, cut = cut_down(model, x)
    assert list(rewritten_modules(cut)) == ["", "inner"]
    assert lines(cut.program) == ["inner", "last", "<reshape>", "<reshape>", "out"]
    assert lines(cut.inner.program) == ["a", "<reshape>", "<reshape>", "b"]
    assert sc.verify(model, cut, graph, plan).ok


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


@dataclass
class Output:
    logits: Tensor
    hidden: tuple[Tensor, ...] | None = None


class Returns(nn.Module):
    """A submodule that returns several things, and a forward around it that returns an object."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.body = kind, Body(kind)
        self.out = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Any:
        found = self.body(x)
        y = (
            found[0]
            if self.kind in ("tuple", "pair")
            else found["y"]
            if self.kind != "object"
            else found.logits
        )
        z = self.out(y.view(-1, 6, 64).view(-1, 6, 8, 8))
        return made(self.kind, z, z + y.mean(1, keepdim=True))


class Body(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.a = kind, nn.Conv2d(3, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        return made(self.kind, y, 2 * y.mean(1, keepdim=True))


def made(kind: str, y: Tensor, z: Tensor) -> Any:
    return {
        "tuple": (y, [z]),
        "pair": Pair(y, z),
        "dict": {"y": y, "z": z},
        "ordered": OrderedDict(y=y, z=z),
        "object": Output(y, (z,)),
    }[kind]


@pytest.mark.parametrize("kind", ["tuple", "pair", "dict", "ordered", "object"])
def test_what_submodules_and_forward_return_is_of_the_same_class(kind: str, tmp_path) -> None:
    torch.manual_seed(0)
    model, x = Returns(kind).eval(), torch.randn(2, 3, 8, 8)
    graph, plan, cut = cut_down(model, x)
    assert lines(cut.program)[0] == "body"
    assert sc.verify(model, cut, graph, plan).ok
    found = cut(x)
    assert type(found) is type(model(x))
    sc.save(cut, tmp_path / "m.safetensors")
    loaded = sc.load(Returns(kind), tmp_path / "m.safetensors").eval()
    assert type(loaded(x)) is type(found)


def test_exported_to_onnx(tmp_path) -> None:
    cut, x = vit()
    assert export_onnx(cut, x, tmp_path / "m.onnx").static_because is None


def test_a_program_calls_with_the_arguments_of_the_original() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(6, 4, 1)

        def forward(
            self, x: Tensor, height: int, *, scale: float = 1.0, mask: Tensor | None = None
        ) -> Tensor:
            return self.conv(x.unflatten(2, (height, -1))) * scale

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.scaled = nn.Conv2d(3, 6, 3, padding=1), Scaled()

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.scaled(y.view(len(x), 6, -1), y.shape[2], scale=0.5, mask=None)

    model, x = Outer().eval(), torch.randn(2, 3, 8, 8)
    _, _, cut = cut_down(model, x)
    call = cut.program.ops[-1]
    assert isinstance(call, Call)
    assert call.module == "scaled"
    assert dict(call.kwargs) == {"scale": 0.5, "mask": None}
    assert cut(torch.randn(3, 3, 12, 10)).shape == (3, 4, 12, 10)


class States(nn.Module):
    """Returns all its states, and normalises the last one, which nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> dict[str, Any]:
        a = self.a(x)
        b = self.b(a)
        return {"states": (a, b), "last": self.norm(b)}


class Reassemble(nn.Module):
    """Has a size written into it."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        torch._check_tensor_all(x.isfinite())
        return self.out(x.view(-1, 6, 64).view(-1, 6, 8, 8))


class Neck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.neck = States(), Reassemble()

    def forward(self, x: Tensor) -> Tensor:
        return self.neck(sum(self.trunk(x)["states"]))


def test_what_nothing_reads_and_what_is_only_checked_is_no_reason_to_rewrite_what_is_around_it() -> None:
    torch.manual_seed(0)
    model, x = Neck().eval(), torch.randn(2, 3, 8, 8)
    graph, plan, cut = cut_down(model, x)
    assert list(rewritten_modules(cut)) == ["neck"]
    assert lines(rewritten_modules(cut)["neck"].program) == ["<reshape>", "<reshape>", "out"]
    proof = sc.verify(model, cut, graph, plan)
    assert proof.ok, proof
