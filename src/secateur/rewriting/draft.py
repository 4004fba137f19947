"""Writing the program of a submodule after a cut, for any batch size and both modes.

The submodule is captured by itself, from the calls that the whole model makes of it: once as in the analysis,
and again at another batch size, in another precision and in training mode. Numbers that differ between these
captures are sizes of the batch, precisions, or switches of the training mode; all others are literals.
"""

import copy
import functools
import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from secateur.errors import CaptureError, CutError
from secateur.graph.capture import BATCH, Capture, Inputs, as_call, capture, with_batch
from secateur.graph.duplicate import duplicate
from secateur.graph.labels import Value
from secateur.graph.operators import OPERATORS, Step
from secateur.graph.trace import Survivors, Trace
from secateur.rewriting.calls import Site, leaves_of, marked, opened, strip
from secateur.rewriting.compose import Composed, choose_calls, compose, follow, outline, outside, silent
from secateur.rewriting.listing import Listing, find_calls, list_operators
from secateur.rewriting.program import (
    ANYTHING,
    Made,
    Named,
    Program,
    Ref,
    Size,
    Training,
    operator_named,
    refs,
)
from secateur.rewriting.rewrite import CONSTANT, arguments_of, cut_steps

Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class Draft:
    """The program of one module after a cut.

    Attributes:
        constants: buffers to be registered with it.
        lost: what the module does and the program does not, in words; "" if nothing.
    """

    program: Program
    constants: dict[str, Tensor]
    lost: str


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
        self._runs: dict[str, list[Calls]] = {}
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
        base, *others = self._runs[name]
        if not base:
            raise CutError(f"{name}: it is not called in evaluation mode")
        drafts = [
            self._draft(name, number, [calls[number] for calls in (base, *others)], apart)
            for number in range(len(base))
        ]
        if any(draft.program != drafts[0].program for draft in drafts):
            raise CutError(f"{name}: it is called {len(drafts)} times, in ways that need different programs")
        return drafts[0]

    def _record(self, name: str) -> None:
        """Note the calls of a module, and of all others of its class, at two batch sizes."""
        kind = type(self._model.get_submodule(name))
        names = [n for n, module in self._model.named_modules() if type(module) is kind]
        batch = self._trace.captured.batch
        inputs = (
            [with_batch(self._inputs, b) for b in (BATCH, BATCH + 1)] if batch == BATCH else [self._inputs]
        )
        runs = []
        for candidate in inputs:
            args, kwargs = as_call(candidate)
            with recorded(self._model, names) as calls, torch.no_grad():
                self._model(*args, **kwargs)
            runs.append(calls)
        for n in names:
            self._runs[n] = [run[n] for run in runs]

    def _draft(self, name: str, number: int, calls: Calls, apart: Collection[str] | None) -> Draft:
        module = self._model.get_submodule(name)
        try:
            captures = self._capture(module, calls)
        except CaptureError as error:
            raise CutError(f"{name}: its forward cannot be captured by itself ({error})") from None
        base, variants = captures.base, captures.variants
        captured = base.listing()
        listings = [variant.listing() for variant in variants]
        for other in listings:
            if [s.target for s in other.steps] != [s.target for s in captured.steps]:
                raise CutError(f"{name}: its forward does other things for another batch size or precision")
        values = self._match(name, number, captured)
        sizes = self._sizes(captured, listings, values)
        sites = [one.sites_of(of) for one, of in zip((base, *variants), (captured, *listings), strict=True)]
        prefix = f"{name}." if name else ""
        within = None if apart is None else [n.removeprefix(prefix) for n in apart if n.startswith(prefix)]
        chosen = choose_calls(
            captured, sites, within, lambda arg, others: sizes.symbolic(arg, arg, others, name)
        )
        switches, lost = training_switches(captures.training, captured, sites[0], chosen)
        unheard = silent(captured, sites[0], chosen)
        if unheard:
            lost = " and ".join(
                [f"hooks on {', '.join(unheard[:4])}{' …' * (len(unheard) > 4)}", *[lost] * bool(lost)]
            )
        before = [copy.copy(step.args) for step in captured.steps]
        cut_steps(captured, values, self._survivors, outside(captured, chosen))
        for i in outside(captured, chosen):
            step = captured.steps[i]
            try:
                operator_named(step.target)
            except ValueError as error:
                raise CutError(f"{name}: its forward cannot be saved: {error}") from None
            for key, arg in step.args.items():
                others = [other.steps[i].args.get(key) for other in listings]
                step.args[key] = sizes.symbolic(arg, before[i].get(key), others, f"{name}: {step.op}")
            step.args |= {
                key: Training(m, yes, step.args.get(key, no)) for key, (m, yes, no) in switches[i].items()
            }
        return self._finish(captured, base, variants, compose(captured, sites[0], chosen), lost)

    def _capture(self, module: nn.Module, calls: Calls) -> "Captures":
        """The captures of one call; networks repeat their blocks, so those of a module like it will do."""
        alike = likeness((module, calls), {})
        if alike in self._captures:
            return self._captures[alike]
        captures = Captures.of(module, calls)
        if not captures.base.captured.constants:  # these may differ, whatever else is equal
            self._captures[alike] = captures
        return captures

    def _finish(
        self, lines: Listing, base: "Captured", variants: list["Captured"], composed: Composed, lost: str
    ) -> Draft:
        unnamed = [name for name in composed.tensors if name in base.captured.constants]
        free = (f"{CONSTANT}{i}" for i in itertools.count() if f"module.{CONSTANT}{i}" not in lines.names)
        buffers = dict(zip(unnamed, free, strict=False))
        program = Program(
            arguments=varying(base.arguments, [variant.arguments for variant in variants]),
            inputs=len(lines.inputs),
            tensors=tuple(buffers.get(name) or name.removeprefix("module.") for name in composed.tensors),
            ops=tuple(composed.ops),
            output=composed.translate(follow([base.output], lines.output, lambda leaf, _: leaf)),
        )
        constants = {buffers[name]: base.captured.constants[name].detach().clone() for name in unnamed}
        return Draft(program, constants, lost)

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

    def _sizes(self, lines: Listing, others: Sequence[Listing], values: Mapping[fx.Node, Any]) -> "Sizes":
        """Dims of the inputs that vary and are not cut, with their size in every capture."""
        table = {}
        for i, node in enumerate(lines.inputs):
            value = values.get(node)
            cut = self._survivors.keep(value) if isinstance(value, Value) else {}
            shapes = [size_of(listing.inputs[i]) for listing in (lines, *others)]
            for dim in range(len(shapes[0])):
                column = [shape[dim] for shape in shapes]
                if dim not in cut and len(set(column)) > 1:
                    table[i, dim] = column
        return Sizes(table)


@dataclass(frozen=True)
class Sizes:
    """Sizes that numbers are expressed by: (input, dim) -> its size in every capture."""

    table: dict[tuple[int, int], list[int]]

    def symbolic(self, arg: Any, base: Any, others: Sequence[Any], where: str) -> Any:
        """An argument with the numbers that differ between captures expressed by sizes.

        Args:
            arg: after the cut.
            base: the same before the cut.
            others: the same in the other captures.
            where: for the message.
        Raises:
            CutError: a number follows no size.
        """
        if isinstance(arg, list):
            if any(not isinstance(o, list) or len(o) != len(arg) for o in (base, *others)):
                raise CutError(f"{where} has arguments that differ in number between batch sizes")
            return [
                self.symbolic(part, base[i], [other[i] for other in others], where)
                for i, part in enumerate(arg)
            ]
        if all(type(other) is type(base) and other == base for other in others):
            return arg
        if isinstance(base, Ref):
            return arg
        if isinstance(base, Named):
            return Named(base.kind, "same")
        if type(base) is int and type(arg) is int:
            for count in (1, 2):
                for dims in itertools.combinations(self.table, count):
                    first, *rest = (
                        math.prod(column) for column in zip(*(self.table[d] for d in dims), strict=True)
                    )
                    if all(base * size == other * first for size, other in zip(rest, others, strict=True)):
                        common = math.gcd(arg, first)
                        return Size(arg // common, first // common, dims)
        raise CutError(
            f"{where} has an argument {base!r} that changes with the input and follows none of its sizes"
        )


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
    sites: list[Site]

    @classmethod
    def of(cls, module: nn.Module, args: Any, kwargs: Any, *, training: bool = False) -> "Captured":
        """Capture one call."""
        call = FixedCall(module, args, kwargs)
        with marked(call.module) as sites:
            captured = capture(call, tuple(call.tensors), training=training, exact=True)
        if any(leaf == ANYTHING for _, leaf in leaves_of(call.returned.tree)):
            raise CutError(
                f"{type(module).__name__}: it returns something else than tensors, and lists and dicts of them"
            )
        return cls(captured, call.arguments, call.returned.tree, sites)

    @classmethod
    def of_double(cls, module: nn.Module, args: Any, kwargs: Any) -> "Captured | None":
        """Capture one call in float64; None for a module that does not run in it."""

        known: dict[int, Tensor] = {}  # a tensor that is passed twice stays one

        def double(x: Any) -> Any:
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return x
            return known.setdefault(id(x), x.double())

        try:
            twin = duplicate(module).double()
            return cls.of(twin, *pytree.tree_map(double, (args, kwargs)))
        except (CaptureError, CutError):
            return None

    def listing(self) -> Listing:
        """Its operators."""
        return list_operators(self.captured)

    def sites_of(self, lines: Listing) -> list[Site]:
        """What is known about each call of its listing."""
        return [self.sites[call.site] for call in lines.calls]


@dataclass
class Captures:
    """What a program is written from: one call of a module, captured as in the analysis and otherwise.

    Attributes:
        module: that is called.
        call: its arguments in the analysis.
        base: captured so.
        variants: at other batch sizes and in another precision.
    """

    module: nn.Module
    call: tuple[Any, Any]
    base: Captured
    variants: list[Captured]

    @classmethod
    def of(cls, module: nn.Module, calls: Calls) -> "Captures":
        """Capture one call, noted at several batch sizes."""
        base = Captured.of(module, *calls[0])
        double = Captured.of_double(module, *calls[-1])
        variants = [double] if double else [Captured.of(module, *call) for call in calls[1:]]
        return cls(module, calls[0], base, variants)

    @functools.cached_property
    def training(self) -> Captured | None:
        """As `base`, in training mode; None where that cannot be captured."""
        try:
            return Captured.of(self.module, *self.call, training=True)
        except (CaptureError, CutError):
            return None


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


def training_switches(
    training: Captured | None, lines: Listing, sites: Sequence[Site], chosen: Collection[int]
) -> tuple[dict[int, dict[str, tuple[str, Any, Any]]], str]:
    """What changes in training mode outside of the calls that a program makes.

    Returns:
        step -> argument -> (module, value in training, value otherwise); and what cannot be expressed this way, in
        words.
    """
    theirs: list[Step | str] = []
    try:
        if training:
            other = training.listing()
            theirs = lines_of(other, training.sites_of(other), sites, chosen)
    except CutError:
        pass
    ours = lines_of(lines, sites, sites, chosen)
    number = {id(step): i for i, step in enumerate(lines.steps)}
    switches = {}
    if [known(line) for line in theirs] == [known(line) for line in ours]:
        for step, twin in zip(ours, theirs, strict=True):
            if isinstance(step, str) or isinstance(twin, str):
                continue
            changed = {}
            for key in step.args.keys() | twin.args.keys():
                no, yes = step.args.get(key), twin.args.get(key)
                if isinstance(no, bool | float | None) and isinstance(yes, bool | float | None) and no != yes:
                    changed[key] = (owner(step), yes, no)
            switches[number[id(step)]] = changed
        return switches, ""
    only = sorted({s.op for s in theirs if isinstance(s, Step)} - {s.op for s in ours if isinstance(s, Step)})
    lost = (
        f"what it does in training mode only ({', '.join(only)})"
        if only
        else "what it does in training mode only"
    )
    for step in ours:
        if isinstance(step, Step):
            switch = OPERATORS[step.op].trains if step.op in OPERATORS else None
            switches[number[id(step)]] = {switch: (owner(step), True, False)} if switch else {}
    return switches, lost


def lines_of(
    lines: Listing, sites: Sequence[Site], reference: Sequence[Site], chosen: Collection[int]
) -> list[Step | str]:
    """The operators of a listing, and in between the names of submodules where the reference's calls are made."""
    wanted = {(site.module, occurrence(reference, n)) for n, site in enumerate(reference) if n in chosen}
    calls = [n for n, site in enumerate(sites) if (site.module, occurrence(sites, n)) in wanted]
    found = outline(lines, calls)
    return [
        line if isinstance(line, Step) else sites[line].module
        for line in found
        if not isinstance(line, Step) or not counts(line)
    ]


def occurrence(sites: Sequence[Site], number: int) -> int:
    """How many calls of the same submodule come before a call."""
    return sum(site.module == sites[number].module for site in sites[:number])


def known(line: Step | str) -> str:
    """A line of a program by its operator, or by the submodule that it calls."""
    return line if isinstance(line, str) else line.target


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
        entries = opened(given) if given is not None else None
        return tree(
            {name: fill(part, entries and entries[name], leaves) for name, part in tree.entries.items()}
        )
    if isinstance(tree, list | tuple):
        parts = [fill(part, given and given[i], leaves) for i, part in enumerate(tree)]
        return type(tree)(parts)
    return given if tree == ANYTHING else tree


def varying(tree: Any, others: Sequence[Any]) -> Any:
    """The tree with anything in place of numbers that differ from those of the others."""
    if isinstance(tree, dict):
        return {name: varying(part, [other[name] for other in others]) for name, part in tree.items()}
    if isinstance(tree, Made):
        return Made(tree.cls, varying(dict(tree.entries), [dict(other.entries) for other in others]))
    if isinstance(tree, list | tuple):
        return type(tree)(varying(part, [other[i] for other in others]) for i, part in enumerate(tree))
    return tree if all(other == tree for other in others) else ANYTHING


def size_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of a placeholder."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


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
