"""Models that cannot be captured as a whole: their parts, what is tied between them, and what stays."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import secateur as sc
from secateur.errors import CaptureError, CutError, ScoreError
from secateur.graph import Graph
from secateur.graph.duplicate import duplicate
from secateur.graph.parts import Through

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class TwoStages(nn.Module):
    """Features, a mask that says by its values which of them count, and a head on what was picked.

    Args:
        between: what happens between features and head, besides the picking.
    """

    def __init__(self, between: Callable[[Tensor], Tensor] = lambda x: x, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.mask = nn.Conv2d(8, 1, 1, bias=False)
        self.head = nn.Sequential(nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, 4))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        image, row, column = torch.where(self.mask(features)[:, 0] > 0)
        return self.head(self.between(features[image, :, row, column]))


def group_with(graph: Graph, tensor: str, dim: int) -> Any:
    found = [g for g in graph.groups if any((m.tensor, m.dim) == (tensor, dim) for m in g.members)]
    return found[0] if found else None


def index_of(graph: Graph, tensor: str, dim: int) -> list[list[int]]:
    members = group_with(graph, tensor, dim).members
    return next(m.index.tolist() for m in members if (m.tensor, m.dim) == (tensor, dim))


def cut_half(model: nn.Module, graph: Graph) -> tuple[nn.Module, sc.Plan]:
    """Every other unit goes."""
    plan = sc.Plan.of(graph, [torch.arange(group.units) % 2 == 0 for group in graph.groups])
    return sc.cut_(duplicate(model), graph, plan), plan


def same_in_double(model: nn.Module, small: nn.Module, graph: Graph, plan: sc.Plan, inputs: Any) -> bool:
    """Whether the whole models agree, picking by values included."""
    masked = sc.mask_(duplicate(model), graph, plan).double().eval()
    with torch.no_grad():
        return torch.allclose(masked(inputs.double()), duplicate(small).double().eval()(inputs.double()))


def test_channels_are_tied_across_what_is_picked_by_value() -> None:
    model = TwoStages()
    graph = sc.analyze(model, X)
    assert graph.parts.names == ["features", "mask", "head"]
    tied = group_with(graph, "features.2.weight", 0)
    assert {(m.tensor, m.dim) for m in tied.members} == {
        ("features.2.weight", 0), ("features.2.bias", 0), ("mask.weight", 1), ("head.0.weight", 1),
    }  # fmt: skip
    assert tied.units == 8
    small, plan = cut_half(model, graph)
    assert small.head[0].in_features == 4
    proof = sc.verify(model, small, graph, plan)
    assert proof.ok
    assert proof.parts == ("features", "mask", "head")
    assert "the rest does the same between its 3 parts" in str(proof)
    assert same_in_double(model, small, graph, plan, X)


def test_regions_cost_as_often_as_the_example_has_them() -> None:
    model = TwoStages()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        picked = len(model(X))
    graph = sc.analyze(model, X)
    assert picked > 2  # and yet one region for each image was captured
    assert sc.Cost(graph).macs() * 2 == pytest.approx(counter.get_total_flops() / 2, abs=1)
    assert [len(t) for t in graph.parts.inputs] == [2, 2]


def flat(x: Tensor) -> Tensor:
    return x[:, :, None].repeat(1, 1, 3).flatten(1)


def beside(x: Tensor) -> Tensor:
    return torch.cat([torch.ones(len(x), 2), x], 1)


@pytest.mark.parametrize(
    ("between", "width", "index"),
    [
        (flat, 24, [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(8)]),
        (beside, 10, [[i + 2] for i in range(8)]),
    ],
)
def test_channels_are_followed_to_other_places(
    between: Callable[[Tensor], Tensor], width: int, index: list[list[int]]
) -> None:
    model = TwoStages(between, width)
    graph = sc.analyze(model, X)
    assert index_of(graph, "head.0.weight", 1) == index
    small, plan = cut_half(model, graph)
    assert sc.verify(model, small, graph, plan).ok
    assert same_in_double(model, small, graph, plan, X)


@pytest.mark.parametrize("between", [lambda x: x.flip(1), lambda x: x.softmax(1), lambda x: x + x.sum()])
def test_what_mixes_channels_keeps_them(between: Callable[[Tensor], Tensor]) -> None:
    model = TwoStages(between)
    graph = sc.analyze(model, X)
    assert group_with(graph, "features.2.weight", 0) is None
    assert group_with(graph, "head.0.weight", 1) is None
    assert ("features.2", 8, "read by what is not captured") in [
        (f.name, f.units, f.reason) for f in graph.frozen
    ]
    small, plan = cut_half(model, graph)  # what is inside of the parts
    assert small.features[0].out_channels == 4
    assert small.head[0].out_features == 8
    assert sc.verify(model, small, graph, plan).ok


def test_a_number_in_the_rest_that_does_not_follow_is_found() -> None:
    model = TwoStages(lambda x: x.view(-1, 8))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(CutError, match="what stands between its parts does not go on as before: TwoStages"):
        sc.prune(model, X, budget=0.5, round_to=1)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    kept = sc.prune(model, X, budget=0.8, round_to=1, freeze=["head.0"])
    assert kept.proof.ok


def test_a_part_that_the_example_does_not_call_keeps_what_it_may_read() -> None:
    class Seldom(TwoStages):
        def __init__(self) -> None:
            super().__init__()
            self.seldom = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.seldom(self.features(x).mean((2, 3))) if x.mean() > 9 else super().forward(x)

    graph = sc.analyze(Seldom(), X)
    assert graph.parts.uncalled == ("seldom",)
    assert group_with(graph, "features.2.weight", 0) is None
    assert group_with(graph, "features.0.weight", 0).units == 8
    assert "seldom: stays, and so does what it might read" in str(graph)
    named = sc.analyze(Seldom(), X, scope=["features", "mask", "head"])
    assert named.parts.uncalled == ("seldom",)
    assert group_with(named, "features.2.weight", 0) is None


def test_scope_says_what_is_pruned() -> None:
    model = TwoStages()
    graph = sc.analyze(model, X, scope=["features", "head"])
    assert graph.parts.names == ["features", "head"]
    assert group_with(graph, "features.2.weight", 0) is None  # the mask reads it
    pruned = sc.prune(model, X, budget=0.7, scope=["head"], round_to=1)
    assert pruned.plan.origin["scope"] == ["head"]
    assert pruned.model.head[0].out_features < 16
    assert torch.equal(pruned.model.features[0].weight, model.features[0].weight)
    with pytest.raises(CaptureError, match=r"unknown module 'heads'; choose one of: .*Did you mean 'head'"):
        sc.analyze(model, X, scope=["heads"])
    with pytest.raises(CaptureError, match=r"'head\.0' is inside of 'head'"):
        sc.analyze(model, X, scope=["head", "head.0"])


def test_the_stand_in_ties_all_levels_of_a_pyramid() -> None:
    class Levels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fine, self.coarse = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1, stride=2)

        def forward(self, x: Tensor) -> list[Tensor]:
            return [self.fine(x), self.coarse(x)]

    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.levels, self.head = Levels(), nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))

        def forward(self, x: Tensor) -> Tensor:
            level = self.levels(x)[int(x.amax() > 99)]  # this time the first, another time the second
            return self.head(level.mean((2, 3)))

    graph = sc.analyze(Pyramid(), X)
    (run,) = next(a for call in graph.parts.calls for a in call.args if isinstance(a, Through)).runs
    assert [source.leaf for source in run.sources] == [0, 1]
    tied = {m.tensor for m in group_with(graph, "head.0.weight", 1).members}
    assert {"levels.fine.weight", "levels.coarse.weight"} <= tied


# --- a detector of torchvision -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def detector() -> nn.Module:
    detection = pytest.importorskip("torchvision").models.detection
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, 2, 1), nn.ReLU()
    )
    backbone.out_channels = 24
    anchors = detection.anchor_utils.AnchorGenerator(((16, 32),), ((1.0,),))
    return detection.FasterRCNN(
        backbone,
        num_classes=None,
        rpn_anchor_generator=anchors,
        box_head=detection.faster_rcnn.TwoMLPHead(24 * 49, 32),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(32, 3),
        min_size=48, max_size=64, rpn_post_nms_top_n_test=12, box_score_thresh=0.0, box_detections_per_img=5,
    ).eval()  # fmt: skip


IMAGES = [torch.rand(3, 48, 56, generator=torch.Generator().manual_seed(n)) for n in (0, 1)]
TARGETS = [
    {"boxes": torch.tensor([[4.0, 4.0, 30.0, 40.0]]), "labels": torch.tensor([n + 1])} for n in range(2)
]


def test_a_detector_is_pruned_trains_on_and_is_loaded(detector: nn.Module, tmp_path: Path) -> None:
    pruned = sc.prune(detector, [IMAGES[0]], budget=0.6, round_to=1)
    small = pruned.model
    heads = ["roi_heads.box_head", "roi_heads.box_predictor"]
    assert pruned.graph.parts.names == ["backbone", "rpn.head", *heads]
    assert pruned.proof.ok
    assert 0.55 < pruned.after["macs"] / pruned.before["macs"] <= 0.6
    for model, macs in ((detector, pruned.before["macs"]), (small, pruned.after["macs"])):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(IMAGES[:1])
        assert counter.get_total_flops() / 2 == pytest.approx(macs, abs=2)
    shown = str(pruned)
    assert "roi_heads.box_roi_pool: stays (it has no weights and is given numbers" in shown
    assert any("roi_heads.box_roi_pool: stays" in note for note in pruned.report.notes)

    masked = sc.mask_(duplicate(detector), pruned.graph, pruned.plan).double()
    with torch.no_grad():
        expected = masked([x.double() for x in IMAGES])
        found = duplicate(small).double()([x.double() for x in IMAGES])
    for a, b in zip(expected, found, strict=True):
        assert len(a["boxes"]) == 5
        assert all(torch.allclose(a[key], b[key]) for key in a)

    pruned.save(tmp_path / "small.safetensors")
    loaded = sc.load(duplicate(detector), tmp_path / "small.safetensors")
    with torch.no_grad():
        again = loaded(IMAGES)
        assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(again, small(IMAGES), strict=True))

    losses = loaded.train()(IMAGES, TARGETS)
    sum(losses.values()).backward()
    assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in loaded.parameters())


def test_gradients_of_a_detectors_losses_rank(detector: nn.Module) -> None:
    def loss(losses: dict[str, Tensor], targets: Any) -> Tensor:
        assert targets is not None
        return torch.stack(list(losses.values())).sum()

    modes = [m.training for m in detector.modules()]
    statistics = detector.backbone[1].running_mean.clone()
    data = [(IMAGES, TARGETS), {"images": IMAGES, "targets": TARGETS}]
    ranked = sc.prune(detector, IMAGES, budget=0.6, data=data, loss=loss, round_to=1)
    assert ranked.plan.origin["method"] == "oneshot"
    assert ranked.plan.origin["score"] == "taylor"
    assert ranked.proof.ok
    assert all(score.isfinite().all() and score.std() > 0 for score in ranked.scores)
    assert [m.training for m in detector.modules()] == modes
    assert torch.equal(detector.backbone[1].running_mean, statistics)
    with pytest.raises(ScoreError, match=r"fails in training mode .*batches of \(images, targets\)"):
        sc.prune(
            detector, IMAGES, budget=0.6, method="oneshot", score="taylor", data=[(IMAGES, None)], loss=loss
        )


def test_a_detector_that_fails_names_the_users_own_inputs(detector: nn.Module) -> None:
    with pytest.raises(CaptureError, match=r"transform .*does not run on .*\[\(3, 48, 56\) float32 on cpu\]"):
        sc.analyze(detector, IMAGES[0])
