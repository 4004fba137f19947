"""An ONNX file that computes in 8-bit integers, its ranges measured on images."""

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.errors import ExportError, first_line
from secateur.export import OnnxRunner, export_onnx
from secateur.files import atomic_write
from secateur.graph.capture import Inputs, as_call
from secateur.graph.guard import uncompiled
from secateur.graph.modes import evaluating
from secateur.settings import checked

Ranges = Literal["minmax", "entropy", "percentile"]


@dataclass(frozen=True)
class Int8Check:
    """A quantised file, and how far it is from the model.

    Attributes:
        path: the file.
        file_bytes: its size.
        images: with which its ranges were measured.
        rel_error: root mean square of the difference between its outputs and the model's on these images, divided by
            that of the model's.
        same_answer: share of these images for which the largest output is the same one; None: outputs are not
            (n, classes).
    """

    path: Path
    file_bytes: int
    images: int
    rel_error: float
    same_answer: float | None


@uncompiled
@checked(ExportError)
def export_int8(
    model: nn.Module,
    inputs: Inputs,
    path: str | Path,
    calibration: Iterable[Inputs],
    *,
    ranges: Ranges = "minmax",
    opset: int = 18,
) -> Int8Check:
    """Write `model` in evaluation mode as an ONNX file in 8-bit integers, for onnxruntime on CPUs.

    Static quantisation by onnxruntime's own tools: weights as signed integers with a scale per output channel,
    activations as unsigned ones with ranges from the calibration images, in the QDQ form that other runtimes read too.
    Accuracy may fall, which only test images tell. Integers pay on processors with instructions for them (AVX-512 VNNI
    and later); measure there.

    Args:
        model: any module that `export_onnx` takes.
        inputs: example inputs, as for `export_onnx`.
        path: the file to write; its folder must exist.
        calibration: inputs like the example, with real images: a hundred or more of them in all.
        ranges: of activations: the smallest and largest number met; or those that lose least information, or cut off
            the outermost 0.001 %.
        opset: version of the ONNX operators.
    Raises:
        ExportError: the model cannot be exported or quantised, or there are no calibration inputs; nothing was written.
        FileError: the file cannot be written.
    """
    batches = [as_call(batch) for batch in calibration]
    if not batches:
        raise ExportError("calibration is empty; give batches of real images, a hundred or more in all")
    with tempfile.TemporaryDirectory() as folder:
        whole, prepared, small = (Path(folder) / f"{name}.onnx" for name in ("whole", "prepared", "small"))
        export_onnx(model, inputs, whole, opset=opset)
        try:
            with _quiet():
                _quantize(whole, prepared, small, batches, ranges)
            content = small.read_bytes()
            check = _compare(model, content, batches)
        except Exception as error:  # whatever onnxruntime's tools raise
            raise ExportError(
                f"{Path(path).name}: {type(model).__name__} could not be quantised: {first_line(error)}. Nothing was "
                f"written."
            ) from error
    atomic_write(path, content)
    return Int8Check(Path(path), len(content), *check)


def _quantize(whole: Path, prepared: Path, small: Path, batches: list[Any], ranges: Ranges) -> None:
    from onnxruntime import quantization as tools
    from onnxruntime.quantization.shape_inference import quant_pre_process

    # batch norms are folded into convolutions first, or their ranges would be measured apart
    quant_pre_process(str(whole), str(prepared), skip_symbolic_shape=True)
    methods = tools.CalibrationMethod
    tools.quantize_static(
        str(prepared),
        str(small),
        _Reader(OnnxRunner(str(prepared), 1).feed, batches),
        quant_format=tools.QuantFormat.QDQ,
        per_channel=True,
        activation_type=tools.QuantType.QUInt8,
        weight_type=tools.QuantType.QInt8,
        calibrate_method={
            "minmax": methods.MinMax, "entropy": methods.Entropy, "percentile": methods.Percentile
        }[ranges],
    )  # fmt: skip


class _Reader:
    """The calibration inputs, one batch at a time, as onnxruntime's tools read them."""

    def __init__(self, feed: Any, batches: list[Any]) -> None:
        self._left = iter([feed(*args, **kwargs) for args, kwargs in batches])

    def get_next(self) -> dict[str, Any] | None:
        return next(self._left, None)


def _compare(model: nn.Module, content: bytes, batches: list[Any]) -> tuple[int, float, float | None]:
    """Images, relative error and share of equal answers."""
    run = OnnxRunner(content, torch.get_num_threads())
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    images, error, scale, same = 0, 0.0, 0.0, 0
    answers = True
    with evaluating(model), torch.no_grad():
        for args, kwargs in batches:
            args, kwargs = pytree.tree_map(
                lambda x: x.to(device) if isinstance(x, Tensor) else x, (args, kwargs)
            )
            got = run(*args, **kwargs)
            expected = [x.cpu() for x in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(x, Tensor)]
            images += len(expected[0])
            for a, b in zip(expected, got, strict=True):
                error += float((a - b).double().square().sum())
                scale += float(a.double().square().sum())
            answers = answers and len(expected) == 1 and expected[0].ndim == 2
            same += int((expected[0].argmax(-1) == got[0].argmax(-1)).sum()) if answers else 0
    return images, (error / scale) ** 0.5 if scale else 0.0, same / images if answers else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what onnxruntime's tools say about their own insides from the user."""
    root, level = logging.getLogger(), logging.getLogger().level
    try:
        root.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
