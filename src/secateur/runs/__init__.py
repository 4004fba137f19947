"""Runs: from names and numbers to a folder that holds the result and its proof.

config = PruneConfig(task=Task(model="resnet20", data="digits"), train=TrainConfig(epochs=10), keep_macs=0.5)
report = prune_run(config, "runs/first")        # runs/first/report.html, model.safetensors, model.onnx, …
"""

from secateur.runs.config import PruneConfig, Task, TrainRunConfig
from secateur.runs.demo import demo_config
from secateur.runs.folder import Mode, RunFolder, SavedRun, Watch
from secateur.runs.prune import prune_run
from secateur.runs.subject import Subject, fresh_model, load_into, load_subject
from secateur.runs.train import train_run
from secateur.runs.weights import additivity_run

__all__ = [
    "Mode",
    "PruneConfig",
    "RunFolder",
    "SavedRun",
    "Subject",
    "Task",
    "TrainRunConfig",
    "Watch",
    "additivity_run",
    "demo_config",
    "fresh_model",
    "load_into",
    "load_subject",
    "prune_run",
    "train_run",
]
