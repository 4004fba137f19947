import contextlib
import html
import io
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.distributed.run import main as torchrun

from secateur.cli import main
from secateur.files import read_tensors
from secateur.recipes.models import build_model
from tests.processes import command_line, start

pytestmark = pytest.mark.xdist_group("command line")  # one process makes the runs that tests read

COMMANDS = ("demo", "prune", "compare", "train", "inspect", "eval", "export", "methods", "doctor")
DIGITS = ["--model", "resnet8", "--data", "digits", "--image-size", "8"]
WHOLE = ["prune", *DIGITS, "--keep-macs", "0.5"]
PRUNE = [*WHOLE, "--no-progress", "--no-exports"]
FEW = ["--train-images", "600", "--calibration-images", "64"]


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


Run = Callable[..., Ended]


def call_here(*arguments: object) -> Ended:
    """The command line in this process: arguments in; exit code and output out."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["secateur", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
    assert exit_.value.code is None or isinstance(exit_.value.code, int)
    return Ended(exit_.value.code or 0, out.getvalue(), err.getvalue())


@pytest.fixture
def run() -> Run:
    return call_here


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    """One thread, so that runs in this process and in others add in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of `secateur train`."""
    folder = tmp_path_factory.mktemp("trained") / "new" / "run"
    ended = call_here(
        "train", *DIGITS, "--epochs", 4, "--train-images", 600, "--batch-size", 32, "--out", folder
    )
    assert ended.code == 0, ended.err
    accuracy = re.search(r"Accuracy: ([\d.]+) %", ended.out)
    assert accuracy is not None
    assert float(accuracy[1]) > 80
    assert f"Weights: {folder / 'model.safetensors'}" in ended.out
    assert "Training: 4 × 600 images" in ended.err
    return folder


@pytest.fixture(scope="module")
def pruned(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of `secateur prune`, from the trained weights."""
    folder = tmp_path_factory.mktemp("pruned") / "run"
    weights = trained / "model.safetensors"
    ended = call_here(
        *(*WHOLE, "--weights", weights, *FEW, "--option", "levels=4"),
        *("--epochs", 2, "--out", folder),
    )
    assert ended.code == 0, ended.err
    for word in ("accuracy, in the end", "MACs", "parameters", "latency, PyTorch", "Verified", "Report:"):
        assert word in ended.out
    assert "Traceback" not in ended.err
    assert "Warning" not in ended.err
    return folder


def report_of(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


# ---- what a run leaves


def test_a_run_writes_one_folder(pruned: Path) -> None:
    assert {path.name for path in pruned.iterdir()} == {
        "config.json",
        "cut.safetensors",
        "finetune.checkpoint.safetensors",
        "metrics.jsonl",
        "model.onnx",
        "model.pt2",
        "model.safetensors",
        "plan.json",
        "progress.json",
        "report.html",
        "report.json",
        "tensorboard",
    }


def test_the_report_tells_everything(pruned: Path, trained: Path) -> None:
    report = report_of(pruned)
    assert 0.45 < report["after"]["macs"] / report["before"]["macs"] <= 0.5
    assert report["after"]["params"] < report["before"]["params"]
    assert report["accuracy_before"] > 0.8
    assert report["accuracy_after"] >= report["accuracy_cut"]
    assert report["verify_max_abs_error"] < 1e-10
    for key in ("latency_ms_before", "latency_ms_after", "onnx_bytes_before", "weights_bytes_after"):
        assert report[key] > 0
    assert report["latency_onnxruntime"]["after"]["runtime"] == "onnxruntime"
    assert report["latency_pytorch"]["before"]["batch"] == 1
    assert {k: report["widths"][0][k] for k in ("layer", "before")} == {"layer": "conv1", "before": 16}
    assert all(width["after"] <= width["before"] for width in report["widths"])
    assert any(width["after"] < width["before"] for width in report["widths"])
    assert all(len(group["scores"]) == group["units"] == len(group["mask"]) for group in report["groups"])
    assert [row["name"] for row in report["frozen"]] == ["fc"]
    assert report["frozen"][0]["params"] == 650
    assert [line["phase"] for line in report["history"]] == ["finetune", "finetune"]
    assert report["command"].startswith("secateur prune --model resnet8 --data digits")
    assert report["versions"]["torch"] == torch.__version__
    assert not any("random" in note for note in report["notes"])


def test_the_configuration_holds_every_option(pruned: Path, trained: Path) -> None:
    config = json.loads((pruned / "config.json").read_text())
    assert config["kind"] == "prune"
    assert config["settings"]["task"]["weights"] == str(trained / "model.safetensors")
    assert config["settings"]["finetune"]["epochs"] == 2
    assert config["settings"]["method"] == "auto"
    assert config["input_shape"] == [1, 8, 8]


def test_eval_of_the_saved_model_equals_the_report(pruned: Path, run: Run) -> None:
    report = report_of(pruned)
    weights = pruned / "model.safetensors"
    for arguments in (("eval", *DIGITS, "--weights", weights), ("eval", "--run", pruned)):
        assert json.loads(run(*arguments, "--json").out)["accuracy"] == report["accuracy_after"]


def test_eval_of_original_weights(trained: Path, pruned: Path, run: Run) -> None:
    ended = run("eval", *DIGITS, "--weights", trained / "model.safetensors")
    assert f"{100 * report_of(pruned)['accuracy_before']:.2f} % of 359 images" in ended.out


def test_export_of_a_run(pruned: Path, tmp_path: Path, run: Run) -> None:
    ended = run("export", "--run", pruned)
    assert ended.code == 2
    assert "--overwrite" in ended.err
    ended = run(
        *("export", "--run", pruned, "--out", tmp_path / "files", "--python", "--int8"),
        *("--calibration-images", 50),
    )
    assert ended.code == 0, ended.err
    assert {path.name for path in (tmp_path / "files").iterdir()} == {
        *("model.onnx", "model.pt2", "model-int8.onnx", "model.py", "model.weights.safetensors")
    }
    assert ended.out.count("any") == 3
    assert "ranges from 50 training images, the same answer to" in ended.out
    program = torch.export.load(tmp_path / "files" / "model.pt2").module()
    assert program(torch.zeros(3, 1, 8, 8)).shape == (3, 10)


def test_export_of_a_model(pruned: Path, tmp_path: Path, run: Run) -> None:
    weights = pruned / "model.safetensors"
    ended = run(
        *("export", "--model", "resnet8", "--weights", weights, "--channels", 1, "--image-size", 16),
        *("--classes", 10, "--out", tmp_path),
    )
    assert ended.code == 0, ended.err
    assert (tmp_path / "model.onnx").stat().st_size < (pruned / "model.safetensors").stat().st_size * 1.5


# ---- other models and data


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes, black and white, in colour."""
    for label, name in enumerate(("black", "white")):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for i in range(10):
            pixels = np.full((32, 32, 3), 200 * label + i, np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "images"


def test_a_torchvision_model_on_a_folder_of_images(images: Path, tmp_path: Path, run: Run) -> None:
    pytest.importorskip("torchvision")
    out = tmp_path / "run"
    ended = run(
        *("prune", "--model", "torchvision/squeezenet1_1", "--data", "imagefolder", "--data-dir", images),
        *("--image-size", 32, "--sparsity", 0.9, "--no-progress", "--no-exports", "--out", out),
    )
    assert ended.code == 0, ended.err
    report = report_of(out)
    assert report["accuracy_cut"] == report["accuracy_after"]
    assert report["budget"] == {"units": 0.1}
    assert any("initialised at random" in note for note in report["notes"])
    assert any("not fine-tuned" in note for note in report["notes"])
    assert sum(g["kept"] for g in report["groups"]) <= 0.1 * sum(g["units"] for g in report["groups"])


USER_MODEL = """
from torch import nn

def tiny(classes, in_channels, width=12):
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes),
    )
"""


def test_a_model_of_ones_own(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_models.py").write_text(USER_MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    ended = run(
        *(
            "prune",
            "--model",
            "my_models:tiny",
            "--data",
            "digits",
            "--keep-params",
            0.6,
            "--option",
            "score=taylor",
        ),
        *(
            "--freeze",
            "0",
            "--option",
            "round_to=2",
            "--epochs",
            1,
            "--distill",
            0.5,
            "--no-progress",
            "--no-exports",
        ),
        *("--out", "run"),
    )
    assert ended.code == 0, ended.err
    report = report_of(tmp_path / "run")
    assert report["after"]["params"] <= 0.6 * report["before"]["params"]
    assert any("frozen by the user" in row["reason"] for row in report["frozen"])
    assert any("taught" in note for note in report["notes"])
    assert all(group["kept"] % 2 == 0 for group in report["groups"])
    assert json.loads(run("eval", "--run", "run", "--json").out)["accuracy"] == report["accuracy_after"]


# ---- looking


def test_inspect_says_what_can_go(run: Run) -> None:
    found = json.loads(run("inspect", "--model", "resnet20", "--json").out)
    assert found["macs"] == 40_551_040
    assert found["params"] == 269_722
    assert [group["units"] for group in found["groups"]][:2] == [16, 16]
    assert found["frozen"] == [{"name": "fc", "units": 10, "reason": "model output"}]
    assert found["reachable"]["units"]["least"] == len(found["groups"])
    table = run("inspect", "--model", "resnet20", "--freeze", "layer1.*")
    assert table.code == 0
    for word in ("layer2.0.conv1", "frozen by the user", "--keep-macs", "Within reach"):
        assert word in table.out


def test_inspect_shows_blocks(run: Run) -> None:
    found = json.loads(run("inspect", "--model", "resnet8", "--granularity", "both", "--json").out)
    block = next(group for group in found["groups"] if group["name"] == "block2 (block)")
    assert (block["units"], block["layers"]) == (
        1,
        [f"block2.{part}" for part in ("bn1", "bn2", "conv1", "conv2")],
    )
    assert block["macs"] == 16 * 16 * 9 * (16 * 32 + 32 * 32)  # without its projection, which stays
    assert "block2.conv1" in {group["name"] for group in found["groups"]}


def test_inspect_shows_layers_and_writes_a_page(tmp_path: Path, run: Run) -> None:
    page = tmp_path / "network.html"
    arguments = ("inspect", "--model", "resnet8", "--layers")
    found = json.loads(run(*arguments, "--json", "--html", page).out)
    layers = {layer["name"]: layer for layer in found["layers"]}
    assert sum(layer["macs"] for layer in layers.values()) == found["macs"]
    assert all(layer["ms"] > 0 for layer in layers.values())
    assert (layers["conv1"]["channels"], layers["conv1"]["group"], layers["fc"]["group"]) == (
        16,
        "conv1",
        None,
    )
    assert layers["fc"]["frozen"] == "model output"
    html = page.read_text(encoding="utf-8")
    assert "block1.conv2: 16 channels, prunable with conv1" in html
    assert "fc: 10 channels, stays: model output" in html
    assert "http" not in html.replace("http-equiv", "")
    table = run(*arguments).out
    assert "BatchNorm2d" in table
    assert "BatchNorm2d" not in run(*arguments[:-1]).out


def test_inspect_of_a_pruned_model(pruned: Path, run: Run) -> None:
    weights = pruned / "model.safetensors"
    arguments = ("--weights", weights, "--channels", 1, "--image-size", 8, "--json")
    assert (
        json.loads(run("inspect", "--model", "resnet8", *arguments).out)["macs"]
        == report_of(pruned)["after"]["macs"]
    )


def test_methods_lists_every_choice(run: Run) -> None:
    out = run("methods").out
    for word in ("oneshot", "taylor", "bn-scale", "global", "uniform", "synflow", "resnet56_b", "cifar10"):
        assert word in out


def test_methods_tells_options_with_defaults_and_ranges(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")

    def row(method: str, option: str) -> str:
        return next(line for line in run("methods", method).out.splitlines() if line.split()[1:2] == [option])

    assert "full" in row("lapp", "bypass")
    assert "one of full, shared, none" in row("lapp", "bypass")
    assert "optimal" in row("precrop", "densities")
    assert "a whole number, at least 2" in row("rd", "levels")
    assert "unknown method 'magic'" in run("methods", "magic").err


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_fits_the_window(command: str, columns: int, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    ended = run(*command.split(), "--help")
    assert ended.code == 0
    assert max(len(line) for line in ended.out.splitlines()) <= columns
    assert "…" not in ended.out.replace("secateur.cli train …", "")
    for name in COMMANDS if not command else ():
        assert name in ended.out


def test_doctor_knows_the_machine(run: Run) -> None:
    found = json.loads(run("doctor", "--json").out)
    assert found["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert f"{os.cpu_count()} cores" in found["CPU"]
    table = run("doctor").out
    assert all(name in table for name in found)


def test_the_report_as_json(tmp_path: Path, run: Run) -> None:
    prune = (*PRUNE[:-2], "--no-exports", "--method", "oneshot", *FEW, "--out", tmp_path / "run")
    ended = run(*prune, "--json")
    assert json.loads(ended.out) == report_of(tmp_path / "run")
    quiet = run(*prune, "--overwrite", "--quiet")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")
    assert "Choosing what to remove" in ended.err


def test_the_report_says_where_the_time_goes_and_whose_answers_changed(pruned: Path) -> None:
    report, model = report_of(pruned), build_model("resnet8", classes=10, in_channels=1)
    named = {row["layer"]: row for row in report["layers"]}
    assert sum(row["macs_before"] or 0 for row in report["layers"]) == report["before"]["macs"]
    assert sum(row["macs_after"] or 0 for row in report["layers"]) == report["after"]["macs"]
    layers = [name for name, one in model.named_modules() if isinstance(one, nn.Conv2d | nn.Linear)]
    assert set(layers) == {name for name, row in named.items() if row["macs_before"]}
    assert "BatchNorm2d (7×)" in named
    assert all(row["ms_before"] > 0 and row["ms_after"] > 0 for row in report["layers"])
    images = sum(one["images"] for one in report["classes"])
    assert sum(report["answers"].values()) == images
    for when in ("before", "after"):
        right = sum(one["images"] * one[when] for one in report["classes"])
        assert right / images == pytest.approx(report[f"accuracy_{when}"])
        bins = report["calibration"][when]["bins"]
        assert sum(one["images"] * one["accuracy"] for one in bins) == pytest.approx(right)
    lost, won = report["answers"]["lost"], report["answers"]["won"]
    assert (won - lost) / images == pytest.approx(report["accuracy_after"] - report["accuracy_before"])
    assert len(report["changed"]) == min(8, lost + won)
    assert {file["name"] for file in report["files"]} >= {"model.safetensors", "model.onnx", "plan.json"}


def test_the_command_on_the_page_does_the_same_again(tmp_path: Path, run: Run) -> None:
    first = tmp_path / "a run"
    words = (*PRUNE[:-2], "--no-exports", "--method", "oneshot", *FEW, "--out", first)
    assert run(*words).code == 0
    page = re.search("<pre[^>]*Command[^>]*>(.*?)</pre>", (first / "report.html").read_text())
    assert page
    command = html.unescape(re.sub("<[^>]*>", "", page[1]))
    assert run(*shlex.split(command)[1:]).code == 0
    again = tmp_path / "a run-again"
    assert (again / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()


def test_the_report_says_how_to_load_the_model(pruned: Path) -> None:
    space: dict[str, Any] = {}
    exec("\n".join(report_of(pruned)["loading"]), space)
    saved, _ = read_tensors(pruned / "model.safetensors")
    assert {n: t.shape for n, t in space["model"].state_dict().items()} == {
        n: t.shape for n, t in saved.items()
    }


def test_what_nothing_foresaw_is_called_a_fault(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.py").write_text("def broken(model, inputs, budget): return 1 / 0\n")
    words = (*PRUNE, "--method", tmp_path / "broken.py:broken", "--out", tmp_path / "run")
    ended = run(*words)
    assert ended.code == 70
    assert "ZeroDivisionError" in ended.err
    assert "broken.py, line 1" in ended.err
    assert "SECATEUR_DEBUG=1" in ended.err
    monkeypatch.setenv("SECATEUR_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        run(*words)


def test_version(run: Run) -> None:
    assert run("--version").out.startswith("secateur ")


# ---- mistakes


def nothing(tmp_path: Path) -> list[object]:
    return []


def wrong_shape(tmp_path: Path) -> list[object]:
    from safetensors.torch import save_file

    save_file({"conv1.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    return ["--weights", tmp_path / "other.safetensors"]


def truncated(tmp_path: Path) -> list[object]:
    (tmp_path / "half.safetensors").write_bytes(b"\x40\x00\x00\x00\x00\x00\x00\x00{")
    return ["--weights", tmp_path / "half.safetensors"]


def pickled(tmp_path: Path) -> list[object]:
    torch.save({}, tmp_path / "weights.pth")
    return ["--weights", tmp_path / "weights.pth"]


def broken_image(tmp_path: Path) -> list[object]:
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "1.png").write_bytes(b"\x89PNG")
    return ["--data", "imagefolder", "--data-dir", tmp_path / "images"]


def missing_data(tmp_path: Path) -> list[object]:
    return ["--data", "cifar10", "--data-dir", tmp_path]


def uncapturable(tmp_path: Path) -> list[object]:
    (tmp_path / "odd_models.py").write_text(
        "from torch import nn\n"
        "class Odd(nn.Conv2d):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x if x.sum() > 0 else -x).mean((2, 3))\n"
        "def odd(): return Odd(1, 10, 3)\n"
    )
    return ["--model", "odd_models:odd"]


MISTAKES: list[tuple[str, list[str], Callable[[Path], list[object]], str]] = [
    ("model", ["--model", "resnet99"], nothing, "unknown model 'resnet99'; choose one of: .*resnet20"),
    ("module", ["--model", "no_such_module:f"], nothing, "cannot import 'no_such_module'"),
    ("score", ["--option", "score=l7"], nothing, "score is 'l7'; expected one of l1, l2.*taylor"),
    ("allocation", ["--option", "allocation=fair"], nothing, "allocation is 'fair'; expected one of global"),
    (
        "method",
        ["--method", "magic"],
        nothing,
        "unknown method 'magic'; choose one of: at-init, auto, depgraph",
    ),
    (
        "option",
        ["--method", "lapp", "--option", "bypas=none"],
        nothing,
        "unknown option 'bypas'; choose one of: byp",
    ),
    ("no value", ["--option", "score"], nothing, "expected NAME=VALUE"),
    ("recipe", ["no.toml"], nothing, "no.toml: cannot be read as a recipe"),
    ("data", ["--data", "mnist"], nothing, "unknown data set 'mnist'; choose one of: cifar10, digits"),
    ("data folder", ["--data-dir", "/no/such"], nothing, "/no/such: no such folder"),
    ("data files", [], missing_data, "found neither cifar10_train_labels.npy"),
    ("image", [], broken_image, "cannot be read as an image"),
    ("weights", ["--weights", "/no/such"], nothing, "/no/such: no such file"),
    ("weights of another model", [], wrong_shape, "do not fit the model"),
    ("truncated weights", [], truncated, "not a readable safetensors file"),
    ("pickle", [], pickled, "pickled weights can run code"),
    ("keep 0", ["--keep-macs", "0"], nothing, "budget macs 0: expected a share above 0 and below 1"),
    ("keep 1", ["--keep-macs", "1"], nothing, "budget macs 1: expected a share above 0 and below 1"),
    ("keep -1", ["--keep-macs", "-1"], nothing, "budget macs -1: expected a share above 0"),
    ("keep 2", ["--keep-params", "2"], nothing, "budget params 2: expected a share above 0"),
    ("keep nan", ["--keep-params", "nan"], nothing, "budget params nan: expected a share above 0"),
    (
        "keep too little",
        ["--keep-macs", "0.001"],
        nothing,
        r"budget macs 0.001: .* at least 0\.\d+, below 1\. Within reach",
    ),
    ("sparsity 0", ["--sparsity", "0"], nothing, "sparsity 0: expected a share above 0"),
    ("sparsity 1", ["--sparsity", "1"], nothing, "sparsity 1: expected a share above 0 and below 1"),
    ("frozen", ["--freeze", "*"], nothing, "nothing can be pruned"),
    ("freeze", ["--freeze", "layer9"], nothing, "'layer9' matches no module; the model has conv1"),
    ("no number", ["--keep-macs", "half"], nothing, "Invalid value for '--keep-macs'"),
    ("learning rate", ["--epochs", "1", "--lr", "-1"], nothing, "lr is -1.0; expected a number above 0"),
    (
        "schedule",
        ["--epochs", "1", "--schedule", "sine"],
        nothing,
        "schedule is 'sine'; expected one of cosine",
    ),
    ("distill", ["--epochs", "1", "--distill", "2"], nothing, "distill_weight is 2.0"),
    ("normalise", ["--normalize", "0.5"], nothing, "normalisation '0.5': expected one mean and one std"),
    ("channels", ["--normalize", "imagenet"], nothing, "normalisation of .3. channels, images of .1."),
    ("image size", ["--image-size", "1"], nothing, "does not run on images .2, 1, 1, 1.: "),
    ("too many images", ["--train-images", "9999"], nothing, "cannot take 9999 of 1438"),
    ("both", ["--resume", "--overwrite"], nothing, "exclude each other"),
    ("control flow", [], uncapturable, "graph cannot be captured"),
    ("output", ["--out", "/proc/nothing/here"], nothing, "/proc/nothing/here: could not be written"),
]


@pytest.mark.parametrize(
    ("what", "arguments", "prepare", "words"), MISTAKES, ids=[mistake[0] for mistake in MISTAKES]
)
def test_mistakes_end_with_one_message(
    what: str,
    arguments: list[str],
    prepare: Callable[[Path], list[object]],
    words: str,
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "run"
    digits = ("--model", "resnet8", "--data", "digits", "--keep-macs", "0.5", "--no-progress")
    ended = run("prune", *digits, "--out", out, *prepare(tmp_path), *arguments)
    assert ended.code == 2
    assert ended.out == ""
    assert re.search(words, ended.err.replace("\n", " ")), ended.err
    assert "Traceback" not in ended.err
    assert not out.exists()


def test_no_budget(tmp_path: Path, run: Run) -> None:
    ended = run("prune", *DIGITS, "--out", tmp_path / "run")
    assert ended.code == 2
    assert "keep-macs" in ended.err
    assert not (tmp_path / "run").exists()


def test_mistakes_of_the_other_commands(tmp_path: Path, run: Run) -> None:
    for arguments, words in (
        (("eval", "--run", tmp_path), "config.json: no such file. Name the folder of a run."),
        (("eval", "--model", "resnet8"), "--weights and --data, or --run"),
        (("eval", "--run", tmp_path, "--data", "digits"), "takes the place of"),
        (("export",), "give --run, or --model"),
        (("export", "--model", "resnet8"), "give --out"),
        (("export", "--model", "resnet8", "--out", tmp_path / "x", "--int8"), "give --data"),
        (("export", "--model", "resnet99", "--out", tmp_path / "x"), "unknown model"),
        (("export", "--run", tmp_path, "--weights", "x"), "has weights of its own"),
        (("inspect", "--model", "resnet99"), "unknown model"),
        (("train", *DIGITS, "--epochs", 0, "--out", tmp_path / "x"), "epochs is 0"),
        (("train", *DIGITS, "--optimizer", "lion", "--out", tmp_path / "x"), "expected one of sgd, adamw"),
        (("prune", "--out", tmp_path / "x"), "no model: give --model"),
        (("cut",), "No such command"),
    ):
        ended = run(*arguments)
        assert ended.code == 2, arguments
        assert words in " ".join(re.sub("[│╭╰─╮╯]", " ", ended.err).split()), ended.err
        assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", '{"kind": "prune"}', '{"settings": {"task": {"model": 3}}}', "[" * 100_000, "\x00"],
)
def test_a_damaged_configuration_is_refused(content: str, tmp_path: Path, run: Run) -> None:
    (tmp_path / "config.json").write_text(content)
    for arguments in (
        ("eval", "--run", tmp_path),
        ("export", "--run", tmp_path),
        (*PRUNE, "--out", tmp_path, "--resume"),
    ):
        ended = run(*arguments)
        assert ended.code == 2
        assert "config.json" in ended.err
    assert (tmp_path / "config.json").read_text() == content


def test_the_traceback_is_there_for_those_who_want_it(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from secateur import SecateurError

    monkeypatch.setenv("SECATEUR_DEBUG", "1")
    monkeypatch.setattr(
        sys, "argv", ["secateur", *PRUNE, "--option", "score=l7", "--out", str(tmp_path / "run")]
    )
    with pytest.raises(SecateurError, match="score is 'l7'"):
        main()


# ---- the folder


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_second_run_is_refused_before_any_work(pruned: Path, run: Run) -> None:
    before = snapshot(pruned)
    ended = run(*PRUNE, "--out", pruned)
    assert ended.code == 2
    assert "holds a run already. Continue it with --resume, replace it with --overwrite" in ended.err
    ended = run(*PRUNE, *FEW, "--method", "oneshot", "--out", pruned, "--resume")
    assert ended.code == 2
    assert "method was auto, is now oneshot" in ended.err
    assert "finetune was given, is now not given" in ended.err
    ended = run("train", *DIGITS, "--out", pruned, "--resume")
    assert "holds a run of `prune`, not of `train`" in ended.err
    assert snapshot(pruned) == before


def test_overwrite_replaces_a_run_and_nothing_else(tmp_path: Path, run: Run) -> None:
    out = tmp_path / "run"
    assert run(*PRUNE, "--epochs", 1, "--train-images", 100, "--out", out).code == 0
    assert report_of(out)["method"] == "precrop"  # what auto takes for fresh weights that are to be trained
    assert json.loads((out / "config.json").read_text())["settings"]["finetune"]["lr"] == 0.1
    first = snapshot(out)
    (out / "notes.txt").write_text("mine")
    (out / "tensorboard" / "mine").mkdir()
    for words in ("notes.txt", "tensorboard/mine"):
        ended = run(*PRUNE, "--out", out, "--overwrite")
        assert ended.code == 2
        assert words in ended.err
        (out / "notes.txt").unlink(missing_ok=True)
    (out / "tensorboard" / "mine").rmdir()
    assert snapshot(out) == first
    assert run(*PRUNE, "--keep-macs", "0.7", "--out", out, "--overwrite").code == 0
    assert report_of(out)["history"] == []
    assert not (out / "tensorboard").exists()
    assert 0.6 < report_of(out)["after"]["macs"] / report_of(out)["before"]["macs"] <= 0.7


def assert_same_tensors(a: Path, b: Path) -> None:
    """Names, values and metadata; their order in the file is the writing library's affair."""
    ours, theirs = read_tensors(a), read_tensors(b)
    assert ours[1] == theirs[1]
    assert ours[0].keys() == theirs[0].keys()
    for name, tensor in ours[0].items():
        assert torch.equal(tensor, theirs[0][name]), name


def test_killed_and_resumed_equals_uninterrupted(trained: Path, tmp_path: Path, run: Run) -> None:
    weights = trained / "model.safetensors"
    arguments = [
        *(*PRUNE, "--weights", weights, "--epochs", 6, "--train-images", 200, "--batch-size", 8),
        *("--option", "score=taylor", "--calibration-images", 100, "--checkpoint-every", 4),
    ]
    killed = tmp_path / "killed"
    work = start(tmp_path / "printed", command_line, *arguments, "--out", killed)
    metrics, deadline = killed / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 2:
        assert work.process.is_alive(), work.err
        assert time.monotonic() < deadline
        time.sleep(0.01)
    work.process.kill()
    work.end()
    assert not (killed / "model.safetensors").exists()
    done = metrics.read_text().splitlines()
    assert len(done) < 6
    accuracy = json.loads((killed / "progress.json").read_text())["accuracy of the cut model"]

    assert run(*arguments, "--out", killed, "--resume").code == 0
    redone = len(done) - 1  # the last line may be younger than the last checkpoint
    assert metrics.read_text().splitlines()[:redone] == done[:redone]  # the times show what was kept
    whole = tmp_path / "whole"
    assert run(*arguments, "--out", whole).code == 0
    assert_same_tensors(killed / "model.safetensors", whole / "model.safetensors")
    assert (killed / "plan.json").read_bytes() == (whole / "plan.json").read_bytes()
    ours, theirs = report_of(killed), report_of(whole)
    assert ours["accuracy_cut"] == accuracy
    for key in ("accuracy_before", "accuracy_cut", "accuracy_after", "groups", "verify_max_abs_error"):
        assert ours[key] == theirs[key], key
    assert len(ours["history"]) == 6


def test_a_finished_run_has_nothing_left_to_do(pruned: Path, run: Run) -> None:
    before, report = snapshot(pruned), report_of(pruned)
    arguments = json.loads((pruned / "config.json").read_text())["command"].split()[1:]
    assert run(*arguments, "--resume").code == 0
    for name in ("model.onnx", "model.pt2", "progress.json", "config.json"):
        assert snapshot(pruned)[name] == before[name], name
    assert report_of(pruned) == report


def test_a_comparison_lists_its_cells_and_runs_one(tmp_path: Path, run: Run) -> None:
    recipe = tmp_path / "my recipe.toml"
    recipe.write_text(
        'model = "resnet20"\ndata = "digits"\nimage_size = 8\ntest_images = 100\nbudgets = [{ macs = 0.5 }]\n'
        'schedule = "tiny"\n[arms.dense]\n[arms."l2, cut"]\nmethod = "oneshot"\n'
    )
    arguments = (
        "compare",
        recipe,
        "--model",
        "resnet8",
        "--seeds",
        2,
        "--train-images",
        100,
        "--out",
        tmp_path / "out",
    )
    lines = run(*arguments, "--list").out.splitlines()
    assert not (tmp_path / "out").exists()
    cells = [shlex.split(line) for line in lines]
    names = [cell[-1] for cell in cells]
    assert names == [f"{cell}/seed-{seed}" for seed in (0, 1) for cell in ("dense/dense", "l2-cut/macs-0.5")]
    assert cells[0][:-2] == ["secateur", *map(str, arguments)]
    ended = run(*cells[1][1:])
    assert ended.code == 0, ended.err
    assert (tmp_path / "out" / "l2-cut" / "macs-0.5" / "seed-0" / "report.json").exists()
    assert not (tmp_path / "out" / "table.md").exists()
    assert "unknown cell 'l2'" in run(*arguments, "--only", "l2").err
    assert "--list, --only and --gather do different things" in run(*arguments, "--list", "--gather").err
    some = run(*arguments, "--arm", "l2, cut", "--list").out.splitlines()
    assert [shlex.split(line)[-1] for line in some] == [f"l2-cut/macs-0.5/seed-{seed}" for seed in (0, 1)]
    assert "unknown arm 'l2'" in run(*arguments, "--arm", "l2", "--list").err


def test_a_comparison_needs_no_file_and_tells_of_failures(tmp_path: Path, run: Run) -> None:
    words = ["compare", "--model", "resnet8", "--data", "digits", "--schedule", "tiny", "--train-images", 100]
    words += ["--method", "dense", "--method", "gradual", "--keep-macs", 0.6, "--keep-params", 0.5]
    words += ["--out", tmp_path / "out"]
    cells = [shlex.split(line)[-1] for line in run(*words, "--list").out.splitlines()]
    assert cells == ["dense/dense/seed-0", "gradual/macs-0.6/seed-0", "gradual/params-0.5/seed-0"]
    ended = run(*words)  # 4 steps are too few for the rounds of gradual
    assert ended.code == 1
    assert "2 of 3 runs failed" in ended.out
    assert "do not fit" in (tmp_path / "out" / "table.md").read_text()
    assert (
        "no budgets; give --keep-macs"
        in run("compare", "--model", "resnet8", "--data", "digits", "--out", tmp_path).err
    )


def test_an_interrupted_run_says_how_to_go_on(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    monkeypatch.setattr("secateur.runs.measure.evaluate_once", interrupt)
    ended = run(*PRUNE, "--out", out)
    assert ended.code == 130
    assert f"go on with: secateur {' '.join(PRUNE)} --out {out} --resume" in ended.err
    monkeypatch.setattr("secateur.runs.pipeline.load_task", interrupt)
    ended = run(*PRUNE, "--out", tmp_path / "other")
    assert ended.code == 130
    assert "Nothing was written" in ended.err


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_full_disk(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    ended = run(*PRUNE, "--out", tmp_path / "run")
    assert ended.code == 2
    assert "No space left on device" in ended.err
    assert list((tmp_path / "run").iterdir()) == []


# ---- terminals and processes


def test_steps_show_as_lines_or_spinners(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from secateur.cli.show import Steps

    with Steps().doing("Measuring [it]"):
        pass
    Steps().tell("done")
    assert capfd.readouterr() == ("", "Measuring [it]\ndone\n")
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    with Steps().doing("Measuring [it]"):
        pass
    out, err = capfd.readouterr()
    assert out == ""
    assert "Measuring [it]" in err
    assert " s" in err


@pytest.mark.slow
def test_two_processes_make_one_run(tmp_path: Path, run: Run) -> None:
    arguments = [*PRUNE, "--epochs", "2", "--train-images", "200", "--out", str(tmp_path / "two")]
    launch = ["--standalone", "--nproc-per-node=2", "-m", "secateur.cli"]
    two = start(tmp_path / "printed", torchrun, [*launch, *arguments], OMP_NUM_THREADS="1")
    assert two.end() == 0, two.err
    assert two.out.count("Report:") == 1
    assert "Warning: " not in two.err
    one = run(*arguments[:-1], tmp_path / "one")
    assert one.code == 0, one.err
    ours, theirs = report_of(tmp_path / "two"), report_of(tmp_path / "one")
    assert ours["groups"] == theirs["groups"]
    assert [line["loss"] for line in ours["history"]] == pytest.approx(
        [line["loss"] for line in theirs["history"]], rel=1e-3
    )


@pytest.mark.slow
def test_the_demo(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ended = run("demo")
    assert ended.code == 0, ended.err
    report = report_of(tmp_path / "secateur-demo")
    assert report["accuracy_before"] >= 0.97
    assert report["accuracy_cut"] >= report["accuracy_before"] - 0.05  # auto takes rd
    assert report["accuracy_after"] >= report["accuracy_before"] - 0.015
    assert 0.47 <= report["after"]["macs"] / report["before"]["macs"] <= 0.5
    assert {line["phase"] for line in report["history"]} == {"train", "finetune"}
    assert (tmp_path / "secateur-demo" / "dense.safetensors").exists()


@pytest.mark.slow
def test_published_weights_on_real_images(shared_data: Path, tmp_path: Path, run: Run) -> None:
    weights = shared_data / "weights" / "cifar10_resnet20_optA_akamaster.safetensors"
    ended = run(
        *("prune", "--model", "resnet20", "--weights", weights, "--data", "cifar10"),
        *("--data-dir", shared_data / "cifar10", "--test-images", 1000, "--calibration-images", 64),
        *("--keep-macs", 0.5, "--no-exports", "--out", tmp_path / "run"),
    )
    assert ended.code == 0, ended.err
    report = report_of(tmp_path / "run")
    assert report["accuracy_before"] == pytest.approx(0.917, abs=0.02)
    assert report["accuracy_cut"] < report["accuracy_before"]
    assert 0.48 <= report["after"]["macs"] / report["before"]["macs"] <= 0.5
    assert any("1,000 of the 10,000 test images" in note for note in report["notes"])
    ended = run("eval", "--run", tmp_path / "run", "--json")
    assert json.loads(ended.out)["accuracy"] == report["accuracy_after"]


def test_a_recipe_says_what_flags_say(tmp_path: Path, run: Run) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'model = "resnet8"\ndata = "digits"\nimage_size = 8\ntest_images = 50\nbudget = { macs = 0.6 }\n'
        'method = "oneshot"\noptions = { score = "l1", round_to = 2 }\nfreeze = ["conv1"]\nexports = false\n'
        'normalisation = "0.5/0.25"\n'
    )
    ended = run("prune", recipe, "--option", "round_to=4", "--no-progress", "--out", tmp_path / "run")
    assert ended.code == 0, ended.err
    report, plan = report_of(tmp_path / "run"), json.loads((tmp_path / "run" / "plan.json").read_text())
    assert report["budget"] == {"macs": 0.6}
    assert not (tmp_path / "run" / "model.onnx").exists()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["normalisation"]["std"] == [0.25]
    assert {name: plan["origin"][name] for name in ("score", "round_to", "freeze")} == {
        "score": "l1", "round_to": 4, "freeze": ["conv1"]
    }  # fmt: skip
    recipe.write_text('modl = "resnet8"\n')
    assert "unknown setting 'modl'; choose one of: " in run("prune", recipe, "--out", tmp_path / "x").err
