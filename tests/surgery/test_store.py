"""A saved model comes back bit for bit, in another process, or not at all."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import secateur as sc
from secateur.errors import FileError
from secateur.files import read_tensors, write_tensors
from secateur.recipes.models import build_model
from secateur.surgery.bypass import Side, add_bypass_
from tests.networks import network

REBUILD = """
import sys, torch, secateur as sc
from secateur.recipes.models import build_model
torch.set_num_threads(1)
for file in sys.argv[1::2]:
    model = sc.load(build_model(sys.argv[sys.argv.index(file) + 1]), file).eval()
    torch.manual_seed(0)
    torch.save(model(torch.randn(2, 3, 64, 64)), file + ".pt")
"""


@pytest.fixture(scope="module")
def small() -> nn.Module:
    """A cut network that tests only read."""
    return sc.prune(build_model("resnet20"), torch.randn(1, 3, 32, 32), budget=sc.Budget(macs=0.5)).model


@pytest.fixture
def saved(small, tmp_path):
    sc.save(small, tmp_path / "small.safetensors")
    return small, tmp_path / "small.safetensors"


def test_a_new_process_rebuilds_it_bit_for_bit(tmp_path) -> None:
    command, outputs = [sys.executable, "-c", REBUILD], {}
    for number, name in enumerate(
        ("torchvision/regnet_y_400mf", "torchvision/shufflenet_v2_x1_0", "resnet20")
    ):
        pruned = sc.prune(
            build_model(name), torch.randn(1, 3, 64, 64), budget=sc.Budget(macs=0.6)
        ).model.eval()
        file = tmp_path / f"{number}.safetensors"
        sc.save(pruned, file)
        torch.manual_seed(0)
        with torch.no_grad():
            outputs[f"{file}.pt"] = pruned(torch.randn(2, 3, 64, 64))
        command += [str(file), name]
    subprocess.run(command, check=True)
    for file, output in outputs.items():
        assert torch.equal(output, torch.load(file, weights_only=True)), file


def test_an_uncut_model_is_a_cut_one_too(tmp_path) -> None:
    model = build_model("resnet8")
    sc.save(model, tmp_path / "m.safetensors")
    loaded = sc.load(build_model("resnet8"), tmp_path / "m.safetensors")
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )


def test_tied_weights_come_back_tied(tmp_path) -> None:
    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
        model[2].weight = model[0].weight
        return model

    model = make()
    sc.save(model, tmp_path / "m.safetensors")
    loaded = sc.load(make(), tmp_path / "m.safetensors")
    assert loaded[0].weight is loaded[2].weight
    assert torch.equal(loaded[0].weight, model[0].weight)


def change(path, **edits) -> None:
    tensors, metadata = read_tensors(path)
    recipe = json.loads(metadata["recipe"])
    for key, value in edits.items():
        module, _, attribute = key.rpartition("__")
        recipe["attributes"].setdefault(module.replace("__", "."), {})[attribute] = value
    write_tensors(path, tensors, metadata | {"recipe": json.dumps(recipe)})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:1000]), "not a readable safetensors file"),
        (lambda p: p.write_bytes(b"\x80\x04\x95" + b"\0" * 64), "not a readable safetensors file"),
        (lambda p: p.write_bytes(b""), "not a readable safetensors file"),
        (lambda p: p.unlink(), "no such file"),
        (lambda p: save_file(load_file(p), p), "not a model saved by Secateur"),
        (lambda p: write_tensors(p, load_file(p), {"format": "1", "recipe": "["}), "its recipe is damaged"),
        (
            lambda p: write_tensors(p, load_file(p), {"format": "1", "recipe": '{"attributes": {"fc": 1}}'}),
            "damaged",
        ),
        (
            lambda p: change(p, fc__in_features=10**9),
            "attribute fc.in_features is 1000000000, expected a number in 0…64",
        ),
        (lambda p: change(p, fc__in_features="7"), "expected a number"),
        (lambda p: change(p, fc__forward=1), "fc.forward is not one that follows a shape"),
        (lambda p: change(p, fc____class__=1), "is not one that follows a shape"),
        (lambda p: change(p, fc__in_features=1), "attributes of fc contradict its tensors"),
    ],
)
def test_damaged_and_hostile_files_leave_the_model_unchanged(saved, damage, message: str) -> None:
    _, path = saved
    damage(path)
    fresh = build_model("resnet20")
    before = {name: t.clone() for name, t in fresh.state_dict().items()}, repr(fresh)
    with pytest.raises(FileError, match=message):
        sc.load(fresh, path)
    assert repr(fresh) == before[1]
    assert all(torch.equal(t, before[0][name]) for name, t in fresh.state_dict().items())


def test_a_file_of_another_model_says_what_differs(saved) -> None:
    _, path = saved
    with pytest.raises(FileError, match=r"layer1\.3\.conv1\.weight is missing.*more.*constructor"):
        sc.load(build_model("resnet32"), path)
    with pytest.raises(
        FileError, match=r"fc\.weight has shape \(10, \d+\), the model's \(5, 64\) cannot shrink to it"
    ):
        sc.load(build_model("resnet20", classes=5), path)
    with pytest.raises(FileError, match=r"is torch\.float32, the model's is torch\.float64"):
        sc.load(network("resnet20").model, path)


def test_a_folder_that_is_not_there(saved, tmp_path) -> None:
    model, _ = saved
    with pytest.raises(FileError, match="could not be written"):
        sc.save(model, tmp_path / "none" / "m.safetensors")


def bypassed(tmp_path: Path, kind: Side = "depthwise") -> Path:
    """A file of a network with a full bypass, some of whose channels are gone."""
    model = build_model("resnet8", in_channels=1)
    place = 1 if kind == "depthwise" else 2  # the first has no padding
    add_bypass_(model, [(f"block1.conv{place}", f"block1.bn{place}")], "full", kind)
    graph = sc.analyze(model, torch.zeros(1, 1, 8, 8))
    masks = [torch.ones(group.units, dtype=torch.bool) for group in graph.groups]
    number = next(n for n, g in enumerate(graph.groups) if g.name == f"block1.conv{place}.conv")
    masks[number][[1, 4, 5]] = False
    sc.save(sc.cut_(model, graph, sc.Plan.of(graph, masks)), tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


@pytest.mark.parametrize("kind", ["depthwise", "pointwise"])
def test_a_bypass_is_rebuilt(kind: Side, tmp_path: Path) -> None:
    file = bypassed(tmp_path, kind)
    torch.manual_seed(5)
    model = sc.load(build_model("resnet8", in_channels=1), file)
    layer = model.block1.conv1 if kind == "depthwise" else model.block1.conv2
    assert layer.side.kernel_size == ((3, 3) if kind == "depthwise" else (1, 1))
    assert layer.index.tolist() == [i for i in range(16) if i not in (1, 4, 5)]
    again = tmp_path / "again.safetensors"
    sc.save(model, again)
    first, second = read_tensors(file), read_tensors(again)
    assert first[1] == second[1]
    assert all(torch.equal(t, second[0][n]) for n, t in first[0].items())
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"block1.conv1": {"norm": "block1.conv2"}}, "followed by Conv2d"),
        ({"block1": {"norm": "block1.bn1"}}, "an ordinary convolution"),
        ({"nowhere": {"norm": "block1.bn1"}}, "an ordinary convolution"),
        ({"block1.conv1": {"norm": "block1.bn1", "side": "deep"}}, "unknown side of a bypass 'deep'"),
        (
            {
                "block1.conv1": {"norm": "block1.bn1", "side": "pointwise"},
                "block1.conv2": {"norm": "block1.bn2"},
            },
            "of several kinds",
        ),
    ],
)
def test_a_hostile_bypass_is_refused(recipe: dict[str, object], message: str, tmp_path: Path) -> None:
    is_refused(bypassed(tmp_path), {"bypasses": recipe}, message)


def is_refused(file: Path, change: dict[str, object], message: str) -> None:
    """A file of a ResNet-8 with another recipe is not loaded, and the model stays as it is."""
    tensors, metadata = read_tensors(file)
    changed = metadata | {"recipe": json.dumps(json.loads(metadata["recipe"]) | change)}
    write_tensors(file.with_name("h.safetensors"), tensors, changed)
    model = build_model("resnet8", in_channels=1)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(FileError, match=message):
        sc.load(model, file.with_name("h.safetensors"))
    assert [name for name, _ in model.named_modules()] == names


def test_a_hostile_index_is_refused(tmp_path: Path) -> None:
    tensors, metadata = read_tensors(bypassed(tmp_path))
    tensors["block1.conv1.index"] = tensors["block1.conv1.index"] + 100
    write_tensors(tmp_path / "h.safetensors", tensors, metadata)
    model = build_model("resnet8", in_channels=1)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(FileError, match="distinct, ascending channels"):
        sc.load(model, tmp_path / "h.safetensors")
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"block1.conv1": {"side": "eats"}}, "unknown side of a stream 'eats'"),
        ({"block1.conv1": {}}, "unknown side of a stream 'None'"),
        ({"block1": {"side": "reads"}}, "a TinyBlock that reads a part"),
        ({"block1.bn1": {"side": "reads"}}, "a BatchNorm2d that reads a part"),
        ({"nowhere": {"side": "reads"}}, "nowhere: no layer of this name"),
        ({"": {"side": "reads"}}, "the model: no layer of this name"),
        ({"block1.conv1": {"side": "writes"}, "block1.conv2": {"side": "reads"}}, "is missing"),
    ],
)
def test_hostile_parts_are_refused(parts: dict[str, object], message: str, tmp_path: Path) -> None:
    sc.save(build_model("resnet8", in_channels=1), tmp_path / "m.safetensors")
    is_refused(tmp_path / "m.safetensors", {"parts": parts}, message)


def test_numbers_below_zero_that_are_named_like_widths_are_left_alone(tmp_path: Path) -> None:
    class Head(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))
            self.head_in_index = -1

    pruned = sc.prune(Head(), torch.randn(2, 3, 6, 6), budget=0.5, method="oneshot")
    pruned.save(tmp_path / "head.safetensors")
    again = sc.load(Head(), tmp_path / "head.safetensors")
    assert again.head_in_index == -1
