"""Walk a captured graph once and let every operator's rule label its outputs."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn

from secateur.graph.capture import Capture
from secateur.graph.labels import Labels, Value
from secateur.graph.modules import pad_attributes
from secateur.graph.rules import RULES, Result, Site, flatten, without_rule


def propagate(model: nn.Module, captured: Capture, labels: Labels, names: Mapping[str, str]) -> None:
    """Add everything the graph says about `model` to `labels`; `names` maps tied tensors to one name."""
    values: dict[fx.Node, Any] = {}
    for node in captured.nodes:
        labels.module = module_of(node)
        if node.op == "placeholder":
            shape = shapes_of(node)[0] if shapes_of(node) else ()
            values[node] = Value(shape, tensor=names.get(captured.tensors.get(node.name, "")))
        elif node.op == "call_function":
            values[node] = call(model, node, values, labels)
        elif node.op == "output":
            for value in flatten(list(resolve(node.args, values))):
                if isinstance(value, Value):
                    for factor in labels.exposed(value).factors:
                        labels.pin(factor, "model output")


def call(model: nn.Module, node: fx.Node, values: dict[fx.Node, Any], labels: Labels) -> Result:
    args = resolve(node.args, values)
    if node.name.startswith("getitem") and not hasattr(node.target, "_schema"):
        result: Result = args[0][args[1]]
        return result
    names = [argument.name for argument in getattr(getattr(node.target, "_schema", None), "arguments", [])]
    if names:
        op = str(node.target).rsplit(".", 1)[0]
        bound = {argument.name: argument.default_value for argument in node.target._schema.arguments}  # type: ignore[union-attr]
        bound |= dict(zip(names, args, strict=False)) | resolve(node.kwargs, values)
    else:  # a higher-order operator, such as an autocast region
        op = node.name
        bound = {str(index): value for index, value in enumerate(flatten(list(args)))}
    several = isinstance(node.meta.get("val"), list | tuple)
    attributes = pad_attributes(model, labels.module)
    site = Site(op, bound, shapes_of(node), labels, attributes)
    result = RULES.get(op, without_rule)(site)
    if several or not isinstance(result, tuple):
        return result
    return result[0] if result else Value(())


def resolve(args: Any, values: dict[fx.Node, Any]) -> Any:
    return fx.node.map_arg(args, values.__getitem__)


def shapes_of(node: fx.Node) -> tuple[tuple[int, ...], ...]:
    value = node.meta.get("val")
    parts = value if isinstance(value, list | tuple) else [value]
    return tuple(tuple(part.shape) for part in parts if isinstance(part, Tensor))


def module_of(node: fx.Node) -> str:
    """Name of the innermost module in whose forward the operator ran."""
    stack = node.meta.get("nn_module_stack")
    return str(list(stack.values())[-1][0]) if stack else ""
