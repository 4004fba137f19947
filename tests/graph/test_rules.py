"""Small networks with one structure each: what is tied, what is free, what is frozen and why."""

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur as sc
from secateur.graph import Graph
from secateur.proof.verify import randomise_
from tests.graph.nets import Net, conv
from tests.oracles import counted_macs, random_masks, tensors_of, without_units


def shuffle(x: Tensor, groups: int) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class HardPad(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, 4, 4))


class SoftPad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.front, self.back = 4, 4

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, self.front, self.back))


pytestmark = pytest.mark.xdist_group("graph rules")  # one process analyses each network
sc.register_pad(SoftPad, "front", "back")

CASES = {
    # name: (network, {group: units}, reasons of frozen channels other than the output)
    "chain": (Net(lambda m, x: m.c(m.b(m.a(x)).relu()), a=conv(3, 6), b=conv(6, 8, 3), c=conv(8, 4)),
              {"a": 6, "b": 8}, set()),
    "residual": (Net(lambda m, x: m.c(m.a(x) + m.b(m.a(x))), a=conv(3, 6), b=conv(6, 6), c=conv(6, 4)),
                 {"a": 6}, set()),
    "concat": (Net(lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 1)), a=conv(3, 6), b=conv(3, 5), c=conv(11, 4)),
               {"a": 6, "b": 5}, set()),
    "concat twice": (Net(lambda m, x: m.c(torch.cat([m.a(x), m.b(x), m.a(x)], 1)), a=conv(3, 6), b=conv(3, 5),
                         c=conv(17, 4)), {"a": 6, "b": 5}, set()),
    "flatten": (Net(lambda m, x: m.f(m.a(x).flatten(1)), a=conv(3, 6), f=nn.Linear(6 * 64, 4)), {"a": 6}, set()),
    "pool and linear": (Net(lambda m, x: m.g(m.f(m.a(x).mean((2, 3))).relu()), a=conv(3, 6), f=nn.Linear(6, 5),
                            g=nn.Linear(5, 4)), {"a": 6, "f": 5}, set()),
    "depthwise": (Net(lambda m, x: m.c(m.n(m.d(m.a(x)))), a=conv(3, 6), d=conv(6, 6, 3, groups=6),
                      n=nn.BatchNorm2d(6), c=conv(6, 4)), {"a": 6}, set()),
    "depthwise with multiplier": (Net(lambda m, x: m.c(m.d(m.a(x))), a=conv(3, 6), d=conv(6, 12, 3, groups=6),
                                      c=conv(12, 4)), {"a": 6}, set()),
    "grouped, many narrow": (Net(lambda m, x: m.c(m.g(m.a(x))), a=conv(3, 16), g=conv(16, 16, 3, groups=8),
                                 c=conv(16, 4)), {"a": 8}, set()),
    "grouped, few wide": (Net(lambda m, x: m.c(m.g(m.a(x))), a=conv(3, 16), g=conv(16, 32, 3, groups=2),
                              c=conv(32, 4)), {"a": 8, "g": 16}, set()),
    "transposed": (Net(lambda m, x: m.c(m.t(m.a(x))), a=conv(3, 6), t=nn.ConvTranspose2d(6, 5, 2, 2), c=conv(5, 4)),
                   {"a": 6, "t": 5}, set()),
    "squeeze and excite": (Net(lambda m, x: m.c(m.a(x) * m.v(m.u(m.a(x).mean((2, 3), keepdim=True)).relu()).sigmoid()),
                               a=conv(3, 6), u=conv(6, 3), v=conv(3, 6), c=conv(6, 4)), {"a": 6, "u": 3}, set()),
    "spatial mask": (Net(lambda m, x: m.c(m.a(x) * m.s(x).sigmoid()), a=conv(3, 6), s=conv(3, 1), c=conv(6, 4)),
                     {"a": 6}, {"a single channel is used on its own"}),
    "chunk": (Net(lambda m, x: m.c(torch.mul(*m.a(x).chunk(2, 1))), a=conv(3, 12), c=conv(6, 4)), {"a": 6}, set()),
    "select": (Net(lambda m, x: m.a(x)[:, 2], a=conv(3, 6)), {}, {"one channel is selected by its number"}),
    "shuffle": (Net(lambda m, x: m.c(shuffle(m.a(x), 2)), a=conv(3, 12), c=conv(12, 4)), {"a": 6}, set()),
    "hard pad": (Net(lambda m, x: m.c(m.p(m.a(x)) + m.b(x)), a=conv(3, 8), b=conv(3, 16), p=HardPad(), c=conv(16, 4)),
                 {"a": 8}, {"meets a tensor whose channels are fixed", "given"}),
    "soft pad": (Net(lambda m, x: m.c(m.p(m.a(x)) + m.b(x)), a=conv(3, 8), b=conv(3, 16), p=SoftPad(), c=conv(16, 4)),
                 {"a": 8, "b": 8}, set()),
    "called twice": (Net(lambda m, x: m.c(m.b(m.b(m.a(x)))), a=conv(3, 6), b=conv(6, 6), c=conv(6, 4)),
                     {"a": 6}, set()),
    "no rule": (Net(lambda m, x: m.c(torch.fft.fft(m.a(x)).real), a=conv(3, 6), c=conv(6, 4)), {},
                {"no rule for aten.fft_fft"}),
    "roll": (Net(lambda m, x: m.c(m.b(torch.roll(m.a(x), (1, 2), (2, 3))).roll(1, 1)), a=conv(3, 6), b=conv(6, 5),
                 c=conv(5, 4)), {"a": 6}, {"aten.roll over channels"}),
    "layer norm": (Net(lambda m, x: m.f(m.n(m.e(x.mean((2, 3))))), e=nn.Linear(3, 6), n=nn.LayerNorm(6),
                       f=nn.Linear(6, 4)), {"e": 6}, set()),
    "sum over channels": (Net(lambda m, x: m.c(m.a(x)).sum(1, keepdim=True), a=conv(3, 6), c=conv(6, 4)),
                          {"a": 6, "c": 4}, set()),
    "parameter as operand": (Net(lambda m, x: m.c(m.a(x) * m.n.weight.view(1, -1, 1, 1)), a=conv(3, 6),
                                 n=nn.BatchNorm2d(6), c=conv(6, 4)), {"a": 6}, set()),
    "prelu": (Net(lambda m, x: m.c(m.p(m.a(x))), a=conv(3, 6), p=nn.PReLU(6), c=conv(6, 4)), {"a": 6}, set()),
    "upsample": (Net(lambda m, x: m.c(F.interpolate(m.a(x), scale_factor=2)), a=conv(3, 6), c=conv(6, 4)),
                 {"a": 6}, set()),
}  # fmt: skip


INPUT = torch.randn(1, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Case:
    """A network that tests only read, its analysis, and what that should say."""

    model: nn.Module
    graph: Graph
    groups: dict[str, int]
    reasons: set[str]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    model, groups, reasons = CASES[request.param]
    model = randomise_(copy.deepcopy(model), 0).double().eval()
    return Case(model, sc.analyze(model, INPUT), groups, reasons)


def reasons_of(graph: Graph) -> set[str]:
    return {item.reason for item in graph.frozen} - {"model output"}


def test_groups_and_reasons(case: Case) -> None:
    assert {group.name: group.units for group in case.graph.groups} == case.groups
    found = reasons_of(case.graph)
    assert all(any(part in reason for part in case.reasons) for reason in found), found
    assert bool(found) == bool(case.reasons)


def test_every_group_alone_and_all_together(case: Case) -> None:
    model, graph = case.model, case.graph
    for seed, only in enumerate([*([number] for number in range(len(graph.groups))), None]):
        plan = sc.Plan.of(graph, random_masks(graph, seed, only=only))
        cut = sc.cut_(copy.deepcopy(model), graph, plan)
        with torch.no_grad():
            expected = without_units(model, graph, plan, INPUT)
            torch.testing.assert_close(tensors_of(cut(INPUT)), expected, rtol=1e-11, atol=1e-11)
        assert counted_macs(cut, INPUT) == sc.Cost(graph).macs(plan.kept(graph))


def test_tied_weights_are_cut_once_and_stay_tied() -> None:
    model = Net(lambda m, x: m.c(m.b(m.a(x))), a=conv(3, 6), b=conv(6, 6), c=conv(6, 6))
    model.c.weight = model.b.weight
    graph = sc.analyze(model, INPUT.float())
    assert [
        group.units for group in graph.groups
    ] == []  # c makes the output, so b's channels are the output's
    model.d = conv(6, 4)
    model._function = lambda m, x: m.d(m.c(m.b(m.a(x))))
    graph = sc.analyze(model, INPUT.float())
    cut = sc.cut_(copy.deepcopy(model), graph, sc.Plan.of(graph, random_masks(graph, 0)))
    assert cut.c.weight is cut.b.weight
    assert cut.c.in_channels == cut.c.weight.shape[1] < 6


def test_frozen_modules_keep_every_tensor() -> None:
    model = CASES["chain"][0]
    graph = sc.analyze(model, INPUT.float(), freeze=["b"])
    assert not graph.groups  # b reads a's channels and makes its own
    assert reasons_of(graph) == {"frozen by the user (in b)"}
    assert [g.name for g in sc.analyze(model, INPUT.float(), freeze=["c"]).groups] == ["a"]
    with pytest.raises(sc.SecateurError, match="matches no module; the model has a, b, c"):
        sc.analyze(model, INPUT.float(), freeze=["layer9"])


def test_unused_parameters_are_named_and_left_alone() -> None:
    model = Net(lambda m, x: m.c(m.a(x)), a=conv(3, 6), c=conv(6, 4), spare=conv(5, 5))
    pruned = sc.prune(model, INPUT.float(), budget=sc.Budget(macs=0.5), round_to=1)
    assert pruned.graph.unused == ("spare.weight", "spare.bias")
    assert torch.equal(pruned.model.spare.weight, model.spare.weight)


def test_branches_of_the_training_pass_are_cut_along() -> None:
    """An auxiliary head runs in training only; its input must shrink with the trunk."""

    def forward(m: nn.Module, x: Tensor):
        y = m.a(x).relu()
        return (m.c(y), m.aux(y)) if m.training else m.c(y)

    model = Net(forward, a=conv(3, 6), c=conv(6, 4), aux=conv(6, 2))
    pruned = sc.prune(model, INPUT.float(), budget=sc.Budget(macs=0.5), round_to=1)
    assert pruned.model.aux.in_channels == pruned.model.a.out_channels < 6
    main, aux = pruned.model.train()(INPUT.float())
    (main.sum() + aux.sum()).backward()
    assert sc.Cost(pruned.graph).macs() == 64 * (3 * 6 + 6 * 4)  # the head costs nothing at inference


def test_the_choice_for_grouped_convolutions_keeps_most_units() -> None:
    narrow = sc.analyze(CASES["grouped, many narrow"][0], INPUT.float())
    pruned = sc.cut_(
        copy.deepcopy(CASES["grouped, many narrow"][0]), narrow, sc.Plan.of(narrow, [torch.arange(8) < 5])
    )
    assert (pruned.g.groups, pruned.g.in_channels, pruned.g.out_channels) == (5, 10, 10)
    wide = sc.analyze(CASES["grouped, few wide"][0], INPUT.float())
    pruned = sc.cut_(
        copy.deepcopy(CASES["grouped, few wide"][0]),
        wide,
        sc.Plan.of(wide, [torch.arange(8) < 3, torch.arange(16) < 5]),
    )
    assert (pruned.g.groups, pruned.g.in_channels, pruned.g.out_channels) == (2, 6, 10)


def test_regions_of_their_own_are_read_too() -> None:
    """Autocast and no-grad blocks are higher-order operators with a graph inside."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            y = m.b(m.a(x)).relu()
        with torch.no_grad():
            z = m.d(y)
        return m.c(z + y)

    model = Net(forward, a=conv(3, 6), b=conv(6, 5), d=conv(5, 5), c=conv(5, 4)).eval()
    graph = sc.analyze(model, INPUT.float())
    assert {group.name: group.units for group in graph.groups} == {"a": 6, "b": 5}
    plan = sc.Plan.of(graph, random_masks(graph, 0))
    assert sc.verify(model, sc.cut_(copy.deepcopy(model), graph, plan), graph, plan).ok
    assert sc.Cost(graph).macs() == counted_macs(model, INPUT.float())


def test_a_linear_layer_whose_weight_is_a_vector() -> None:
    """The mean of a distribution over bins, as detectors take it."""

    class Bins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 32), nn.Linear(32, 5)
            self.register_buffer("bins", torch.arange(5.0))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.b(self.a(x).relu()).softmax(-1), self.bins)

    torch.manual_seed(0)
    model, x = Bins(), torch.randn(2, 3, 6)
    pruned = sc.prune(model, x, budget=0.6, method="oneshot", round_to=1)
    assert pruned.proof.ok
    assert pruned.model(x).shape == (2, 3)
    assert pruned.model.a.out_features < 32
    assert len(pruned.model.bins) == pruned.model.b.out_features  # bins leave with their logits
