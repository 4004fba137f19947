"""Walk a captured graph once and let every operator's rule label its outputs."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx, nn

from secateur.errors import CaptureError
from secateur.graph.capture import Capture
from secateur.graph.labels import Labels, Value
from secateur.graph.modules import pad_attributes
from secateur.graph.operators import Site, label, module_of, shapes_of
from secateur.graph.operators.site import flatten, is_index

BODIES = ("wrap_with_autocast", "wrap_with_set_grad_enabled")
"""Higher-order operators that run a body once on their operands, whatever else they set."""


def propagate(
    model: nn.Module, captured: Capture, labels: Labels, names: Mapping[str, str]
) -> dict[fx.Node, Any]:
    """Add everything the graph says about `model` to `labels`; `names` maps tied tensors to one name.

    Returns:
        what every node holds: a labelled value, or a tuple of them.
    """
    values: dict[fx.Node, Any] = {}
    inputs, given, per_image = [], set(captured.inputs), captured.per_image
    labels.images = captured.batch
    for node in captured.module.graph.find_nodes(op="placeholder"):
        shape = shapes_of(node)[0] if shapes_of(node) else ()
        name = names.get(captured.tensors.get(node.name, ""))
        inputs.append(Value(shape, tensor=name, data=node in given, per_image=per_image.get(node, 0.0)))
    outputs = walk(model, captured.module, inputs, labels, values)
    labels.module = ""
    for value in flatten([outputs]):
        if isinstance(value, Value):
            for factor in labels.exposed(value).factors:
                labels.pin(factor, "read by what is not captured" if captured.borders else "model output")
    return values


def walk(
    model: nn.Module,
    graph: fx.GraphModule,
    inputs: Sequence[Any],
    labels: Labels,
    values: dict[fx.Node, Any],
    *,
    outermost: bool = True,
) -> Any:
    """Run a graph on labelled values, which `values` records; returns what its output node holds."""
    remaining = iter(inputs)
    checks = find_checks(graph.graph)
    for node in graph.graph.nodes:
        labels.module = module_of(node) or labels.module
        labels.node = node.name if outermost else labels.node
        if node.op == "placeholder":
            values[node] = next(remaining)
        elif node.op == "get_attr":  # a constant, or the body of a higher-order operator
            attribute = getattr(graph, str(node.target))
            values[node] = (
                attribute if isinstance(attribute, fx.GraphModule) else Value(tuple(attribute.shape))
            )
        elif node.op == "call_function" and node not in checks:
            values[node] = call(model, node, values, labels)
        elif node.op == "output":
            return resolve(node.args, values)[0]
    raise AssertionError("a graph without an output")


def find_checks(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that only ask whether tensors hold what forward expects: assertions, and what these read."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        schema = getattr(node.target, "_schema", None)
        idle = node.op == "call_function" and not (schema and schema.is_mutable)
        if idle and ("_assert" in str(node.target) or (node.users and found.issuperset(node.users))):
            found.add(node)
    return found


def call(model: nn.Module, node: fx.Node, values: dict[fx.Node, Any], labels: Labels) -> Any:
    args, kwargs = resolve(node.args, values), resolve(node.kwargs, values)
    if node.target is operator.getitem:
        return args[0][args[1]]
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return call_higher_order(model, node, args, labels, values)
    bound = {argument.name: argument.default_value for argument in schema.arguments}
    bound |= dict(zip(bound, args, strict=False)) | kwargs
    op = str(node.target).rpartition(".")[0]
    site = Site(op, bound, shapes_of(node), labels, pad_attributes(model, labels.module), is_index(node))
    result = label(site)
    if isinstance(node.meta.get("val"), list | tuple) or not isinstance(result, tuple):
        return result
    return result[0] if result else Value(())


def call_higher_order(
    model: nn.Module, node: fx.Node, args: Any, labels: Labels, values: dict[fx.Node, Any]
) -> Any:
    """Walk the body of an operator such as an autocast region; freeze what any other one reads."""
    name = str(node.target)
    body = next((i for i, arg in enumerate(args) if isinstance(arg, fx.GraphModule)), None)
    if name in BODIES and body is not None:
        return walk(model, args[body], args[body + 1 :], labels, values, outermost=False)
    if body is not None:
        raise CaptureError(
            f"{labels.module or type(model).__name__}: its forward contains {name}, whose body cannot be counted. "
            f"Replace it by ordinary operators."
        )
    operands = {str(index): value for index, value in enumerate(flatten(list(args)))}
    return label(Site(name, operands, shapes_of(node), labels))


def resolve(args: Any, values: dict[fx.Node, Any]) -> Any:
    return fx.node.map_arg(args, values.__getitem__)
