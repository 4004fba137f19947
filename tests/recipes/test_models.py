"""The built-in models are the published ones, and bad names and files change nothing."""

import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from secateur.errors import FileError, ModelError, SecateurError
from secateur.recipes.data import Batches, load_data
from secateur.recipes.models import build_model, list_models, load_weights, normalisation_for
from secateur.recipes.models.resnet import PadShortcut

PRUNED_VGG = {"widths": (17, 46, 57, 71, 73, 60, 32, 51, 51, 51, 51, 51, 51)}

# file, model, options, parameters, correct of the first 250 test images and their mean cross-entropy
PUBLISHED = [
    ("resnet20_optA_akamaster", "resnet20", {}, 269_722, 227, 0.3471),
    ("resnet32_optA_akamaster", "resnet32", {}, 464_154, 232, 0.2594),
    ("resnet44_optA_akamaster", "resnet44", {}, 658_586, 229, 0.4124),
    ("resnet56_optA_akamaster", "resnet56", {}, 853_018, 234, 0.3049),
    ("resnet20_optB_chenyaofo", "resnet20_b", {}, 272_474, 231, 0.2586),
    ("resnet56_optB_chenyaofo", "resnet56_b", {}, 855_770, 237, 0.2437),
    ("resnet56_optB_gatedecorator", "resnet56_b", {}, 855_770, 235, 0.2703),
    ("shufflenetv2_x0_5_chenyaofo", "shufflenet_v2_x0_5_cifar", {}, 352_042, 225, 0.3574),
    ("resnet8_mlperftiny", "resnet8", {}, 78_186, 224, 0.3399),
    ("vgg16bn_pruned0.3M_gatedecorator", "vgg16_bn_cifar", PRUNED_VGG, 305_104, 229, 0.2705),
    ("densenetbc100k12_TESTTUNED_c10h", "densenet_bc_100", {}, 769_162, 236, 0.2296),
]


def weights_file(shared_data: Path, name: str) -> Path:
    return shared_data / "weights" / f"cifar10_{name}.safetensors"


def answers(
    model: nn.Module, path: Path, shared_data: Path, images: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of the first test images, normalised as the weights want it."""
    data = load_data("cifar10", shared_data, normalisation=normalisation_for(path))
    batches = Batches(
        data.test.take(torch.arange(images)),
        batch_size=250,
        normalisation=data.normalisation,
        channels_last=True,
    )
    model.eval()
    with torch.inference_mode():
        logits, labels = zip(*((model(x), y) for x, y in batches), strict=True)
    return torch.cat(logits), torch.cat(labels)


@pytest.mark.parametrize(("file", "name", "options", "parameters"), [row[:4] for row in PUBLISHED])
def test_published_weights_load_strictly(shared_data, file, name, options, parameters):
    model = build_model(name, **options)
    info = load_weights(model, weights_file(shared_data, file))
    assert info is not None
    assert info.normalisation == normalisation_for(weights_file(shared_data, file))
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.slow
@pytest.mark.parametrize(("file", "name", "options", "parameters", "correct", "loss"), PUBLISHED)
def test_published_weights_answer_as_expected(shared_data, file, name, options, parameters, correct, loss):
    path = weights_file(shared_data, file)
    model = build_model(name, **options)
    load_weights(model, path)
    logits, labels = answers(model, path, shared_data, images=250)
    right = int((logits.argmax(1) == labels).sum())
    assert abs(right - correct) <= 1  # another processor may round one image to the other side
    assert float(nn.functional.cross_entropy(logits, labels)) == pytest.approx(loss, abs=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "name", "accuracy"),
    [("resnet20_optA_akamaster", "resnet20", 0.9173), ("resnet8_mlperftiny", "resnet8", 0.8719)],
)
def test_accuracy_on_the_whole_test_set_is_the_published_one(shared_data, file, name, accuracy):
    path = weights_file(shared_data, file)
    model = build_model(name)
    load_weights(model, path)
    logits, labels = answers(model, path, shared_data, images=10_000)
    assert abs(int((logits.argmax(1) == labels).sum()) - round(accuracy * 10_000)) <= 1


@pytest.mark.parametrize("name", list_models())
def test_every_built_in_model_runs_with_any_classes_and_channels(name):
    model = build_model(name, classes=7, in_channels=1).eval()
    with torch.inference_mode():
        assert model(torch.rand(2, 1, 32, 32)).shape == (2, 7)


def test_depth_is_in_the_name():
    for depth in (20, 32, 44, 56, 110):
        convolutions = [m for m in build_model(f"resnet{depth}").modules() if isinstance(m, nn.Conv2d)]
        assert len(convolutions) == depth - 1  # and one linear layer


def test_pad_shortcut_is_subsampling_between_zeros():
    x = torch.rand(2, 3, 8, 8)
    y = PadShortcut(1, 2)(x)
    assert torch.equal(y[:, 1:4], x[:, :, ::2, ::2])
    assert not y[:, [0, 4, 5]].any()


@pytest.mark.parametrize("name", list_models())
def test_forwards_never_count_channels(name):
    """A model whose every layer is cut to half its channels still runs."""
    model = build_model(name, in_channels=4).eval()
    for layer in model.modules():
        halve_(layer)
    with torch.inference_mode():
        assert model(torch.rand(1, 2, 32, 32)).shape == (1, 5)


def halve_(layer: nn.Module) -> None:
    """Keep the first half of a layer's input and output channels."""
    for tensor in [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]:
        if tensor.dim() > 0:
            kept = tensor.data[: len(tensor) // 2]
            if tensor.dim() > 1 and tensor.shape[1] > 1:  # a depthwise convolution has one input per output
                kept = kept[:, : tensor.shape[1] // 2]
            tensor.data = kept
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        layer.groups //= 2
    if isinstance(layer, PadShortcut):
        layer.before, layer.after = layer.before // 2, layer.after // 2


def test_bare_names_reach_torchvision_and_prefixes_choose():
    pytest.importorskip("torchvision")
    pytest.importorskip("timm")
    assert type(build_model("mobilenet_v2", classes=5)).__module__.startswith("torchvision")
    assert type(build_model("resnet18")).__module__.startswith("torchvision")
    assert type(build_model("timm/resnet18", classes=5, in_channels=1)).__module__.startswith("timm")
    assert type(build_model("resnet10t")).__module__.startswith("timm")


def test_names_of_a_users_module(tmp_path, monkeypatch):
    (tmp_path / "my_nets.py").write_text(
        "import torch\n"
        "def plain(): return torch.nn.Linear(2, 3)\n"
        "def sized(classes, depth=1): return torch.nn.Linear(depth, classes)\n"
        "def wrong(): return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    path_before = list(sys.path)
    assert build_model("my_nets:plain", classes=9).out_features == 3
    assert build_model("my_nets:sized", classes=9, depth=4).in_features == 4
    for name in ("my_nets:wrong", "my_nets:absent", "my_nets:sized", "not_a_module_here:f", ":f", "my_nets:"):
        with pytest.raises(ModelError, match=re.escape(f"model {name!r}")):
            build_model(name)
    assert sys.path == path_before


def test_unknown_names_list_the_choices_and_what_is_close():
    pytest.importorskip("torchvision")
    with pytest.raises(ModelError, match=r"resnet20.*torchvision/resnet18"):
        build_model("resnt18")
    with pytest.raises(ModelError, match="unknown shortcut 'C'; choose one of: A, B"):
        build_model("resnet20", shortcut="C")
    with pytest.raises(ModelError, match=r"unknown model .torchvision/resnet18\.tag"):
        build_model("torchvision/resnet18.tag")
    with pytest.raises(ModelError, match=r"timm/resnet18\.tag"):
        build_model("timm/resnet18.tag")
    with pytest.raises(ModelError, match="unknown model 'elsewhere/resnet18'"):
        build_model("elsewhere/resnet18")


@pytest.mark.parametrize("name", ["resnet20", "torchvision/resnet18", "timm/resnet18"])
def test_unknown_options_are_named(name):
    pytest.importorskip("torchvision")
    with pytest.raises(ModelError, match="nonsense"):
        build_model(name, nonsense=1)


def test_torchvision_takes_three_channels():
    pytest.importorskip("torchvision")
    with pytest.raises(ModelError, match="3 input channels, not 1"):
        build_model("resnet18", in_channels=1)


def test_missing_libraries_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "timm", None)
    for name in ("resnet18", "torchvision/resnet18", "timm/resnet18"):
        with pytest.raises(ModelError, match=r"torchvision and timm, pip install 'secateur\[vision\]'"):
            build_model(name)


@pytest.fixture
def good(tmp_path) -> Path:
    """A whole weights file of a small ResNet."""
    save_file(small().state_dict(), tmp_path / "good.safetensors")
    return tmp_path / "good.safetensors"


def small() -> nn.Module:
    return build_model("resnet20", widths=(2, 4, 6))


def test_loading_gives_the_saved_weights_under_other_names(tmp_path):
    saved = build_model("resnet20_b", widths=(2, 4, 6))
    renames: list[Callable[[str], str]] = [
        lambda name: name,
        lambda name: name.replace("shortcut.", "downsample."),
        lambda name: "module." + name.replace("fc.", "linear."),
    ]
    for rename in renames:
        tensors = {rename(k): v for k, v in saved.state_dict().items() if "num_batches" not in k}
        save_file(tensors, tmp_path / "renamed.safetensors")
        model = build_model("resnet20_b", widths=(2, 4, 6))
        assert load_weights(model, tmp_path / "renamed.safetensors") is None
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in saved.state_dict().items())


def changed(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    state = small().state_dict() | {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        (changed(fc__bias=torch.zeros(11)), ModelError, r"1 of other shape.*fc.bias \(10,\) \(11,\)"),
        (changed(fc__bias=None), ModelError, r"1 in the model only: fc.bias"),
        (changed(extra=torch.zeros(1)), ModelError, r"1 in the file only: extra"),
        (changed(fc__bias=torch.zeros(10, dtype=torch.int8)), ModelError, r"other kind.*torch.int8"),
        (changed(linear__bias=torch.zeros(10)), ModelError, r"mean the same weight"),
        (changed(fc__bias=torch.full((10,), torch.nan)), FileError, r"NaN values in fc.bias"),
        (changed(fc__weight=torch.full((10, 6), torch.inf)), FileError, r"infinite"),
    ],
    ids=["shape", "missing", "unexpected", "integers", "doubled", "nan", "infinite"],
)
def test_weights_that_do_not_fit_leave_the_model_alone(tmp_path, tensors, error, message):
    save_file(tensors, tmp_path / "bad.safetensors")
    refused(tmp_path / "bad.safetensors", error, message)


def test_unreadable_files_leave_the_model_alone(tmp_path, good):
    content = good.read_bytes()
    for name, damaged in {
        "short": content[:-8],
        "header_only": content[:8],
        "empty": b"",
        "huge_header": struct.pack("<Q", 2**62) + content[8:],
        "text": b"these are no weights at all",
    }.items():
        (tmp_path / f"{name}.safetensors").write_bytes(damaged)
        refused(tmp_path / f"{name}.safetensors", FileError, name)
    refused(tmp_path / "absent.safetensors", FileError, "no such file")
    with pytest.raises(FileError, match="absent"):
        normalisation_for(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th", ".safetensors"])
def test_pickled_weights_are_refused_unread(tmp_path, suffix):
    path = tmp_path / f"pickled{suffix}"
    torch.save(small().state_dict(), path)
    refused(path, FileError, "not a readable safetensors" if suffix == ".safetensors" else "can run code")


def refused(path: Path, error: type[SecateurError], message: str) -> None:
    model = small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=message):
        load_weights(model, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_long_lists_of_differences_are_counted(good):
    with pytest.raises(ModelError, match=r"\d+ in the model only: .*, .*, .* and \d+ more"):
        load_weights(build_model("resnet32", widths=(2, 4, 6)), good)


def test_weights_take_the_models_precision_and_stay_unpublished(good):
    model = small().double()
    assert load_weights(model, good) is None
    assert normalisation_for(good) is None
    assert next(model.parameters()).dtype == torch.float64
