"""What a method that prunes while the caller trains looks like, whatever it prunes.

    method = LAPP(model, inputs, budget=Budget(macs=0.4), steps=epochs * len(loader))
    optimizer = SGD(model.parameters(), …)              # after the method: it may add parameters
    with method.attach(optimizer):
        for x, y in loader:
            loss = criterion(model(x), y) + method.penalty()
            loss.backward()
            method.before_step()
            optimizer.step()
            method.after_step()
            optimizer.zero_grad()
    result = method.finish()

With gradient accumulation the hooks run once per optimizer step, and each micro-step adds its share of the
penalty. With a gradient scaler, say which with `attach(optimizer, scaler=scaler)`, so that what the method itself
learns is unscaled too, and call `scaler.unscale_(optimizer)` before `before_step`; a step that the scaler skips does
not count.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.errors import TrainingError


class TrainingMethod:
    """The hooks that a training loop calls; the defaults do nothing.

    Args:
        model: being trained; the method changes it in place.
        steps: optimizer steps of the whole training.
    Attributes:
        step: optimizer steps done while attached.
    """

    def __init__(self, model: nn.Module, *, steps: int) -> None:
        if steps < 1:
            raise TrainingError(
                f"{type(self).__name__}: steps is {steps}; expected the training's, at least 1"
            )
        self.model = model
        self.steps = steps
        self.step = 0
        self.optimizer: Optimizer | None = None
        self.followers: tuple[nn.Module, ...] = ()
        self.scaler: torch.amp.GradScaler | None = None
        self._stepped = False
        self._handle: Any = None

    def attach(
        self,
        optimizer: Optimizer,
        *,
        followers: Iterable[nn.Module] = (),
        scaler: torch.amp.GradScaler | None = None,
    ) -> Self:
        """Say which optimizer trains the model; then enter the method as a context.

        Args:
            optimizer: over all of `model.parameters()` that are trained; its state follows every cut.
            followers: copies of the model that are cut along, such as a moving average.
            scaler: that scales the loss, if one does.
        """
        known = {p for group in optimizer.param_groups for p in group["params"]}
        strange = [n for n, p in self.model.named_parameters() if p.requires_grad and p not in known]
        if strange:
            raise TrainingError(
                f"{type(self).__name__}: the optimizer does not know {strange[0]} ({len(strange)} in all). Make it "
                f"from model.parameters() after the method, which may have added some."
            )
        self.optimizer, self.followers, self.scaler = optimizer, tuple(followers), scaler
        return self

    def __enter__(self) -> Self:
        if self.optimizer is None:
            raise TrainingError(f"{type(self).__name__}: use `with method.attach(optimizer):`")
        self._handle = self.optimizer.register_step_post_hook(self._count)
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()
        self._handle = None
        self.uninstall()

    def install(self) -> None:
        """Put hooks on the model."""

    def uninstall(self) -> None:
        """Take the hooks off the model."""

    def parameters(self) -> list[nn.Parameter]:
        """What the method itself learns, with optimizers of its own."""
        return []

    def penalty(self) -> Tensor:
        """What to add to the loss; scalar."""
        return torch.zeros((), device=next(self.model.parameters()).device)

    def before_step(self) -> None:
        """All gradients are there: the method's own are averaged over processes, those of weights may change.

        With a gradient scaler the method's own are unscaled, and one that overflowed is dropped.
        """
        for p in self.parameters():
            if p.grad is None:
                continue
            if dist.is_initialized():
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()
            if self.scaler is not None:
                p.grad /= self.scaler.get_scale()
                p.grad = p.grad if p.grad.isfinite().all() else None

    def after_step(self) -> None:
        """The optimizer was called; if it did take a step, the method goes on by one."""
        if self._stepped:
            self._stepped = False
            self.step += 1
            self.advance()

    def advance(self) -> None:
        """Do what follows optimizer step number `step` (from 1)."""

    def settings(self) -> dict[str, Any]:
        """The arguments that make this method what it is, as plain JSON."""
        return {"method": type(self).__name__, "steps": self.steps}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that evolves: tensors, and plain JSON."""
        return {}, {"step": self.step}

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Go on from a state: the model gets the shapes it had then; its weights are for the caller to load."""
        self.step = int(facts["step"])

    def _count(self, *_: object) -> None:
        self._stepped = True
