"""What method `auto` means for one run."""

from dataclasses import replace
from typing import Any

from secateur.methods import AUTO, METHODS, choose
from secateur.runs.config import PruneConfig
from secateur.runs.subject import Subject


def resolved(config: PruneConfig, subject: Subject) -> tuple[PruneConfig, Subject]:
    """The configuration with a method in place of `auto`; why is a note of the subject.

    A method that prunes during training takes the training that was to follow the cut.
    """
    if config.method != AUTO:
        return config, subject
    given = {"macs": config.keep_macs, "params": config.keep_params, "units": config.sparsity}
    given["latency_ms"] = config.latency_ms
    choice = choose(
        bounds=[name for name, bound in given.items() if bound is not None],
        trained=config.task.weights is not None or config.train is not None,
        data=True,
        training=config.finetune is not None,
        side=subject.inputs.shape[-1],
        wanted=config.wanted,
    )
    chosen: dict[str, Any] = {"method": choice.method, "options": {} if config.masks else choice.options}
    if METHODS[choice.method].when == "during":
        chosen |= {"train": config.finetune, "finetune": None}
    return replace(config, **chosen), replace(subject, notes=(*subject.notes, choice.why))
