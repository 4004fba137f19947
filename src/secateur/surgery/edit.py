"""Changes to a module that are made together and can be taken back."""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Edits = Mapping[str, Mapping[str, int | tuple[int, ...] | tuple[str, ...]]]
"""Module name -> attribute name -> new value."""


class Edit:
    """New tensors and attributes for a model, its gradients and its optimizer's state.

    Tensors keep their identity (`.data` is replaced), so that optimizers, hooks and tied modules still
    refer to them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._tensors: list[tuple[Tensor, Tensor, Tensor]] = []
        self._attributes: list[tuple[nn.Module, str, Any, Any]] = []
        self._undo: list[Callable[[], None]] = []
        self._states: list[tuple[dict[str, Any], str, Tensor, Tensor]] = []
        self._grads: list[tuple[Tensor, Tensor, Tensor]] = []
        self._entries: list[tuple[dict[str, Any], str, Any, Any]] = []

    def tensor(self, old: Tensor, new: Tensor) -> None:
        """Replace the contents of a parameter or buffer."""
        self._tensors.append((old, old.data, new))

    def grad(self, tensor: Tensor, new: Tensor) -> None:
        """Replace the gradient of a parameter."""
        assert tensor.grad is not None
        self._grads.append((tensor, tensor.grad, new))

    def state(self, state: dict[str, Any], name: str, new: Tensor) -> None:
        """Replace a tensor in an optimizer's state of one parameter."""
        self._states.append((state, name, state[name], new))

    def attributes(self, edits: Edits) -> None:
        """Replace attributes of modules; those of an object that a module holds ("config.widths") in a copy of it."""
        for name, values in edits.items():
            module = self._model.get_submodule(name)
            copies: dict[str, Any] = {}
            for attribute, value in values.items():
                owner, _, inner = attribute.rpartition(".")
                if owner:
                    held = copies.setdefault(owner, copy.copy(getattr(module, owner)))
                    setattr(held, inner, type(getattr(held, inner))(value))
                else:
                    copies[attribute] = value
            for attribute, value in copies.items():
                self._attributes.append((module, attribute, getattr(module, attribute), value))

    def entry(self, of: dict[str, Any], key: str, new: Any) -> None:
        """Replace an entry of a dict, such as the submodules of a module."""
        self._entries.append((of, key, of[key], new))

    def apply(self) -> None:
        """Make all changes."""
        self._set(
            ((t, new) for t, _, new in self._tensors),
            ((t, new) for t, _, new in self._grads),
            ((s, n, new) for s, n, _, new in self._states),
            ((m, a, new) for m, a, _, new in self._attributes),
            ((d, k, new) for d, k, _, new in self._entries),
        )

    def done(self, undo: Callable[[], None]) -> None:
        """Note a change that was made after `apply`, by how it is taken back."""
        self._undo.append(undo)

    def undo(self) -> None:
        """Take all changes back."""
        while self._undo:
            self._undo.pop()()
        self._set(
            ((t, old) for t, old, _ in self._tensors),
            ((t, old) for t, old, _ in self._grads),
            ((s, n, old) for s, n, old, _ in self._states),
            ((m, a, old) for m, a, old, _ in self._attributes),
            ((d, k, old) for d, k, old, _ in self._entries),
        )

    @staticmethod
    def _set(
        tensors: Iterable[tuple[Tensor, Tensor]],
        grads: Iterable[tuple[Tensor, Tensor]],
        states: Iterable[tuple[dict[str, Any], str, Tensor]],
        attributes: Iterable[tuple[nn.Module, str, Any]],
        entries: Iterable[tuple[dict[str, Any], str, Any]],
    ) -> None:
        grads = list(grads)
        for tensor, _ in grads:
            tensor.grad = None  # a gradient of another shape would be refused below
        for tensor, value in tensors:
            if tensor.requires_grad:
                # Where a graph of an earlier pass is alive (a loss in a variable), autograd keeps a node for this
                # tensor that remembers its old shape; only another dtype makes it forget.
                other = torch.float32 if value.dtype != torch.float32 else torch.float64
                tensor.data = torch.empty(0, dtype=other, device=value.device)
            tensor.data = value
        for tensor, value in grads:
            tensor.grad = value
        for state, name, value in states:
            state[name] = value
        for module, attribute, value in attributes:
            setattr(module, attribute, value)
        for of, key, value in entries:
            of[key] = value


def select(tensor: Tensor, keep: Mapping[int, Tensor]) -> Tensor:
    """The kept positions of a tensor, dim -> positions; memory format is kept."""
    result = tensor
    for dim, positions in keep.items():
        result = result.index_select(dim, positions.to(tensor.device))
    channels_last = tensor.ndim == 4 and not tensor.is_contiguous()
    return result.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def select_states(edit: Edit, optimizer: Optimizer, parameter: Tensor, keep: Mapping[int, Tensor]) -> None:
    """Cut the optimizer's tensors of one parameter that have its shape (momentum, squares, averages)."""
    state = optimizer.state.get(parameter, {})
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            edit.state(state, name, select(value, keep))
