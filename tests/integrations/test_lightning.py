"""The callback for Lightning: every method with all that a Trainer does, and from its checkpoints."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.errors import SecateurError, TrainingError
from secateur.methods.in_trainer import InTrainer
from tests.integrations.examples import ACCUMULATE, METHODS, STEPS, Overflow, check, same

pytest.importorskip("lightning")

from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.plugins import MixedPrecision

from secateur.integrations.lightning import Prune
from tests.integrations.lightning_run import Module, run

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),  # a resumed run here writes elsewhere
]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_in_a_trainer(name: str, tmp_path: Path) -> None:
    """With accumulation and clipping; logged; and a resumed run is the same run."""
    module, prune, trainer = run(METHODS[name], tmp_path)
    check(prune.pruned, module.network)
    assert prune.running.step == trainer.global_step == STEPS
    assert trainer.optimizers[0].param_groups[0]["weight_decay"] == 1e-3
    with (tmp_path / "logs" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["secateur/macs"]]
    assert [float(row["secateur/macs"]) for row in rows] == [p["macs"] for p in prune.running.history]
    assert [int(row["step"]) for row in rows] == [p["step"] for p in prune.running.history]

    again, resumed, after = run(METHODS[name], tmp_path / "again", resume=tmp_path / "saved" / "step=6.ckpt")
    assert after.global_step == STEPS
    same(again, module)
    assert resumed.running.history == prune.running.history
    assert resumed.running.plan() == prune.running.plan()
    assert after.optimizers[0].param_groups[0]["weight_decay"] == 1e-3


@pytest.mark.parametrize("name", ["lapp, no bypass", "paam, alternating", "depgraph, decay"])
def test_a_scaler_that_skips_steps(name: str, tmp_path: Path) -> None:
    """Skipped steps do not count, and what they left in the method's own gradients is gone."""
    scaler = Overflow("cpu", init_scale=16.0)
    seen = []

    class Seen(Prune):
        def after_step(self) -> None:
            super().after_step()
            seen.append(self.running.step)
            assert all(p.grad is None for p in self.running.parameters())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.integrations.lightning_run.Prune", Seen)
        module, prune, _ = run(
            METHODS[name],
            tmp_path,
            plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
            given={"steps": STEPS - 2},
        )
    assert seen == [0, 0, *range(1, STEPS - 1)]
    check(prune.pruned, module.network)


@pytest.mark.parametrize("name", ["lapp, full bypass", "gate decorator, decay", "gradual, decay"])
def test_lightnings_moving_average_is_cut_along(name: str, tmp_path: Path) -> None:
    averaging = EMAWeightAveraging(decay=0.5)
    module, prune, _ = run(METHODS[name], tmp_path, callbacks=[averaging])
    check(prune.pruned, module.network)
    again, _, _ = run(
        METHODS[name],
        tmp_path / "again",
        resume=tmp_path / "saved" / "step=6.ckpt",
        callbacks=[EMAWeightAveraging(decay=0.5)],
    )
    same(again, module)


def test_an_average_that_was_copied_too_early(tmp_path: Path) -> None:
    class Early(EMAWeightAveraging):
        def __init__(self) -> None:
            super().__init__(decay=0.5)

        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            """Later than this callback; the test does it before."""

    early, module = Early(), Module()
    EMAWeightAveraging.setup(early, None, module, "fit")  # type: ignore[arg-type]
    prune = Prune(METHODS["lapp, full bypass"], budget=0.6, inputs=torch.zeros(2, 3, 8, 8))
    prune._name, prune._callbacks = "network", [early]
    prune.start(module.network, torch.zeros(2, 3, 8, 8), STEPS)
    with pytest.raises(TrainingError, match="come after this one"):
        prune.enter(torch.optim.SGD(module.parameters(), lr=0.1))


def test_an_interrupted_training_leaves_nothing(tmp_path: Path) -> None:
    class Stop(Prune):
        def before_step(self) -> None:
            if self.running.step == 5:
                raise RuntimeError("stopped")
            super().before_step()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.integrations.lightning_run.Prune", Stop)
        modules: list[Module] = []
        patch.setattr(Module, "on_fit_start", lambda self: modules.append(self))
        with pytest.raises(RuntimeError, match="stopped"):
            run(METHODS["paam, joint"], tmp_path)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules[0].modules())
    assert "on_load_checkpoint" not in vars(modules[0])


def test_a_training_that_ends_too_early_says_so(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=f"after 3 of {STEPS} steps"):
        run(
            METHODS["lapp, no bypass"],
            tmp_path,
            limit_train_batches=3 * ACCUMULATE,
            max_epochs=1,
            given={"steps": STEPS},
        )


def test_a_checkpoint_of_another_run(tmp_path: Path) -> None:
    run(METHODS["lapp, no bypass"], tmp_path)
    with pytest.raises(TrainingError, match=r"prune_share was 0\.6, is now 0\.1"):
        run("lapp", tmp_path / "other", resume=tmp_path / "saved" / "step=6.ckpt")
    with pytest.raises(TrainingError, match=f"steps was {STEPS}, is now {2 * STEPS}"):
        run(
            METHODS["lapp, no bypass"],
            tmp_path / "longer",
            resume=tmp_path / "saved" / "step=6.ckpt",
            max_epochs=4,
        )


def test_what_cannot_be() -> None:
    with pytest.raises(
        SecateurError, match="method oneshot does not prune while a model trains; choose one of: lapp"
    ):
        Prune("oneshot", budget=0.5)
    with pytest.raises(SecateurError, match="unknown option 'sped'"):
        Prune("lapp", budget=0.5, sped=1)
    with pytest.raises(TrainingError, match="it has not started"):
        InTrainer("lapp").before_step()
    with pytest.raises(TrainingError, match="say steps="):
        Prune("lapp", budget=0.5).start(Module().network, torch.zeros(2, 3, 8, 8), float("inf"))
