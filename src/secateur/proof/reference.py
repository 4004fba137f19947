"""The original network without the removed units, at its full width: what a cut must equal.

The captured graph is run on the masked weights. Where a statistic is taken over positions of which some are
removed (normalisation, softmax, means, extremes), only the survivors enter it; where a product sums over
them, the removed ones count as zero. Everywhere else the graph runs as it is: zeros alone must do.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.graph.labels import Value
from secateur.graph.trace import Survivors, Trace
from secateur.rewriting.listing import Step, listing
from secateur.rewriting.program import Ref
from secateur.rewriting.rewrite import fixed_program, tensors_of


class Reference:
    """The forward pass of the original in evaluation mode, with statistics over the survivors of a plan.

    Attributes:
        sites: "module (operator)" wherever zeros alone would have given something else; known after a run.
    """

    def __init__(self, trace: Trace, survivors: Survivors) -> None:
        self._lines = listing(trace.captured)
        self._program = fixed_program(self._lines)
        self._trace = trace
        self._survivors = survivors
        self.sites: dict[str, None] = {}

    @property
    def needed(self) -> bool:
        """Whether any operator might take a statistic over removed positions."""
        return any(step.op in RULES and self._alive(step) for step in self._lines.steps)

    def run(self, inputs: Any, named: Mapping[str, Tensor]) -> Any:
        """The output for the leaves of the example inputs and masked tensors by name."""
        leaves = [x.clone() if isinstance(x, Tensor) else x for x in pytree.tree_leaves(inputs)]
        named = {name: t if isinstance(t, nn.Parameter) else t.clone() for name, t in named.items()}
        with torch.no_grad():
            return self._program.run(leaves, tensors_of(self._lines, named), around=self._around)

    def _around(self, number: int, args: Sequence[Any], kwargs: Any) -> Any:
        step = self._lines.steps[number]
        rule = RULES.get(step.op)
        alive = self._alive(step) if rule else {}
        if rule is None or not alive:
            return step.function(*args, **kwargs)
        names = [argument.name for argument in step.function._schema.arguments]  # type: ignore[attr-defined]
        site = Site(step, dict(zip(names, args, strict=False)) | kwargs, alive)
        result = rule(site)
        if site.touched:
            self.sites[f"{step.module or 'forward'} ({step.op})"] = None
        return result

    def _alive(self, step: Step) -> dict[str, Tensor]:
        """Argument name -> mask that broadcasts over the tensor, for those that lose positions."""
        result = {}
        for name, arg in step.args.items():
            for i, ref in enumerate(arg if isinstance(arg, list) else [arg]):
                value = self._trace.values.get(self._lines.nodes[ref.index]) if isinstance(ref, Ref) else None
                keep = self._survivors.keep(value) if isinstance(value, Value) else {}
                if isinstance(value, Value) and keep:
                    mask = torch.ones([1] * len(value.shape), dtype=torch.bool)
                    for dim, line in keep.items():
                        mask = mask & torch.from_numpy(line).reshape(
                            [-1 if d == dim else 1 for d in range(len(value.shape))]
                        )
                    result[f"{name}.{i}" if isinstance(arg, list) else name] = mask
        return result


@dataclass
class Site:
    """One operator whose tensors lose positions.

    Attributes:
        args: by name.
        alive: argument name -> mask; of lists "name.number".
        touched: set by a rule when the removed positions would have mattered.
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


Rule = Callable[[Site], Any]
RULES: dict[str, Rule] = {}


def rule(*ops: str) -> Callable[[Rule], Rule]:
    """Enter a rule under each operator name."""

    def enter(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(ops, function))
        return function

    return enter


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


@rule("layer_norm", "rms_norm")
def over_last_dims(site: Site) -> Any:
    x, mask = site.args["input"], site.mask("input")
    dims = list(range(x.ndim - len(site.args["normalized_shape"]), x.ndim))
    if mask is None or not varies(mask, dims):
        return site.call()
    site.touched = True
    eps = site.args.get("eps")
    if site.step.op == "rms_norm":
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        mean, spread = torch.zeros_like(x), moments(x.square(), mask, dims)[0]
    else:
        mean, spread, _ = moments(x, mask, dims)
        eps = 1e-5 if eps is None else eps
    return scaled((x - mean) * (spread + eps).rsqrt(), mask, site.args.get("weight"), site.args.get("bias"))


@rule("group_norm")
def over_groups(site: Site) -> Any:
    x, mask = site.args["input"], site.mask("input")
    if mask is None:
        return site.call()
    site.touched = True
    shape = (x.shape[0], site.args["num_groups"], -1)
    mean, spread, _ = moments(x.reshape(shape), mask.reshape(shape), [2])
    eps = site.args.get("eps", 1e-5)
    normal = ((x.reshape(shape) - mean) * (spread + eps).rsqrt()).reshape(x.shape)
    channel = [1, -1] + [1] * (x.ndim - 2)
    weight, bias = (
        None if site.args.get(name) is None else site.args[name].reshape(channel)
        for name in ("weight", "bias")
    )
    return scaled(normal, mask, weight, bias)


@rule("batch_norm", "instance_norm")
def over_images(site: Site) -> Any:
    """With statistics of the input, such as standardised weights, which are normalised like an image."""
    x, mask = site.args["input"], site.mask("input")
    per_image = site.step.op == "instance_norm"
    dims = list(range(2, x.ndim)) if per_image else [0, *range(2, x.ndim)]
    own = site.args["use_input_stats" if per_image else "training"]
    if mask is None or not own or not varies(mask, dims):
        return site.call()
    site.touched = True
    mean, spread, _ = moments(x, mask, dims)
    channel = [1, -1] + [1] * (x.ndim - 2)
    weight, bias = (
        None if site.args.get(name) is None else site.args[name].reshape(channel)
        for name in ("weight", "bias")
    )
    return scaled((x - mean) * (spread + site.args["eps"]).rsqrt(), mask, weight, bias)


@rule("softmax", "log_softmax", "_softmax", "_log_softmax")
def over_scores(site: Site) -> Any:
    x, mask = site.args["self"], site.mask("self")
    if mask is None or not varies(mask, [site.args["dim"] % x.ndim]):
        return site.call()
    site.touched = True
    result = site.call(self=torch.where(mask, x, float("-inf")))
    return torch.where(mask, result, 0)


@rule("mean", "var", "std", "var_mean", "std_mean")
def average(site: Site) -> Any:
    x, mask = site.args["self"], site.mask("self")
    dims = reduced(site, x)
    if mask is None or not varies(mask, dims):
        return site.call()
    site.touched = True
    mean, spread, count = moments(x, mask, dims)
    correction = site.args.get("correction", 1)
    if site.args.get("unbiased") is not None:
        correction = int(site.args["unbiased"])
    spread = spread * count / (count - (1 if correction is None else correction)).clamp(min=1)
    spread = spread.sqrt() if site.step.op.startswith("std") else spread
    mean, spread = (t if site.args.get("keepdim") else t.squeeze(tuple(dims)) for t in (mean, spread))
    if site.step.op == "mean":
        return mean
    return (spread, mean) if site.step.op.endswith("_mean") else spread


@rule("amax", "max", "argmax")
def largest(site: Site) -> Any:
    return extreme(site, float("-inf"))


@rule("amin", "min", "argmin")
def smallest(site: Site) -> Any:
    return extreme(site, float("inf"))


def extreme(site: Site, never: float) -> Any:
    x, mask = site.args["self"], site.mask("self")
    if mask is None or not varies(mask, reduced(site, x)):
        return site.call()
    site.touched = True
    return site.call(self=torch.where(mask, x, never))


def reduced(site: Site, x: Tensor) -> list[int]:
    """The dims that an operator reduces."""
    dims = site.args.get("dim")
    if dims is None or dims == []:
        return list(range(x.ndim))
    return [dim % x.ndim for dim in (dims if isinstance(dims, list | tuple) else [dims])]


@rule(
    *"sum linalg_vector_norm norm matmul mm bmm addmm baddbmm einsum scaled_dot_product_attention".split(),
    *"linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d".split(),
)
def total(site: Site) -> Any:
    """Sums and products: removed positions count as zero."""
    changed: dict[str, Any] = {}
    for key in site.alive:
        name, _, number = key.partition(".")
        mask = site.mask(key)
        assert mask is not None
        tensor = site.args[name][int(number)] if number else site.args[name]
        zeroed = torch.where(mask, tensor, 0)
        if not torch.equal(zeroed, tensor):
            site.touched = site.touched or bool(varies_where_read(site, key, mask))
        if number:
            changed.setdefault(name, list(site.args[name]))[int(number)] = zeroed
        else:
            changed[name] = zeroed
    keys = site.mask("key") if "key" in site.alive else None
    if keys is not None and varies(keys, [keys.ndim - 2]):  # removed keys get no attention
        site.touched = True
        alive = keys.any(-1).unsqueeze(-2)
        scores = site.args.get("attn_mask")
        if scores is None or scores.dtype == torch.bool:
            changed["attn_mask"] = alive if scores is None else alive & scores
        else:
            changed["attn_mask"] = torch.where(alive, scores, float("-inf"))
    return site.call(**changed)


READ = {
    "self": -1,
    "mat2": -2,
    "other": -2,
    "mat1": -1,
    "batch1": -1,
    "batch2": -2,
    "query": -1,
    "key": -1,
    "value": -2,
}
"""Operand of a product -> the dim that it sums over."""


def varies_where_read(site: Site, key: str, mask: Tensor) -> bool:
    """Whether removed positions of an operand enter results that stay.

    In a linear layer or a convolution they meet weights that are zero.
    """
    op = site.step.op
    if op == "linear" or op.startswith("conv"):
        return False
    if op in ("sum", "linalg_vector_norm", "norm"):
        return varies(mask, reduced(site, mask))
    if op == "einsum":
        return True
    return key in READ and varies(mask, [mask.ndim + READ[key] if mask.ndim > 1 else 0])
