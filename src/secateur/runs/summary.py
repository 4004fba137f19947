"""The report of a finished run."""

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.engine.decay import Restore
from secateur.engine.describe import describe, proof_notes, settings_in_words
from secateur.engine.method import Method
from secateur.engine.pruned import Pruned
from secateur.measures import MEASURES
from secateur.plan import WeightPlan
from secateur.report import Report, current_versions
from secateur.report.data import LayerCost, LayerCurve, OutputFile, WeightFacts
from secateur.runs.answers import Answers, tell_answers
from secateur.runs.config import PruneConfig
from secateur.runs.folder import RunFolder, SavedRun
from secateur.runs.measure import pair_of, training_pair
from secateur.runs.task import LoadedTask, device
from secateur.settings import defaults_of, plain

NO_FASTER = (
    "Scattered zeros make the file smaller, not the model faster: dense kernels multiply by them all the same. "
    "Prune channels, or the pattern 2:4 on GPUs that have kernels for it, where speed is the aim."
)


FILES = {
    "model.safetensors": "the pruned model",
    "model.onnx": "the same for ONNX runtimes",
    "model.pt2": "the same as a torch.export program, which runs without Secateur",
    "plan.json": "which channels went",
    "masks.safetensors": "which weights went",
    "dense.safetensors": "the model before",
    "cut.safetensors": "right after the cut",
    "finetuned.safetensors": "fine-tuned, which made it worse",
    "metrics.jsonl": "one line per epoch",
    "config.json": "all settings",
}
"""What a reader of the report may want of the folder."""


def summarise(
    config: PruneConfig,
    task: LoadedTask,
    pruned: Pruned,
    folder: RunFolder,
    last: str,
    exported: dict[str, Any],
) -> Report:
    """The report of a finished run.

    Args:
        config: with a method in place of `auto`.
        task: loaded.
        pruned: what came of it.
        folder: with all that was measured.
        last: what the final model is called there.
        exported: from `export_and_time`, or sizes of files; and notes.
    """
    method = config.chosen
    cut, final = folder.known.get("accuracy of the cut model"), folder.known[f"accuracy of the {last}"]
    weights, onnx = exported.get("weights_bytes", (None, None)), exported.get("onnx_bytes", (None, None))

    def answers(name: str) -> Answers | None:
        return folder.known.get(f"answers of the {name}")

    fields = describe(pruned)
    if isinstance(pruned.plan, WeightPlan):
        fields |= {"after": fields["before"], "weights": _weight_facts(pruned, pruned.plan)}
    return Report(
        model=config.task.model,
        dataset=config.task.data,
        method=settings_in_words(method.record(), plain(defaults_of(type(method)))),
        budget=config.budget,
        seed=config.task.seed,
        command=folder.command,
        accuracy_before=folder.known.get("accuracy of the dense model"),
        accuracy_cut=cut,
        accuracy_after=final,
        undone=config.finetune is not None and last == "cut model",
        latency_pytorch=pair_of(exported.get("latency_pytorch")),
        latency_onnxruntime=pair_of(exported.get("latency_onnxruntime")),
        training_cost=training_pair(folder),
        weights_bytes_before=weights[0],
        weights_bytes_after=weights[1],
        onnx_bytes_before=onnx[0],
        onnx_bytes_after=onnx[1],
        layers=_layers(exported.get("layers", {})),
        files=_files(folder),
        loading=loading(folder.path),
        repeat=repeat_command(folder.command, folder.path),
        **(tell_answers(task.data, answers("dense model"), told) if (told := answers(last)) else {}),
        notes=[
            *task.notes,
            *_notes(config, method, pruned),
            *_excess(config, pruned, exported),
            *_taken(folder, config, len(task.data.test)),
            *exported["notes"],
        ],
        history=folder.metrics(),
        restore_above=_restore_above(method),
        versions=current_versions(device()),
        **fields,
    )


def loading(folder: Path) -> list[str]:
    """Lines of Python that load the model of a run."""
    run = SavedRun.read(folder)
    channels = "" if run.input_shape[0] == 3 else f", in_channels={run.input_shape[0]}"
    return [
        "import secateur as sc",
        "from secateur.recipes.models import build_model",
        f"dense = build_model({run.task['model']!r}, classes={run.classes}{channels})",
        f"model = sc.load(dense, {str(folder / 'model.safetensors')!r})",
    ]


def repeat_command(command: str, folder: Path) -> str:
    """The command that does the same again, into a folder beside this one.

    >>> repeat_command("secateur prune --keep-macs 0.5 --out run --resume", Path("run"))
    'secateur prune --keep-macs 0.5 --out run-again'
    """
    kept: list[str] = []
    for word in shlex.split(command):
        if kept and kept[-1] == "--out":
            kept.pop()
        elif not word.startswith("--out=") and word not in ("--resume", "--overwrite"):
            kept.append(word)
    return shlex.join([*kept, "--out", f"{folder}-again"]) if kept else ""


def _files(folder: RunFolder) -> list[OutputFile]:
    paths = ((folder / name, what) for name, what in FILES.items())
    return [OutputFile(path.name, path.stat().st_size, what) for path, what in paths if path.exists()]


def _layers(timed: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[LayerCost]:
    """Layers with multiply-adds in order, then all others summed up by their kind, those that take longest first."""
    ms: dict[str, list[float]] = {}
    macs: dict[str, list[int]] = {}
    modules: dict[str, set[str]] = {}
    for place, name in enumerate(("before", "after")):
        rows = {row["layer"]: row for row in timed.get(name, ())}
        parents = {layer.rpartition(".")[0] for layer in rows if layer}
        for layer, row in rows.items():
            key = layer
            if not row["macs"]:
                key = "what forward does between them" if layer in parents else row["kind"]
                modules.setdefault(key, set()).add(layer)
            ms.setdefault(key, [0.0, 0.0])[place] += row["ms"]
            macs.setdefault(key, [0, 0])[place] += row["macs"]
    named = {key: f"{key} ({len(found)}×)" for key, found in modules.items() if not key.startswith("what ")}
    return [
        LayerCost(named.get(key, key), *(n or None for n in macs[key]), *(n or None for n in ms[key]))
        for key in sorted(ms, key=lambda key: (key in modules, -ms[key][0] if key in modules else 0))
    ]


def _restore_above(method: Method) -> dict[str, float]:
    restore = getattr(getattr(method, "removal", None), "restore", None)
    return {"rate": restore.rate, "length": restore.length} if isinstance(restore, Restore) else {}


def _weight_facts(pruned: Pruned, plan: WeightPlan) -> WeightFacts:
    facts = pruned.facts
    return WeightFacts(
        total=plan.weights,
        kept=plan.kept,
        layers={name: (mask.numel(), int(mask.sum())) for name, mask in plan.masks.items()},
        macs=int(pruned.after["macs"]),
        params=int(pruned.after["params"]),
        curves=tuple(LayerCurve(**curve) for curve in facts.get("curves", ())),
        predicted=facts.get("predicted"),
        measured=facts.get("measured"),
    )


def _excess(config: PruneConfig, pruned: Pruned, exported: dict[str, Any]) -> list[str]:
    """What is kept beyond the budget: by a method of the user's own, or by the clock."""
    notes = []
    for name, bound in config.budget.items():
        measure = MEASURES[name]
        if not measure.timed and (share := pruned.after[name] / pruned.before[name]) > bound:
            notes.append(
                f"The budget is not met: {share:.4f} of the {measure.label} stay, {bound:g} were asked for."
            )
    timed, limit = exported.get("latency_pytorch"), config.budget.get("latency_ms")
    if limit is not None and timed and (last := timed[1]["median_ms"]) > limit:
        notes.append(
            f"When the result was timed again, a pass took {last:.3g} ms; {limit:g} ms were asked for."
        )
    return notes


def is_worse(cut: float, last: float, images: int) -> bool:
    """Whether fine-tuning took more from the cut model's accuracy than the choice of test images explains.

    >>> is_worse(0.9066, 0.8897, images=10_000), is_worse(0.9066, 0.9020, images=10_000)
    (True, False)
    """
    return cut - last > 2 * math.sqrt(2 * cut * (1 - cut) / images)


def _taken(folder: RunFolder, config: PruneConfig, images: int) -> list[str]:
    """What to say where fine-tuning took more than it gave."""
    cut, last = (folder.known.get(f"accuracy of the {name} model") for name in ("cut", "fine-tuned"))
    if cut is None or last is None or not is_worse(cut, last, images):
        return []
    return [
        f"Fine-tuning took {100 * (cut - last):.1f} points from what the cut had left. "
        + (
            "So the model before it was kept; the fine-tuned one is in finetuned.safetensors."
            if config.keep == "better"
            else "The model before it is in cut.safetensors."
        )
        + " A lower learning rate or more training images may help."
    ]


def _notes(config: PruneConfig, method: Method, pruned: Pruned) -> list[str]:
    notes, masks = [], isinstance(pruned.plan, WeightPlan)
    if method.when == "during" and config.task.weights is None:
        notes.append("The model was trained from scratch, and pruned meanwhile.")
    elif masks and method.when == "before":
        notes.append(
            "The weights were masked before training, and the model was trained once while the masks held."
        )
    elif method.when == "before" and config.finetune is not None:
        notes.append("The model was cut before training, drawn afresh, and trained once.")
    elif config.task.weights is None and config.train is None:
        notes.append("No weights were given: the model was pruned as initialised at random.")
    if config.finetune is None and method.when == "after" and not masks:
        notes.append("The cut model was not fine-tuned.")
    elif config.finetune is not None and config.finetune.distill_weight:
        notes.append("The dense model taught the cut one while it was fine-tuned.")
    if masks:
        notes.append(NO_FASTER)
    elif pruned.proof is None:
        notes.append(
            "The method does not say which units went, so there is nothing to compare the model with."
        )
    return [*notes, *proof_notes(pruned.graph, pruned.proof)]
