"""A model's forward pass as a list of operator calls, run with some tensors replaced, or from the middle.

What happens before the first call that reads a replaced tensor is the same for every replacement, so it is
run once; only the rest is run again, for several replacements in one batch if the graph allows it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from secateur.errors import CaptureError, first_line
from secateur.graph.capture import Capture, Inputs, WholeError, as_call, batch_of, capture
from secateur.graph.guard import plain
from secateur.graph.modes import evaluating

Tensors = Mapping[str, Tensor]
"""Parameter or buffer name -> the tensor that takes its place."""

Values = dict[fx.Node, Any]
"""What the calls so far have computed, as far as later ones read it."""

Outputs = Any
"""What a model returns: a tensor, or tensors in tuples, lists and dicts; dataclasses have become dicts."""


def floats(outputs: Outputs) -> list[Tensor]:
    """The floating-point tensors of a model's outputs, in order."""
    return [x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor) and x.is_floating_point()]


def some_of(inputs: Any, some: slice | Tensor, images: int | None = None) -> Any:
    """Some images of a batch: of every tensor whose first dim counts them, as `images` says or the batch itself."""
    images = batch_of(inputs) if images is None else images

    def part(x: Any) -> Any:
        return x[some] if isinstance(x, Tensor) and x.ndim and len(x) == images else x

    return pytree.tree_map(part, inputs)


def joined(a: Inputs, b: Inputs) -> Inputs:
    """The images of two batches as one."""
    images = batch_of(a)

    def both(x: Any, y: Any) -> Any:
        return torch.cat([x, y]) if isinstance(x, Tensor) and x.ndim and len(x) == images else x

    return pytree.tree_map(both, a, b)  # type: ignore[no-any-return]


PASS = 2**30
"""Bytes that all that one pass computes may take; larger batches are gone through in parts."""


@dataclass(frozen=True)
class Call:
    """One operator of the forward pass.

    Attributes:
        node: of the captured graph.
        tensors: names of the parameters and buffers it reads.
        done: values that no later call reads.
    """

    node: fx.Node
    tensors: frozenset[str]
    done: tuple[fx.Node, ...]


_CHECKED = 4
"""Images on which a graph that takes any number of them is compared with the model."""


class Replay:
    """The evaluation-mode forward pass of a model, whatever it takes and returns.

    Args:
        model: its parameters and buffers are read when a call runs, not copied.
        inputs: an example batch, as for `analyze`; its size is the only one if the graph cannot be captured for all.
    Raises:
        CaptureError: the graph cannot be captured, or computes something else than the model, or nothing that floats.

    Attributes:
        calls: in the order in which they run.
        batch: the only number of images the graph takes; None: any.
        bytes_per_image: of all that the calls compute, together.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.model = model
        failure: Exception | None = None
        images = batch_of(inputs)
        self._example = as_call(inputs)
        self.batch: int | None = None
        for any_batch in (True, False):
            some = some_of(inputs, slice(0, max(1, min(images // 2, _CHECKED)))) if any_batch else inputs
            try:
                with evaluating(model), torch.no_grad():
                    self._read(capture(model, inputs, exact=True, any_batch=any_batch))
                    args, kwargs = as_call(some)
                    expected = plain(model(*args, **kwargs))
                    self._structure = pytree.tree_structure(expected)
                    if not _alike(self(some), expected):
                        raise CaptureError("the captured graph computes something else")
            except Exception as error:
                failure = failure or error
            else:
                self.batch = None if any_batch else images
                break
        else:
            assert failure is not None
            raise WholeError(
                f"{type(model).__name__}: its forward pass cannot be captured to run in steps ({first_line(failure)}). "
                f"Methods that measure outputs need this. Rank by the gradients of a loss instead (method='oneshot', "
                f"score='taylor'), or wrap the model in a module that leaves out what depends on tensor values."
            ) from failure
        if not floats(expected):
            raise CaptureError(
                f"{type(model).__name__}: returns no floating-point tensor, so how far its outputs move cannot be "
                f"measured. Wrap it in a module that returns its scores."
            )
        self._prefer_channels_last(some)
        self.bytes_per_image = self._bytes(some) / batch_of(some)

    def _read(self, captured: Capture) -> None:
        self._owned, self._constants = captured.tensors, captured.constants
        self._module, self._inputs = captured.module, captured.inputs
        self._output = next(node for node in self._module.graph.nodes if node.op == "output")
        self.calls = self._listed()
        self._layout = torch.contiguous_format

    def _prefer_channels_last(self, inputs: Inputs) -> None:
        """Lay images out n h w c, which convolutions run faster on, unless the captured calls do not take that."""
        if not any(isinstance(x, Tensor) and x.ndim == 4 for x in pytree.tree_leaves(inputs)):
            return
        with torch.no_grad():
            expected = self(inputs)
            self._layout = torch.channels_last
            try:
                same = _alike(self(inputs), expected)
            except RuntimeError:  # such as a view across dims that are no longer next to one another
                same = False
        if not same:
            self._layout = torch.contiguous_format

    def _bytes(self, inputs: Inputs) -> int:
        total = 0
        with torch.no_grad():
            values = self.begin(inputs)
            for call in self.calls:
                found = self.compute(call, values)
                total += sum(x.nbytes for x in pytree.tree_leaves(found) if isinstance(x, Tensor))
                values[call.node] = found
                for node in call.done:
                    values.pop(node, None)
        return total

    def _listed(self) -> list[Call]:
        nodes = [n for n in self._module.graph.nodes if n.op not in ("placeholder", "output", "get_attr")]
        kept = set(self._output.all_input_nodes)
        last: dict[fx.Node, int] = {}
        for number, node in enumerate(nodes):
            for read in node.all_input_nodes:
                last[read] = number
        ends: dict[int, list[fx.Node]] = {}
        for node, number in last.items():
            if node not in kept and node.name not in self._owned and node.op != "get_attr":
                ends.setdefault(number, []).append(node)
        return [
            Call(
                node,
                frozenset(self._owned[r.name] for r in node.all_input_nodes if r.name in self._owned),
                tuple(ends.get(number, ())),
            )
            for number, node in enumerate(nodes)
        ]

    def leaves(self, inputs: Inputs) -> list[Any]:
        """The inputs in the order of the graph's.

        Raises:
            CaptureError: they are not of the kind that was captured.
        """
        args, kwargs = as_call(inputs)
        named = self._example[1]
        if set(kwargs) != set(named):
            raise CaptureError(
                f"a batch of inputs {sorted(kwargs)}; expected {sorted(named)}, as in the first batch"
            )
        leaves = pytree.tree_leaves((args, {name: kwargs[name] for name in named}))
        examples = pytree.tree_leaves(self._example)
        if len(leaves) != len(examples):
            raise CaptureError(
                f"a batch of {len(leaves)} inputs; expected {len(examples)}, as in the first batch"
            )
        for x, example in zip(leaves, examples, strict=True):
            if isinstance(x, Tensor) and isinstance(example, Tensor) and x.shape[1:] != example.shape[1:]:
                raise CaptureError(
                    f"a batch of shape {tuple(x.shape)}; expected (n, {', '.join(map(str, example.shape[1:]))}), as "
                    f"in the first batch: pass batches of one image size"
                )
        if self.batch not in (None, batch_of(inputs)):
            raise CaptureError(
                f"a batch of {batch_of(inputs)} images; {type(self.model).__name__} takes {self.batch} only, as in the "
                f"first batch: pass batches of one size (drop_last=True)"
            )
        return leaves

    def begin(self, inputs: Inputs) -> Values:
        """The values before the first call; see `leaves` for what the inputs must be."""

        def laid_out(x: Any) -> Any:
            if isinstance(x, Tensor) and x.ndim == 4:
                return x.contiguous(memory_format=self._layout)
            return x

        return dict(zip(self._inputs, map(laid_out, self.leaves(inputs)), strict=True))

    def run(self, call: Call, values: Values, tensors: Tensors | None = None) -> Any:
        """Run one call, with some tensors replaced; `values` gets its result."""
        values[call.node] = self.compute(call, values, tensors)
        for node in call.done:
            values.pop(node, None)
        return values.get(call.node)

    def compute(self, call: Call, values: Values, tensors: Tensors | None = None) -> Any:
        """The result of one call."""
        look = self.lookup(values, tensors or {})
        args = fx.map_arg(call.node.args, look)
        kwargs = fx.map_arg(call.node.kwargs, look)
        return call.node.target(*args, **kwargs)  # type: ignore[operator]

    def lookup(self, values: Values, tensors: Tensors) -> Callable[[fx.Node], Any]:
        """How a call finds what it reads."""

        def look(node: fx.Node) -> Any:
            if node in values:
                return values[node]
            if node.name in self._owned:
                name = self._owned[node.name]
                return tensors[name] if name in tensors else self.tensor(name)
            if node.name in self._constants:
                return self._constants[node.name]
            return getattr(self._module, str(node.target))  # the body of a higher-order operator

        return look

    def owner(self, node: object) -> str | None:
        """The parameter or buffer that a node of the graph stands for, if it does."""
        return self._owned.get(node.name) if isinstance(node, fx.Node) else None

    def tensor(self, name: str) -> Tensor:
        """A parameter or buffer of the model."""
        owner, _, own = name.rpartition(".")
        return getattr(self.model.get_submodule(owner), own)  # type: ignore[no-any-return]

    def result(self, values: Values, tensors: Tensors | None = None) -> Outputs:
        """The outputs, after the last call."""
        found = fx.map_arg(self._output.args[0], self.lookup(values, tensors or {}))
        return pytree.tree_unflatten(pytree.tree_leaves(found), self._structure)

    def __call__(self, inputs: Inputs, tensors: Tensors | None = None) -> Outputs:
        """The model's outputs with some tensors replaced."""
        values = self.begin(inputs)
        for call in self.calls:
            self.run(call, values, tensors)
        return self.result(values, tensors)

    def variants(
        self,
        inputs: Inputs,
        candidates: Sequence[Sequence[Tensors]],
        base: Tensors | None = None,
        *,
        batched: int = 1,
    ) -> Iterator[tuple[int, int, Outputs]]:
        """The outputs with each candidate's tensors replaced in turn, running only what each one changes.

        Args:
            inputs: a batch.
            candidates: sets of variants; all variants of a set replace tensors of the same names.
            base: tensors that are replaced in all of them.
            batched: variants of a set that share one pass.
        Returns:
            an iterator of (set, variant, output), set by set in the order in which they enter the pass.
        """
        base = base or {}
        entering: dict[int, list[int]] = {}
        for number, candidate in enumerate(candidates):
            names = set(candidate[0]) if len(candidate) else set()
            first = next((i for i, call in enumerate(self.calls) if call.tensors & names), None)
            if first is not None:
                entering.setdefault(first, []).append(number)
        batched = batched if self.batch is None else 1
        values = self.begin(inputs)
        for position, call in enumerate(self.calls):
            for number in entering.get(position, ()):
                some = candidates[number]
                for start in range(0, len(some), batched):
                    chunk = [{**base, **some[i]} for i in range(start, min(start + batched, len(some)))]
                    outputs = self._suffix(position, values, chunk, batch_of(inputs))
                    for offset, output in enumerate(outputs):
                        yield number, start + offset, output
            self.run(call, values, base)

    def _suffix(
        self, position: int, values: Values, variants: Sequence[Tensors], images: int
    ) -> Sequence[Outputs]:
        """The outputs of several variants from one call to the end, all in one batch."""
        count, changed = len(variants), {name for variant in variants for name in variant}
        if count == 1:
            own = dict(values)
            for call in self.calls[position:]:
                self.run(call, own, variants[0])
            return [self.result(own, variants[0])]
        shared = dict(values)  # values of the prefix, one for all variants
        stacked: Values = {}  # values of the suffix, variant by variant along the batch
        for call in self.calls[position:]:
            reads = [node for node in call.node.all_input_nodes if node in shared or node in stacked]
            if call.tensors & changed:
                parts = []
                for number, variant in enumerate(variants):
                    rows = slice(number * images, (number + 1) * images)
                    seen = {
                        node: shared[node] if node in shared else _rows(stacked[node], rows, count * images)
                        for node in reads
                    }
                    parts.append(self.compute(call, seen, variant))
                stacked[call.node] = pytree.tree_map(lambda *each: torch.cat(each), *parts)
            elif any(node in stacked for node in reads):
                for node in reads:
                    if node in shared:
                        stacked[node] = _repeated(shared.pop(node), count, images)
                stacked[call.node] = self.compute(call, stacked, variants[0])
            else:
                shared[call.node] = self.compute(call, shared, variants[0])
            for node in call.done:
                shared.pop(node, None)
                stacked.pop(node, None)
        outputs = self.result(shared | stacked, variants[0])
        return [
            pytree.tree_map(
                lambda x, part=slice(k * images, (k + 1) * images): _rows(x, part, count * images), outputs
            )
            for k in range(count)
        ]


def _alike(a: Outputs, b: Outputs) -> bool:
    """Whether outputs are equal but for rounding."""
    pairs = zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True)
    return all(
        torch.allclose(x, y, rtol=1e-3, atol=1e-4, equal_nan=True) if isinstance(x, Tensor) else x == y
        for x, y in pairs
    )


def _rows(value: Any, rows: slice, total: int) -> Any:
    """One variant's part of a value of the batch."""
    return value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == total else value


def _repeated(value: Any, count: int, images: int) -> Any:
    """A value of the prefix once for each variant; the number of images itself becomes that of the batch."""
    if isinstance(value, Tensor) and value.ndim and len(value) == images:
        return value.repeat(count, *[1] * (value.ndim - 1))
    return value * count if isinstance(value, int) and value == images else value


def chunks(program: Replay, batches: Sequence[Inputs]) -> list[Inputs]:
    """The same images in batches of which one pass takes at most `PASS` bytes.

    Raises:
        CaptureError: a batch is not of the kind that was captured.
    """
    for x in batches:
        program.leaves(x)
    most = max(1, int(PASS / max(1.0, program.bytes_per_image)))
    if program.batch is not None:
        return list(batches)
    return [some_of(x, slice(start, start + most)) for x in batches for start in range(0, batch_of(x), most)]
