"""Writing the program of a submodule after a cut, for any batch size, any image size and both modes.

The submodule is captured by itself, from the calls that the whole model makes of it: once as in the analysis, and
again with other batches and other image sizes, in another precision and in training mode. What differs between
these captures is a size, a precision, or a switch of the training mode; all else is a literal.
"""

import copy
import difflib
import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from secateur.errors import CaptureError, CutError
from secateur.graph.branches import Branch
from secateur.graph.capture import Capture, Inputs, as_call, capture
from secateur.graph.duplicate import cloned, duplicate
from secateur.graph.guard import as_exported, opened, quiet, untouched
from secateur.graph.labels import Atoms, Value, along, compress, reshape
from secateur.graph.modes import chance_kept, default_precision, forget_kept
from secateur.graph.modules import Keep
from secateur.graph.operators import OPERATORS, Step
from secateur.graph.probe import aliases, difference, floats, random_values
from secateur.graph.samples import sampled
from secateur.graph.trace import Survivors, Trace, repeated
from secateur.rewriting.align import align, counts
from secateur.rewriting.calls import Sites, entries_in, leaves_of, marked, strip
from secateur.rewriting.compose import calls_of, collapse, placed
from secateur.rewriting.listing import Listing, as_op, find_calls, is_call, list_operators
from secateur.rewriting.program import (
    ANYTHING,
    LARGEST,
    Dim,
    Given,
    Limit,
    Made,
    Named,
    Program,
    Ref,
    Training,
    kind_of,
    operator_named,
    refs,
    sizes_in_words,
)
from secateur.rewriting.rewrite import CONSTANT, arguments_of, cut_steps, inputs_of, tensor_named
from secateur.rewriting.sizes import Expressions
from secateur.rewriting.without import sums_at, sums_of, without

Call = tuple[tuple[Any, ...], dict[str, Any]]
Calls = list[Call]
Shapes = tuple[tuple[int, ...], ...]
Arguments = dict[str, Any]

FEWEST = 2
"""Least captures besides that of the analysis that numbers are compared between, if the module meets other sizes."""

CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Largest relative difference of the same operators on the same tensors, by precision."""

MASKED = nn.MultiheadAttention
"""A layer of torch's own that takes masks, which many a network passes in training or for padded images only."""

MASKS: tuple[Callable[[Tensor, tuple[int, int, int]], Arguments], ...] = (
    lambda query, size: {"attn_mask": query.new_zeros(size[1:], dtype=torch.bool)},
    lambda query, size: {"attn_mask": query.new_zeros(size[1:])},
    lambda query, size: {"key_padding_mask": query.new_zeros(size[::2], dtype=torch.bool)},
)
"""Its masks, so that they hide nothing: of a query and how many images, queries and keys there are."""

TRAINS = "what it does in training mode only"
"""How `Draft.lost` begins to say that a module does more in training mode."""

HINTS = frozenset(("is_causal", "tgt_is_causal", "memory_is_causal", "src_is_causal"))
"""Arguments of torch's own layers that say of a mask what it shows itself; without them it is added as it is."""

VIEWS = ("view", "reshape", "_unsafe_view")
"""Operators that work out one size by themselves."""


@dataclass(frozen=True)
class Draft:
    """The program of one module after a cut.

    Attributes:
        constants: buffers to be registered with it.
        lost: what the module does and the program does not, in words; "" if nothing.
        tied: why it takes fewer image sizes than the module did, in words; "" if it takes all.
        others: the same for calls with other arguments.
    """

    program: Program
    constants: dict[str, Tensor]
    lost: str
    tied: str
    others: tuple["Draft", ...] = ()

    @property
    def programs(self) -> list[Program]:
        """That of the usual arguments, then those for others."""
        return [self.program, *(other.program for other in self.others)]

    @property
    def all_constants(self) -> dict[str, Tensor]:
        """The buffers that all of them read."""
        return self.constants | {name: t for other in self.others for name, t in other.constants.items()}


class MixedError(CutError):
    """At some size, a view takes channels apart in another way than in the analysis."""


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
        forget_kept(self._model)
        self._trace = trace
        self._survivors = survivors
        self._inputs = inputs
        self._whole = list_operators(trace.captured)
        self._regions = find_calls(self._whole, self._model)
        self._runs: dict[str, list[Calls]] = {}
        self._exported: dict[str, list[Calls]] = {}
        self._captures: dict[Any, Captures] = {}
        self._samples: tuple[list[Inputs], list[Inputs]] | None = None

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
        if not self._runs[name][0]:
            raise CutError(f"{name}: it is not called in evaluation mode")
        return self._written(name, self._runs[name], apart)

    def others(
        self, name: str, apart: Collection[str] | None, draft: Draft
    ) -> Iterator[tuple[Draft, Arguments]]:
        """Drafts for calls with other arguments than those of a draft, such as masks that hide nothing.

        Args:
            name, apart: as for the draft.
            draft: whose constants go before theirs.
        Yields:
            also what the first such call is given instead, by name.
        """
        module = self._model.get_submodule(name)
        runs, taken = self._runs[name], len(draft.constants)
        ways = [with_mask(module, runs, make) for make in MASKS] if isinstance(module, MASKED) else []
        for calls in (*ways, self._exported.get(name)):
            changed = instead(module, runs[0][0], calls[0][0]) if calls and calls[0] else {}
            if not calls or not changed:
                continue
            try:
                other = self._written(name, calls, apart, taken)
            except Exception:  # it is not like what is known of the module: then such calls are refused
                continue
            first = FixedCall(module, *calls[0][0])
            kinds = tuple(map(kind_of, first.tensors))
            yield replace(other, program=replace(other.program, kinds=kinds)), changed
            taken += len(other.constants)

    def _written(self, name: str, runs: list[Calls], apart: Collection[str] | None, taken: int = 0) -> Draft:
        """The program for the calls of a module in some runs; `taken`: constants that it has already."""
        assert self._samples is not None
        given, tied = len(self._samples[0]), ""
        for some in dict.fromkeys((len(runs), given)):  # at least at the image size of the analysis
            calls = [[run[i] if i < len(run) else None for run in runs[:some]] for i in range(len(runs[0]))]
            try:
                drafts = [self._draft(name, number, each, apart, taken) for number, each in enumerate(calls)]
            except MixedError as error:
                if some == given:
                    raise
                tied = str(error)
                continue
            first = drafts[0]
            if all(draft.program == first.program for draft in drafts):
                return replace(first, tied=first.tied or (tied and told(first.program, tied)))
            tied = f"it is called {len(drafts)} times, in different ways"
        raise CutError(f"{name}: it is called {len(drafts)} times, in ways that need different programs")

    def _record(self, name: str) -> None:
        """Note the calls of a module, and of all others of its class, for inputs of every size."""
        kind = type(self._model.get_submodule(name))
        names = [n for n, module in self._model.named_modules() if type(module) is kind]
        runs: list[dict[str, Calls]] = []

        def calls_of(given: Inputs) -> dict[str, Calls]:
            args, kwargs = as_call(given)
            with (
                quiet(),
                untouched(self._model),
                chance_kept(),
                torch.no_grad(),
                recorded(self._model, names) as calls,
            ):
                self._model(*args, **kwargs)
            return calls

        def run(given: Inputs) -> bool:
            try:
                runs.append(calls_of(given))
            except Exception:  # whatever its own code raises at a size it was not made for
                if not runs:
                    raise
                return False
            return True

        if self._samples is None:
            captured = self._trace.captured
            self._samples = sampled(self._inputs, captured.batching, captured.batch, run)
        else:
            for given in itertools.chain(*self._samples):
                if not run(given):
                    runs.append({n: [] for n in names})
        for n in names:
            self._runs[n] = [calls[n] for calls in runs]
        exported: list[dict[str, Calls]] = []
        for given in itertools.chain(*self._samples):
            calls: dict[str, Calls] = {n: [] for n in names}
            with suppress(Exception), as_exported():  # whatever its own code raises
                calls = calls_of(given)
            exported.append(calls)
            if not any(differ(self._model.get_submodule(n), runs[0][n], exported[0][n]) for n in names):
                return
        self._exported |= {n: [calls[n] for calls in exported] for n in names}

    def _draft(
        self,
        name: str,
        number: int,
        calls: Sequence[Call | None],
        apart: Collection[str] | None,
        taken: int = 0,
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
        values, sums = self._match(name, number, captures.base.operators)
        (captured, *others), training = captures.in_both_modes()
        switches, lost = training_switches(training, captured, captures.training)
        left_out = sums_at(captured, sums)
        others = [without(other, left_out)[0] for other in others]
        captured, kept = without(captured, left_out)
        switches = [switches[i] for i in kept]
        unheard = captures.base.unheard()
        hooks = f"hooks on {', '.join(unheard[:4])}{' …' * (len(unheard) > 4)}" if unheard else ""
        lost = " and ".join(filter(None, [hooks, lost, *captures.lost_in_training(bool(lost))]))
        cut = self._cut_dims(captured, values)
        if not all(same_views(captured, other, cut) for other in others):
            raise MixedError("its channels mean something else at other image sizes")
        before = [copy.copy(step.args) for step in captured.steps]
        cut_steps(captured, values, self._survivors)
        try:
            output = captures.symbolic(captured, before, others, cut)
        except CutError as error:
            raise CutError(f"{name}: {error}") from None
        for i, step in enumerate(captured.steps):
            step.args |= {
                key: Training(m, yes, step.args.get(key, no)) for key, (m, yes, no) in switches[i].items()
            }
        return self._finish(captured, captures, output, captures.limits(cut), lost, taken)

    def _cut_dims(self, lines: Listing, values: Mapping[fx.Node, Any]) -> dict[tuple[int, int], Keep]:
        """(register, dim) of every tensor that loses positions -> which it keeps."""
        found: dict[tuple[int, int], Keep] = {}
        for register, node in enumerate(lines.nodes):
            value = values.get(node)
            if isinstance(value, Value):
                found |= {(register, dim): keep for dim, keep in self._survivors.keep(value).items()}
        return found

    def _capture(
        self, module: nn.Module, calls: Sequence[Call | None], apart: Collection[str] | None
    ) -> "Captures":
        """The captures of one call; networks repeat their blocks, so those of a module like it will do."""
        alike = likeness((module, calls), {}), apart
        if alike in self._captures:
            return self._captures[alike]
        assert self._samples is not None
        self._captures[alike] = Captures.of(module, calls, len(self._samples[0]), apart)
        return self._captures[alike]

    def _finish(
        self, lines: Listing, captures: "Captures", output: Any, limits: Any, lost: str, taken: int
    ) -> Draft:
        base = captures.base
        named = {*base.captured.tensors.values()}
        unnamed = [name for name in lines.names if name in base.captured.constants]
        free = (f"{CONSTANT}{i}" for i in itertools.count(taken) if f"module.{CONSTANT}{i}" not in named)
        buffers = dict(zip(unnamed, free, strict=False))
        program = Program(
            arguments=captures.arguments,
            inputs=len(lines.inputs),
            tensors=tuple(buffers.get(name) or name.removeprefix("module.") for name in lines.names),
            ops=tuple(as_op(step) for step in lines.steps),
            output=output,
            limits=limits,
        )
        constants = {buffers[name]: base.captured.constants[name].detach().clone() for name in unnamed}
        tied = captures.tied and told(program, captures.tied)
        return Draft(program, constants, lost, tied)

    def _match(
        self, name: str, number: int, lines: Listing
    ) -> tuple[dict[fx.Node, Any], dict[fx.Node, Branch]]:
        """What the analysis knows about the nodes of a module that was captured by itself, and branches that go."""
        found = [self._whole.steps[i] for i in self._regions.get((name, number), [])]
        # what is contiguous already is not copied, and that may be otherwise within the model
        found, steps = ([s for s in listed if s.op != "contiguous"] for listed in (found, lines.steps))
        values: dict[fx.Node, Any] = {}
        gone = sums_of(self._whole, self._survivors.skipped)
        branches = {self._whole.steps[i].node: branch for i, branch in gone.items()}
        sums: dict[fx.Node, Branch] = {}
        for theirs, own in counterparts(found, steps):
            if theirs is None:  # such as what adds a mask to scores: its result is like what it reads
                read = (values.get(lines.nodes[ref]) for ref in refs(own.args))
                alike = (v for v in read if isinstance(v, Value) and (v.shape,) == own.shapes)
                values[own.node] = next(alike, None)
                continue
            if theirs.node in branches:
                sums[own.node] = branches[theirs.node]
            values[own.node] = self._trace.values.get(theirs.node)
            if theirs.target != own.target:
                continue
            both = own.args.keys() & theirs.args.keys()
            pairs = [
                pair
                for key in sorted(both)
                for pair in zip(refs(own.args[key]), refs(theirs.args[key]), strict=False)
            ]
            for a, b in pairs:
                node, value = lines.nodes[a], self._trace.values.get(self._whole.nodes[b])
                known = values.setdefault(node, value)
                if isinstance(value, Value) and isinstance(known, Value) and known.shape != value.shape:
                    raise CutError(f"{name}: its forward does other things by itself than within the model")
        for step in lines.steps:
            if step.op == "contiguous":
                values[step.node] = values.get(lines.nodes[step.args["self"].index])
        return values, sums


def counterparts(found: Sequence[Step], steps: Sequence[Step]) -> Iterator[tuple[Step | None, Step]]:
    """For every step of a module captured by itself, the one within the model; None: it does it by itself only.

    A forward may do a little more, or less, for the arguments at hand: add a mask, or multiply and add at once. What
    comes of it is judged by what the module gives.
    """
    matcher = difflib.SequenceMatcher(
        None, [s.target for s in found], [s.target for s in steps], autojunk=False
    )
    for how, a, a_end, b, b_end in matcher.get_opcodes():
        left = list(found[a:a_end])
        if how == "equal":
            yield from zip(left, steps[b:b_end], strict=True)
            continue
        for own in steps[b:b_end]:
            theirs = next((s for s in left if s.shapes == own.shapes), None)
            if theirs is not None:
                left = left[left.index(theirs) + 1 :]
            yield theirs, own


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
            entries = [dict(made.entries) for made in (arg, base, *others)]
            return Made(base.cls, self.symbolic(entries[0], entries[1], entries[2:]))
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
        if type(module).__module__.startswith("torch.nn.modules."):
            self.arguments |= {n: ANYTHING for n in HINTS & self.arguments.keys() if not self.arguments[n]}
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
            with default_precision(other):
                return cls.of(twin, *pytree.tree_map(convert, (args, kwargs)), apart=apart)
        except (CaptureError, CutError):
            return None

    @functools.cached_property
    def operators(self) -> Listing:
        """Its operators, those of submodules that are called included."""
        return list_operators(self.captured)

    @functools.cached_property
    def listing(self) -> Listing:
        """Its operators and the calls of submodules that can be made as they are."""
        return collapse(self.operators, [self.sites[call.site] for call in self.operators.calls])

    def refused(self) -> set[str]:
        """Submodules whose calls were marked and cannot be made as they are."""
        return {site.module for site in self.sites} - {*calls_of(self.listing)}

    def unheard(self) -> list[str]:
        """The submodules that the module calls and whose operators are written out."""
        called = calls_of(self.listing)
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
        calls: Sequence[Call | None],
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
            refused = self.base.refused() | {*calls_of(self.base.listing)} & {*self.base.sites.passed}
            if self._apart is None or refused <= {*self._apart}:
                break
            self._apart = {*self._apart, *refused}  # what they call is looked at instead
        self.tied = ""
        self._found: dict[tuple[int, bool], Captured | None] = {}
        self._other = {number for number in range(len(calls)) if self._sizes(number) is None}
        self._forget()

    @classmethod
    def of(
        cls,
        module: nn.Module,
        calls: Sequence[Call | None],
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
        sized, batches = range(alike, len(calls)), range(1, alike)
        if not sized or not captures._settle([[*reversed(sized), *batches], [*sized, *batches]]):
            captures._forget()
            captures._compare(batches)
        if captures._unfit & set(range(alike)):
            raise CutError("its forward does other things for another batch size or precision")
        return captures

    def _settle(self, orders: Sequence[Sequence[int]]) -> bool:
        """Compare the calls in the order that makes the numbers right at most of them, then with least arithmetic.

        A size at which the forward does something special may be among the first; then others fit badly.

        Returns:
            whether enough is known about other image sizes.
        """
        best: tuple[tuple[int, int], dict[str, Any]] | None = None
        for order in orders:
            self._forget()
            try:
                length = self._compare(order)
            except CutError as error:
                self._reason = str(error)
                continue
            if best is None or (len(self._fit), -length) > best[0]:
                best = (len(self._fit), -length), dict(vars(self))
            if self._unfit <= self._other:
                break
        vars(self).update(best[1] if best else {})
        self.tied = self._reason if best is None or self._unfit else ""
        return best is not None and self._tells()

    def _forget(self) -> None:
        self.variants: list[Captured] = []
        self._captured = [0]
        self._reason = "it does other things at other image sizes"
        self._fit: set[int] = {0}
        self._unfit: set[int] = set()

    def _compare(self, numbers: Sequence[int]) -> int:
        """Sort these calls into those at which the numbers are right and others, and capture what that takes.

        Returns:
            the length of the program, written out.
        Raises:
            CutError: a number follows no size.
        """
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
            try:
                program = self._whole()
            except CutError as error:
                if len(self.variants) == 1:
                    raise
                self.variants.pop()
                last = self._captured.pop()
                self._fit.remove(last)
                self._unfit.add(last)
                self._reason = str(error)
                continue
            wrong = (n for n in sorted(self._fit - {0}) if not self._right(program, n))
            found = next(wrong, None)
            if found is None:
                return len(repr(program.ops))
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
        """Capture a call, the first in float64; False if it does other things than in the analysis."""
        if number in self._other:
            return False
        found = None if self.variants else self._capture(number, True)
        if found is None and number:
            found = self._capture(number, False)
        if found is None:
            return not number
        if align([capture.listing for capture in (self.base, *self.variants, found)]) is None:
            if align([self.base.listing, found.listing]) is None:
                self._other.add(number)
            return False
        self.variants.append(found)
        self._captured.append(number)
        return True

    def _capture(self, number: int, double: bool) -> Captured | None:
        """A call captured by itself, in another precision or as it is; None where it cannot be."""
        if (number, double) not in self._found:
            call = self._calls[number]
            assert call is not None
            capture_call = Captured.in_another_precision if double else Captured.of
            try:
                self._found[number, double] = capture_call(self._module, *call, apart=self._apart)
            except (CaptureError, CutError):
                self._found[number, double] = None
        return self._found[number, double]

    def listings(self) -> list[Listing]:
        """The operators and calls of all captures; the first is that of the analysis."""
        found = align([captured.listing for captured in (self.base, *self.variants)])
        assert found is not None
        return found

    def in_both_modes(self) -> tuple[list[Listing], Listing | None]:
        """The same with every step of the training mode, and beside it the steps in that; None: they are others."""
        captures = [captured.listing for captured in (self.base, *self.variants)]
        try:
            found = align([*captures, self.training.listing]) if self.training else None
        except CutError:
            found = None
        if found is None or not same_calls(found[0], found[-1]):
            return self.listings(), None
        return found[:-1], found[-1]

    def _whole(self) -> Program:
        """The program of the module before any cut.

        Raises:
            CutError: a number follows no size, or an operator cannot be saved.
        """
        lines, *others = self.listings()
        for step in lines.steps:
            if not is_call(step):
                try:
                    operator_named(step.target)
                except ValueError as error:
                    raise CutError(f"its forward cannot be saved: {error}") from None
        output = self.symbolic(lines, [copy.copy(step.args) for step in lines.steps], others, set())
        ops = tuple(as_op(step) for step in lines.steps)
        return Program(self.arguments, len(lines.inputs), tuple(lines.names), ops, output)

    def _right(self, program: Program, number: int) -> bool:
        """Whether the program computes what the module does, on random weights and the tensors of a call."""
        call = cloned(self._calls[number])
        dtype = next((t.dtype for t in self._module.parameters() if t.is_floating_point()), torch.float32)
        values = aliases(self._module, random_values(self._module, 0))
        runner = Runner(self._module, program, self.base.captured.constants)
        named = {f"module.{name}": t for name, t in values.items()}
        try:
            with untouched(self._module), torch.no_grad():
                expected = functional_call(self._module, cloned(values), *cloned(call))
                result = functional_call(runner, cloned(named), *call)
        except Exception:  # whatever sizes that do not fit lead to
            return False
        literals, found = (
            [x for x in pytree.tree_leaves(opened(tree)) if not isinstance(x, Tensor)]
            for tree in (expected, result)
        )
        return literals == found and difference(floats(expected), floats(result))[1] <= CLOSE.get(dtype, 0.1)

    def _tells(self) -> bool:
        """Whether the sizes at which the numbers are right say anything about those between them."""
        sized = set(range(self._alike, len(self._calls)))
        lost = [self._sizes(number) for number in self._unfit & sized]
        fit = [self._sizes(number) or () for number in self._fit]
        return len(self._fit & sized) >= min(FEWEST, len(sized)) and not any(
            sizes is None or within(sizes, fit) for sizes in lost
        )

    @property
    def arguments(self) -> Any:
        """See `Captures`."""
        return varying(self.base.arguments, [variant.arguments for variant in self.variants], [])

    def limits(self, cut: Collection[tuple[int, int]]) -> tuple[tuple[Limit, ...], ...]:
        """What the dims of each input may be: one size, those between sizes that were tried, or any.

        Args:
            cut: (input, dim) that lose positions, which nothing depends on.
        """
        fit = [self._sizes(number) or () for number in sorted(self._fit)]
        batches = [self._sizes(number) or () for number in self._fit if number < self._alike]
        unfit = [self._sizes(number) for number in self._unfit]
        below, above = any_beyond(unfit, fit, min), any_beyond(unfit, fit, max)
        result = []
        for i, shapes in enumerate(zip(*fit, strict=True)):
            limits: list[Limit] = []
            for dim, sizes in enumerate(zip(*shapes, strict=True)):
                if (i, dim) in cut or len({shape[i][dim] for shape in batches}) > 1:
                    limits.append(None)
                elif len(set(sizes)) == 1:
                    limits.append((sizes[0], sizes[0]))
                else:
                    limit = min(sizes) if below else 0, max(sizes) if above else LARGEST
                    limits.append(limit if below or above else None)
            result.append(tuple(limits))
        return tuple(result)

    def symbolic(
        self,
        lines: Listing,
        before: Sequence[dict[str, Any]],
        others: Sequence[Listing],
        cut: Collection[tuple[int, int]],
    ) -> Any:
        """Express the numbers of all steps, and of the output, that differ between captures by sizes.

        Args:
            lines: of `base`, after a cut; changed in place.
            before: the arguments of its steps before the cut.
            others: of the variants.
            cut: (register, dim) of every tensor that loses positions.
        Returns:
            the output.
        Raises:
            CutError: a number follows no size.
        """
        everything = (lines, *others)

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
        literals = named_numbers(before, [[step.args for step in other.steps] for other in others])
        for i, step in enumerate(lines.steps):
            args = [other.steps[i].args for other in others]
            if all(other == before[i] for other in args):
                continue
            sizes = Sizes(Expressions(symbols(refs(before[i])) | given, literals), step.op)
            for key, arg in step.args.items():
                step.args[key] = sizes.symbolic(arg, before[i].get(key), [other.get(key) for other in args])
        sizes = Sizes(Expressions(given, literals), "output")
        output = sizes.symbolic(self.base.output, self.base.output, [v.output for v in self.variants])
        return placed(output, lines.output)

    def lost_in_training(self, steps: bool) -> Iterator[str]:
        """What a program loses of the training mode besides its steps, in words.

        Args:
            steps: some of them are lost too.
        """
        if self.training is not None:
            if not steps and self.training.output != self.base.output:
                yield "what it returns in training mode"
            if self.training.captured.drawn:
                yield "the random numbers of Python that it draws in training mode"

    @functools.cached_property
    def training(self) -> Captured | None:
        """As `base`, in training mode; None where that cannot be captured."""
        assert self._calls[0] is not None
        try:
            return Captured.of(self._module, *self._calls[0], apart=self._apart, training=True)
        except (CaptureError, CutError):
            return None


def same_views(lines: Listing, other: Listing, cut: Mapping[tuple[int, int], Keep]) -> bool:
    """Whether every view does the same to the dims that lose positions, at the sizes of two captures."""
    for step, theirs in zip(lines.steps, other.steps, strict=True):
        source = step.args.get("self")
        if step.op not in VIEWS or not isinstance(source, Ref):
            continue
        for (register, dim), keep in cut.items():
            if register != source.index:
                continue
            moved = []
            for listing, own in ((lines, step), (other, theirs)):
                shape = size_of(listing.nodes[register])
                line = repeated(keep, shape[dim])
                if line is None:
                    return False
                factor = along(line.astype(np.int64), dim, len(shape))
                moved.append(compress(reshape(factor, shape, own.shapes[0])))
            if moved[0].ndim != moved[1].ndim or not agree(*moved):
                return False
    return True


def agree(a: Atoms, b: Atoms) -> bool:
    """Whether two arrays of as many dims are equal as far as both reach; a dim of size 1 reaches everywhere."""
    ends = [max(m, n) if 1 in (m, n) else min(m, n) for m, n in zip(a.shape, b.shape, strict=True)]
    box = tuple(slice(end) for end in ends)
    return bool((a[box] == b[box]).all())


def same_calls(lines: Listing, training: Listing) -> bool:
    """Whether submodules are called with the same numbers in both modes, which a program cannot switch."""
    return all(
        literals_of(ours.args) == literals_of(theirs.args)
        for ours, theirs in zip(lines.steps, training.steps, strict=True)
        if is_call(ours)
    )


def literals_of(arg: Any) -> list[Any]:
    """What an argument holds besides references."""
    return [leaf for _, leaf in leaves_of(arg) if not isinstance(leaf, Ref)]


def told(program: Program, reason: str) -> str:
    """What sizes a program takes and why no others, in words."""
    limits = [sizes_in_words(limits) for limits in program.limits if any(limits[1:])]
    return f"takes {' and '.join(dict.fromkeys(limits)) or 'these sizes'} only: {reason}"


def any_beyond(sizes: Sequence[Shapes | None], others: Sequence[Shapes], end: Callable[..., int]) -> bool:
    """Whether some size is beyond all others, below for `min` and above for `max`; an unknown one is."""
    return any(
        found is None
        or (size != (most := end(other[i][dim] for other in others)) and end(size, most) == size)
        for found in sizes
        for i, shape in enumerate(found or ((0,),))
        for dim, size in enumerate(shape)
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


def likeness(x: Any, known: dict[int, int], *, owned: bool = True) -> Any:
    """What two modules, or two calls, have in common if what is captured of one holds for the other.

    Modules count by class, attributes and submodules, anything unknown by identity; tensors by shape and type if they
    are parameters, buffers or arguments, which a capture does not look into.

    Args:
        x: module, or anything that may be an attribute or argument of one.
        known: tensors and modules met so far, by identity; those met are added.
        owned: whether tensors are of these kinds.
    """
    if isinstance(x, nn.Module | Tensor):
        if id(x) in known:
            return "again", known[id(x)]
        known[id(x)] = len(known)
    if isinstance(x, nn.Module):
        return type(x), tuple(
            (name, likeness(value, known, owned=name in ("_parameters", "_buffers")))
            for name, value in vars(x).items()
        )
    if isinstance(x, Tensor) and x.layout is torch.strided and owned:
        return type(x), x.shape, x.stride(), x.dtype, x.device, x.requires_grad
    if isinstance(x, Mapping):
        return type(x), tuple((key, likeness(value, known, owned=owned)) for key, value in x.items())
    if type(x) in (list, tuple, torch.Size):
        return type(x), tuple(likeness(part, known, owned=owned) for part in x)
    if x is None or type(x) in (bool, int, float, str):
        return type(x), x
    return ("set", frozenset(x)) if type(x) is set else ("object", id(x))


def training_switches(
    training: Listing | None, lines: Listing, captured: Captured | None
) -> tuple[list[dict[str, tuple[str, Any, Any]]], str]:
    """What changes in training mode: per step, argument -> (module, value in training, value otherwise).

    Args:
        training: the same steps in training mode; None: they are others.
        lines: in evaluation mode.
        captured: in training mode, to say what is lost; None: it is not known.
    Returns:
        also what cannot be expressed this way, in words.
    """
    if training is not None:
        result, other = [], set()
        for theirs, ours in zip(training.steps, lines.steps, strict=True):
            changed: dict[str, tuple[str, Any, Any]] = {}
            for key, no in ours.args.items():
                yes = theirs.args[key]
                if isinstance(no, bool | float | None) and isinstance(yes, bool | float | None):
                    changed |= {key: (owner(theirs), yes, no)} if no != yes else {}
                elif no != yes:
                    other.add(f"{key} of {ours.op}")
            result.append(changed)
        return result, f"what it does in training mode only ({', '.join(sorted(other))})" if other else ""
    try:
        found = {step.op for step in captured.listing.steps if not counts(step)} if captured else set()
    except CutError:
        found = set()
    only = sorted(found - {s.op for s in lines.steps})
    switches = []
    for step in lines.steps:
        switch = OPERATORS[step.op].trains if step.op in OPERATORS else None
        switches.append({switch: (owner(step), True, False)} if switch else {})
    return switches, TRAINS + (f" ({', '.join(only)})" if only else "")


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


def instead(module: nn.Module, call: Call, other: Call) -> Arguments:
    """What another call gives a module that this one does not: a mask in the place of None."""
    before, after = (arguments_of(module, *c).arguments for c in (call, other))
    return {name: x for name, x in after.items() if strip(before.get(name), []) != strip(x, [])}


def differ(module: nn.Module, calls: Calls, others: Calls) -> bool:
    """Whether a module is called as often, and with other arguments."""
    same = len(calls) == len(others)
    return same and any(instead(module, *both) for both in zip(calls, others, strict=True))


def with_mask(
    module: nn.MultiheadAttention,
    runs: Sequence[Calls],
    make: Callable[[Tensor, tuple[int, int, int]], Arguments],
) -> list[Calls]:
    """The calls of an attention layer with a mask; none where they have one already, or hold no batch."""
    result = []
    for calls in runs:
        masked = []
        for args, kwargs in calls:
            given = arguments_of(module, args, kwargs).arguments
            query, key = given["query"], given["key"]
            if given["attn_mask"] is not None or given["key_padding_mask"] is not None or query.ndim != 3:
                return []
            batch, length = (0, 1) if module.batch_first else (1, 0)
            size = query.shape[batch], query.shape[length], key.shape[length]
            masked.append(((), dict(given) | make(query, size)))
        result.append(masked)
    return result


@contextmanager
def recorded(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Calls]]:
    """Inside the block, the arguments of every call of some submodules are noted."""
    calls: dict[str, Calls] = {name: [] for name in names}
    handles = []
    for name in names:

        def note(_: nn.Module, args: Any, kwargs: Any, to: Calls = calls[name]) -> None:
            to.append((args, kwargs))

        handles.append(model.get_submodule(name).register_forward_pre_hook(note, with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
