"""Torch's own transformer layers, made every way: cut ones equal masked ones, and drop out as before."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import secateur as sc

B = sc.Budget(macs=0.5)
X = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))
IMAGE = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
DROPS = ("native_dropout", "bernoulli", "bernoulli_")


class Encoder(nn.Module):
    def __init__(self, layers: int = 0, **options: Any) -> None:
        super().__init__()
        self.i, self.o = nn.Linear(8, 32), nn.Linear(32, 2)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, **options)
        self.e = nn.TransformerEncoder(layer, layers) if layers else layer

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.o(self.e(self.i(x), src_key_padding_mask=padding))


class Masked(Encoder):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return self.o(self.e(self.i(x), mask=mask))


class Decoder(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.i, self.o, self.q = nn.Linear(8, 32), nn.Linear(32, 2), nn.Parameter(torch.randn(5, 32))
        self.d = nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 64, batch_first=True, **options), 1)

    def forward(self, x: Tensor, causal: bool = False, told: bool | None = False) -> Tensor:
        mask = torch.triu(torch.full((5, 5), float("-inf"), dtype=x.dtype), 1) if causal else None
        queries = self.q.expand(len(x), -1, -1)
        return self.o(
            self.d(queries, self.i(x), tgt_mask=mask, tgt_is_causal=causal if told is False else told)
        )


class Detector(nn.Module):
    """As DETR: a backbone, a transformer over its positions, queries, two heads."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.body, self.queries = nn.Conv2d(3, 32, 2, 2), nn.Embedding(5, 32)
        self.t = nn.Transformer(32, 4, 1, 1, 64, batch_first=True, **options)
        self.boxes, self.classes = nn.Linear(32, 4), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.body(x).flatten(2).transpose(1, 2)
        y = self.t(h, self.queries.weight.expand(len(x), -1, -1))
        return {"boxes": self.boxes(y).sigmoid(), "classes": self.classes(y)}


class Attention(nn.Module):
    def __init__(self, weights: bool, **options: Any) -> None:
        super().__init__()
        self.i, self.o = nn.Linear(8, 32), nn.Linear(32, 2)
        self.a = nn.MultiheadAttention(32, 4, dropout=0.1, batch_first=True, **options)
        self.weights = weights

    def forward(self, x: Tensor) -> Any:
        x = self.i(x)
        y, weights = self.a(x, x, x, need_weights=self.weights)
        return self.o(y) if weights is None else (self.o(y), weights)


class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.i, self.o, self.e = nn.Linear(8, 32), nn.Linear(32, 2), nn.TransformerEncoderLayer(32, 4, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.e(self.i(x).transpose(0, 1)).transpose(0, 1))


class MaybeDropout(nn.Module):
    """Calls dropout in training mode only, and reads its input twice."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.o = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 2, 1)
        self.a, self.b = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.i(x)
        y = nn.functional.dropout(x, 0.5) if self.training else x
        y, z = self.a(x + y).split(8, 1)
        return self.o(self.b(torch.cat([y * z, z], 1)).relu())


CAUSAL = torch.triu(torch.full((6, 6), float("-inf")), 1)
PADDING = torch.tensor([[False, False, False, False, True, True]])
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "encoder layer": (Encoder, X),
    "no bias": (lambda: Encoder(bias=False), X),
    "norm first": (lambda: Encoder(norm_first=True, activation="gelu"), X),
    "no dropout": (lambda: Encoder(dropout=0.0), X),
    "encoder": (lambda: Encoder(2), X),
    "encoder with padding": (lambda: Encoder(1, norm_first=True), (X, PADDING)),
    "encoder with padding, norm last": (lambda: Encoder(1), (X, PADDING)),
    "encoder with a causal mask": (lambda: Masked(1), (X, CAUSAL)),
    "sequence first": (SequenceFirst, X),
    "decoder": (Decoder, X),
    "decoder, norm first": (lambda: Decoder(norm_first=True), X),
    "causal decoder": (Decoder, (X, True)),
    "causal decoder that is not told so": (Decoder, (X, True, None)),
    "transformer": (Detector, IMAGE),
    "transformer, norm first": (lambda: Detector(norm_first=True), IMAGE),
    "attention with weights": (lambda: Attention(True), X),
    "attention without weights": (lambda: Attention(False), X),
    "attention with a bias of keys": (lambda: Attention(True, add_bias_kv=True), X),
    "dropout in training only": (MaybeDropout, IMAGE),
}


class Drops(TorchDispatchMode):
    """Counts the draws of dropout, by how many dims they are for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in DROPS:
            self.found[args[0].ndim] += 1
        return func(*args, **kwargs or {})


def drops(model: nn.Module, inputs: Any) -> Counter[int]:
    with Drops() as counter, torch.random.fork_rng(devices=[]):
        model.train()(*(inputs if isinstance(inputs, tuple) else (inputs,)))
    return counter.found


@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:.*nested tensors")
@pytest.mark.parametrize("name", NETWORKS)
def test_cut_and_masked_model_agree_and_dropout_acts(name: str) -> None:
    torch.manual_seed(0)
    make, inputs = NETWORKS[name]
    model = make().eval()
    result = sc.prune(model, inputs, budget=B, round_to=1)
    assert result.proof.ok
    assert 0.4 * result.before["macs"] < result.after["macs"] <= 0.5 * result.before["macs"]
    assert not any("in training mode" in name for name in result.proof.rewritten)
    assert drops(result.model, inputs) == drops(model, inputs)


@pytest.mark.parametrize("frozen", [True, False])
def test_the_fused_kernel_for_inference_is_not_captured(frozen: bool) -> None:
    torch.manual_seed(0)
    model = Encoder().eval().requires_grad_(not frozen)
    enabled = torch.backends.mha.get_fastpath_enabled()
    with torch.set_grad_enabled(frozen):
        assert len(sc.analyze(model, X).groups) == 3
    assert torch.backends.mha.get_fastpath_enabled() == enabled
