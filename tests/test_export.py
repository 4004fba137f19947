"""Exported files compute what the module computes, and exporting leaves nothing else behind."""

import copy
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from secateur.cost.latency import compare_latency
from secateur.errors import ExportError, FileError
from secateur.export import OnnxRunner, export_onnx, export_program, onnx_runner

EXPORTS = pytest.mark.parametrize("export", [export_onnx, export_program])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@EXPORTS
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_the_file_takes_any_batch(export, batch: int, tmp_path: Path):
    model = Net()
    check = export(model, images(batch), tmp_path / "model.file")
    assert check.static_because is None
    assert set(check.batches) == {1, batch, batch + 1}
    assert 0 <= check.max_rel_error < 1e-5
    assert check.file_bytes == (tmp_path / "model.file").stat().st_size
    assert [file.name for file in tmp_path.iterdir()] == ["model.file"]


def test_the_onnx_file_is_the_model(tmp_path: Path):
    import onnx

    model = Net().eval()
    export_onnx(model, images(), tmp_path / "model.onnx")
    torch.testing.assert_close(onnx_runner(tmp_path / "model.onnx")(images(7))[0], model(images(7)))
    proto = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(proto, full_check=True)
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert [output.name for output in proto.graph.output] == ["output"]
    assert proto.opset_import[0].version == 18


class Halved(Net):
    """Adds what it makes of a smaller image, resized to the size of the first."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.conv(x)))
        small = nn.functional.interpolate(nn.functional.avg_pool2d(y, 2), size=y.shape[2:], mode="bilinear")
        return (y + small).flatten(2).transpose(1, 2) @ self.head.weight.T


class Tabled(Net):
    """Adds a table of positions, and so takes one size of images only."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 8, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.conv(x) + self.table).mean((2, 3)))


@EXPORTS
def test_the_file_takes_any_image_size(export, tmp_path: Path):
    model, path = Halved().eval(), tmp_path / "model.file"
    check = export(model, images(), path, any_size=True)
    assert check.one_size_because is None
    assert check.static_because is None
    assert len(set(check.sizes)) == 3
    assert check.sizes[0] == (2, 3, 8, 8)
    assert 0 <= check.max_rel_error < 1e-5
    run = onnx_runner(path) if export is export_onnx else torch.export.load(path).module()
    x = torch.randn(5, 3, 14, 26)
    found = run(x)[0] if export is export_onnx else run(x)
    torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)
    export(model, images(), path)
    run = onnx_runner(path) if export is export_onnx else torch.export.load(path).module()
    with pytest.raises(Exception, match=r"(?i)invalid dimensions|expected|guard"):
        run(x)


@EXPORTS
def test_one_image_size_is_kept_and_said(export, tmp_path: Path):
    check = export(Tabled(), images(), tmp_path / "model.file", any_size=True)
    assert check.one_size_because == "the model takes no other"
    assert check.sizes == ((2, 3, 8, 8),)
    assert check.static_because is None


def test_the_program_is_the_model(tmp_path: Path):
    model = Net().eval()
    check = export_program(model, images(), tmp_path / "model.pt2")
    assert check.max_abs_error == 0
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    assert torch.equal(loaded(images(7)), model(images(7)))


@EXPORTS
def test_the_module_is_untouched(export, tmp_path: Path):
    model = Net()
    model.norm.eval()
    hook = model.conv.register_forward_hook(lambda *_: None)
    parameters, state = list(model.parameters()), copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    export(model, images(), tmp_path / "model.file")
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert list(model.conv._forward_hooks) == [hook.id]
    assert all(p.grad is None and p.requires_grad for p in parameters)


@EXPORTS
def test_several_inputs_and_outputs_by_name(export, tmp_path: Path):
    class Two(nn.Module):
        def forward(self, image: Tensor, offset: Tensor, scale: Tensor) -> dict[str, Tensor]:
            return {"sum": image + offset[:, None], "scaled": image * scale}

    inputs = {"image": torch.randn(4, 3), "offset": torch.randn(4), "scale": torch.randn(3)}
    check = export(Two(), inputs, tmp_path / "model.file")
    assert check.static_because is None
    if export is export_onnx:
        outputs = onnx_runner(check.path)(**inputs)
        torch.testing.assert_close(outputs, list(Two()(**inputs).values()))


@EXPORTS
def test_a_fixed_batch_is_kept_and_said(export, tmp_path: Path):
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(2, -1).sigmoid()

    check = export(Fixed(), images(2), tmp_path / "model.file")
    assert check.static_because
    assert check.batches == (2,)
    assert check.path.exists()


def test_what_is_right_at_the_given_batch_only_is_exported_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    right = OnnxRunner.__call__
    monkeypatch.setattr(
        OnnxRunner, "__call__", lambda self, x: right(self, x) if len(x) == 2 else [torch.zeros(len(x), 5)]
    )
    check = export_onnx(Net(), images(2), tmp_path / "model.onnx")
    assert check.batches == (2,)
    assert "at batch 1 its outputs differ" in (check.static_because or "")


def test_a_file_that_computes_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    right = OnnxRunner.__call__
    monkeypatch.setattr(OnnxRunner, "__call__", lambda self, *args: [x * 1.01 for x in right(self, *args)])
    (tmp_path / "model.onnx").write_text("what stood there before")
    with pytest.raises(ExportError, match=r"model\.onnx.*differ from the module's by 1\.0e-02"):
        export_onnx(Net(), images(), tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").read_text() == "what stood there before"
    assert len(list(tmp_path.iterdir())) == 1


@EXPORTS
def test_not_a_number_is_not_equal_to_itself(export, tmp_path: Path):
    model = Net()
    nn.init.constant_(model.head.weight, float("nan"))
    with pytest.raises(ExportError, match="nan"):
        export(model, images(), tmp_path / "model.file")
    assert not list(tmp_path.iterdir())


@EXPORTS
def test_control_flow_that_cannot_be_exported_is_an_error(export, tmp_path: Path):
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match="Branching could not be exported"):
        export(Branching(), images(), tmp_path / "model.file")
    with pytest.raises(ExportError, match="Net cannot be copied to the CPU and run there"):
        export(Net(), torch.zeros(2, 4, 8, 8), tmp_path / "model.file")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("depth", [False, True])
def test_an_operator_that_onnx_lacks_is_named(depth: bool, tmp_path: Path):
    class Peaks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.i0(x) if depth else x.cummax(1).values

    name = r"prims\.bessel_i0" if depth else r"aten\.cummax"
    with pytest.raises(
        ExportError, match=rf"operator {name}\.default cannot be converted \(No ONNX function"
    ) as e:
        export_onnx(Peaks(), torch.rand(1, 3, 4, 4), tmp_path / "m.onnx")
    assert "\x1b" not in str(e.value)
    assert "step 3/3" not in str(e.value)
    assert not list(tmp_path.iterdir())


def test_an_opset_that_was_not_reached_is_an_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    with pytest.raises(ExportError, match="opset 7"):
        export_onnx(Net(), images(), tmp_path / "model.onnx", opset=7)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


@EXPORTS
def test_exporting_is_silent_and_leaves_loggers_alone(
    export, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    export(Net(), images(), tmp_path / "model.file")
    assert capfd.readouterr() == ("", "")
    assert logger.level == level


def test_a_warning_of_the_model_itself_passes(tmp_path: Path):
    class Warning_(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            import warnings

            warnings.warn("mind the step", stacklevel=1)
            return x + 1

    with pytest.warns(UserWarning, match="mind the step"):
        export_program(Warning_(), images(), tmp_path / "model.pt2")


def test_the_runner_can_be_timed_beside_the_module(tmp_path: Path):
    model = Net()
    path = export_onnx(model, images(), tmp_path / "model.onnx").path
    timed = compare_latency({"module": model, "onnx": onnx_runner(path, threads=1)}, images(), repeats=3)
    assert [latency.runtime for latency in timed.values()] == ["pytorch", "onnxruntime"]
    assert timed["onnx"].threads == 1
    assert onnx_runner(path).threads == torch.get_num_threads()


def test_what_is_not_an_onnx_file(tmp_path: Path):
    with pytest.raises(FileError, match="no such file"):
        onnx_runner(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(FileError, match=r"bad\.onnx: not an ONNX model"):
        onnx_runner(tmp_path / "bad.onnx")
