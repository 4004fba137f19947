"""Writing a model for use without Secateur: ONNX, PyTorch's own exported program, or a Python file.

Nothing is written before the exported form has been run beside the module, at several batch sizes, and
has given the same outputs.
"""

import contextlib
import io
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from secateur import __version__
from secateur.errors import ExportError, FileError, first_line
from secateur.files import atomic_write, write_tensors
from secateur.graph.capture import Inputs, as_call, batch_of, batchings
from secateur.graph.duplicate import duplicate
from secateur.graph.guard import uncompiled
from secateur.graph.samples import main_leaf, other_sizes, random_floats, takes
from secateur.rewriting.plain import as_source
from secateur.settings import checked

Run = Callable[..., object]

COMPARED_SIZES = 2
"""Other image sizes at which a file that takes any is compared."""


@dataclass(frozen=True)
class ExportCheck:
    """An exported file, and how far its outputs are from the module's.

    Attributes:
        path: the file.
        file_bytes: its size.
        batches: the batch sizes at which it was compared with the module.
        max_abs_error: the largest difference of any output, over all of them.
        max_rel_error: the same, divided by the largest output.
        static_because: None if the file takes any batch size; else why it takes only `batches[0]`.
        sizes: where any image size was asked for: the shapes of the images with which it was compared.
        one_size_because: None if the file takes other image sizes, or none were asked for; else why it does not.
    """

    path: Path
    file_bytes: int
    batches: tuple[int, ...]
    max_abs_error: float
    max_rel_error: float
    static_because: str | None
    sizes: tuple[tuple[int, ...], ...] = ()
    one_size_because: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields by name, with the path's last part in place of the path."""
        return {
            **self.__dict__,
            "path": self.path.name,
            "batches": list(self.batches),
            "sizes": list(self.sizes),
        }


@uncompiled
@checked(ExportError)
def export_onnx(
    model: nn.Module, inputs: Inputs, path: str | Path, *, opset: int = 18, any_size: bool = False
) -> ExportCheck:
    """Write `model` in evaluation mode as one ONNX file that takes any batch size.

    The file's outputs are compared with the module's by onnxruntime on the CPU: at the batch of `inputs`,
    at 1 and at one more. They may differ by the square root of the output dtype's precision (3e-4 in
    float32), relative to the largest output. Should the batch size be fixed by the model's own code, the
    file takes that one alone, and the result says why.

    A copy of the module on the CPU is exported; the module's mode, hooks and parameters are not touched.

    Args:
        model: any module that `torch.export` can read.
        inputs: example inputs; the first dimension of each tensor is the batch, if it is as long as that
            of the first tensor.
        path: the file to write; its folder must exist. ONNX limits a file to 2 GiB.
        opset: version of the ONNX operators. 18 is what the exporter's own rules are written in; later
            ones are converted from it.
        any_size: let the file take images of other heights and widths too, as far as the model does. It is then
            compared at two of them as well; if that fails, it takes those of `inputs` only, and the result says why.
    Raises:
        ExportError: the model cannot be exported, or onnxruntime computes something else; `path` is as it
            was before.
        FileError: the file cannot be written.
    """

    def encode(program: ExportedProgram, shapes: Any, outputs: int) -> tuple[bytes, Run]:
        exported = torch.onnx.export(
            program,
            (),
            dynamo=True,
            verbose=False,
            opset_version=opset,
            dynamic_shapes=shapes,
            output_names=["output"] if outputs == 1 else [f"output_{i}" for i in range(outputs)],
        )
        assert exported is not None
        got = exported.model.opset_imports[""]
        if got != opset:
            raise ExportError(f"opset {opset} was asked for, and the exporter gave {got}; ask for {got}")
        content: bytes = exported.model_proto.SerializeToString()
        return content, OnnxRunner(content, torch.get_num_threads())

    return _export(model, inputs, Path(path), encode, any_size)


@uncompiled
@checked(ExportError)
def export_program(
    model: nn.Module, inputs: Inputs, path: str | Path, *, any_size: bool = False
) -> ExportCheck:
    """Write `model` in evaluation mode as an exported program (`.pt2`), to be read by `torch.export.load`.

    The file is loaded again and compared with the module as in `export_onnx`, which says the rest.

    Raises:
        ExportError: the model cannot be exported, or the loaded program computes something else; `path`
            is as it was before.
        FileError: the file cannot be written.
    """

    def encode(program: ExportedProgram, shapes: Any, outputs: int) -> tuple[bytes, Run]:
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        buffer.seek(0)
        return buffer.getvalue(), torch.export.load(buffer).module()

    return _export(model, inputs, Path(path), encode, any_size)


@uncompiled
@checked(ExportError)
def export_python(model: nn.Module, inputs: Inputs, path: str | Path) -> ExportCheck:
    """Write `model` as a Python file of plain PyTorch layers, and its weights beside it.

    `small.py` can be read, changed and trained on; its `load()` reads `small.weights.safetensors`. It needs torch and
    safetensors, and neither Secateur nor the model's own code, but for classes of outputs that the model returns. What
    the model does in training only (stochastic depth) is left out, where it is not a layer of `torch.nn`.

    The file is loaded again and compared with the module as in `export_onnx`. Images of other sizes are taken where the
    model takes them, and its numbers follow from the sizes; the class says which it takes otherwise.

    Args:
        model: any module that `torch.export` can read.
        inputs: example inputs; the first dimension is the batch.
        path: the file to write, ending in ".py"; its folder must exist.
    Raises:
        ExportError: the model cannot be written down, or the file computes something else; nothing was written.
        FileError: a file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".py":
        raise ExportError(f"path is {str(path)!r}; expected a name that ends in .py")
    twin, inputs, _ = on_cpu(model, inputs)
    given = batch_of(inputs)
    batches = (given, *{1, given + 1} - {given})
    weights = path.with_suffix(".weights.safetensors")
    title = f"{type(model).__name__.removeprefix('Rewritten')}, written by Secateur {__version__}."
    try:
        with quiet():
            source = as_source(twin, inputs)
        text = source.text(weights.name, title)
        with tempfile.TemporaryDirectory() as folder:
            again = Path(folder) / path.name
            again.write_text(text, encoding="utf-8")
            write_tensors(again.with_name(weights.name), source.tensors, {})
            errors = _compare(twin, _load_source(again), inputs, batches)
    except FileError:
        raise
    except Exception as error:  # whatever capturing and running the model raises
        raise ExportError(
            f"{path.name}: {type(model).__name__} could not be written as Python: {_reason(error)}. "
            f"Nothing was written."
        ) from error
    write_tensors(weights, source.tensors, {})
    atomic_write(path, text)
    return ExportCheck(path, len(text.encode()), batches, *errors, None)


def _load_source(path: Path) -> Run:
    """What a file that was just written computes."""
    namespace: dict[str, Any] = {"__file__": str(path), "__name__": path.stem}
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), namespace)
    return namespace["load"]()  # type: ignore[no-any-return]


class OnnxRunner:
    """An ONNX model on the CPU, called with tensors like the module it was made from.

    Attributes:
        runtime: "onnxruntime".
        threads: how many threads it uses.
    """

    runtime = "onnxruntime"

    def __init__(self, source: str | bytes, threads: int) -> None:
        import onnxruntime

        self.threads = threads
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # failures reach the caller as exceptions
        # idle threads that spin would slow down whatever is timed in turn with this model
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        self._names = [entry.name for entry in self._session.get_inputs()]

    def __call__(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        return [torch.from_numpy(output) for output in self._session.run(None, self.feed(*args, **kwargs))]

    def feed(self, *args: Any, **kwargs: Any) -> dict[str, NDArray[Any]]:
        """The tensors of a call by the names that the file has for them."""
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        return {name: x.detach().cpu().numpy() for name, x in zip(self._names, tensors, strict=True)}


@checked(FileError)
def onnx_runner(path: str | Path, threads: int | None = None) -> OnnxRunner:
    """The model in an ONNX file, ready to be called or timed.

    Args:
        path: the file.
        threads: how many it may use; default: as many as PyTorch, so that their times can be compared.
    Raises:
        FileError: there is no such file, or it is not an ONNX model.
    """
    if not Path(path).is_file():
        raise FileError(f"{path}: no such file. Check the path.")
    try:
        return OnnxRunner(str(path), threads or torch.get_num_threads())
    except Exception as error:  # onnxruntime has a class of its own for each of its status codes
        raise FileError(
            f"{path}: not an ONNX model that onnxruntime can run: {first_line(error)}."
        ) from error


def _export(
    model: nn.Module,
    inputs: Inputs,
    path: Path,
    encode: Callable[[ExportedProgram, Any, int], tuple[bytes, Run]],
    any_size: bool,
) -> ExportCheck:
    twin, inputs, outputs = on_cpu(model, inputs)
    given = batch_of(inputs)
    sized = _other_sizes(twin, inputs) if any_size else []
    static_because = None
    one_size_because = "the model takes no other" if any_size and not sized else None
    for dynamic, others in [(True, sized)] * bool(sized) + [(True, []), (False, [])]:
        batches = (given, *{1, given + 1} - {given}) if dynamic else (given,)
        try:
            with quiet():
                content, run = encode(*_program(twin, inputs, dynamic, others), outputs)
            errors = [_compare(twin, run, some, batches) for some in (inputs, *others)]
        except Exception as error:  # the exporters let through what each of their parts raises
            if others:
                one_size_because = _reason(error)
                continue
            if dynamic:
                static_because = _reason(error)
                continue
            raise ExportError(
                f"{path.name}: {type(model).__name__} could not be exported: {_reason(error)}. "
                f"Nothing was written."
            ) from error
        break
    atomic_write(path, content)
    max_abs_error, max_rel_error = (max(each) for each in zip(*errors, strict=True))
    images = [main_leaf(some) for some in (inputs, *others)] if any_size else []
    sizes = tuple(tuple(x.shape) for x in images if x is not None)
    return ExportCheck(
        path,
        len(content),
        batches,
        max_abs_error,
        max_rel_error,
        static_because,
        sizes,
        one_size_because,
    )


def _other_sizes(model: nn.Module, inputs: Inputs) -> list[Inputs]:
    """The inputs with images of two other sizes, where the model takes any."""
    for series in other_sizes(inputs, batchings(inputs)[0]):
        found: list[Inputs] = []
        for ways in series:
            found += [way for way in ways if takes(model, way)][:1]
            if len(found) == COMPARED_SIZES:
                return [random_floats(some, seed) for seed, some in enumerate(found)]
    return []


def on_cpu(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs, int]:
    """A copy of the model on the CPU, in evaluation mode, inputs for it, and how many tensors it returns."""
    try:
        twin = duplicate(model).cpu().eval()
        inputs = pytree.tree_map(lambda x: x.detach().cpu() if isinstance(x, Tensor) else x, inputs)
        return twin, inputs, len(outputs_of(twin, inputs))
    except Exception as error:  # whatever the model's own code raises
        raise ExportError(
            f"{type(model).__name__} cannot be copied to the CPU and run there on the given inputs: "
            f"{first_line(error)}. Give inputs that fit its forward."
        ) from error


def _program(
    model: nn.Module, inputs: Inputs, dynamic: bool, others: Sequence[Inputs]
) -> tuple[ExportedProgram, Any]:
    """The exported program, and which dims of the inputs it leaves free.

    Args:
        dynamic: the batch.
        others: the inputs at other image sizes; what is of another size there is free too.
    """
    given, batch, size = inputs, batch_of(inputs), Dim("batch")
    if dynamic:  # a batch of 1 would be taken for a constant, and a height that equals the width for the same
        inputs = _with_batch((*others, inputs)[0], max(batch, 2))

    def free(x: Any, *same: Any) -> dict[int, Any] | None:
        if not isinstance(x, Tensor):
            return None
        sized = {dim: Dim.AUTO for dim in range(x.ndim) if any(y.shape[dim] != x.shape[dim] for y in same)}
        found = ({0: size} if dynamic and _has_batch(x, batch) else {}) | sized
        return found or None

    leaves = [pytree.tree_leaves(as_call(some)) for some in (given, *others)]
    freed = [free(*each) for each in zip(*leaves, strict=True)]
    args, kwargs = as_call(inputs)
    shapes = pytree.tree_unflatten(freed, pytree.tree_structure((args, kwargs)))[1 if kwargs else 0]
    with torch.no_grad():
        program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    return program, shapes


def _compare(model: nn.Module, run: Run, inputs: Inputs, batches: tuple[int, ...]) -> tuple[float, float]:
    worst_abs = worst_rel = 0.0
    for batch in batches:
        examples = _with_batch(inputs, batch)
        expected, got = outputs_of(model, examples), outputs_of(run, examples)
        if [x.shape for x in expected] != [x.shape for x in got]:
            raise ExportError(
                f"at batch {batch} its outputs have the shapes {[tuple(x.shape) for x in got]}, the module's "
                f"{[tuple(x.shape) for x in expected]}"
            )
        for e, g in zip(expected, got, strict=True):
            dtype = e.dtype if e.is_floating_point() else torch.float32
            allowed = torch.finfo(dtype).eps ** 0.5
            scale = e.double().abs().max().item()
            abs_error = (e.double() - g.double()).abs().max().item()
            rel_error = abs_error / scale if scale else abs_error
            if not rel_error <= allowed:  # so that NaN fails too
                raise ExportError(
                    f"at batch {batch} its outputs differ from the module's by {rel_error:.1e} relative to "
                    f"the largest; {allowed:.1e} is allowed"
                )
            worst_abs, worst_rel = max(worst_abs, abs_error), max(worst_rel, rel_error)
    return worst_abs, worst_rel


def outputs_of(run: Run, inputs: Inputs) -> list[Tensor]:
    """The tensors that a model, or what was exported of it, returns."""
    args, kwargs = as_call(inputs)
    with torch.no_grad():
        return [leaf for leaf in pytree.tree_leaves(run(*args, **kwargs)) if isinstance(leaf, Tensor)]


def _with_batch(inputs: Inputs, batch: int) -> Inputs:
    """The inputs cut or repeated to `batch` images; repeated ones are rolled, so that no two are alike."""
    given = batch_of(inputs)

    def resize(x: Any) -> Any:
        if batch == given or not _has_batch(x, given):
            return x
        return torch.stack([x[i % given].roll(i // given) for i in range(batch)])

    return pytree.tree_map(resize, inputs)  # type: ignore[no-any-return]


def _has_batch(x: Any, batch: int) -> bool:
    return isinstance(x, Tensor) and x.ndim > 0 and x.shape[0] == batch


def _reason(error: BaseException) -> str:
    """What stopped an exporter, with the operator that it could not convert, if it says which."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    found = [re.search(r"target=torch\.ops\.([\w.]+)", str(link)) for link in chain]
    name = next((match[1] for match in found if match), None)
    if name is not None:
        return f"operator {name} cannot be converted ({first_line(chain[-1])})"
    return first_line(chain[-1] if "This is step" in str(error) else error)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what the exporters say about their own insides from the user; the model's warnings pass."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(torch|onnx|onnxscript|onnx_ir|copyreg)(\.|$)")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
