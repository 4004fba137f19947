"""The laws that hold for every network: cut ≡ mask, costs agree, files rebuild, plans compose."""

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.graph import Graph, Group, named_tensors
from secateur.proof.verify import trains
from tests.networks import ALL, LARGE, Network, network
from tests.oracles import counted_macs, counted_params, random_masks, twin


def marked(name: str) -> object:
    """One process tests all laws of a network; large networks are slow."""
    slow = [pytest.mark.slow] if name.rpartition("/")[2] in LARGE else []
    return pytest.param(name, marks=[pytest.mark.xdist_group(name), *slow])


@pytest.fixture(scope="module", params=[marked(name) for name in ALL])
def case(request: pytest.FixtureRequest) -> tuple[Network, Graph]:
    net = network(request.param)
    return net, sc.analyze(net.model, net.inputs)


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / a.abs().max()).item()


def test_cut_equals_mask_for_every_group(case: tuple[Network, Graph]) -> None:
    net, graph = case
    assert graph.groups
    silent = 0
    with torch.no_grad():
        dense = net.model(net.inputs)
        for number, group in enumerate(graph.groups):
            plan = sc.Plan.of(graph, random_masks(graph, seed=number, only=number))
            reference = masked_twin(net.model, graph, plan)(net.inputs)
            cut = sc.cut_(twin(net.model), graph, plan)
            assert relative_error(reference, cut(net.inputs)) < 1e-10, group.name
            silent += relative_error(dense, reference) < 1e-9
    # Auxiliary heads run in training only, and a few gates are closed for one image; all others must show.
    assert silent <= len(graph.groups) / 10


def masked_twin(model: nn.Module, graph: Graph, plan: sc.Plan) -> nn.Module:
    """A masked copy in which only the touched parameters are copied."""
    result = twin(model)
    touched = {m.tensor for g in graph.groups if g.name in plan.removed for m in g.members}
    for name, tensor in result.named_parameters():
        if name in touched:
            tensor.data = tensor.data.clone()
    return sc.mask_(result, graph, plan)


def test_everything_at_once(case: tuple[Network, Graph], tmp_path) -> None:
    net, graph = case
    plan = sc.Plan.of(graph, random_masks(graph, seed=7, share=0.6))
    cut = sc.cut_(twin(net.model), graph, plan)
    with torch.no_grad():
        reference = masked_twin(net.model, graph, plan)(net.inputs)
        assert relative_error(reference, cut(net.inputs)) < 1e-10

    cost, kept = sc.Cost(graph), plan.kept(graph)
    assert cost.macs() == counted_macs(net.model, net.inputs)
    assert cost.macs(kept) == counted_macs(cut, net.inputs)
    assert cost.params() == counted_params(net.model)
    assert cost.params(kept) == counted_params(cut)
    again = sc.Cost(sc.analyze(cut, net.inputs))
    assert (again.macs(), again.params()) == (cost.macs(kept), cost.params(kept))

    if net.name.rpartition("/")[2] not in LARGE:
        sc.save(cut, tmp_path / "cut.safetensors")
        loaded = sc.load(network(net.name).model, tmp_path / "cut.safetensors")
        same = zip(named_tensors(cut), named_tensors(loaded), strict=True)
        assert all(a == b and torch.equal(s, t) for (a, s), (b, t) in same)
        with torch.no_grad():
            assert torch.equal(cut(net.inputs), loaded(net.inputs))
    assert trains(cut, graph, seed=0)


def test_empty_plan_is_a_bitwise_no_op(case: tuple[Network, Graph]) -> None:
    net, graph = case
    plan = sc.Plan.of(graph, [torch.ones(g.units, dtype=torch.bool) for g in graph.groups])
    cut = sc.cut_(twin(net.model), graph, plan)
    for (name, a), (_, b) in zip(named_tensors(net.model), named_tensors(cut), strict=True):
        assert torch.equal(a, b), name
    assert repr(cut) == repr(net.model)


def test_two_cuts_compose(case: tuple[Network, Graph]) -> None:
    """Cutting some units, then others, gives the tensors that one cut of both gives."""
    net, graph = case
    first = random_masks(graph, seed=1, share=0.3)
    for mask in first:
        mask[:2] = True  # a group cut to a single unit would be no group any more
    twice = sc.cut_(twin(net.model), graph, sc.Plan.of(graph, first))
    middle = sc.analyze(twice, net.inputs)
    # A grouped convolution may offer other units once its widths have changed; such groups stay whole.
    alike = {signature(group): number for number, group in enumerate(middle.groups)}
    second = random_masks(middle, seed=2)
    rest = [torch.ones_like(mask) for mask in second]
    both = []
    for group, mask in zip(graph.groups, first, strict=True):
        number = alike.get(signature(group))
        if number is not None:
            rest[number] = second[number]
            mask = mask.clone().masked_scatter(mask, second[number])
        both.append(mask)
    assert sum(not mask.all() for mask in rest) > len(graph.groups) / 2
    sc.cut_(twice, middle, sc.Plan.of(middle, rest))
    once = sc.cut_(twin(net.model), graph, sc.Plan.of(graph, both))
    for (name, a), (_, b) in zip(named_tensors(once), named_tensors(twice), strict=True):
        assert torch.equal(a, b), name


def signature(group: Group) -> tuple[tuple[str, int, int], ...]:
    return tuple((member.tensor, member.dim, member.index.shape[1]) for member in group.members)


def test_plan_survives_json(case: tuple[Network, Graph]) -> None:
    _, graph = case
    plan = sc.Plan.of(graph, random_masks(graph, seed=3), {"score": "l2"})
    assert sc.Plan.from_json(plan.to_json()) == plan
