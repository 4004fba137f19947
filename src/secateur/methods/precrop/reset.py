"""Fresh weights for a network of any widths."""

import torch
from torch import nn


def reset_(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """Draw all weights again, as the modules themselves do when they are made.

    Every module that has a `reset_parameters()` is asked to, children before parents, so a network that draws its
    layers in its own manner says so in a `reset_parameters` of its own. The new fan-ins and fan-outs count. What no
    module resets, such as a parameter that a module of the user's holds itself, stays as it is.

    Args:
        model: changed in place.
        seed: of what is drawn; the global generators stay as they are.
    Returns:
        the model.
    """
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=[d.index for d in devices]), torch.no_grad():
        torch.manual_seed(seed)
        for module in reversed(list(model.modules())):
            own = isinstance(module, nn.MultiheadAttention | nn.Transformer)
            reset = getattr(module, "_reset_parameters" if own else "reset_parameters", None)
            if callable(reset):
                reset()
    return model
