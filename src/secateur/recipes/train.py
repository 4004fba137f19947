"""The one training loop: from scratch, fine-tuning, distillation; on one process or several.

Started by `torchrun` or `accelerate launch --multi_gpu`, each process works on its part of every batch, and
the result is that of one process. A run that is killed goes on from its last checkpoint as if nothing had
happened.
"""

import contextlib
import re
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.engine.session import Session
from secateur.errors import ModelError, TrainingError, first_line
from secateur.files import remove_unfinished
from secateur.graph.duplicate import duplicate
from secateur.graph.modes import chance_kept, device_of, evaluating, few_channels_planar, modes_kept
from secateur.recipes.checkpoint import Epoch, State
from secateur.recipes.data import Batches, Dataset, Split
from secateur.recipes.parallel import WholeBatchNorm, add_gradients, end_group_at_exit, share_weights
from secateur.recipes.train_config import TrainConfig, image_side, learning_rate
from secateur.recipes.train_log import TrainLog

__all__ = [
    "Epoch",
    "Evaluation",
    "FitResult",
    "TrainConfig",
    "evaluate",
    "fit",
    "learning_rate",
    "training_steps",
]

_LOOK_EVERY = 50  # steps between looks at the loss: each one waits for the device


@dataclass(frozen=True)
class Evaluation:
    """How well a model does on a split.

    Args:
        accuracy: fraction classified correctly, 0..1.
        loss: mean cross-entropy, in nats.
        answers: (n,), int64, the class that the model names for each image, on the CPU.
        confidences: (n,), float32, the probability that it gives it.
    """

    accuracy: float
    loss: float
    answers: Tensor = field(repr=False, compare=False)
    confidences: Tensor = field(repr=False, compare=False)


@dataclass(frozen=True)
class FitResult:
    """What a training came to.

    Args:
        accuracy: fraction of the test images classified correctly at the end, 0..1.
        seconds: time for all epochs, those before an interruption included.
        history: every epoch.
    """

    accuracy: float
    seconds: float
    history: tuple[Epoch, ...]


def evaluate(
    model: nn.Module,
    data: Dataset,
    split: Literal["train", "test"] = "test",
    *,
    batch_size: int | None = None,
    channels_last: bool = True,
) -> Evaluation:
    """Measure a model, in eval mode and float32, on the device it is on; its mode is restored.

    Args:
        model: images (n, c, h, w) to logits (n, classes).
        data: what to measure on.
        split: which part of it.
        batch_size: images at a time; None: as many as suit their size and the device, at most 500.
        channels_last: lay the images out as n h w c; the weights stay as they are.
    Raises:
        ModelError: the model does not return one logit per class.
    """
    part: Split = getattr(data, split)
    device = device_of(model)
    batches = Batches(
        part,
        batch_size=batch_size or _test_batch(part, device),
        normalisation=data.normalisation,
        device=device,
        channels_last=channels_last,
    )
    sums, found = torch.zeros(2, device=batches.device), []
    with evaluating(model):
        for logits, y in _tested(model, batches, len(data.classes)):
            sums += _loss_and_correct(logits, y)
            found.append((logits.argmax(1).cpu(), logits.softmax(1).amax(1).cpu()))
    loss, correct = sums.tolist()
    return Evaluation(
        accuracy=correct / len(part),
        loss=loss / len(part),
        answers=torch.cat([answers for answers, _ in found]),
        confidences=torch.cat([confidences for _, confidences in found]),
    )


def fit(
    model: nn.Module,
    data: Dataset,
    config: TrainConfig,
    folder: str | Path,
    *,
    teacher: nn.Module | None = None,
    session: Session[Any] | None = None,
    resume: bool = False,
    phase: str = "train",
    first_epoch: int = 0,
    progress: bool = True,
) -> FitResult:
    """Train a model in place.

    It ends in the modes and on the device it came with; what is frozen (`requires_grad` False) stays so. The
    weights may be left in the channels-last layout, which changes no value.

    In `folder` the phase leaves `metrics.jsonl`, one line per epoch beside those of other phases;
    `<phase>.checkpoint.safetensors`; and scalars under `tensorboard/<phase>` if TensorBoard is installed. On the
    CPU a run that was killed and resumed equals an uninterrupted one bit for bit, but for the times.

    Args:
        model: images (n, c, h, w) to logits (n, classes).
        data: images to learn from and to test on.
        config: how to train.
        folder: where the files go; it is made if need be, and all processes must see it.
        teacher: whose logits to approach, if `config.distill_weight` says so; not changed.
        session: prunes the model meanwhile; started for this model and `training_steps(data, config)` steps. Its
            `finish` is left to the caller.
        resume: go on from the phase's checkpoint, if there is one; a phase that is done is not repeated.
            Otherwise the phase's earlier files in `folder` are replaced.
        phase: names this training among others in the same folder.
        first_epoch: epochs that the model has seen of this order of the images before, in another phase.
        progress: show a progress bar, if this is a terminal.
    Raises:
        TrainingError: the settings do not fit together, or the loss stopped being a finite number. The model
            then holds useless weights, but the last checkpoint good ones.
        ModelError: the model does not return one logit per class.
        FileError: a file cannot be written, or the checkpoint is damaged or of another run.
    """
    from accelerate import Accelerator

    # without `cpu=True` processes started on a machine that has only CPUs would not know of each other
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    end_group_at_exit()
    _check_fit(config, teacher, phase, accelerator)
    if session is not None and (session.model is not model or session.steps != training_steps(data, config)):
        raise TrainingError(
            f"fit: the session is for {'this' if session.model is model else 'another'} model and {session.steps} "
            f"steps; expected this model and {training_steps(data, config)} steps (see training_steps)."
        )
    device, rank, world_size = accelerator.device, accelerator.process_index, accelerator.num_processes
    share: dict[str, Any] = {
        "normalisation": data.normalisation,
        "rank": rank,
        "world_size": world_size,
        "device": device,
        "channels_last": config.channels_last,
    }
    batches = Batches(
        data.train,
        batch_size=config.batch_size,
        augment=data.augment,
        shuffle=True,
        alternate_flips=config.alternate_flips,
        seed=config.seed,
        **share,
    )
    test_batches = Batches(data.test, batch_size=_test_batch(data.test, device) * world_size, **share)
    classes, steps = len(data.classes), config.epochs * len(batches)
    checkpoint = Path(folder) / f"{phase}.checkpoint.safetensors"

    with contextlib.ExitStack() as stack:
        stack.enter_context(_lent(model, device, config.channels_last))
        if teacher is not None:
            stack.enter_context(_lent(teacher, device, config.channels_last)).eval()
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        if world_size > 1:
            stack.enter_context(WholeBatchNorm())
            share_weights(model)

        least_side = 1 if config.initial_size == 1 else _least_side(model, config, steps, batches)
        compiled = config.compile and session is None
        forward = _compiled(model) if compiled else model
        teacher_forward = _compiled(teacher) if compiled and teacher is not None else teacher
        average = duplicate(model) if config.ema is not None else None
        optimizer = _optimizer(model, config)
        if session is not None:
            session.attach(optimizer, followers=() if average is None else (average,))
        tally = torch.zeros(2, len(batches), device=device)
        state = State(model, optimizer, average, session, tally)
        run = _description(model, data, config, phase, session) | {"first_epoch": first_epoch}
        if resume and checkpoint.exists():
            state.load(checkpoint, run)
            if rank > 0:
                state.tally.zero_()  # the sum over all processes is with the first one
        if session is not None:
            stack.enter_context(session)
        log = None
        if rank == 0:
            remove_unfinished(checkpoint.parent, checkpoint.stem)  # of a run that was killed while it wrote
            log = stack.enter_context(TrainLog(Path(folder), phase, state, config.epochs, progress))
            if state.epoch == state.batch == 0:  # keep the initial weights: all later ones follow from them
                state.save(checkpoint, run)

        while state.epoch < config.epochs:
            started = time.perf_counter() - state.seconds
            model.train()
            for x, y in batches.epoch(first_epoch + state.epoch, start_batch=state.batch):
                step = state.epoch * len(batches) + state.batch
                drawn = f"{config.seed} {first_epoch * len(batches) + step} {rank}"
                torch.manual_seed(zlib.crc32(drawn.encode()))
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(config, step, steps)

                x = _resized(x, max(least_side, image_side(config, step, steps, x.shape[-1])))
                with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                    logits = _logits(model, x, forward(x), classes)
                    target = None
                    if teacher is not None and teacher_forward is not None:
                        with torch.no_grad():
                            target = _logits(teacher, x, teacher_forward(x), classes)
                losses = _losses(logits, y, target, config)
                optimizer.zero_grad()
                images = min(config.batch_size, len(data.train) - state.batch * config.batch_size)
                loss = losses.sum() / images
                torch.autograd.backward(loss if session is None else loss + session.penalty() / world_size)
                if world_size > 1:
                    add_gradients([*model.parameters(), *(session.parameters() if session else ())])
                if session is not None:
                    session.before_step()
                if config.clip_norm is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
                optimizer.step()
                if session is not None:
                    session.after_step()
                if average is not None and config.ema is not None:
                    _follow(average, model, min(config.ema, (1 + step) / (10 + step)))

                correct = (logits.detach().argmax(1) == y).sum()
                state.tally[:, state.batch] = torch.stack([losses.detach().sum(), correct])
                state.batch += 1
                saves = (step + 1) % config.checkpoint_every == 0
                if saves or (step + 1) % _LOOK_EVERY == 0:
                    _sum_up(state, config, accelerator)
                if log:
                    state.seconds = time.perf_counter() - started
                    log.step()
                    if saves:
                        state.save(checkpoint, run)

            mean_loss, correct = (
                _sum_up(state, config, accelerator).double().sum(1) / len(data.train)
            ).tolist()
            trained = time.perf_counter() - started
            accuracy = None
            if state.epoch + 1 == config.epochs or (state.epoch + 1) % config.test_every == 0:
                tested_model = model if average is None else average
                tested = _measure(tested_model.eval(), test_batches, classes)
                accuracy = accelerator.reduce(tested, "sum").tolist()[1] / len(data.test)
            state.epoch, state.batch, state.seconds = state.epoch + 1, 0, 0.0
            state.tally.zero_()
            state.history.append(
                Epoch(
                    phase=phase,
                    epoch=state.epoch,
                    step=state.epoch * len(batches),
                    loss=mean_loss,
                    train_accuracy=correct,
                    accuracy=accuracy,
                    lr=optimizer.param_groups[0]["lr"],
                    seconds=time.perf_counter() - started,
                    images_per_second=len(data.train) / trained,
                )
            )
            if log:
                log.epoch(state.history)
                if state.epoch == config.epochs:
                    state.save(checkpoint, run)

        if average is not None:
            _follow(model, average, 0.0)
    last = state.history[-1].accuracy
    assert last is not None  # the last epoch is always tested
    return FitResult(
        accuracy=last,
        seconds=sum(epoch.seconds for epoch in state.history),
        history=tuple(state.history),
    )


def _check_fit(config: TrainConfig, teacher: nn.Module | None, phase: str, accelerator: Any) -> None:
    if accelerator.num_processes > 1 and not accelerator.distributed_type.startswith("MULTI_"):
        raise TrainingError(
            f"fit: launched with {accelerator.distributed_type}; expected plain data parallelism, because "
            f"each process must hold the whole model. Use `torchrun` or `accelerate launch --multi_gpu`."
        )
    if (teacher is not None) != (config.distill_weight > 0):
        raise TrainingError(
            f"fit: distill_weight is {config.distill_weight} with {'a' if teacher is not None else 'no'} "
            f"teacher; pass a teacher and a weight above 0, or neither."
        )
    if config.compile and accelerator.num_processes > 1:
        raise TrainingError("fit: compile is for training on one process; leave it out, or use one device.")
    if not re.fullmatch(r"\w[\w.-]*", phase):
        raise TrainingError(f"fit: phase is {phase!r}; expected letters, digits, '.', '_' and '-'.")


def training_steps(data: Dataset, config: TrainConfig) -> int:
    """Optimizer steps of a whole training."""
    return config.epochs * -(-len(data.train) // config.batch_size)


def _description(
    model: nn.Module, data: Dataset, config: TrainConfig, phase: str, session: Session[Any] | None
) -> dict[str, Any]:
    """What a run is, as JSON: only a run of the same description may go on from its checkpoint."""
    parameters = dict(model.named_parameters())
    return ({"method": session.record()} if session is not None else {}) | {
        "phase": phase,
        "config": asdict(config) | {"milestones": list(config.milestones)},
        "data": {
            "name": data.name,
            "augment": data.augment,
            "train_images": len(data.train),
            "test_images": len(data.test),
            "checksum": data.train.checksum(),
        },
        "model": {
            name: f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}"
            + (" frozen" if name in parameters and not parameters[name].requires_grad else "")
            for name, t in model.state_dict().items()
        },
    }


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise TrainingError("fit: all parameters are frozen; set requires_grad on those to train.")
    decayed = [p for p in trainable if config.decay_all or p.ndim > 1]
    free = [p for p in trainable if not (config.decay_all or p.ndim > 1)]
    groups = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((decayed, config.weight_decay), (free, 0.0))
        if parameters
    ]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)


def _compiled(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The model's forward through `torch.compile`, for fixed batch sizes; the model itself stays as it is."""
    from torch._dynamo.exc import TorchDynamoException

    compiled = torch.compile(model, dynamic=False)

    def forward(x: Tensor) -> Tensor:
        try:
            y: Tensor = compiled(x)
        except TorchDynamoException as error:
            raise TrainingError(
                f"fit: torch.compile cannot compile {type(model).__name__} here. Train without compile, or do what "
                f"it says (on CPUs it needs a C++ compiler): {first_line(error)}"
            ) from error
        return y

    return forward


def _least_side(model: nn.Module, config: TrainConfig, steps: int, batches: Batches) -> int:
    """The smallest side, of those that the images have in this run, that the model takes."""
    x, _ = next(iter(batches))
    sides = sorted({image_side(config, step, steps, x.shape[-1]) for step in range(steps)})
    with evaluating(model), chance_kept(), torch.no_grad():
        for side in sides[:-1]:
            with contextlib.suppress(Exception):  # whatever its own code raises
                model(_resized(x[:1], side))
                return side
    return sides[-1]


def _resized(images: Tensor, side: int) -> Tensor:
    """Square images, (n, c, h, h), at another side; as they are, if they have it."""
    if images.shape[-1] == side:
        return images
    shape = (round(images.shape[-2] * side / images.shape[-1]), side)
    layout = (
        torch.channels_last
        if images.is_contiguous(memory_format=torch.channels_last)
        else torch.contiguous_format
    )
    return F.interpolate(images, shape, mode="bilinear", antialias=True).contiguous(memory_format=layout)


def _logits(model: nn.Module, x: Tensor, logits: Any, classes: int) -> Tensor:
    """What the model made of images, checked, in float32."""
    if not isinstance(logits, Tensor) or logits.shape != (len(x), classes):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(
            f"{type(model).__name__}: returned {found} for images {tuple(x.shape)}; expected logits "
            f"{(len(x), classes)}. Build the model for {classes} classes."
        )
    return logits.float()


def _losses(logits: Tensor, y: Tensor, target: Tensor | None, config: TrainConfig) -> Tensor:
    """The loss of each image: cross-entropy, or a blend of it with the distance to the teacher.

        (1 − w) · CE(y, p) + w · T² · KL(softmax(target / T) ‖ softmax(logits / T))

    Args:
        logits: (n, classes).
        y: (n,), int64.
        target: the teacher's logits (n, classes), if there is one.
        config: w is `distill_weight`, T is `distill_temperature`; CE has `label_smoothing`.
    Returns:
        (n,), float32.
    Source: Hinton et al. 2015, arXiv:1503.02531, sec. 2.
    """
    losses = F.cross_entropy(logits, y, label_smoothing=config.label_smoothing, reduction="none")
    if target is None:
        return losses
    t = config.distill_temperature
    ours, theirs = F.log_softmax(logits / t, 1), F.log_softmax(target / t, 1)
    distance = F.kl_div(ours, theirs, log_target=True, reduction="none").sum(1) * t**2
    return torch.lerp(losses, distance, config.distill_weight)


def _follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average ← decay · average + (1 − decay) · model, for weights and buffers; counts are copied."""
    pairs = list(zip(average.state_dict().values(), model.state_dict().values(), strict=True))
    floats = [(a, m) for a, m in pairs if a.is_floating_point()]
    torch._foreach_lerp_([a for a, _ in floats], [m for _, m in floats], 1 - decay)
    for a, m in pairs:
        if not a.is_floating_point():
            a.copy_(m)


def _sum_up(state: State, config: TrainConfig, accelerator: Any) -> Tensor:
    """Loss and number correct of the epoch's batches, over all processes: (2, batches), on the CPU.

    The first process is left with the sum, the others with nothing, so that a checkpoint of the first one
    is complete.

    Raises:
        TrainingError: a loss or a weight is not finite. All processes see the same sum, so all stop.
    """
    totals: Tensor = accelerator.reduce(state.tally, "sum")
    state.tally.copy_(totals if accelerator.is_main_process else torch.zeros_like(totals))
    finite = torch.stack([p.detach().isfinite().all() for p in state.model.parameters()]).all()
    totals = totals.cpu()
    bad = (~totals[0].isfinite()).nonzero().flatten().tolist()
    if bad or not finite:
        first = bad[0] + 1 if bad else state.batch
        raise TrainingError(
            f"epoch {state.epoch + 1}, batch {first} of {totals.shape[1]}: the "
            f"{'loss' if bad else 'weights'} became infinite or not a number. Lower lr (now {config.lr}), "
            f"set clip_norm, add warmup_epochs, or use precision 'no'. The last checkpoint is from before."
        )
    return totals


def _test_batch(split: Split, device: torch.device) -> int:
    """Images at a time in evaluation."""
    pixels = 2**18 if device.type == "cpu" else 2**23  # on a processor, what fits into its caches is fastest
    height, width = split.images.shape[-2:]
    return max(1, min(500, pixels // (height * width)))


@torch.no_grad()  # not inference_mode: a tensor that the model caches now must serve in training later
def _tested(model: nn.Module, batches: Batches, classes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and labels of this process's part, batch by batch."""
    for x, y in batches:
        yield _logits(model, x, model(x), classes), y


def _loss_and_correct(logits: Tensor, y: Tensor) -> Tensor:
    """Sums over a batch: cross-entropy and number correct."""
    return torch.stack([F.cross_entropy(logits, y, reduction="sum"), (logits.argmax(1) == y).sum()])


def _measure(model: nn.Module, batches: Batches, classes: int) -> Tensor:
    """Sums over this process's part: cross-entropy and number correct."""
    sums = torch.zeros(2, device=batches.device)
    for logits, y in _tested(model, batches, classes):
        sums += _loss_and_correct(logits, y)
    return sums


@contextlib.contextmanager
def _lent(model: nn.Module, device: torch.device, channels_last: bool) -> Iterator[nn.Module]:
    """The model on another device; at the end back, in its modes and without gradients."""
    home = device_of(model)
    with modes_kept(model), few_channels_planar(model):
        try:
            model.to(device)
            yield model.to(memory_format=torch.channels_last) if channels_last else model
        finally:
            model.to(home).zero_grad()
