"""A model's forward pass as a list of operator calls, run with some tensors replaced, or from the middle.

What happens before the first call that reads a replaced tensor is the same for every replacement, so it is
run once; only the rest is run again, for several replacements in one batch if the graph allows it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from secateur.errors import CaptureError, first_line
from secateur.graph.capture import Capture, capture
from secateur.graph.modes import evaluating

Tensors = Mapping[str, Tensor]
"""Parameter or buffer name -> the tensor that takes its place."""

Values = dict[fx.Node, Any]
"""What the calls so far have computed, as far as later ones read it."""


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


class Replay:
    """The evaluation-mode forward pass of a model with one input and one output.

    Args:
        model: its parameters and buffers are read when a call runs, not copied.
        x: an example batch, (n, …); n is the only batch size if the graph cannot be captured for all.
    Raises:
        CaptureError: the graph cannot be captured, or computes something else than the model.

    Attributes:
        calls: in the order in which they run.
        batch: the only number of images the graph takes; None: any.
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model = model
        failure: Exception | None = None
        for any_batch in (True, False):
            try:
                with evaluating(model), torch.no_grad():
                    self._read(capture(model, x, exact=True, any_batch=any_batch))
                    some = x[: len(x) // 2] if any_batch else x
                    if not torch.allclose(self(some), model(some), rtol=1e-3, atol=1e-4, equal_nan=True):
                        raise CaptureError("the captured graph computes something else")
            except Exception as error:
                failure = failure or error
            else:
                self.batch = None if any_batch else len(x)
                break
        else:
            assert failure is not None
            raise CaptureError(
                f"{type(model).__name__}: its forward pass cannot be captured as one tensor in, one tensor out "
                f"({first_line(failure)})."
            ) from failure
        self._prefer_channels_last(x)

    def _read(self, captured: Capture) -> None:
        self._owned, self._constants = captured.tensors, captured.constants
        self._module, self._inputs = captured.module, captured.inputs
        self._output = next(node for node in self._module.graph.nodes if node.op == "output")
        self.calls = self._listed()
        self._layout = torch.contiguous_format

    def _prefer_channels_last(self, x: Tensor) -> None:
        """Lay images out n h w c, which convolutions run faster on, unless the captured calls do not take that."""
        if x.ndim != 4:
            return
        with torch.no_grad():
            expected = self(x)
            self._layout = torch.channels_last
            try:
                same = torch.allclose(self(x), expected, rtol=1e-3, atol=1e-4, equal_nan=True)
            except RuntimeError:  # such as a view across dims that are no longer next to one another
                same = False
        if not same:
            self._layout = torch.contiguous_format

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

    def begin(self, x: Tensor) -> Values:
        """The values before the first call."""
        return {self._inputs[0]: x.contiguous(memory_format=self._layout)}

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

    def result(self, values: Values) -> Tensor:
        """The output, after the last call."""
        found = [values[node] for node in self._output.all_input_nodes]
        return found[0]  # type: ignore[no-any-return]

    def __call__(self, x: Tensor, tensors: Tensors | None = None) -> Tensor:
        """The model's output with some tensors replaced: (n, …) -> (n, …)."""
        values = self.begin(x)
        for call in self.calls:
            self.run(call, values, tensors)
        return self.result(values)

    def variants(
        self,
        x: Tensor,
        candidates: Sequence[Sequence[Tensors]],
        base: Tensors | None = None,
        *,
        batched: int = 1,
    ) -> Iterator[tuple[int, int, Tensor]]:
        """The outputs with each candidate's tensors replaced in turn, running only what each one changes.

        Args:
            x: (n, …).
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
        values = self.begin(x)
        for position, call in enumerate(self.calls):
            for number in entering.get(position, ()):
                some = candidates[number]
                for start in range(0, len(some), batched):
                    chunk = [{**base, **some[i]} for i in range(start, min(start + batched, len(some)))]
                    outputs = self._suffix(position, values, chunk, len(x))
                    for offset, output in enumerate(outputs):
                        yield number, start + offset, output
            self.run(call, values, base)

    def _suffix(
        self, position: int, values: Values, variants: Sequence[Tensors], images: int
    ) -> Sequence[Tensor]:
        """The outputs of several variants from one call to the end, all in one batch."""
        count, changed = len(variants), {name for variant in variants for name in variant}
        if count == 1:
            own = dict(values)
            for call in self.calls[position:]:
                self.run(call, own, variants[0])
            return [self.result(own)]
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
                stacked[call.node] = torch.cat(parts)
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
        return list(torch.split(self.result(stacked), images))


def _rows(value: Any, rows: slice, total: int) -> Any:
    """One variant's part of a value of the batch."""
    return value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == total else value


def _repeated(value: Any, count: int, images: int) -> Any:
    """A value of the prefix once for each variant; the number of images itself becomes that of the batch."""
    if isinstance(value, Tensor) and value.ndim and len(value) == images:
        return value.repeat(count, *[1] * (value.ndim - 1))
    return value * count if isinstance(value, int) and value == images else value
