"""Residual branches: parts of a network whose output is only added to what passes by them, so that they may go.

They are found in the captured graph, whatever the classes are called. A branch is all that one operand of a sum of two
tensors of one shape is computed from and nothing else reads. The sum is a residual one if the other operand is one of
the tensors that the branch reads, or is computed from the same single tensor as the branch: a shortcut, which stays.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from secateur.graph.capture import Capture
from secateur.graph.labels import Labels

SUMS = {"aten.add.Tensor": ("self", "other"), "aten.add_.Tensor": ("self", "other")}
"""Operators that add two tensors -> the names of the two."""


@dataclass(frozen=True)
class Branch:
    """A part of a captured graph that can be left out, as if its output were zero.

    Attributes:
        module: name of the smallest module that holds the branch and the sum.
        parts: names of the largest modules inside of it in which nothing else runs, and that have parameters.
        sum: name of the node that adds it.
        stays: name of the argument of the sum that stays.
        steps: names of the branch's nodes.
        tensors: names of the parameters and buffers that it alone reads.
        last: those that its output is made with: of the last layers and of the norms and scales behind them.
        written: whether something writes in place to what the sum returns.
    """

    module: str
    parts: tuple[str, ...]
    sum: str
    stays: str
    steps: frozenset[str]
    tensors: tuple[str, ...]
    last: frozenset[str]
    written: bool


def find_branches(
    model: nn.Module,
    captured: Capture,
    values: Mapping[fx.Node, Any],
    labels: Labels,
    names: Mapping[str, str],
) -> list[Branch]:
    """All branches of a model, in the order in which they are added.

    A branch whose weights are also read elsewhere is none, nor one that does no multiply-adds or writes to what it is
    given.

    Args:
        model: the model.
        captured: its graph.
        values: what every node holds.
        labels: with the multiply-adds of every node, and the role of every tensor.
        names: tied tensors -> one name.
    """
    found = _Finder(captured, values, labels, names)
    result = []
    for node in captured.module.graph.nodes:
        if str(node.target) in SUMS and (split := found.split(node)):
            result.append(found.branch(model, node, *split))
    return [branch for branch in result if branch is not None]


class _Finder:
    def __init__(
        self, captured: Capture, values: Mapping[fx.Node, Any], labels: Labels, names: Mapping[str, str]
    ) -> None:
        self.values, self.labels = values, labels
        self.owned = {name: names.get(tensor, tensor) for name, tensor in captured.tensors.items()}
        self.nodes = list(captured.module.graph.nodes)
        self.place = {node: number for number, node in enumerate(self.nodes)}
        self.readers: dict[str, set[fx.Node]] = {}
        for node in self.nodes:
            if node.name in self.owned:
                self.readers.setdefault(self.owned[node.name], set()).update(node.users)
        self.macs: dict[str, int] = {}
        self.data = set(captured.inputs)  # what depends on them
        for node in self.nodes:
            if not self.data.isdisjoint(node.all_input_nodes):
                self.data.add(node)
        for item in labels.contractions:
            self.macs[item.node] = self.macs.get(item.node, 0) + item.macs

    def split(self, node: fx.Node) -> tuple[str, set[fx.Node]] | None:
        """The argument of a sum that stays, and the nodes that the other hangs on; None: it is no residual sum."""
        operands = [x for x in node.args[:2] if isinstance(x, fx.Node) and x in self.data]
        if len(set(operands)) < 2 or node.kwargs.get("alpha", 1) != 1:
            return None
        if len({getattr(self.values.get(x), "shape", None) for x in (node, *operands)}) > 1:
            return None
        regions = [self.region(x, node) for x in operands]
        entries = [self.entries(region) for region in regions]
        able = []
        for own, other in ((0, 1), (1, 0)):
            shared = operands[other] in entries[own] or (
                len(entries[own]) == 1 and entries[own] == entries[other]
            )
            if shared and self.work(regions[own]):
                carried = any(self.carries(operands[own], entry) for entry in entries[own])
                able.append((carried, -self.work(regions[own]), own, other))
        if not able or min(able)[0]:
            return None
        _, _, own, other = min(able)
        return SUMS[str(node.target)][other], regions[own]

    def region(self, operand: fx.Node, sum_: fx.Node) -> set[fx.Node]:
        """The nodes that only this operand of the sum hangs on."""
        found: set[fx.Node] = set()
        if operand.op == "call_function" and set(operand.users) == {sum_}:
            found.add(operand)
            for node in reversed(self.nodes[: self.place[operand]]):
                if node.op == "call_function" and node.users and found.issuperset(node.users):
                    found.add(node)
        return found

    def entries(self, region: Collection[fx.Node]) -> set[fx.Node]:
        """What a region reads of the data, from outside."""
        read = {source for node in region for source in node.all_input_nodes}
        return {node for node in read & self.data if node not in region}

    def work(self, region: Iterable[fx.Node]) -> int:
        """Multiply-adds in a region."""
        return sum(self.macs.get(node.name, 0) for node in region)

    def carries(self, operand: fx.Node, entry: fx.Node) -> bool:
        """Whether a tensor is the entry itself, with something added to it."""
        if operand is entry:
            return True
        if str(operand.target) not in SUMS:
            return False
        return any(isinstance(x, fx.Node) and self.carries(x, entry) for x in operand.args[:2])

    def branch(self, model: nn.Module, node: fx.Node, stays: str, region: set[fx.Node]) -> Branch | None:
        """The branch of a residual sum; None: it cannot be left out."""
        tensors = dict.fromkeys(
            self.owned[source.name]
            for part in self.nodes
            if part in region
            for source in part.all_input_nodes
            if source.name in self.owned
        )
        if not tensors or any(not self.readers[name] <= region for name in tensors):
            return None
        given = set().union(*map(storages, self.entries(region)))
        if any(is_in_place(part) and storages(part) & given for part in region):
            return None
        module = common([path_of(part) for part in (*region, node)])
        dropped = node.args[1 if stays == "self" else 0]
        return Branch(
            module,
            self.parts(model, module, region, set(tensors)),
            node.name,
            stays,
            frozenset(part.name for part in region),
            tuple(tensors),
            self.last(dropped, region),  # type: ignore[arg-type]
            is_written(node),
        )

    def parts(
        self, model: nn.Module, module: str, region: set[fx.Node], tensors: set[str]
    ) -> tuple[str, ...]:
        """The largest modules in which nothing runs but the branch."""
        elsewhere = {name for node in self.nodes if node not in region for name in path_of(node)}
        found: list[str] = []
        for name, inner in model.named_modules():
            inside = name != module and (not module or name.startswith(f"{module}."))
            if not inside or name in elsewhere or any(name.startswith(f"{other}.") for other in found):
                continue
            own = {f"{name}.{local}" for local, _ in inner.named_parameters()}
            read = own & self.readers.keys()
            if read and read <= tensors:
                found.append(name)
        return tuple(found)

    def last(self, operand: fx.Node, region: set[fx.Node]) -> frozenset[str]:
        """The tensors of the last layers, and of norms and scales behind them."""
        found: set[str] = set()
        seen: set[fx.Node] = set()
        ahead = [operand]
        while ahead:
            node = ahead.pop()
            if node not in region or node in seen:
                continue
            seen.add(node)
            own = {self.owned[x.name] for x in node.all_input_nodes if x.name in self.owned}
            found |= own
            if not any(
                self.labels.roles.get((name, dim)) == "out" for name in own for dim in range(MOST_DIMS)
            ):
                ahead += [x for x in node.all_input_nodes if x.name not in self.owned]
        return frozenset(found)


MOST_DIMS = 5
"""Of a weight."""


def path_of(node: fx.Node) -> tuple[str, ...]:
    """Names of the modules in whose forwards a node runs, the outermost first."""
    return tuple(str(name) for name, _ in (node.meta.get("nn_module_stack") or {}).values())


def common(paths: Sequence[tuple[str, ...]]) -> str:
    """The innermost module that all paths go through."""
    last = ""
    for names in zip(*paths, strict=False):
        if len(set(names)) > 1:
            break
        last = names[0]
    return last


def storages(node: fx.Node) -> set[int]:
    """The memory that a node's tensors lie in."""
    held = node.meta.get("val")
    parts = held if isinstance(held, list | tuple) else [held]
    return {part.untyped_storage()._cdata for part in parts if isinstance(part, Tensor)}


def is_in_place(node: fx.Node) -> bool:
    """Whether an operator writes to its first argument."""
    return str(node.target).split(".")[-2:][0].endswith("_")


def is_written(node: fx.Node) -> bool:
    """Whether something writes to what a node returns, or to a view of it."""
    own = storages(node)
    return any(
        is_in_place(user) or (storages(user) & own and is_written(user))
        for user in node.users
        if user.op == "call_function"
    )
