"""A captured graph as a flat list of operators with every size written out, and what a cut makes of each.

Sizes that depend on widths are not left to be worked out again: a `chunk` becomes a split at numbers, a
`view` gets the shape of its result, attention its scale. The table of operators says how, and how the numbers
follow a cut.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from secateur.errors import CutError
from secateur.graph.capture import Capture
from secateur.graph.labels import Value
from secateur.graph.operators import OPERATORS, CutSite, Shape, Step, module_of, shapes_of
from secateur.graph.propagate import BODIES, find_checks
from secateur.graph.trace import Survivors
from secateur.rewriting.calls import CALLED, RETURNED
from secateur.rewriting.program import DEVICE, Call, Named, Op, Ref

CALL = "call "
"""How the target of a step begins that is a call of a submodule."""


def is_call(step: Step) -> bool:
    """Whether a step is a call of a submodule."""
    return step.target.startswith(CALL)


def as_op(step: Step) -> Op | Call:
    """A step as a line of a program."""
    if is_call(step):
        kwargs = tuple(step.args["kwargs"].items())
        return Call(step.target.removeprefix(CALL), tuple(step.args["args"]), kwargs)
    if step.target == "getitem":
        return Op("getitem", (step.args["items"], step.args["index"]))
    positional, keywords = [], []
    schema = step.function._schema  # type: ignore[attr-defined]
    for argument in schema.arguments:
        if argument.kwarg_only:
            if argument.name in step.args:
                keywords.append((argument.name, step.args[argument.name]))
        else:
            positional.append(step.args.get(argument.name, argument.default_value))
    while positional and schema.arguments[len(positional) - 1].name not in step.args:
        positional.pop()
    return Op(step.target, tuple(positional), tuple(keywords))


@dataclass(frozen=True)
class Via(Ref):
    """A register as a call of a submodule returned it.

    Attributes:
        of: the reference it was inside of the submodule.
        call: number of the call.
        leaf: which of the tensors that the call returned.
    """

    of: Ref
    call: int
    leaf: int


@dataclass
class CallLine:
    """A call of a submodule in a listing.

    Attributes:
        site: its number among those noted at capture.
        steps: those that run in it.
        reads: what its tensors are.
        returns: what the tensors that it returns are.
    """

    site: int
    steps: range
    reads: list[Any]
    returns: list[Any] = field(default_factory=list)


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
        calls: of submodules, in the order in which they begin; only where they were marked at capture.
    """

    captured: Capture
    inputs: list[fx.Node]
    tensors: list[fx.Node]
    steps: list[Step] = field(default_factory=list)
    nodes: list[fx.Node] = field(default_factory=list)
    output: Any = None
    calls: list[CallLine] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """Names of the tensors."""
        return [self.captured.tensors.get(node.name, node.name) for node in self.tensors]

    def call(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the operator of one step."""
        return self.steps[number].function(*args, **kwargs)


def list_operators(captured: Capture) -> Listing:
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
    checks = find_checks(graph.graph)
    for node in graph.graph.nodes:
        if node.op == "output":
            return _resolve(node.args[0], environment)
        if node.op == "get_attr":
            environment[node] = getattr(graph, str(node.target))
        if node.op != "call_function" or node in checks:
            continue
        if node.target is operator.getitem and isinstance(environment[node.args[0]], list | tuple):
            environment[node] = environment[node.args[0]][node.args[1]]
            continue
        if str(node.target) in (CALLED, RETURNED):
            environment[node] = _mark(node, environment, result)
            continue
        body = next(
            (a for a in map(environment.get, node.all_input_nodes) if isinstance(a, fx.GraphModule)), None
        )
        if body is not None:
            environment[node] = _list_body(node, body, environment, result)
            continue
        environment[node] = Ref(len(result.nodes))
        result.nodes.append(node)
        step = _step(node, environment)
        write = OPERATORS[step.op].constants.write if step.op in OPERATORS else None
        result.steps.append(write(step) if write else step)
    raise AssertionError("a graph without an output")


def _mark(node: fx.Node, environment: Mapping[fx.Node, Any], result: Listing) -> Any:
    tensors = _resolve(node.args[0], environment)
    now = len(result.steps)
    if str(node.target) == CALLED:
        result.calls.append(CallLine(int(str(node.args[1])), range(now, -1), tensors))
        return len(result.calls) - 1
    number = environment[node.args[1]]  # type: ignore[index]
    call = result.calls[number]
    call.steps = range(call.steps.start, now)
    call.returns = tensors
    return [Via(ref.index, ref, number, leaf) for leaf, ref in enumerate(tensors)]


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
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        raise CutError(
            f"{module_of(node) or 'the model'}: its forward computes with a number that it reads from a tensor "
            f"({node.target}); keep it in a tensor"
        )
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


def find_regions(lines: Listing) -> dict[tuple[str, int], list[int]]:
    """(module name, number of the call) -> the steps that run in it."""
    result: dict[tuple[str, int], list[int]] = {}
    for i, step in enumerate(lines.steps):
        for key, (name, _) in (step.node.meta.get("nn_module_stack") or {}).items():
            number = key.rpartition("@")[2] if "@" in key else "0"
            result.setdefault((name, int(number)), []).append(i)
    return result


def find_calls(lines: Listing, model: nn.Module) -> dict[tuple[str, int], list[int]]:
    """The same by the first name of each module, also where it is called under several names."""
    first = {module: name for name, module in model.named_modules()}
    names = {name: first[module] for name, module in model.named_modules(remove_duplicate=False)}
    several = {name for other, name in names.items() if other != name}
    result: dict[tuple[str, int], list[int]] = {}
    found = find_regions(lines)
    for name, number in sorted(found, key=found.__getitem__):
        own = names.get(name, name)
        if own in several:
            count = sum(known == own for known, _ in result)
            result[own, count] = found[name, number]
        else:
            result[name, number] = found[name, number]
    return result


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
        cut = OPERATORS[step.op].constants.cut if step.op in OPERATORS else None
        if cut:
            cut(CutSite(step, operands, results, shapes))
    return shapes
