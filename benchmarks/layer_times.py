"""Would widths that are chosen by a table of measured layer times be faster than those chosen by MACs?

    pip install '.[benchmark]'
    OMP_NUM_THREADS=1 python benchmarks/layer_times.py --out docs/results/layer-times.md

Each distinct convolution and linear layer is timed by itself in onnxruntime, one thread, batch 1, at six pairs of
widths in multiples of 16, and ms = a + b out in + c out + d in is fitted. Their sum is one more cost in the search over
widths. Widths that lose least l2 score are then chosen by MACs, and by the table within the milliseconds that these
take.
"""

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.allocate.products import choose_widths
from secateur.allocate.table import widths_of
from secateur.cost.formulas import Sum
from secateur.cost.latency import device_name
from secateur.cost.multiples import choose_multiples
from secateur.graph import Product
from secateur.methods.rd.channels import grid_of
from secateur.recipes.models import build_model
from secateur.scores import score_groups

MODELS = ("torchvision/resnet18@112", "torchvision/mobilenet_v2@224", "torchvision/efficientnet_b0@224")
SHARES = (0.7, 0.5, 0.35)
POINTS = ((1, 1), (0.5, 0.5), (0.5, 1), (1, 0.5), (0.25, 0.5), (0.25, 0.25))
BLOCK = 16  # channels that kernels take at once
TABLE = "nanoseconds"
PASSES = 10


@dataclass(frozen=True)
class Layer:
    """A convolution or a linear layer with what it reads, whatever its name.

    Attributes:
        settings: kernel, stride, padding, dilation; none: linear.
        depthwise: every channel by itself.
        outputs, inputs: channels.
        size: height and width of what it reads.
    """

    settings: tuple[tuple[int, ...], ...]
    depthwise: bool
    outputs: int
    inputs: int
    size: tuple[int, ...]

    def at(self, outputs: float, inputs: float) -> "Layer":
        """The same with shares of the widths, in whole blocks; three input channels and ten classes stay."""

        def near(width: int, share: float) -> int:
            return width if width < BLOCK else max(BLOCK, round(width * share / BLOCK) * BLOCK)

        made = near(self.outputs, outputs) if self.settings else self.outputs
        read = made if self.depthwise else near(self.inputs, inputs)
        return Layer(self.settings, self.depthwise, made, read, self.size)

    def terms(self) -> list[float]:
        """What a, b, c and d are factors of."""
        both = 0 if self.depthwise else self.outputs * self.inputs
        return [1, both, self.outputs, 0 if self.depthwise else self.inputs]


def layers_of(model: nn.Module, x: Tensor) -> dict[str, Layer]:
    """By name, all that are called once or more."""
    found: dict[str, Layer] = {}

    def seen(name: str, module: Any, args: Any) -> None:
        if isinstance(module, nn.Linear):
            found[name] = Layer((), False, module.out_features, module.in_features, ())
        else:
            how = (module.kernel_size, module.stride, module.padding, module.dilation)
            size = tuple(args[0].shape[2:])
            found[name] = Layer(how, module.groups > 1, module.out_channels, module.in_channels, size)

    handles = [
        module.register_forward_pre_hook(lambda m, a, name=name: seen(name, m, a))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return found


def timed(layer: Layer, folder: str) -> float:
    """Milliseconds of one pass, by onnxruntime's own profile: reordering what goes in and out is not the layer's."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    shape = [
        layer.outputs,
        1 if layer.depthwise else layer.inputs,
        *(layer.settings[0] if layer.settings else ()),
    ]
    tensors = {"w": rng.standard_normal(shape, np.float32), "b": np.zeros(layer.outputs, np.float32)}
    if layer.settings:
        kernel, stride, padding, dilation = layer.settings
        how = {"kernel_shape": kernel, "strides": stride, "pads": (*padding, *padding), "dilations": dilation}
        groups = layer.inputs if layer.depthwise else 1
        nodes = [
            helper.make_node("Conv", ["x", "w", "b"], ["c"], group=groups, **how),
            helper.make_node("Relu", ["c"], ["y"]),
        ]
    else:
        nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, layer.inputs, *layer.size])
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    stored = [numpy_helper.from_array(tensor, name) for name, tensor in tensors.items()]
    graph = helper.make_graph(nodes, "layer", [given], [made], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_profiling, options.profile_file_prefix = True, str(Path(folder, "profile"))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    images = rng.standard_normal([1, layer.inputs, *layer.size], np.float32)
    for _ in range(PASSES):
        session.run(None, {"x": images})
    events = json.loads(Path(session.end_profiling()).read_text())
    times = [
        event["dur"] / 1e3
        for event in events
        if event["name"].endswith("_kernel_time") and event["args"]["op_name"] in ("Conv", "Gemm")
    ]
    return float(np.percentile(times[2:], 20))


@dataclass(frozen=True)
class Table:
    """Milliseconds of layers at any widths.

    Attributes:
        factors: layer -> a, b, c, d.
        error: mean and largest error of the fit, as shares.
        count: how many layers were timed.
        seconds: of the processor.
    """

    factors: dict[Layer, npt.NDArray[np.float64]]
    error: tuple[float, float]
    count: int
    seconds: float

    @classmethod
    def of(cls, layers: Sequence[Layer]) -> "Table":
        """Each distinct layer at each distinct pair of widths is timed once."""
        from scipy.optimize import nnls

        started, known, factors, errors = time.process_time(), dict[Layer, float](), {}, list[float]()
        with tempfile.TemporaryDirectory() as folder:
            for layer in dict.fromkeys(layers):
                some = list(dict.fromkeys(layer.at(*point) for point in POINTS))
                for one in some:
                    known[one] = known[one] if one in known else timed(one, folder)
                times = np.array([known[one] for one in some])
                terms = np.array([one.terms() for one in some], dtype=float)
                size = np.maximum(terms.max(0), 1)
                found, _ = nnls(terms / size / times[:, None], np.ones(len(some)))
                factors[layer] = found / size
                errors += (np.abs(terms @ factors[layer] - times) / times).tolist()
        spread = float(np.mean(errors)), float(np.max(errors))
        return cls(factors, spread, len(known), time.process_time() - started)

    def sum(self, graph: sc.Graph, layers: dict[str, Layer]) -> Sum:
        """Nanoseconds as a function of the units kept."""
        axes = {product.name: product.axes for product in graph.macs}
        terms = []
        for name, layer in layers.items():
            a, b, c, d = 1e6 * self.factors[layer]
            made, *read = axes[name]
            terms += [Product(name, a, ()), Product(name, c, (made,))]
            if not layer.depthwise:
                terms += [Product(name, b, (made, read[0])), Product(name, d, (read[0],))]
        return Sum(terms, len(graph.groups))


def rows(named: str) -> list[str]:
    """Lines of the table for one network."""
    name, _, side = named.partition("@")
    torch.manual_seed(0)
    model, x = build_model(name).eval(), torch.randn(1, 3, int(side), int(side))
    graph, layers = sc.analyze(model, x), layers_of(model, x)
    table = Table.of(list(layers.values()))
    cost = sc.Cost(graph, {TABLE: table.sum(graph, layers)})
    multiples = choose_multiples(model, graph, "avx512", lambda _: True)
    levels, curves = [], []
    for group, score, step in zip(
        graph.groups, score_groups(model, graph, "l2"), multiples.units, strict=True
    ):
        lost = np.r_[0, np.sort((score / score.mean()).double().numpy()).cumsum()]
        levels.append(grid_of(widths_of(group, 1, step)))
        curves.append(lost[group.units - levels[-1]])
    names, dense = [group.name for group in graph.groups], cost.of(TABLE)
    print(f"{named}: {table.count} layers timed in {table.seconds:.1f} CPU s", flush=True)
    found = []
    for share in SHARES:
        by_macs = choose_widths(cost, names, levels, curves, "macs", share * cost.macs())
        took = cost.of(TABLE, by_macs.kept) + 1  # which was rounded
        by_time = choose_widths(cost, names, levels, curves, TABLE, took)
        found.append(
            f"| {name}, {side} px | {table.count} in {table.seconds:.1f} s "
            f"| {table.error[0]:.1%}, {table.error[1]:.0%} | {share:.0%} | {took / dense:.1%} "
            f"| {by_macs.distortion:.1f} | {by_time.distortion:.1f} "
            f"| {cost.macs(by_time.kept) / cost.macs():.1%} |"
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", default=list(MODELS), help="name@side of its images")
    parser.add_argument("--out", type=Path, help="also write the page to this Markdown file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    text = "\n".join([*head(), *(row for named in options.models for row in rows(named)), ""])
    print(text)
    if options.out:
        options.out.write_text(text)


def head() -> list[str]:
    """What the page says before its rows."""
    return [
        "# Widths by a table of layer times",
        "",
        "`OMP_NUM_THREADS=1 python benchmarks/layer_times.py --out docs/results/layer-times.md`",
        "",
        "Each distinct layer is timed by itself in onnxruntime (one thread, batch 1) at six pairs of widths in",
        "multiples of 16, and a + b · out · in + c · out + d · in is fitted. Widths that lose least l2 score are",
        "chosen within a share of the MACs; and within the milliseconds that these take, as the table tells them. If",
        f"the table knew better, the latter would lose less. Fresh weights, seed 0; {device_name('cpu')}.",
        "",
        "| network | layers timed, CPU | error of the fit: mean, largest | MACs bound | its time, of dense "
        "| score lost by MACs | by the table | MACs by the table |",
        "|---|---|---|---|---|---|---|---|",
    ]


if __name__ == "__main__":
    main()
