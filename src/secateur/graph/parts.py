"""Models whose forward cannot be captured as a whole: the submodules that can, joined to one forward.

A detector picks boxes by their values, which no graph can hold; its backbone, pyramid and heads are tensors in, tensors
out. The user's own model is run on the example while calls of its submodules are looked at. The largest ones that can
be captured are the *parts*; what stands between them is the *rest*, which is never touched. A `View` of the model calls
the parts in the same order, so that everything that takes a model takes it: one capture, one graph, one budget.

What a part is given is one of three things. It is what another part returned, unchanged. Or the rest computed it from
such tensors channel by channel, as pooling of regions does: this is found by running the rest with a few channels
changed, and a stand-in of the same shape ties the channels. Or else it is an input of the view, and what the rest reads
of the parts is an output, so that its channels stay.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.func import functional_call
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from secateur.errors import CaptureError, SecateurError, first_line, unknown
from secateur.graph.capture import (
    BATCH,
    Batching,
    Capture,
    Inputs,
    Parted,
    WholeError,
    as_call,
    as_inputs,
    batch_of,
    capture,
    list_of_images,
    with_images,
    with_length,
)
from secateur.graph.duplicate import cloned, duplicate
from secateur.graph.guard import PLAIN, guarded, opened, quiet, where_raised
from secateur.graph.modes import evaluating
from secateur.graph.modules import Keep

Flags = npt.NDArray[np.bool_]

LOUD = 3.0
"""Scale of random numbers in the place of what parts return: the rest must find something in them."""

CLOSE = 1e-4
"""Largest relative difference of what the rest computes from a tensor with and without some of its channels."""


@dataclass(frozen=True)
class Given:
    """One of the view's inputs, by its number."""

    index: int


@dataclass(frozen=True)
class Output:
    """What a part returned: the number of the call, and which of its tensors."""

    call: int
    leaf: int


@dataclass(frozen=True)
class Run:
    """Neighbouring channels of what the rest computed.

    Attributes:
        sources: the tensors whose channels they are, in order; none: they depend on no part.
        dim: of their channels.
        each: positions for every channel.
        size: positions in all.
    """

    sources: tuple[Output, ...]
    dim: int
    each: int
    size: int


@dataclass(frozen=True)
class Through:
    """What the rest computed channel by channel.

    Attributes:
        runs: of its channels.
        dim: of its channels.
        shape: of one row, with 1 in the place of the channels.
        noise: number of the view's input that makes rows and places differ.
    """

    runs: tuple[Run, ...]
    dim: int
    shape: tuple[int, ...]
    noise: int

    def stand_in(self, noise: Tensor, outputs: Callable[[Output], Tensor]) -> Tensor:
        """A tensor of the same shape in which every position depends on the channel it belongs to."""
        channels = [self._channels(run, noise, outputs) for run in self.runs]
        line = torch.cat(channels) if len(channels) > 1 else channels[0]
        sizes = [1] * (len(self.shape) + 1)
        sizes[self.dim] = line.shape[0]
        return noise.view(noise.shape[0], *self.shape) * line.view(sizes)

    @staticmethod
    def _channels(run: Run, noise: Tensor, outputs: Callable[[Output], Tensor]) -> Tensor:
        if not run.sources:
            return noise.new_ones(run.size)
        means = []
        for source in run.sources:
            t = outputs(source)
            means.append(t.mean([d for d in range(t.ndim) if d != run.dim % t.ndim]))
        line = means[0]
        for other in means[1:]:
            line = line + other
        return line if run.each == 1 else line[:, None].expand(-1, run.each).reshape(-1)

    def kept(self, keep: Mapping[Output, Mapping[int, Keep]], ranks: Mapping[Output, int]) -> Keep:
        """Which positions stay, from what stays of the sources."""
        lines = []
        for run in self.runs:
            line = np.ones(run.size, dtype=bool)
            for source in run.sources:
                mask = keep.get(source, {}).get(run.dim % ranks[source])
                if mask is not None:
                    line &= np.repeat(mask, run.each)
            lines.append(line)
        return np.concatenate(lines)


@dataclass(frozen=True)
class Call:
    """One call of a part; `Given`, `Output` or `Through` stand in the place of each tensor."""

    name: str
    args: Any
    kwargs: Any


@dataclass(frozen=True)
class Parts:
    """The parts of a model and how they hang together.

    Attributes:
        calls: in the order in which they run.
        returned: how many tensors each call returns.
        read: what the rest reads: the outputs of the view.
        example: inputs of the whole model, of two images if it takes as many.
        inputs: example inputs of the view.
        batching: how they hold images.
        left: name -> why it is no part, for the modules that were looked at; "" is the model.
        uncalled: modules with parameters that the example did not call.
        loud: whether the rest runs on random numbers in the place of what the parts return.
    """

    calls: tuple[Call, ...]
    returned: tuple[int, ...]
    read: tuple[Output, ...]
    example: Inputs
    inputs: tuple[Tensor, ...]
    batching: Batching
    left: Mapping[str, str] = field(default_factory=dict)
    uncalled: tuple[str, ...] = ()
    loud: bool = True

    @property
    def names(self) -> list[str]:
        """Of the parts."""
        return list(dict.fromkeys(call.name for call in self.calls))

    @property
    def borders(self) -> list[Output]:
        """What `Capture.borders` are."""
        return [Output(number, leaf) for number, count in enumerate(self.returned) for leaf in range(count)]

    def view(self, model: nn.Module) -> nn.Module:
        """The model, or a copy of it, with the forward of its parts; see `View`."""
        return View.of(model, self)

    def __deepcopy__(self, memo: Any) -> "Parts":
        return self

    def __str__(self) -> str:
        return "\n  ".join(self._lines())

    @property
    def told(self) -> str:
        """In one sentence."""
        return "; ".join(self._lines())

    def _lines(self) -> list[str]:
        lines = [f"pruned in {len(self.names)} parts: {', '.join(self.names)}"]
        for name, why in self.left.items():
            around = any(part.startswith(f"{name}." if name else "") for part in self.names)
            lines.append(
                f"{name or 'the model'}: {'what it does itself stays' if around else 'stays'} ({why})"
            )
        for name in self.uncalled:
            lines.append(f"{name}: stays, and so does what it might read (the example did not call it)")
        return lines


class View(Parted):
    """A model that calls its parts on tensors of their own, and leaves out what stands between them.

    It is made of the model's own submodules, parameters and buffers under their own names: what happens to one happens
    to the other.
    """

    parts: Parts

    @classmethod
    def of(cls, model: nn.Module, parts: Parts) -> "View":
        """The view, with the name of the model's class."""
        view: View = type(type(model).__name__, (cls,), {"__module__": type(model).__module__})()
        view._modules, view._parameters, view._buffers = model._modules, model._parameters, model._buffers
        view._non_persistent_buffers_set = model._non_persistent_buffers_set
        view.training, view.parts = model.training, parts
        view.batching, view.outputs = parts.batching, len(parts.read)
        return view

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """What the rest reads, from the inputs of the parts."""
        results: list[list[Tensor]] = []

        def tensor(x: Any) -> Any:
            if isinstance(x, Given):
                return given[x.index]
            if isinstance(x, Output):
                return results[x.call][x.leaf]
            return x.stand_in(given[x.noise], tensor) if isinstance(x, Through) else x

        for call in self.parts.calls:
            args, kwargs = pytree.tree_map(tensor, (call.args, call.kwargs))
            results.append(tensors_in(self.get_submodule(call.name)(*args, **kwargs)))
        read = tuple(results[output.call][output.leaf] for output in self.parts.read)
        if not torch.compiler.is_exporting():
            return read
        return read + tuple(t for result in results for t in result)


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors of a tree, in order."""
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def train_rest_(model: nn.Module, parts: Parts) -> None:
    """Put all of a model that is not inside of one of its parts into training mode."""
    for name, module in model.named_modules():
        if not any(name == part or name.startswith(f"{part}.") for part in parts.names):
            module.training = True


# --- looking at a model while it runs ----------------------------------------------------------------------


@dataclass
class Seen:
    """One call of a part in a pass of the model."""

    name: str
    args: Any
    kwargs: Any
    returned: Any = None
    output: Any = None
    """A copy of what was returned, since the rest may write to it."""

    @property
    def tensors(self) -> list[Tensor]:
        """What it was given."""
        return tensors_in((self.args, self.kwargs))


@dataclass
class Pass:
    """One pass of the model: the calls of its parts, and what it returned."""

    calls: list[Seen]
    result: Any = None


Answer = Callable[[int, Callable[[], Any]], Any]
"""(number of the call, the part's own forward on its arguments) -> what the part returns."""


def own(number: int, forward: Callable[[], Any]) -> Any:
    """What the part itself returns."""
    return forward()


def loud(number: int, forward: Callable[[], Any]) -> Any:
    """Random numbers of the same shapes."""
    generator = _generator(number)
    return pytree.tree_map(lambda x: _random(x, generator) if isinstance(x, Tensor) else x, forward())


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(t: Tensor, generator: torch.Generator) -> Tensor:
    if not t.is_floating_point():
        return t
    return (LOUD * torch.randn(t.shape, generator=generator)).to(t.device, t.dtype)


def watch(model: nn.Module, inputs: Inputs, names: Sequence[str], answer: Answer) -> Pass:
    """Run a model in evaluation mode and note the calls of its parts."""
    seen: list[Seen] = []
    inside = False

    def guard(name: str, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        nonlocal inside
        if inside:  # a part that calls another one
            return forward(*args, **kwargs)
        seen.append(Seen(name, args, kwargs))
        number, inside = len(seen) - 1, True
        try:
            returned = answer(number, lambda: forward(*args, **kwargs))
        finally:
            inside = False
        seen[number].returned, seen[number].output = returned, cloned(returned)
        return returned

    args, kwargs = cloned(as_call(inputs))
    with guarded(model, guard, names), evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Pass(seen, model(*args, **kwargs))


def contents(tree: Any, depth: int = 4) -> Iterator[Any]:
    """The leaves of what a model returns, those inside of objects too."""
    for leaf in pytree.tree_leaves(opened(tree)):
        if isinstance(leaf, PLAIN) or leaf is None or not depth or not hasattr(leaf, "__dict__"):
            yield leaf
        else:
            yield from contents(list(vars(leaf).values()), depth - 1)


def alike(a: Any, b: Any, close: float = 0.0) -> bool:
    """Whether two leaves are equal, tensors up to a relative difference."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return type(a) is type(b) and (a == b if isinstance(a, PLAIN) else True)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not close or not a.is_floating_point() or not a.numel():
        return not bool(_changed(a, b).any())
    a, b = a.nan_to_num(), b.nan_to_num()
    return bool((a - b).abs().max() <= close * a.abs().max().clamp(min=1e-12))


def _changed(a: Tensor, b: Tensor) -> Flags:
    flags: Flags = ((a != b) & ~((a != a) & (b != b))).cpu().numpy()
    return flags


# --- which submodules are parts ----------------------------------------------------------------------------


def capture_parts(
    model: nn.Module, inputs: Inputs, scope: Sequence[str] = (), whole: WholeError | None = None
) -> tuple[Parts, Capture]:
    """The largest submodules that can be captured, and the graph of all of them.

    Args:
        model: only read.
        inputs: example inputs of the whole model.
        scope: names of modules to look at; none: all.
        whole: why the model cannot be captured.
    Raises:
        CaptureError: no part can be captured; or `scope` names no module, or one inside of another.
    """
    modules = dict(model.named_modules())
    for name in scope:
        if name not in modules or not name:
            raise CaptureError(f"scope: {unknown('module', name, list(modules)[1:])}")
        if inner := next((n for n in scope if n.startswith(f"{name}.")), None):
            raise CaptureError(f"scope: {inner!r} is inside of {name!r}; name one of them")
    with suppress(SecateurError):
        model = duplicate(model, share=True)  # a forward may write to its buffers
    inputs = _two_images(model, inputs)
    names = list(scope) or [name for name, _ in model.named_children()]
    left = {"": reason_of(whole.__cause__ or whole)} if whole else {}
    while True:
        search = _Search(model, inputs, names, left)
        search.narrow()
        if not search.base.calls or not any(p.ndim > 1 for n in search.names for p in _parameters(model, n)):
            raise whole or CaptureError(
                f"scope={tuple(scope)!r}: none of it can be captured: "
                f"{'; '.join(f'{name}: {why}' for name, why in left.items())}"
            )
        parts = _Join(search).parts()
        try:
            return parts, capture(parts.view(model), parts.inputs)
        except WholeError as error:
            raised = where_raised(model, error.__cause__ or error)
            part = next((n for n in search.names if raised == n or raised.startswith(f"{n}.")), None)
            if part is None:
                raise
            left[part] = reason_of(error.__cause__ or error)
            names = [n for name in search.names for n in ([name] if name != part else _children(model, part))]


def _two_images(model: nn.Module, inputs: Inputs) -> Inputs:
    """The inputs with two images in the place of one, if the model takes them: one looks like a dim to spread along."""
    images = list_of_images(inputs)
    if images is None:
        two = with_images(inputs, BATCH)
    else:
        args, kwargs = pytree.tree_map(
            lambda x: BATCH * x if x is images else x, as_call(inputs), is_leaf=lambda x: x is images
        )
        two = as_inputs(args, kwargs, inputs)
    if batch_of(inputs) != 1 or batch_of(two) != BATCH:
        return inputs
    try:
        watch(model, two, (), own)
    except Exception:  # whatever its own code raises
        return inputs
    return two


def _parameters(model: nn.Module, name: str) -> Iterator[nn.Parameter]:
    return model.get_submodule(name).parameters()


def _children(model: nn.Module, name: str) -> list[str]:
    return [f"{name}.{child}" for child, _ in model.get_submodule(name).named_children()]


class _Search:
    """From the top down, the submodules that run on tensors alone.

    Attributes:
        names: of those that are left to look at; in the end, of the parts.
        left: see `Parts`.
        uncalled: see `Parts`.
        base: a pass of the model with the parts' outputs replaced by random numbers, if the rest runs on these.
        loud: whether it does.
    """

    base: Pass
    loud: bool

    def __init__(self, model: nn.Module, inputs: Inputs, names: list[str], left: dict[str, str]) -> None:
        self.model, self.inputs, self.names, self.left = model, inputs, names, left
        self.uncalled: list[str] = []
        self._fits: dict[str, bool] = {}

    def narrow(self) -> None:
        """Replace what is no part by its children, until all are parts."""
        while True:
            self._run()
            seen: dict[str, list[Seen]] = {name: [] for name in self.names}
            for call in self.base.calls:
                seen[call.name].append(call)
            names: list[str] = []
            for name in self.names:
                if not seen[name]:
                    names += _children(self.model, name)
                elif why := self._unfit(name, seen[name]):
                    self.left[name] = why
                    names += _children(self.model, name)
                else:
                    names.append(name)
            if names == self.names:
                self.uncalled = list(self._without_calls(""))
                return
            self.names = names

    def _run(self) -> None:
        self._called: set[str] = set()
        hooks = [
            module.register_forward_pre_hook(lambda *_, name=name: self._called.add(name))
            for name, module in self.model.named_modules()
        ]
        try:
            self.base, self.loud = watch(self.model, self.inputs, self.names, loud), True
        except Exception:  # the rest may ask for something of the numbers, such as to be below 1
            self.base, self.loud = watch(self.model, self.inputs, self.names, own), False
        finally:
            for hook in hooks:
                hook.remove()

    def _without_calls(self, name: str) -> Iterator[str]:
        """The outermost modules inside of one that hold parameters and no part, and of which nothing was called."""
        start = f"{name}." if name else ""
        if name in self.names:
            return
        if any(part.startswith(start) for part in self.names):
            for child, _ in self.model.get_submodule(name).named_children():
                yield from self._without_calls(start + child)
            return
        if any(called == name or called.startswith(start) for called in self._called):
            return
        if any(True for _ in _parameters(self.model, name)):
            yield name

    def _unfit(self, name: str, calls: Sequence[Seen]) -> str:
        """Why a module is no part; "" if it is."""
        if self._fits.get(name):
            return ""
        for call in calls:
            for what, tree in (("takes", (call.args, call.kwargs)), ("returns", call.output)):
                for leaf in pytree.tree_leaves(tree):
                    if leaf is not None and not isinstance(leaf, PLAIN):
                        return f"it {what} objects of class {type(leaf).__name__}"
            numbers = [x for x in pytree.tree_leaves((call.args, call.kwargs)) if type(x) in (int, float)]
            if numbers and not any(True for _ in _parameters(self.model, name)):
                return (
                    "it has no weights and is given numbers, such as sizes"  # that may change with the images
                )
            if not any(t.is_floating_point() for t in tensors_in(call.output)):
                return "it returns no tensor of real numbers"
            if why := self._needs_values(name, call):
                return why
        self._fits[name] = True
        return ""

    def _needs_values(self, name: str, call: Seen) -> str:
        """Why a module does not run on shapes alone."""
        module = self.model.get_submodule(name)
        with quiet(), evaluating(module), torch.no_grad():
            try:
                with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                    args, kwargs = pytree.tree_map_only(Tensor, mode.from_tensor, (call.args, call.kwargs))
                    buffers: dict[str, Tensor] = {n: mode.from_tensor(t) for n, t in module.named_buffers()}
                    functional_call(module, buffers, args, kwargs)
            except Exception as error:  # whatever its own code raises
                return reason_of(error)
        return ""


def reason_of(error: BaseException) -> str:
    """Why something cannot be captured, in words."""
    if isinstance(
        error, DataDependentOutputException | DynamicOutputShapeException | GuardOnDataDependentSymNode
    ):
        operator = f" ({error.func})" if hasattr(error, "func") else ""
        return f"it depends on the values in a tensor{operator}"
    return first_line(error)


# --- how the parts hang together ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Effect:
    """What changes when the parts return something else.

    Attributes:
        result: what the model returns changes, or how often parts are called, or it fails.
        places: (number of the call, of its tensor) -> where that changed, bool of its shape.
    """

    result: bool
    places: Mapping[tuple[int, int], Flags]


class _Join:
    """Finds out what becomes of the outputs of every part."""

    def __init__(self, search: _Search) -> None:
        self.search = search
        self.base = search.base
        self.outputs = {
            Output(number, leaf): t
            for number, seen in enumerate(self.base.calls)
            for leaf, t in enumerate(tensors_in(seen.output))
        }
        self.made = {
            id(t): Output(number, leaf)
            for number, seen in enumerate(self.base.calls)
            for leaf, t in enumerate(tensors_in(seen.returned))
        }
        self.read: dict[Output, None] = {}
        self.through: dict[tuple[int, int], tuple[tuple[Run, ...], int]] = {}
        self.images = max(1, batch_of(search.inputs))
        self.known: dict[int, Given] = {}
        self.inputs: list[Tensor] = []
        self.rows: list[int | None] = []
        self.per_image: list[float] = []

    def parts(self) -> Parts:
        """The parts, and what each is given."""
        self._follow()
        if self.search.uncalled:  # it may read whatever the parts return
            self.read = dict.fromkeys(self.outputs)
        real: dict[str, list[Seen]] = {}
        for seen in watch(self.search.model, self.search.inputs, self.search.names, own).calls:
            real.setdefault(seen.name, []).append(seen)
        calls = []
        for number, seen in enumerate(self.base.calls):
            same = real.get(seen.name)
            calls.append(self._call(number, seen, same.pop(0) if same else seen))
        fixed = any(rows is None for rows in self.rows)
        return Parts(
            calls=tuple(calls),
            returned=tuple(len(tensors_in(seen.output)) for seen in self.base.calls),
            read=tuple(self.read) or tuple(self.outputs),
            example=self.search.inputs,
            inputs=tuple(self.inputs),
            batching=Batching(self.images, tuple(self.rows), tuple(self.per_image), fixed),
            left=dict(self.search.left),
            uncalled=tuple(self.search.uncalled),
            loud=self.search.loud,
        )

    def _call(self, number: int, seen: Seen, real: Seen) -> Call:
        """What a part is given; where the example itself gave it nothing, what random numbers did."""
        tensors = seen.tensors
        found = real.tensors
        if len(found) != len(tensors) or not all(t.numel() for t in found):
            found = tensors
        lengths = {len(t) if t.ndim else 0 for t in found}
        # What has no row for every image, such as regions, is captured with one row for each: cheap, and exact
        few = len(lengths) == 1 and self.images not in lengths and lengths != {0}
        times = next(iter(lengths)) / self.images if few else 1.0
        sources: dict[int, Any] = {}
        for place, t in enumerate(tensors):
            if id(t) in self.made:
                sources[id(t)] = self.made[id(t)]
            elif (number, place) in self.through:
                sources[id(t)] = self._stand_in(number, place, self.images if few else len(t), times)
            else:
                if id(t) not in self.known:
                    given = found[place].detach().clone()
                    given = with_length(given, 0, self.images) if few else given
                    self.known[id(t)] = self._given(given, times)
                sources[id(t)] = self.known[id(t)]
        leaves, tree = pytree.tree_flatten((seen.args, seen.kwargs))
        leaves = [sources[id(x)] if isinstance(x, Tensor) else x for x in leaves]
        return Call(seen.name, *pytree.tree_unflatten(leaves, tree))

    def _given(self, t: Tensor, times: float) -> Given:
        self.inputs.append(t)
        self.rows.append(len(t) if t.ndim and len(t) == self.images else None)
        self.per_image.append(times)
        return Given(len(self.inputs) - 1)

    def _stand_in(self, number: int, place: int, rows: int, times: float) -> Through:
        runs, dim = self.through[number, place]
        t = self._tensor((number, place))
        shape = tuple(1 if d == dim else size for d, size in enumerate(t.shape) if d)
        # Two dims, so that nobody takes it for images that might have another height and width
        noise = torch.randn(rows, math.prod(shape), generator=_generator(number)).to(t.device, t.dtype)
        return Through(runs, dim, shape, self._given(noise, times).index)

    def _follow(self) -> None:
        """Change outputs, run the rest, and look at what changes."""
        effects: dict[Output, Effect] = {}
        for output, t in self.outputs.items():
            if not t.is_floating_point() or t.ndim < 2 or not t.numel():
                self.read[output] = None
                continue
            effects[output] = self._changed({output: _random(t, _generator(1000))})
            if effects[output].result or any(
                self._tensor(at).is_floating_point() is False for at in effects[output].places
            ):
                self.read[output] = None
        targets = dict.fromkeys(at for e in effects.values() if not e.result for at in e.places)
        for side in (1, -1):
            open_ = [at for at in targets if at not in self.through]
            sources = {o for at in open_ for o, e in effects.items() if at in e.places and not e.result}
            if sources:
                self._trace(open_, sources, effects, side)
        for at in targets:
            if at in self.through:
                self.through[at] = self._with_siblings(self.through[at][0], effects), self.through[at][1]
            else:
                self.read |= {o: None for o, e in effects.items() if at in e.places}

    def _with_siblings(self, runs: tuple[Run, ...], effects: Mapping[Output, Effect]) -> tuple[Run, ...]:
        """Runs that also depend on the other levels of a pyramid: those from which nothing was taken this time."""

        def is_like(o: Output, run: Run) -> bool:
            t, like = self.outputs[o], self.outputs[run.sources[0]]
            same = o.call == run.sources[0].call and t.ndim == like.ndim
            idle = o in effects and not effects[o].result and not effects[o].places
            return same and idle and t.shape[run.dim] == like.shape[run.dim]

        return tuple(
            replace(run, sources=(*run.sources, *(o for o in self.outputs if is_like(o, run))))
            if run.sources
            else run
            for run in runs
        )

    def _trace(
        self,
        targets: Sequence[tuple[int, int]],
        sources: set[Output],
        effects: Mapping[Output, Effect],
        side: int,
    ) -> None:
        """Find the channel that every position of the targets depends on, by the bits of the channel's number."""
        bits = max(self.outputs[o].shape[side] - 1 for o in sources).bit_length()
        seen: dict[tuple[int, int], Effect] = {}
        for bit in range(bits):
            for value in (0, 1):
                changed = {}
                for o in sources:
                    t = self.outputs[o]
                    line = [1] * t.ndim
                    line[side] = -1
                    chosen = (torch.arange(t.shape[side]) >> bit & 1 == value).view(line).to(t.device)
                    changed[o] = torch.where(chosen, _random(t, _generator(2000 + bit)), t)
                seen[bit, value] = self._changed(changed)
        if any(effect.result for effect in seen.values()):
            return
        for at in targets:
            own_sources = {o: effects[o].places[at] for o in sources if at in effects[o].places}
            shape = self._tensor(at).shape
            for dim in range(1, len(shape)):
                nothing = np.zeros(shape, dtype=bool)
                lines = {key: _along(e.places.get(at, nothing), dim) for key, e in seen.items()}
                channel = _channels(lines, bits)
                touched = {o: _along(places, dim) for o, places in own_sources.items()}
                runs = None if channel is None else self._runs(channel, touched, side)
                if runs:
                    self.through[at] = runs, dim
                    break

    def _runs(
        self, channel: npt.NDArray[np.int64], touched: Mapping[Output, Flags], side: int
    ) -> tuple[Run, ...] | None:
        """Neighbouring positions with the same sources; None if they are not their channels in order."""
        sets = [tuple(o for o, line in touched.items() if line[j]) for j in range(len(channel))]
        starts = [j for j in range(len(sets)) if j == 0 or sets[j] != sets[j - 1]]
        result = []
        for start, end in zip(starts, [*starts[1:], len(sets)], strict=True):
            sources, size = sets[start], end - start
            widths = {self.outputs[o].shape[side] for o in sources}
            width = next(iter(widths), size)
            each = size // width
            if (
                len(widths) > 1
                or not each
                or (sources and (channel[start:end] != np.repeat(np.arange(width), each)[:size]).any())
            ):
                return None
            if size % width:
                return None
            result.append(Run(sources, side, each, size))
        return tuple(result)

    def _tensor(self, at: tuple[int, int]) -> Tensor:
        return self.base.calls[at[0]].tensors[at[1]]

    def _changed(self, changed: Mapping[Output, Tensor]) -> Effect:
        """The effect of other tensors in the place of some outputs."""

        def answer(number: int, forward: Callable[[], Any]) -> Any:
            return with_tensors(self.base.calls[number].output, number, changed)

        try:
            found = watch(self.search.model, self.search.inputs, self.search.names, answer)
        except Exception:  # whatever the rest raises
            return Effect(True, {})
        if [s.name for s in found.calls] != [s.name for s in self.base.calls]:
            return Effect(True, {})
        before, after = list(contents(self.base.result)), list(contents(found.result))
        if len(before) != len(after) or not all(map(alike, before, after)):
            return Effect(True, {})
        places: dict[tuple[int, int], Flags] = {}
        for number, (old, new) in enumerate(zip(self.base.calls, found.calls, strict=True)):
            if len(old.tensors) != len(new.tensors):
                return Effect(True, {})
            for place, (a, b) in enumerate(zip(old.tensors, new.tensors, strict=True)):
                if id(a) in self.made:
                    continue
                if a.shape != b.shape:
                    return Effect(True, {})
                if (flags := _changed(a, b)).any():
                    places[number, place] = flags
        return Effect(False, places)


def with_tensors(tree: Any, number: int, changed: Mapping[Output, Tensor]) -> Any:
    """A copy of what the part of a call returned, with other tensors in the place of some."""
    leaves, spec = pytree.tree_flatten(cloned(tree))
    leaf = 0
    for i, x in enumerate(leaves):
        if isinstance(x, Tensor):
            leaves[i] = changed.get(Output(number, leaf), x)
            leaf += 1
    return pytree.tree_unflatten(leaves, spec)


def _along(flags: Flags, dim: int) -> Flags:
    """Which positions of a dim have a flag anywhere."""
    return np.asarray(flags.any(axis=tuple(d for d in range(flags.ndim) if d != dim)))


def _channels(lines: Mapping[tuple[int, int], Flags], bits: int) -> npt.NDArray[np.int64] | None:
    """The one channel that each position depends on; None if some depend on several, or none does at all.

    Args:
        lines: (bit, value) -> whether each position changed with the channels whose number has this bit at this value.
    """
    channel = np.zeros(len(lines[0, 0]), dtype=np.int64)
    idle = ~np.any(list(lines.values()), axis=0)
    for bit in range(bits):
        zero, one = lines[bit, 0], lines[bit, 1]
        if not ((zero ^ one) | idle).all():
            return None
        channel += one.astype(np.int64) << bit
    return None if idle.all() else channel


# --- the rest after a cut ----------------------------------------------------------------------------------


def rest_fails(
    parts: Parts, model: nn.Module, cut: nn.Module, keep: Mapping[Output, Mapping[int, Keep]]
) -> str:
    """Why the rest of a model does not do the same between its parts once they are cut; "" if it does.

    Both run with the same tensors in the place of what the parts return, those that are kept in the cut one. So the
    rest picks the same boxes, whatever the weights.

    Args:
        model: the original.
        cut: the same after the cut.
        keep: what stays of every output of a part.
    """
    model, cut = duplicate(model, share=True), duplicate(cut, share=True)
    base = watch(model, parts.example, parts.names, loud if parts.loud else own)
    ranks: dict[Output, int] = {}

    def answer(number: int, forward: Callable[[], Any]) -> Any:
        small = {}
        for leaf, t in enumerate(tensors_in(base.calls[number].output)):
            ranks[Output(number, leaf)] = t.ndim
            small[Output(number, leaf)] = select(t, keep.get(Output(number, leaf), {}))
        return with_tensors(base.calls[number].output, number, small)

    try:
        found = watch(cut, parts.example, parts.names, answer)
    except Exception as error:
        name = where_raised(cut, error) or type(cut).__name__
        return f"{name} does not take what is left: {first_line(error)}"
    for call, old, new in zip(parts.calls, base.calls, found.calls, strict=True):
        places = pytree.tree_leaves((call.args, call.kwargs))
        given = [place for place in places if isinstance(place, Given | Output | Through)]
        for place, a, b in zip(given, old.tensors, new.tensors, strict=True):
            kept: Mapping[int, Keep] = {}
            if isinstance(place, Output):
                kept = keep.get(place, {})
            elif isinstance(place, Through):
                kept = {place.dim: place.kept(keep, ranks)}
            if not alike(select(a, kept), b, CLOSE):
                return f"{call.name} is given something else than before, of shape {tuple(b.shape)}"
    before, after = list(contents(base.result)), list(contents(found.result))
    if len(before) != len(after) or not all(alike(a, b, CLOSE) for a, b in zip(before, after, strict=True)):
        return "from the same outputs of its parts, it makes something else than before"
    return ""


def select(t: Tensor, keep: Mapping[int, Keep]) -> Tensor:
    """What is kept of a tensor."""
    for dim, mask in keep.items():
        if mask.size == t.shape[dim]:
            t = t.index_select(dim, torch.from_numpy(np.flatnonzero(mask)).to(t.device))
    return t
