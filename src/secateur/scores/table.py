"""The table of scores. To add one, write a function of `Slice`s and enter it in `SCORES`."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.errors import ScoreError, first_line
from secateur.graph import Graph, Group
from secateur.graph.capture import as_call
from secateur.graph.modes import evaluating, few_channels_planar
from secateur.graph.parts import Parts, train_rest_
from secateur.imports import look_up
from secateur.settings import checked


@dataclass(frozen=True)
class Slice:
    """One tensor of a group, cut into units.

    Attributes:
        role: what the tensor does for the unit: "out" makes it, "in" reads it, "scale" multiplies it, …
        weight: (units, rest).
        grad: (units, rest), gradient of one batch's mean loss; None for scores that need no data.
    """

    role: str
    weight: Tensor
    grad: Tensor | None = None


ScoreFunction = Callable[[Sequence[Slice], torch.Generator], Tensor]


@dataclass(frozen=True)
class Score:
    """An entry of the table.

    Attributes:
        function: (slices of a group, generator) -> (units,), higher = keep.
        summary: one line for lists of choices.
        needs_data: whether gradients on data are needed; the score is then averaged over the batches.
        comparable: whether scores of different groups share a unit, so that a global ranking takes them as
            they are; others are divided by their group's mean first.
    """

    function: ScoreFunction
    summary: str
    needs_data: bool = False
    comparable: bool = False


def made_by(slices: Sequence[Slice]) -> list[Slice]:
    """The slices of the layers that make the units, whose filters the classic scores rank."""
    producers = [s for s in slices if s.role == "out"]
    if not producers:
        raise ScoreError(
            "the weights that make its units are computed from other tensors. Make them parameters again "
            "(torch.nn.utils.prune.remove, parametrize.remove_parametrizations), or freeze= their module"
        )
    return producers


def l1(slices: Sequence[Slice], generator: torch.Generator) -> Tensor:
    """Score each unit by the L1 norm of the filters that make it.

        s_u = sum over making layers and r of |w[u, r]|

    Source: Li et al. 2017, arXiv:1608.08710, sec. 3.1.
    Differs: units shared by several layers (residual streams) sum over all of them; the paper ranks by one.

    >>> l1([Slice("out", torch.tensor([[3., -4.], [0., 1.]]))], torch.Generator())
    tensor([7., 1.])
    """
    return torch.stack([s.weight.abs().sum(1) for s in made_by(slices)]).sum(0)


def l2(slices: Sequence[Slice], generator: torch.Generator) -> Tensor:
    """Score each unit by the L2 norm of the filters that make it.

        s_u = sqrt(sum over making layers and r of w[u, r]^2)

    Source: the L2 variant of Li et al. 2017, arXiv:1608.08710, sec. 3.1.
    Differs: units shared by several layers take the norm over all of them.

    >>> l2([Slice("out", torch.tensor([[3., -4.], [0., 1.]]))], torch.Generator())
    tensor([5., 1.])
    """
    return torch.stack([s.weight.square().sum(1) for s in made_by(slices)]).sum(0).sqrt()


def bn_scale(slices: Sequence[Slice], generator: torch.Generator) -> Tensor:
    """Score each unit by the batch-norm scales that multiply it.

        s_u = sum over norms of |gamma[u]|

    Raises:
        ScoreError: the group has no normalisation with a scale.
    Source: Liu et al. 2017 (network slimming), arXiv:1708.06519, sec. 3.
    Differs: no sparsity penalty is trained first; units with several norms sum over them.

    >>> bn_scale([Slice("scale", torch.tensor([[-2.], [1.]]))], torch.Generator())
    tensor([2., 1.])
    """
    scales = [s.weight.abs().sum(1) for s in slices if s.role == "scale"]
    if not scales:
        raise ScoreError("no batch-norm follows this group; choose a score such as l2, or freeze the group")
    return torch.stack(scales).sum(0)


def taylor(slices: Sequence[Slice], generator: torch.Generator) -> Tensor:
    """Score each unit by the first-order change of one batch's loss when it is removed.

        s_u = |sum over norms of g_gamma[u] * gamma[u] + g_beta[u] * beta[u]|

    which is the change when the unit's normalised output becomes zero; without a norm, filters and biases
    of the making layers take the place of gamma and beta. `score_groups` averages over the batches.

    Source: Molchanov et al. 2019, arXiv:1906.10771, sec. 3 (Taylor-FO after batch-norm).
    Differs: the norm's shift is counted too; units with several norms sum over them; absolute values are
    averaged where the paper averages squares.

    >>> taylor([Slice("out", torch.tensor([[3., -4.]]), torch.tensor([[1., .5]]))], torch.Generator())
    tensor([1.])
    """
    roles = ("scale", "shift") if any(s.role == "scale" for s in slices) else ("out", "bias")
    parts = [(s.weight * s.grad).sum(1) for s in slices if s.role in roles and s.grad is not None]
    if not parts:
        raise ScoreError(
            "no gradients reach this group; pass data, and check that the loss depends on the layer"
        )
    return torch.stack(parts).sum(0).abs()


def group_l2(slices: Sequence[Slice], generator: torch.Generator) -> Tensor:
    """Score each unit by the mean energy of everything that makes, scales or reads it.

        s_u = mean over making layers, scales and reading layers of (sum over r of w[u, r]^2)

    Source: Fang et al. 2023 (DepGraph), arXiv:2301.12900, sec. 3.2, and the authors' code.
    Differs: divided by the mean over the group, as other norms are, when groups are compared.

    >>> group_l2([Slice("out", torch.tensor([[3., -4.]])), Slice("in", torch.tensor([[1., 2.]]))], torch.Generator())
    tensor([15.])
    """
    parts = [
        s.weight.square().sum(1) for s in slices if s.role in ("out", "depthwise", "scale", "in", "recurrent")
    ]
    if not parts:
        raise ScoreError(f"a group of roles {[s.role for s in slices]} has no weights to measure")
    return torch.stack(parts).mean(0)


def uniform_noise(slices: Sequence[Slice], generator: torch.Generator) -> Tensor:
    """Score each unit by a uniform random number: the control every score must beat.

    Source: none; the usual control. Differs: nothing.

    >>> uniform_noise([Slice("out", torch.zeros(2, 3))], torch.Generator().manual_seed(0)).shape
    torch.Size([2])
    """
    return torch.rand(len(slices[0].weight), generator=generator)


SCORES: dict[str, Score] = {
    "l1": Score(l1, "L1 norm of the filters that make the unit"),
    "l2": Score(l2, "L2 norm of the filters that make the unit"),
    "group-l2": Score(group_l2, "mean energy of all that makes, scales or reads the unit (DepGraph)"),
    "bn-scale": Score(bn_scale, "batch-norm scales of the unit (network slimming)"),
    "taylor": Score(
        taylor, "first-order change of the loss on calibration data", needs_data=True, comparable=True
    ),
    "random": Score(uniform_noise, "uniform random numbers: the control"),
}


def score_named(score: str | ScoreFunction) -> Score:
    """An entry of `SCORES`; or one for a function of your own, or for the one that `module:function` names.

    A function is a `ScoreFunction`. If it has an attribute `needs_data` that is true, it gets gradients.

    Raises:
        ScoreError: there is no such score.

    >>> score_named(lambda slices, generator: slices[0].weight.amax(1)).needs_data
    False
    """

    def enter(function: ScoreFunction, _: str) -> Score:
        return Score(function, "your own", needs_data=bool(getattr(function, "needs_data", False)))

    return look_up("score", score, SCORES, enter, ScoreError)


@checked(ScoreError)
def score_groups(
    model: nn.Module,
    graph: Graph,
    score: str | ScoreFunction,
    *,
    seed: int = 0,
    data: Iterable[tuple[Any, Any]] | None = None,
    loss: Callable[[Any, Any], Tensor] = nn.functional.cross_entropy,
) -> list[Tensor]:
    """Score the units of every group.

    Args:
        model: the model the graph was made from; it is only read (gradients are taken aside).
        score: as for `score_named`.
        seed: for scores that draw random numbers.
        data: (inputs, targets) batches, for scores that need gradients; inputs are what `analyze` takes, targets what
            the loss takes: tensors, or tensors in tuples, lists and dicts.
        loss: of (outputs, targets), a mean over the batch; outputs are what the model returns.
    Returns:
        one (units,) float32 tensor per group, on the CPU; higher = keep.
    Raises:
        ScoreError: unknown score, missing data, or a group the score cannot rank.
    """
    entry = score_named(score)
    if entry.needs_data and data is None:
        raise ScoreError(
            f"score {score!r} needs gradients on data: pass data=, an iterable of (inputs, targets)"
        )
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty:
        raise ScoreError(f"{empty[0]} has no values (device meta); load the weights before scoring them")
    generator = torch.Generator().manual_seed(seed)
    batches = (
        gradients(model, data, loss, graph.parts) if entry.needs_data and data is not None else iter([{}])
    )
    parameters = dict(model.named_parameters())
    total = [torch.zeros(group.units, dtype=torch.float64) for group in graph.groups]
    count = 0
    for grads in batches:
        count += 1
        for group, sum_ in zip(graph.groups, total, strict=True):
            try:
                sum_ += entry.function(group_slices(group, parameters, grads), generator).detach().cpu()
            except ScoreError as error:
                raise ScoreError(f"score {score!r}, group {group.name!r}: {error}") from None
    if not count:
        raise ScoreError("the calibration data is empty; pass at least one batch of (inputs, targets)")
    for group, sum_ in zip(graph.groups, total, strict=True):
        if not torch.isfinite(sum_).all():
            raise ScoreError(
                f"score {score!r}, group {group.name!r}: not finite; check the model for NaN weights"
            )
    return [(sum_ / count).float() for sum_ in total]


def group_slices(group: Group, parameters: Mapping[str, Tensor], grads: Mapping[str, Tensor]) -> list[Slice]:
    """What a score sees of a group; buffers are left out."""
    return [
        Slice(
            m.role,
            m.take(parameters[m.tensor].detach()),
            m.take(grads[m.tensor]) if m.tensor in grads else None,
        )
        for m in group.members
        if m.tensor in parameters
    ]


def gradients(
    model: nn.Module,
    data: Iterable[tuple[Any, Any]],
    loss: Callable[[Any, Any], Tensor],
    parts: Parts | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Gradient of each batch's mean loss, in evaluation mode, per parameter.

    A model that was captured in parts, such as a detector, gives its losses in training mode only and asks for the
    targets itself: all but its parts is in that mode then, and `targets` is passed if its forward has such an argument.
    `.grad`, `requires_grad` and the modes of the user's model are as they were after every batch.

    Raises:
        ScoreError: the loss does not take what the model returns, or is no number with a gradient.
    """
    named = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    required = {p: p.requires_grad for p in named.values()}
    device = next(iter(named.values())).device
    for x, y in data:
        with evaluating(model), few_channels_planar(model):
            try:
                for p in required:
                    p.requires_grad_(True)
                y = on_device(y, device)
                args, kwargs = as_call(on_device(x, device))
                if parts is not None:
                    train_rest_(model, parts)
                    kwargs = with_targets(model, args, kwargs, y)
                value = loss_of(loss, outputs_of(model, args, kwargs, parts is not None), y)
                found = torch.autograd.grad(value, list(required), allow_unused=True)
            finally:
                for p, flag in required.items():
                    p.requires_grad_(flag)
        yield {name: g for name, g in zip(named, found, strict=True) if g is not None}


def with_targets(model: nn.Module, args: Any, kwargs: dict[str, Any], targets: Any) -> dict[str, Any]:
    """The keyword arguments with the targets, if forward takes them under this name and has not got them yet."""
    signature = inspect.signature(model.forward)
    given = signature.bind_partial(*args, **kwargs).arguments
    return (
        {**kwargs, "targets": targets}
        if {"targets"} <= signature.parameters.keys() - given.keys()
        else kwargs
    )


def outputs_of(model: nn.Module, args: Any, kwargs: dict[str, Any], training: bool) -> Any:
    """What a model returns.

    Raises:
        ScoreError: it fails in training mode.
    """
    try:
        return model(*args, **kwargs)
    except Exception as error:
        if not training:
            raise
        raise ScoreError(
            f"{type(model).__name__} fails in training mode ({first_line(error)}). Gradients are taken there: pass "
            f"data=, batches of (images, targets) as in its own training, and loss=, a function of (losses, targets)"
        ) from error


def on_device(tree: Any, device: torch.device) -> Any:
    """The same tree of tensors on a device."""
    return pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, tree)


def loss_of(loss: Callable[[Any, Any], Tensor], outputs: Any, targets: Any) -> Tensor:
    """The loss of one batch.

    Raises:
        ScoreError: it cannot be computed from these outputs, or is no number with a gradient.
    """
    what = f"outputs {_described(outputs)} and targets {_described(targets)}"
    help_ = "Pass loss=, a function of (outputs, targets) that gives one number, such as lambda outputs, targets: …"
    try:
        value = loss(outputs, targets)
    except Exception as error:
        raise ScoreError(f"the loss fails on {what} ({type(error).__name__}: {error}). {help_}") from error
    if not (isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad):
        raise ScoreError(f"the loss of {what} is {_described(value)}, no number with a gradient. {help_}")
    return value


def _described(tree: Any) -> str:
    if isinstance(tree, Tensor):
        return f"{tuple(tree.shape)}"
    if isinstance(tree, Mapping):
        return "{" + ", ".join(f"{name}: {_described(x)}" for name, x in tree.items()) + "}"
    if isinstance(tree, tuple | list):
        return "(" + ", ".join(map(_described, tree)) + ")"
    return type(tree).__name__
