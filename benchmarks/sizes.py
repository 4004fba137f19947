"""Networks that are used at many image sizes, cut at one: which others does the result take?

    python benchmarks/sizes.py --out docs/results/sizes.md

Networks of torchvision, timm, transformers and torch itself in small configurations, with random weights. Each is cut
to half of its MACs at the first size, and then compared with the masked original in float64 at three sizes, none a
multiple of another, with one, two and three images. *Equal*: the largest difference is below 1e-9 of the largest
output, all nine times. *Refused*: the result itself says that it does not take this size. *Not taken*: the original
does not run there.
"""

import argparse
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import secateur as sc
from secateur.cost.latency import device_name
from secateur.graph.capture import as_call
from secateur.graph.duplicate import duplicate
from secateur.graph.probe import difference, randomise_
from secateur.proof.verify import Verification, expected_at, run_own

Size = tuple[int, ...]

EQUAL = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest relative difference, by precision."""


@dataclass(frozen=True)
class Network:
    """A network and the sizes it is used at.

    Attributes:
        make: builds it.
        sizes: height and width, or the length of a sequence; it is cut at the first.
        inputs: (images, size) -> example inputs.
    """

    name: str
    make: Callable[[], nn.Module]
    sizes: tuple[Size, Size, Size]
    inputs: Callable[[int, Size], Any] = lambda count, size: torch.randn(count, 3, *size)


@dataclass(frozen=True)
class Found:
    """What came of one network.

    Attributes:
        rewritten: names of modules.
        tied: what the result says of sizes that it does not take.
        at: outcome at each size, over all batches.
        seconds: processor time of the whole call.
    """

    rewritten: tuple[str, ...]
    tied: tuple[str, ...]
    at: tuple[str, ...]
    seconds: float


# --- networks ----------------------------------------------------------------------------------------------------


def swin() -> nn.Module:
    from torchvision.models.swin_transformer import SwinTransformer

    return SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=5)


def swin_v2() -> nn.Module:
    from torchvision.models.swin_transformer import (
        PatchMergingV2,
        SwinTransformer,
        SwinTransformerBlockV2,
    )

    return SwinTransformer(
        [4, 4], 24, [2, 2], [2, 4], [4, 4],
        num_classes=5, block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2,
    )  # fmt: skip


def swin_timm() -> nn.Module:
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(
        64,
        4,
        embed_dim=24,
        depths=(2, 2),
        num_heads=(2, 4),
        window_size=4,
        num_classes=5,
        strict_img_size=False,
    )


def swin_transformers() -> nn.Module:
    from transformers import SwinConfig, SwinForImageClassification

    return SwinForImageClassification(
        SwinConfig(image_size=64, patch_size=4, embed_dim=24, depths=[2, 2], num_heads=[2, 4], window_size=4)
    )


def mvit() -> nn.Module:
    from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg

    return MultiScaleVit(
        MultiScaleVitCfg(depths=(1, 2), embed_dim=24, num_heads=2, stride_q=((1, 1), (2, 2))),
        (64, 64),
        num_classes=5,
    )


def maxvit() -> nn.Module:
    from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitTransformerCfg

    transformer = MaxxVitTransformerCfg(dim_head=8, window_size=(4, 4), rel_pos_type="bias")
    config = MaxxVitCfg((16, 32), (1, 1), ("M", "M"), stem_width=16, transformer_cfg=transformer)
    return MaxxVit(config, (64, 64), num_classes=5)


def maxvit_torchvision() -> nn.Module:
    from torchvision.models.maxvit import MaxVit

    return MaxVit((64, 64), 16, 4, [16, 32], [1, 1], 8, 0.1, num_classes=5)


def segformer() -> nn.Module:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    return SegformerForSemanticSegmentation(
        SegformerConfig(
            num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[16, 32], patch_sizes=[7, 3],
            strides=[4, 2], num_attention_heads=[2, 4], mlp_ratios=[2, 2], decoder_hidden_size=24, num_labels=5,
        )
    )  # fmt: skip


def raft() -> nn.Module:
    from torchvision.models.optical_flow import raft
    from torchvision.models.optical_flow.raft import BottleneckBlock

    return raft._raft(
        feature_encoder_layers=(8, 8, 12, 16, 32), feature_encoder_block=BottleneckBlock,
        feature_encoder_norm_layer=nn.InstanceNorm2d,
        context_encoder_layers=(8, 8, 12, 16, 40), context_encoder_block=BottleneckBlock,
        context_encoder_norm_layer=None, corr_block_num_levels=3, corr_block_radius=2,
        motion_encoder_corr_layers=(24,), motion_encoder_flow_layers=(16, 8), motion_encoder_out_channels=20,
        recurrent_block_hidden_state_size=24, recurrent_block_kernel_size=(3,), recurrent_block_padding=(1,),
        flow_head_hidden_size=16, use_mask_predictor=False,
    )  # fmt: skip


def detr() -> nn.Module:
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    return DetrForObjectDetection(
        DetrConfig(
            use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone,
            num_queries=5, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=24, decoder_ffn_dim=24,
            encoder_attention_heads=2, decoder_attention_heads=2, num_labels=4,
        )
    )  # fmt: skip


class Restored(nn.Module):
    """Restormer's block between two convolutions: attention between channels, and a gated feed-forward part."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.last = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.deep = nn.Conv2d(3 * width, 3 * width, 3, padding=1, groups=3 * width)
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.out = nn.Conv2d(width, width, 1)
        self.up, self.down = nn.Conv2d(width, 4 * width, 1), nn.Conv2d(2 * width, width, 1)
        self.gate = nn.Conv2d(4 * width, 4 * width, 3, padding=1, groups=4 * width)

    def attend(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        q, k, v = self.deep(self.qkv(x)).chunk(3, 1)
        q, k, v = (t.reshape(n, self.heads, c // self.heads, h * w) for t in (q, k, v))
        q, k = nn.functional.normalize(q, dim=-1), nn.functional.normalize(k, dim=-1)
        weights = (q @ k.mT * self.temperature).softmax(-1)
        return self.out((weights @ v).reshape(n, c, h, w))

    def normed(self, norm: nn.Module, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return norm(x.flatten(2).mT).mT.reshape(n, c, h, w)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y = y + self.attend(self.normed(self.norm1, y))
        a, b = self.gate(self.up(self.normed(self.norm2, y))).chunk(2, 1)
        return self.last(y + self.down(nn.functional.gelu(a) * b)) + x


class Sequences(nn.Module):
    """torch.nn.Transformer between two sequences of different lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Linear(8, 32), nn.Linear(8, 32)
        self.transformer = nn.Transformer(32, 4, 2, 2, 64, batch_first=True)
        self.out = nn.Linear(32, 4)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.out(self.transformer(self.source(source), self.target(target)))


def pairs(count: int, size: Size) -> tuple[Tensor, Tensor]:
    return torch.rand(count, 3, *size) * 2 - 1, torch.rand(count, 3, *size) * 2 - 1


def sequences(count: int, size: Size) -> tuple[Tensor, Tensor]:
    return torch.randn(count, size[0], 8), torch.randn(count, size[1], 8)


THIRTY_TWO = ((64, 64), (96, 160), (128, 96))
ANY = ((64, 64), (72, 104), (57, 83))
NETWORKS = (
    Network("Swin, torchvision", swin, ANY),
    Network("Swin V2, torchvision", swin_v2, ANY),
    Network("Swin, timm", swin_timm, ANY),
    Network("Swin, transformers", swin_transformers, ANY),
    Network("MViT v2, timm", mvit, ANY),
    Network("MaxViT, timm", maxvit, THIRTY_TWO),
    Network("MaxViT, torchvision", maxvit_torchvision, THIRTY_TWO),
    Network("SegFormer, transformers", segformer, ANY),
    Network("RAFT, torchvision", raft, ((128, 128), (136, 184), (160, 144)), pairs),
    Network("DETR, transformers", detr, ANY),
    Network("Restormer's block", Restored, ((16, 16), (18, 26), (13, 19))),
    Network("torch.nn.Transformer", Sequences, ((6, 5), (9, 4), (4, 11)), sequences),
)


# --- what is found -----------------------------------------------------------------------------------------------


def examine(network: Network, attention: str) -> Found:
    """Cut a network at its first size and compare it with the masked original at all three, with 1, 2 and 3 images."""
    torch.manual_seed(0)
    model = randomise_(network.make(), 0).eval()
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        budget, example = sc.Budget(macs=0.5), network.inputs(1, network.sizes[0])
        pruned = sc.prune(model, example, budget=budget, round_to=1, attention=attention)
    seconds = time.process_time() - start
    proof = pruned.proof
    assert proof is not None
    assert proof.ok, proof
    dtype = torch.float32 if proof.replayed else torch.float64  # forward itself computes in float32
    cut = duplicate(pruned.model).to(dtype)
    at = []
    for size in network.sizes:
        found = [outcome(network.inputs(count, size), model, cut, pruned, proof) for count in (1, 2, 3)]
        at.append("; ".join(dict.fromkeys(found)))
    return Found(proof.rewritten, proof.tied, tuple(at), seconds)


def outcome(inputs: Any, model: nn.Module, cut: nn.Module, pruned: sc.Pruned, proof: Verification) -> str:
    """How a cut model and the masked original compare on some inputs, in words."""
    dtype = torch.float32 if proof.replayed else torch.float64
    call = pytree.tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) else x, as_call(inputs))
    if run_own(duplicate(model).to(dtype), call) is None:
        return "not taken"
    try:
        graph, plan = pruned.graph, pruned.plan
        expected = expected_at(model, graph, plan, inputs, dtype, statistics=bool(proof.statistics))
        found = run_own(cut, call)
    except sc.SecateurError as error:
        return f"refused ({error})"
    assert expected is not None
    apart = difference(expected, found)[1] if found is not None else float("inf")
    return "equal" if apart <= EQUAL[dtype] else f"wrong by {apart:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the page here")
    parser.add_argument("--only", default="", help="networks whose name holds this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[tuple[Network, str, Found]] = []
    for network in NETWORKS:
        for attention in ("heads", "dims") if options.only in network.name else ():
            try:
                found = examine(network, attention)
            except sc.SecateurError as error:
                found = Found((), (), tuple(f"refused ({error})" for _ in network.sizes), 0.0)
            if attention == "heads" or found.rewritten != rows[-1][2].rewritten:
                rows.append((network, attention, found))
                print(network.name, attention, found, flush=True)
    if options.out:
        options.out.write_text(page(rows))


def page(rows: list[tuple[Network, str, Found]]) -> str:
    """The page of results."""
    equal = sum(set(found.at) <= {"equal", "not taken"} for _, _, found in rows)
    _, about = (__doc__ or "").split("docs/results/sizes.md\n\n")
    lines = [
        "# Image sizes and batches after a cut",
        "",
        "`python benchmarks/sizes.py --out docs/results/sizes.md`",
        "",
        f"{equal} of {len(rows)} are equal wherever the original runs. torch {torch.__version__}, torchvision "
        f"{version('torchvision')}, timm {version('timm')}, transformers {version('transformers')}, "
        f"{device_name('cpu')}, Python {platform.python_version()}.",
        "",
        " ".join(about.split()),
        "",
        "| network | attention loses | modules rewritten | at its size | at another | at a third | CPU s |",
        "|---|---|---|---|---|---|---|",
    ]
    for network, attention, found in rows:
        sizes = zip(network.sizes, found.at, strict=True)
        cells = (f"{'×'.join(map(str, size))}: {outcome.partition(' (')[0]}" for size, outcome in sizes)
        lines.append(
            f"| {network.name} | {attention} | {len(found.rewritten)} | {' | '.join(cells)} | {found.seconds:.1f} |"
        )
    tied = [
        f"- {network.name} ({attention}): {text}."
        for network, attention, found in rows
        for text in found.tied
    ]
    lines += ["", "## What takes fewer sizes than before, and why", "", *(tied or ["Nothing."])]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
