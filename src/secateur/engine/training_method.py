"""Base class for methods that prune while the model is trained.

@settings
class Halfway(TrainingMethod):
    name, summary = "halfway", "cut the units with the smallest filters"
    at: float = option("share of the steps after which they leave", default=0.5, above=0, below=1)

    def advance(self, session):
        if session.step == round(self.at * session.steps):
            session.cut(session.choose([self.rank(session, group) for group in session.graph.groups]))

    def rank(self, session, group):
        return sum(m.take(session.tensors[m.tensor]).abs().sum(1) for m in group.members if m.role == "out")
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from secateur.cost import Budget
from secateur.cost.multiples import AUTO, ROUND_TO, ROUND_TO_HELP
from secateur.engine.method import Context, Method, When
from secateur.engine.session import Session
from secateur.errors import SecateurError
from secateur.graph import Inputs
from secateur.settings import checked, option, settings


@settings
class TrainingMethod(Method):
    """The hooks of a method; the defaults do nothing.

    Its options are fields; what evolves is the `State` that `prepare` returns, a dataclass, or None. Each hook is given
    the session, whose `own` is that state.

    Attributes:
        needs_budget: whether it cannot start without one.
    """

    when: ClassVar[When] = "during"
    needs_budget: ClassVar[bool] = True

    round_to: int | str = option(ROUND_TO_HELP, default=AUTO, choices=ROUND_TO, least=1)

    def prepare(self, session: Session[Any]) -> Any:
        """Say which groups lose units (default: all), check the options against the model, and return the state."""
        session.aim()

    def attached(self, session: Session[Any]) -> AbstractContextManager[Any]:
        """What is on the model while it trains, such as gates; it is left for every cut and entered again."""
        return nullcontext()

    def cutting(self, session: Session[Any]) -> AbstractContextManager[Any]:
        """What holds while units are cut, for methods that change what modules compute."""
        return nullcontext()

    def penalty(self, session: Session[Any]) -> Tensor:
        """What to add to the loss; scalar."""
        return torch.zeros((), device=session.device)

    def gradients(self, session: Session[Any]) -> None:
        """All gradients are there, and the optimizer's step is next."""

    def advance(self, session: Session[Any]) -> None:
        """Do what follows optimizer step number `session.step` (from 1): say what leaves, or cut it."""

    def finish(self, session: Session[Any]) -> None:
        """The training is over: bring the model into its last form, before the proof."""

    @checked(SecateurError, but=("model",))
    def start(
        self, model: nn.Module, inputs: Inputs, *, budget: Budget | None = None, steps: int
    ) -> Session[Any]:
        """Begin a training that prunes; see `secateur.engine.session` for the loop.

        Args:
            model: pruned in place.
            inputs: example inputs.
            budget: what the result may cost at most.
            steps: optimizer steps of the whole training.
        Raises:
            BudgetError: the budget cannot be reached; the message says what can.
            ModelError: no layer of the model can lose units this way.
        """
        return Session(self, model, inputs, budget=budget, steps=steps)

    def prune(self, model: nn.Module, inputs: Inputs, budget: Budget, context: Context) -> NoReturn:
        """Refuse: it needs a training."""
        raise SecateurError(
            f"method {self.name} prunes while the model is trained: start it beside your training loop with "
            f"secateur.methods.{type(self).__name__}(...).start(model, inputs, budget=..., steps=...), or use "
            f"`secateur prune --method {self.name} --epochs …`"
        )
