"""Distortion curves: how far the output moves when one layer alone is pruned to each of several levels."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.allocate.knapsack import Curve
from secateur.errors import FileError, ScoreError, SecateurError, unknown
from secateur.files import read_tensors, write_tensors
from secateur.graph import Inputs, named_tensors
from secateur.graph.capture import batch_of
from secateur.graph.replay import Outputs, Replay, Tensors, floats

KEPT = 2**28
"""Bytes of outputs that are kept; where they are more, they are computed again."""

FORMAT = "secateur-curves-1"


def squared(dense: Tensor, pruned: Tensor) -> Tensor:
    """Mean over the logits of the squared difference: (n, …) twice -> (n,).

    Source: Xu et al. 2023, arXiv:2308.10438. Differs: nothing.
    """
    return (dense - pruned).square().flatten(1).mean(1)


def divergence(dense: Tensor, pruned: Tensor) -> Tensor:
    """Kullback–Leibler divergence of the pruned network's class probabilities from the dense one's.

    (n, classes, …) twice -> (n,), a mean over positions where there are any.

    Source: none of its own; the logits' distance as the loss of distillation sees it. Differs: nothing.
    """
    p, q = dense.log_softmax(1), pruned.log_softmax(1)
    return (p.exp() * (p - q)).sum(1, keepdim=True).clamp_min(0).flatten(1).mean(1)


def variation(dense: Tensor, pruned: Tensor) -> Tensor:
    """Total variation between the class probabilities of the two networks, 0 to 1; shapes as for `divergence`.

        1/2 * sum over classes of |p - q|

    No event, such as the right class being drawn, differs more in probability; being a distance, that of
    several changes together is at most the sum of each one's, where changes act alike in either order.

    Source: none of its own. Differs: nothing.
    """
    return 0.5 * (dense.softmax(1) - pruned.softmax(1)).abs().sum(1, keepdim=True).flatten(1).mean(1)


def relative(dense: Tensor, pruned: Tensor) -> Tensor:
    """Mean squared difference as a share of the variance of the dense output: (n, …) twice -> (n,).

    Source: none of its own. Differs: nothing.
    """
    return squared(dense, pruned) / dense.var(correction=0).clamp_min(1e-12)


DISTORTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": divergence,
    "logits": squared,
    "variation": variation,
    "relative": relative,
}
"""(dense output, pruned output), one tensor each -> one number per image."""

DISTANCES = ("auto", *DISTORTIONS)
"""What the option `distortion` may be: "auto" is kl for one tensor of class scores, (n, classes), else relative."""


def distance_named(name: str, outputs: Outputs) -> str:
    """The distance that a name stands for, given outputs of the model.

    Raises:
        SecateurError: there is none of this name.
        ScoreError: it needs class scores, and an output has none.
    """
    found = floats(outputs)
    if name == "auto":
        name = "kl" if len(found) == 1 and found[0].ndim == 2 and found[0].shape[1] > 1 else "relative"
    if name not in DISTORTIONS:
        raise SecateurError(unknown("distortion", name, DISTORTIONS))
    if name in ("kl", "variation") and any(x.ndim < 2 for x in found):
        shapes = ", ".join(str(tuple(x.shape)) for x in found)
        raise ScoreError(
            f"distortion {name!r} compares class scores (n, classes, …), and the outputs are {shapes}; take 'relative'"
        )
    return name


def moved(name: str, dense: Outputs, pruned: Outputs, images: int) -> Tensor:
    """How far the outputs moved, per image, (n,): summed over all floating-point tensors.

    A tensor whose first dim does not count the images counts as a whole, alike for each of them.
    """
    total = torch.zeros(images, dtype=torch.float64)
    for a, b in zip(floats(dense), floats(pruned), strict=True):
        each = a.ndim > 0 and len(a) == images
        a, b = (x.float() if each else x.float()[None] for x in (a, b))
        if a.ndim == 1:
            a, b = a[:, None], b[:, None]
        total += DISTORTIONS[name](a, b).double().cpu()
    return total


REDUCTIONS: dict[str, Callable[[npt.NDArray[np.float64]], float]] = {
    "max": lambda values: float(values.max()),
    "mean": lambda values: float(values.mean()),
}
"""From one number per image to one."""


@dataclass(frozen=True)
class Curves:
    """What each level of each layer does to the output.

    Attributes:
        names: of layers or groups.
        kept: per layer (levels,), weights or units that stay; descending, level 0 keeps all.
        images: per layer (levels, n), the distortion of every image.
        key: of the weights, images and settings they were measured with.
    """

    names: tuple[str, ...]
    kept: tuple[npt.NDArray[np.int64], ...]
    images: tuple[npt.NDArray[np.float64], ...]
    key: str

    def reduced(self, reduction: str = "mean") -> list[Curve]:
        """One number per level: zero at level 0, never falling as more is removed."""
        if reduction not in REDUCTIONS:
            raise SecateurError(unknown("reduction", reduction, REDUCTIONS))
        reduce = REDUCTIONS[reduction]
        curves = []
        for images in self.images:
            values = np.array([reduce(level) for level in images])
            values[0] = 0.0
            curves.append(np.maximum.accumulate(values))
        return curves

    def rows(self) -> list[dict[str, Any]]:
        """What reports show, plain JSON: per layer its name, what it keeps at each level, and the mean distortion."""
        return [
            {"layer": name, "kept": kept.tolist(), "distortion": values.tolist()}
            for name, kept, values in zip(self.names, self.kept, self.reduced(), strict=True)
        ]

    def save(self, path: str | Path) -> None:
        """Write the curves as one safetensors file."""
        tensors = {}
        for number, (kept, images) in enumerate(zip(self.kept, self.images, strict=True)):
            tensors[f"{number}.kept"] = torch.from_numpy(kept.copy())
            tensors[f"{number}.images"] = torch.from_numpy(images.copy())
        write_tensors(path, tensors, {"format": FORMAT, "key": self.key, "names": json.dumps(self.names)})

    @classmethod
    def load(cls, path: str | Path, key: str) -> "Curves":
        """Read curves back, if they are those of `key`.

        Raises:
            FileError: the file is missing or damaged, or of other weights, images or settings.
        """
        tensors, metadata = read_tensors(path)
        if metadata.get("format") != FORMAT:
            raise FileError(
                f"{path}: format {metadata.get('format')!r}, expected {FORMAT!r}: not a file of curves"
            )
        if metadata.get("key") != key:
            raise FileError(
                f"{path}: its curves were measured with other weights, images or settings. Measure them again: "
                f"remove the file or name another."
            )
        try:
            names = tuple(str(name) for name in json.loads(metadata["names"]))
            kept = tuple(tensors[f"{i}.kept"].numpy() for i in range(len(names)))
            images = tuple(tensors[f"{i}.images"].numpy() for i in range(len(names)))
            if any(len(k) != len(v) or v.ndim != 2 for k, v in zip(kept, images, strict=True)):
                raise ValueError("levels and distortions differ in number")
        except (KeyError, ValueError, TypeError) as error:
            raise FileError(f"{path}: its curves are damaged ({error!r}); remove the file") from None
        return cls(names, kept, images, key)

    @classmethod
    def once(cls, where: str | Path | None, key: str, compute: "Callable[[], Curves]") -> "Curves":
        """Read the curves of `key`, or compute them and keep them.

        Args:
            where: the file; or a folder, in which curves of any key have files of their own; None: none is kept.
        Raises:
            FileError: see `load`.
        """
        if where is None:
            return compute()
        path = Path(where)
        if path.is_dir():
            path = path / f"curves-{key[:16]}.safetensors"
        if path.exists():
            return cls.load(path, key)
        found = compute()
        found.save(path)
        return found


def key_of(model: nn.Module, batches: Sequence[Inputs], settings: Mapping[str, Any]) -> str:
    """Hash of all weights and buffers, all calibration images, and the settings."""
    found = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(named_tensors(model), key=lambda pair: pair[0]):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(_bytes(tensor))
    for x in pytree.tree_leaves(list(batches)):
        found.update(_bytes(x) if isinstance(x, Tensor) else repr(x).encode())
    return found.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    plain = tensor.detach().cpu().contiguous()
    return plain.view(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def measure(
    program: Replay,
    batches: Sequence[Inputs],
    candidates: Sequence[Sequence[Tensors]],
    *,
    distortion: str = "auto",
    base: Tensors | None = None,
    batched: int = 1,
    tick: Callable[[], None] | None = None,
) -> list[npt.NDArray[np.float64]]:
    """The distortion of every candidate on every image; the reference is always the dense model.

    What lies before a layer is run once for all its levels.

    Args:
        program: of the dense model.
        batches: calibration images.
        candidates: per layer, the tensors of each level.
        distortion: a name in `DISTANCES`.
        base: tensors that the network already differs in.
        batched: levels of one layer that share a pass.
        tick: is called after every pass.
    Returns:
        (levels, images) per layer.
    """
    found: list[list[list[Tensor]]] = [[[] for _ in levels] for levels in candidates]
    with torch.no_grad():
        for x in batches:
            reference = program(x)
            name = distance_named(distortion, reference)
            for layer, level, output in program.variants(x, candidates, base, batched=batched):
                found[layer][level].append(moved(name, reference, output, batch_of(x)))
                if tick:
                    tick()
    images = sum(batch_of(x) for x in batches)
    return [
        np.stack([torch.cat(level).numpy() for level in levels]) if levels else np.zeros((0, images))
        for levels in found
    ]


def references(program: Replay, batches: Sequence[Inputs]) -> list[Outputs] | None:
    """The dense model's outputs, for `joint`; None if they are too many bytes to keep."""
    found, size = [], 0
    with torch.no_grad():
        for x in batches:
            found.append(program(x))
            size += sum(z.nbytes for z in floats(found[-1]))
            if size > KEPT:
                return None
    return found


def joint(
    program: Replay,
    batches: Sequence[Inputs],
    tensors: Tensors,
    *,
    distortion: str = "auto",
    dense: Sequence[Outputs] | None = None,
) -> npt.NDArray[np.float64]:
    """The distortion of one pruned network on every image, (n,).

    Args:
        program, batches, distortion: as for `measure`.
        tensors: of the pruned network.
        dense: from `references`, or computed here.
    """
    values = []
    with torch.no_grad():
        for number, x in enumerate(batches):
            reference = program(x) if dense is None else dense[number]
            name = distance_named(distortion, reference)
            values.append(moved(name, reference, program(x, tensors), batch_of(x)))
    return np.asarray(torch.cat(values).numpy())


def geometric(size: int, levels: int, least: int) -> npt.NDArray[np.int64]:
    """Numbers of weights to keep, from all to `least`, by equal ratios.

    >>> geometric(1000, 4, 1).tolist()
    [1000, 100, 10, 1]
    """
    return np.unique(np.round(np.geomspace(size, least, levels)).astype(np.int64))[::-1].copy()


def even(size: int, levels: int, least: int) -> npt.NDArray[np.int64]:
    """Numbers of weights to keep, from all to `least`, by equal differences.

    >>> even(100, 5, 1).tolist()
    [100, 75, 50, 25, 1]
    """
    removed = np.floor(np.linspace(0, size, levels)).astype(np.int64)
    return np.unique(np.maximum(size - removed, least))[::-1].copy()


def interpolated(
    kept: npt.NDArray[np.int64], curve: Curve, points: int
) -> tuple[npt.NDArray[np.int64], Curve]:
    """A curve at more levels: its logarithm is linear in the logarithm of what is kept, so it stays monotone.

    Args:
        kept: (levels,), descending.
        curve: (levels,), zero at level 0, not falling.
        points: how many levels to make of it, the measured ones among them.
    Returns:
        kept and distortion at each of them.
    """
    grid = np.unique(
        np.concatenate([np.round(np.geomspace(kept[0], kept[-1], points)).astype(np.int64), kept])
    )[::-1].copy()
    return grid, at_levels(kept, curve, grid)


def at_levels(kept: npt.NDArray[np.int64], curve: Curve, grid: npt.NDArray[np.int64]) -> Curve:
    """A curve at other levels, descending, the first of which keeps all; see `interpolated`."""
    positive = curve[curve > 0]
    floor = (positive.min() if len(positive) else 1.0) * 1e-2
    values = np.exp(np.interp(-np.log(grid), -np.log(kept), np.log(curve + floor))) - floor
    values[0] = curve[0]  # exactly, which a logarithm is not
    return np.asarray(np.maximum.accumulate(np.clip(values, 0.0, None)))
