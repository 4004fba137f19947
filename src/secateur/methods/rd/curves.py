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

from secateur.allocate.knapsack import Curve
from secateur.errors import FileError, SecateurError, unknown
from secateur.files import read_tensors, write_tensors
from secateur.graph import named_tensors
from secateur.graph.replay import Replay, Tensors

FORMAT = "secateur-curves-1"

Tick = Callable[[int, int], None]
"""Is told (forward passes done, of how many)."""


def squared(dense: Tensor, pruned: Tensor) -> Tensor:
    """Mean over the logits of the squared difference: (n, classes) twice -> (n,).

    Source: Xu et al. 2023, arXiv:2308.10438. Differs: nothing.
    """
    return (dense - pruned).square().flatten(1).mean(1)


def divergence(dense: Tensor, pruned: Tensor) -> Tensor:
    """Kullback–Leibler divergence of the pruned network's class probabilities from the dense one's.

    Source: none of its own; the logits' distance as the loss of distillation sees it. Differs: nothing.
    """
    p, q = dense.log_softmax(1), pruned.log_softmax(1)
    return (p.exp() * (p - q)).sum(1).clamp_min(0)


def variation(dense: Tensor, pruned: Tensor) -> Tensor:
    """Total variation between the class probabilities of the two networks, 0 to 1.

        1/2 * sum over classes of |p - q|

    No event, such as the right class being drawn, differs more in probability; being a distance, that of
    several changes together is at most the sum of each one's, where changes act alike in either order.

    Source: none of its own. Differs: nothing.
    """
    return 0.5 * (dense.softmax(1) - pruned.softmax(1)).abs().sum(1)


DISTORTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": divergence,
    "logits": squared,
    "variation": variation,
}
"""(dense outputs, pruned outputs) -> one number per image."""

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


def key_of(model: nn.Module, batches: Sequence[Tensor], settings: Mapping[str, Any]) -> str:
    """Hash of all weights and buffers, all calibration images, and the settings."""
    found = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(named_tensors(model), key=lambda pair: pair[0]):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(_bytes(tensor))
    for x in batches:
        found.update(_bytes(x))
    return found.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    plain = tensor.detach().cpu().contiguous()
    return plain.view(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def measure(
    program: Replay,
    batches: Sequence[Tensor],
    candidates: Sequence[Sequence[Tensors]],
    *,
    distortion: str = "kl",
    base: Tensors | None = None,
    batched: int = 1,
    tick: Tick | None = None,
) -> list[npt.NDArray[np.float64]]:
    """The distortion of every candidate on every image; the reference is always the dense model.

    What lies before a layer is run once for all its levels.

    Args:
        program: of the dense model.
        batches: calibration images, (n, …) each.
        candidates: per layer, the tensors of each level.
        distortion: a name in `DISTORTIONS`.
        base: tensors that the network already differs in.
        batched: levels of one layer that share a pass.
    Returns:
        (levels, images) per layer.
    """
    if distortion not in DISTORTIONS:
        raise SecateurError(unknown("distortion", distortion, DISTORTIONS))
    distance = DISTORTIONS[distortion]
    total = len(batches) * sum(len(levels) for levels in candidates)
    found: list[list[list[Tensor]]] = [[[] for _ in levels] for levels in candidates]
    done = 0
    with torch.no_grad():
        for x in batches:
            reference = program(x)
            for layer, level, output in program.variants(x, candidates, base, batched=batched):
                found[layer][level].append(distance(reference.float(), output.float()).double().cpu())
                done += 1
                if tick:
                    tick(done, total)
    images = sum(len(x) for x in batches)
    return [
        np.stack([torch.cat(level).numpy() for level in levels]) if levels else np.zeros((0, images))
        for levels in found
    ]


def joint(
    program: Replay, batches: Sequence[Tensor], tensors: Tensors, *, distortion: str = "kl"
) -> npt.NDArray[np.float64]:
    """The distortion of one pruned network on every image, (n,)."""
    distance = DISTORTIONS[distortion]
    with torch.no_grad():
        values = [distance(program(x).float(), program(x, tensors).float()) for x in batches]
    return np.asarray(torch.cat(values).double().cpu().numpy())


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
    )[::-1]
    positive = curve[curve > 0]
    floor = (positive.min() if len(positive) else 1.0) * 1e-2
    values = np.exp(np.interp(-np.log(grid), -np.log(kept), np.log(curve + floor))) - floor
    values[0] = curve[0]  # exactly, which a logarithm is not
    return grid.copy(), np.maximum.accumulate(np.clip(values, 0.0, None))
