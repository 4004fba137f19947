"""A training run."""

from dataclasses import replace
from pathlib import Path

import torch

from secateur.recipes.train import FitResult, fit
from secateur.runs.config import TrainRunConfig
from secateur.runs.folder import Mode, RunFolder, Watch, is_main_process
from secateur.runs.subject import load_subject
from secateur.surgery import save


def train_run(
    config: TrainRunConfig,
    out: str | Path,
    *,
    mode: Mode = "new",
    command: str = "",
    watch: Watch | None = None,
) -> FitResult:
    """Train a model, from scratch or on from the task's weights; `out` gets its weights, metrics and checkpoint.

    Several processes launched together share the work, and the first of them writes.

    Args:
        config: what and how.
        out: the run's folder; it is made if need be.
        mode: what to do if it holds a run.
        command: as it was typed, for the record.
        watch: is told what goes on.
    Raises:
        SecateurError: whatever is wrong with names, data, folder or numbers; before that nothing is written.
    """
    watch = watch or Watch()
    main, settings = is_main_process(), config.to_json()
    folder = RunFolder(out, "train", settings, mode) if main else None
    with watch.doing(f"Loading {config.task.data} and building {config.task.model}"):
        subject = load_subject(config.task)
    if folder:
        folder.begin(subject.saved_run("train", command, settings))
    watch.tell(f"Training: {config.train.epochs} × {len(subject.data.train):,} images")
    how = replace(config.train, seed=config.task.seed)
    result = fit(subject.model, subject.data, how, out, resume=mode == "resume", progress=watch.bars)
    if folder:
        save(subject.model.to(memory_format=torch.contiguous_format), folder / "model.safetensors")
    return result
