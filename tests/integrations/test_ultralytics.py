"""The callback for Ultralytics: methods with its accumulation, clipping, average, scaler, checkpoints and resume."""

import csv
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.errors import TrainingError
from secateur.methods import LAPP
from tests.integrations.examples import FEW, METHODS, WITH_LAYERS, Overflow, check

pytest.importorskip("ultralytics")

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")

FORMS = [name for name in METHODS if name not in WITH_LAYERS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and runs; the framework's own settings go there as well, and it asks no network for news."""
    found = tmp_path_factory.mktemp("ultralytics")
    os.environ.setdefault("YOLO_CONFIG_DIR", str(found))
    os.environ.setdefault("YOLO_OFFLINE", "true")
    from tests.integrations.ultralytics_run import prepare

    prepare(found)
    return found


@pytest.mark.parametrize("name", FORMS)
def test_a_method_in_a_trainer(name: str, folder: Path) -> None:
    """The result has the weights of the average, is logged, works in the YOLO object, and is loaded from its file."""
    from tests.integrations.ultralytics_run import BATCHES, EPOCHS, run

    where = name.replace(", ", "-").replace(" ", "-")
    model, prune = run(METHODS[name], folder, where)
    pruned = prune.pruned
    assert pruned is not None
    check(pruned, pruned.model)
    assert prune.running.step == prune.running.steps == EPOCHS * BATCHES
    weights = folder / "runs" / where / "weights"
    with (weights.parent / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == EPOCHS
    assert all(0 < float(row["secateur/macs"]) <= 1 for row in rows)
    assert float(rows[-1]["secateur/macs"]) == pytest.approx(prune.running.history[-1]["macs"], rel=1e-4)
    average = torch.load(weights / "last.pt", weights_only=False)["model"].float()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            average.eval()(images)[0], pruned.model.eval()(images)[0], rtol=2e-2, atol=2e-2
        )
    model.model = pruned.model
    assert model.predict(torch.rand(1, 3, 32, 32), verbose=False)[0].probs is not None
    if name == FEW[1]:
        assert model.val(data=str(folder / "data"), imgsz=32, plots=False, verbose=False, workers=0).top1 >= 0


@pytest.mark.parametrize("name", [name for name in FORMS if name in FEW])
def test_resume(name: str, folder: Path) -> None:
    """A run that was killed after an epoch goes on with the units it had, to the same number of steps."""
    from tests.integrations.ultralytics_run import BATCHES, run

    where = "resume-" + name.replace(", ", "-").replace(" ", "-")
    kept: list[Any] = []

    def stop(trainer: Any) -> None:
        if trainer.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(METHODS[name], folder, where, events={"on_train_epoch_start": stop})
    last = folder / "runs" / where / "weights" / "last.pt"

    def look(trainer: Any) -> None:
        session = resumed[0].running
        kept.append((session.step, {n: p.shape for n, p in trainer.model.named_parameters()}))

    resumed: list[Any] = []
    from tests.integrations import ultralytics_run

    class Kept(ultralytics_run.Prune):
        def add_to(self, model: Any) -> Any:
            resumed.append(self)
            super().add_to(model)
            model.add_callback("on_pretrain_routine_end", look)
            return self

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ultralytics_run, "Prune", Kept)
        _, prune = run(METHODS[name], folder, where, resume=last)
    assert kept[0][0] == 2 * BATCHES
    assert prune.pruned is not None
    check(prune.pruned, prune.pruned.model)
    assert prune.running.step == prune.running.steps


def test_accumulation_warm_up_and_a_scaler_that_skips(folder: Path) -> None:
    """Steps are counted as the trainer takes them; those that the scaler skips do not count."""
    from tests.integrations.ultralytics_run import run

    taken: list[int] = []

    def scale(trainer: Any) -> None:
        trainer.scaler = Overflow("cpu", init_scale=16.0)
        step = trainer.optimizer_step

        def counted() -> None:
            taken.append(1)
            step()

        trainer.optimizer_step = counted

    options = {"nbs": 16, "warmup_epochs": 1, "epochs": 6}
    _, prune = run(
        METHODS["lapp, no bypass"], folder, "scaler", events={"on_pretrain_routine_end": scale}, **options
    )
    session = prune.running
    assert session.steps == len(taken)
    assert session.step == session.steps - 2
    assert prune.pruned is not None
    check(prune.pruned, prune.pruned.model)


def test_what_cannot_be(folder: Path) -> None:
    from tests.integrations.ultralytics_run import run

    with pytest.raises(TrainingError, match="adds layers, which Ultralytics cannot fuse; use bypass='none'"):
        run(LAPP(bypass="full", prune_share=0.6), folder, "bypass")
    with pytest.raises(TrainingError, match="limited by time"):
        run(METHODS["lapp, no bypass"], folder, "time", time=0.1)
