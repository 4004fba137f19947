"""Rewritten modules at other image and batch sizes, and example inputs that hold images in unlike ways."""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import secateur as sc
from secateur.errors import CutError
from secateur.graph.capture import batchings
from secateur.graph.probe import difference, floats
from secateur.rewriting.program import Dim, Size
from secateur.rewriting.rewrite import rewritten_modules
from secateur.rewriting.sizes import Expressions
from secateur.surgery.mask import mask_
from tests.oracles import random_masks

# --- the batch of the example inputs --------------------------------------------------------------------------


class Conditional(nn.Module):
    """Images and class labels (n,), whose branch is the larger part."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.e, self.o = nn.Conv2d(3, 16, 3), nn.Embedding(10, 64), nn.Conv2d(16, 2, 1)
        self.f, self.g = nn.Linear(64, 512), nn.Linear(512, 16)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        y = self.g(self.f(self.e(label)).relu())
        return self.o((self.i(x) + y[:, :, None, None]).relu())


class Halves(nn.Module):
    """Takes its channels apart by a view with their number written into it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(16, 32, 1), nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        y, z = self.a(x).view(n, 2, 16, h, w).unbind(1)
        return self.b(y * z)


class ConditionalHalves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.i, self.e, self.o = nn.Conv2d(3, 16, 3), nn.Embedding(10, 16), nn.Conv2d(16, 2, 1)
        self.s = Halves()

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.o(self.s(self.i(x) + self.e(label)[:, :, None, None]))


class TemporalShift(nn.Module):
    """Four frames of every clip are folded into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = y.view(-1, 4, *y.shape[1:])
        y = torch.cat([y[:, 1:], y[:, :1]], 1).flatten(0, 1)
        return self.b(y.relu())


def macs(model: nn.Module, *inputs: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_labels_follow_the_batch(batch: int) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(batch, 3, 6, 6), torch.arange(batch)
    pruned = sc.prune(Conditional().eval(), inputs, budget=sc.Budget(macs=0.8), freeze=["f"])
    assert pruned.before["macs"] == 48_384 == macs(Conditional(), *inputs) // batch
    assert pruned.after["macs"] == macs(pruned.model, *inputs) // batch <= 0.8 * 48_384


@pytest.mark.parametrize("batch", [1, 3])
def test_a_rewritten_module_beside_labels_takes_any_batch(batch: int) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(batch, 3, 8, 8), torch.arange(batch)
    pruned = sc.prune(ConditionalHalves().eval(), inputs, budget=sc.Budget(macs=0.5), round_to=1)
    assert pruned.proof.rewritten == ("s",)
    assert pruned.proof.tied == ()
    with torch.no_grad():
        for n in (1, 2, 4):
            x, labels = torch.randn(n, 3, 9, 12), torch.arange(n)
            one = torch.cat([pruned.model(x[i : i + 1], labels[i : i + 1]) for i in range(n)])
            torch.testing.assert_close(pruned.model(x, labels), one)


def test_frames_in_the_batch_are_traced_in_multiples_of_those_given() -> None:
    torch.manual_seed(0)
    model, x = TemporalShift().eval(), torch.randn(4, 3, 6, 6)
    graph = sc.analyze(model, x)
    assert graph.trace.captured.batch == 8
    assert sc.Cost(graph).macs() == macs(model, x) // 4
    assert sc.prune(model, x, budget=sc.Budget(macs=0.5), round_to=1).proof.ok


def test_what_follows_the_batch() -> None:
    image = torch.zeros(1, 3, 4, 4)
    assert batchings((image, torch.zeros(1)))[0].rows == (1, 1)
    assert batchings((image, torch.zeros(10, 4)))[0].rows == (1, None)
    both = batchings((torch.zeros(8, 3, 4, 4), torch.zeros(2), torch.zeros(1), 5))
    assert [way.rows for way in both] == [(8, 2, None, None), (8, None, None, None)]
    x, labels = both[0].resized((torch.zeros(8, 3, 4, 4), torch.arange(2), torch.zeros(1), 5), 12)[:2]
    assert (len(x), labels.tolist()) == (12, [0, 1, 0])
    assert not both[0].allows(2)


# --- numbers ----------------------------------------------------------------------------------------------------

H, W = Dim(0, 1), Dim(0, 2)
SIZES = {H: (28, 20, 14, 25), W: (28, 16, 25, 19)}


@pytest.mark.parametrize(
    ("number", "found"),
    [
        (lambda h, w: h, H),
        (lambda h, w: h * w, Size("*", H, W)),
        (lambda h, w: h // 7, Size("//", H, 7)),
        (lambda h, w: -(-w // 7), Size("//", Size("+", W, 6), 7)),
        (lambda h, w: -h % 7, Size("%", Size("*", H, -1), 7)),
        (lambda h, w: -(-h // 7) * 7, Size("*", Size("//", Size("+", H, 6), 7), 7)),
        (lambda h, w: h * w + 1, Size("+", Size("*", H, W), 1)),
        (lambda h, w: 2 * w - 1, Size("+", Size("*", W, 2), -1)),
        (lambda h, w: h - w, Size("+", H, Size("*", W, -1))),
        (lambda h, w: h * h * h + w * w, None),
    ],
)  # fmt: skip
def test_a_number_is_told_by_sizes(number: Callable[[int, int], int], found: object) -> None:
    column = tuple(number(h, w) for h, w in zip(SIZES[H], SIZES[W], strict=True))
    assert Expressions(SIZES, literals=[7, 49]).of(column, column[0]) == found


def test_images_that_are_halved_come_before_other_numbers_that_fit() -> None:
    """RAFT divides by a width over 8, less 1: (width + 8) // 9 fits these sizes too."""
    wide, tall = (128, 72, 112, 88, 104), (128, 96, 64, 112, 152)
    eighths = tuple(w // 8 - 1 for w in wide)
    assert eighths == tuple((w + 8) // 9 for w in wide)
    assert Expressions({W: wide}, literals=[17]).of(eighths, eighths[0]) == Size("//", Size("+", W, -8), 8)
    halved = tuple(h // 16 - 1 for h in tall)
    assert halved == tuple(h // 17 for h in tall)
    assert Expressions({H: tall}).of(halved, halved[0]) == Size("//", Size("+", H, -16), 16)


def test_a_cut_changes_a_number_in_proportion() -> None:
    column = tuple(6 * h for h in SIZES[H])
    assert Expressions(SIZES).of(column, 4 * SIZES[H][0]) == Size("*", H, 4)
    shifted = tuple(h + 1 for h in SIZES[H])
    assert Expressions(SIZES).of(shifted, 7) is None


# --- networks ---------------------------------------------------------------------------------------------------


class Windows(nn.Module):
    """Attention in windows of 4 × 4, of an image that is padded to whole windows, with its sizes written out."""

    def __init__(self, shift: int = 0) -> None:
        super().__init__()
        self.i, self.o, self.shift = nn.Conv2d(3, 16, 2, 2), nn.Conv2d(16, 3, 1), shift
        self.qkv, self.p = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.i(x).permute(0, 2, 3, 1)
        n, h, w, _ = y.shape
        y = F.pad(y, (0, 0, 0, -w % 4, 0, -h % 4))
        _, tall, wide, _ = y.shape
        if self.shift:
            y = torch.roll(y, (-self.shift, -self.shift), (1, 2))
        y = y.view(n, tall // 4, 4, wide // 4, 4, 16).transpose(2, 3).reshape(-1, 16, 16)
        q, k, v = self.qkv(y).reshape(-1, 16, 3, 2, 8).permute(2, 0, 3, 1, 4)
        y = self.p((q @ k.mT).softmax(-1).matmul(v).transpose(1, 2).reshape(-1, 16, 16))
        y = y.view(n, tall // 4, wide // 4, 4, 4, 16).transpose(2, 3).reshape(n, tall, wide, 16)
        if self.shift:
            y = torch.roll(y, (self.shift, self.shift), (1, 2))
        return self.o(y[:, :h, :w].contiguous().permute(0, 3, 1, 2))


class Transposed(nn.Module):
    """Attention between channels (Restormer), the number of heads and their width written out."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.o = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)
        self.qkv, self.p = nn.Conv2d(16, 48, 1), nn.Conv2d(16, 16, 1)
        self.deep = nn.Conv2d(48, 48, 3, padding=1, groups=48)

    def forward(self, x: Tensor) -> Tensor:
        y = self.i(x)
        n, _, h, w = y.shape
        q, k, v = self.deep(self.qkv(y)).view(n, 3, 4, 4, h * w).unbind(1)
        a = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT).softmax(-1)
        return self.o(y + self.p((a @ v).view(n, 16, h, w)))


class Pooled(nn.Module):
    """Attention to a pooled image (MViT, PVT): height and width are handed on as numbers."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.kv, self.p = nn.Linear(16, 16), nn.Linear(16, 32), nn.Linear(16, 16)
            self.pool = nn.Conv2d(16, 16, 2, 2)

        def forward(self, x: Tensor, size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
            n, length, _ = x.shape
            q = self.q(x).view(n, length, 2, 8).transpose(1, 2)
            small = self.pool(x.mT.reshape(n, 16, *size)).flatten(2).mT
            k, v = self.kv(small).view(n, small.shape[1], 2, 2, 8).permute(2, 0, 3, 1, 4)
            y = (q @ k.mT).softmax(-1) @ v
            return self.p(y.transpose(1, 2).reshape(n, length, 16)), size

    def __init__(self) -> None:
        super().__init__()
        self.i, self.a, self.o = nn.Conv2d(3, 16, 2, 2), self.Inner(), nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.i(x)
        n, _, h, w = y.shape
        y, (h, w) = self.a(y.flatten(2).mT, (h, w))
        return self.o(y.mT.reshape(n, 16, h, w))


class Detector(nn.Module):
    """DETR-like: torch's own transformer over the image, read by five queries."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.q = nn.Conv2d(3, 16, 3, 2, 1), nn.Parameter(torch.rand(5, 16))
        self.t = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True)
        self.box, self.kind = nn.Linear(16, 4), nn.Linear(16, 7)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.i(x).flatten(2).mT
        y = self.t(y, self.q.expand(len(x), -1, -1))
        return {"boxes": self.box(y).sigmoid(), "kinds": self.kind(y)}


@dataclass
class Pair:
    a: Tensor
    b: Tensor


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(16, 16, 1)

    def forward(self, pair: Pair) -> Tensor:
        return self.c(pair.a * pair.b.sigmoid())


class Row(nn.Module):
    """Makes a table of constants as long as the image is wide."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(16, 16, 1)

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return self.c(pair[0] * pair[1]) * torch.tensor([1.0 + i % 3 for i in range(pair[0].shape[-1])])


class Around(nn.Module):
    """Takes channels apart, pads where the image is not whole, and drops out in training mode, beside its layers."""

    def __init__(self, inner: nn.Module, kind: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.i, self.a, self.o = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 1), nn.Conv2d(16, 2, 1)
        self.inner, self.kind = inner, kind

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        y = self.i(x)
        if h % 4 or w % 4:
            y = F.pad(y, (0, -w % 4, 0, -h % 4))
        if self.training:
            y = F.dropout(y, 0.5)
        y, z = self.a(y).view(n, 2, 16, *y.shape[2:]).unbind(1)
        return self.o(self.inner(self.kind(y, z)))[:, :, :h, :w]


class Apart(nn.Module):
    """Takes channels apart, and pads width and height one by one, each where it is not whole."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.a, self.o = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 1), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        y = self.i(x)
        if w % 4:
            y = F.pad(y, (0, -w % 4))
        if h % 4:
            y = F.pad(y, (0, 0, 0, -h % 4))
        y, z = self.a(y).view(n, 2, 16, *y.shape[2:]).unbind(1)
        return self.o(y * z)


CALLS: dict[str, Callable[[], nn.Module]] = {
    "object to a submodule": lambda: Around(Product(), Pair),
    "constants in a submodule": lambda: Around(Row(), lambda *both: both),
}
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "windows": Windows,
    "shifted windows": lambda: Windows(2),
    "transposed": Transposed,
    "pooled": Pooled,
    "halves": lambda: nn.Sequential(nn.Conv2d(3, 16, 3), Halves(), nn.Conv2d(16, 2, 1)),
    "transformer": Detector,
    "padded apart": Apart,
    **CALLS,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_three_image_sizes_and_three_batches(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = NETWORKS[name]().eval(), torch.randn(1, 3, 16, 16)
    graph = sc.analyze(model, x)
    plan = sc.Plan.of(graph, random_masks(graph, 0))
    cut = sc.cut_(copy.deepcopy(model), graph, plan)
    proof = sc.verify(model, cut, graph, plan)
    assert proof.ok, proof
    assert proof.rewritten
    assert proof.tied == ()
    assert proof.uncompared == ""
    assert proof.sizes in str(proof)
    sc.save(cut, tmp_path / "cut.safetensors")
    loaded = sc.load(NETWORKS[name](), tmp_path / "cut.safetensors").eval()
    masked = mask_(copy.deepcopy(model), graph, plan).double()
    double = copy.deepcopy(cut).double()
    for size in ((12, 20), (34, 24), (18, 10)):
        for batch in (1, 2, 3):
            images = torch.randn(batch, 3, *size)
            with torch.no_grad():
                if not proof.statistics:
                    both = floats(masked(images.double())), floats(double(images.double()))
                    assert difference(*both)[1] < 1e-9, (size, batch)
                assert all(map(torch.equal, floats(loaded(images)), floats(cut(images)))), (size, batch)


@pytest.mark.parametrize("name", CALLS)
def test_calls_sizes_and_modes_in_one_program(name: str) -> None:
    torch.manual_seed(0)
    pruned = sc.prune(CALLS[name]().eval(), torch.randn(1, 3, 16, 16), budget=sc.Budget(macs=0.6), round_to=1)
    made = rewritten_modules(pruned.model)[""]
    assert (made.lost, made.tied) == ("", "")
    assert made.program.calls == {"i", "a", "inner", "o"}
    dropped: list[Tensor] = []
    made.a.register_forward_pre_hook(lambda _, args: dropped.append(args[0]))
    x = torch.randn(2, 3, 17, 20)
    with torch.no_grad():
        made.eval()(x), made.train()(x)
    plain, found = dropped
    assert plain.shape[2:] == (20, 20)
    assert not plain[:, :, 17:].any()
    stays = found != 0
    assert 0.4 < stays[:, :, :17].float().mean() < 0.6
    torch.testing.assert_close(found[stays], 2 * plain[stays])


class Two(nn.Module):
    """Its sizes are in no number of the forward: a table of positions for one image size."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.s, self.o = nn.Conv2d(3, 16, 3, padding=1), self.Odd(), nn.Conv2d(16, 2, 1)

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(16, 16, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x).view(len(x), 2, 8, *x.shape[2:]).flatten(1, 2)
            return y.sigmoid() if x.shape[2] == 16 else y.relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.s(self.i(x)))


def test_a_module_tied_to_a_size_says_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pruned = sc.prune(Two().eval(), torch.randn(1, 3, 16, 16), budget=sc.Budget(macs=0.5), round_to=1)
    (said,) = pruned.proof.tied
    assert said.startswith("s takes any × ")
    assert "16 × 16 only: it does other things at other image sizes" in said
    assert said in str(pruned)
    assert any(said in note for note in pruned.report.notes)
    assert "not compared at another image size" in str(pruned)
    pruned.model(torch.randn(3, 3, 16, 16))
    with pytest.raises(CutError, match=r"now takes any × .*16 × 16 only; got 1 × .*20 × 16.*Analyse and cut"):
        pruned.model(torch.randn(1, 3, 20, 16))
    pruned.save(tmp_path / "tied.safetensors")
    loaded = sc.load(Two(), tmp_path / "tied.safetensors")
    assert rewritten_modules(loaded)["s"].tied == rewritten_modules(pruned.model)["s"].tied != ""
    with pytest.raises(CutError, match="only; got"):
        loaded(torch.randn(1, 3, 20, 16))


class Pairs(nn.Module):
    """A sequence, its padding and a mask of positions, beside a sequence of another length."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.o = nn.Linear(8, 16), nn.Linear(16, 3)
        self.t = nn.Transformer(16, 2, 1, 1, 24, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor, y: Tensor, padding: Tensor, mask: Tensor) -> Tensor:
        padded = padding.to(x.dtype) * -10.0
        return self.o(self.t(self.i(x), self.i(y), tgt_mask=mask, src_key_padding_mask=padded))


def pairs(batch: int, first: int, second: int) -> tuple[Tensor, ...]:
    padding = torch.arange(first).expand(batch, -1) >= first - 2
    mask = torch.triu(torch.full((second, second), float("-inf")), 1)
    return torch.randn(batch, first, 8), torch.randn(batch, second, 8), padding, mask


def test_sequences_of_their_own_lengths_with_masks() -> None:
    torch.manual_seed(0)
    model = Pairs().eval()
    pruned = sc.prune(model, pairs(1, 6, 5), budget=sc.Budget(macs=0.5), round_to=1)
    assert pruned.proof.ok, pruned.proof
    assert pruned.proof.rewritten
    assert pruned.proof.tied == ()
    assert not pruned.proof.uncompared
    masked = mask_(copy.deepcopy(model), pruned.graph, pruned.plan)
    assert pruned.proof.statistics  # so that zeros are not enough to compare with everywhere
    for batch, first, second in ((2, 9, 4), (1, 4, 11), (3, 5, 5)):
        inputs = pairs(batch, first, second)
        with torch.no_grad():
            assert pruned.model(*inputs).shape == masked(*inputs).shape == (batch, second, 3)
            alone = pruned.model(inputs[0], inputs[1][:, :2], inputs[2], inputs[3][:2, :2])
        # the mask holds at every length: what comes first does not depend on what comes later
        torch.testing.assert_close(pruned.model(*inputs)[:, :2].detach(), alone)


class Switched(nn.Module):
    """Takes channels apart at a width written out, and does something else in training mode."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.i, self.a, self.o = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 1), nn.Conv2d(16, 2, 1)
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        n, _, h, w = x.shape
        y, z = self.a(self.i(x)).view(n, 2, 16, h, w).unbind(1)
        if self.kind == "numbers":
            y = torch.roll(y, 3 if self.training else 1, 2)
        if self.kind == "chance":
            y = y * (random.random() if self.training else 1.0)
        y = self.o(y * z)
        return [y, y] if self.kind == "outputs" and self.training else y


@pytest.mark.parametrize(
    ("kind", "lost"),
    [
        ("numbers", "what it does in training mode only (shifts of roll)"),
        ("chance", "the random numbers of Python that it draws in training mode"),
        ("outputs", "what it returns in training mode"),
    ],
)
def test_what_the_training_mode_loses_is_said(kind: str, lost: str) -> None:
    torch.manual_seed(0)
    before = random.getstate()
    pruned = sc.prune(Switched(kind).eval(), torch.randn(1, 3, 8, 8), budget=sc.Budget(macs=0.5), round_to=1)
    assert pruned.proof.rewritten == (f"the whole model (without {lost})",)
    assert random.getstate() == before


class Keeps(nn.Module):
    """LeViT's attention: in evaluation mode, what it works out from a table of weights is kept for the next pass."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.o, self.qkv = nn.Linear(8, 16), nn.Linear(16, 3), nn.Linear(16, 48)
        self.table, self.kept = nn.Parameter(torch.randn(4, 9)), {}  # type: ignore[var-annotated]
        self.register_buffer("places", torch.arange(81).view(9, 9) % 9, persistent=False)

    def train(self, mode: bool = True) -> "Keeps":
        super().train(mode)
        self.kept = {} if mode else self.kept
        return self

    def forward(self, x: Tensor) -> Tensor:
        bias = self.table[:, self.places] if self.training else self.kept.get("bias")
        if bias is None:
            bias = self.kept["bias"] = self.table[:, self.places]
        q, k, v = self.qkv(self.i(x)).view(-1, 9, 3, 4, 4).permute(2, 0, 3, 1, 4)
        y = (q @ k.mT * 0.5 + bias).softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(-1, 9, 16))


@pytest.mark.parametrize("warm", [False])
def test_what_a_module_keeps_of_its_weights_is_worked_out_again(warm: bool) -> None:
    torch.manual_seed(0)
    model, x = Keeps().eval(), torch.randn(2, 9, 8)
    if warm:
        with torch.no_grad():
            model(x)
    pruned = sc.prune(model, x, budget=sc.Budget(macs=0.5), round_to=1)
    assert pruned.proof.ok
    assert pruned.proof.rewritten == ("the whole model (without what it does in training mode only)",) or (
        pruned.proof.rewritten == ("",)
    )
    assert ("bias" in model.kept) == warm
    with torch.no_grad():
        first = pruned.model.eval()(x)
        torch.testing.assert_close(pruned.model.train().eval()(x), first)
