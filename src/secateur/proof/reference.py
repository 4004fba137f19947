"""The original network without the removed units, at its full width: what a cut must equal.

The captured graph is run on the masked weights. Where a statistic is taken over positions of which some are
removed (normalisation, softmax, means, extremes), only the survivors enter it; where a product sums over
them, the removed ones count as zero. The table of operators says how. The output of a branch that is left out is zero.
Everywhere else the graph runs as it is:
zeros alone must do.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.errors import CutError
from secateur.graph.branches import Branch
from secateur.graph.capture import Capture
from secateur.graph.labels import Value
from secateur.graph.modes import default_precision
from secateur.graph.operators import OPERATORS, LiveSite, Step, shapes_of
from secateur.graph.trace import Survivors, Trace, repeated
from secateur.rewriting.align import align
from secateur.rewriting.listing import list_operators
from secateur.rewriting.program import Around, Program, Ref
from secateur.rewriting.rewrite import fixed_program, tensors_of
from secateur.rewriting.without import sums_at, sums_of


class Rehearsal(LiveSite):
    """A site whose operator does not run."""

    def call(self, /, **changed: Any) -> Any:
        """Its first tensor."""
        return next(arg for arg in self.args.values() if isinstance(arg, Tensor))


class Reference:
    """The forward pass of the original in evaluation mode, with statistics over the survivors of a plan.

    Attributes:
        sites: "module (operator)" wherever zeros alone would have given something else; known after a run.
    """

    def __init__(self, trace: Trace, survivors: Survivors, captured: Capture | None = None) -> None:
        """From the graph of the analysis, or from one at other sizes.

        Raises:
            CutError: at those sizes, the model does other things than in the analysis.
        """
        self._lines = list_operators(trace.captured)
        self._values = trace.values
        self._sums = sums_of(self._lines, survivors.skipped)
        if captured is not None:
            aligned = align([self._lines, list_operators(captured)])
            if aligned is None:
                raise CutError("the model does other things at other sizes")
            sums = {self._lines.steps[number].node: branch for number, branch in self._sums.items()}
            known, self._lines = aligned
            self._sums = sums_at(known, sums)
            self._values = {
                ours: trace.values.get(theirs)
                for ours, theirs in zip(self._lines.nodes, known.nodes, strict=True)
            }
        self._program = fixed_program(self._lines)
        self._survivors = survivors
        self.sites: dict[str, None] = {}

    @property
    def needed(self) -> bool:
        """Whether zeros alone might give something else: statistics over removed positions, or blocks that go."""
        return bool(self._sums) or any(map(self._may_differ, self._lines.steps))

    def _may_differ(self, step: Step) -> bool:
        """Whether an operator does other things to ones than it would without the removed positions.

        Its tensors have size 1 along all dims that lose nothing, and what it computes in the end is left out.
        """
        survivors = survivors_of(step)
        alive = self._alive(step) if survivors else {}
        if survivors is None or not alive:
            return False

        def ones(arg: Any, name: str) -> Any:
            if isinstance(arg, list):
                return [ones(part, f"{name}.{i}") for i, part in enumerate(arg)]
            if not isinstance(arg, Ref):
                return arg
            found = shapes_of(self._lines.nodes[arg.index])
            return torch.ones(alive[name].shape if name in alive else [1] * len(found[0] if found else ()))

        site = Rehearsal(step, {name: ones(arg, name) for name, arg in step.args.items()}, alive)
        try:
            survivors(site)
        except Exception:  # such as where two tensors no longer fit
            return True
        return site.touched

    def run(self, inputs: Any, named: Mapping[str, Tensor]) -> Any:
        """The output for the leaves of the example inputs and masked tensors by name."""
        leaves = [x.clone() if isinstance(x, Tensor) else x for x in pytree.tree_leaves(inputs)]
        named = {name: t if isinstance(t, nn.Parameter) else t.clone() for name, t in named.items()}
        return run_fixed(self._program, leaves, tensors_of(self._lines, named), self._around)

    def _around(self, number: int, args: Sequence[Any], kwargs: Any) -> Any:
        step = self._lines.steps[number]
        if number in self._sums:
            return self._left_out(self._sums[number], *args[:2])
        survivors = survivors_of(step)
        alive = self._alive(step) if survivors else {}
        if survivors is None or not alive:
            return step.function(*args, **kwargs)
        names = [argument.name for argument in step.function._schema.arguments]  # type: ignore[attr-defined]
        site = LiveSite(step, dict(zip(names, args, strict=False)) | kwargs, alive)
        result = survivors(site)
        if site.touched:
            self.sites[f"{step.module or 'forward'} ({step.op})"] = None
        return result

    def _left_out(self, branch: Branch, first: Tensor, second: Tensor) -> Tensor:
        """A sum without one of its two operands."""
        stays, goes = (first, second) if branch.stays == "self" else (second, first)
        if goes.any():
            self.sites[f"{branch.module or 'forward'} (block)"] = None
        return stays.clone()

    def _alive(self, step: Step) -> dict[str, Tensor]:
        """Argument name -> mask that broadcasts over the tensor, for those that lose positions."""
        result = {}
        for name, arg in step.args.items():
            for i, ref in enumerate(arg if isinstance(arg, list) else [arg]):
                if not isinstance(ref, Ref):
                    continue
                node = self._lines.nodes[ref.index]
                value = self._values.get(node)
                keep = self._survivors.keep(value) if isinstance(value, Value) else {}
                if keep:
                    shape = shapes_of(node)[0]
                    mask = torch.ones([1] * len(shape), dtype=torch.bool)
                    for dim, line in keep.items():
                        fits = line if len(line) == shape[dim] else repeated(line, shape[dim])
                        if fits is None:
                            raise CutError("the model's channels mean something else at other sizes")
                        mask = mask & torch.from_numpy(fits).reshape(
                            [-1 if d == dim else 1 for d in range(len(shape))]
                        )
                    result[f"{name}.{i}" if isinstance(arg, list) else name] = mask
        return result


def run_fixed(program: Program, inputs: Sequence[Any], tensors: Sequence[Tensor], around: Around) -> Any:
    """The output of a program of fixed sizes in the precision of its tensors."""
    dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.get_default_dtype())
    with torch.no_grad(), default_precision(dtype):
        return program.run(inputs, tensors, around=around)


def survivors_of(step: Step) -> Callable[[LiveSite], Any] | None:
    """The operator of a step over survivors only; None: zeros for the others do."""
    entry = OPERATORS.get(step.op)
    return entry.survivors if entry else None
