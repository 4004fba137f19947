"""Modules whose attributes mirror the sizes of their tensors.

After a cut the user's own `forward` runs on the smaller tensors, so the numbers that stock layers keep about
their shapes must follow. `mirrored` is the whole table; `register_pad` adds a class whose attributes are
read by its `forward` to pad channels.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from secateur.errors import CutError, SecateurError
from secateur.settings import checked

Keep = npt.NDArray[np.bool_]

HELD = (
    *("weight", "bias", "running_mean", "in_proj_weight"),
    *("weight_ih", "weight_ih_l0", "weight_hr_l0"),
)
"""Tensors of stock layers whose shapes say what its attributes must be."""

_PADS: dict[type[nn.Module], tuple[str, str]] = {}


@checked(SecateurError)
def register_pad(cls: type[nn.Module], before: str, after: str) -> None:
    """Say that `cls` pads channels with zeros, as many as its two integer attributes tell.

    Without this, padded channels stay as they are. With it, the padded channels of a residual stream can be
    removed like any others, and the attributes are set to what is left.
    """
    _PADS[cls] = (before, after)


def pad_attributes(model: nn.Module, module: str) -> tuple[str, str] | None:
    """The (before, after) attribute names of the module of this name, if its class was registered."""
    try:
        found = model.get_submodule(module)
    except AttributeError:  # a name of the exporter's own making
        return None
    names = _PADS.get(type(found))
    return names if names and all(type(vars(found).get(name)) is int for name in names) else None


def held(module: nn.Module, name: str) -> tuple[str, Tensor] | None:
    """The parameter or buffer of the same shape that a tensor of a layer is worked out from; itself if it is one.

    Weight and spectral normalisation, pruning masks and other parametrisations work a weight out before each call.

    Args:
        module: the layer.
        name: of its tensor, such as "weight".
    Returns:
        its local name and itself; None: the layer has no such tensor.
    """
    if parametrize.is_parametrized(module, name):
        originals: dict[str, Tensor] = {}
        source: nn.Module = module.get_submodule(f"parametrizations.{name}")
        originals |= dict(source.named_parameters(recurse=False)) | dict(source.named_buffers(recurse=False))
        last, tensor = max(originals.items(), key=lambda item: (item[1].ndim, item[1].numel()))
        return f"parametrizations.{name}.{last}", tensor
    own = {local: t for local, t in (*module._parameters.items(), *module._buffers.items()) if t is not None}
    stored = (local for local in (name, f"{name}_orig", f"{name}_v") if local in own)
    found = next(stored, None)
    return (found, own[found]) if found else None


def worked_out(module: nn.Module) -> dict[str, Tensor]:
    """Attribute name -> value, for the tensors of a layer that its hooks work out before each call, as they are now."""
    kinds = (WeightNorm, SpectralNorm, BasePruningMethod)
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, kinds)]
    names = [str(getattr(hook, "name", getattr(hook, "_tensor_name", ""))) for hook in hooks]
    before = {name: module.__dict__[name] for name in names if name in module.__dict__}
    training, module.training = module.training, False  # spectral normalisation learns in training mode
    try:
        for hook in hooks:
            hook(module, ())
        return {name: module.__dict__[name].detach() for name in before}
    finally:
        module.training = training
        module.__dict__.update(before)


def mirrored(module: nn.Module, keep: Mapping[tuple[str, int], Keep]) -> dict[str, int | tuple[int, ...]]:
    """New values of the attributes of a stock layer whose tensors are cut.

    Args:
        module: a layer with its tensors still whole.
        keep: (own tensor name, as its forward reads it, dim) -> mask over the positions of that dim, for cut dims only.
    Returns:
        attribute name -> new value; empty for modules that keep no such numbers.
    Raises:
        CutError: the survivors of a grouped convolution are not equally many in every group.
    """

    tensors = {name: found[1] for name in HELD if (found := held(module, name))}

    def size(name: str, dim: int) -> int:
        return tensors[name].shape[dim]

    def width(name: str, dim: int) -> int:
        return int(keep[name, dim].sum()) if (name, dim) in keep else size(name, dim)

    if isinstance(module, _ConvTransposeNd):
        read = width("weight", 0)
        groups = read if module.groups == module.in_channels else module.groups
        return {"in_channels": read, "out_channels": width("weight", 1) * groups, "groups": groups}
    if isinstance(module, _ConvNd) or _is_convolution(module):
        whole = np.ones(size("weight", 0), dtype=bool)
        out = keep.get(("weight", 0), whole).reshape(vars(module)["groups"], -1).sum(1)
        alive = out[out > 0]
        if alive.size == 0 or (alive != alive[0]).any():
            raise CutError(
                f"grouped convolution: its groups keep {out.tolist()} channels; they must keep equally many"
            )
        return {
            "out_channels": int(out.sum()),
            "in_channels": int(alive.size) * width("weight", 1),
            "groups": int(alive.size),
        }
    if isinstance(module, nn.Linear):
        return {"out_features": width("weight", 0), "in_features": width("weight", 1)}
    if isinstance(module, _NormBase):
        for name in ("weight", "running_mean"):
            if name in tensors:
                return {"num_features": width(name, 0)}
    if isinstance(module, nn.GroupNorm):
        whole = np.ones(module.num_channels, dtype=bool)
        kept = keep.get(("weight", 0), whole).reshape(module.num_groups, -1).sum(1)
        return {"num_channels": int(kept.sum()), "num_groups": int((kept > 0).sum())}
    shape = getattr(module, "normalized_shape", None)
    if isinstance(shape, tuple) and "weight" in tensors:  # LayerNorm and its kin
        return {"normalized_shape": tuple(width("weight", dim) for dim in range(len(shape)))}
    if isinstance(module, nn.Embedding):
        return {"num_embeddings": width("weight", 0), "embedding_dim": width("weight", 1)}
    if isinstance(module, nn.MultiheadAttention):
        return _attention(module, keep)
    if isinstance(module, nn.RNNBase):
        gates = size("weight_ih_l0", 0) // module.hidden_size
        projected = width("weight_hr_l0", 0) if module.proj_size else 0
        return {
            "input_size": width("weight_ih_l0", 1),
            "hidden_size": width("weight_ih_l0", 0) // gates,
            "proj_size": projected,
        }
    if isinstance(module, nn.RNNCellBase):
        gates = size("weight_ih", 0) // module.hidden_size
        return {"input_size": width("weight_ih", 1), "hidden_size": width("weight_ih", 0) // gates}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": width("weight", 0)}
    return {}


def _is_convolution(module: nn.Module) -> bool:
    """Whether a layer of another library, such as a deformable convolution, keeps the numbers of a convolution."""
    weight = (held(module, "weight") or ("", None))[1]
    out, into, groups = (vars(module).get(name) for name in ("out_channels", "in_channels", "groups"))
    if not isinstance(weight, Tensor) or weight.ndim < 3 or type(groups) is not int or groups < 1:
        return False
    return out == weight.shape[0] and into == weight.shape[1] * groups


def _attention(
    module: nn.MultiheadAttention, keep: Mapping[tuple[str, int], Keep]
) -> dict[str, int | tuple[int, ...]]:
    """Whole heads that go can be expressed where the embedding shrinks to the width of those left."""
    if module.in_proj_weight is None:
        return {}
    embedding = keep.get(("in_proj_weight", 1), np.ones(module.embed_dim, dtype=bool))
    rows = keep.get(("in_proj_weight", 0), np.ones(3 * module.embed_dim, dtype=bool))
    kept = rows.reshape(3, module.num_heads, -1)
    heads = int(kept.any(axis=(0, 2)).sum())
    if int(kept[0].sum()) != int(embedding.sum()):
        return {}
    width = int(embedding.sum())
    return {
        "embed_dim": width,
        "kdim": width,
        "vdim": width,
        "num_heads": heads,
        "head_dim": width // heads,
    }


def resized(module: nn.Module, sizes: Mapping[tuple[str, int], int], new_groups: int = 0) -> dict[str, int]:
    """New values of the attributes of a stock layer whose tensors grow.

    Args:
        module: a layer with its tensors still as they were.
        sizes: (own tensor name, dim) -> new size, for dims that grow only.
        new_groups: groups that a grouped convolution gains.
    Returns:
        attribute name -> new value.
    Raises:
        CutError: not a stock layer: what its attributes must become is unknown.
    """

    def width(name: str, dim: int) -> int:
        return sizes.get((name, dim), getattr(module, name).shape[dim])

    if isinstance(module, _ConvTransposeNd) and module.groups == 1:
        return {"in_channels": width("weight", 0), "out_channels": width("weight", 1)}
    if isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd):
        groups = module.groups + new_groups
        return {
            "out_channels": width("weight", 0),
            "in_channels": width("weight", 1) * groups,
            "groups": groups,
        }
    if isinstance(module, nn.Linear):
        return {"out_features": width("weight", 0), "in_features": width("weight", 1)}
    if isinstance(module, _NormBase):
        for name in ("weight", "running_mean"):
            if isinstance(getattr(module, name, None), Tensor):
                return {"num_features": width(name, 0)}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": width("weight", 0)}
    raise CutError(
        f"{type(module).__name__} cannot be widened: only stock convolutions, linear layers, batch norms and PReLU "
        f"can. Freeze it, or allow no growth (cap=1)."
    )
