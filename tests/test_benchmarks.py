"""The scripts of benchmarks/: all can be imported, the cheap ones run, and exact statements hold."""

import importlib.util
import json
import re
import shlex
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks import half_size
from benchmarks.additivity import Additivity, check_additivity, draw_levels
from benchmarks.given_widths import train_again
from secateur import Budget, Plan, prune
from secateur.methods.rd.curves import geometric
from secateur.methods.rd.single_weights import FAITHFUL, RDWeights
from tests.recipes.toy import toy_data
from tests.small import ResidualNet, residual_net

FOLDER = Path(__file__).parents[1] / "benchmarks"
EXTRAS = (
    "matplotlib",
    "timm",
    "torchvision",
    "torch_pruning",
    "transformers",
    "segmentation_models_pytorch",
    "ultralytics",
)
"""What the extras `benchmark` and `frameworks` install."""

SMALL = RDWeights(levels=4, steps=2, points=20)


def test_additivity_of_a_linear_model_is_exact_where_layers_do_not_meet() -> None:
    """Two branches that are added up, on inputs that do not overlap: distortions add up exactly."""

    class Apart(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(6, 4, bias=False), torch.nn.Linear(6, 4, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.a(x[:, :6]), self.b(x[:, 6:])], 1)

    torch.manual_seed(0)
    method = replace(FAITHFUL, levels=7, reduction="mean")
    found = check_additivity(Apart(), [torch.randn(30, 12)], sparsity=0.5, draws=8, method=method)
    assert found.ratio == pytest.approx(1)
    assert found.rank_correlation == pytest.approx(1)
    assert np.allclose(found.predicted, found.measured)


def test_additivity_is_measured_and_told() -> None:
    model, x = residual_net()
    found = check_additivity(model, [x], sparsity=0.6, draws=5, method=SMALL)
    assert len(found.predicted) == len(found.measured) == 5
    assert -1 <= found.rank_correlation <= 1
    assert found.ratio > 0
    assert found.to_json()["ratio"] == found.ratio
    assert Additivity(0.5, (1.0, 2.0, 3.0), (2.0, 4.0, 5.0)).rank_correlation == pytest.approx(1)
    assert Additivity(0.5, (1.0, 2.0, 3.0), (3.0, 2.0, 1.0)).rank_correlation == pytest.approx(-1)


@pytest.mark.parametrize("seed", range(10))
def test_draws_are_within_the_budget_and_close_to_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    kept = [geometric(int(n), 9, 1) for n in rng.integers(50, 2000, 6)]
    total = int(0.3 * sum(int(k[0]) for k in kept))
    levels = draw_levels(kept, total, rng)
    found = sum(int(k[level]) for k, level in zip(kept, levels, strict=True))
    assert 0.4 * total < found <= total


def test_fresh_weights_at_given_widths(tmp_path: Path) -> None:
    model, x = residual_net()
    budget = Budget(macs=0.5)
    pruned = prune(model, x[:2], budget=budget, method="oneshot", round_to=1)
    assert isinstance(pruned.plan, Plan)
    pruned.plan.save(tmp_path / "plan.json")

    def again(seed: int) -> dict[str, torch.Tensor]:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return train_again(model, x[:2], budget, plan=str(tmp_path / "plan.json")).state_dict()

    first, repeated, other, trained = again(1), again(1), again(2), pruned.model.state_dict()
    weights = [name for name, t in trained.items() if t.ndim == 4]
    assert {n: t.shape for n, t in first.items()} == {n: t.shape for n, t in trained.items()}
    assert all(torch.equal(first[name], repeated[name]) for name in weights)
    assert not any(torch.equal(first[name], t[name]) for name in weights for t in (other, trained))


def test_images_of_half_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.half_size.load_data", lambda name, folder: toy_data())
    whole, half = toy_data(), half_size.cifar10("anywhere")
    assert half.train.images.shape == (71, 3, 4, 4)
    assert half.test.images.dtype == torch.uint8
    corner = whole.train.images[5, :, :2, :2].float().mean((1, 2))
    assert torch.equal(half.train.images[5, :, 0, 0], corner.round().to(torch.uint8))
    assert torch.equal(half.train.labels, whole.train.labels)


SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))


def load_script(name: str) -> ModuleType:
    """A script of benchmarks/ as a module; it is not run."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run_script(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str, str], str]:
    """Run a script with a command line; what it printed."""
    monkeypatch.syspath_prepend(FOLDER)

    def run(name: str, command: str) -> str:
        monkeypatch.setattr("sys.argv", [f"{name}.py", *shlex.split(command)])
        with warnings.catch_warnings():  # scripts silence them for their process
            load_script(name).main()
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_can_be_imported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)  # scripts import one another
    try:
        load_script(name)
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        pytest.skip(f"{error.name} is not there; install secateur[benchmark]")


def test_widths_fit_the_budget(run_script: Callable[[str, str], str]) -> None:
    page = run_script("widths", "--models resnet8 --round-to 4")
    rows = [line for line in page.splitlines() if line.startswith(("| 50% macs", "| 25% params"))]
    assert len(rows) == 4
    shares = [float(re.findall(r"\((\d+\.\d+)%\)", row)["params" in row[:12]]) for row in rows]
    assert all(0.9 * bound < share <= bound for share, bound in zip(shares, (50, 50, 25, 25), strict=True))


def test_a_training_method_is_run_through(monkeypatch: pytest.MonkeyPatch) -> None:
    script = load_script("run_through")
    monkeypatch.setitem(script.BATCHES, 32, 2)
    with warnings.catch_warnings():  # the script silences them for its process
        row = script.measure("depgraph", "resnet8", 32, {"macs": 0.5}, steps=4)
    assert row["ok"]
    assert row["macs"] <= 0.5
    assert row["onnx"] < 1e-3
    assert script.render([row], 4).splitlines()[-1].startswith("| depgraph | resnet8, 32 | macs 0.5 | 0.4")


def test_arms_are_compared_in_pairs(run_script: Callable[[str, str], str], tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    rows = [
        "arm,budget,seed,accuracy",
        "a,macs 0.5,0,0.9",
        "a,macs 0.5,1,0.8",
        "b,macs 0.5,0,0.88",
        "b,macs 0.5,1,0.79",
    ]
    table.write_text("\n".join(rows))
    said = run_script("paired", f"{table} a b")
    assert said.startswith("macs 0.5: +1.50 ± 0.71 points over seeds 0, 1; margin ")


def test_the_picture_shows_the_arms(run_script: Callable[[str, str], str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="install secateur[benchmark]")
    out = tmp_path / "front.svg"
    run_script("front", f"{FOLDER.parent}/docs/results/compare.csv --out {out} --arms l2 rd --cost latency")
    assert "latency, ms" in out.read_text()
    run_script("front", f"{FOLDER.parent}/docs/results/compare.csv --out {out} --arms l2 rd")
    assert {"l2", "rd", "dense"} <= set(re.findall(r">([^<>]+)</text>", out.read_text()))


ROW = {
    "framework": "huggingface",
    "model": "ViT",
    "stage": "done",
    "params": 40_421,
    "proven": True,
    "error64": 3e-16,
    "error32": 1e-7,
    "macs": 0.6,
    "macs_counted": 0.6,
    "rewritten": [],
    "tied": [],
    "losses": [2.0, 1.0],
    "unreached": [],
    "trains": True,
    "resumes": True,
    "exports": "yes",
    "cpu_s": 9.0,
    "ended": True,
}


def test_the_ecosystem_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    script = load_script("ecosystem")
    assert script.verdict(ROW) == "equal"
    late = ROW | {"exports": "as little as the original: no rule for it"}
    assert script.verdict(late) == "equal"
    for change, said in [
        ({"proven": False}, "the proof does not hold"),
        ({"macs_counted": 0.9}, "0.900 of the MACs"),
        ({"trains": False, "unreached": ["head.weight"]}, "no gradients for head.weight"),
        ({"resumes": False}, "it is another"),
        ({"exports": "a shape differs"}, "export: a shape differs"),
        ({"error": "ValueError", "message": "no"}, "ValueError in stage done: no"),
    ]:
        row = ROW | change
        assert script.verdict(row) == "wrong"
        assert said in "; ".join(script.problems(row))
    refused = ROW | {"error": "CutError", "message": "where it ends", "refused": True}
    page = script.page(
        [ROW, late, refused], dict.fromkeys(["Ultralytics", "torchvision detection"], "no module")
    )
    assert "3 models: 2 equal, 1 refused, 0 wrong" in page
    assert "| Hugging Face Transformers | 3 (fewer than 35) | 2 | 1 | 0 | 2 | 0 | 3 |" in page
    assert "CutError in stage done: where it ends" in page
    assert "Missing: Ultralytics: no module." in page


def test_a_model_of_the_ecosystem_is_run_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    script = load_script("ecosystem_one")
    framework = ModuleType("framework")
    framework.CASES = {"net": residual_net}  # type: ignore[attr-defined]
    row: dict[str, object] = {"framework": "huggingface", "model": "net"}
    for found in script.stages(framework, "net"):
        row |= found
    assert load_script("ecosystem").problems(row) == []
    assert row["stage"] == "done"
    framework.loss = lambda model, inputs: next(model.parameters()).sum()  # type: ignore[attr-defined]
    assert all(found.get("trains", True) for found in script.stages(framework, "net"))


def network() -> torch.nn.Module:
    return ResidualNet(16)


def test_images_of_a_folder_rank_methods(run_script: Callable[[str, str], str], tmp_path: Path) -> None:
    """Cells are kept, timed and told; what is there is not measured again."""
    pytest.importorskip("onnxruntime", reason="install secateur[onnx]")
    rng = np.random.default_rng(0)
    for name in "abcde":
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(8):
            pixels = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{number}.png")
    save_file(network().state_dict(), tmp_path / "w.safetensors")
    words = (
        f"--data {tmp_path}/data --model tests.test_benchmarks:network --weights {tmp_path}/w.safetensors "
        f"--image-size 24 --runs {tmp_path}/runs --epochs 1 --tune 0.6 --keep 0.6 --widths any "
        f"--out {tmp_path}/page.md --methods"
    )
    threads = torch.get_num_threads()
    with warnings.catch_warnings():
        page = run_script("imagenet", f"{words} rd")
    cell = tmp_path / "runs" / "any-60-rd.json"
    row, written = json.loads(cell.read_text()), cell.stat().st_mtime_ns
    assert row["macs"] <= 0.6
    assert len(row["right"]) == len(row["tuned"]) == 30
    assert row["ms"] > 0
    assert not list((tmp_path / "runs").glob("any*.onnx"))
    assert f"| rd | {100 * row['right'].count('1') / 30:.1f} ± " in page
    with warnings.catch_warnings():
        page = run_script("imagenet", f"{words} rd 'l2, norms'")
    torch.set_num_threads(threads)
    assert cell.stat().st_mtime_ns == written
    assert "- 60%: " in page
    assert page == (tmp_path / "page.md").read_text() + "\n"
