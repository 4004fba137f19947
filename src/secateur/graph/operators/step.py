"""One operator of a captured graph on its own: its numbers before and after a cut, its result over survivors."""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from secateur.errors import CutError
from secateur.graph.modules import Keep
from secateur.graph.operators.site import module_of, short_name

Shape = tuple[int, ...]


@dataclass
class Step:
    """One operator.

    Attributes:
        node: where it stands in the captured graph.
        target: name such as "aten.relu.default", or "getitem".
        args: argument name -> literal, with a reference in place of each tensor; those at their default are left out.
        shapes: of its results.
    """

    node: fx.Node
    target: str
    args: dict[str, Any]
    shapes: tuple[Shape, ...]

    @property
    def op(self) -> str:
        """Name in the table of operators, such as "view"."""
        return short_name(self.target.rpartition(".")[0] or self.target)

    @property
    def module(self) -> str:
        """Name of the module in whose forward it runs."""
        return module_of(self.node)

    @property
    def function(self) -> Callable[..., Any]:
        """What it calls; any operator of a captured graph, whether or not a saved program may call it."""
        if self.target == "getitem":
            return operator.getitem
        if str(self.node.target) == self.target:
            return self.node.target  # type: ignore[return-value]
        name, overload = self.target.removeprefix("aten.").split(".")
        return getattr(getattr(torch.ops.aten, name), overload)  # type: ignore[no-any-return]

    def default(self, name: str) -> Any:
        """What an argument is where it is left out."""
        schema = getattr(self.function, "_schema", None)
        return next((a.default_value for a in (schema.arguments if schema else ()) if a.name == name), None)

    def shape_of(self, name: str) -> Shape:
        """The shape that the tensor of this argument had at capture."""
        names = [argument.name for argument in self.node.target._schema.arguments]  # type: ignore[union-attr]
        given = dict(zip(names, self.node.args, strict=False)) | dict(self.node.kwargs)
        return tuple(given[name].meta["val"].shape)


def with_shape(name: str) -> Callable[[Step], Step]:
    """Writes the shape of the result out in an argument."""

    def write(step: Step) -> Step:
        step.args[name] = list(step.shapes[0])
        return step

    return write


def as_target(target: str) -> Callable[[Step], Step]:
    """Writes the step as another operator that takes the same arguments."""
    return lambda step: Step(step.node, target, step.args, step.shapes)


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


def cut_shape(name: str) -> Callable[[CutSite], None]:
    """Sets an argument to the shape of the result."""

    def cut(site: CutSite) -> None:
        site.step.args[name] = list(site.shapes[0])

    return cut


def cut_groups(operand: str, argument: str, dim: Callable[[CutSite], int]) -> Callable[[CutSite], None]:
    """Sets a number of groups along the channels of an operand to how many groups keep any."""

    def cut(site: CutSite) -> None:
        groups = site.step.args.get(argument, 1)
        keep = site.operands.get(operand, {}).get(dim(site))
        if groups > 1 and keep is not None:
            counts = keep.reshape(groups, -1).sum(1)
            alive = counts[counts > 0]
            if (alive != alive[0]).any():
                raise CutError(
                    f"{site.step.module}: {site.step.op} has groups that keep {counts.tolist()} channels; they must "
                    f"keep equally many"
                )
            site.step.args[argument] = int(alive.size)

    return cut


@dataclass
class LiveSite:
    """One operator, at run time, whose tensors lose positions.

    Attributes:
        args: by name.
        alive: argument name -> mask; of lists "name.number".
        touched: set where the removed positions would have mattered.
    """

    step: Step
    args: dict[str, Any]
    alive: dict[str, Tensor]
    touched: bool = False

    def call(self, /, **changed: Any) -> Any:
        """The operator with some arguments replaced."""
        return self.step.function(**self.args | changed)

    def mask(self, name: str) -> Tensor | None:
        """Over the whole tensor, True where it is left; None if nothing is removed."""
        alive = self.alive.get(name)
        tensor = self.args[name.partition(".")[0]]
        if "." in name:
            tensor = tensor[int(name.partition(".")[2])]
        return None if alive is None else alive.to(tensor.device).expand(tensor.shape)

    def reduced(self, rank: int) -> list[int]:
        """The dims, of a tensor of this rank, that the operator reduces."""
        dims = self.args.get("dim")
        if dims is None or dims == []:
            return list(range(rank))
        return [dim % rank for dim in (dims if isinstance(dims, list | tuple) else [dims])]


def moments(x: Tensor, mask: Tensor, dims: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and mean squared deviation over the survivors along some dims (kept at size 1), and their count."""
    count = mask.sum(list(dims), keepdim=True)
    mean = torch.where(mask, x, 0).sum(list(dims), keepdim=True) / count.clamp(min=1)
    spread = torch.where(mask, x - mean, 0).square().sum(list(dims), keepdim=True) / count.clamp(min=1)
    return mean, spread, count


def varies(mask: Tensor | None, dims: Sequence[int]) -> bool:
    """Whether anything is removed along these dims."""
    if mask is None:
        return False
    return any(bool((mask != mask.narrow(dim, 0, 1)).any()) for dim in dims)


def scaled(x: Tensor, mask: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Times weight, plus bias, and zero where removed."""
    x = x if weight is None else x * weight
    x = x if bias is None else x + bias
    return torch.where(mask, x, 0)


def without_removed(value: float) -> Callable[[LiveSite], Any]:
    """A reduction of `self` in which removed positions count as this value, which changes nothing."""

    def reduce(site: LiveSite) -> Any:
        x, mask = site.args["self"], site.mask("self")
        if mask is None or not varies(mask, site.reduced(x.ndim)):
            return site.call()
        site.touched = True
        return site.call(self=torch.where(mask, x, value))

    return reduce
