"""Proof that a cut model computes what the original computes without the removed units."""

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from secateur.errors import CutError, SecateurError, first_line
from secateur.graph import Graph, analyze, named_tensors
from secateur.graph.capture import Inputs, as_call, batch_of, capture
from secateur.graph.duplicate import cloned, converted, duplicate
from secateur.graph.groups import check_model
from secateur.graph.guard import uncompiled, untouched, written_out
from secateur.graph.modes import chance_kept, default_precision, evaluating, few_channels_planar
from secateur.graph.parts import rest_fails
from secateur.graph.positions import kept_positions
from secateur.graph.probe import aliases, difference, fit_norms_, floats, random_inputs, randomise_
from secateur.graph.samples import SHRUNK, SMALLEST, Size, elsewhere, main_leaf, random_floats, shapes_of
from secateur.graph.trace import Survivors, Trace
from secateur.plan import Plan
from secateur.proof.choices import Choices
from secateur.proof.reference import Reference, run_fixed
from secateur.rewriting.elsewhere import look_elsewhere
from secateur.rewriting.listing import list_operators
from secateur.rewriting.rewrite import cut_listing, fixed_program, rewritten_modules, tensors_of
from secateur.rewriting.settle import fixes_precision, precision
from secateur.settings import checked
from secateur.surgery.cut import tensor_cuts
from secateur.surgery.edit import select
from secateur.surgery.mask import mask_

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a forward."""

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Largest relative error of an equal pair: rounding of sums in another order stays far below."""

SENSITIVE = 1e-3
"""Relative difference between the outputs of two images below which a comparison shows little."""


@dataclass(frozen=True)
class Verification:
    """What was compared and how far apart it was; relative errors are divided by the largest output.

    Attributes:
        max_abs_error: float64, over all outputs of all random images, at the smaller of the two sizes.
        max_rel_error: float64.
        max_abs_error_float32: of the cut model in float32, at the larger of the two sizes.
        max_rel_error_float32: the same.
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
        sizes: shapes of the images where they were compared besides the size of the analysis, with another batch and,
            where the original takes it, another image size, such as "3 × 3 × 64 × 96".
        elsewhere: relative error there; 0 if there was no such comparison.
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

    The networks are compared at the image size of the analysis and, where the original takes it, at another one, with
    another number of images: at the smaller of both in float64, at the larger in float32. Both run in evaluation mode
    on copies; model and cut model are only read. Where the weights hide errors (a freshly initialised network can
    answer the same to every image), the comparison is repeated on random weights, cut and masked by the same plan.

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
    pair = Pair(model, cut, graph, plan, seed)
    first = pair.compare()
    randomised = first.sensitivity < SENSITIVE
    errors = pair.compare(randomised=True) if randomised else first
    worst = errors if not errors.relative <= first.relative else first
    few = pair.places[0].inputs
    fails = training_fails(cut, graph, seed, few)
    untrained = training_fails(model, graph, seed, few) if fails else ""
    names = rewritten_modules(cut)
    rest = rest_of(the_model, the_cut, graph, plan)
    return Verification(
        max_abs_error=worst.absolute,
        max_rel_error=worst.relative,
        max_abs_error_float32=errors.absolute_float32,
        max_rel_error_float32=errors.relative_float32,
        sensitivity=errors.sensitivity,
        randomised=randomised,
        trains=not fails or bool(untrained),
        statistics=errors.statistics,
        rewritten=tuple(
            f"{n or 'the whole model'} (without {m.lost})" if m.lost else n for n, m in names.items()
        ),
        replayed=errors.replayed,
        tied=tuple(f"{n or 'the whole model'} {m.tied}" for n, m in names.items() if m.tied),
        sizes=sizes_of(pair.other.inputs) if pair.other else "",
        elsewhere=errors.elsewhere,
        uncompared=pair.uncompared,
        untrained=untrained,
        rest=rest,
        parts=tuple(graph.parts.names) if graph.parts else (),
        choices=errors.choices,
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
    absolute_float32: float
    relative_float32: float
    elsewhere: float
    sensitivity: float
    statistics: tuple[str, ...]
    replayed: bool
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """Inputs at which two networks are compared.

    Attributes:
        inputs: with random images.
        reference: the original's graph at these sizes; None: zeros will do for what is removed.
    """

    inputs: Inputs
    reference: Reference | None = None

    @property
    def numbers(self) -> int:
        """In all images."""
        main = main_leaf(self.inputs)
        return 0 if main is None else main.numel()

    @property
    def images(self) -> int:
        """How many there are."""
        return batch_of(self.inputs)

    def call(self, dtype: torch.dtype) -> Call:
        """The arguments in a precision."""
        return in_precision(as_call(self.inputs), dtype)

    def resizes(self, other: "Place") -> bool:
        """Whether the images have another height or width."""
        shapes = [main.shape[1:] for place in (self, other) if (main := main_leaf(place.inputs)) is not None]
        return any(shape != shapes[0] for shape in shapes)


class Pair:
    """The original without the removed units, and the cut model.

    Attributes:
        other: where they are compared besides the size of the analysis; known after a comparison.
        uncompared: why not at another batch or image size, in words; likewise.
    """

    def __init__(self, model: nn.Module, cut: nn.Module, graph: Graph, plan: Plan, seed: int) -> None:
        assert graph.trace is not None
        self._model, self._graph, self._plan, self._seed = model, graph, plan, seed
        self._cut = duplicate(cut, share=True)  # a forward may keep what it has computed
        self._trace = graph.trace
        self._survivors = graph.trace.survivors(plan.masks(graph))
        reference = Reference(graph.trace, self._survivors)
        captured = graph.trace.captured
        given = random_floats(captured.batching.resized(graph.given, captured.batch), seed)
        self._own = Place(given, reference if reference.needed else None)
        self.other: Place | None = None
        self.uncompared = ""

    @property
    def places(self) -> list[Place]:
        """Where they are compared, the smallest first."""
        few = self._own
        if self.other and self.other.resizes(few) and not few.reference:  # one image will do
            batching = self._trace.captured.batching
            few = Place(batching.resized(few.inputs, 1)) if batching.allows(1) else few
        return sorted([few, self.other or few], key=lambda place: place.numbers)

    def compare(self, *, randomised: bool = False) -> Errors:
        """Compare at both sizes; the first time, find the other one.

        Args:
            randomised: with random weights in both.
        """
        if self.other or self.uncompared:
            return self._checked(self._compare(randomised))
        for place in self._elsewhere():
            self.other = place
            try:
                errors = self._compare(randomised)
            except SecateurError as error:
                self._unfit(f"not compared at another image size: {str(error).partition(';')[0].rstrip('.')}")
                continue
            if errors is None:
                self._unfit("the original takes no other image size")
            elif not errors.elsewhere <= TOLERANCE[torch.float32] and not same_groups(
                self._model, place.inputs, self._graph
            ):
                self._unfit(
                    f"at {sizes_of(place.inputs)} its channels mean something else, and this cut does not hold"
                )
            else:
                if place.resizes(self._own):
                    self.uncompared = ""
                return errors
        self.other = None
        self.uncompared = (
            f"{self.uncompared}, and no other batch"
            if self.uncompared
            else "the original takes no other batch"
        )
        return self._checked(self._compare(randomised))

    def _unfit(self, reason: str) -> None:
        self.uncompared = self.uncompared or reason

    def _checked(self, errors: Errors | None) -> Errors:
        if errors is None:
            raise CutError(
                f"{type(self._model).__name__}: it does not run in float32, so that nothing can be compared"
            )
        return errors

    def _elsewhere(self) -> Iterator[Place]:
        """Where else both may run; `uncompared` says what speaks against other image sizes."""
        captured, own = self._trace.captured, self._own
        more = captured.batch + 1, captured.batch + captured.batching.images, 2 * captured.batch
        # a reference needs a graph of its own at every size: one that is likely to be that of the analysis
        counts, shrunk = ((1, *more), SHRUNK[:1]) if own.reference else ((*more, 1), (SMALLEST, *SHRUNK[:1]))
        captures: Counter[tuple[Size, ...]] = Counter()  # a third number of images changes none of them
        for inputs in elsewhere(own.inputs, captured.batching, counts, shrunk):
            place, size = Place(inputs), shapes_of(captured.batching.resized(inputs, captured.batch))
            if captures[size] == 2:
                continue
            if not place.resizes(own):
                self._unfit("the original takes no other image size")
            try:
                if run_own(self._cut, place.call(precision(self._cut))) is None:
                    continue
                if own.reference:
                    captures[size] += 1
                    place = Place(inputs, reference_at(self._model, self._trace, self._survivors, inputs))
            except SecateurError as error:
                self._unfit(f"not compared at another image size: {str(error).partition(';')[0].rstrip('.')}")
                continue
            yield place

    def _compare(self, randomised: bool) -> Errors | None:
        """Compare at both sizes; None: the original does not run at one of them.

        Raises:
            CutError: the cut model does not run, or its outputs have other shapes.
        """
        fine, rough = self.places
        apart = fine.resizes(rough)  # else the images of one are the first of the other
        fitted = max(fine, rough, key=lambda place: place.images > 1) if randomised else None
        whole = self._whole(fitted)
        small = self._with_values_of(whole) if randomised else None
        expected = double = outputs(whole, fine, torch.float64)
        statistics = tuple(fine.reference.sites) if fine.reference else ()
        if double is None:
            expected = outputs(whole.float(), fine, torch.float32)
        larger = outputs(whole.float(), rough, torch.float32, zeros=not statistics) if apart else None
        del whole
        if expected is None or (apart and larger is None):
            return None
        small = small or converted(self._cut, torch.float64)
        found = run_own(small, fine.call(torch.float64))
        absolute, relative = difference(expected, found or [])
        replayed = double is None or found is None
        if replayed or (not relative <= TOLERANCE[torch.float64] and self._fixes_precision):
            # a forward that names a precision rounds to it, whatever the tensors are
            replayed = True
            absolute, relative, statistics = self._compare_graphs(self._whole(fitted), small)
        small.float()
        if found is None:
            found = run_own(small, fine.call(torch.float32))
        at_rough = run_own(small, rough.call(torch.float32))
        if found is None or at_rough is None:
            raise CutError(f"{type(self._cut).__name__}: the cut model does not run in float32")
        spread = max(sensitivity(expected), sensitivity(at_rough))
        if larger is None:
            larger, at_rough = expected, first_rows(at_rough, expected)
        absolute_float32, relative_float32 = difference(larger, at_rough)
        choices = Choices()
        if not relative_float32 <= TOLERANCE[torch.float32]:  # the images may change one another, for one
            whole = self._whole(fitted).float()
            with choices.recorded():
                larger = outputs(whole, rough, torch.float32, zeros=not statistics) or []
            with choices.repeated(TOLERANCE[torch.float32]):
                at_rough = run_own(small, rough.call(torch.float32)) or []
            absolute_float32, relative_float32 = difference(larger, at_rough)
            relative_float32 = max(relative_float32, choices.apart)
        self._check_shapes(fine, expected, found)
        self._check_shapes(rough, larger, at_rough)
        at_fine = difference(expected, found)[1]
        return Errors(
            absolute,
            relative,
            absolute_float32,
            relative_float32,
            0.0 if self.other is None else at_fine if self.other is fine else relative_float32,
            spread,
            statistics,
            replayed,
            tuple(choices.overruled),
        )

    def _whole(self, fitted: Place | None) -> nn.Module:
        """The original in float64, with zeros for the removed units; on random weights if norms are to fit a place."""
        whole = converted(self._model, torch.float64)
        if fitted:
            fit_norms_(randomise_(whole, self._seed), *fitted.call(torch.float64))
        return mask_(whole, self._graph, self._plan)

    def _with_values_of(self, whole: nn.Module) -> nn.Module:
        """The cut model in float64 with the values of another original."""
        small = converted(self._cut, torch.float64)
        tensors = dict(named_tensors(small))
        keep = kept_positions(whole, self._graph, self._plan.masks(self._graph))
        cuts = {id(tensor): dims for tensor, dims in tensor_cuts(whole, keep)}
        with torch.no_grad():
            for name, tensor in named_tensors(whole):
                if name in tensors and tensors[name].numel():  # not of a block that was left out
                    tensors[name].copy_(select(tensor, cuts.get(id(tensor), {})))
        return small

    @functools.cached_property
    def _fixes_precision(self) -> bool:
        return fixes_precision(list_operators(self._trace.captured))

    def _compare_graphs(self, whole: nn.Module, small: nn.Module) -> tuple[float, float, tuple[str, ...]]:
        """The same of both graphs at the size of the analysis, and where that took statistics over the survivors."""
        call = self._own.call(torch.float64)
        reference = Reference(self._trace, self._survivors)
        expected = floats(reference.run(call, dict(named_tensors(whole))))
        lines, _ = cut_listing(self._trace, self._survivors)
        tensors = tensors_of(lines, aliases(small, {}))
        found = floats(run_fixed(fixed_program(lines), pytree.tree_leaves(call), tensors, lines.call))
        return *difference(expected, found), tuple(reference.sites)

    def _check_shapes(self, place: Place, expected: list[Tensor], found: list[Tensor]) -> None:
        if not place.resizes(self._own) and [t.shape for t in expected] != [t.shape for t in found]:
            raise CutError(
                f"{type(self._model).__name__}: outputs of the cut model have shapes "
                f"{[tuple(t.shape) for t in found]}, of the original {[tuple(t.shape) for t in expected]}"
            )


def reference_at(model: nn.Module, trace: Trace, survivors: Survivors, inputs: Inputs) -> Reference:
    """The original's graph for inputs of other sizes.

    Raises:
        SecateurError: it cannot be captured, or is another one than in the analysis.
    """
    return Reference(trace, survivors, capture(model, inputs, exact=True))


def expected_at(
    model: nn.Module, graph: Graph, plan: Plan, inputs: Inputs, dtype: torch.dtype, *, statistics: bool
) -> list[Tensor] | None:
    """The outputs of the original without the removed units, on inputs of any size; None if it does not run.

    Args:
        statistics: whether any is taken over channels of which some were removed.
    Raises:
        SecateurError: its graph at these sizes is not that of the analysis.
    """
    assert graph.trace is not None
    survivors = graph.trace.survivors(plan.masks(graph))
    place = Place(inputs, reference_at(model, graph.trace, survivors, inputs) if statistics else None)
    return outputs(mask_(converted(model, dtype), graph, plan), place, dtype)


def outputs(
    model: nn.Module, place: Place, dtype: torch.dtype, *, zeros: bool = False
) -> list[Tensor] | None:
    """The outputs of a masked original that is in this precision; None if it does not run.

    Args:
        zeros: whether zeros will do, where it was not known from the start.
    Raises:
        SecateurError: its graph at these sizes is not that of the analysis.
    """
    if place.reference and not zeros:
        try:
            found = floats(place.reference.run(place.call(dtype), dict(named_tensors(model))))
        except RuntimeError as error:
            raise CutError(f"the original's graph does not run at this size ({first_line(error)})") from error
        if place.reference.sites:
            return found
    return run_own(model, place.call(dtype))


def in_precision(call: Call, dtype: torch.dtype) -> Call:
    """Arguments with their floating-point tensors in a precision."""
    return pytree.tree_map(  # type: ignore[no-any-return]
        lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, call
    )


def first_rows(tensors: list[Tensor], like: list[Tensor]) -> list[Tensor]:
    """The tensors as far as others of fewer images reach."""
    pairs = zip(tensors, like, strict=False)
    return [t[: len(other)] if t.shape[1:] == other.shape[1:] else t for t, other in pairs]


def sensitivity(tensors: list[Tensor]) -> float:
    """Largest difference between the outputs of two images, relative to the largest output."""
    scale = max((t.abs().max().item() for t in tensors if t.numel()), default=0.0)
    spread = max(
        ((t[:1] - t[1:]).abs().max().item() for t in tensors if len(t) > 1 and t.numel()), default=0.0
    )
    return spread / scale if scale else 0.0


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


def run_own(model: nn.Module, given: tuple[tuple[Any, ...], dict[str, Any]]) -> list[Tensor] | None:
    """The outputs of a model's own forward; None if it does not run in this precision."""
    args, kwargs = cloned(given)
    buffers = {name: t.clone() for name, t in model.named_buffers()}  # a forward may write to them
    try:
        with (
            untouched(model),
            evaluating(model),
            written_out(),
            default_precision(precision(model)),
            torch.no_grad(),
            chance_kept(),
        ):
            torch.manual_seed(0)
            return floats(functional_call(model, buffers, args, kwargs))
    except SecateurError:  # it says itself what it does not take
        raise
    except Exception:  # whatever its own code raises
        return None


def training_fails(model: nn.Module, graph: Graph, seed: int, few: Inputs | None = None) -> str:
    """Why a training-mode forward and backward pass of a copy gives no finite gradients; "" if it does.

    Args:
        model: only read.
        graph: gives the example inputs.
        seed: of the random images, and of what the model draws.
        few: small inputs that will do if the step succeeds on them.
    """
    if few is not None and not step_fails(model, in_precision(as_call(few), torch.float32), seed):
        return ""
    return step_fails(model, random_inputs(graph, torch.float32, seed), seed)


def step_fails(model: nn.Module, call: Call, seed: int) -> str:
    """The same for one call."""
    trained = converted(model, torch.float32).train()
    for parameter in trained.parameters():
        parameter.requires_grad_(True)
        parameter.grad = None
    args, kwargs = call
    with chance_kept(), torch.enable_grad(), few_channels_planar(trained):
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
