"""A whole model as the source of a plain module."""

import torch
from torch import nn

from secateur.graph import analyze
from secateur.graph.capture import Inputs
from secateur.rewriting.draft import TRAINS, Writer
from secateur.rewriting.source import Source, is_plain


def as_source(model: nn.Module, inputs: Inputs) -> Source:
    """The source of a module that computes what a model does, for any batch and image size that it takes.

    Args:
        model: in evaluation mode; only read.
        inputs: example inputs.
    Raises:
        CaptureError, CutError: it cannot be written down; the message says why.
    """
    graph = analyze(model, inputs)
    assert graph.trace is not None
    masks = [torch.ones(group.units, dtype=torch.bool) for group in graph.groups]
    apart = [name for name, module in model.named_modules() if not is_plain(module)]
    draft = Writer(model, graph.trace, graph.trace.survivors(masks), inputs).draft("", apart)
    _, trains, what = draft.lost.partition(TRAINS)
    return Source(model, draft.program, draft.constants, f"{trains}{what}")
