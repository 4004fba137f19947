"""The callback for Hugging Face's Trainer: every method with all that it does, and from its checkpoints."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from secateur.errors import FileError, SecateurError, TrainingError
from secateur.files import read_tensors
from tests.integrations.examples import METHODS, STEPS, check, same
from tests.methods.examples import Residual

pytest.importorskip("transformers")

from secateur.integrations.huggingface import FILE, Prune
from tests.integrations.huggingface_run import Model, run, sgd

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*no accelerator")


@pytest.mark.parametrize("name", METHODS)
def test_a_method_in_a_trainer(name: str, tmp_path: Path) -> None:
    """With accumulation and clipping; logged; and a resumed run is the same run."""
    model, prune, trainer = run(METHODS[name], tmp_path)
    check(prune.pruned, model)
    assert prune.running.step == trainer.state.global_step == STEPS
    rows = [row for row in trainer.state.log_history if "secateur/macs" in row]
    assert [row["secateur/macs"] for row in rows] == [p["macs"] for p in prune.running.history]
    assert [row["step"] for row in rows] == [p["step"] for p in prune.running.history]
    losses = [row["step"] for row in trainer.state.log_history if "loss" in row]
    assert losses == list(range(2, STEPS + 1, 2))  # those of the Trainer are all there

    again, resumed, after = run(METHODS[name], tmp_path / "again", resume=tmp_path / "checkpoint-4")
    same(again, model)
    assert resumed.running.history == prune.running.history
    assert resumed.running.plan() == prune.running.plan()
    assert [g["weight_decay"] for g in after.optimizer.param_groups] == [0.01, 0.0]


@pytest.mark.parametrize("name", ["lapp, full bypass", "gate decorator, decay"])
def test_in_mixed_precision(name: str, tmp_path: Path) -> None:
    """The proof is of the network in the precision of its weights."""
    model, prune, _ = run(METHODS[name], tmp_path, bf16=True, save_strategy="no")
    check(prune.pruned, model)
    assert prune.pruned is not None
    assert prune.pruned.proof is not None
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert model.eval()(x)["logits"].dtype == torch.float32


def test_a_moving_average_is_cut_along(tmp_path: Path) -> None:
    averages: list[nn.Module] = []

    def follow() -> list[nn.Module]:
        if not averages:
            averages.append(torch.optim.swa_utils.AveragedModel(prune_of["model"]).module)
        return averages

    prune_of: dict[str, nn.Module] = {}

    class Kept(Prune):
        def start(self, model: nn.Module, *given: object) -> None:
            super().start(model, *given)  # type: ignore[arg-type]
            prune_of["model"] = model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.integrations.huggingface_run.Prune", Kept)
        model, prune, _ = run(
            METHODS["gradual, decay"], tmp_path, given={"followers": follow}, save_strategy="no"
        )
    check(prune.pruned, model)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert {name: p.shape for name, p in averages[0].named_parameters()} == shapes


def test_its_last_checkpoint(tmp_path: Path) -> None:
    """`True` is the last one in the folder; what stands there is no pickle."""
    model, _, _ = run(METHODS["gradual, decay"], tmp_path)
    tensors, header = read_tensors(tmp_path / "checkpoint-8" / FILE)
    assert "kept.0" in tensors
    assert header["format"] == "secateur-session-1"
    for step in (4, STEPS):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    again, _, _ = run(METHODS["gradual, decay"], tmp_path, resume=True)
    same(again, model)


def test_a_checkpoint_that_does_not_fit(tmp_path: Path) -> None:
    run(METHODS["lapp, no bypass"], tmp_path)
    checkpoint = tmp_path / "checkpoint-4"
    with pytest.raises(TrainingError, match=r"prune_share was 0\.6, is now 0\.1"):
        run("lapp", tmp_path, resume=checkpoint, given={"bypass": "none"})
    with pytest.raises(TrainingError, match=f"a training of {STEPS} steps; this one has {2 * STEPS}"):
        run(METHODS["lapp, no bypass"], tmp_path, resume=checkpoint, num_train_epochs=4)
    (checkpoint / FILE).write_bytes(b"damaged")
    with pytest.raises(FileError, match="not a readable safetensors file"):
        run(METHODS["lapp, no bypass"], tmp_path, resume=checkpoint)
    (checkpoint / FILE).unlink()
    with pytest.raises(FileError, match="no such file"):
        run(METHODS["lapp, no bypass"], tmp_path, resume=checkpoint)


def test_what_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="load_best_model_at_end"):
        run("gradual", tmp_path, load_best_model_at_end=True, save_strategy="no")
    with pytest.raises(TrainingError, match="the optimizer does not know"):  # it was made before the bypass
        run(METHODS["lapp, full bypass"], tmp_path, optimizers=sgd)
    with pytest.raises(SecateurError, match="is for a transformers Trainer"):
        Prune("gradual", budget=0.5).on_init_end(None, None, None)
    assert isinstance(Model().network, Residual)


def test_one_use_each(tmp_path: Path) -> None:
    _, _, trainer = run(METHODS["gradual, decay"], tmp_path, save_strategy="no")
    with pytest.raises(TrainingError, match="this callback has been used"):
        trainer.train()
