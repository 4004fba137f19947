"""Writing the program of a submodule after a cut, for any batch size, any image size and both modes.

The submodule is captured by itself, from the calls that the whole model makes of it: once as in the analysis, and
again with other batches and other image sizes, in another precision and in training mode. What differs between
these captures is a size, a precision, or a switch of the training mode; all else is a literal.
"""

import copy
import functools
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from secateur.errors import CaptureError, CutError
from secateur.graph.capture import Capture, Inputs, as_call, capture
from secateur.graph.duplicate import cloned, duplicate
from secateur.graph.guard import opened
from secateur.graph.labels import Value
from secateur.graph.operators import OPERATORS, Step
from secateur.graph.probe import aliases, difference, floats, random_values
from secateur.graph.samples import sampled
from secateur.graph.trace import Survivors, Trace
from secateur.rewriting.calls import Sites, entries_in, leaves_of, marked, strip
from secateur.rewriting.compose import calls_of, collapse, placed
from secateur.rewriting.listing import Listing, as_op, find_calls, is_call, list_operators
from secateur.rewriting.program import (
    ANYTHING,
    Dim,
    Given,
    Limit,
    Made,
    Named,
    Program,
    Ref,
    Size,
    Training,
    operator_named,
    refs,
)
from secateur.rewriting.rewrite import CONSTANT, arguments_of, cut_steps, inputs_of, tensor_named
from secateur.rewriting.sizes import Expressions

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Shapes = tuple[tuple[int, ...], ...]

FEWEST = 2
"""Least captures besides that of the analysis that numbers are compared between, if the module meets other sizes."""

CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest relative difference of the same operators on the same tensors, by precision."""

VIEWS = ("view", "reshape", "_unsafe_view")
"""Operators that work out one size by themselves."""


@dataclass(frozen=True)
class Draft:
    """The program of one module after a cut.

    Attributes:
        constants: buffers to be registered with it.
        lost: what the module does and the program does not, in words; "" if nothing.
        tied: why it takes fewer image sizes than the module did, in words; "" if it takes all.
    """

    program: Program
    constants: dict[str, Tensor]
    lost: str
    tied: str


class Writer:
    """Writes programs for the submodules of a model.

    Args:
        model: a copy of the whole model, before the cut.
        trace: of the same model.
        survivors: of the plan.
        inputs: example inputs.
    """

    def __init__(self, model: nn.Module, trace: Trace, survivors: Survivors, inputs: Inputs) -> None:
        self._model = model.eval()
        self._trace = trace
        self._survivors = survivors
        self._inputs = inputs
        self._whole = list_operators(trace.captured)
        self._regions = find_calls(self._whole, self._model)
        self._runs: dict[str, list[list[Arguments]]] = {}
        self._captures: dict[Any, Captures] = {}

    def draft(self, name: str, apart: Collection[str] | None = ()) -> Draft:
        """The program of a submodule; "" is the model itself.

        Args:
            name: of the submodule.
            apart: names of modules that the program does not call, but writes their operators out; None: all.
        Raises:
            CutError: it cannot be written; the message says why.
        """
        if name not in self._runs:
            self._record(name)
        runs = self._runs[name]
        if not runs[0]:
            raise CutError(f"{name}: it is not called in evaluation mode")
        given = len(self._samples[0])
        for some in dict.fromkeys((len(runs), given)):  # at least at the image size of the analysis
            calls = [[run[i] if i < len(run) else None for run in runs[:some]] for i in range(len(runs[0]))]
            drafts = [self._draft(name, number, each, apart) for number, each in enumerate(calls)]
            if all(draft.program == drafts[0].program for draft in drafts):
                tied = "it is called several times, in different ways" if some < len(runs) else ""
                return replace(drafts[0], tied=drafts[0].tied or tied)
        raise CutError(f"{name}: it is called {len(drafts)} times, in ways that need different programs")

    def _record(self, name: str) -> None:
        """Note the calls of a module, and of all others of its class, for inputs of every size."""
        kind = type(self._model.get_submodule(name))
        names = [n for n, module in self._model.named_modules() if type(module) is kind]
        runs: list[dict[str, list[Arguments]]] = []
        for given in itertools.chain(*self._samples):
            args, kwargs = as_call(given)
            with recorded(self._model, names) as calls, torch.no_grad():
                try:
                    self._model(*args, **kwargs)
                except Exception:  # whatever its own code raises at a size it was not made for
                    if not runs:
                        raise
                    calls = {n: [] for n in names}
            runs.append(calls)
        for n in names:
            self._runs[n] = [run[n] for run in runs]

    @functools.cached_property
    def _samples(self) -> tuple[list[Inputs], list[Inputs]]:
        captured = self._trace.captured
        return sampled(self._model, self._inputs, captured.batching, captured.batch)

    def _draft(
        self, name: str, number: int, calls: Sequence[Arguments | None], apart: Collection[str] | None
    ) -> Draft:
        module = self._model.get_submodule(name)
        prefix = f"{name}." if name else ""
        if apart is not None:
            apart = frozenset(n.removeprefix(prefix) for n in apart if n.startswith(prefix))
        try:
            captures = self._capture(module, calls, apart)
        except CaptureError as error:
            raise CutError(f"{name}: its forward cannot be captured by itself ({error})") from None
        except CutError as error:
            raise CutError(f"{name}: {error}") from None
        captured = captures.base.listing()
        values = self._match(name, number, captures.base.operators())
        cut = self._cut_dims(captured, values)
        training = in_training(captures.training, captured)
        captures.complete(captured)
        switches, lost = training_switches(training, captured)
        unheard = captures.base.unheard()
        if unheard:
            hooks = f"hooks on {', '.join(unheard[:4])}{' …' * (len(unheard) > 4)}"
            lost = " and ".join([hooks, lost] if lost else [hooks])
        before = [copy.copy(step.args) for step in captured.steps]
        cut_steps(captured, values, self._survivors)
        try:
            output = captures.symbolic(captured, before, cut)
        except CutError as error:
            raise CutError(f"{name}: {error}") from None
        for i, step in enumerate(captured.steps):
            step.args |= {
                key: Training(m, yes, step.args.get(key, no)) for key, (m, yes, no) in switches[i].items()
            }
        insert_dropouts(captured, training)
        return self._finish(captured, captures, output, captures.limits(cut), lost)

    def _cut_dims(self, lines: Listing, values: Mapping[fx.Node, Any]) -> set[tuple[int, int]]:
        """(register, dim) of every tensor that loses positions."""
        found = set()
        for register, node in enumerate(lines.nodes):
            value = values.get(node)
            if isinstance(value, Value):
                found |= {(register, dim) for dim in self._survivors.keep(value)}
        return found

    def _capture(
        self, module: nn.Module, calls: Sequence[Arguments | None], apart: Collection[str] | None
    ) -> "Captures":
        """The captures of one call; networks repeat their blocks, so those of a module like it will do."""
        alike = likeness((module, calls), {}), apart
        if alike in self._captures:
            return self._captures[alike]
        captures = Captures.of(module, calls, len(self._samples[0]), apart)
        if not captures.base.captured.constants:  # these may differ, whatever else is equal
            self._captures[alike] = captures
        return captures

    def _finish(self, lines: Listing, captures: "Captures", output: Any, limits: Any, lost: str) -> Draft:
        base = captures.base
        named = {*base.captured.tensors.values()}
        unnamed = [name for name in lines.names if name in base.captured.constants]
        free = (f"{CONSTANT}{i}" for i in itertools.count() if f"module.{CONSTANT}{i}" not in named)
        buffers = dict(zip(unnamed, free, strict=False))
        program = Program(
            arguments=captures.arguments,
            inputs=len(lines.inputs),
            tensors=tuple(buffers.get(name) or name.removeprefix("module.") for name in lines.names),
            ops=tuple(as_op(step) for step in lines.steps),
            output=placed(output, lines.output),
            limits=limits,
        )
        constants = {buffers[name]: base.captured.constants[name].detach().clone() for name in unnamed}
        return Draft(program, constants, lost, captures.tied)

    def _match(self, name: str, number: int, lines: Listing) -> dict[fx.Node, Any]:
        """What the analysis knows about the nodes of a module that was captured by itself."""
        found = [self._whole.steps[i] for i in self._regions.get((name, number), [])]
        if [s.target for s in found] != [s.target for s in lines.steps]:
            raise CutError(f"{name}: its forward does other things by itself than within the model")
        values: dict[fx.Node, Any] = {}
        for theirs, own in zip(found, lines.steps, strict=True):
            values[own.node] = self._trace.values.get(theirs.node)
            for a, b in zip(refs(own.args), refs(theirs.args), strict=True):
                node, value = lines.nodes[a], self._trace.values.get(self._whole.nodes[b])
                known = values.setdefault(node, value)
                if isinstance(value, Value) and isinstance(known, Value) and known.shape != value.shape:
                    raise CutError(f"{name}: its forward does other things by itself than within the model")
        return values


@dataclass(frozen=True)
class Sizes:
    """The numbers of one operator.

    Attributes:
        expressions: what they may be expressed by.
        op: name of the operator.
    """

    expressions: Expressions
    op: str

    def symbolic(self, arg: Any, base: Any, others: Sequence[Any]) -> Any:
        """An argument with the numbers that differ between captures expressed by sizes.

        Args:
            arg: after the cut.
            base: the same before the cut.
            others: the same in the other captures.
        Raises:
            CutError: a number follows no size.
        """
        if all(type(other) is type(base) and other == base for other in others):
            return arg
        if isinstance(arg, list | tuple):
            if any(not isinstance(o, list | tuple) or len(o) != len(arg) for o in (base, *others)):
                raise CutError(f"{self.op} has arguments that differ in number between sizes")
            return type(arg)(self._parts(arg, base, others))
        if isinstance(arg, dict):
            if any(not isinstance(o, dict) or o.keys() != arg.keys() for o in (base, *others)):
                raise CutError(f"{self.op} has arguments that differ in number between sizes")
            return {key: self.symbolic(arg[key], base[key], [o[key] for o in others]) for key in arg}
        if isinstance(base, Ref):
            return arg
        if isinstance(base, Made):
            return Made(
                base.cls,
                self.symbolic(dict(arg.entries), dict(base.entries), [dict(o.entries) for o in others]),
            )
        if isinstance(base, Named):
            return Named(base.kind, "same")
        if all(type(n) is int for n in (arg, base, *others)):
            found = self.expressions.of((base, *others), arg)
            if found is not None:
                return found
        raise CutError(
            f"{self.op} has an argument {base!r} that changes with the input and follows none of its sizes"
        )

    def _parts(self, arg: Sequence[Any], base: Sequence[Any], others: Sequence[Any]) -> list[Any]:
        """The parts of a list; of the sizes of a view, one that follows nothing can be left to torch."""
        parts: list[Any] = []
        for i, part in enumerate(arg):
            try:
                parts.append(self.symbolic(part, base[i], [other[i] for other in others]))
            except CutError:
                if self.op not in VIEWS or -1 in parts or type(part) is not int:
                    raise
                parts.append(-1)
        return parts


# --- one module by itself ----------------------------------------------------------------------------------


@dataclass
class Returned:
    """What a call returned, with `Ref` in place of each tensor; the exporter would reset a plain attribute."""

    tree: Any = None


class FixedCall(nn.Module):
    """A module called with all but its tensors fixed."""

    def __init__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        super().__init__()
        self.module = module
        self.given = arguments_of(module, args, kwargs)
        self.tensors: list[Tensor] = []
        self.arguments = strip(dict(self.given.arguments), self.tensors)
        self.returned = Returned()

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        bound = copy.copy(self.given)
        bound.arguments = fill(self.arguments, self.given.arguments, tensors)
        leaves: list[Tensor] = []
        self.returned.tree = strip(self.module(*bound.args, **bound.kwargs), leaves)
        return leaves


@dataclass(frozen=True)
class Captured:
    """A capture of one call of one module.

    Attributes:
        arguments: of the call, with `Ref` in place of each tensor.
        output: what it returns, likewise.
        sites: the calls of its submodules.
    """

    captured: Capture
    arguments: Any
    output: Any
    sites: Sites

    @classmethod
    def of(
        cls,
        module: nn.Module,
        args: Any,
        kwargs: Any,
        *,
        apart: Collection[str] | None = None,
        training: bool = False,
    ) -> "Captured":
        """Capture one call; calls of submodules are marked, those of some submodules are not, with None no call."""
        call = FixedCall(module, args, kwargs)
        with marked(call.module, apart) as sites:
            captured = capture(call, tuple(call.tensors), training=training, exact=True)
        if any(leaf == ANYTHING for _, leaf in leaves_of(call.returned.tree)):
            raise CutError(
                f"{type(module).__name__}: it returns something else than tensors, and lists and dicts of them"
            )
        return cls(captured, call.arguments, call.returned.tree, sites)

    @classmethod
    def in_another_precision(
        cls, module: nn.Module, args: Any, kwargs: Any, apart: Collection[str] | None
    ) -> "Captured | None":
        """Capture one call in float64, or float32 if it is in that; None for a module that does not run in it."""

        known: dict[int, Tensor] = {}  # a tensor that is passed twice stays one
        leaves = [*module.parameters(), *module.buffers(), *pytree.tree_leaves((args, kwargs))]
        given = next((x.dtype for x in leaves if isinstance(x, Tensor) and x.is_floating_point()), None)
        other = torch.float32 if given is torch.float64 else torch.float64

        def convert(x: Any) -> Any:
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return x
            return known.setdefault(id(x), x.to(other))

        try:
            twin = duplicate(module).to(other)
            return cls.of(twin, *pytree.tree_map(convert, (args, kwargs)), apart=apart)
        except (CaptureError, CutError):
            return None

    def operators(self) -> Listing:
        """Its operators, those of submodules that are called included."""
        return list_operators(self.captured)

    def listing(self) -> Listing:
        """Its operators and the calls of submodules that can be made as they are."""
        lines = self.operators()
        return collapse(lines, [self.sites[call.site] for call in lines.calls])

    def refused(self) -> set[str]:
        """Submodules whose calls were marked and cannot be made as they are."""
        return {site.module for site in self.sites} - {*calls_of(self.listing())}

    def unheard(self) -> list[str]:
        """The submodules that the module calls and whose operators are written out."""
        called = calls_of(self.listing())
        names = [*self.sites.passed, *(site.module for site in self.sites)]
        return [name for name in dict.fromkeys(names) if name not in called]


class Captures:
    """What a program is written from: one call of a module, captured as in the analysis and otherwise.

    Attributes:
        base: captured as in the analysis.
        variants: with other batches and image sizes, and in another precision.
        arguments: of the call, with `Ref` in place of each tensor and `Given` in place of each number that varies.
        tied: why the module takes fewer image sizes than the model did, in words; "" if it takes all.
    """

    def __init__(
        self,
        module: nn.Module,
        calls: Sequence[Arguments | None],
        alike: int,
        apart: Collection[str] | None,
    ) -> None:
        assert calls[0] is not None
        self._module = module
        self._apart = apart
        self._calls = calls
        self._alike = alike
        while True:
            self.base = Captured.of(module, *calls[0], apart=self._apart)
            refused = self.base.refused() | {*calls_of(self.base.listing())} & {*self.base.sites.passed}
            if self._apart is None or refused <= {*self._apart}:
                break
            self._apart = {*self._apart, *refused}  # what they call is looked at instead
        self.tied = ""
        self._forget()

    @classmethod
    def of(
        cls,
        module: nn.Module,
        calls: Sequence[Arguments | None],
        alike: int,
        apart: Collection[str] | None = None,
    ) -> "Captures":
        """Capture a call, noted at several sizes, as often as it takes for its numbers to be right at all of them.

        Args:
            module: that is called.
            calls: first that of the analysis; None where there was none.
            alike: how many of them are at the image size of the analysis, so that only the batch differs.
            apart: submodules whose operators are written out; None: all.
        Raises:
            CaptureError: the module cannot be captured.
            CutError: it does other things for another batch or precision.
        """
        captures = cls(module, calls, alike, apart)
        try:
            captures._compare(range(1, len(calls)))
            captures.tied = captures._why_tied()
        except (CutError, CaptureError) as error:
            if alike == len(calls):
                raise
            captures.tied = str(error)
        if captures.tied:
            captures._forget()
            captures._compare(range(1, alike))
        if captures._unfit & set(range(alike)):
            raise CutError("its forward does other things for another batch size or precision")
        return captures

    def _forget(self) -> None:
        self.variants: list[Captured] = []
        self._listings: list[Listing] = []
        self._captured: set[int] = {0}
        self._fit: set[int] = {0}
        self._unfit: set[int] = set()

    def _compare(self, numbers: Sequence[int]) -> None:
        """Sort these calls into those at which the numbers are right and others, and capture what that takes."""
        known = {self._sizes(0)}
        for number in numbers:
            sizes = self._sizes(number)
            if sizes is None or (
                sizes not in known and len(self.variants) < FEWEST and not self._add(number)
            ):
                self._unfit.add(number)
            else:
                self._fit.add(number)
                known.add(sizes)
        if not self.variants:
            self._add(0)
        while True:
            program = self._whole()
            wrong = (n for n in sorted(self._fit - {0}) if not self._right(program, n))
            found = next(wrong, None)
            if found is None:
                return
            if found in self._captured or not self._add(found):
                self._fit.remove(found)
                self._unfit.add(found)

    def _sizes(self, number: int) -> Shapes | None:
        """The shapes of the tensors in a call; None if there was no such call, or one of other tensors."""
        call, first = self._calls[number], self._calls[0]
        assert first is not None
        if call is None:
            return None
        own, others = (FixedCall(self._module, *c) for c in (call, first))
        if [t.ndim for t in own.tensors] != [t.ndim for t in others.tensors]:
            return None
        return tuple(tuple(t.shape) for t in own.tensors)

    def _add(self, number: int) -> bool:
        """Capture a call, the first in another precision; False if it does other things than in the analysis."""
        call = self._calls[number]
        assert call is not None
        found = None if self.variants else Captured.in_another_precision(self._module, *call, self._apart)
        if found is None and number:
            try:
                found = Captured.of(self._module, *call, apart=self._apart)
            except (CaptureError, CutError):
                return False
        if found is None:
            return True
        lines, other = self.base.listing(), found.listing()
        if not same_operators(lines, other):
            return False
        self.variants.append(found)
        self._listings.append(other)
        self._captured.add(number)
        return True

    def _whole(self) -> Program:
        """The program of the module before any cut.

        Raises:
            CutError: a number follows no size, or an operator cannot be saved.
        """
        lines = self.base.listing()
        for step in lines.steps:
            if not is_call(step):
                try:
                    operator_named(step.target)
                except ValueError as error:
                    raise CutError(f"its forward cannot be saved: {error}") from None
        self.complete(lines)
        output = self.symbolic(lines, [copy.copy(step.args) for step in lines.steps], set())
        ops = tuple(as_op(step) for step in lines.steps)
        output = placed(output, lines.output)
        return Program(self.arguments, len(lines.inputs), tuple(lines.names), ops, output)

    def complete(self, lines: Listing) -> None:
        """Give the steps of all captures the arguments that any of them has."""
        complete(*(listing.steps for listing in (lines, *self._listings)))

    def _right(self, program: Program, number: int) -> bool:
        """Whether the program computes what the module does, on random weights and the tensors of a call."""
        call = cloned(self._calls[number])
        dtype = next((t.dtype for t in self._module.parameters() if t.is_floating_point()), torch.float32)
        values = aliases(self._module, random_values(self._module, 0))
        runner = Runner(self._module, program, self.base.captured.constants)
        named = {f"module.{name}": t for name, t in values.items()}
        try:
            with torch.no_grad():
                expected = functional_call(self._module, cloned(values), *cloned(call))
                result = functional_call(runner, cloned(named), *call)
        except Exception:  # whatever sizes that do not fit lead to
            return False
        literals, found = (
            [x for x in pytree.tree_leaves(opened(tree)) if not isinstance(x, Tensor)]
            for tree in (expected, result)
        )
        return literals == found and difference(floats(expected), floats(result))[1] <= CLOSE.get(dtype, 0.1)

    def _why_tied(self) -> str:
        """Why the sizes that are right say nothing about others, in words; "" if they do."""
        sized = set(range(self._alike, len(self._calls)))
        if sized and not self._fit & sized:
            return "it does other things at other image sizes"
        lost = [self._sizes(number) for number in self._unfit & sized]
        fit = [self._sizes(number) or () for number in self._fit]
        if any(sizes is None or within(sizes, fit) for sizes in lost):
            return "it does other things at some image sizes"
        return ""

    @property
    def arguments(self) -> Any:
        """See `Captures`."""
        return varying(self.base.arguments, [variant.arguments for variant in self.variants], [])

    def limits(self, cut: set[tuple[int, int]]) -> tuple[tuple[Limit, ...], ...]:
        """What the dims of each input may be: one size, those between sizes that were tried, or any.

        Args:
            cut: (input, dim) that lose positions, which nothing depends on.
        """
        columns = list(zip(*(self._sizes(number) or () for number in sorted(self._fit)), strict=True))
        batches = [self._sizes(number) or () for number in self._fit if number < self._alike]
        result = []
        for i, shapes in enumerate(columns):
            limits: list[Limit] = []
            for dim, sizes in enumerate(zip(*shapes, strict=True)):
                free = len(set(sizes)) > 1 and (
                    not self._unfit or len({shape[i][dim] for shape in batches}) > 1
                )
                limits.append(None if free or (i, dim) in cut else (min(sizes), max(sizes)))
            result.append(tuple(limits))
        return tuple(result)

    def symbolic(self, lines: Listing, before: Sequence[dict[str, Any]], cut: set[tuple[int, int]]) -> Any:
        """Express the numbers of all steps, and of the output, that differ between captures by sizes.

        Args:
            lines: of `base`, after a cut; changed in place.
            before: the arguments of its steps before the cut.
            cut: (register, dim) of every tensor that loses positions.
        Returns:
            the output, in which `Ref` counts those of the listing's.
        Raises:
            CutError: a number follows no size.
        """
        everything = (lines, *self._listings)

        def symbols(registers: Sequence[int]) -> dict[Dim, tuple[int, ...]]:
            found = {}
            for register in dict.fromkeys(registers):
                shapes = [size_of(listing.nodes[register]) for listing in everything]
                for dim, sizes in enumerate(zip(*shapes, strict=False)):
                    if len(set(sizes)) > 1 and (register, dim) not in cut:
                        found[Dim(register, dim)] = sizes
            return found

        columns: list[tuple[int, ...]] = []
        varying(self.base.arguments, [variant.arguments for variant in self.variants], columns)
        given = {Dim(-1, index): column for index, column in enumerate(columns)}
        given |= symbols(range(len(lines.inputs)))
        literals = named_numbers(before, [[step.args for step in other.steps] for other in self._listings])
        for i, step in enumerate(lines.steps):
            others = [other.steps[i].args for other in self._listings]
            if all(other == before[i] for other in others):
                continue
            sizes = Sizes(Expressions(symbols(refs(before[i])) | given, literals), step.op)
            for key, arg in step.args.items():
                step.args[key] = sizes.symbolic(arg, before[i].get(key), [other.get(key) for other in others])
        sizes = Sizes(Expressions(given, literals), "output")
        return sizes.symbolic(self.base.output, self.base.output, [v.output for v in self.variants])

    @functools.cached_property
    def training(self) -> Captured | None:
        """As `base`, in training mode; None where that cannot be captured."""
        assert self._calls[0] is not None
        try:
            return Captured.of(self._module, *self._calls[0], apart=self._apart, training=True)
        except (CaptureError, CutError):
            return None


def same_operators(lines: Listing, other: Listing) -> bool:
    """Whether two captures of a module do the same things, whatever the sizes."""
    a, b = lines.captured.constants, other.captured.constants
    return (
        [step.target for step in lines.steps] == [step.target for step in other.steps]
        and lines.names == other.names
        and all(
            name not in a
            or (a[name].shape == b[name].shape and torch.equal(a[name].double(), b[name].double()))
            for name in lines.names
        )
    )


class Runner(nn.Module):
    """Runs a program with the tensors and submodules of a module that was not rewritten.

    Args:
        module: whose forward the program stands for.
        program: reads the module's tensors as those of `module`.
        constants: what it reads besides.
    """

    def __init__(self, module: nn.Module, program: Program, constants: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.module = module
        self._program = program
        self._constants = constants

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the program computes."""
        inputs, numbers = inputs_of(self._program, self.module, args, kwargs)
        tensors = [
            self._constants[name].clone()
            if name in self._constants
            else tensor_named(self.module, name.removeprefix("module."))
            for name in self._program.tensors
        ]
        return self._program.run(inputs, tensors, self.module, numbers=numbers)


def within(sizes: Shapes, others: Sequence[Shapes]) -> bool:
    """Whether every size lies between the least and the largest of others."""
    return all(
        min(other[i][dim] for other in others) <= size <= max(other[i][dim] for other in others)
        for i, shape in enumerate(sizes)
        for dim, size in enumerate(shape)
    )


def named_numbers(args: Sequence[Any], others: Sequence[Sequence[Any]]) -> list[int]:
    """Whole numbers among arguments that are the same in every capture, in the order in which they are met."""
    found: dict[int, None] = {}

    def note(arg: Any, same: Sequence[Any]) -> None:
        if type(arg) is int and all(other == arg for other in same):
            found[abs(arg)] = None
        elif isinstance(arg, dict):
            for key, part in arg.items():
                note(part, [other.get(key) for other in same])
        elif isinstance(arg, list) and all(isinstance(o, list) and len(o) == len(arg) for o in same):
            for i, part in enumerate(arg):
                note(part, [other[i] for other in same])

    note(list(args), [list(other) for other in others])
    return list(found)


def likeness(x: Any, known: dict[int, int]) -> Any:
    """What two modules, or two calls, have in common if what is captured of one holds for the other.

    Modules count by class, attributes and submodules, tensors by shape and type, anything unknown by identity.

    Args:
        x: module, or anything that may be an attribute or argument of one.
        known: tensors and modules met so far, by identity; those met are added.
    """
    if isinstance(x, nn.Module | Tensor):
        if id(x) in known:
            return "again", known[id(x)]
        known[id(x)] = len(known)
    if isinstance(x, nn.Module):
        return type(x), likeness(vars(x), known)
    if isinstance(x, Tensor) and x.layout is torch.strided:
        return type(x), x.shape, x.stride(), x.dtype, x.device, x.requires_grad
    if isinstance(x, Mapping):
        return type(x), tuple((key, likeness(value, known)) for key, value in x.items())
    if type(x) in (list, tuple, torch.Size):
        return type(x), tuple(likeness(part, known) for part in x)
    if x is None or type(x) in (bool, int, float, str):
        return type(x), x
    return ("set", frozenset(x)) if type(x) is set else ("object", id(x))


def complete(*steps: Sequence[Step]) -> None:
    """Give each step the arguments that any of its counterparts has: the default, where it is left out."""
    for counterparts in zip(*steps, strict=True):
        for key in {key for step in counterparts for key in step.args}:
            for step in counterparts:
                if key not in step.args:
                    step.args[key] = step.default(key)


DROPOUTS = frozenset("dropout dropout_ feature_dropout alpha_dropout feature_alpha_dropout".split())
"""Operators that change nothing in evaluation mode, so that a program may call them there too."""


@dataclass(frozen=True)
class InTraining:
    """What a module does in training mode.

    Attributes:
        listing: its operators.
        steps: those that do not only count batches, with the same step in evaluation mode; None: it runs in
            training mode only.
        same: whether nothing but dropout comes to what it does in evaluation mode.
    """

    listing: Listing
    steps: list[tuple[Step, Step | None]]
    same: bool


def in_training(training: Captured | None, lines: Listing) -> InTraining | None:
    """The operators in training mode beside those in evaluation mode; None: they are not known."""
    try:
        listing = training.listing() if training else None
    except CutError:
        listing = None
    if listing is None:
        return None
    rest = list(lines.steps)
    steps: list[tuple[Step, Step | None]] = []
    for step in listing.steps:
        if counts(step):
            continue
        steps.append((step, rest.pop(0) if rest and rest[0].target == step.target else None))
    pairs = [(theirs, ours) for theirs, ours in steps if ours]
    if not rest:
        complete(*zip(*pairs, strict=True))
    same = not rest and all(
        len(refs(theirs.args)) == len(refs(ours.args))
        and (not is_call(ours) or literals_of(theirs.args) == literals_of(ours.args))
        for theirs, ours in pairs
    )
    return InTraining(listing, steps, same and all(ours or theirs.op in DROPOUTS for theirs, ours in steps))


def training_switches(
    training: InTraining | None, lines: Listing
) -> tuple[list[dict[str, tuple[str, Any, Any]]], str]:
    """What changes in training mode: per step, argument -> (module, value in training, value otherwise).

    Returns:
        also what cannot be expressed this way, in words.
    """
    if training and training.same:
        result = []
        for theirs, ours in training.steps:
            if ours is None:
                continue
            changed = {}
            for key, no in ours.args.items():
                yes = theirs.args[key]
                if isinstance(no, bool | float | None) and isinstance(yes, bool | float | None) and no != yes:
                    changed[key] = (owner(ours), yes, no)
            result.append(changed)
        return result, ""
    found = {theirs.op for theirs, _ in training.steps} if training else set()
    only = sorted(found - {s.op for s in lines.steps})
    lost = (
        f"what it does in training mode only ({', '.join(only)})"
        if only
        else "what it does in training mode only"
    )
    switches = []
    for step in lines.steps:
        switch = OPERATORS[step.op].trains if step.op in OPERATORS else None
        switches.append({switch: (owner(step), True, False)} if switch else {})
    return switches, lost


def insert_dropouts(lines: Listing, training: InTraining | None) -> None:
    """Put the dropouts that run in training mode only into the steps; registers are numbered anew."""
    if training is None or not training.same or all(ours for _, ours in training.steps):
        return
    start = len(lines.inputs) + len(lines.tensors)
    names = training.listing.names
    known = {i: i for i in range(len(lines.inputs))}
    known |= {
        len(known) + i: len(known) + lines.names.index(n) for i, n in enumerate(names) if n in lines.names
    }
    place = {id(step): number for number, step in enumerate(training.listing.steps)}
    first = len(training.listing.inputs) + len(names)
    old = {id(step): start + number for number, step in enumerate(lines.steps)}
    moved = {i: i for i in range(start)}
    steps: list[Step] = []
    for theirs, ours in training.steps:
        step = ours or theirs
        moved |= {old[id(ours)]: start + len(steps)} if ours else {}
        step.args = renumbered(step.args, iter([known[index] for index in refs(theirs.args)]), moved)
        if ours is None:
            step.args["train"] = Training(owner(theirs), True, False)
        known[first + place[id(theirs)]] = start + len(steps)
        steps.append(step)
    lines.steps[:] = steps
    lines.output = renumbered(lines.output, iter([known[i] for i in refs(training.listing.output)]), moved)


def renumbered(arg: Any, numbers: Iterator[int], moved: Mapping[int, int]) -> Any:
    """An argument with the next number in each of its references, in the order of `refs`, and sizes of what moved."""
    if isinstance(arg, Ref):
        return Ref(next(numbers))
    if isinstance(arg, Dim):
        return Dim(moved.get(arg.register, arg.register), arg.dim)
    if isinstance(arg, Size):
        return Size(arg.op, renumbered(arg.left, numbers, moved), renumbered(arg.right, numbers, moved))
    if isinstance(arg, list | tuple):
        return type(arg)(renumbered(part, numbers, moved) for part in arg)
    if isinstance(arg, dict):
        return arg | {name: renumbered(arg[name], numbers, moved) for name in sorted(arg)}
    return arg


def literals_of(arg: Any) -> list[Any]:
    """What an argument holds besides references."""
    return [leaf for _, leaf in leaves_of(arg) if not isinstance(leaf, Ref)]


def counts(step: Step) -> bool:
    """Whether a step only counts batches, as batch norm does in training mode."""
    return step.op == "add_" and not step.node.args[0].meta["val"].is_floating_point()  # type: ignore[union-attr]


def owner(step: Step) -> str:
    """Name of the module in whose forward a step runs, as seen from the captured one."""
    return step.module.removeprefix("module").removeprefix(".")


def fill(tree: Any, given: Any, leaves: Sequence[Any]) -> Any:
    """The tree with the leaves in place of each `Ref`, and what was given in place of anything."""
    if isinstance(tree, Ref):
        return leaves[tree.index]
    if isinstance(tree, dict):
        return {name: fill(part, given and given[name], leaves) for name, part in tree.items()}
    if isinstance(tree, Made):
        entries = entries_in(given) if given is not None else None
        return tree(
            {name: fill(part, entries and entries[name], leaves) for name, part in tree.entries.items()}
        )
    if isinstance(tree, list | tuple):
        parts = [fill(part, given and given[i], leaves) for i, part in enumerate(tree)]
        return type(tree)(parts)
    return given if tree == ANYTHING else tree


def varying(tree: Any, others: Sequence[Any], columns: list[tuple[int, ...]]) -> Any:
    """The tree with `Given` in place of whole numbers that differ from those of the others, and anything for the rest.

    Args:
        columns: the numbers are added to it, each with those of the others.
    """
    if isinstance(tree, dict):
        return {
            name: varying(part, [other[name] for other in others], columns) for name, part in tree.items()
        }
    if isinstance(tree, Made):
        return Made(tree.cls, varying(dict(tree.entries), [dict(other.entries) for other in others], columns))
    if isinstance(tree, list | tuple):
        if any(len(other) != len(tree) for other in others):
            raise CutError("an argument differs in number between sizes")
        return type(tree)(varying(part, [o[i] for o in others], columns) for i, part in enumerate(tree))
    if all(type(other) is type(tree) and other == tree for other in others):
        return tree
    if all(type(x) is int for x in (tree, *others)):
        columns.append((tree, *others))
        return Given(len(columns) - 1)
    return ANYTHING


def size_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of a placeholder."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


@contextmanager
def recorded(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[Arguments]]]:
    """Inside the block, the arguments of every call of some submodules are noted."""
    calls: dict[str, list[Arguments]] = {name: [] for name in names}
    handles = []
    for name in names:

        def note(_: nn.Module, args: Any, kwargs: Any, to: list[Arguments] = calls[name]) -> None:
            to.append((args, kwargs))

        handles.append(model.get_submodule(name).register_forward_pre_hook(note, with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
