"""A training that prunes: the model as it is now, what is kept of it, and all that follows a cut.

    session = LAPP(prune_share=0.1).start(model, inputs, budget=Budget(macs=0.4), steps=epochs * len(loader))
    optimizer = SGD(model.parameters(), …)              # after the start: the method may add parameters
    with session.attach(optimizer):
        for x, y in loader:
            loss = criterion(model(x), y) + session.penalty()
            loss.backward()
            session.before_step()
            optimizer.step()
            session.after_step()
            optimizer.zero_grad()
    pruned = session.finish()

With gradient accumulation the hooks run once per optimizer step, and each micro-step adds its share of the
penalty. With a gradient scaler, say which with `attach(optimizer, scaler=scaler)`, so that what the method itself
learns is unscaled too, and call `scaler.unscale_(optimizer)` before `before_step`; a step that the scaler skips does
not count. With a model in DistributedDataParallel: `attach(optimizer, wrapped=model)`. Where the loss is out of reach,
`before_step(penalty=True)` adds the penalty's gradient itself.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.allocate import allocate
from secateur.cost import Budget, Cost
from secateur.cost.frozen import what_stays
from secateur.cost.multiples import choose_multiples
from secateur.engine.decay import Decay, Pool
from secateur.engine.describe import layer_facts
from secateur.engine.gates import Gates
from secateur.engine.pruned import Pruned, require_equal
from secateur.engine.state import follow_cut, learned, load_state, move, save_state
from secateur.engine.wrapper import renew_wrapper
from secateur.errors import BudgetError, ModelError, TrainingError
from secateur.graph import Inputs
from secateur.graph.duplicate import duplicate
from secateur.graph.guard import original
from secateur.graph.shrink import shrink
from secateur.plan import Plan
from secateur.proof import verify
from secateur.report.data import Ending
from secateur.settings import checked
from secateur.surgery import cut_, embed

if TYPE_CHECKING:
    from secateur.engine.training_method import TrainingMethod

S = TypeVar("S")
_SAVED = ("step", "kept", "scores", "multiples", "rounding", "history", "pool", "own")


@final
class Session(Generic[S]):
    """One training under a method that prunes; made by `method.start`.

    Attributes:
        method: which prunes; its options never change.
        own: what the method keeps, its `State`.
        model: being trained; pruned in place.
        inputs: example inputs.
        budget: what the result may cost at most; None: the method decides otherwise.
        steps: optimizer steps of the whole training.
        step: optimizer steps done while attached.
        original: a copy of the model at the start.
        whole: the graph of the model at the start; the plan refers to it.
        graph: of the model as it is now; the same groups with the units that are left.
        tensors: the model's parameters by the names in the graph.
        cost: of the model at the start, as a function of the units kept.
        dense: the cost that shares in the budget refer to: of the model as the user gave it.
        limits: the largest allowed cost per bounded measure.
        kept: per group, the numbers that its units had at the start.
        targets: numbers of the groups that lose units.
        least: units that each group keeps at least.
        multiples: per group, what the number of units kept is a multiple of.
        rounding: the same with the reason, plain JSON.
        scores: (units,) per group of `whole`, as they were when last looked at; higher = keep.
        pool: the units on their way out.
        history: points of the training, plain JSON.
        optimizer: trains the model; None before `attach`.
        followers: copies of the model that are cut along.
        wrapped: the model in DistributedDataParallel, if it is.
        gates: that stand on the model now.
        passed: what the gates were given in the last pass, where the method learns it, with its gradient.
    """

    own: S

    def __init__(
        self,
        method: "TrainingMethod",
        model: nn.Module,
        inputs: Inputs,
        *,
        budget: Budget | None,
        steps: int,
    ) -> None:
        self.method, self.model, self.inputs, self.budget = method, original(model), inputs, budget
        self.steps, self.step = steps, 0
        if steps < 1:
            raise TrainingError(f"{self.name}: steps is {steps}; expected the training's, at least 1")
        if budget is None and method.needs_budget:
            raise BudgetError(f"{self.name}: no budget; give one, such as Budget(macs=0.5)")
        self.optimizer: Optimizer | None = None
        self.followers: tuple[nn.Module, ...] = ()
        self.scaler: torch.amp.GradScaler | None = None
        self.wrapped: nn.Module | None = None
        self.gates: tuple[Gates, ...] = ()
        self.passed: list[Tensor] = []
        self.history: list[dict[str, Any]] = []
        self._stepped = False
        self._handle: Any = None
        self._hooks = ExitStack()
        self.analyze()
        self.dense = self.cost
        self.limits = budget.limits(self.dense.all()) if budget else {}
        self.own = method.prepare(self)

    @property
    def name(self) -> str:
        """Of the method, for messages."""
        return type(self.method).__name__

    # --- while a method prepares ---------------------------------------------------------------------------

    def analyze(self) -> None:
        """Analyse the model as it is now, as the one at the start; `dense` and `limits` stay."""
        self.whole = self.graph = self.method.analyze(self.model, self.inputs)
        self.cost = Cost(self.whole)
        self.tensors = dict(self.model.named_parameters())
        self.original = duplicate(self.model)
        self.kept = [torch.arange(group.units) for group in self.whole.groups]
        self.scores = [torch.zeros(group.units) for group in self.whole.groups]
        self.targets: list[int] = []
        self.least = [1] * len(self.kept)
        self.multiples: tuple[int, ...] = (1,) * len(self.kept)
        self.rounding: dict[str, Any] = {}
        self.pool = Pool(self.graph, (), self.tensors, Decay())

    def aim(
        self,
        targets: Iterable[int] | None = None,
        *,
        least: int | Sequence[int] = 1,
        removal: Decay | None = None,
    ) -> None:
        """Say which groups lose units, how many units groups keep at least, and how units leave.

        Args:
            targets: numbers of groups; None: all.
            least: of every group, or for each one.
            removal: of units that leave through the pool; None: they are cut out at once.
        Raises:
            ModelError: there is no such group.
            BudgetError: the budget cannot be reached that way; the message says what can.
        """
        units = [group.units for group in self.whole.groups]
        self.targets = list(range(len(units)) if targets is None else targets)
        self.least = [min(least, u) for u in units] if isinstance(least, int) else list(least)
        if not self.targets:
            raise ModelError(
                f"{self.name}: no layer can lose units on its own; `secateur inspect` says what is frozen"
            )

        def lowest(steps: Sequence[int]) -> list[int]:
            """Units that stay of every group whatever goes, where widths are multiples of `steps`."""
            rounded = [-(-low // step) * step for low, step in zip(self.least, steps, strict=True)]
            return [
                min(u, low) if n in self.targets else u
                for n, (u, low) in enumerate(zip(units, rounded, strict=True))
            ]

        chosen = choose_multiples(
            self.model,
            self.whole,
            self.method.round_to,
            lambda steps: self.cost.within(self.limits, lowest(steps)),
        )
        self.multiples, self.rounding = chosen.units, chosen.record(self.whole)
        counts = lowest(self.multiples)
        for measure, limit in self.limits.items():
            if (reach := self.cost.of(measure, counts)) > limit:
                raise BudgetError(
                    f"{self.name}: the budget asks for at most {limit:,} {measure}; whatever goes, {reach:,} "
                    f"stay ({reach / self.dense.of(measure):.4f} of the dense model). Raise the budget"
                    f"{', or lower round_to' if max(self.multiples) > 1 else ''}."
                    f"{what_stays(self.cost, measure, counts)}"
                )
        if removal is not None:
            self.pool = Pool(self.graph, self.targets, self.tensors, removal)

    # --- what the training loop calls ----------------------------------------------------------------------

    @checked(TrainingError)
    def attach(
        self,
        optimizer: Optimizer,
        *,
        followers: Iterable[nn.Module] = (),
        scaler: torch.amp.GradScaler | None = None,
        wrapped: nn.Module | None = None,
    ) -> Self:
        """Say which optimizer trains the model; then enter the session as a context.

        Args:
            optimizer: over all of `model.parameters()` that are trained; its state follows every cut.
            followers: copies of the model that are cut along, such as a moving average.
            scaler: that scales the loss, if one does.
            wrapped: what the loop calls in place of the model, if it is in DistributedDataParallel.
        """
        known = {p for group in optimizer.param_groups for p in group["params"]}
        strange = [n for n, p in self.model.named_parameters() if p.requires_grad and p not in known]
        if strange:
            raise TrainingError(
                f"{self.name}: the optimizer does not know {strange[0]} ({len(strange)} in all). Make it from "
                f"model.parameters() after the start of the method, which may have added some."
            )
        if wrapped is not None and not isinstance(wrapped, nn.parallel.DistributedDataParallel):
            raise TrainingError(
                f"{self.name}: the model is in {type(wrapped).__name__}; expected DistributedDataParallel, because "
                f"each process must hold the whole model to cut it, and run it uncompiled"
            )
        self.optimizer, self.followers, self.scaler = optimizer, tuple(followers), scaler
        self.wrapped = wrapped
        return self

    def __enter__(self) -> Self:
        if self.optimizer is None:
            raise TrainingError(f"{self.name}: use `with session.attach(optimizer):`")
        if self._handle is not None:
            raise TrainingError(f"{self.name}: its hooks are on the model already; enter the session once")

        def count(*_: object) -> None:
            # with a scaler a fused optimizer is called for every step, and told which to skip
            overflow = getattr(self.optimizer, "found_inf", None)
            self._stepped = overflow is None or not overflow

        self._handle = self.optimizer.register_step_post_hook(count)
        try:
            self.renew()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        self._hooks.close()

    def parameters(self) -> list[nn.Parameter]:
        """What the method itself learns, with optimizers of its own."""
        return learned(self.own)

    def penalty(self) -> Tensor:
        """What to add to the loss; scalar."""
        return self.method.penalty(self)

    def before_step(self, *, penalty: bool = False) -> None:
        """All gradients are there: the method's own are averaged over processes, those of weights may change.

        With a gradient scaler the method's own are unscaled, and one that overflowed is dropped.

        Args:
            penalty: add the gradient of the penalty; for loops whose loss is without it.
        """
        self._unscale()
        for p in self.parameters():
            if p.grad is None:
                continue
            if dist.is_initialized():
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()
            if self.scaler is not None:
                p.grad /= self.scaler.get_scale()
                p.grad = p.grad if p.grad.isfinite().all() else None
        if penalty:
            self.passed = []  # the loss has used up its graph
            with torch.enable_grad():  # optimizers call their hooks without
                value = self.penalty()
            if value.requires_grad:
                torch.autograd.backward(value)
        self.pool.observe()
        self.method.gradients(self)

    def _unscale(self) -> None:
        """Where the scaler is calling a fused optimizer, which would divide the gradients by the scale: do so now."""
        scale = getattr(self.optimizer, "grad_scale", None)
        if self.optimizer is not None and scale is not None:
            for group in self.optimizer.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.div_(scale)
            self.optimizer.grad_scale = None  # type: ignore[attr-defined]

    def after_step(self) -> None:
        """The optimizer was called; if it did take a step, the method goes on by one.

        Raises:
            TrainingError: the session was not entered, so that no step would count.
        """
        if self._handle is None:
            raise TrainingError(f"{self.name}: train within `with session.attach(optimizer):`")
        if self._stepped:
            self._stepped = False
            self.step += 1
            self.pool.advance(self.step, self.optimizer)
            self.method.advance(self)
        for p in self.parameters():
            p.grad = None  # also that of a step which the scaler skipped

    def finish(self) -> Pruned:
        """Prove the result: the small model equals the original with its weights and zeros for the rest.

        Raises:
            TrainingError: training is not over, so the budget is not met; or its hooks are still on the model.
            CutError: the models are not equal; the message says by how much.
        """
        if self._handle is not None:
            raise TrainingError(
                f"{self.name}: finish() within `with session.attach(optimizer):`; call it after the block"
            )
        self.method.finish(self)
        self.cut_gone()
        over = [name for name, limit in self.limits.items() if self.count(name) > limit]
        if over:
            raise TrainingError(
                f"{self.name}: {over[0]} are {self.count(over[0]):,} after {self.step} of {self.steps} "
                f"steps, the budget is {self.limits[over[0]]:,}. Finish the training, with after_step() in every step."
            )
        plan, device = self.plan(), self.device
        try:
            original = embed(self.original, self.model.cpu(), self.whole, plan)
            proof = verify(original, self.model, self.whole.on(torch.device("cpu")), plan)
        finally:
            self.model.to(device)
        require_equal(self.model, proof)
        return Pruned(
            self.model,
            plan,
            self.whole,
            self.scores,
            proof,
            self.dense.all(),
            self.cost.all([len(units) for units in self.kept]),
            facts={
                **layer_facts(self.whole, self.original, self.model),
                "history": self.history,
                "endings": [asdict(ending) for ending in self.endings],
            },
        )

    # --- what methods use ----------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return next(self.model.parameters()).device

    @property
    def endings(self) -> Sequence[Ending]:
        """How each decay of a unit ended, for methods whose units decay."""
        return self.pool.endings

    def count(self, measure: str, masks: Sequence[Tensor] | None = None) -> int:
        """A measure of the model as it is now, or with only the units marked True."""
        return self.cost.of(measure, [int(m.sum()) for m in masks] if masks else [len(k) for k in self.kept])

    def ramp(self, steps: int, start: int = 0) -> float:
        """What of the way from the dense model to the budget is still to go: from 1 at step `start` cubically to 0."""
        return (1 - min(1.0, max(0, self.step - start) / steps)) ** 3

    def soft_costs(self, counts: Sequence[Tensor], slack: float) -> list[tuple[Tensor, float]]:
        """What soft widths cost and may cost, per bounded measure, as shares of the dense model.

        Args:
            counts: units per target group, real-valued scalars; the costs have their gradient, in float64 on the CPU.
            slack: from 0, the budget, to 1, the dense model.
        """
        kept = torch.tensor([len(units) for units in self.kept], dtype=torch.float64)
        soft = kept.index_put((torch.tensor(self.targets),), torch.stack(list(counts)).double().cpu())
        found = []
        for name, limit in self.limits.items():
            dense = self.dense.of(name)
            share = limit / dense
            found.append((self.cost.soft(name, soft) / dense, share + (1 - share) * slack))
        return found

    def choose(self, scores: Sequence[Tensor], slack: float = 0.0) -> list[Tensor]:
        """Which units of the model as it is now to keep, so that the budget holds: those that score best.

        Args:
            scores: (units,) per target group.
            slack: from 0, the budget, to 1, the dense model.
        Returns:
            (units,) bool per group of `graph`.
        """
        pooled = [torch.full((len(units),), math.inf) for units in self.kept]
        for number, score in zip(self.targets, scores, strict=True):
            self.scores[number][self.kept[number]] = score.detach().float().cpu()
            pooled[number] = score.detach().float().cpu().clone()
            best = pooled[number].topk(min(self.least[number], len(score))).indices
            pooled[number][best] = math.inf
        bounds = {
            name: limit + math.floor(slack * max(0, self.dense.of(name) - limit))
            for name, limit in self.limits.items()
        }
        over = {name: bound for name, bound in bounds.items() if self.count(name) > bound}
        keep = [torch.ones(len(units), dtype=torch.bool) for units in self.kept]
        if over:
            keep = allocate(
                pooled, Cost(self.graph), Budget(**over), "global", relative=False, round_to=self.multiples
            )
        for number in self.targets if slack <= 0 else ():  # units that were restored may be what is too much
            count, step = int(keep[number].sum()), self.multiples[number]
            if count < self.whole.groups[number].units and count > step:
                lowest = pooled[number].masked_fill(~keep[number], math.inf).topk(count % step, largest=False)
                keep[number][lowest.indices] = False
        return keep

    def filled(self, number: int, keep: Tensor, score: Tensor) -> Tensor:
        """The units to keep of a group, (units,) bool, and the best others that make them a multiple, or all."""
        missing = min(-int(keep.sum()) % self.multiples[number], int((~keep).sum()))
        rest = score.detach().float().cpu().masked_fill(keep, -math.inf)
        return keep.index_fill(0, rest.topk(missing).indices, True)

    def cut(self, masks: Sequence[Tensor]) -> None:
        """Cut units out of the model now; the optimizer's state, followers, pool and the method's rows lose the same.

        Args:
            masks: (units,) bool per group of `graph`, True = keep.
        """
        masks = [mask.cpu() for mask in masks]
        if all(mask.all() for mask in masks):
            return
        self._hooks.close()
        with self.method.cutting(self):
            device = self.device
            here = self.graph.on(device)
            plan = Plan.of(here, masks)
            cut_(self.model, here, plan, optimizer=self.optimizer)
            for follower in self.followers:
                cut_(follower, here, plan)
            self.graph = shrink(self.graph, self.model, masks)
            self.kept = [units[mask] for units, mask in zip(self.kept, masks, strict=True)]
            self.pool.cut(self.graph, masks)
            follow_cut(self.own, masks, self.targets)
        self.passed = []
        if self.wrapped is not None:
            renew_wrapper(self.wrapped)
        self.renew()

    def note(self, counts: Sequence[int], **facts: Any) -> None:
        """Add a point to the history: the step, units of target groups, MACs of layers, costs, and more facts."""
        names = [self.whole.groups[number].name for number in self.targets]
        self.history.append(
            {
                "step": self.step,
                "units": dict(zip(names, (counts[number] for number in self.targets), strict=True)),
                "layers": self.cost.layers(counts),
                "macs": self.cost.macs(counts) / self.dense.macs(),
                "params": self.cost.params(counts) / self.dense.params(),
                **facts,
            }
        )

    @contextmanager
    def gated(self, *gates: Gates) -> Iterator[None]:
        """Put gates on the model and its followers, and take them off again."""
        for one in gates:
            for model in (self.model, *self.followers):
                one.install(model)
        self.gates = gates
        yield
        self.gates = ()
        for one in gates:
            one.remove()

    def renew(self) -> None:
        """Take off the model what the method has put on it, and put it on afresh."""
        self._hooks.close()
        if self._handle is not None:
            move(self.own, self.device)
            self._hooks.enter_context(self.method.attached(self))

    # --- units that leave through the pool -----------------------------------------------------------------

    def standing(self) -> list[int]:
        """Units per group that are not leaving."""
        counts = [len(units) for units in self.kept]
        for number in self.pool.groups:
            counts[number] = int((~self.pool.leaving(number)).sum())
        return counts

    def pick(self, scores: Sequence[Tensor], slack: float) -> list[Tensor]:
        """Which further units must leave, so that what stands costs at most the budget plus some slack.

        Args:
            scores: (units,) per target group; higher = keep. Put on a common scale by the caller.
            slack: from 0, the budget, to 1, the dense model.
        Returns:
            (units,) bool per target group, True = leave.
        """
        ranked = []
        for number, score in zip(self.targets, scores, strict=True):
            score = score.detach().float().cpu().clone()
            score[~self.pool.free(number, self.step)] = torch.finfo(score.dtype).max  # restored not long ago
            score[self.pool.leaving(number)] = -torch.inf  # gone already, as far as budgets are concerned
            ranked.append(score)
        keep = self.choose(ranked, slack)
        for number, score in zip(self.targets, scores, strict=True):
            self.scores[number][self.kept[number]] = score.detach().float().cpu()
        return [~keep[number] & self.pool.free(number, self.step) for number in self.targets]

    def remove(self, chosen: Sequence[Tensor], lengths: Mapping[int, Tensor] | None = None) -> None:
        """Send units on their way out, (units,) bool per target group."""
        for number, mask in zip(self.targets, chosen, strict=True):
            length = None if lengths is None else lengths[number]
            self.pool.start(number, mask, self.step, self.optimizer, length)

    def cut_gone(self) -> None:
        """Cut out what has left."""
        masks = [torch.ones(len(units), dtype=torch.bool) for units in self.kept]
        for number in self.pool.groups:
            masks[number] = ~self.pool.gone(number)
        self.cut(masks)

    # --- files ---------------------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """The method, its options and what it was started with, as plain JSON."""
        budget = self.budget.bounds if self.budget else None
        return self.method.record() | {"steps": self.steps, "budget": budget}

    def plan(self) -> Plan:
        """What has been removed so far, of the model at the start."""
        masks = [torch.zeros(group.units, dtype=torch.bool) for group in self.whole.groups]
        for mask, units in zip(masks, self.kept, strict=True):
            mask[units] = True
        return Plan.of(self.whole, masks, self.record() | self.rounding)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that evolves: tensors, and plain JSON."""
        return save_state({name: getattr(self, name) for name in _SAVED})

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Go on from a state: the model gets the shapes it had then; its weights are for the caller to load."""
        masks = []
        for number, group in enumerate(self.whole.groups):
            mask = torch.zeros(group.units, dtype=torch.bool)
            mask[tensors[f"kept.{number}"]] = True
            masks.append(mask)
        self.cut(masks)
        for name, value in load_state({name: getattr(self, name) for name in _SAVED}, tensors, facts).items():
            setattr(self, name, value)
