"""From a listing to a program: which submodules it calls, and the operators between these calls."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from secateur.errors import CutError
from secateur.graph.operators import Step
from secateur.rewriting.calls import Site, leaves_of
from secateur.rewriting.listing import Listing, Via, as_op
from secateur.rewriting.program import ANYTHING, Call, Dim, Made, Named, Op, Ref, Size

Calls = dict[int, tuple[Any, Any]]
"""Number of a call in a listing -> its arguments and keyword arguments, with `Ref` to registers of the listing."""


@dataclass(frozen=True)
class Composed:
    """What a program is made of.

    Attributes:
        inputs: how many tensors are among its arguments.
        tensors: names of those it reads.
        ops: its lines.
        output: what it returns.
    """

    inputs: int
    tensors: list[str]
    ops: list[Op | Call]
    output: Any


def choose_calls(
    lines: Listing,
    sites: Sequence[Sequence[Site]],
    express: Callable[..., Any],
) -> Calls:
    """The calls of submodules that a program makes as they are.

    Args:
        lines: of the module as captured.
        sites: of every call of the listing, in this capture and in all others.
        express: (a number, the same in the other captures) -> the number, or what it is made of.
    """
    if any([site.module for site in other] != [site.module for site in sites[0]] for other in sites):
        return {}
    possible: Calls = {}
    refused: set[str] = set()
    for number, call in enumerate(lines.calls):
        variants = [own[number] for own in sites]
        try:
            args, kwargs = (
                follow([getattr(site, part) for site in variants], call.reads, express)
                for part in ("args", "kwargs")
            )
            possible[number] = args, kwargs
        except CutError:
            refused.add(variants[0].module)
        if call.steps.stop < 0 or any(leaf == ANYTHING for _, leaf in leaves_of(variants[0].output)):
            refused.add(variants[0].module)
    while True:
        # all calls of a submodule or none, so that they keep their numbers
        chosen = {n: given for n, given in possible.items() if sites[0][n].module not in refused}
        owners = {step: n for n in chosen for step in lines.calls[n].steps}
        first = len(lines.inputs) + len(lines.tensors)
        steps = [lines.steps[i].args for i in outside(lines, chosen)]
        open_ = {
            owners[ref.index - first]
            for ref in (resolve(ref, chosen) for ref in references([*steps, *chosen.values(), lines.output]))
            if not isinstance(ref, Via) and ref.index - first in owners
        }
        if not open_:
            return chosen
        refused |= {sites[0][n].module for n in open_}


def follow(variants: Sequence[Any], reads: Sequence[Any], express: Callable[..., Any]) -> Any:
    """Arguments of a call with registers for its tensors, from what they were in all captures.

    Raises:
        CutError: they differ between captures in more than numbers that can be expressed.
    """
    base, *others = variants
    if isinstance(base, Ref):
        return reads[base.index]
    if isinstance(base, Made):
        return Made(base.cls, follow([v.entries for v in variants], reads, express))
    if isinstance(base, dict | list | tuple):
        if any(type(o) is not type(base) or len(o) != len(base) for o in others):
            raise CutError("arguments that differ in number")
        if isinstance(base, dict):
            return {name: follow([v[name] for v in variants], reads, express) for name in base}
        return type(base)(follow([v[i] for v in variants], reads, express) for i in range(len(base)))
    return express(base, others)


def resolve(ref: Ref, chosen: Collection[int]) -> Ref:
    """What a reference is if only these calls are made: one through a call, or a plain register."""
    while isinstance(ref, Via) and ref.call not in chosen:
        ref = ref.of
    return ref


def references(tree: Any) -> Iterator[Ref]:
    """The references in arguments."""
    for _, leaf in leaves_of(tree):
        if isinstance(leaf, Ref):
            yield leaf


def outside(lines: Listing, chosen: Collection[int]) -> list[int]:
    """The steps that run in none of these calls."""
    inside = {step for n in chosen for step in lines.calls[n].steps}
    return [i for i in range(len(lines.steps)) if i not in inside]


def outline(lines: Listing, chosen: Collection[int]) -> list[Step | int]:
    """The lines of a program in order: operators that run in no call, and numbers of calls."""
    steps: list[tuple[int, int, Step | int]] = [
        (i, len(lines.calls), lines.steps[i]) for i in outside(lines, chosen)
    ]
    calls: list[tuple[int, int, Step | int]] = [(lines.calls[n].steps.stop, n, n) for n in chosen]
    return [line for *_, line in sorted(steps + calls, key=lambda line: line[:2])]


def aligned(lines: Listing, chosen: Collection[int]) -> list[fx.Node]:
    """The inputs, and what the operators outside of some calls and these calls compute, in order."""
    nodes = list(lines.inputs)
    first = len(lines.inputs) + len(lines.tensors)
    places = {id(step): first + i for i, step in enumerate(lines.steps)}
    for line in outline(lines, chosen):
        found = (
            [places[id(line)]] if isinstance(line, Step) else [ref.index for ref in lines.calls[line].returns]
        )
        nodes += [lines.nodes[index] for index in found]
    return nodes


def tensors_read(lines: Listing, chosen: Collection[int]) -> list[int]:
    """Registers of the parameters, buffers and constants that are read outside of these calls."""
    read = [
        line.args if isinstance(line, Step) else lines.calls[line].reads for line in outline(lines, chosen)
    ]
    found = [resolve(ref, chosen) for ref in references([*read, lines.output])]
    plain = {ref.index for ref in found if not isinstance(ref, Via)}
    inputs, first = len(lines.inputs), len(lines.inputs) + len(lines.tensors)
    used = [i for i in range(inputs, first) if i in plain]
    if any(isinstance(x, Named) and x.name == "same" for _, x in leaves_of(read)):
        floating = [i for i in range(first) if is_floating(lines, i)]
        used += [i for i in floating[-1:] if not set(floating) & {*range(inputs), *used}]
    return used


def compose(lines: Listing, sites: Sequence[Site], chosen: Calls, output: Any) -> Composed:
    """What a program is made of, for the calls that it makes.

    Args:
        lines: as they are to be.
        sites: of its calls.
        chosen: calls that are made, with their arguments.
        output: what it returns, with references of the listing.
    """
    inputs, first = len(lines.inputs), len(lines.inputs) + len(lines.tensors)
    order = outline(lines, chosen)
    read = [line.args if isinstance(line, Step) else chosen[line] for line in order]
    found = [resolve(ref, chosen) for ref in references([*read, output])]
    returned = {(ref.call, ref.leaf) for ref in found if isinstance(ref, Via)}
    used = tensors_read(lines, chosen)
    registers: dict[Any, int] = {i: i for i in range(inputs)} | {
        old: inputs + i for i, old in enumerate(used)
    }
    start = inputs + len(used)
    result: list[Op | Call] = []

    def translate(tree: Any) -> Any:
        if isinstance(tree, Ref):
            ref = resolve(tree, chosen)
            return Ref(registers[(ref.call, ref.leaf) if isinstance(ref, Via) else ref.index])
        if isinstance(tree, Dim):
            return Dim(registers[tree.register] if tree.register >= 0 else -1, tree.dim)
        if isinstance(tree, Size):
            return Size(tree.op, translate(tree.left), translate(tree.right))
        if isinstance(tree, Made):
            return Made(tree.cls, translate(dict(tree.entries)))
        if isinstance(tree, Mapping):
            return {name: translate(part) for name, part in tree.items()}
        return type(tree)(map(translate, tree)) if isinstance(tree, list | tuple) else tree

    def add(line: Op | Call) -> int:
        result.append(line)
        return start + len(result) - 1

    places = {id(step): first + i for i, step in enumerate(lines.steps)}
    for line in order:
        if isinstance(line, Step):
            op = as_op(line)
            kwargs = tuple((name, translate(arg)) for name, arg in op.kwargs)
            registers[places[id(line)]] = add(Op(op.target, translate(op.args), kwargs))
            continue
        args, kwargs = translate(chosen[line])
        site = sites[line]
        known = {(): add(Call(site.module, tuple(args), tuple(kwargs.items())))}
        for path, leaf in leaves_of(site.output):
            if isinstance(leaf, Ref) and (line, leaf.index) in returned:
                for depth in range(1, len(path) + 1):
                    if path[:depth] not in known:
                        step = Ref(known[path[: depth - 1]]), path[depth - 1]
                        known[path[:depth]] = add(Op("getitem", step))
                registers[line, leaf.index] = known[path]
                registers.setdefault(lines.calls[line].returns[leaf.index].index, known[path])
    return Composed(inputs, [lines.names[i - inputs] for i in used], result, translate(output))


def is_floating(lines: Listing, register: int) -> bool:
    """Whether an input or tensor of a listing holds floating-point numbers."""
    value = lines.nodes[register].meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()
