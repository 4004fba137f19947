"""The laws that hold for every network: cut ≡ mask, costs agree, files rebuild, plans compose."""

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.graph import Graph, Group, named_tensors
from secateur.proof.verify import training_fails
from tests.networks import ALL, QUICK, Network, network
from tests.oracles import counted_macs, counted_params, culprits, random_masks, separating_sets, twin

Cut = Callable[[nn.Module, Graph, sc.Plan], nn.Module]


@dataclass(frozen=True)
class Case:
    """A network, and the same network cut: what all laws are about.

    Attributes:
        masks: which units of the graph stay in the cut network; at least two per group, since a group of a
            single unit would be no group any more.
    """

    net: Network
    graph: Graph
    masks: list[Tensor]
    cut: nn.Module

    @functools.cached_property
    def again(self) -> Graph:
        """The analysis of the cut network."""
        return sc.analyze(self.cut, self.net.inputs)


def networks() -> pytest.MarkDecorator:
    """One process tests all laws of a network."""
    params = [
        pytest.param(name, marks=[pytest.mark.xdist_group(name), *[pytest.mark.slow] * (name not in QUICK)])
        for name in ALL
    ]
    return pytest.mark.parametrize("case", params, indirect=True)


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    net = network(request.param)
    graph = sc.analyze(net.model, net.inputs)
    masks = random_masks(graph, seed=7, share=0.5)
    for mask in masks:
        mask[:2] = True
    return Case(net, graph, masks, sc.cut_(twin(net.model), graph, sc.Plan.of(graph, masks)))


def relative_error(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / a.abs().max()).item()


@networks()
def test_cut_equals_mask_for_every_group(case: Case) -> None:
    assert case.graph.groups
    check_groups(case.net, case.graph)


def check_groups(net: Network, graph: Graph, cut: Cut = sc.cut_) -> None:
    """Cut many groups at a time, each of them without each other one, and name those at which it fails."""

    def equal(groups: Collection[int], seed: int) -> bool:
        plan = sc.Plan.of(graph, random_masks(graph, seed, only=groups))
        with torch.no_grad():
            reference = masked_twin(net.model, graph, plan)(net.inputs)
            return relative_error(reference, cut(twin(net.model), graph, plan)(net.inputs)) < 1e-10

    for seed, groups in enumerate(separating_sets(len(graph.groups))):
        if not equal(groups, seed):
            found = culprits(groups, lambda part, seed=seed: equal(part, seed))
            names = ", ".join(graph.groups[number].name for number in found)
            pytest.fail(f"cut and mask differ at {names} (masks of seed {seed})")


def masked_twin(model: nn.Module, graph: Graph, plan: sc.Plan) -> nn.Module:
    """A masked copy in which only the touched parameters are copied."""
    result = twin(model)
    touched = {m.tensor for g in graph.groups if g.name in plan.removed for m in g.members}
    for name, tensor in result.named_parameters():
        if name in touched:
            tensor.data = tensor.data.clone()
    return sc.mask_(result, graph, plan)


def test_a_fault_in_any_single_group_is_found_and_named() -> None:
    """Once per group: wherever that group is cut, other units of it go than the plan says."""
    net = network("resnet8")
    graph = sc.analyze(net.model, net.inputs)

    def cut_wrongly(group: int) -> Cut:
        def cut(model: nn.Module, graph: Graph, plan: sc.Plan) -> nn.Module:
            masks = plan.masks(graph)
            masks[group] = masks[group].roll(1)
            return sc.cut_(model, graph, sc.Plan.of(graph, masks))

        return cut

    for number, group in enumerate(graph.groups):
        with pytest.raises(pytest.fail.Exception, match=rf"differ at {group.name} \("):
            check_groups(net, graph, cut_wrongly(number))


def test_every_group_is_cut_without_every_other() -> None:
    for count in (1, 2, 7, 20, 120):
        sets = separating_sets(count)
        assert len(sets) <= 10
        for a in range(count):
            assert all(any(a in s and b not in s for s in sets) for b in range(count) if b != a)
            assert any(a in s for s in sets)


def test_two_groups_that_fail_together_only_are_both_named() -> None:
    assert culprits(range(9), lambda part: not {2, 7} <= set(part)) == range(9)
    assert culprits([2, 3, 6, 7], lambda part: 6 not in part) == [6]


@networks()
def test_removing_units_shows_in_the_output(case: Case) -> None:
    """To first order, by one backward pass. Otherwise a cut and a mask would be equal whatever was cut."""
    net, graph = case.net, case.graph
    model = twin(net.model)
    output = model(net.inputs)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(0), dtype=output.dtype)
    (output * direction).sum().backward()
    parameters = dict(model.named_parameters())
    silent = 0
    for group, mask in zip(graph.groups, random_masks(graph, seed=0), strict=True):
        effect = torch.zeros(group.units, dtype=output.dtype)
        for member in group.members:
            weight = parameters.get(member.tensor)
            if weight is not None and weight.grad is not None:
                change = (weight * weight.grad).detach().movedim(member.dim, 0)
                effect += change.reshape(len(change), -1).sum(1)[torch.as_tensor(member.index)].abs().sum(1)
        silent += bool(effect[~mask].max() < 1e-9 * output.abs().max())
    # Auxiliary heads run in training only, and a few gates are closed for one image; all others must show.
    assert silent <= len(graph.groups) / 10


@networks()
def test_everything_at_once(case: Case, tmp_path) -> None:
    net, graph, cut = case.net, case.graph, case.cut
    plan = sc.Plan.of(graph, case.masks)
    with torch.no_grad():
        reference = masked_twin(net.model, graph, plan)(net.inputs)
        assert relative_error(reference, cut(net.inputs)) < 1e-10

    cost, kept = sc.Cost(graph), plan.kept(graph)
    assert cost.macs() == counted_macs(net.model, net.inputs)
    assert cost.macs(kept) == counted_macs(cut, net.inputs)
    assert cost.params() == counted_params(net.model)
    assert cost.params(kept) == counted_params(cut)

    sc.save(cut, tmp_path / "cut.safetensors")
    loaded = sc.load(network(net.name).model, tmp_path / "cut.safetensors")
    same = zip(named_tensors(cut), named_tensors(loaded), strict=True)
    assert all(a == b and torch.equal(s, t) for (a, s), (b, t) in same)
    with torch.no_grad():
        assert torch.equal(cut(net.inputs), loaded(net.inputs))
    assert not training_fails(twin(cut), graph, seed=0)


@networks()
def test_empty_plan_is_a_bitwise_no_op(case: Case) -> None:
    net, graph = case.net, case.graph
    plan = sc.Plan.of(graph, [torch.ones(g.units, dtype=torch.bool) for g in graph.groups])
    cut = sc.cut_(twin(net.model), graph, plan)
    for (name, a), (_, b) in zip(named_tensors(net.model), named_tensors(cut), strict=True):
        assert torch.equal(a, b), name
    assert repr(cut) == repr(net.model)


@networks()
def test_the_cut_network_costs_what_the_formula_said(case: Case) -> None:
    cost, kept = sc.Cost(case.graph), sc.Plan.of(case.graph, case.masks).kept(case.graph)
    again = sc.Cost(case.again)
    assert (again.macs(), again.params()) == (cost.macs(kept), cost.params(kept))


@networks()
def test_two_cuts_compose(case: Case) -> None:
    """Cutting some units, then others, gives the tensors that one cut of both gives."""
    net, graph, middle = case.net, case.graph, case.again
    # A grouped convolution may offer other units once its widths have changed; such groups stay whole.
    alike = {signature(group): number for number, group in enumerate(middle.groups)}
    second = random_masks(middle, seed=2)
    rest = [torch.ones_like(mask) for mask in second]
    both = []
    for group, mask in zip(graph.groups, case.masks, strict=True):
        number = alike.get(signature(group))
        if number is not None:
            rest[number] = second[number]
            mask = mask.clone().masked_scatter(mask, second[number])
        both.append(mask)
    assert sum(not mask.all() for mask in rest) > len(graph.groups) / 2
    twice = sc.cut_(twin(case.cut), middle, sc.Plan.of(middle, rest))
    once = sc.cut_(twin(net.model), graph, sc.Plan.of(graph, both))
    for (name, a), (_, b) in zip(named_tensors(once), named_tensors(twice), strict=True):
        assert torch.equal(a, b), name


def signature(group: Group) -> tuple[tuple[str, int, int], ...]:
    return tuple((member.tensor, member.dim, member.index.shape[1]) for member in group.members)


@networks()
def test_plan_survives_json(case: Case) -> None:
    plan = sc.Plan.of(case.graph, random_masks(case.graph, seed=3), {"score": "l2"})
    assert sc.Plan.from_json(plan.to_json()) == plan
