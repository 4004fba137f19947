"""A captured graph as a flat list of operators with every size written out, and what a cut makes of each.

Sizes that depend on widths are not left to be worked out again: a `chunk` becomes a split at numbers, a
`view` gets the shape of its result, attention its scale. `CUTS` then replaces the numbers that follow widths.
An operator that is not in the table has none.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from secateur.errors import CutError
from secateur.graph.capture import Capture
from secateur.graph.labels import Value
from secateur.graph.modules import Keep
from secateur.graph.propagate import BODIES, module_of, shapes_of
from secateur.graph.trace import Survivors
from secateur.rewriting.program import DEVICE, Named, Op, Ref

Shape = tuple[int, ...]


@dataclass
class Step:
    """One operator.

    Attributes:
        node: where it stands in the captured graph.
        target: name such as "aten.relu.default", or "getitem".
        args: argument name -> literal, with `Ref` in place of each tensor; those at their default are left out.
        shapes: of its results.
    """

    node: fx.Node
    target: str
    args: dict[str, Any]
    shapes: tuple[Shape, ...]

    @property
    def op(self) -> str:
        """Name without overload, such as "view"."""
        return self.target.removeprefix("aten.").partition(".")[0]

    @property
    def module(self) -> str:
        """Name of the module in whose forward it runs."""
        return module_of(self.node)

    @property
    def function(self) -> Callable[..., Any]:
        """What it calls; any operator of a captured graph, whether or not a saved program may call it."""
        function: Callable[..., Any] = (
            operator.getitem if self.target == "getitem" else _overload(self.node, self.target)
        )
        return function

    def as_op(self) -> Op:
        """The operator of a program."""
        if self.target == "getitem":
            return Op("getitem", (self.args["items"], self.args["index"]))
        positional, keywords = [], []
        schema = _overload(self.node, self.target)._schema
        for argument in schema.arguments:
            if argument.kwarg_only:
                if argument.name in self.args:
                    keywords.append((argument.name, self.args[argument.name]))
            else:
                positional.append(self.args.get(argument.name, argument.default_value))
        while positional and schema.arguments[len(positional) - 1].name not in self.args:
            positional.pop()
        return Op(self.target, tuple(positional), tuple(keywords))


@dataclass
class Listing:
    """The operators of a captured graph, bodies of higher-order operators included.

    Attributes:
        inputs: placeholders of the example inputs.
        tensors: placeholders of parameters, buffers and constants that are read.
        names: what these are called, constants after their placeholder.
        steps: the operators.
        nodes: the node that each register of a program holds.
        output: what the graph returns, with `Ref` in place of each tensor.
    """

    captured: Capture
    inputs: list[fx.Node]
    tensors: list[fx.Node]
    steps: list[Step] = field(default_factory=list)
    nodes: list[fx.Node] = field(default_factory=list)
    output: Any = None

    @property
    def names(self) -> list[str]:
        """Names of the tensors."""
        return [self.captured.tensors.get(node.name, node.name) for node in self.tensors]

    def call(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the operator of one step."""
        return self.steps[number].function(*args, **kwargs)


def listing(captured: Capture) -> Listing:
    """List the operators of a graph.

    Raises:
        CutError: the graph holds a higher-order operator that cannot be written out.
    """
    given = captured.tensors.keys() | captured.constants.keys()
    placeholders = captured.module.graph.find_nodes(op="placeholder")
    tensors = [node for node in placeholders if node.name in given and node.users]
    result = Listing(captured, captured.inputs, tensors)
    result.nodes = [*result.inputs, *tensors]
    environment: dict[fx.Node, Any] = {node: Ref(i) for i, node in enumerate(result.nodes)}
    result.output = _list(captured.module, environment, result)
    return result


def _list(graph: fx.GraphModule, environment: dict[fx.Node, Any], result: Listing) -> Any:
    for node in graph.graph.nodes:
        if node.op == "output":
            return _resolve(node.args[0], environment)
        if node.op == "get_attr":
            environment[node] = getattr(graph, str(node.target))
        if node.op != "call_function":
            continue
        if node.target is operator.getitem and isinstance(environment[node.args[0]], list | tuple):
            environment[node] = environment[node.args[0]][node.args[1]]
            continue
        body = next(
            (a for a in map(environment.get, node.all_input_nodes) if isinstance(a, fx.GraphModule)), None
        )
        if body is not None:
            environment[node] = _list_body(node, body, environment, result)
            continue
        if "_assert" in str(node.target):
            continue
        environment[node] = Ref(len(result.nodes))
        result.nodes.append(node)
        result.steps.append(explicit(_step(node, environment)))
    raise AssertionError("a graph without an output")


def _list_body(node: fx.Node, body: fx.GraphModule, environment: dict[fx.Node, Any], result: Listing) -> Any:
    if str(node.target) not in BODIES or ("autocast" in str(node.target) and node.args[2]):
        raise CutError(
            f"{module_of(node) or 'the model'}: its forward opens a region ({node.target}) in which no result can be "
            f"compared; open it around the call of the model instead"
        )
    args = _resolve(node.args, environment)
    operands = args[next(i for i, arg in enumerate(args) if arg is body) + 1 :]
    inner = dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=True))
    return _list(body, inner, result)


def _step(node: fx.Node, environment: dict[fx.Node, Any]) -> Step:
    if node.target is operator.getitem:
        args = {"items": _resolve(node.args[0], environment), "index": node.args[1]}
        return Step(node, "getitem", args, shapes_of(node))
    schema = node.target._schema  # type: ignore[union-attr]
    names = [argument.name for argument in schema.arguments]
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return Step(node, str(node.target), _resolve(given, environment), shapes_of(node))


def _resolve(arg: Any, environment: Mapping[fx.Node, Any]) -> Any:
    """An argument as a literal: nodes by what stands for them, constants of torch by name."""
    if isinstance(arg, fx.Node):
        return environment[arg]
    if isinstance(arg, list | tuple):
        return [_resolve(part, environment) for part in arg]
    if isinstance(arg, dict):
        return {name: _resolve(part, environment) for name, part in arg.items()}
    if isinstance(arg, torch.device):
        return DEVICE
    for kind, cls in (
        ("dtype", torch.dtype),
        ("memory_format", torch.memory_format),
        ("layout", torch.layout),
    ):
        if isinstance(arg, cls):
            return Named(kind, str(arg).removeprefix("torch."))
    return arg


def _overload(node: fx.Node, target: str) -> Any:
    if str(node.target) == target:
        return node.target
    name, overload = target.removeprefix("aten.").split(".")
    return getattr(getattr(torch.ops.aten, name), overload)


def regions(lines: Listing) -> dict[tuple[str, int], list[int]]:
    """(module name, number of the call) -> the steps that run in it."""
    result: dict[tuple[str, int], list[int]] = {}
    for i, step in enumerate(lines.steps):
        for key, (name, _) in (step.node.meta.get("nn_module_stack") or {}).items():
            number = key.rpartition("@")[2] if "@" in key else "0"
            result.setdefault((name, int(number)), []).append(i)
    return result


def calls(lines: Listing, model: nn.Module) -> dict[tuple[str, int], list[int]]:
    """The same by the first name of each module, also where it is called under several names."""
    first = {module: name for name, module in model.named_modules()}
    names = {name: first[module] for name, module in model.named_modules(remove_duplicate=False)}
    several = {name for other, name in names.items() if other != name}
    result: dict[tuple[str, int], list[int]] = {}
    found = regions(lines)
    for name, number in sorted(found, key=found.__getitem__):
        own = names.get(name, name)
        if own in several:
            count = sum(known == own for known, _ in result)
            result[own, count] = found[name, number]
        else:
            result[name, number] = found[name, number]
    return result


# --- sizes written out -------------------------------------------------------------------------------------


def explicit(step: Step) -> Step:
    """The same operator, with the numbers that PyTorch would work out from widths."""
    entry = EXPLICIT.get(step.op)
    return entry(step) if entry else step


def _shape(ref_node: fx.Node, name: str) -> Shape:
    tensor = _tensor_arg(ref_node, name)
    return tuple(tensor.meta["val"].shape)


def _tensor_arg(node: fx.Node, name: str) -> fx.Node:
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    result = given[name]
    assert isinstance(result, fx.Node)
    return result


def _view(step: Step) -> Step:
    return Step(
        step.node,
        "aten.reshape.default",
        {"self": step.args["self"], "shape": list(step.shapes[0])},
        step.shapes,
    )


def _sized(name: str) -> Callable[[Step], Step]:
    def entry(step: Step) -> Step:
        step.args[name] = list(step.shapes[0])
        return step

    return entry


def _unflatten(step: Step) -> Step:
    rank = len(_shape(step.node, "self"))
    dim = step.args["dim"] = step.args["dim"] % rank
    step.args["sizes"] = list(step.shapes[0][dim : len(step.shapes[0]) - rank + dim + 1])
    return step


def _split(step: Step) -> Step:
    rank = len(_shape(step.node, "self"))
    dim = step.args.get("dim", 0) % rank
    args = {"self": step.args["self"], "split_sizes": [shape[dim] for shape in step.shapes], "dim": dim}
    return Step(step.node, "aten.split_with_sizes.default", args, step.shapes)


def _narrow(step: Step) -> Step:
    dim, start = step.args["dim"], step.args["start"]
    if not isinstance(start, int):
        return step
    size = _shape(step.node, "self")[dim]
    first = start % size if start < 0 else start
    args = {"self": step.args["self"], "dim": dim, "start": first, "end": first + step.args["length"]}
    return _slice(Step(step.node, "aten.slice.Tensor", args, step.shapes))


def _slice(step: Step) -> Step:
    shape = _shape(step.node, "self")
    dim = step.args.get("dim", 0) % len(shape)
    every = step.args.get("step", 1)
    start, end, every = slice(step.args.get("start"), step.args.get("end"), every).indices(shape[dim])
    step.args |= {"dim": dim, "start": start, "end": max(start, end), "step": every}
    return step


def _select(step: Step) -> Step:
    shape = _shape(step.node, "self")
    dim = step.args["dim"] % len(shape)
    step.args |= {"dim": dim, "index": step.args["index"] % shape[dim]}
    return step


def _attention(step: Step) -> Step:
    if step.args.get("scale") is None:
        step.args["scale"] = _shape(step.node, "query")[-1] ** -0.5
    return step


def _renamed(target: str) -> Callable[[Step], Step]:
    return lambda step: Step(step.node, target, step.args, step.shapes)


EXPLICIT: dict[str, Callable[[Step], Step]] = {
    "_unsafe_view": _view,
    "view": _view,
    "reshape": _view,
    "view_as": _view,
    "reshape_as": _view,
    "unflatten": _unflatten,
    "expand": _sized("size"),
    "broadcast_to": _sized("size"),
    "split": _split,
    "chunk": _split,
    "split_with_sizes": _split,
    "tensor_split": _split,
    "unsafe_split": _split,
    "unsafe_chunk": _split,
    "narrow": _narrow,
    "slice": _slice,
    "select": _select,
    "scaled_dot_product_attention": _attention,
    "lift_fresh_copy": _renamed("aten.clone.default"),
    "detach_": _renamed("aten.detach.default"),
} | {op: _sized("size") for op in ("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full")}


# --- sizes that follow a cut -------------------------------------------------------------------------------


@dataclass(frozen=True)
class CutSite:
    """A step whose numbers are to follow a cut.

    Attributes:
        step: its arguments are replaced.
        operands: argument name -> dim -> mask over its positions, for tensors that lose some.
        results: the same for each result.
        shapes: shape of each result after the cut.
    """

    step: Step
    operands: Mapping[str, Mapping[int, Keep]]
    results: Sequence[Mapping[int, Keep]]
    shapes: Sequence[Shape]

    def refuse(self, reason: str) -> CutError:
        return CutError(f"{self.step.module}: {self.step.op} {reason}")


def cut_step(
    step: Step, values: Callable[[Ref], Value | None], out: Any, survivors: Survivors
) -> tuple[Shape, ...]:
    """Let a step's numbers follow a cut; returns the shapes of its results.

    Args:
        step: changed in place.
        values: what the analysis knows about the tensor in a register.
        out: the same for the step's results: a value or a tuple of them.
        survivors: of the plan.
    Raises:
        CutError: no numbers make this operator right.
    """
    outputs = [v for v in (out if isinstance(out, list | tuple) else [out]) if isinstance(v, Value)]
    operands = {}
    for name, arg in step.args.items():
        value = values(arg) if isinstance(arg, Ref) else None
        keep = survivors.keep(value) if value is not None else {}
        if keep:
            operands[name] = keep
    results = [survivors.keep(value) for value in outputs]
    shapes = tuple(survivors.shape(value) for value in outputs)
    if operands or any(results):
        entry = CUTS.get(step.op)
        if entry:
            entry(CutSite(step, operands, results, shapes))
    return shapes


def _cut_size(name: str) -> Callable[[CutSite], None]:
    def entry(site: CutSite) -> None:
        site.step.args[name] = list(site.shapes[0])

    return entry


def _cut_unflatten(site: CutSite) -> None:
    dim, count = site.step.args["dim"], len(site.step.args["sizes"])
    site.step.args["sizes"] = list(site.shapes[0][dim : dim + count])


def _cut_split(site: CutSite) -> None:
    dim = site.step.args["dim"]
    site.step.args["split_sizes"] = [shape[dim] for shape in site.shapes]


def _cut_slice(site: CutSite) -> None:
    args = site.step.args
    keep = site.operands.get("self", {}).get(args["dim"])
    if keep is None:
        return
    if args["step"] != 1:
        raise site.refuse("takes every other channel of a dim that is cut")
    args["start"], args["end"] = int(keep[: args["start"]].sum()), int(keep[: args["end"]].sum())


def _cut_select(site: CutSite) -> None:
    args = site.step.args
    keep = site.operands.get("self", {}).get(args["dim"])
    if keep is None:
        return
    if not keep[args["index"]]:
        raise site.refuse("reads a position that is removed")
    args["index"] = int(keep[: args["index"]].sum())


def _cut_pad(site: CutSite) -> None:
    widths = list(site.step.args["pad"])
    rank = len(site.shapes[0])
    for dim, keep in site.results[0].items():
        i = 2 * (rank - 1 - dim)
        if i < len(widths) and (widths[i] or widths[i + 1]):
            before, after = widths[i], widths[i + 1]
            if before < 0 or after < 0:
                raise site.refuse("crops a dim that is cut")
            widths[i] = int(keep[:before].sum())
            widths[i + 1] = int(keep[len(keep) - after :].sum())
    site.step.args["pad"] = widths


def _cut_norm_shape(site: CutSite) -> None:
    count = len(site.step.args["normalized_shape"])
    site.step.args["normalized_shape"] = list(site.shapes[0][-count:])


def _cut_group_norm(site: CutSite) -> None:
    keep = site.operands.get("input", {}).get(1)
    if keep is not None:
        site.step.args["num_groups"] = _groups(site, keep, site.step.args["num_groups"])


def _cut_convolution(site: CutSite) -> None:
    groups = site.step.args.get("groups", 1)
    if groups == 1:
        return
    dim = len(site.shapes[0]) - len(_shape(site.step.node, "weight")) + 1
    keep = site.operands.get("input", {}).get(dim)
    if keep is not None:
        site.step.args["groups"] = _groups(site, keep, groups)


def _groups(site: CutSite, keep: Keep, groups: int) -> int:
    counts = keep.reshape(groups, -1).sum(1)
    alive = counts[counts > 0]
    if (alive != alive[0]).any():
        raise site.refuse(f"has groups that keep {counts.tolist()} channels; they must keep equally many")
    return int(alive.size)


def _cut_fixed(*dims_of: str) -> Callable[[CutSite], None]:
    """Entry of an operator that moves positions by number: the dims it moves along must be whole."""

    def entry(site: CutSite) -> None:
        rank = len(_shape(site.step.node, "self"))
        for name in dims_of:
            dims = site.step.args.get(name, 0)
            for dim in dims if isinstance(dims, list) else [dims]:
                if dim % rank in site.operands.get("self", {}):
                    raise site.refuse("moves positions by number along a dim that is cut")

    return entry


CUTS: dict[str, Callable[[CutSite], None]] = {
    "reshape": _cut_size("shape"),
    "expand": _cut_size("size"),
    "broadcast_to": _cut_size("size"),
    "unflatten": _cut_unflatten,
    "split_with_sizes": _cut_split,
    "slice": _cut_slice,
    "select": _cut_select,
    "pad": _cut_pad,
    "constant_pad_nd": _cut_pad,
    "layer_norm": _cut_norm_shape,
    "rms_norm": _cut_norm_shape,
    "group_norm": _cut_group_norm,
    "conv1d": _cut_convolution,
    "conv2d": _cut_convolution,
    "conv3d": _cut_convolution,
    "conv_transpose1d": _cut_convolution,
    "conv_transpose2d": _cut_convolution,
    "conv_transpose3d": _cut_convolution,
    "roll": _cut_fixed("dims"),
    "flip": _cut_fixed("dims"),
    "unbind": _cut_fixed("dim"),
    "cumsum": _cut_fixed("dim"),
}
