"""From all operators of a captured module to those between its calls of submodules."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from secateur.graph.operators import Step, shapes_of
from secateur.rewriting.calls import Site, leaves_of
from secateur.rewriting.listing import CALL, Listing, Via, is_call
from secateur.rewriting.program import ANYTHING, Made, Named, Ref


def collapse(lines: Listing, sites: Sequence[Site]) -> Listing:
    """A listing in which every call of a submodule that can be made as it is is one step.

    Args:
        lines: all operators, with the calls that were marked.
        sites: what is known about each of these calls.
    """
    chosen = choose_calls(lines, sites)
    first = len(lines.inputs) + len(lines.tensors)
    used = tensors_read(lines, chosen)
    result = Listing(lines.captured, lines.inputs, [lines.nodes[i] for i in used])
    result.nodes = [*result.inputs, *result.tensors]
    registers: dict[Any, int] = {i: i for i in range(len(lines.inputs))}
    registers |= {old: len(lines.inputs) + i for i, old in enumerate(used)}
    inside = {step: n for n in chosen for step in lines.calls[n].steps}
    starts: dict[int, list[int]] = {}
    for n in chosen:
        starts.setdefault(lines.calls[n].steps.stop, []).append(n)

    def translate(tree: Any) -> Any:
        if isinstance(tree, Ref):
            ref = resolve(tree, chosen)
            return Ref(registers[(ref.call, ref.leaf) if isinstance(ref, Via) else ref.index])
        if isinstance(tree, Made):
            return Made(tree.cls, translate(dict(tree.entries)))
        if isinstance(tree, Mapping):
            return {name: translate(part) for name, part in tree.items()}
        return type(tree)(map(translate, tree)) if isinstance(tree, list | tuple) else tree

    def add(step: Step) -> int:
        result.steps.append(step)
        result.nodes.append(step.node)
        return len(result.nodes) - 1

    def add_call(n: int) -> None:
        call, site = lines.calls[n], sites[n]
        nodes = [lines.nodes[ref.index] for ref in call.returns]
        args = {part: translate(placed(getattr(site, part), call.reads)) for part in ("args", "kwargs")}
        args["args"] = list(args["args"])
        known = {(): add(Step(nodes[0], CALL + site.module, args, shapes_of(nodes[0])))}
        for path, leaf in leaves_of(site.output):
            if not isinstance(leaf, Ref):
                continue
            node = nodes[leaf.index]
            for depth in range(1, len(path) + 1):
                if path[:depth] not in known:
                    items = {"items": Ref(known[path[: depth - 1]]), "index": path[depth - 1]}
                    known[path[:depth]] = add(Step(node, "getitem", items, shapes_of(node)))
            registers[n, leaf.index] = known[path]

    for i in range(len(lines.steps) + 1):
        for n in starts.get(i, ()):
            add_call(n)
        if i < len(lines.steps) and i not in inside:
            step = lines.steps[i]
            registers[first + i] = add(Step(step.node, step.target, translate(step.args), step.shapes))
    result.output = translate(lines.output)
    return result


def choose_calls(lines: Listing, sites: Sequence[Site]) -> list[int]:
    """Numbers of the calls whose results alone are read outside of them: of a submodule all calls, or none."""
    first = len(lines.inputs) + len(lines.tensors)
    refused = {
        site.module
        for call, site in zip(lines.calls, sites, strict=True)
        if call.steps.stop < 0
        or not call.returns
        or any(leaf == ANYTHING for _, leaf in leaves_of(site.output))
    }
    while True:
        chosen = [n for n, site in enumerate(sites) if site.module not in refused]
        owners = {step: n for n in chosen for step in lines.calls[n].steps}
        found = [resolve(ref, chosen) for ref in references(read_outside(lines, chosen))]
        wrong = {
            owners[ref.index - first]
            for ref in found
            if not isinstance(ref, Via) and ref.index - first in owners
        }
        if not wrong:
            return chosen
        refused |= {sites[n].module for n in wrong}


def read_outside(lines: Listing, chosen: Collection[int]) -> list[Any]:
    """Arguments that are read outside of these calls: of operators, of the calls themselves, and the output."""
    inside = {step for n in chosen for step in lines.calls[n].steps}
    operators = [step.args for i, step in enumerate(lines.steps) if i not in inside]
    return [*operators, lines.output, *(lines.calls[n].reads for n in chosen)]


def tensors_read(lines: Listing, chosen: Collection[int]) -> list[int]:
    """Registers of the parameters, buffers and constants that are read outside of these calls."""
    read = read_outside(lines, chosen)
    found = [resolve(ref, chosen) for ref in references(read)]
    plain = {ref.index for ref in found if not isinstance(ref, Via)}
    inputs, first = len(lines.inputs), len(lines.inputs) + len(lines.tensors)
    used = [i for i in range(inputs, first) if i in plain]
    if any(isinstance(x, Named) and x.name == "same" for _, x in leaves_of(read)):  # of some tensor
        floating = [i for i in range(first) if is_floating(lines, i)]
        used += [i for i in floating[-1:] if not set(floating) & {*range(inputs), *used}]
    return used


def calls_of(lines: Listing) -> list[str]:
    """Names of the submodules that a listing calls."""
    return [step.target.removeprefix(CALL) for step in lines.steps if is_call(step)]


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


def placed(tree: Any, leaves: Sequence[Any]) -> Any:
    """The tree with the leaves in place of each `Ref`, by its index."""
    if isinstance(tree, Ref):
        return leaves[tree.index]
    if isinstance(tree, Made):
        return Made(tree.cls, placed(dict(tree.entries), leaves))
    if isinstance(tree, dict):
        return {name: placed(part, leaves) for name, part in tree.items()}
    return type(tree)(placed(part, leaves) for part in tree) if isinstance(tree, list | tuple) else tree


def is_floating(lines: Listing, register: int) -> bool:
    """Whether an input or tensor of a listing holds floating-point numbers."""
    value = lines.nodes[register].meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()
