"""Runs that prune single weights, and method rd for channels, from the command line."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from secateur.cli import app
from secateur.plan.weight_plan import WeightPlan
from secateur.recipes.models import build_model
from secateur.surgery import load

pytestmark = pytest.mark.xdist_group("weights run")  # one process makes the run that tests read

DIGITS = (
    "--model resnet8 --data digits --train-images 100 --test-images 50 --calibration-images 16 --no-progress"
)


def invoke(command: str) -> str:
    result = CliRunner().invoke(app, command.split(), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sparse") / "run"
    invoke(f"prune {DIGITS} --method rd-weights --sparsity 0.8 --epochs 1 --out {out}")
    return out


@pytest.mark.slow
def test_a_run_leaves_masks_a_sparse_model_and_a_report(sparse: Path) -> None:
    plan = WeightPlan.load(sparse / "masks.safetensors")
    assert plan.kept == int(0.2 * plan.weights)
    model = load(build_model("resnet8", classes=10, in_channels=1), sparse / "model.safetensors")
    plan.check(model)
    for name, mask in plan.masks.items():
        assert (model.get_parameter(name)[~mask] == 0).all()
    report = json.loads((sparse / "report.json").read_text())
    assert report["weights"]["kept"] == plan.kept
    assert report["weights_bytes_after"] < 0.35 * report["weights_bytes_before"]
    assert report["accuracy_cut"] is not None
    assert len(report["weights"]["curves"]) == len(plan.masks)
    assert any("not the model faster" in note for note in report["notes"])
    assert "20.0 % of the weights kept" in report["headline"]
    page = (sparse / "report.html").read_text()
    assert "plot-curves" in page
    assert "plot-densities" in page


@pytest.mark.slow
def test_a_finished_run_resumes_to_the_same_model(sparse: Path) -> None:
    before = (sparse / "model.safetensors").read_bytes()
    command = json.loads((sparse / "config.json").read_text())["command"]
    assert isinstance(command, str)
    invoke(f"prune {DIGITS} --method rd-weights --sparsity 0.8 --epochs 1 --out {sparse} --resume")
    assert (sparse / "model.safetensors").read_bytes() == before


@pytest.mark.slow
def test_baselines_and_channels_share_the_command(tmp_path: Path) -> None:
    lamp = "--method weights --option allocation=lamp --option compensation=none --sparsity 0.5"
    invoke(f"prune {DIGITS} {lamp} --no-exports --out {tmp_path / 'lamp'}")
    assert json.loads((tmp_path / "lamp" / "report.json").read_text())["weights"]["curves"] == []
    invoke(
        f"prune {DIGITS} --method rd --option levels=4 --keep-macs 0.5 --no-exports --out {tmp_path / 'rd'}"
    )
    report = json.loads((tmp_path / "rd" / "report.json").read_text())
    assert report["after"]["macs"] <= 0.5 * report["before"]["macs"]
    assert report["verify_rel_error_float64"] <= 1e-9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--method rd-weights --keep-macs 0.5", "sparsity"),
        ("--method weights --sparsity 0.5 --option allocation=best", "lamp"),
        ("--method rd --keep-macs 0.5 --option compensation=magic", "batch-norm"),
        ("--keep-macs 0.5 --option allocation=lamp", "uniform"),
    ],
)
def test_mistakes_name_the_choices(options: str, message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, f"prune {DIGITS} {options} --out {tmp_path / 'x'}".split())
    assert result.exit_code != 0
    assert message in str(result.exception)
