"""Single weights that are zero: masks, what holds them during training, and their file.

Scattered zeros make a model smaller on disk, not faster: dense kernels multiply by them all the same. What
does run faster, on GPUs that have it, is two of every four (`pattern="2:4"`), see `to_semi_structured_`.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from secateur import __version__
from secateur.errors import CutError, FileError, PlanError
from secateur.files import read_tensors, write_tensors
from secateur.graph import fingerprint
from secateur.plan.bits import pack, unpack

FORMAT = "secateur-masks-1"


@dataclass(frozen=True, repr=False)
class WeightPlan:
    """Which single weights of one model go. Like `Plan`, it knows no module.

    Attributes:
        fingerprint: of the model the plan was made for.
        masks: parameter name -> bool of its shape, True = keep; parameters that stay whole may be left out.
        origin: how the plan was made, for people and reports.
    """

    fingerprint: str
    masks: Mapping[str, Tensor]
    origin: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        gone = f"{self.weights - self.kept:,} of {self.weights:,} weights"
        return f"<WeightPlan: {gone} go, from {len(self.masks)} tensors>"

    @classmethod
    def of(
        cls, model: nn.Module, masks: Mapping[str, Tensor], origin: Mapping[str, Any] | None = None
    ) -> "WeightPlan":
        """The plan that keeps the weights marked True."""
        plan = cls(fingerprint(model), {n: m.cpu() for n, m in masks.items()}, dict(origin or {}))
        plan.check(model)
        return plan

    @property
    def weights(self) -> int:
        """Weights of the parameters that have a mask."""
        return sum(mask.numel() for mask in self.masks.values())

    @property
    def kept(self) -> int:
        """Those of them that stay."""
        return sum(int(mask.sum()) for mask in self.masks.values())

    def check(self, model: nn.Module) -> None:
        """Raise PlanError unless the plan fits the model."""
        if self.fingerprint != fingerprint(model):
            raise PlanError(
                f"the masks were made for model {self.fingerprint}, this one is {fingerprint(model)}: names or "
                f"shapes of its tensors differ. Apply them to the model they were made for."
            )
        own = dict(model.named_parameters())
        for name, mask in self.masks.items():
            if name not in own or mask.dtype != torch.bool or mask.shape != own[name].shape:
                found = f"{mask.dtype} {tuple(mask.shape)}"
                raise PlanError(
                    f"mask of {name!r} is {found}; expected torch.bool "
                    f"{tuple(own[name].shape) if name in own else 'for a parameter of the model'}"
                )

    def apply_(self, model: nn.Module) -> nn.Module:
        """Set the weights that go to zero; everything else stays as it is."""
        self.check(model)
        own = dict(model.named_parameters())
        with torch.no_grad():
            for name, mask in self.masks.items():
                own[name].masked_fill_(~mask.to(own[name].device), 0.0)
        return model

    @contextlib.contextmanager
    def holding(self, model: nn.Module) -> Iterator[nn.Module]:
        """Within the context every step of an optimizer leaves the weights that go at exactly zero.

        It holds in any training loop, on every process of a distributed one, and after a resume, since all
        it needs is the masks.
        """
        self.apply_(model)
        own = dict(model.named_parameters())
        held = {own[name]: mask for name, mask in self.masks.items() if not mask.all()}
        gone: dict[Tensor, Tensor] = {}

        def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            with torch.no_grad():
                for group in optimizer.param_groups:
                    for p in group["params"]:
                        if p in held:
                            if p not in gone or gone[p].device != p.device:
                                gone[p] = ~held[p].to(p.device)
                            p.masked_fill_(gone[p], 0.0)

        handle = register_optimizer_step_post_hook(after)
        try:
            yield model
        finally:
            handle.remove()

    def save(self, path: str | Path) -> None:
        """Write the masks, one bit per weight, as safetensors.

        Raises:
            FileError: it cannot be written; a file of that name stays as it was.
        """
        shapes = {name: list(mask.shape) for name, mask in self.masks.items()}
        metadata = {
            "secateur": __version__,
            "format": FORMAT,
            "plan": json.dumps(
                {"fingerprint": self.fingerprint, "shapes": shapes, "origin": dict(self.origin)}
            ),
        }
        write_tensors(path, {name: pack(mask) for name, mask in self.masks.items()}, metadata)

    @classmethod
    def load(cls, path: str | Path) -> "WeightPlan":
        """Read masks.

        Raises:
            FileError: the file is missing, truncated, or holds something else.
        """
        tensors, metadata = read_tensors(path)
        if metadata.get("format") != FORMAT:
            raise FileError(
                f"{path}: format {metadata.get('format')!r}, expected {FORMAT!r}: not a file of masks"
            )
        try:
            plan = json.loads(metadata["plan"])
            shapes = {str(name): tuple(int(n) for n in shape) for name, shape in plan["shapes"].items()}
            if shapes.keys() != tensors.keys():
                raise ValueError("names of masks and of shapes differ")
            masks = {name: unpack(tensors[name], shape) for name, shape in shapes.items()}
            return cls(str(plan["fingerprint"]), masks, dict(plan["origin"]))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise FileError(f"{path}: its masks are damaged ({error!r}); use another copy") from None


def top(score: Tensor, count: int) -> Tensor:
    """Mask of the `count` weights of highest score; of equals, the first in memory order of the indices.

    >>> top(torch.tensor([[1., 3.], [3., 2.]]), 2)
    tensor([[False,  True],
            [ True, False]])
    """
    mask = torch.zeros(score.numel(), dtype=torch.bool)
    mask[score.flatten().sort(descending=True, stable=True).indices[:count]] = True
    return mask.view(score.shape)


def pattern_mask(score: Tensor, n: int, m: int) -> Tensor | None:
    """Mask that keeps the best n of every m weights that follow one another within an output's weights.

    Args:
        score: (o, …), of a weight; higher = keep.
    Returns:
        bool of the same shape; None if an output's weights are not a multiple of m, which kernels need.

    >>> pattern_mask(torch.tensor([[4., 1., 2., 3.]]), 2, 4)
    tensor([[ True, False, False,  True]])
    """
    if score.ndim < 2 or score[0].numel() % m:
        return None
    rows = score.reshape(-1, m)
    order = rows.sort(dim=1, descending=True, stable=True).indices[:, :n]
    return torch.zeros(rows.shape, dtype=torch.bool).scatter_(1, order, True).view(score.shape)


def to_semi_structured_(model: nn.Module) -> list[str]:
    """Let linear layers whose weights follow the 2:4 pattern run on sparse tensor cores.

    Needs a CUDA device of compute capability 8.0 or higher, float16 or bfloat16 weights, and sizes that are
    multiples of 64. Convolutions stay dense: PyTorch has no such kernel for them.

    Returns:
        names of the layers that changed.
    Raises:
        CutError: the model is not on such a device.
    """
    device = next(model.parameters()).device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        raise CutError(
            f"2:4 kernels need a CUDA GPU of compute capability 8.0 or higher; the model is on {device}"
        )
    changed = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.weight.dtype in (torch.float16, torch.bfloat16):
            w = module.weight.detach()
            fits = w.shape[0] % 64 == 0 and w.shape[1] % 64 == 0
            if fits and ((w.view(-1, 4) != 0).sum(1) <= 2).all():
                module.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(w), requires_grad=False)
                changed.append(name)
    return changed
