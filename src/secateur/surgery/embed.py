"""The way back: the weights of a cut model in a model of the original shapes."""

import torch
from torch import nn

from secateur.graph import Graph, named_tensors
from secateur.graph.duplicate import duplicate
from secateur.graph.positions import kept_positions
from secateur.plan import Plan


def embed(whole: nn.Module, small: nn.Module, graph: Graph, plan: Plan) -> nn.Module:
    """A copy of the original in which all that the cut model has takes its values from there.

    Masked by the same plan, it is what the cut model must equal, also after that was trained further.

    Args:
        whole: the model `graph` was made from; only read.
        small: the same model after the cut.
        graph: from `analyze(whole, …)`.
        plan: what was cut.
    """
    result = duplicate(whole)
    theirs = dict(named_tensors(small))
    keep = kept_positions(whole, graph, plan.masks(graph))
    canonical = {id(tensor): name for name, tensor in reversed(named_tensors(result))}
    with torch.no_grad():
        for name, tensor in named_tensors(result):
            if name not in theirs or (tensor.numel() and not theirs[name].numel()):
                continue  # of a block that was left out
            places = []
            for dim, size in enumerate(tensor.shape):
                mask = keep.get((canonical[id(tensor)], dim))
                kept = torch.arange(size) if mask is None else torch.from_numpy(mask).nonzero().flatten()
                places.append(kept.to(tensor.device).view(-1, *[1] * (tensor.ndim - dim - 1)))
            tensor[tuple(places) or ...] = theirs[name].to(tensor.device)
    return result
