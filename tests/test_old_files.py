"""Files that an earlier version wrote load to the same bits."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from secateur import Plan, analyze, cut_, load
from secateur.plan import WeightPlan
from secateur.runs.folder import SavedRun

WRITTEN = Path(__file__).parent / "data" / "written-by-0.1.0"


class Halves(nn.Module):
    """The network that was pruned: its forward names its widths, so that it had to be rewritten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.a, self.b, self.fc = nn.Conv2d(8, 16, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        n, _, h, w = x.shape
        y, z = self.a(x).view(n, 2, 8, h, w).unbind(1)
        return self.fc(self.b(y * z).mean((2, 3)))


def fingerprint(model: nn.Module) -> str:
    """Hash of names, types and bits of all tensors."""
    digest = hashlib.sha256()
    for name, t in sorted(model.state_dict().items()):
        raw = (
            t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if t.ndim else str(t.item()).encode()
        )
        digest.update(name.encode() + (str(t.dtype).encode() + raw if t.ndim else raw))
    return digest.hexdigest()


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("model", "f861839ecbcfba6c5559bb6eadfe4299affeab38721b5a93024c337d94432c80"),
        ("sparse", "c9a34ed7a96433d5390d0ad47a22b095cd96e388981083b85fc662cc0863da3e"),
    ],
)
def test_models_load_to_the_same_bits(name: str, bits: str) -> None:
    model = load(Halves(), WRITTEN / f"{name}.safetensors").eval()
    assert fingerprint(model) == bits
    assert model(torch.randn(2, 3, 6, 6)).shape == (2, 4)


def test_a_plan_cuts_as_it_did() -> None:
    model, x = Halves().eval(), torch.randn(2, 3, 6, 6)
    graph = analyze(model, x)
    plan = Plan.load(WRITTEN / "plan.json")
    assert plan.origin["score"] == "l2"
    cut_(model, graph, plan)
    cut = load(Halves(), WRITTEN / "model.safetensors")
    assert {n: t.shape for n, t in model.state_dict().items()} == {
        n: t.shape for n, t in cut.state_dict().items()
    }


def test_masks_are_those_of_the_sparse_model() -> None:
    plan = WeightPlan.load(WRITTEN / "masks.safetensors")
    model = load(Halves(), WRITTEN / "sparse.safetensors")
    plan.check(model)
    assert plan.kept == int(0.3 * plan.weights)
    assert all((model.get_parameter(name)[~mask] == 0).all() for name, mask in plan.masks.items())


def test_the_configuration_of_a_run_is_read(tmp_path: Path) -> None:
    """Its settings were named otherwise; what `eval --run` and `export --run` need is still there."""
    old = {
        "secateur": "0.1.0",
        "kind": "prune",
        "command": "secateur prune",
        "settings": {
            "task": {
                "model": "resnet8",
                "data": "digits",
                "data_dir": None,
                "image_size": 8,
                "test_images": 100,
            },
            "keep_macs": 0.5,
            "score": "l2",
            "granularity": "channels",
        },
        "input_shape": [1, 8, 8],
        "classes": 10,
        "normalisation": {"mean": [0.305], "std": [0.32], "scale": 0.00392156862745098},
    }
    (tmp_path / "config.json").write_text(json.dumps(old))
    saved = SavedRun.read(tmp_path)
    assert (saved.task["model"], saved.classes, saved.input_shape) == ("resnet8", 10, (1, 8, 8))
