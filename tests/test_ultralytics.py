"""The network inside of a `YOLO` object: cut, it fuses, exports, trains on, resumes and validates."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from tests.oracles import random_masks

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*lr_scheduler.step",
    "ignore:.*legacy TorchScript-based",
    "ignore:.*:DeprecationWarning:torch.onnx.*",
    "ignore:.*pin_memory",
    "ignore:.*torch.jit.*deprecated",
    "ignore::torch.jit.TracerWarning",
)

BLOCKS = {
    "nc": 2,
    "backbone": [
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "Conv", [32, 3, 2]],
        [-1, 1, "C2f", [32, True]],
        [-1, 1, "C3k2", [32, True]],
        [-1, 1, "Conv", [64, 3, 2]],
        [-1, 1, "C2PSA", [64]],
        [-1, 1, "RepC3", [64]],
        [-1, 1, "C2fCIB", [64, True, True]],
        [-1, 1, "RepNCSPELAN4", [64, 32, 16, 1]],
    ],
    "head": [[[3, 8], 1, "Detect", ["nc"]]],
}
"""A detector of the blocks that Ultralytics fuses, or runs in another way to export them."""

SMALL = """
nc: 1
backbone:
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, C2f, [16, True]]
  - [-1, 1, Conv, [32, 3, 2]]
head:
  - [[1, 2], 1, Detect, [nc]]
"""


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ultralytics' settings go elsewhere, and it asks no network for news."""
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    monkeypatch.setenv("YOLO_AUTOINSTALL", "false")
    pytest.importorskip("ultralytics")
    monkeypatch.chdir(tmp_path)


def test_every_block_fuses_and_splits_after_a_cut() -> None:
    from ultralytics.nn.modules import C2f
    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(0)
    model = DetectionModel(copy.deepcopy(BLOCKS), verbose=False).eval()
    x = torch.rand(1, 3, 64, 64)
    graph = sc.analyze(model, x)
    plan = sc.Plan.of(graph, random_masks(graph, 0))
    cut = sc.cut_(copy.deepcopy(model), graph, plan)
    proof = sc.verify(model, cut, graph, plan)
    assert proof.ok, proof
    assert not proof.stale
    with torch.no_grad():
        expected = cut(x)[0]
        fused = copy.deepcopy(cut).fuse(verbose=False)
        splitting = [m for m in fused.modules() if isinstance(m, C2f)]
        assert len(splitting) == 3
        for module in splitting:
            module.forward = module.forward_split  # what the exporter does
        torch.testing.assert_close(fused(x)[0], expected, rtol=1e-3, atol=1e-3)


def write_data(folder: Path) -> None:
    """Bright squares on noise."""
    from PIL import Image

    random = np.random.default_rng(0)
    for split, number in (("train", 8), ("val", 4)):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for n in range(number):
            pixels = random.integers(0, 120, (64, 64, 3), dtype=np.uint8)
            x, y = random.integers(0, 32, 2)
            pixels[y : y + 32, x : x + 32] = 255
            Image.fromarray(pixels).save(folder / f"images/{split}/{n}.png")
            (folder / f"labels/{split}/{n}.txt").write_text(f"0 {(x + 16) / 64} {(y + 16) / 64} 0.5 0.5")
    (folder / "data.yaml").write_text(
        f"path: {folder}\ntrain: images/train\nval: images/val\nnames: [square]"
    )


@pytest.mark.slow
def test_a_pruned_detector_trains_resumes_validates_and_exports(tmp_path: Path) -> None:
    from ultralytics import YOLO
    from ultralytics.models.yolo.detect import DetectionTrainer

    class Trainer(DetectionTrainer):
        def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> nn.Module:
            return weights.float().requires_grad_()

    class Stopped(Exception):
        pass

    def stop(trainer: Any) -> None:
        raise Stopped

    def shapes(model: nn.Module) -> dict[str, torch.Size]:
        return {name: p.shape for name, p in model.state_dict().items()}

    write_data(tmp_path / "data")
    (tmp_path / "small.yaml").write_text(SMALL)
    settings: dict[str, Any] = {
        **{
            "data": str(tmp_path / "data" / "data.yaml"),
            "imgsz": 64,
            "batch": 4,
            "device": "cpu",
            "plots": False,
        },
        **{"optimizer": "AdamW", "project": str(tmp_path / "runs"), "workers": 0, "verbose": False},
    }
    model = YOLO(tmp_path / "small.yaml")
    pruned = sc.prune(model.model, torch.zeros(1, 3, 64, 64), budget=0.5)
    assert pruned.proof.ok
    assert not pruned.proof.stale
    expected = shapes(pruned.model)
    model.model = pruned.model
    model.load(pruned.model)  # so that it counts as loaded weights, which the trainer is given
    model.add_callback("on_model_save", stop)
    with pytest.raises(Stopped):
        model.train(trainer=Trainer, epochs=2, name="pruned", **settings)
    last = tmp_path / "runs" / "pruned" / "weights" / "last.pt"
    stopped = YOLO(last)
    assert shapes(stopped.model) == expected
    resumed = YOLO(last)
    resumed.train(trainer=Trainer, resume=True)
    assert resumed.trainer.start_epoch == 1
    assert shapes(resumed.trainer.ema.ema) == shapes(resumed.model) == expected
    changed = [
        n for n, p in resumed.model.named_parameters() if not torch.equal(p, stopped.model.get_parameter(n))
    ]
    assert len(changed) > 5
    metrics = resumed.val(data=settings["data"], imgsz=64, plots=False, verbose=False)
    assert 0 <= metrics.box.map50 <= 1
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        answer = resumed.model.eval()(x)[0]
    exported = torch.jit.load(resumed.export(format="torchscript", imgsz=64))
    torch.testing.assert_close(exported(x), answer, rtol=1e-3, atol=1e-2)
    onnxruntime = pytest.importorskip("onnxruntime")
    file = resumed.export(format="onnx", imgsz=64, simplify=False)
    found = onnxruntime.InferenceSession(file).run(None, {"images": x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), answer, rtol=1e-3, atol=1e-2)
