"""Scores of single weights of a network that has not been trained, and the table of them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.errors import ScoreError
from secateur.graph import Inputs
from secateur.graph.capture import as_call, batch_of, with_images
from secateur.graph.duplicate import duplicate
from secateur.graph.modes import few_channels_planar
from secateur.graph.replay import some_of
from secateur.imports import look_up
from secateur.scores.table import loss_of, on_device

Batches = Sequence[tuple[Any, Any]]
Loss = Callable[[Any, Any], Tensor]


class Synflow:
    """Score each weight by the paths that run through it, all signs dropped.

        R = sum of outputs of the network of absolute values on an image of ones
        s = |w dR/dw|

    The sum of s over any layer is R where the network is a chain without biases: no layer can be emptied while
    another has weights left, if scores are taken again as weights go.

    Args:
        model: any network; it is only read.
        inputs: example inputs; shapes and dtypes matter.
        names: of the weights to score.
    Source: Tanaka et al. 2020, arXiv:2006.05467, sec. 5, and the code released with it.
    Differs: everything is computed in float64. Where even that overflows, every layer's weights are divided by their
    mean times the inputs of one output, which in networks with residual sums shifts the ranking a little.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, names: Iterable[str]) -> None:
        self.model = positive_(duplicate(model).double().eval())
        self.names = list(names)
        self.args, self.kwargs = as_call(with_images(inputs, 1))
        parameters = dict(self.model.requires_grad_(True).named_parameters())
        self.whole = {name: parameters[name].detach().clone() for name in self.names}
        self.parameters = {name: parameters[name] for name in self.names}

    def __call__(self, masks: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The scores once the weights that are False in `masks` are gone; float64, 0 for those.

        Raises:
            ScoreError: not finite.
        """
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(self.whole[name])
                if masks is not None:
                    p.mul_(masks[name].to(p.device))
        scores = self._scores()
        if not _finite(scores):
            for w in self.whole.values():
                w.div_(w.mean().clamp_min(torch.finfo(w.dtype).tiny) * w[0].numel())
            with torch.no_grad():
                for name, p in self.parameters.items():
                    p.copy_(
                        self.whole[name] if masks is None else self.whole[name] * masks[name].to(p.device)
                    )
            scores = self._scores()
        return checked("synflow", scores)

    def _scores(self) -> dict[str, Tensor]:
        found = self.model(*_ones(self.args), **_ones(self.kwargs))
        outputs = [t for t in pytree.tree_leaves(found) if isinstance(t, Tensor) and t.requires_grad]
        total = torch.stack([t.sum() for t in outputs]).sum()
        grads = torch.autograd.grad(total, list(self.parameters.values()), allow_unused=True)
        return {
            name: torch.zeros_like(p) if g is None else (p.detach() * g).abs()
            for (name, p), g in zip(self.parameters.items(), grads, strict=True)
        }


def positive_(model: nn.Module) -> nn.Module:
    """Every parameter and buffer becomes its absolute value."""
    with torch.no_grad():
        for t in (*model.parameters(), *model.buffers()):
            if t.is_floating_point():
                t.abs_()
    return model


def _ones(values: Any) -> Any:
    return pytree.tree_map(
        lambda x: (
            torch.ones_like(x, dtype=torch.float64) if isinstance(x, Tensor) and x.is_floating_point() else x
        ),
        values,
    )


def snip(
    model: nn.Module, names: Sequence[str], data: Batches, loss: Loss = nn.functional.cross_entropy
) -> dict[str, Tensor]:
    """Score each weight by how strongly the loss would react to its removal, to first order.

        s = |g w|,   g of the loss over all of the data

    Args:
        model: any network; it is only read.
        names: of the weights to score.
        data: (inputs, targets) batches; their gradients add up.
        loss: of (outputs, targets), a mean over the batch.
    Source: Lee et al. 2019, arXiv:1810.02340, sec. 4.
    Differs: not divided by the sum of all scores, which changes no ranking. Batch norms work as in training.
    """
    copied, own = _trained_copy(model, names)
    total = {name: torch.zeros_like(p) for name, p in own.items()}
    with few_channels_planar(copied):
        for x, y in _batches("snip", data, own):
            for name, g in zip(own, _grads(_loss(loss, copied, x, y), own), strict=True):
                total[name] += g
    return checked("snip", {name: (total[name] * p.detach()).abs() for name, p in own.items()})


def grasp(
    model: nn.Module,
    names: Sequence[str],
    data: Batches,
    loss: Loss = nn.functional.cross_entropy,
    *,
    temperature: float = 200.0,
) -> dict[str, Tensor]:
    """Score each weight by how much its removal would lower the gradient's norm, and so slow down training.

        s = w (H g),   g and H of the loss with outputs / temperature

    Args:
        model: any network; it is only read.
        names: of the weights to score.
        data: (inputs, targets) batches; each is processed in two halves.
        loss: of (outputs, targets), a mean over the batch.
        temperature: divides the outputs.
    Source: Wang et al. 2020, arXiv:2002.07376, sec. 4, and the code released with it, which removes the highest of -s.
    Differs: not divided by the sum of all scores, which changes no ranking.
    """
    copied, own = _trained_copy(model, names)
    halves = [half for x, y in _batches("grasp", data, own) for half in _halves(x, y)]
    mean = {name: torch.zeros_like(p) for name, p in own.items()}
    total = {name: torch.zeros_like(p) for name, p in own.items()}
    with few_channels_planar(copied):
        for x, y in halves:
            for name, g in zip(own, _grads(_loss(loss, copied, x, y, temperature), own), strict=True):
                mean[name] += g
        for x, y in halves:
            found = _grads(_loss(loss, copied, x, y, temperature), own, create_graph=True)
            z = torch.stack([(mean[name] * g).sum() for name, g in zip(own, found, strict=True)]).sum()
            for name, h in zip(own, _grads(z, own), strict=True):
                total[name] += h
    return checked("grasp", {name: p.detach() * total[name] for name, p in own.items()})


def checked(score: str, scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """The scores, if all of them are finite."""
    for name, s in scores.items():
        if not torch.isfinite(s).all():
            raise ScoreError(f"score {score!r}, weight {name!r}: not finite; check the model for NaN weights")
    return scores


def _finite(scores: Mapping[str, Tensor]) -> bool:
    return all(bool(torch.isfinite(s).all()) for s in scores.values())


def _trained_copy(model: nn.Module, names: Sequence[str]) -> tuple[nn.Module, dict[str, Tensor]]:
    copied = duplicate(model).train()
    parameters = dict(copied.named_parameters())
    own = {name: parameters[name].requires_grad_(True) for name in names}
    return copied, own


def _batches(score: str, data: Batches, own: Mapping[str, Tensor]) -> Iterator[tuple[Any, Any]]:
    device = next(iter(own.values())).device
    empty = True
    for x, y in data:
        empty = False
        yield on_device(x, device), on_device(y, device)
    if empty:
        raise ScoreError(f"score {score!r} needs data: pass at least one batch of (inputs, targets)")


def _halves(x: Any, y: Any) -> Iterator[tuple[Any, Any]]:
    images = batch_of(x)
    middle = (images + 1) // 2
    for half in (slice(0, middle), slice(middle, images)):
        if half.start < half.stop:
            yield some_of(x, half, images), some_of(y, half, images)


def _loss(loss: Loss, model: nn.Module, x: Any, y: Any, temperature: float = 1.0) -> Tensor:
    """The loss of one batch, with all floating-point outputs divided by the temperature."""
    args, kwargs = as_call(x)
    outputs = model(*args, **kwargs)
    if temperature != 1:
        outputs = pytree.tree_map(
            lambda z: z / temperature if isinstance(z, Tensor) and z.is_floating_point() else z, outputs
        )
    return loss_of(loss, outputs, y)


def _grads(total: Tensor, own: Mapping[str, Tensor], *, create_graph: bool = False) -> list[Tensor]:
    found = torch.autograd.grad(total, list(own.values()), create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(own.values(), found, strict=True)]


def score_by_synflow(weights: "Weights") -> Callable[[Mapping[str, Tensor] | None], dict[str, Tensor]]:
    """SynFlow: scores are taken again as weights go."""
    return Synflow(weights.model, weights.inputs, weights.names)


def score_by_snip(weights: "Weights") -> dict[str, Tensor]:
    """SNIP on all of the data."""
    return snip(weights.model, weights.names, weights.data, weights.loss)


def score_by_grasp(weights: "Weights") -> dict[str, Tensor]:
    """GraSP on all of the data."""
    return grasp(weights.model, weights.names, weights.data, weights.loss)


def score_by_magnitude(weights: "Weights") -> dict[str, Tensor]:
    """Absolute values."""
    return {name: w.abs() for name, w in weights.values.items()}


def score_at_random(weights: "Weights") -> dict[str, Tensor]:
    """Uniform random numbers."""
    generator = torch.Generator().manual_seed(weights.seed)
    return {name: torch.rand(w.shape, generator=generator) for name, w in weights.values.items()}


@dataclass(frozen=True)
class Weights:
    """What a score of initial weights sees.

    Attributes:
        model: untrained; only read.
        inputs: example inputs.
        names: of the weights to score.
        data: (inputs, targets) batches; empty unless the score needs them.
        loss: of (outputs, targets), a mean over the batch.
        seed: of random scores.
    """

    model: nn.Module
    inputs: Inputs
    names: Sequence[str]
    data: Batches
    loss: Loss
    seed: int

    @property
    def values(self) -> dict[str, Tensor]:
        """The weights by name, without gradient."""
        parameters = dict(self.model.named_parameters())
        return {name: parameters[name].detach() for name in self.names}


class WeightScorer(Protocol):
    """Weights -> a score by name, higher = keep; or a function of the masks so far that gives one, asked in rounds."""

    def __call__(
        self, weights: Weights, /
    ) -> dict[str, Tensor] | Callable[[Mapping[str, Tensor] | None], dict[str, Tensor]]: ...


@dataclass(frozen=True)
class WeightScore:
    """An entry of the table.

    Attributes:
        function: see `WeightScorer`.
        summary: one line for lists of choices.
        needs_data: whether it needs batches.
    """

    function: WeightScorer
    summary: str
    needs_data: bool = False


WEIGHT_SCORES: dict[str, WeightScore] = {
    "synflow": WeightScore(
        score_by_synflow, "paths through the weight, signs dropped; iterated, needs no data"
    ),
    "snip": WeightScore(
        score_by_snip, "first-order reaction of the loss to the weight's removal; needs data", True
    ),
    "grasp": WeightScore(
        score_by_grasp, "what the removal does to the norm of the gradient; needs data", True
    ),
    "magnitude": WeightScore(score_by_magnitude, "absolute value"),
    "random": WeightScore(score_at_random, "random numbers: the control"),
}


def weight_score_named(score: str | WeightScorer) -> WeightScore:
    """An entry of `WEIGHT_SCORES`; or one for a `WeightScorer` of your own, given as such or as `module:function`.

    Raises:
        ScoreError: there is no such score.
    """

    def enter(function: WeightScorer, _: str) -> WeightScore:
        return WeightScore(function, "your own", needs_data=bool(getattr(function, "needs_data", False)))

    return look_up("score", score, WEIGHT_SCORES, enter, ScoreError)
