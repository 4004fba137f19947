"""The one call, and methods, scores and allocations of the user's own in it."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.settings import options_of
from tests.small import residual_net


def test_every_method_is_there_with_its_options() -> None:
    for name, method in sc.methods.METHODS.items():
        assert method.name == name
        assert getattr(sc.methods, method.__name__) is method
        assert method.summary
        assert method.when in ("before", "during", "after")
        assert method.removes in ("channels", "weights", "filters")
        for option in options_of(method).values():
            assert option.help
            assert not option.help.endswith(".")


@pytest.mark.parametrize("name", sc.methods.METHODS)
def test_a_wrong_option_is_our_error_and_names_the_choices(name: str) -> None:
    method = sc.methods.METHODS[name]
    with pytest.raises(sc.SecateurError, match=r"unknown option 'no_such'; choose one of: .*freeze"):
        method(no_such=1)
    with pytest.raises(sc.SecateurError, match="freeze is 3; expected a list"):
        method(freeze=3)
    with pytest.raises(sc.SecateurError, match="by name"):
        method("l2")


def test_auto_is_the_default_and_takes_rd_where_there_is_data() -> None:
    model, x = residual_net()
    assert sc.prune(model, x[:2], budget=sc.Budget(macs=0.6)).plan.origin["method"] == "oneshot"
    pruned = sc.prune(model, x[:2], budget=sc.Budget(macs=0.6), data=[x], levels=3)
    assert pruned.plan.origin["method"] == "rd"
    peak = sc.prune(model, x[:2], budget=sc.Budget(activations=0.8), data=[x])
    assert peak.plan.origin["method"] == "oneshot"
    assert "peak activation memory: " in str(peak)


def test_a_number_is_a_bound_of_the_macs() -> None:
    model, x = residual_net()
    assert sc.prune(model, x, budget=0.5).plan == sc.prune(model, x, budget=sc.Budget(macs=0.5)).plan
    with pytest.raises(sc.SecateurError, match="keeps everything"):
        sc.prune(model, x, budget=1.0)


def test_what_a_notebook_prints_is_short() -> None:
    model, x = residual_net()
    pruned = sc.prune(model, x, budget=0.5)
    for shown in (pruned, pruned.plan, pruned.graph, pruned.proof):
        assert type(shown).__name__ in repr(shown)
        assert len(repr(shown)) < 400
    assert {"Pruned", "Graph", "Verification", "methods", "prune"} <= set(dir(sc))


def test_the_result_has_a_report() -> None:
    model, x = residual_net()
    report = sc.prune(model, x[:2], budget=sc.Budget(macs=0.6), score="l1").report
    assert report.share("macs") <= 0.6
    assert report.is_proven
    assert {width.layer for width in report.widths} == {"stem", "block.conv1", "block.conv2"}
    assert report.budget == {"macs": 0.6}


OWN = """
import torch
from torch import nn

def largest(slices, generator):
    return torch.stack([s.weight.abs().amax(1) for s in slices if s.role == "out"]).amax(0)

def first_groups_first(scores, least):
    import numpy as np
    return np.concatenate([np.full(len(s) - low, i) for i, (s, low) in enumerate(zip(scores, least))])

def halve(model, inputs, budget, *, bias=True):
    model.head = nn.Identity()
    return model
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_pruning.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_pruning", raising=False)


@pytest.mark.usefixtures("own")
def test_scores_and_allocations_of_your_own_by_name_or_as_functions() -> None:
    import own_pruning  # type: ignore[import-not-found]

    model, x = residual_net()
    named, passed = (
        sc.prune(model, x[:2], budget=sc.Budget(macs=0.6), score=score, allocation=allocation)
        for score, allocation in (
            ("own_pruning:largest", "own_pruning:first_groups_first"),
            (own_pruning.largest, own_pruning.first_groups_first),
        )
    )
    assert named.plan.removed == passed.plan.removed
    assert passed.plan.origin["score"] == "own_pruning:largest"
    (group,) = (n for n, g in enumerate(named.graph.groups) if g.name == "block.conv1")
    (producer,) = (m for m in named.graph.groups[group].members if m.role == "out")
    peak = producer.take(model.get_parameter(producer.tensor).detach()).abs().amax(1)
    torch.testing.assert_close(named.scores[group], peak)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"score": "l3"}, "score is 'l3'; expected one of l1, l2"),
        ({"score": "no_such_module:f"}, "cannot import 'no_such_module'"),
        ({"allocation": "fair"}, "allocation is 'fair'; expected one of global, uniform"),
        ({"method": "lap"}, "unknown method 'lap'; choose one of: at-init, auto"),
        ({"method": "lapp"}, r"prunes while the model is trained: .*LAPP\(\.\.\.\)\.start"),
        (
            {"rounds": 3},
            "method auto takes no rounds; name the method, or choose one of: freeze, scope, score",
        ),
        ({"budget": "half"}, "expected a Budget, such as"),
        ({"method": "snip"}, "data="),
        ({"method": "oneshot", "score": "taylor", "data": [torch.zeros(2, 3, 8, 8)]}, "without targets"),
    ],
)
def test_mistakes_say_what_to_do(wrong: dict[str, object], message: str) -> None:
    model, x = residual_net()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    drawn = torch.get_rng_state()
    with pytest.raises(sc.SecateurError, match=message):
        sc.prune(model, x[:2], **{"budget": sc.Budget(params=0.6), **wrong})  # type: ignore[arg-type]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.usefixtures("own")
def test_a_function_of_your_own_is_a_method() -> None:
    model, x = residual_net()

    def gone(copied: nn.Module, inputs: torch.Tensor, budget: sc.Budget, *, keep: int = 1) -> object:
        return None

    with pytest.raises(sc.SecateurError, match="got NoneType, expected the smaller model"):
        sc.prune(model, x[:2], budget=sc.Budget(macs=0.5), method=gone)
    with pytest.raises(sc.SecateurError, match="unknown option 'kep'; choose one of: keep"):
        sc.prune(model, x[:2], budget=sc.Budget(macs=0.5), method=gone, kep=2)
    smaller: Callable[..., nn.Module] = lambda m, inputs, budget: sc.prune(m, inputs, budget=budget).model  # noqa: E731
    pruned = sc.prune(model, x[:2], budget=sc.Budget(macs=0.5), method=smaller)
    assert pruned.plan is pruned.proof is None
    assert pruned.after["macs"] <= 0.5 * pruned.before["macs"]
