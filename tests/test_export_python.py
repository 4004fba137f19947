"""Files of plain PyTorch and of 8-bit integers, and what is in them."""

import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import secateur as sc
from secateur.errors import ExportError
from secateur.export import export_onnx, export_python, onnx_runner
from secateur.int8 import export_int8
from secateur.recipes.models import build_model
from secateur.rewriting.plain import as_source
from secateur.rewriting.source import is_plain


def images(batch: int = 2, side: int = 32) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))


@functools.cache
def halved(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(name)
    return sc.prune(model, images(), budget=0.5, method="oneshot", score="l2").model.eval()


READS = """
import sys
sys.path.insert(0, sys.argv[1])
import torch, small
model, x = small.load(), torch.load(sys.argv[2], weights_only=True)
assert not any(name.startswith("secateur") for name in sys.modules)
model(x).sum().backward() if sys.argv[3] == "train" else None
torch.save([model(x).detach(), model(x[:1]).detach()], sys.argv[2])
"""


def test_a_process_without_secateur_reads_it(tmp_path: Path) -> None:
    model, x = halved("resnet20"), images(3, 40)
    check = export_python(model, images(), tmp_path / "small.py")
    assert {path.name for path in tmp_path.iterdir()} == {"small.py", "small.weights.safetensors"}
    assert check.max_abs_error == 0
    torch.save(x, tmp_path / "x.pt")
    read = [sys.executable, "-c", READS, tmp_path, tmp_path / "x.pt", "train"]
    subprocess.run(list(map(str, read)), check=True, timeout=300)
    with torch.no_grad():
        expected = [model(x), model(x[:1])]
    torch.testing.assert_close(torch.load(tmp_path / "x.pt", weights_only=True), expected)


def test_one_can_read_it(tmp_path: Path) -> None:
    export_python(halved("resnet20"), images(), tmp_path / "small.py")
    text = (tmp_path / "small.py").read_text()
    for line in (
        "class CifarResNet(nn.Module):",
        "self.bn1 = nn.BatchNorm2d(16)",
        "self.conv1 = nn.Conv2d(3, 16, kernel_size=3, padding=1, bias=False)",
        "x = self.conv1(x)",
        "# layer1.1",
        "x = x1 + x",
        "x = x[:, :, ::2]",
    ):
        assert line in text
    assert "torch.ops" not in text
    assert "secateur" not in text.split('"""', 2)[2]


class Odd(nn.Module):
    """What no layer of `torch.nn` does: parameters of its own, a normalised weight, a tuple out, sizes, a list in."""

    def __init__(self) -> None:
        super().__init__()
        self.a = parametrizations.weight_norm(nn.Conv2d(3, 8, 3, padding=1))
        self.b = nn.MultiheadAttention(8, 2, batch_first=True)
        self.scale = nn.Parameter(torch.randn(8))
        self.register_buffer("shift", torch.randn(1, 8, 1), persistent=False)

    def forward(self, x: Tensor, more: list[Tensor]) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        y = self.a(x)[:, :, ::2].flatten(2) + self.shift
        z = y.transpose(1, 2) * self.scale
        z = self.b(z, z, z)[0].transpose(1, 2).reshape(len(x), 8, -1, x.shape[3])
        z = F.dropout(z, 0.5, self.training) + more[0][:, :, None, None] + more[1]
        return {"out": z, "pair": (z.mean((2, 3)), z.amax(1))}


def test_whatever_can_be_captured(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Odd().eval()
    more = [torch.randn(2, 8), torch.randn(1)]
    export_python(model, (images(side=8), more), tmp_path / "small.py")
    namespace: dict[str, object] = {"__file__": str(tmp_path / "small.py")}
    exec((tmp_path / "small.py").read_text(), namespace)
    plain = namespace["load"]()  # type: ignore[operator]
    for batch, height, width in ((2, 8, 8), (3, 12, 6), (1, 6, 10)):
        given = torch.randn(batch, 3, height, width), [torch.randn(batch, 8), torch.randn(1)]
        torch.testing.assert_close(plain(*given), model(*given))
    plain.train()
    assert (plain(*given)["out"] != plain(*given)["out"]).any()  # dropout acts


def test_plain_layers_are_those_that_their_settings_make_again() -> None:
    for layer in (nn.Conv2d(3, 8, (3, 1), stride=2, padding=(1, 0)), nn.Linear(3, 2),
                  nn.LSTM(4, 8, batch_first=True), nn.GroupNorm(2, 8), nn.Embedding(5, 3), nn.PReLU(4)):  # fmt: skip
        assert is_plain(layer)
    changed, hooked = nn.Conv2d(3, 8, 3), nn.Linear(3, 2)
    changed.stride = (2, 2)
    changed.padding_mode = "nowhere"
    hooked.register_forward_hook(lambda *_: None)
    for layer in (changed, hooked, nn.Sequential(nn.ReLU()), parametrizations.weight_norm(nn.Linear(3, 2))):
        assert not is_plain(layer)


def test_what_training_alone_does_is_said() -> None:
    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return y * torch.bernoulli(torch.full((len(x), 1), 0.5)) if self.training else y

    text = as_source(Drops().eval(), torch.randn(2, 4)).text("w.safetensors", "Drops.")
    assert "Leaves out what it does in training mode only (bernoulli" in text


def test_nothing_is_written_where_it_fails(tmp_path: Path) -> None:
    class Text(nn.Module):
        def forward(self, x: Tensor) -> dict[str, object]:
            return {"a": x, "b": object()}

    for model, name in ((Text(), "small.py"), (nn.ReLU(), "small.txt")):
        with pytest.raises(ExportError, match=r"Nothing was written|ends in \.py"):
            export_python(model, images(), tmp_path / name)
    assert not any(tmp_path.iterdir())


def test_integers(tmp_path: Path) -> None:
    """Close to the model, smaller, at any batch; the error is what it says."""
    model = halved("resnet8")
    calibration = list(images(32).split(8))
    check = export_int8(model, images(1), tmp_path / "small.onnx", calibration)
    assert check.images == 32
    assert check.file_bytes < sum(p.numel() for p in model.parameters()) * 4
    run = onnx_runner(check.path)
    with torch.no_grad():
        got, expected = run(images(32))[0], model(images(32))
    assert float((got - expected).norm() / expected.norm()) == pytest.approx(check.rel_error, rel=1e-3)
    assert 0 < check.rel_error < 0.1
    assert check.same_answer == float((got.argmax(1) == expected.argmax(1)).double().mean())
    with pytest.raises(ExportError, match="calibration is empty"):
        export_int8(model, images(1), tmp_path / "none.onnx", [])
    assert not (tmp_path / "none.onnx").exists()


def test_openvino_reads_the_onnx_file(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    model = halved("resnet8")
    export_onnx(model, images(), tmp_path / "small.onnx")
    compiled = openvino.Core().compile_model(openvino.convert_model(tmp_path / "small.onnx"), "CPU")
    with torch.no_grad():
        expected = model(images(3))
    (got,) = compiled([images(3).numpy()]).values()
    torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-3, atol=1e-3)
