"""A list of operators without the residual branches that a plan leaves out."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import fx

from secateur.graph.branches import Branch
from secateur.graph.operators import Step
from secateur.rewriting.listing import Listing
from secateur.rewriting.program import Made, Ref, refs


def sums_of(lines: Listing, branches: Collection[Branch]) -> dict[int, Branch]:
    """Number of the step -> the branch that it adds."""
    named = {branch.sum: branch for branch in branches}
    graph = lines.captured.module.graph
    return {
        number: named[step.node.name]
        for number, step in enumerate(lines.steps)
        if step.node.name in named and step.node.graph is graph
    }


def sums_at(lines: Listing, branches: Mapping[fx.Node, Branch]) -> dict[int, Branch]:
    """The same, where it is known which nodes the sums are."""
    return {number: branches[step.node] for number, step in enumerate(lines.steps) if step.node in branches}


def without(lines: Listing, sums: Mapping[int, Branch]) -> tuple[Listing, list[int]]:
    """The listing in which some sums are what they add the branch to.

    What only such a branch reads is left out too. Where something writes to a sum, it becomes a copy.

    Args:
        lines: of operators, and of calls of submodules.
        sums: number of a step -> the branch that it adds.
    Returns:
        and the numbers that the remaining steps had.
    """
    if not sums:
        return lines, list(range(len(lines.steps)))
    first = len(lines.nodes) - len(lines.steps)
    before = _readers(lines.steps, lines.output)
    same: dict[int, int] = {}  # register of a sum -> the register that stands for it
    steps = list(lines.steps)
    for number, branch in sums.items():
        step = steps[number]
        stays = step.args[branch.stays]
        if branch.written:
            steps[number] = Step(step.node, "aten.clone.default", {"self": stays}, step.shapes)
        else:
            same[first + number] = stays.index

    def resolved(index: int) -> int:
        while index in same:
            index = same[index]
        return index

    steps = [Step(s.node, s.target, mapped(s.args, resolved), s.shapes) for s in steps]
    output = mapped(lines.output, resolved)
    alive = {i for i in range(len(steps)) if first + i not in same}
    count = _readers([step for i, step in enumerate(steps) if i in alive], output)
    for number in reversed(range(len(steps))):
        register = first + number
        if number in alive and before.get(register) and not count.get(register):
            alive.discard(number)
            for index in refs(list(steps[number].args.values())):
                count[index] -= 1
    given = len(lines.inputs)
    tensors = [i for i in range(given, first) if count.get(i) or not before.get(i)]
    kept = sorted(alive)
    registers = [*range(given), *tensors, *(first + i for i in kept)]
    place = {old: new for new, old in enumerate(registers)}
    result = Listing(lines.captured, lines.inputs, [lines.tensors[i - given] for i in tensors])
    result.nodes = [lines.nodes[old] for old in registers]
    result.steps = [
        Step(step.node, step.target, mapped(step.args, place.__getitem__), step.shapes)
        for step in (steps[i] for i in kept)
    ]
    result.output = mapped(output, place.__getitem__)
    return result, kept


def _readers(steps: Collection[Step], output: Any) -> dict[int, int]:
    """How often each register is read."""
    count: dict[int, int] = {}
    for index in refs([*(list(step.args.values()) for step in steps), output]):
        count[index] = count.get(index, 0) + 1
    return count


def mapped(tree: Any, register: Callable[[int], int]) -> Any:
    """The same with other registers."""
    if isinstance(tree, Ref):
        return Ref(register(tree.index))
    if isinstance(tree, Made):
        return Made(tree.cls, mapped(dict(tree.entries), register))
    if isinstance(tree, dict):
        return {name: mapped(part, register) for name, part in tree.items()}
    return type(tree)(mapped(part, register) for part in tree) if isinstance(tree, list | tuple) else tree
