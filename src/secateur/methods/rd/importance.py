"""What an error in a layer's output does to the network's outputs, from one backward pass."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from secateur.graph import Inputs
from secateur.graph.capture import batch_of
from secateur.graph.replay import Outputs, Replay, floats
from secateur.methods.rd.curves import distance_named
from secateur.reconstruction.compensate import Seen, layers


def importances(
    program: Replay,
    batches: Sequence[Inputs],
    seen: Mapping[str, Seen],
    *,
    distortion: str = "auto",
    seed: int = 0,
) -> dict[str, Tensor]:
    """What the squared error of each output of every layer counts: weight name -> (o,), float64.

        importance_o = mean over images of the sum over positions of g^2,    E g g^T over draws = the Hessian's factor

    with g the gradient of a random projection of the outputs, drawn such that E (g dz)^2 is twice the distortion for
    small changes dz of the outputs: the diagonal of the Fisher information for class scores.

    Where no gradient can be had, a layer's error counts as a share of its output's power.

    Args:
        program: of the dense model.
        batches: calibration images.
        seen: of its layers.
        distortion: a name in `DISTANCES`.
        seed: of the projections.
    """
    try:
        return _by_gradients(program, batches, distortion, seed)
    except (RuntimeError, NotImplementedError):  # an operator without a gradient, or one that writes in place
        return by_power(seen)


def by_power(seen: Mapping[str, Seen]) -> dict[str, Tensor]:
    """Each layer's error as a share of its output's power."""
    found = {}
    for name, layer in seen.items():
        parts = layer.weight.double().chunk(len(layer.inputs))
        power = sum(float(((w @ inner.a) * w).sum()) for w, inner in zip(parts, layer.inputs, strict=True))
        found[name] = torch.full((len(layer.weight),), 1 / max(power, 1e-30), dtype=torch.float64)
    return found


def _by_gradients(
    program: Replay, batches: Sequence[Inputs], distortion: str, seed: int
) -> dict[str, Tensor]:
    at = {layer.call.node: layer for layer in layers(program)}
    owned = {name: p.detach() for name, p in program.model.named_parameters()}
    total = {
        layer.weight: torch.zeros(len(program.tensor(layer.weight)), dtype=torch.float64)
        for layer in at.values()
    }
    generator = torch.Generator().manual_seed(seed)
    images = 0
    for x in batches:
        images += batch_of(x)
        begun: list[Tensor] = []
        with torch.enable_grad():
            values = program.begin(x)
            for call in program.calls:
                out = program.run(call, values, owned)
                if call.node not in at:
                    continue
                if not out.requires_grad:
                    begun.append(out.requires_grad_())
                    out = values[call.node] = out * 1.0  # what is not a leaf may be written in place
                dim = 1 if call.node.target is not torch.ops.aten.linear.default else out.ndim - 1
                name, others = at[call.node].weight, [d for d in range(out.ndim) if d != dim]

                def take(g: Tensor, name: str = name, others: list[int] = others) -> None:
                    total[name] += g.detach().square().sum(others).double().cpu()

                out.register_hook(take)  # sees the gradient of the values as they are now
            outputs = program.result(values, owned)
            del values
            reached = [z for z in floats(outputs) if z.requires_grad]
            seeds = projections(outputs, distance_named(distortion, outputs), generator)
            seeds = [g for z, g in zip(floats(outputs), seeds, strict=True) if z.requires_grad]
            torch.autograd.grad(reached, begun, seeds, allow_unused=True)
    return {name: value / images for name, value in total.items()}


@torch.no_grad()
def projections(outputs: Outputs, distortion: str, generator: torch.Generator) -> list[Tensor]:
    """A random direction for each floating-point tensor, (n, …): E g g^T is the distortion's Hessian there."""
    found = []
    for z in floats(outputs):
        noise = (torch.rand(z.shape, generator=generator).round() * 2 - 1).to(z)
        if distortion in ("kl", "variation"):  # the square root of diag(p) - p p^T
            p = z.softmax(1)
            g = p.sqrt() * noise
            g = g - p * (p.sqrt() * noise).sum(1, keepdim=True)
            found.append(g / max(1, z[0, 0].numel()) ** 0.5)
        else:
            scale = z.var(correction=0).clamp_min(1e-12) if distortion == "relative" else 1.0
            found.append(noise * (2 / (z[0].numel() * scale)) ** 0.5 if z.ndim else noise)
    return found
