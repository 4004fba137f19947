"""Proof that a cut model computes what the masked original computes."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.errors import CutError
from secateur.graph import Graph
from secateur.graph.capture import as_call, with_batch
from secateur.plan import Plan
from secateur.surgery.cut import cut_copy
from secateur.surgery.mask import mask_

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Largest relative error of an equal pair: rounding of sums in another order stays far below."""

SENSITIVE = 1e-3
"""Relative difference between the outputs of two images below which a comparison shows little."""


@dataclass(frozen=True)
class Verification:
    """What was compared and how far apart it was; relative errors are divided by the largest output.

    Attributes:
        max_abs_error: float64, over all outputs of all random images.
        max_rel_error: float64.
        max_abs_error_float32: the same in float32.
        max_rel_error_float32: the same in float32.
        sensitivity: largest relative difference between the outputs of two images.
        randomised: True when the outputs hardly depend on the image, so that the structure was compared
            on random weights instead.
        trains: one backward pass through the cut model, in training mode, gave finite gradients.
    """

    max_abs_error: float
    max_rel_error: float
    max_abs_error_float32: float
    max_rel_error_float32: float
    sensitivity: float
    randomised: bool
    trains: bool

    @property
    def ok(self) -> bool:
        """Whether the cut model equals the masked original up to rounding, and can be trained."""
        return (
            self.max_rel_error <= TOLERANCE[torch.float64]
            and self.max_rel_error_float32 <= TOLERANCE[torch.float32]
            and self.trains
        )

    def __str__(self) -> str:
        verdict = "equal" if self.ok else "NOT equal"
        return (
            f"{verdict} to the masked original: max error {self.max_abs_error:.1e} in float64 "
            f"({self.max_rel_error:.1e} relative), {self.max_abs_error_float32:.1e} in float32"
        )


def verify(model: nn.Module, cut: nn.Module, graph: Graph, plan: Plan, *, seed: int = 0) -> Verification:
    """Compare a cut model with the masked original on random images, in float64 and float32.

    Both run in evaluation mode on copies; model and cut model are only read. Where the weights hide errors
    (a freshly initialised network can answer the same to every image), the comparison is repeated on
    random weights, cut and masked by the same plan.

    Args:
        model: the original, uncut.
        cut: the same model after `cut_`, before any further training.
        graph: from `analyze(model, …)`.
        plan: what was cut.
        seed: of the random images.
    Raises:
        PlanError: the plan does not fit the graph.
        CutError: the outputs do not have the same shapes.
    """
    randomised = False
    pair = model, cut
    absolute, relative, sensitivity = compare(*pair, graph, plan, torch.float64, seed)
    if sensitivity < SENSITIVE:
        randomised = True
        whole = randomise_(copy.deepcopy(model), seed)
        pair = whole, cut_copy(whole, graph, plan)
        stressed = compare(*pair, graph, plan, torch.float64, seed)
        absolute, relative, sensitivity = max(absolute, stressed[0]), max(relative, stressed[1]), stressed[2]
    absolute32, relative32, _ = compare(*pair, graph, plan, torch.float32, seed)
    return Verification(
        absolute, relative, absolute32, relative32, sensitivity, randomised, trains(cut, graph, seed)
    )


def compare(
    model: nn.Module, cut: nn.Module, graph: Graph, plan: Plan, dtype: torch.dtype, seed: int
) -> tuple[float, float, float]:
    """Largest absolute and relative error, and sensitivity, in one precision."""
    args, kwargs = random_inputs(graph, dtype, seed)
    with torch.no_grad():
        reference = outputs(mask_(copy.deepcopy(model).to(dtype), graph, plan).eval(), args, kwargs)
        result = outputs(copy.deepcopy(cut).to(dtype).eval(), args, kwargs)
    if [t.shape for t in reference] != [t.shape for t in result]:
        raise CutError(
            f"{type(model).__name__}: outputs of the cut model have shapes {[tuple(t.shape) for t in result]}, "
            f"of the original {[tuple(t.shape) for t in reference]}"
        )
    error = max(((a - b).abs().max().item() for a, b in zip(reference, result, strict=True)), default=0.0)
    scale = max((a.abs().max().item() for a in reference), default=0.0)
    spread = max(((a[:1] - a[1:]).abs().max().item() for a in reference if len(a) > 1), default=0.0)
    if not all(torch.isfinite(t).all() for t in (*reference, *result)):
        error = float("inf")
    return error, error / scale if scale else error, spread / scale if scale else 0.0


def outputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The floating-point tensors a model returns."""
    leaves = pytree.tree_leaves(model(*args, **kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim]


def random_inputs(graph: Graph, dtype: torch.dtype, seed: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Two random images (normal) of the shape of the example inputs; integer inputs as they are."""
    generator = torch.Generator().manual_seed(seed)

    def random(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device, dtype)

    args, kwargs = as_call(with_batch(graph.inputs, 2))
    return pytree.tree_map(random, args), pytree.tree_map(random, kwargs)


def randomise_(model: nn.Module, seed: int) -> nn.Module:
    """Give every parameter and batch-norm statistic values that hide nothing; shapes and modes stay."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            if not t.is_floating_point():
                continue
            noise = torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device, t.dtype)
            if t.ndim > 1:
                t.copy_(noise * (2 / t[0].numel()) ** 0.5)
            elif name.endswith("running_var") or name.endswith("weight"):
                t.copy_(1 + 0.5 * noise.tanh())
            else:
                t.copy_(0.3 * noise)
    return model


def trains(model: nn.Module, graph: Graph, seed: int) -> bool:
    """Whether one training-mode forward and backward pass of a copy gives finite gradients."""
    trained = copy.deepcopy(model).float().train()
    for parameter in trained.parameters():
        parameter.requires_grad_(True)
        parameter.grad = None
    args, kwargs = random_inputs(graph, torch.float32, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        total = torch.stack([t.float().pow(2).mean() for t in outputs(trained, args, kwargs)]).sum()
    total.backward()  # type: ignore[no-untyped-call]
    grads = [p.grad for p in trained.parameters() if p.grad is not None]
    return bool(grads) and all(torch.isfinite(g).all().item() for g in grads)
