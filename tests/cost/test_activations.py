"""Peak activation memory: by hand on small networks, and against the storages of a run that frees what it can."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

import secateur as sc
from secateur.cost.training import Alive
from secateur.graph.shrink import shrink
from secateur.recipes.models import build_model
from tests.networks import network
from tests.oracles import plan_of, random_masks

SIDE = 8
IMAGE = SIDE * SIDE * 4
"""Bytes of one channel."""


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = (
            nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 8), (8, 6), (6, 8), (8, 2))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.b(self.a(x)))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = (
            nn.Conv2d(i, o, 1) for i, o in ((3, 8), (8, 4), (12, 4), (16, 2))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        a = self.a(x)
        b = self.b(torch.cat([x, a], 1))
        return self.head(torch.cat([x, a, b], 1))


class Depthwise(nn.Sequential):
    def __init__(self) -> None:
        expand, middle = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 3, padding=1, stride=2, groups=12)
        super().__init__(expand, nn.ReLU(inplace=True), middle, nn.ReLU(), nn.Conv2d(12, 4, 1))


class Attention(nn.Module):
    """16 tokens, two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(6, 8) for _ in range(4))
        self.out = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(2, (2, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
        heads = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(heads.transpose(1, 2).flatten(2))


def chain(inplace: bool) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace), nn.Conv2d(8, 5, 3, padding=1))


Peak = Callable[[dict[str, int]], int]

BY_HAND: dict[str, tuple[Callable[[], nn.Module], Peak]] = {
    "chain": (lambda: chain(False), lambda k: IMAGE * max(3 + k["0"], 2 * k["0"], k["0"] + 5)),
    "in place": (lambda: chain(True), lambda k: IMAGE * (k["0"] + 5)),
    # the convolution b and the addition hold three tensors each
    "residual": (Residual, lambda k: IMAGE * max(2 * k["stem"] + k["a"], 3 * k["stem"])),
    # the second concatenation holds its three parts, and all of them once more
    "dense": (Dense, lambda k: IMAGE * 2 * (k["stem"] + k["a"] + k["b"])),
    "depthwise": (Depthwise, lambda k: IMAGE * max(3 + k["0"], 5 * k["0"] // 4)),
    # q, k, v and the result of attention are alive at once, 4 dims per head each; or its input and q, k, v
    "attention": (Attention, lambda k: 4 * 16 * max(4 * 4 * k["q"], 6 + 3 * 4 * k["q"])),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_the_peak_by_hand_at_all_widths(name: str) -> None:
    make, peak = BY_HAND[name]
    x = torch.zeros(1, 16, 6) if name == "attention" else torch.zeros(1, 3, SIDE, SIDE)
    graph = sc.analyze(make(), x)
    cost = sc.Cost(graph)
    names = [group.name for group in graph.groups]
    for share in (1.0, 0.75, 0.5, 0.25):
        kept = [max(1, int(share * n)) for n in cost.full]
        assert cost.of("activations", kept) == peak(dict(zip(names, kept, strict=True)))


class Frees(fx.Interpreter):
    """Runs a graph operator by operator, forgets every tensor after its last use, and reads the mode after each."""

    def __init__(self, graph: fx.GraphModule, mode: Alive) -> None:
        super().__init__(graph)
        self.mode, self.peak, self.before = mode, 0, mode.now

    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        if n.op == "call_function":  # what an operator used inside is gone again
            self.peak = max(self.peak, self.mode.now - self.before)
        return result if n.users else None  # the interpreter would hold it until the end


def measured_peak(model: nn.Module, x: Tensor) -> int:
    """Bytes of the storages alive at once while the model's operators run one by one, parameters aside."""
    program = torch.export.export(model.eval(), (x,), strict=False)
    assert not program.graph_signature.inputs_to_lifted_tensor_constants
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    signature = program.graph_signature
    owned = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    nodes = program.graph_module.graph.find_nodes(op="placeholder")
    with torch.no_grad(), Alive(named.values()) as mode:
        run = Frees(program.graph_module, mode)
        run.boxed_run([named[owned[node.name]] if node.name in owned else x.clone() for node in nodes])
    return run.peak


NETWORKS = ["resnet8", "mobilenet_v2_x0_5_cifar", "shufflenet_v2_x0_5_cifar", "torchvision/squeezenet1_1"]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_peak_equals_the_storages_alive_in_a_run(name: str) -> None:
    net = network(name, dtype=torch.float32)
    graph = sc.analyze(net.model, net.inputs)
    cost, masks = sc.Cost(graph), random_masks(graph, 1)
    assert cost.of("activations") == measured_peak(net.model, net.inputs)
    sc.cut_(net.model, graph, plan_of(graph, masks))
    kept = [int(mask.sum()) for mask in masks]
    peak = cost.of("activations", kept)
    assert peak == measured_peak(net.model, net.inputs)
    assert peak == sc.Cost(shrink(graph, net.model, masks)).of("activations")


@pytest.mark.parametrize("name", ["resnet8", "torchvision/squeezenet1_1"])
def test_python_holds_no_less_when_it_runs_the_model_itself(name: str) -> None:
    """Frames hold their arguments until a module returns, so a plain run needs as much or more."""
    net = network(name, dtype=torch.float32)
    peak = sc.Cost(sc.analyze(net.model, net.inputs)).of("activations")
    with torch.no_grad(), Alive([*net.model.parameters(), *net.model.buffers()]) as mode:
        before, mode.peak = mode.now, 0
        net.model(net.inputs.clone())
    assert peak <= mode.peak - before <= 2 * peak


def test_it_does_not_depend_on_the_batch_or_the_precision() -> None:
    net = network("resnet8", dtype=torch.float64)
    one = sc.Cost(sc.analyze(net.model, net.inputs)).of("activations")
    assert one == sc.Cost(sc.analyze(net.model.float(), torch.zeros(5, 3, 16, 16))).of("activations")


def test_what_runs_under_autocast_counts() -> None:
    class Region(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            with torch.autocast("cpu", enabled=False):
                return self.b(x.relu())

    cost = sc.Cost(sc.analyze(Region(), torch.zeros(1, 3, SIDE, SIDE)))
    assert [cost.of("activations", [k]) for k in (8, 2)] == [16 * IMAGE, 6 * IMAGE]


@pytest.mark.parametrize("name", ["resnet8", "shufflenet_v2_x0_5_cifar"])
def test_the_soft_peak_meets_the_exact_one_and_its_gradient_is_the_slope(name: str) -> None:
    net = network(name, dtype=torch.float32)
    graph = sc.analyze(net.model, net.inputs)
    cost = sc.Cost(graph)
    kept = torch.tensor([float(mask.sum()) + 0.25 for mask in random_masks(graph, 0)], dtype=torch.float64)
    kept.requires_grad_()
    (gradient,) = torch.autograd.grad(cost.soft("activations", kept), kept)
    assert gradient.any()
    for group in range(len(kept)):
        up, down = kept.detach().clone(), kept.detach().clone()
        up[group], down[group] = up[group] + 1e-4, down[group] - 1e-4
        slope = (cost.soft("activations", up) - cost.soft("activations", down)).item() / 2e-4
        assert gradient[group].item() == pytest.approx(slope, rel=1e-6, abs=1e-3)
    whole = kept.detach().floor()
    assert cost.soft("activations", whole).item() == cost.of("activations", [int(k) for k in whole])


@pytest.mark.parametrize("allocation", ["global", "uniform"])
@pytest.mark.parametrize("name", ["resnet8", "torchvision/squeezenet1_1"])
def test_a_budget_is_met_within_one_unit(name: str, allocation: str) -> None:
    model = build_model(name, classes=10)
    x = torch.randn(1, 3, 32, 32)
    pruned = sc.prune(model, x, budget=sc.Budget(activations=0.5), allocation=allocation, round_to=1)
    cost, limit = sc.Cost(pruned.graph), pruned.before["activations"] // 2
    assert pruned.after["activations"] <= limit
    assert pruned.after["activations"] == measured_peak(pruned.model, x)
    kept = [int(mask.sum()) for mask in pruned.plan.masks(pruned.graph)]
    for number, (k, full) in enumerate(zip(kept, cost.full, strict=True)):
        if k < full:
            assert cost.of("activations", [*kept[:number], k + 1, *kept[number + 1 :]]) > limit
