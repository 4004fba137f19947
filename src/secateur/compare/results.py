"""What came of a comparison: the outcomes of its runs, and what page and tables say around them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from secateur.compare.recipe import Comparison
from secateur.compare.words import DENSE
from secateur.report import LatencyPair, Width, current_versions
from secateur.runs.task import device


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one run.

    Attributes:
        arm: which method, with its settings.
        budget: shares of the dense model that may stay; empty for the dense model.
        seed: of everything.
        accuracy, accuracy_cut: in the end, and right after the cut; fractions.
        accuracy_dense: of the trained weights that all runs started from, if they did.
        kept: share of the dense model that is left, by measure; of a masked one, zeros count as gone. What is missing
            was not changed.
        against: the arm that the accuracy is compared with.
        masked: whether units are zeros that stay where they are.
        step_macs, step_bytes: of a step of training, shares of the dense model's, where they were measured: MACs, and
            the most memory at once.
        epochs: of training, with the seconds they took.
        training_seconds: of all epochs.
        widths: of every layer that could change.
        latency: of the dense and of this model.
        error: why there is nothing else.
    """

    arm: str
    budget: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    accuracy: float | None = None
    accuracy_cut: float | None = None
    accuracy_dense: float | None = None
    kept: Mapping[str, float] = field(default_factory=dict)
    against: str = DENSE
    masked: bool = False
    step_macs: float | None = None
    step_bytes: float | None = None
    epochs: int = 0
    training_seconds: float = 0.0
    widths: Sequence[Width] = ()
    latency: LatencyPair | None = None
    error: str = ""

    def share(self, measure: str) -> float:
        """Of the dense model that is left."""
        return self.kept.get(measure, 1.0)


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything that page and tables say.

    Attributes:
        model, dataset: what was pruned, on what.
        training: that all runs had, in words.
        seeds: of the runs.
        missing: runs that are not finished.
        test_images: that accuracy was measured on; None: the whole test set.
        outcomes: of the runs.
        notes: arm -> what the reader must know about it.
        command: as it was typed.
        versions: see `secateur.report.current_versions`.
    """

    model: str
    dataset: str
    training: str
    seeds: Sequence[int]
    outcomes: Sequence[Outcome]
    missing: int = 0
    test_images: int | None = None
    notes: Mapping[str, str] = field(default_factory=dict)
    command: str = ""
    versions: Mapping[str, str | int] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What was compared."""
        return f"Pruning {self.model} on {self.dataset}"

    @property
    def summary(self) -> str:
        """How it was compared, in a few sentences."""
        seeds = ", ".join(map(str, self.seeds))
        on = f"{self.test_images:,} test images" if self.test_images else "the whole test set"
        return (
            f"{self.model} on {self.dataset}, {self.training}, {'seeds' if len(self.seeds) > 1 else 'seed'} {seeds}. "
            f"Accuracy on {on}, mean ± standard deviation over the seeds; differences are "
            f"paired by seed.{f' {self.unfinished}' if self.missing else ''}"
        )

    @property
    def unfinished(self) -> str:
        """What to say about runs that are missing."""
        return f"{self.missing} of {self.missing + len(self.outcomes)} runs are not finished and left out."


def gather_results(
    comparison: Comparison, outcomes: Sequence[Outcome], runs: int, command: str = ""
) -> Results:
    """The outcomes so far, with what the comparison says about them.

    Args:
        comparison: that was run.
        outcomes: of its runs, those that are finished.
        runs: how many there are in all.
        command: as it was typed.
    """
    plan, task = comparison.plan, comparison.task
    images = task.train_images or plan.train_images
    epochs = (
        f"{plan.epochs} epochs"
        if task.weights is None
        else f"{plan.tune_epochs} epochs on from trained weights at a learning rate of up to {plan.tune_lr:g}"
    )
    return Results(
        model=task.model,
        dataset=task.data,
        training=(
            f"{epochs}, {f'{images:,}' if images else 'all'} training images (schedule {comparison.schedule}"
            f"{f', {comparison.lr_shape} rate' if comparison.lr_shape else ''}"
            f"{', bfloat16' if comparison.precision == 'bf16' else ''}"
            f"{', compiled' if comparison.compile else ''})"
        ),
        seeds=comparison.seeds,
        test_images=task.test_images,
        outcomes=outcomes,
        missing=runs - len(outcomes),
        notes={name: arm.note for name, arm in comparison.arms.items() if arm.note},
        command=command,
        versions=current_versions(device()),
    )
