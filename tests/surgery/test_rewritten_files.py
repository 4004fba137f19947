"""Files of rewritten models: bit for bit, exported, and harmless."""

import copy
import json

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.errors import FileError
from secateur.export import export_onnx, export_program
from secateur.files import read_tensors, write_tensors
from secateur.rewriting.rewrite import rewritten_modules
from tests.surgery.fixed_sizes import (
    NETWORKS,
    FixedView,
    cut_down,
    cut_once,
)


@pytest.mark.parametrize("name", ["vit", "grouped"])
def test_exports_agree(name: str, tmp_path) -> None:
    _, x, _, _, cut = cut_once(name)
    onnx = export_onnx(cut, x, tmp_path / "m.onnx")
    assert onnx.static_because is None
    program = export_program(cut, x, tmp_path / "m.pt2")
    assert program.static_because is None


@pytest.mark.parametrize("name", NETWORKS)
def test_saved_and_loaded_bit_for_bit(name: str, tmp_path) -> None:
    _, x, _, _, cut = cut_once(name)
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


pytestmark = pytest.mark.xdist_group("rewritten")


def damaged(path, change) -> None:
    tensors, metadata = read_tensors(path)
    recipe = json.loads(metadata["recipe"])
    change(recipe["rewritten"])
    write_tensors(path, tensors, metadata | {"recipe": json.dumps(recipe)})


def op(index: int, value):
    return lambda r: r[""]["program"]["ops"].__setitem__(index, value)


def call(name, args):
    return op(0, {"call": [name, args, {"dict": {}}]})


def output(value):
    return lambda r: r[""]["program"].update(output=value)


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
        (call(".", [{"ref": 0}]), "which is no submodule"),
        (call("", [{"ref": 0}]), "which is no submodule"),
        (call("..a", [{"ref": 0}]), "which is no submodule"),
        (call("a.forward", [{"ref": 0}]), "which is no submodule"),
        (call("__class__", [{"ref": 0}]), "which is no submodule"),
        (call("a", [{"ref": 0}, "/etc/passwd"]), "may be given tensors and numbers only"),
        (call("a", [{"ref": 0}, {"named": ["dtype", "float32"]}]), "may be given tensors and numbers only"),
        (call("a", [{"ref": 0}, 2**15, 2**15]), "larger than any a vision network needs"),
        (call("a", {"ref": 0}), "arguments must be a list"),
        (call(5, []), "a call is a submodule, arguments and keyword arguments"),
        (op(0, {"call": ["a", []]}), "a call is a submodule, arguments and keyword arguments"),
        (output({"made": ["os:PathLike", {"dict": {}}]}), "is no class of the package"),
        (output({"made": ["subprocess:Popen", {"dict": {"args": {"ref": 0}}}]}), "is no class of the package"),
        (output({"made": ["tests.surgery.fixed_sizes:FixedView", {"dict": {}}]}), "is no dataclass or named tuple"),
        (output({"made": ["collections:OrderedDict", {"dict": {"a": "b"}}]}), "may hold tensors and numbers only"),
        (output({"made": ["collections:OrderedDict", [1]]}), "no object can be made"),
        (lambda r: r[""]["program"].update(tensors=["__class__", "a.bias", "b.weight", "b.bias"]), "does not have"),
        (lambda r: r[""]["program"].update(ops=5), "must be a list"),
        (lambda r: r[""]["program"].update(inputs=10**9), "expected a number in 0…1000"),
        (lambda r: r[""]["program"].pop("output"), "has exactly the fields"),
        (lambda r: r.update({"a.nothing": {"program": {}}}), "has no such module"),
        (lambda r: r.update({"": 5}), "its recipe is damaged"),
    ],
)  # fmt: skip
def test_hostile_programs_are_refused(change, message: str, tmp_path) -> None:
    sc.save(cut_once("view")[-1], tmp_path / "m.safetensors")
    assert sc.load(FixedView(), tmp_path / "m.safetensors").program.calls == {"a", "b"}
    damaged(tmp_path / "m.safetensors", change)
    fresh = FixedView()
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(FileError, match=message):
        sc.load(fresh, tmp_path / "m.safetensors")
    assert type(fresh) is FixedView
    torch.testing.assert_close(fresh.state_dict(), before, rtol=0, atol=0)


def test_calls_that_multiply_are_refused(tmp_path) -> None:
    """A few lines that call one another many times would run for ever."""

    class Chain(nn.Module):
        def __init__(self, depth: int) -> None:
            super().__init__()
            self.body = Chain(depth - 1) if depth else FixedView()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    def multiply(programs: dict) -> None:
        (_, entry), *_ = programs.items()
        for depth in range(3):
            name = ".".join(["body"] * depth)
            ops = [{"call": ["body", [{"ref": 0}], {"dict": {}}]}] * 100
            arguments = {"dict": {"x": {"ref": 0}}}
            program = {"arguments": arguments, "inputs": 1, "tensors": [], "ops": ops, "output": {"ref": 100}}
            programs[name] = {"program": entry["program"] | program | {"limits": []}, "lost": ""}

    model, x = Chain(2).eval(), torch.randn(2, 3, 8, 8)
    sc.save(cut_down(model, x)[-1], tmp_path / "m.safetensors")
    damaged(tmp_path / "m.safetensors", multiply)
    with pytest.raises(FileError, match="runs more than 100,000 operators"):
        sc.load(Chain(2), tmp_path / "m.safetensors")
