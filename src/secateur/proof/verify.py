"""Proof that a cut model computes what the original computes without the removed units."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.errors import CutError, SecateurError, first_line
from secateur.graph import Graph, analyze, named_tensors
from secateur.graph.capture import Inputs, as_call, capture
from secateur.graph.duplicate import duplicate
from secateur.graph.groups import check_model
from secateur.graph.guard import uncompiled, written_out
from secateur.graph.modes import chance_kept, default_precision, evaluating
from secateur.graph.parts import rest_fails
from secateur.graph.positions import kept_positions
from secateur.graph.probe import (
    aliases,
    difference,
    fit_norms_,
    floats,
    random_inputs,
    randomise_,
)
from secateur.graph.samples import main_leaf, sampled
from secateur.plan import Plan
from secateur.proof.choices import Choices
from secateur.proof.reference import Reference, run_fixed
from secateur.rewriting.elsewhere import look_elsewhere
from secateur.rewriting.rewrite import cut_listing, fixed_program, rewritten_modules, tensors_of
from secateur.rewriting.settle import fixes_precision, precision
from secateur.settings import checked
from secateur.surgery.cut import tensor_cuts
from secateur.surgery.edit import select
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
        trains: one backward pass through the cut model, in training mode, gave finite gradients, or the
            original cannot be trained either.
        parts: names of the submodules that were compared, where the model was captured in parts; empty: all of it was.
        rest: why what stands between these parts does not do the same on what is left; "" if it does.
        untrained: why the original cannot be trained, so that no training step was compared; "" if it can.
        statistics: "module (operator)" wherever a statistic is taken over channels of which some were removed, and
            "module (block)" where a block was removed that zero weights do not silence. Empty: the reference is the
            original with zeros for the removed units. Otherwise it is the original's graph with statistics over the
            survivors and without the block.
        rewritten: names of modules whose forward was rewritten, since their own cannot express the widths;
            "" is the model itself. Where training mode loses something, the name is followed by what.
        replayed: True when float64 was compared on the captured graphs, because forward itself computes in
            another precision.
        tied: "module takes … only: why" for rewritten modules that take fewer image sizes than before.
        sizes: shapes of the images of the further comparison, with another batch and, where the original takes it,
            another image size, such as "3 × 3 × 160 × 128".
        elsewhere: relative error of that comparison; 0 if there was none.
        uncompared: why another batch or image size was not compared, in words; "" if both were.
        choices: names of operators (top-k, argmax, a threshold) at which rounding in float32 made the cut model choose
            something else. There float32 was compared with the choices of the original: what is chosen from, and
            everything that follows. Float64 compares the whole as it is.
        stale: what may be wrong on other ways through the modules than the one that was compared (export, fusing,
            training branches), in words: numbers named like a width that was cut, which such code reads and for which
            no value is certain, and methods that do not work any more.
    """

    max_abs_error: float
    max_rel_error: float
    max_abs_error_float32: float
    max_rel_error_float32: float
    sensitivity: float
    randomised: bool
    trains: bool
    statistics: tuple[str, ...] = ()
    rewritten: tuple[str, ...] = ()
    replayed: bool = False
    tied: tuple[str, ...] = ()
    sizes: str = ""
    elsewhere: float = 0.0
    uncompared: str = ""
    untrained: str = ""
    parts: tuple[str, ...] = field(default=(), repr=False)
    rest: str = field(default="", repr=False)
    choices: tuple[str, ...] = ()
    stale: tuple[str, ...] = field(default=(), repr=False)

    @property
    def ok(self) -> bool:
        """Whether the cut model equals the reference up to rounding, and can be trained."""
        return (
            self.max_rel_error <= TOLERANCE[torch.float64]
            and self.max_rel_error_float32 <= TOLERANCE[torch.float32]
            and self.elsewhere <= TOLERANCE[torch.float32]
            and self.trains
            and not self.rest
        )

    @property
    def form(self) -> str:
        """What the user gets, in words."""
        if not self.rewritten:
            return "the model's own forward runs at the new widths"
        names = ", ".join(name or "the whole model" for name in self.rewritten[:4])
        more = f" and {len(self.rewritten) - 4} more" if len(self.rewritten) > 4 else ""
        tied = f"; of these, {'; '.join(self.tied[:2])}" if self.tied else ""
        also = f" and {len(self.tied) - 2} more are tied to sizes" if len(self.tied) > 2 else ""
        return f"forward was rewritten for the new widths in {names}{more}{tied}{also}"

    def __str__(self) -> str:
        verdict = "equal" if self.ok else "NOT equal"
        over = " with statistics over the survivors" if self.statistics else ""
        trains = (
            "" if self.trains else "; it cannot be trained: a training-mode pass fails or gives no gradients"
        )
        if self.untrained:
            trains = (
                f"; no training step was compared, since the original cannot be trained ({self.untrained})"
            )
        between = f"; the rest does the same between its {len(self.parts)} parts" if self.parts else ""
        if self.rest:
            between = f"; what stands between its parts does not go on as before: {self.rest}"
        return (
            f"{verdict} to the masked original{over}: max error {self.max_abs_error:.1e} in float64 "
            f"({self.max_rel_error:.1e} relative), {self.max_abs_error_float32:.1e} in float32{self._chosen}"
            f"{self._further}{between}; {self.form}{trains}{self._stale}"
        )

    @property
    def _stale(self) -> str:
        more = f" and {len(self.stale) - 2} more" if len(self.stale) > 2 else ""
        return f"; may be stale: {'; '.join(self.stale[:2])}{more}" if self.stale else ""

    @property
    def _chosen(self) -> str:
        return f" with the same choices ({', '.join(self.choices)})" if self.choices else ""

    @property
    def _further(self) -> str:
        at = f", {self.elsewhere:.1e} relative at {self.sizes}" if self.sizes else ""
        return f"{at} ({self.uncompared})" if self.uncompared else at


@uncompiled
@checked(CutError)
def verify(model: nn.Module, cut: nn.Module, graph: Graph, plan: Plan, *, seed: int = 0) -> Verification:
    """Compare a cut model with the original without the removed units, in float64 and float32.

    The reference is the original's own forward on weights in which the removed units are zero. Where the plan
    removes channels over which something takes a statistic (LayerNorm, softmax, a mean), zeros are not
    enough, and the reference is the original's captured graph with statistics over the survivors.

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
    plan.check(graph)
    check_model(model, graph)
    the_model, the_cut = model, cut
    model, cut = graph.view(model), graph.view(cut)
    randomised = False
    pair = model, cut
    errors = compare(*pair, graph, plan, torch.float64, seed)
    worst = errors
    if errors.sensitivity < SENSITIVE:
        randomised = True
        whole = randomise_(duplicate(model), seed)
        fit_norms_(whole, *random_inputs(graph, precision(whole), seed))
        pair = whole, with_values_of(whole, cut, graph, plan)
        errors = compare(*pair, graph, plan, torch.float64, seed)
        worst = errors if not errors.relative <= worst.relative else worst
    single = compare(*pair, graph, plan, torch.float32, seed)
    if not single.relative <= TOLERANCE[torch.float32]:
        single = compare(*pair, graph, plan, torch.float32, seed, choices=Choices())
    names = rewritten_modules(cut)
    sizes, further, uncompared = compare_elsewhere(*pair, graph, plan, errors, seed)
    fails = training_fails(cut, graph, seed)
    untrained = training_fails(model, graph, seed) if fails else ""
    rest = rest_of(the_model, the_cut, graph, plan)
    return Verification(
        max_abs_error=worst.absolute,
        max_rel_error=worst.relative,
        max_abs_error_float32=single.absolute,
        max_rel_error_float32=single.relative,
        sensitivity=errors.sensitivity,
        randomised=randomised,
        trains=not fails or bool(untrained),
        statistics=errors.statistics,
        rewritten=tuple(
            f"{n or 'the whole model'} (without {m.lost})" if m.lost else n for n, m in names.items()
        ),
        replayed=errors.replayed,
        tied=tuple(f"{n or 'the whole model'} {m.tied}" for n, m in names.items() if m.tied),
        sizes=sizes,
        elsewhere=further,
        uncompared=uncompared,
        untrained=untrained,
        rest=rest,
        parts=tuple(graph.parts.names) if graph.parts else (),
        choices=single.choices,
        stale=tuple(look_elsewhere(model, cut, random_inputs(graph, torch.float32, seed)).stale),
    )


def rest_of(model: nn.Module, cut: nn.Module, graph: Graph, plan: Plan) -> str:
    """Why the rest of a model that was captured in parts does not go on as before; "" if it does."""
    if graph.parts is None:
        return ""
    assert graph.trace is not None
    survivors = graph.trace.survivors(plan.masks(graph))
    kept = [survivors.keep(graph.trace.values[node]) for node in graph.trace.captured.borders]
    keep = dict(zip(graph.parts.borders, kept, strict=True))
    return rest_fails(graph.parts, model, cut, keep)


@dataclass(frozen=True)
class Errors:
    """One comparison: see `Verification`."""

    absolute: float
    relative: float
    sensitivity: float
    statistics: tuple[str, ...]
    replayed: bool
    choices: tuple[str, ...] = ()


def compare(
    model: nn.Module,
    cut: nn.Module,
    graph: Graph,
    plan: Plan,
    dtype: torch.dtype,
    seed: int,
    *,
    choices: Choices | None = None,
) -> Errors:
    """Compare in one precision, if wanted with the choices of the original."""
    assert graph.trace is not None
    survivors = graph.trace.survivors(plan.masks(graph))
    masked = mask_(duplicate(model).to(dtype), graph, plan)
    small = duplicate(cut).to(dtype)
    given = random_inputs(graph, dtype, seed)
    reference = Reference(graph.trace, survivors)
    expected = replay = None
    if reference.needed:
        with choices.recorded() if choices else nullcontext():
            replay = floats(reference.run(given, dict(named_tensors(masked))))
    if not reference.sites:
        with choices.recorded() if choices else nullcontext():
            expected = run_own(masked, given)
    else:
        expected = replay
    with choices.repeated(TOLERANCE[dtype]) if choices else nullcontext():
        found, replayed = run_own(small, given), False
    if dtype is torch.float64 and not agree(expected, found):
        # a forward that names a precision rounds to it, whatever the tensors are
        lines, _ = cut_listing(graph.trace, survivors)
        if expected is None or found is None or fixes_precision(lines):
            replayed = True
            expected = replay or floats(reference.run(given, dict(named_tensors(masked))))
            tensors = tensors_of(lines, aliases(small, {}))
            found = floats(run_fixed(fixed_program(lines), pytree.tree_leaves(given), tensors, lines.call))
    if expected is None or found is None:
        raise CutError(f"{type(model).__name__}: it does not run in {dtype}, so that nothing can be compared")
    if [t.shape for t in expected] != [t.shape for t in found]:
        raise CutError(
            f"{type(model).__name__}: outputs of the cut model have shapes {[tuple(t.shape) for t in found]}, "
            f"of the original {[tuple(t.shape) for t in expected]}"
        )
    error, relative = difference(expected, found)
    relative = max(relative, choices.apart) if choices else relative
    scale = max((a.abs().max().item() for a in expected), default=0.0)
    spread = max(((a[:1] - a[1:]).abs().max().item() for a in expected if len(a) > 1), default=0.0)
    spread, overruled = spread / scale if scale else 0.0, tuple(choices.overruled) if choices else ()
    return Errors(error, relative, spread, tuple(reference.sites), replayed, overruled)


def compare_elsewhere(
    model: nn.Module, cut: nn.Module, graph: Graph, plan: Plan, errors: Errors, seed: int
) -> tuple[str, float, str]:
    """Compare once more, with another batch and, where the original takes it, another image size.

    Args:
        errors: of the comparison at the size of the analysis.
    Returns:
        the shape of the images, or ""; the relative error; and what could not be compared, in words.
    """
    assert graph.trace is not None
    captured = graph.trace.captured
    given, others = sampled(model, graph.given, captured.batching, captured.batch, most=1)
    reason = "" if others else "the original takes no other image size"
    dtype = torch.float32 if errors.replayed else torch.float64
    for inputs in [*others, *given[1:]]:
        call = pytree.tree_map(
            lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, as_call(inputs)
        )
        try:
            expected = expected_at(call, inputs, model, graph, plan, errors, dtype)
            found = run_own(duplicate(cut).to(dtype), call)
        except SecateurError as error:
            reason = (
                reason or f"not compared at another image size: {str(error).partition(';')[0].rstrip('.')}"
            )
            continue
        if expected is None:
            reason = reason or "the original takes no other image size"
            continue
        apart = difference(expected, found)[1] if found is not None else float("inf")
        if not apart <= TOLERANCE[torch.float32] and not same_groups(model, inputs, graph):
            reason = (
                reason
                or f"at {sizes_of(inputs)} its channels mean something else, and this cut does not hold"
            )
            continue
        return sizes_of(inputs), apart, reason
    return "", 0.0, "the original takes no other batch" if not reason else f"{reason}, and no other batch"


def expected_at(
    call: Any, inputs: Inputs, model: nn.Module, graph: Graph, plan: Plan, errors: Errors, dtype: torch.dtype
) -> list[Tensor] | None:
    """The outputs of the original without the removed units; None if it does not run.

    Raises:
        SecateurError: its graph at these sizes is not that of the analysis.
    """
    assert graph.trace is not None
    masked = mask_(duplicate(model).to(dtype), graph, plan)
    if not errors.statistics:
        return run_own(masked, call)
    captured = capture(model, inputs, exact=True)
    reference = Reference(graph.trace, graph.trace.survivors(plan.masks(graph)), captured)
    try:
        return floats(reference.run(call, dict(named_tensors(masked))))
    except RuntimeError as error:
        raise CutError(f"the original's graph does not run at this size ({first_line(error)})") from error


def same_groups(model: nn.Module, inputs: Inputs, graph: Graph) -> bool:
    """Whether the groups of an analysis are also groups for inputs of another size."""

    def described(some: Graph) -> set[frozenset[tuple[str, int, bytes]]]:
        return {
            frozenset((m.tensor, m.dim, m.index.tobytes()) for m in group.members)
            for group in some.groups
            if not group.branch
        }

    try:
        return described(graph) <= described(analyze(model, inputs))
    except SecateurError:
        return False


def sizes_of(inputs: Inputs) -> str:
    """The shape of the images in words."""
    main = main_leaf(inputs)
    return " × ".join(map(str, main.shape)) if main is not None else ""


def agree(expected: list[Tensor] | None, found: list[Tensor] | None) -> bool:
    """Whether both are known and equal in float64."""
    if expected is None or found is None:
        return False
    return difference(expected, found)[1] <= TOLERANCE[torch.float64]


def run_own(model: nn.Module, given: tuple[tuple[Any, ...], dict[str, Any]]) -> list[Tensor] | None:
    """The outputs of a model's own forward; None if it does not run in this precision."""
    args, kwargs = given
    model = duplicate(model, share=True)  # a forward may write to its buffers
    try:
        with (
            evaluating(model),
            written_out(),
            default_precision(precision(model)),
            torch.no_grad(),
            chance_kept(),
        ):
            torch.manual_seed(0)
            return floats(model(*args, **kwargs))
    except SecateurError:  # it says itself what it does not take
        raise
    except Exception:  # whatever its own code raises
        return None


def with_values_of(whole: nn.Module, cut: nn.Module, graph: Graph, plan: Plan) -> nn.Module:
    """A copy of a cut model with the values of another original."""
    small = duplicate(cut)
    tensors = dict(named_tensors(small))
    keep = kept_positions(whole, graph, plan.masks(graph))
    cuts = {id(tensor): dims for tensor, dims in tensor_cuts(whole, keep)}
    with torch.no_grad():
        for name, tensor in named_tensors(whole):
            if name in tensors and tensors[name].numel():  # not of a block that was left out
                tensors[name].copy_(select(tensor, cuts.get(id(tensor), {})))
    return small


def training_fails(model: nn.Module, graph: Graph, seed: int) -> str:
    """Why a training-mode forward and backward pass of a copy gives no finite gradients; "" if it does."""
    trained = duplicate(model).float().train()
    for parameter in trained.parameters():
        parameter.requires_grad_(True)
        parameter.grad = None
    args, kwargs = random_inputs(graph, torch.float32, seed)
    with chance_kept(), torch.enable_grad():
        torch.manual_seed(seed)
        try:
            found = floats(trained(*args, **kwargs))
            total = torch.stack([t.float().pow(2).mean() for t in found]).sum()
            if not total.requires_grad:
                return "its outputs have no gradients"
            total.backward()  # type: ignore[no-untyped-call]
        except (
            Exception
        ) as error:  # whatever its own code raises, such as where it writes over what it has read
            return first_line(error)
    grads = [p.grad for p in trained.parameters() if p.grad is not None]
    finite = bool(grads) and all(torch.isfinite(g).all().item() for g in grads)
    return "" if finite else "its gradients are not finite"
