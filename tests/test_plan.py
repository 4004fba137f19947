"""A plan is data from outside: everything in it is checked."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import secateur as sc
from secateur.errors import FileError, PlanError
from tests.networks import network


@pytest.fixture(scope="module")
def graph():
    net = network("resnet8", dtype=torch.float32)
    return sc.analyze(net.model, net.inputs)


@pytest.fixture
def plan(graph) -> sc.Plan:
    return sc.Plan.of(graph, [torch.arange(g.units) % 3 > 0 for g in graph.groups], {"score": "l2"})


def test_round_trip(plan: sc.Plan, graph, tmp_path) -> None:
    plan.save(tmp_path / "plan.json")
    loaded = sc.Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    loaded.check(graph)
    assert json.loads((tmp_path / "plan.json").read_text())["groups"]["conv1"]["units"] == 16


@given(st.data())
def test_any_masks_come_back(graph, data) -> None:
    masks = []
    for group in graph.groups:
        mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=group.units, max_size=group.units)))
        mask[data.draw(st.integers(0, group.units - 1))] = True
        masks.append(mask)
    back = sc.Plan.from_json(sc.Plan.of(graph, masks).to_json()).masks(graph)
    assert all(torch.equal(a, b) for a, b in zip(masks, back, strict=True))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"format": 2}', '{"format": 1}', "[" * 100_000,
     '{"format": 1, "fingerprint": "x", "groups": {"a": 3}}',
     '{"format": 1, "fingerprint": "x", "groups": {"a": {"units": "3", "removed": []}}}',
     '{"format": 1, "fingerprint": "x", "groups": {"a": {"units": 3, "removed": [true]}}}',
     '{"format": 1, "fingerprint": 7, "groups": {}}'],
)  # fmt: skip
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="not a plan"):
        sc.Plan.from_json(text)


@pytest.mark.parametrize(
    ("removed", "message"),
    [([3, 3], "distinct, ascending"), ([2, 1], "distinct, ascending"), ([-1], r"in 0…15"), ([16], r"in 0…15"),
     (list(range(16)), "removes all 16; at least 1 must stay")],
)  # fmt: skip
def test_units_that_do_not_exist_are_refused(plan: sc.Plan, graph, removed: list[int], message: str) -> None:
    data = json.loads(plan.to_json())
    data["groups"]["conv1"]["removed"] = removed
    with pytest.raises(PlanError, match=message):
        sc.Plan.from_json(json.dumps(data)).check(graph)


def test_a_plan_of_another_model_is_refused(plan: sc.Plan) -> None:
    net = network("resnet20", dtype=torch.float32)
    before = {name: t.clone() for name, t in net.model.state_dict().items()}
    graph = sc.analyze(net.model, net.inputs)
    for function in (sc.mask_, sc.cut_):
        with pytest.raises(PlanError, match="the plan was made for model"):
            function(net.model, graph, plan)
    assert all(torch.equal(t, before[name]) for name, t in net.model.state_dict().items())


def test_files(tmp_path, plan: sc.Plan) -> None:
    with pytest.raises(FileError, match="cannot be read as a plan"):
        sc.Plan.load(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FileError, match="cannot be read as a plan"):
        sc.Plan.load(tmp_path / "binary.json")
    with pytest.raises(FileError, match="could not be written"):
        plan.save(tmp_path / "no such folder" / "plan.json")
