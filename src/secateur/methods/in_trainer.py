"""A training that prunes inside somebody else's trainer: what the callbacks of all frameworks share."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from secateur.cost import Budget
from secateur.engine.pruned import Pruned
from secateur.engine.session import Session
from secateur.engine.training_method import TrainingMethod
from secateur.errors import FileError, SecateurError, TrainingError
from secateur.files import read_tensors, write_tensors
from secateur.graph import Inputs
from secateur.methods import METHODS, MethodLike, method_named
from secateur.settings import differences

_FORMAT = "secateur-session-1"


class InTrainer:
    """Base of the callbacks: starts a method, lets it act around each optimizer step, saves it, proves the result.

    Args:
        method: a method that prunes while the model trains, or its name.
        budget: what the result may cost at most; a number is a bound of the MACs, 0.5 for half of them.
        inputs: example inputs of the model; None: taken from the framework, as the callback says.
        steps: optimizer steps of the whole training; None: what the framework says.
        followers: copies of the model that are cut along, such as a moving average, once training begins; a function
            that returns them, if they are made later.
        options: of the method, by name.
    Attributes:
        session: the training that prunes; None before it starts.
        pruned: the result; None until training is over.
    Raises:
        SecateurError: the method prunes before or after training, or has no such option.
    """

    def __init__(
        self,
        method: MethodLike,
        *,
        budget: Budget | float | None = None,
        inputs: Inputs | None = None,
        steps: int | None = None,
        followers: Sequence[nn.Module] | Callable[[], Sequence[nn.Module]] = (),
        **options: Any,
    ) -> None:
        chosen = method_named(method, options)
        if not isinstance(chosen, TrainingMethod):
            able = ", ".join(name for name, kind in METHODS.items() if kind.when == "during")
            raise SecateurError(
                f"method {chosen.name} does not prune while a model trains; choose one of: {able}"
            )
        self.method = chosen
        self.budget = Budget(macs=budget) if isinstance(budget, int | float) else budget
        self.inputs, self.steps = inputs, steps
        self.session: Session[Any] | None = None
        self.pruned: Pruned | None = None
        self._followers = followers
        self._hooks = ExitStack()
        self._told = 0

    @property
    def running(self) -> Session[Any]:
        """The session.

        Raises:
            TrainingError: it has not started.
        """
        if self.session is None:
            raise TrainingError(f"{type(self.method).__name__}: it has not started; the trainer starts it")
        return self.session

    def check_unused(self) -> None:
        """Raise TrainingError if a training has started with this callback."""
        if self.session is not None:
            raise TrainingError(
                f"{self.running.name}: this callback has been used; make a new one, and a new model, for another run"
            )

    def start(self, model: nn.Module, inputs: Inputs, steps: float) -> None:
        """Begin, before the optimizer is made and before weights of a checkpoint are loaded."""
        self.check_unused()
        number = self.steps or steps
        if not 1 <= number < float("inf"):
            raise TrainingError(
                f"{type(self.method).__name__}: the trainer does not say how many optimizer steps the training has; "
                f"say steps=…"
            )
        self.session = self.method.start(model, inputs, budget=self.budget, steps=int(number))

    def followers(self) -> Sequence[nn.Module]:
        """The copies that are cut along."""
        return self._followers() if callable(self._followers) else self._followers

    def enter(
        self,
        optimizer: Optimizer,
        *,
        scaler: torch.amp.GradScaler | None = None,
        wrapped: nn.Module | None = None,
        hooked: bool = True,
    ) -> None:
        """Training begins.

        Args:
            optimizer, scaler, wrapped: as for `Session.attach`.
            hooked: let the optimizer call `before_step`; otherwise the callback does.
        """
        session = self.running
        followers = self.followers()
        for follower in followers:
            if _parts(follower) != _parts(session.model):
                raise TrainingError(
                    f"{session.name}: it has changed layers of the model, and a {type(follower).__name__} that follows "
                    f"was copied before. Let the callback that copies it come after this one."
                )
        self._hooks.enter_context(
            session.attach(optimizer, followers=followers, scaler=scaler, wrapped=wrapped)
        )
        if hooked:
            self._hooks.callback(optimizer.register_step_pre_hook(lambda *_: self.before_step()).remove)

    def leave(self) -> None:
        """Take everything off the model; called once more than needed it does nothing."""
        self._hooks.close()

    def before_step(self) -> None:
        """The gradients are there, unscaled; the loss was without the penalty."""
        self.running.before_step(penalty=True)

    def after_step(self) -> None:
        """The optimizer was called, or was not because the scaler skips this step."""
        self.running.after_step()

    def finish(self) -> Pruned:
        """Training is over: prove the result, and keep it."""
        self.leave()
        self.pruned = self.running.finish()
        return self.pruned

    # --- what is logged ------------------------------------------------------------------------------------

    def news(self) -> Iterator[dict[str, float]]:
        """The points of the method's course since the last call, as numbers by name, such as `secateur/macs`."""
        history = self.running.history
        for point in history[self._told :]:
            yield dict(_numbers("secateur", point))
        self._told = len(history)

    def left(self) -> dict[str, float]:
        """Shares of MACs and parameters as last noted, by name; before that, of the model as it is."""
        session = self.running
        now = {name: session.count(name) / session.dense.of(name) for name in ("macs", "params")}
        return {f"secateur/{name}": (session.history or [now])[-1][name] for name in now}

    # --- files ---------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All that a resumed run needs besides weights: tensors by name, and plain JSON."""
        tensors, facts = self.running.state()
        return {"format": _FORMAT, "record": _json(self.running.record()), "facts": facts, "tensors": tensors}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Give the started model the shapes it had, before its weights are loaded.

        Raises:
            TrainingError: the state is of another run; the message says what differs.
            FileError: it is no such state.
        """
        session = self.running
        try:
            if state["format"] != _FORMAT:
                raise ValueError(f"format {state['format']!r}, expected {_FORMAT!r}")
            found = list(differences(state["record"], _json(session.record())))
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise _damaged("the checkpoint", error) from error
        if found:
            raise TrainingError(
                f"{session.name}: the checkpoint is of another run: {'; '.join(found[:5])}. Restore these settings, or "
                f"start afresh."
            )
        session.followers = tuple(self.followers())
        try:
            session.restore(state["tensors"], state["facts"])
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise _damaged("the checkpoint", error) from error
        self._told = len(session.history)

    def write(self, path: Path) -> None:
        """The state as one safetensors file."""
        state = self.state()
        header = {name: json.dumps(state[name]) for name in ("record", "facts")}
        write_tensors(path, state["tensors"], {"format": state["format"], **header})


def read_state(path: Path) -> dict[str, Any]:
    """What `InTrainer.write` wrote.

    Raises:
        FileError: the file is missing or damaged.
    """
    tensors, header = read_tensors(path)
    try:
        facts = {name: json.loads(header[name]) for name in ("record", "facts")}
        return {"format": header["format"], **facts, "tensors": tensors}
    except (KeyError, ValueError) as error:
        raise _damaged(str(path), error) from error


def _damaged(what: str, error: Exception) -> FileError:
    return FileError(
        f"{what}: holds no state of a method that training can go on from ({type(error).__name__}: {error}). "
        f"Start afresh."
    )


def _parts(model: nn.Module) -> list[tuple[str, type]]:
    return [(name, type(module)) for name, module in model.named_modules()]


def _json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """The numbers in a point of the history but for its step and its layers."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            if key not in ("step", "layers"):
                yield from _numbers(f"{name}/{key}", entry)
    elif isinstance(value, Real):
        yield name, float(value)
