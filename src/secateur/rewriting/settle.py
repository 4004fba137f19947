"""Making sure that the user's own forward computes the cut network, and rewriting it where it does not.

The judge is the captured graph at the cut widths, run beside the model on random weights. That a forward runs proves
little: a scale that it works out from a width is merely a little wrong. Both run the same operators on the same
tensors if all is well, and so give the same bits in float32. If they do not, they are compared in float64 or, where
forward names a precision itself, in the model's own.
"""

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from secateur.errors import CutError
from secateur.graph import Graph, named_tensors
from secateur.graph.duplicate import cloned, duplicate
from secateur.graph.groups import find_groups
from secateur.graph.guard import guarded, written_out
from secateur.graph.modes import chance_kept, default_precision, evaluating
from secateur.graph.positions import removed_positions
from secateur.graph.probe import aliases, difference, floats, random_inputs, random_values
from secateur.graph.trace import Survivors
from secateur.rewriting.draft import Draft, Writer
from secateur.rewriting.listing import Listing, find_calls
from secateur.rewriting.program import NAMES, Around, Named, Ref, refs
from secateur.rewriting.rewrite import arguments_of, cut_listing, fixed_program, run_program, tensors_of

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
"""Largest relative difference of the same operators on the same tensors, by precision."""


def settle(
    model: nn.Module, graph: Graph, masks: Sequence[Tensor], whole: Callable[[], nn.Module]
) -> dict[str, Draft]:
    """Find the submodules of a cut model that must be rewritten, the smallest ones that will do.

    Args:
        model: cut; it is not changed.
        graph: of the model before the cut.
        masks: (units,) bool per group of the graph, what was kept.
        whole: makes a copy of the model before the cut.
    Returns:
        module name -> its program; empty if the model's own forward computes the cut network.
    Raises:
        CutError: some module can neither run its own forward nor be rewritten.
    """
    assert graph.trace is not None
    model = duplicate(model, share=True)  # a forward may keep what it has computed
    survivors = graph.trace.survivors(masks)
    exact = Judge(model, graph, survivors, torch.float32)
    if exact.holds():
        return {}
    judge = Judge(model, graph, survivors)
    if exact.runs and judge.holds():
        return {}
    before, trace = whole(), graph.trace
    if trace.gone is not None:  # the graph was captured before earlier cuts
        graph, masks = analyzed_again(before, graph, masks)
        assert graph.trace is not None
        trace = graph.trace
        judge = Judge(model, graph, trace.survivors(masks))
    return CheckedPass(judge, Writer(before, trace, trace.survivors(masks), graph.given)).run()


def analyzed_again(model: nn.Module, graph: Graph, masks: Sequence[Tensor]) -> tuple[Graph, list[Tensor]]:
    """A graph captured from a model as it is now, and the masks of its groups that remove the same positions.

    Raises:
        CutError: its groups are others.
    """
    gone = removed_positions(graph, masks)
    fresh = find_groups(model, graph.given, going=gone)
    result = []
    for group in fresh.groups:
        mask = np.ones(group.units, dtype=bool)
        for member in group.members:
            mask &= ~np.isin(member.index, gone.get((member.tensor, member.dim), ())).any(axis=1)
        result.append(torch.from_numpy(mask))
    found = removed_positions(fresh, result)
    different = [
        key for key in gone.keys() | found.keys() if set(gone.get(key, ())) != set(found.get(key, ()))
    ]
    if different:
        raise CutError(
            f"{different[0][0]}: after earlier cuts, what can be removed of it is something else. Remove everything in "
            f"one cut, or freeze this layer. The model is unchanged."
        )
    return fresh, result


def fixes_precision(lines: Listing) -> bool:
    """Whether a forward names a precision, or reads a tensor that does not follow the model's."""
    constants = lines.captured.constants.values()
    return any(t.is_floating_point() for t in constants) or any(names_dtype(s.args) for s in lines.steps)


def names_dtype(arg: Any) -> bool:
    """Whether an argument holds a floating-point dtype."""
    if isinstance(arg, list | dict):
        return any(map(names_dtype, arg.values() if isinstance(arg, dict) else arg))
    return (
        isinstance(arg, Named)
        and arg.kind == "dtype"
        and (arg.name == "same" or NAMES["dtype"][arg.name].is_floating_point)
    )


def precision(model: nn.Module) -> torch.dtype:
    """The dtype of a model's first floating-point tensor."""
    return next((t.dtype for _, t in named_tensors(model) if t.is_floating_point()), torch.float32)


class Judge:
    """The cut network as the captured graph says it, on random inputs and weights.

    Args:
        model: the cut model.
        graph: of the original.
        survivors: of the plan.
        exact: a precision in which every bit must be the same; None: float64, or the model's own, up to rounding.

    Attributes:
        runs: whether the model's own forward did when it was last tried.
    """

    runs = True

    def __init__(
        self, model: nn.Module, graph: Graph, survivors: Survivors, exact: torch.dtype | None = None
    ) -> None:
        assert graph.trace is not None
        self.model = model
        self.lines, self.shapes = cut_listing(graph.trace, survivors)
        own = exact is None and fixes_precision(self.lines)
        dtype = exact or (precision(model) if own else torch.float64)
        self.tolerance = 0.0 if exact else TOLERANCE.get(dtype, 0.1)
        self.program = fixed_program(self.lines, named=own)
        self.values = random_values(model, 0, dtype)
        self._tensors = tensors_of(self.lines, aliases(model, self.values), own=own)
        self._named = dict(zip(self.lines.names, self._tensors, strict=True))
        self._buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
        self.dtype, self.own_precision = dtype, own
        self.usual = torch.get_default_dtype()
        self._given = random_inputs(graph, dtype, seed=0)

    def precise(self) -> AbstractContextManager[None]:
        """Inside the block, tensors that are made without a precision have that of the judge."""
        return default_precision(self.usual if self.own_precision else self.dtype)

    @property
    def given(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments; a copy, since a forward may write to them."""
        return cloned(self._given)  # type: ignore[no-any-return]

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that the captured graph reads; likewise copies of the buffers."""
        named = zip(self.lines.names, self._tensors, strict=True)
        return [t.clone() if name in self._buffers else t for name, t in named]

    def steps(self, around: Around | None = None) -> Iterator[Any]:
        """The results of the captured graph's operators, one by one, and at the end the output."""
        shapes = iter(self.shapes)
        steps = iter(self.lines.steps)
        for result in self.program.steps(
            pytree.tree_leaves(self.given), self.tensors, around=around or self.lines.call
        ):
            expected, step = next(shapes, ()), next(steps, None)
            if step and isinstance(result, Tensor) and expected and tuple(result.shape) != expected[0]:
                raise CutError(
                    f"{step.module}: {step.op} gives shape {tuple(result.shape)} after the cut, where the "
                    f"analysis expects {expected[0]}; freeze= this module. The model is unchanged."
                )
            yield result

    @functools.cached_property
    def expected(self) -> list[Tensor]:
        """The outputs; on the way, batch norms get the statistics of what they see.

        With others, activations grow from block to block until attention and gates are saturated, and what is
        wrong before them does not show.
        """
        learned: set[str] = set()

        def learning(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            step = self.lines.steps[number]
            buffers = (step.args.get(name) for name in ("running_mean", "running_var"))
            running = [ref.index - len(self.lines.inputs) for ref in buffers if isinstance(ref, Ref)]
            if step.op == "batch_norm" and len(running) == 2:
                names = [self.lines.names[index] for index in running]
                if not learned.intersection(names):  # one norm in two places: those of the first
                    learned.update(names)
                    over = [dim for dim in range(args[0].ndim) if dim != 1]
                    var, mean = torch.var_mean(args[0], over, correction=0)
                    for given, name, value in zip(args[3:5], names, (mean, var.clamp(min=0.1)), strict=True):
                        self._named[name].copy_(given.copy_(value))
            return self.lines.call(number, args, kwargs)

        with torch.no_grad(), self.precise():
            *_, output = self.steps(learning)
        return floats(output)

    def holds(self) -> bool:
        """Whether the model's own forward runs and computes the same."""
        expected = self.expected
        try:
            found = self.own(self.model, self.values)
        except Exception:  # whatever the model's own code raises at widths it was not made for
            self.runs = False
            return False
        apart = difference(expected, found)[1]
        if 0 < apart <= TOLERANCE[torch.float32] and not self.tolerance:
            with written_out():  # torch's own attention layers have fused kernels, which round in another way
                apart = difference(expected, self.own(self.model, self.values))[1]
        return apart <= self.tolerance

    def own(self, model: nn.Module, values: dict[str, Tensor]) -> list[Tensor]:
        """The outputs of a model's own forward."""
        args, kwargs = self.given
        values = values | cloned({name: values.get(name, t) for name, t in model.named_buffers()})
        with evaluating(model), self.precise(), torch.no_grad(), chance_kept():
            return floats(functional_call(model, values, args, kwargs))


class CheckedPass:
    """One pass of the cut model in which every call of a submodule is checked, and made good if need be.

    The captured graph runs beside the model, so that inputs and outputs of every call are known. A module
    that fails, or computes something else, though its inputs are right, gets a program; if none can be
    written, the module that contains it does.
    """

    def __init__(self, judge: Judge, writer: Writer) -> None:
        self._judge = judge
        self._writer = writer
        self._drafts: dict[str, Draft] = {}
        self._reasons: dict[str, str] = {}
        self._calls: dict[str, int] = {}
        self._whole: set[str] = set()
        self._right: set[tuple[str, int]] = set()
        self._inputs: dict[tuple[str, int], list[Tensor]] = {}
        self._outputs: dict[tuple[str, int], list[Tensor]] = {}
        self._regions = find_calls(judge.lines, judge.model)
        if any(step.op == "batch_norm" for step in judge.lines.steps):
            _ = judge.expected  # norms get the statistics of what they see
        self._graph = Lockstep(judge)

    def run(self) -> dict[str, Draft]:
        """Module name -> program."""
        with guarded(self._judge.model, self._guard), torch.no_grad():
            try:
                found = self._judge.own(self._judge.model, self._judge.values)
            except Exception as error:
                raise self._failure(error) from error
        if difference(self._graph.output, found)[1] > self._judge.tolerance:
            raise self._failure(None)
        return {name: draft for name, draft in self._drafts.items() if self._reached(name)}

    def _reached(self, name: str) -> bool:
        """Whether every rewritten module around one calls it, or a module around it."""
        programs = {other: self._drafts[other].program for other in self._drafts if inside(name, other)}
        return all(
            any(
                own == name or inside(name, own)
                for own in (f"{other}.{c}".lstrip(".") for c in program.calls)
            )
            for other, program in programs.items()
        )

    def _failure(self, error: Exception | None) -> CutError:
        name, reason = next(iter(self._reasons.items()), ("", str(error or "it computes something else")))
        where = name or type(self._judge.model).__name__
        return CutError(
            f"{where}: its forward does not run at the new widths, and it could not be rewritten: "
            f"{reason.splitlines()[0]}. freeze={where!r} leaves it whole. The model is unchanged."
        )

    def _guard(self, name: str, module: nn.Module, own: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        number = self._calls[name] = self._calls.get(name, -1) + 1
        key = name, number
        region = range(len(self._judge.lines.steps)) if not name else self._regions.get(key)
        if not region:
            return own(*args, **kwargs)
        if key in self._right:  # in an earlier try of the module around it
            draft = self._drafts.get(name)
            return self._run(module, draft, args, kwargs) if draft else own(*args, **kwargs)
        before = dict(self._calls)
        if key not in self._inputs:
            self._inputs[key] = self._graph.before(region)
        given = cloned((args, kwargs))
        try:
            result = own(*args, **kwargs)
            problem: Exception = CutError("it computes something else")
            right = self._gives(key, region, result)
        except Exception as error:
            problem, right = error, False
        if not right:
            if name and not self._agree(floats(given), self._inputs[key]):
                raise problem  # a module before this one went wrong
            try:
                result = self._rewrite(key, region, module, given, before)
            except Exception as error:
                self._reasons.setdefault(name, f"{error} (its own forward: {problem})")
                raise problem from error
        self._right.add(key)
        self._inputs.pop(key), self._outputs.pop(key, None)
        return result

    def _gives(self, key: tuple[str, int], region: Sequence[int], result: Any) -> bool:
        """Whether a call gave what the captured graph says; that knows no outputs that nothing reads, maybe none."""
        if key not in self._outputs:
            self._outputs[key] = self._graph.after(region)
        found, known = floats(result), self._outputs[key]
        return self._agree(found, known) or self._agree(known, found)

    def _rewrite(
        self,
        key: tuple[str, int],
        region: Sequence[int],
        module: nn.Module,
        given: Any,
        before: dict[str, int],
    ) -> Any:
        """Write a program for a module, and return what it gives.

        Submodules that turn out not to work by themselves have their operators written out; if that is not enough,
        all have.
        """
        name = key[0]
        draft = self._drafts.get(name)
        while True:
            broken = frozenset(self._reasons) - {name}
            apart = None if name in self._whole else broken
            self._calls = {
                n: before.get(n, -1) for n in self._calls
            }  # a shared module may be named elsewhere
            try:
                with written_out(), default_precision(self._judge.usual):
                    draft = draft or self._writer.draft(name, apart)
                args, kwargs = cloned(given)
                result = self._run(module, draft, args, kwargs)
                if not self._gives(key, region, result):
                    raise CutError("the rewritten forward computes something else")
            except Exception:
                if apart is None:
                    raise
                if broken == frozenset(self._reasons) - {name}:
                    self._whole.add(name)
                draft = None
            else:
                if name not in self._drafts:
                    others = self._others(key, region, module, given, draft, apart)
                    draft = replace(draft, others=others)
                self._drafts[name] = draft
                for (called, call), steps in self._regions.items():  # the program may not have called it
                    if steps[-1] <= region[-1]:
                        self._calls[called] = max(self._calls.get(called, -1), call)
                return result

    def _others(
        self,
        key: tuple[str, int],
        region: Sequence[int],
        module: nn.Module,
        given: Any,
        draft: Draft,
        apart: Collection[str] | None,
    ) -> tuple[Draft, ...]:
        """The drafts for other arguments, such as masks, that give the same where these hide nothing."""
        found = []
        with written_out(), default_precision(self._judge.usual):
            others = [*self._writer.others(key[0], apart, draft)]
        for other, arguments in others:
            call = arguments_of(module, *cloned(given))
            call.arguments |= {name: self._likewise(x) for name, x in arguments.items()}
            with suppress(Exception):  # whatever a program that is not right at the new widths raises
                if self._gives(key, region, self._run(module, other, call.args, call.kwargs)):
                    found.append(other)
        return tuple(found)

    def _likewise(self, tree: Any) -> Any:
        """Arguments in the precision of the judge."""
        return pytree.tree_map(lambda x: self._like(x) if isinstance(x, Tensor) else x, tree)

    def _run(self, module: nn.Module, draft: Draft, args: Any, kwargs: Any) -> Any:
        constants = {name: self._like(t) for name, t in draft.all_constants.items()}
        with registered(module, constants):
            return run_program(module, draft.programs, args, kwargs)

    def _like(self, t: Tensor) -> Tensor:
        return t.to(self._judge.dtype) if t.is_floating_point() and not self._judge.own_precision else t

    def _agree(self, found: Sequence[Tensor], known: Sequence[Tensor]) -> bool:
        """Whether every tensor equals one of those known."""
        return all(any(difference([k], [f])[1] <= self._judge.tolerance for k in known) for f in found)


class Lockstep:
    """The captured graph, run step by step as far as the model has come; values are kept while they are read."""

    def __init__(self, judge: Judge) -> None:
        lines = judge.lines
        self._first = len(lines.nodes) - len(lines.steps)
        self._reads = [refs(list(step.args.values())) for step in lines.steps]
        self._last = {index: i for i, read in enumerate(self._reads) for index in read}
        self._last |= dict.fromkeys(refs(lines.output), len(lines.steps))
        given = [*pytree.tree_leaves(judge.given), *judge.tensors]
        self._values: dict[int, Any] = dict(enumerate(given))
        self._steps = judge.steps()
        self._precise = judge.precise
        self._done = 0

    def before(self, region: Sequence[int]) -> list[Tensor]:
        """What the steps of a region read from outside it."""
        self._advance(region[0])
        own = {self._first + i for i in region}
        return self._tensors(index for i in region for index in self._reads[i] if index not in own)

    def after(self, region: Sequence[int]) -> list[Tensor]:
        """What later steps read from a region."""
        self._advance(region[-1] + 1)
        return self._tensors(
            self._first + i for i in region if self._last.get(self._first + i, -1) > region[-1]
        )

    @functools.cached_property
    def output(self) -> list[Tensor]:
        """What the graph returns."""
        with torch.no_grad(), self._precise():
            self._advance(len(self._reads))
            return floats(next(self._steps))

    def _tensors(self, indices: Iterable[int]) -> list[Tensor]:
        found = {index: self._values.get(index) for index in indices}
        return floats(list(found.values()))

    def _advance(self, step: int) -> None:
        while self._done < step:
            self._values[self._first + self._done] = next(self._steps)
            for index in self._reads[self._done]:
                if self._last[index] <= self._done:
                    self._values.pop(index, None)
            self._done += 1


def inside(name: str, other: str) -> bool:
    """Whether one module is a submodule of another, by name."""
    return name != other and (not other or name.startswith(f"{other}."))


@contextmanager
def registered(module: nn.Module, constants: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block, a module has some more buffers."""
    try:
        for name, tensor in constants.items():
            module.register_buffer(name, tensor, persistent=False)
        yield
    finally:
        for name in constants:
            module._buffers.pop(name, None)
            module._non_persistent_buffers_set.discard(name)
