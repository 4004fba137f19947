"""Pruned models on disk: tensors and the recipe of their shapes, no pickle and no code.

A tensor with many zeros is stored as its other values and one bit per place.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur import __version__
from secateur.errors import FileError
from secateur.files import read_tensors, write_tensors
from secateur.graph import mirrored, named_tensors
from secateur.graph.modules import pad_attributes
from secateur.surgery.bits import pack, unpack
from secateur.surgery.edit import Edit

FORMAT = "1"
_VALUES, _PLACES = ":values", ":places"
_OVERHEAD = 200  # bytes that one more tensor takes in the header of the file


def save(model: nn.Module, path: str | Path) -> None:
    """Write a model, cut, masked or neither, as one safetensors file that `load` can rebuild bit for bit.

    Parameters and buffers are the tensors, without their zeros where that is smaller; the integer attributes
    of layers that follow their shapes are text in the metadata.

    Args:
        model: any module; it is only read.
        path: the file; its folder must exist. Written to a temporary name, then renamed.
    Raises:
        FileError: it cannot be written; a file of that name stays as it was.
    """
    recipe = {
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "attributes": shape_attributes(model),
    }
    stored: dict[str, Tensor] = {}
    sparse: dict[str, list[int]] = {}
    for name, tensor in named_tensors(model):
        places = filled(tensor)
        if places is None:
            stored[name] = tensor
            continue
        sparse[name] = list(tensor.shape)
        stored[name + _VALUES] = tensor.detach()[places]
        stored[name + _PLACES] = pack(places.cpu())
    if sparse:
        recipe["sparse"] = sparse
    metadata = {"secateur": __version__, "format": FORMAT, "recipe": json.dumps(recipe)}
    write_tensors(path, stored, metadata)


def filled(tensor: Tensor) -> Tensor | None:
    """Which places are not zero, as bool of its shape; None if storing all of it takes less room.

    A negative zero counts as a value, so that nothing is lost.
    """
    if not tensor.is_floating_point() or not tensor.ndim:
        return None
    places = tensor.detach().ne(0) | tensor.detach().signbit()
    saved = (tensor.numel() - int(places.sum())) * tensor.element_size()
    return places if saved > tensor.numel() / 8 + _OVERHEAD else None


def load(model: nn.Module, path: str | Path) -> nn.Module:
    """Turn a freshly made original model into the saved one, bit for bit.

    Args:
        model: made by the same constructor as the model that was saved, before it was cut; changed in place.
        path: a file written by `save`.
    Returns:
        the model.
    Raises:
        FileError: the file is missing, truncated or hostile, or does not fit; the message says what differs
            and the model is unchanged.
    """
    tensors, metadata = read_tensors(path)
    recipe, sparse = _recipe(path, metadata)
    own = dict(named_tensors(model))
    tensors = _densified(path, tensors, sparse, own)
    problems = [f"{name} is missing" for name in own if name not in tensors]
    problems += [f"{name} is unknown to the model" for name in tensors if name not in own]
    for name in own.keys() & tensors.keys():
        here, there = own[name], tensors[name]
        if here.ndim != there.ndim or any(a < b for a, b in zip(here.shape, there.shape, strict=True)):
            problems.append(
                f"{name} has shape {tuple(there.shape)}, the model's {tuple(here.shape)} cannot shrink to it"
            )
        elif here.dtype != there.dtype:
            problems.append(f"{name} is {there.dtype}, the model's is {here.dtype}")
    allowed = shape_attributes(model)
    for module, values in recipe.items():
        for attribute, value in values.items():
            most = allowed.get(module, {}).get(attribute)
            if most is None:
                problems.append(f"attribute {module}.{attribute} is not one that follows a shape")
            elif type(value) is not int or not 0 <= value <= most:
                problems.append(f"attribute {module}.{attribute} is {value!r}, expected a number in 0…{most}")
    if problems:
        raise _misfit(path, model, problems)
    edit = Edit(model)
    edit.attributes(recipe)
    for name, tensor in {id(t): (n, t) for n, t in own.items()}.values():
        edit.tensor(tensor, tensors[name].clone().to(tensor.device))  # aligned memory of its own
    edit.apply()
    wrong = [name for name, values in shape_attributes(model).items() if recipe.get(name, {}) != values]
    if wrong:
        edit.undo()
        raise _misfit(path, model, [f"attributes of {name} contradict its tensors" for name in wrong])
    return model


def shape_attributes(model: nn.Module) -> dict[str, dict[str, int]]:
    """Module name -> attributes that follow shapes, as they are now."""
    found = {}
    for name, module in model.named_modules():
        values = mirrored(module, {})
        pads = pad_attributes(model, name)
        if pads:
            values = {attribute: getattr(module, attribute) for attribute in pads}
        if values:
            found[name] = values
    return found


def _recipe(path: str | Path, metadata: dict[str, str]) -> tuple[dict[str, dict[str, int]], dict[str, Any]]:
    """Attributes by module, and shapes of the tensors that are stored without their zeros."""
    if metadata.get("format") != FORMAT or "recipe" not in metadata:
        raise FileError(
            f"{path}: not a model saved by Secateur (format {metadata.get('format')!r}, expected {FORMAT!r}). "
            f"For ordinary weights, load them into the uncut model."
        )
    try:
        recipe = json.loads(metadata["recipe"])
        attributes, sparse = recipe["attributes"], recipe.get("sparse", {})
        if not isinstance(attributes, dict) or not all(isinstance(v, dict) for v in attributes.values()):
            raise TypeError("attributes must be an object of objects")
        if not isinstance(sparse, dict):
            raise TypeError("sparse must be an object")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FileError(f"{path}: its recipe is damaged ({error!r}); use another copy") from None
    return attributes, sparse


def _densified(
    path: str | Path, tensors: dict[str, Tensor], sparse: dict[str, Any], own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """All tensors with their zeros; none becomes larger than the model's own."""
    whole = dict(tensors)
    for name, shape in sparse.items():
        try:
            values, packed = whole.pop(name + _VALUES), whole.pop(name + _PLACES)
            limit = own[name].shape
            if len(shape) != len(limit) or any(
                type(n) is not int or not 0 <= n <= most for n, most in zip(shape, limit, strict=True)
            ):
                raise ValueError(f"shape {shape}, the model's is {tuple(limit)}")
            places = unpack(packed, tuple(shape))
            if values.shape != (int(places.sum()),):
                raise ValueError(f"{values.numel()} values for {int(places.sum())} places")
        except (KeyError, ValueError, TypeError) as error:
            raise FileError(
                f"{path}: tensor {name!r} is damaged or does not fit ({error!r}); use another copy"
            ) from None
        whole[name] = torch.zeros(places.shape, dtype=values.dtype).masked_scatter_(places, values)
    return whole


def _misfit(path: str | Path, model: nn.Module, problems: list[str]) -> FileError:
    more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
    return FileError(
        f"{path} does not fit {type(model).__name__}: {'; '.join(problems[:5])}{more}. Make the model with the "
        f"constructor and arguments it had before it was cut. The model is unchanged."
    )
