"""What a report tells, as data; what is not known is None or empty."""

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch

import secateur
from secateur.cost.latency import Latency, device_name
from secateur.cost.training import TrainingCost
from secateur.errors import SecateurError
from secateur.measures import MEASURES

PROVEN = 1e-9
"""In float64, rounding alone stays far below this relative error, and a wrong cut far above."""


@dataclass(frozen=True)
class Width:
    """Units of one layer's output, before and after the cut."""

    layer: str
    before: int
    after: int


@dataclass(frozen=True)
class Group:
    """One group's units: which were kept, and by which scores.

    Attributes:
        name: the group.
        mask: one entry per unit; True = kept.
        scores: one per unit, higher = keep, None for a unit that was never compared; None if the method ranks no
            units.
    """

    name: str
    mask: Sequence[bool]
    scores: Sequence[float | None] | None = None

    def __post_init__(self) -> None:
        if self.scores is not None and len(self.scores) != len(self.mask):
            raise SecateurError(
                f"group {self.name!r}: {len(self.scores)} scores for {len(self.mask)} units. "
                f"Give one for each."
            )

    @property
    def units(self) -> int:
        """How many units the group had."""
        return len(self.mask)

    @property
    def kept(self) -> int:
        """How many of them were kept."""
        return sum(self.mask)

    def to_json(self) -> dict[str, Any]:
        """The fields by name, with the counts."""
        scores = None if self.scores is None else [None if s is None else float(s) for s in self.scores]
        mask = [bool(kept) for kept in self.mask]
        return {"name": self.name, "units": self.units, "kept": self.kept, "mask": mask, "scores": scores}


@dataclass(frozen=True)
class FrozenGroup:
    """What was not up for removal, why, and how much of the model it holds."""

    name: str
    reason: str
    params: int
    macs: int


@dataclass(frozen=True)
class LatencyPair:
    """Both models timed on the same inputs, in turn: see `secateur.cost.latency.compare_latency`."""

    before: Latency
    after: Latency

    @property
    def speed_up(self) -> float:
        """Median before over median after."""
        return self.before.median_ms / self.after.median_ms

    def to_json(self) -> dict[str, Any]:
        """Both measurements, and the speed-up ×."""
        before, after = self.before.to_json(), self.after.to_json()
        return {"before": before, "after": after, "speed_up": self.speed_up}


@dataclass(frozen=True)
class TrainingPair:
    """One step of training of both models on the same batch: see `secateur.cost.training.compare_training`."""

    before: TrainingCost
    after: TrainingCost


@dataclass(frozen=True)
class LayerCurve:
    """How far the output moves when one layer alone keeps so many weights.

    Attributes:
        layer: which.
        kept: (levels,), descending.
        distortion: (levels,), mean over the calibration images.
    """

    layer: str
    kept: Sequence[int]
    distortion: Sequence[float]


@dataclass(frozen=True)
class LayerCost:
    """What one layer takes of a forward pass; work that belongs to no layer stands in rows of its own.

    Attributes:
        layer: its name; or which others, or what else, are summed up here.
        macs_before, macs_after: multiply-adds of one image; None: it has none, or is not there.
        ms_before, ms_after: milliseconds of its own, without those of layers inside it.
    """

    layer: str
    macs_before: int | None
    macs_after: int | None
    ms_before: float | None
    ms_after: float | None


@dataclass(frozen=True)
class ClassAccuracy:
    """How well both models know one class.

    Attributes:
        name: of the class.
        images: of this class that were looked at.
        before, after: accuracies, 0..1.
        suffered: the answers that it lost are more than chance explains: three standard errors of their difference.
    """

    name: str
    images: int
    before: float
    after: float
    suffered: bool


@dataclass(frozen=True)
class Bin:
    """Answers of about equal confidence: how many, how sure the model was of them on average, how many were right."""

    images: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """Whether a model is as sure of its answers as it may be.

    Attributes:
        bins: of equal width, from confidence 0 to 1.
    """

    bins: Sequence[Bin]

    @property
    def error(self) -> float:
        """Expected calibration error, 0..1: mean distance of confidence and accuracy.

        Source: Guo et al. 2017, arXiv:1706.04599, eq. 3.
        """
        total = sum(one.images for one in self.bins) or 1
        return sum(one.images * abs(one.confidence - one.accuracy) for one in self.bins) / total

    def to_json(self) -> dict[str, Any]:
        """The error and the bins."""
        return {"error": self.error, "bins": list(self.bins)}


@dataclass(frozen=True)
class ChangedImage:
    """A test image of which both models think differently.

    Attributes:
        index: its place among the test images.
        label, before, after: its class, and what the models say.
        confidence_before, confidence_after: how sure they are.
        picture: a data URI.
    """

    index: int
    label: str
    before: str
    after: str
    confidence_before: float
    confidence_after: float
    picture: str

    def to_json(self) -> dict[str, Any]:
        """All but the picture."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "picture"}


@dataclass(frozen=True)
class OutputFile:
    """A file beside the report, and what it is for."""

    name: str
    bytes: int
    what: str


@dataclass(frozen=True)
class Bound:
    """One bound of the budget.

    Attributes:
        text: what was asked for, and what came out.
        met: None: it was not measured.
    """

    text: str
    met: bool | None


@dataclass(frozen=True)
class WeightFacts:
    """What became of single weights.

    Attributes:
        total, kept: weights that were up for removal, and those that stay.
        layers: name -> the same of each layer.
        macs, params: of the whole model, if a weight at zero cost nothing.
        curves: of each layer, where they were measured.
        predicted: distortion by the sum of the curves.
        measured: distortion of the pruned model.
    """

    total: int
    kept: int
    layers: Mapping[str, tuple[int, int]]
    macs: int
    params: int
    curves: Sequence[LayerCurve] = ()
    predicted: float | None = None
    measured: float | None = None


@dataclass(frozen=True)
class Ending:
    """How the fading of one unit ended.

    Attributes:
        group: its name.
        unit: the number it had at the start of the training.
        start, end: optimizer steps; it was chosen after the one, and zero or restored after the other.
        restored: kept after all, not zero.
        rate, length: what the test for restoring last measured; None: never.
    """

    group: str
    unit: int
    start: int
    end: int
    restored: bool
    rate: float | None = None
    length: float | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything the page and the JSON file say. Accuracies are fractions, 0..1.

    Attributes:
        model, dataset, method, seed, command: how the run was made; the command as it was typed.
        budget: what was asked for, such as {"macs": 0.5}.
        before, after: cost by measure, such as {"macs": …, "params": …}; MACs per image.
        accuracy_before, accuracy_cut, accuracy_after: of the original, right after the cut, and in the end.
        undone: fine-tuning made the cut model worse, so the final model is the one before it.
        verify_max_abs_error: the largest difference between the outputs of the cut and the masked model,
            in float64 if that was run, else in float32.
        verify_rel_error_float32, verify_rel_error_float64: the same, relative to the largest output.
        latency_pytorch, latency_onnxruntime: before and after, by the clock.
        training_cost: before and after, if the model was pruned before its training.
        weights_bytes_before, weights_bytes_after, onnx_bytes_before, onnx_bytes_after: file sizes.
        weights: what became of single weights, if these were pruned.
        widths: every layer whose width could change, in order of execution.
        groups: every group that was up for removal, in the same order.
        frozen: what was not.
        notes: whatever else the reader must know, one sentence each.
        history: the lines of `metrics.jsonl`, one per epoch.
        pruning_history: how pruning went while the model was trained: points with a "step", the shares of "macs" and
            "params", "units" per group, MACs of "layers", and whatever else the method notes per group ("threshold",
            "scores").
        decays: of the units that faded while the model was trained, in the order of their ends.
        restore_above: the thresholds of the test for restoring, by its measures "rate" and "length", if it was used.
        versions: see `current_versions`.
        curves: how far the output moves when one group alone is cut, if the method measured that.
        distortion_predicted, distortion_measured: by the sum of the curves, and of the pruned model.
        layers: what each layer takes of a pass, in order, if latency was measured.
        classes: accuracy by class.
        answers: test images by what became of their answers: "lost" and "won" (right before or after only), "other"
            (wrong in another way), "same".
        calibration: of the models "before" and "after".
        changed: some of the images whose answer changed.
        files: what lies beside the report.
        loading: lines of Python that load the pruned model.
        repeat: a command that does the same again, into another folder.
    """

    model: str
    method: str
    budget: Mapping[str, float]
    seed: int
    command: str
    dataset: str | None = None
    before: Mapping[str, float]
    after: Mapping[str, float]
    accuracy_before: float | None = None
    accuracy_cut: float | None = None
    accuracy_after: float | None = None
    undone: bool = False
    verify_max_abs_error: float | None = None
    verify_rel_error_float32: float | None = None
    verify_rel_error_float64: float | None = None
    latency_pytorch: LatencyPair | None = None
    latency_onnxruntime: LatencyPair | None = None
    training_cost: TrainingPair | None = None
    weights_bytes_before: int | None = None
    weights_bytes_after: int | None = None
    onnx_bytes_before: int | None = None
    onnx_bytes_after: int | None = None
    weights: WeightFacts | None = None
    widths: Sequence[Width] = ()
    groups: Sequence[Group] = ()
    frozen: Sequence[FrozenGroup] = ()
    notes: Sequence[str] = ()
    history: Sequence[Mapping[str, Any]] = ()
    pruning_history: Sequence[Mapping[str, Any]] = ()
    decays: Sequence[Ending] = ()
    restore_above: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str | int] = field(default_factory=dict)
    curves: Sequence[LayerCurve] = ()
    distortion_predicted: float | None = None
    distortion_measured: float | None = None
    layers: Sequence[LayerCost] = ()
    classes: Sequence[ClassAccuracy] = ()
    answers: Mapping[str, int] = field(default_factory=dict)
    calibration: Mapping[str, Calibration] = field(default_factory=dict)
    changed: Sequence[ChangedImage] = ()
    files: Sequence[OutputFile] = ()
    loading: Sequence[str] = ()
    repeat: str = ""

    def __post_init__(self) -> None:
        for name in ("accuracy_before", "accuracy_cut", "accuracy_after"):
            accuracy = getattr(self, name)
            if accuracy is not None and not 0 <= accuracy <= 1:
                raise SecateurError(f"report: {name} is {accuracy}; expected a fraction between 0 and 1.")

    def share(self, measure: str) -> float:
        """Of a cost, what is kept."""
        return self.after[measure] / self.before[measure]

    @property
    def costs(self) -> list[tuple[str, float, float, str]]:
        """Label, before, after and unit of each measure that follows from widths, of one image; without channels."""
        return [
            (m.label, self.before[name], self.after[name], "B" if m.unit == "bytes" else "")
            for name, m in MEASURES.items()
            if name in self.after and name != "units" and not m.timed
        ]

    @property
    def bounds(self) -> list[Bound]:
        """Each bound of the budget, and whether it is met."""
        return [self._bound(name, asked) for name, asked in self.budget.items()]

    def _bound(self, name: str, asked: float) -> Bound:
        if name not in MEASURES:
            return Bound(f"{name}: at most {asked:g} asked for", None)
        measure, facts, found = MEASURES[name], self.weights, self.after.get(name)
        before = self.before.get(name)
        if measure.timed and self.latency_pytorch is not None:
            found = self.latency_pytorch.after.median_ms
        elif facts is not None:
            found = {"macs": facts.macs, "params": facts.params, "units": facts.kept}.get(name, found)
            before = facts.total if name == "units" else before
        label = "weights" if facts is not None and name == "units" else measure.label
        if found is None or (before is None and not measure.timed):
            return Bound(f"{label}: at most {asked:g} asked for", None)
        if measure.timed or asked >= 1 or not before:
            words = measure.show(found), measure.show(asked)
            return Bound(f"{label} {words[0]}, at most {words[1]} asked for", found <= asked + 1e-9)
        share = found / before
        text = f"{100 * share:.2f} % of the {label} kept, at most {100 * asked:g} % asked for"
        return Bound(text, share <= asked + 1e-9)

    @property
    def is_proven(self) -> bool:
        """Whether the cut and the masked model agree up to rounding, in float64."""
        return self.verify_rel_error_float64 is not None and self.verify_rel_error_float64 <= PROVEN

    @property
    def finetune_epochs(self) -> int:
        """Epochs of training after the cut."""
        return sum(line.get("phase") == "finetune" for line in self.history)

    @property
    def title(self) -> str:
        """What was pruned."""
        return f"{self.model} on {self.dataset}" if self.dataset else self.model

    @property
    def outcomes(self) -> list[str]:
        """What came of it: what is kept, the accuracy, and the proof, as far as they are known."""
        parts = [f"{100 * self.share('macs'):.1f} % of the MACs kept"]
        if self.weights is not None:
            parts = [f"{100 * self.weights.kept / self.weights.total:.1f} % of the weights kept"]
        if self.accuracy_before is not None and self.accuracy_after is not None:
            accuracy = f"accuracy {100 * self.accuracy_before:.2f} % → {100 * self.accuracy_after:.2f} %"
            if self.undone:
                accuracy += " (fine-tuning made it worse, so the cut model was kept)"
            elif n := self.finetune_epochs:
                accuracy += f" (after {n} {'epoch' if n == 1 else 'epochs'} of fine-tuning)"
            parts.append(accuracy)
        if self.weights is not None:
            pass  # nothing is cut, so there is nothing to verify
        elif self.verify_max_abs_error is None:
            parts.append("not verified against the masked model")
        elif self.is_proven:
            parts.append(f"proven equal to the masked model (max error {self.verify_max_abs_error:.0e})")
        else:
            parts.append(f"within {self.verify_max_abs_error:.0e} of the masked model")
        return parts

    @property
    def outcome(self) -> str:
        """The same, in half a sentence."""
        return ", ".join(self.outcomes)

    @property
    def headline(self) -> str:
        """Both, as one sentence."""
        return f"{self.title}: {self.outcome}"

    def to_json(self) -> dict[str, Any]:
        """The fields by name, with `headline` and the medians `latency_ms_before`, `latency_ms_after`.

        A number that is not finite, such as the loss of a run that diverged, becomes None.
        """
        latency = self.latency_pytorch
        result: dict[str, Any] = {
            "headline": self.headline,
            **{f.name: getattr(self, f.name) for f in fields(self)},
            "latency_ms_before": latency.before.median_ms if latency else None,
            "latency_ms_after": latency.after.median_ms if latency else None,
        }
        return {key: _plain(value) for key, value in result.items()}


def current_versions(device: torch.device | str = "cpu") -> dict[str, str | int]:
    """The software and the machine that a run's numbers belong to."""
    return {
        "secateur": secateur.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
    }


def _plain(value: Any) -> Any:
    if hasattr(value, "to_json"):
        return _plain(value.to_json())
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
