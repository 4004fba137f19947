"""Milliseconds in onnxruntime, for budgets in milliseconds: one export serves all networks that are tried.

Exporting takes seconds, longer than timing what comes of it. A cut network has the operators of the dense one and
smaller tensors, so its ONNX file is the dense one's with other tensors. Whether that is so is checked by running it.
"""

import numpy as np
import torch
from torch import Tensor, nn

from secateur.errors import ExportError, first_line
from secateur.export import OnnxRunner, on_cpu, outputs_of, quiet
from secateur.graph import Inputs, named_tensors
from secateur.graph.capture import as_call
from secateur.graph.guard import uncompiled
from secateur.methods.latency import Clock, in_turn
from secateur.settings import checked

_EQUAL = 1e-2  # of the largest output; a wrong tensor is further off


@uncompiled
@checked(ExportError, but=("inputs",))
def in_onnxruntime(dense: nn.Module, inputs: Inputs, *, threads: int | None = None) -> Clock:
    """A clock for `prune(…, clock=…)`: the fast tenth of passes in onnxruntime on the CPU.

    Models are timed in turn with the dense one.

    Args:
        dense: the model that will be pruned; it is exported once.
        inputs: example inputs; their batch is what is timed.
        threads: how many onnxruntime may use; default: as many as PyTorch.
    Raises:
        ExportError: a model cannot be exported, here or when its time is asked for.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    >>> clock = in_onnxruntime(model, torch.zeros(1, 3, 16, 16), threads=1)
    >>> clock(model) > 0
    True
    """
    files = _Files(dense, inputs, threads or torch.get_num_threads())
    return in_turn(dense, inputs, files.runner)


class _Files:
    """The ONNX file of a dense model, and what it becomes with the tensors of other models.

    Attributes:
        exports: how many models had to be exported.
    """

    def __init__(self, dense: nn.Module, inputs: Inputs, threads: int) -> None:
        self.inputs, self.threads, self.exports = inputs, threads, 0
        self.content = self._exported(dense)

    def runner(self, model: nn.Module) -> OnnxRunner:
        """The model in onnxruntime.

        Raises:
            ExportError: it cannot be exported, or onnxruntime computes something else.
        """
        twin, inputs, _ = on_cpu(model, self.inputs)
        expected = outputs_of(twin, inputs)
        try:
            runner = OnnxRunner(_with_tensors(self.content, twin), self.threads)
            if _alike(expected, outputs_of(runner, inputs)):
                return runner
        except Exception:  # onnxruntime has a class of its own for each of its status codes
            pass  # another graph: it has fewer blocks, or numbers in it follow from widths
        runner = OnnxRunner(_with_tensors(self._exported(model), twin), self.threads)
        if not _alike(expected, outputs_of(runner, inputs)):
            raise ExportError(f"{type(model).__name__}: onnxruntime computes something else than PyTorch")
        return runner

    def _exported(self, model: nn.Module) -> bytes:
        """An ONNX file of one batch size, in which tensors have the names and values that they have in the model."""
        twin, inputs, _ = on_cpu(model, self.inputs)
        self.exports += 1
        args, kwargs = as_call(inputs)
        try:
            with quiet(), torch.no_grad():
                program = torch.export.export(twin, args, kwargs, strict=False)
                exported = torch.onnx.export(
                    program, (), dynamo=True, verbose=False, opset_version=18, optimize=False
                )
        except Exception as error:  # the exporter lets through what each of its parts raises
            raise ExportError(
                f"{type(model).__name__} cannot be timed in onnxruntime, as it cannot be exported: {first_line(error)}"
            ) from error
        assert exported is not None
        content: bytes = exported.model_proto.SerializeToString()
        return content


def _with_tensors(content: bytes, model: nn.Module) -> bytes:
    """The ONNX file with a model's tensors in place of those that have their names, norms folded into layers."""
    import onnx
    from onnxscript.optimizer import optimize

    found = onnx.load_from_string(content)
    own = dict(named_tensors(model))
    for initializer in found.graph.initializer:
        if initializer.name in own:
            values = np.ascontiguousarray(own[initializer.name].detach().numpy())
            initializer.CopyFrom(onnx.numpy_helper.from_array(values, initializer.name))
    del found.graph.value_info[:]  # the shapes between operators, as they were
    with quiet():
        changed: bytes = optimize(found).SerializeToString()
    return changed


def _alike(expected: list[Tensor], got: list[Tensor]) -> bool:
    return [x.shape for x in expected] == [x.shape for x in got] and all(
        (a.double() - b.double()).abs().max() <= _EQUAL * a.double().abs().max()
        for a, b in zip(expected, got, strict=True)
        if a.numel()
    )
