"""Pruned models on disk: tensors and the recipe of their shapes, no pickle and no code.

A tensor with many zeros is stored as its other values and one bit per place.
"""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur import __version__
from secateur.errors import FileError, ModelError
from secateur.files import read_tensors, write_tensors
from secateur.graph import mirrored, named_tensors
from secateur.graph.guard import uncompiled
from secateur.graph.modules import pad_attributes
from secateur.plan.bits import pack, unpack
from secateur.rewriting.known import known_attributes
from secateur.rewriting.program import LONGEST, Call, Program
from secateur.rewriting.program_json import ProgramReader, to_json
from secateur.rewriting.rewrite import (
    CONSTANT,
    original_class,
    other_forwards,
    rewrite_,
    rewritten_modules,
)
from secateur.settings import checked
from secateur.surgery.absent import Absent, replace_
from secateur.surgery.bypass import SIDES, Bypass, add_bypass_, remove_bypass_
from secateur.surgery.cut import renew_
from secateur.surgery.edit import Edit
from secateur.surgery.part import Part, add_parts_, remove_parts_

FORMAT = "1"
MOST_OTHERS = 8
"""Most programs that a module may have for calls with other arguments."""
_VALUES, _PLACES = ":values", ":places"
_OVERHEAD = 200  # bytes that one more tensor takes in the header of the file


@uncompiled
@checked(FileError)
def save(model: nn.Module, path: str | Path) -> None:
    """Write a model, cut, masked or neither, as one safetensors file that `load` can rebuild bit for bit.

    Parameters and buffers are the tensors, without their zeros where that is smaller; the integer attributes
    of layers that follow their shapes, and the operators of modules that were rewritten, are text in the
    metadata.

    Args:
        model: any module; it is only read.
        path: the file; its folder must exist. Written to a temporary name, then renamed.
    Raises:
        FileError: it cannot be written; a file of that name stays as it was.
    """
    recipe = {
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "attributes": shape_attributes(model),
        "rewritten": {
            name: {
                **{"program": to_json(module.program), "lost": module.lost, "tied": module.tied},
                "others": [to_json(program) for program in module.others],
                "stands_in": module.stands_in,
            }
            for name, module in rewritten_modules(model).items()
        },
        "absent": {
            name: {"copies": module.copies}
            for name, module in model.named_modules()
            if isinstance(module, Absent)
        },
        "bypasses": {
            name: {"norm": module.norm_name, "side": module.kind}
            for name, module in model.named_modules()
            if isinstance(module, Bypass) and module.form == "full"
        },
        "parts": {
            name: {"side": module.side} for name, module in model.named_modules() if isinstance(module, Part)
        },
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


@uncompiled
@checked(FileError)
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
    recipe = _recipe(path, metadata)
    layers = [(name, str(entry.get("norm"))) for name, entry in recipe["bypasses"].items()]
    kinds = {str(entry.get("side", SIDES[0])) for entry in recipe["bypasses"].values()} or {SIDES[0]}
    if len(kinds) > 1:
        raise _misfit(path, model, ["its bypasses are of several kinds"])
    sides = {name: str(entry.get("side")) for name, entry in recipe["parts"].items()}
    blocks = Edit(model)
    with ExitStack() as undo:
        try:
            add_bypass_(model, layers, "full", kinds.pop())  # type: ignore[arg-type]  # it knows which there are
            undo.callback(remove_bypass_, model, layers)
            add_parts_(model, sides)
            undo.callback(remove_parts_, model, sides)
        except ModelError as error:
            raise _misfit(path, model, [str(error)]) from None
        undo.callback(blocks.undo)
        _leave_out(blocks, model, path, recipe["absent"])
        blocks.apply()
        _load(model, path, tensors, recipe)
        undo.pop_all()
    return model


def _leave_out(edit: Edit, model: nn.Module, path: str | Path, absent: dict[str, Any]) -> None:
    """Put an `Absent` in the place of every module that the saved model had one for."""
    modules = dict(model.named_modules())
    unknown = [name for name in absent if not name or name not in modules]
    if unknown:
        raise _misfit(path, model, [f"{name or 'the model'} is to be left out" for name in unknown])
    for name, entry in absent.items():
        stands_in = Absent(copies=entry.get("copies") is True)
        replace_(edit, model, name, stands_in.train(modules[name].training))


def _load(
    model: nn.Module, path: str | Path, tensors: dict[str, Tensor], recipe: dict[str, dict[str, Any]]
) -> None:
    own = dict(named_tensors(model))
    tensors = _densified(path, tensors, recipe["sparse"], own)
    problems, programs = _programs(model, recipe["rewritten"], tensors)
    constants = {f"{name}.{c}".removeprefix("."): c for name, (_, found) in programs.items() for c in found}
    problems += [f"{name} is missing" for name in own if name not in tensors]
    problems += [
        f"{name} is unknown to the model" for name in tensors if name not in own and name not in constants
    ]
    for name in own.keys() & tensors.keys():
        here, there = own[name], tensors[name]
        if here.ndim != there.ndim or any(a < b for a, b in zip(here.shape, there.shape, strict=True)):
            problems.append(
                f"{name} has shape {tuple(there.shape)}, the model's {tuple(here.shape)} cannot shrink to it"
            )
        elif here.dtype != there.dtype:
            problems.append(f"{name} is {there.dtype}, the model's is {here.dtype}")
    for name, module in model.named_modules():
        if isinstance(module, Bypass | Part) and f"{name}.index" in tensors:
            index = tensors[f"{name}.index"].tolist()
            if index != sorted(set(index)) or not all(0 <= i < module.channels for i in index):
                problems.append(f"{name}.index must hold distinct, ascending channels of the layer")
    allowed = shape_attributes(model)
    for module, values in recipe["attributes"].items():
        for attribute, value in values.items():
            most = allowed.get(module, {}).get(attribute)
            if most is None:
                problems.append(f"attribute {module}.{attribute} is not one that follows a shape")
            elif not _fits(value, most):
                problems.append(f"attribute {module}.{attribute} is {value!r}, expected {_range(most)}")
    if problems:
        raise _misfit(path, model, problems)
    attributes = {
        module: {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        for module, values in recipe["attributes"].items()
    }
    edit = Edit(model)
    edit.attributes(attributes)
    for name, tensor in {id(t): (n, t) for n, t in own.items()}.values():
        edit.tensor(tensor, tensors[name].clone().to(tensor.device))  # aligned memory of its own
    edit.apply()
    renew_(model, edit)
    for name, (several, found) in programs.items():
        rewritten = model.get_submodule(name)
        lost, tied = (str(recipe["rewritten"][name].get(key, ""))[:300] for key in ("lost", "tied"))
        device = next((t.device for t in rewritten.parameters()), None)
        edit.done(
            rewrite_(rewritten, several, {c: t.clone().to(device) for c, t in found.items()}, lost, tied)
        )
        listed = recipe["rewritten"][name].get("stands_in")
        ways = other_forwards(original_class(rewritten)) if isinstance(listed, list) else []
        rewritten.stands_in = tuple(way for way in ways if way in listed)  # type: ignore[assignment]
    wrong = []
    for name, values in shape_attributes(model).items():
        given = attributes.get(name, {})
        known = known_attributes(model.get_submodule(name))  # of which an older file may lack some
        wrong += (
            [name] if any(given.get(a, v if a in known else None) != v for a, v in values.items()) else []
        )
    if wrong:
        edit.undo()
        raise _misfit(path, model, [f"attributes of {name} contradict its tensors" for name in wrong])


def _programs(
    model: nn.Module, recipe: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[list[str], dict[str, tuple[list[Program], dict[str, Tensor]]]]:
    """What is wrong with the programs of a file, and the programs with their constants by module."""
    problems: list[str] = []
    programs: dict[str, tuple[list[Program], dict[str, Tensor]]] = {}
    modules = dict(model.named_modules())
    own = [type(module) for module in modules.values() if not isinstance(module, Absent)]
    packages = {cls.__module__.partition(".")[0] for cls in own} - {"torch"}
    for name, entry in recipe.items():
        if name not in modules or not isinstance(entry, dict):
            problems.append(f"{name} is to be rewritten, and the model has no such module")
            continue
        module = modules[name]
        start = f"{name}.{CONSTANT}".removeprefix(".")
        found = {
            CONSTANT + key.removeprefix(start): tensor
            for key, tensor in tensors.items()
            if key.startswith(start) and key.removeprefix(start).isdecimal()
        }
        reader = ProgramReader(
            [*dict(named_tensors(module)), *found], [n for n, _ in module.named_modules()], packages
        )
        try:
            others = entry.get("others", [])
            if not isinstance(others, list) or len(others) > MOST_OTHERS:
                raise ValueError(f"others must be a list of at most {MOST_OTHERS} programs")
            programs[name] = [reader.read(data) for data in (entry.get("program"), *others)], found
        except ValueError as error:
            problems.append(f"the forward of {name or 'the model'} is not one that may be run: {error}")
    lengths: dict[str, int] = {}
    for name in sorted(programs, key=len, reverse=True):  # submodules first
        lengths[name] = max(length_of(name, program, lengths) for program in programs[name][0])
        if lengths[name] > LONGEST:
            problems.append(f"the forward of {name or 'the model'} runs more than {LONGEST:,} operators")
    return problems, programs


def length_of(name: str, program: Program, lengths: Mapping[str, int]) -> int:
    """How many operators a program of a module runs, those of other programs that it calls included."""
    calls = [f"{name}.{op.module}".lstrip(".") for op in program.ops if isinstance(op, Call)]
    inner = [sum(n for m, n in lengths.items() if f"{m}.".startswith(f"{call}.")) for call in calls]
    return len(program.ops) + sum(inner)


def _fits(value: Any, most: int | tuple[int, ...]) -> bool:
    if isinstance(most, tuple):
        return isinstance(value, list) and len(value) == len(most) and all(map(_fits, value, most))
    return type(value) is int and 0 <= value <= most


def _range(most: int | tuple[int, ...]) -> str:
    if isinstance(most, tuple):
        return f"numbers in {', '.join(f'0…{size}' for size in most)}"
    return f"a number in 0…{most}"


def shape_attributes(model: nn.Module) -> dict[str, dict[str, int | tuple[int, ...]]]:
    """Module name -> attributes that follow shapes, as they are now."""
    found = {}
    for name, module in model.named_modules():
        values = mirrored(module, {}) | known_attributes(module)
        pads = pad_attributes(model, name)
        if pads:
            values = {attribute: getattr(module, attribute) for attribute in pads}
        if values:
            found[name] = values
    return found


def _recipe(path: str | Path, metadata: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Attributes, programs, bypasses and parts by module, and shapes of tensors that are stored without their zeros."""
    if metadata.get("format") != FORMAT or "recipe" not in metadata:
        raise FileError(
            f"{path}: not a model saved by Secateur (format {metadata.get('format')!r}, expected {FORMAT!r}). "
            f"For ordinary weights, load them into the uncut model."
        )
    try:
        read = json.loads(metadata["recipe"])
        optional = {key: read.get(key, {}) for key in ("rewritten", "absent", "bypasses", "parts", "sparse")}
        recipe = {"attributes": read["attributes"], **optional}
        for key, part in recipe.items():
            if not isinstance(part, dict):
                raise TypeError(f"{key} must be an object")
            if key != "sparse" and not all(isinstance(values, dict) for values in part.values()):
                raise TypeError(f"{key} must be an object of objects")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FileError(f"{path}: its recipe is damaged ({error!r}); use another copy") from None
    return recipe


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
