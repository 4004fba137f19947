"""What evolves, as tensors and plain JSON: one walk over a dataclass, and the way back.

    @dataclass
    class State:
        threshold: nn.Parameter
        levels: list[Tensor] = field(metadata=PER_TARGET)
        passed: list[Tensor] = field(default_factory=list, metadata=UNSAVED)

Saved are tensors, parameters, modules, optimizers, generators, numbers, text and None, and dataclasses, lists, tuples
and dictionaries of them. In the JSON a tensor is `{"$tensor": name}`, a tuple `{"$tuple": […]}`, and a dictionary whose
keys are not text `{"$dict": [[key, value], …]}`.
"""

import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

PER_GROUP = {"rows": "group"}
"""Metadata of a field: a list with one tensor per group, whose rows are the group's units; it follows every cut."""

PER_TARGET = {"rows": "target"}
"""The same for a list with one tensor per group that loses units."""

UNSAVED = {"saved": False}
"""Metadata of a field that is made anew and not saved."""


def save_state(value: Any) -> tuple[dict[str, Tensor], Any]:
    """Everything in a value: tensors by name, and plain JSON that says where they belong.

    Raises:
        TypeError: something in it cannot be saved; the message says where it is.

    >>> save_state({"step": 3, "kept": [torch.zeros(2)]})
    ({'kept.0': tensor([0., 0.])}, {'step': 3, 'kept': [{'$tensor': 'kept.0'}]})
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _save(value, "", tensors)


def load_state(value: Any, tensors: Mapping[str, Tensor], facts: Any) -> Any:
    """What was saved. Dataclasses, parameters, modules, optimizers and generators in `value` are changed in place.

    Args:
        value: of the same build as the one that was saved.
        tensors, facts: from `save_state`.
    Raises:
        KeyError, ValueError, TypeError, AttributeError: these are not the state of such a value.
    """
    return _load(value, facts, tensors, Any)


def follow_cut(own: Any, masks: Sequence[Tensor], targets: Sequence[int]) -> None:
    """Take the rows of removed units out of the marked fields of a dataclass.

    Args:
        masks: (units,) bool per group, True = kept.
        targets: numbers of the groups that lose units.
    """
    for f in fields(own) if is_dataclass(own) else ():
        if rows := f.metadata.get("rows"):
            kept = masks if rows == "group" else [masks[number] for number in targets]
            before = getattr(own, f.name)
            setattr(own, f.name, [t[m.to(t.device)] for t, m in zip(before, kept, strict=True)])


def learned(own: Any) -> list[nn.Parameter]:
    """The parameters in a dataclass, and those of the modules in it."""
    found: list[nn.Parameter] = []
    for value in _values(own):
        if isinstance(value, nn.Parameter):
            found.append(value)
        elif isinstance(value, nn.Module):
            found += value.parameters()
    return found


def move(own: Any, device: torch.device) -> None:
    """Bring what a dataclass learns to a device, with what its optimizers keep."""
    for p in learned(own):
        p.data = p.data.to(device)
    for value in _values(own):
        if isinstance(value, Optimizer):
            for parameter, slots in value.state.items():
                value.state[parameter] = {
                    name: v if name == "step" or not isinstance(v, Tensor) else v.to(device)
                    for name, v in slots.items()
                }


def _values(own: Any) -> Iterator[Any]:
    for f in fields(own) if is_dataclass(own) else ():
        yield getattr(own, f.name)


def _save(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    def inner(entries: Mapping[Any, Any]) -> dict[Any, Any]:
        start = f"{path}." if path else ""
        return {key: _save(entry, f"{start}{key}", tensors) for key, entry in entries.items()}

    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor | torch.Generator):
        tensors[path] = value.detach() if isinstance(value, Tensor) else value.get_state()
        return {"$tensor": path}
    if isinstance(value, nn.Module):
        return inner(value.state_dict())
    if isinstance(value, Optimizer):
        return inner(
            {
                f"{slot}.{number}": v
                for number, p in enumerate(_parameters(value))
                for slot, v in value.state.get(p, {}).items()
            }
        )
    if is_dataclass(value):
        saved = [f.name for f in fields(value) if f.metadata.get("saved", True)]
        return inner({name: getattr(value, name) for name in saved})
    if isinstance(value, Mapping):
        entries = inner(value)
        plain = all(isinstance(key, str) and not key.startswith("$") for key in entries)
        return entries if plain else {"$dict": [[key, entry] for key, entry in entries.items()]}
    if isinstance(value, list | tuple):
        parts = list(inner(dict(enumerate(value))).values())
        return parts if isinstance(value, list) else {"$tuple": parts}
    raise TypeError(f"{path}: a {type(value).__name__} cannot be saved; mark its field with metadata=UNSAVED")


def _load(value: Any, saved: Any, tensors: Mapping[str, Tensor], hint: Any) -> Any:
    def inner(entries: Sequence[Any], hints: Sequence[Any]) -> list[Any]:
        now = (
            value if isinstance(value, list | tuple) and len(value) == len(entries) else [None] * len(entries)
        )
        return [_load(v, s, tensors, h) for v, s, h in zip(now, entries, hints, strict=True)]

    if isinstance(value, torch.Generator):
        value.set_state(tensors[saved["$tensor"]])
        return value
    if isinstance(value, nn.Parameter):
        _fill(value, tensors[saved["$tensor"]])
        return value
    if isinstance(value, nn.Module):
        for name, part in value.state_dict().items():
            _fill(part, tensors[saved[name]["$tensor"]])
        return value
    if isinstance(value, Optimizer):
        value.state.clear()
        for name, entry in saved.items():
            slot, _, number = name.rpartition(".")
            p, v = _parameters(value)[int(number)], _load(None, entry, tensors, Any)
            value.state[p][slot] = v if slot == "step" or not isinstance(v, Tensor) else v.to(p.device)
        return value
    if saved is None:
        return None
    kind = _dataclass_of(hint)
    if is_dataclass(value) or kind is not None:
        hints = get_type_hints(kind or type(value))
        found = {n: _load(getattr(value, n, None), entry, tensors, hints[n]) for n, entry in saved.items()}
        if not is_dataclass(value):
            assert kind is not None
            return kind(**found)
        for name, entry in found.items():
            setattr(value, name, entry)
        return value
    if isinstance(saved, list):
        item = (get_args(hint) or (Any,))[0] if get_origin(hint) in (list, Sequence) else Any
        return inner(saved, [item] * len(saved))
    if not isinstance(saved, dict):
        return saved
    if "$tensor" in saved:
        tensor = tensors[saved["$tensor"]].clone()
        return tensor.to(value.device) if isinstance(value, Tensor) else tensor
    if "$tuple" in saved:
        return tuple(inner(saved["$tuple"], [Any] * len(saved["$tuple"])))
    now = value if isinstance(value, Mapping) else {}
    entries = saved["$dict"] if "$dict" in saved else saved.items()
    return {key: _load(now.get(key), entry, tensors, Any) for key, entry in entries}


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _fill(tensor: Tensor, values: Tensor) -> None:
    if tensor.shape != values.shape:
        raise ValueError(f"{tuple(values.shape)} for what is {tuple(tensor.shape)}")
    with torch.no_grad():
        tensor.copy_(values)


def _dataclass_of(hint: Any) -> Any:
    """The dataclass that a hint asks for, if it does."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return next((part for part in parts if isinstance(part, type) and is_dataclass(part)), None)
