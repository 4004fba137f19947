"""Networks that choose: rounding may choose for them in float32, and that must neither refuse nor excuse anything."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.graph.duplicate import converted
from secateur.graph.probe import difference, random_inputs
from secateur.plan import Plan
from secateur.proof.choices import Choices
from secateur.proof.verify import run_own
from tests.oracles import random_masks


class Queries(nn.Module):
    """Takes the best positions of an image; their scores hardly differ, so that float32 cannot tell which."""

    def __init__(self, how: str, *, alike: bool = True) -> None:
        super().__init__()
        self.how = how
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 48, 3), nn.ReLU())
        self.mix, self.score, self.head = nn.Linear(48, 96), nn.Linear(96, 1), nn.Linear(48, 4)
        if alike:  # of what `mix` makes, `score` reads a direction in which there is nothing but rounding
            with torch.no_grad():
                self.score.weight.copy_(torch.linalg.svd(self.mix.weight.double())[0].T[-1:])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        scores = self.score(self.mix(x))[..., 0]
        if self.how == "gt":
            return self.head(x * (scores > scores.mean(1, keepdim=True))[..., None])
        if self.how == "topk":
            values, index = scores.topk(5)
        elif self.how == "max":
            values, index = scores.max(1, keepdim=True)
        else:
            index = (
                scores.argsort(1, descending=True)[:, :5] if self.how == "sort" else scores.argmax(1)[:, None]
            )
            values = scores.gather(1, index)
        return self.head(x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))) + values[..., None]


def cut_down(how: str, *, alike: bool = True) -> tuple[nn.Module, sc.Graph, Plan, nn.Module]:
    torch.manual_seed(1)
    model = Queries(how, alike=alike).eval()
    graph = sc.analyze(model, torch.randn(2, 3, 16, 16), freeze=["mix"])
    plan = sc.Plan.of(graph, random_masks(graph, 1))
    return model, graph, plan, sc.cut_(copy.deepcopy(model), graph, plan)


def apart(
    model: nn.Module, cut: nn.Module, graph: sc.Graph, plan: Plan, choices: Choices | None = None
) -> float:
    """How far a cut model is from the masked original in float32, if wanted with the same choices."""
    whole, call = (
        sc.mask_(converted(model, torch.float32), graph, plan),
        random_inputs(graph, torch.float32, 0),
    )
    with choices.recorded() if choices else nullcontext():
        expected = run_own(whole, call)
    with choices.repeated(1e-3) if choices else nullcontext():
        relative = difference(expected, run_own(cut, call))[1]
    return max(relative, choices.apart) if choices else relative


@pytest.mark.parametrize("how", ["topk", "max", "sort", "argmax", "gt"])
def test_float32_is_compared_with_the_same_choices(how: str) -> None:
    model, graph, plan, cut = cut_down(how)
    assert apart(model, cut, graph, plan) > 1e-2  # it chose something else
    proof = sc.verify(model, cut, graph, plan)
    assert proof.ok
    assert proof.choices == (how,)
    assert proof.max_rel_error < 1e-12  # float64, and the whole as it is
    assert proof.max_rel_error_float32 < 1e-5
    assert f"with the same choices ({how})" in str(proof)


def changed(cut: nn.Module, name: str, by: float) -> nn.Module:
    other = copy.deepcopy(cut)
    with torch.no_grad():
        other.get_parameter(name).mul_(1 + by)
    return other


def test_wrong_candidates_are_not_excused() -> None:
    """With the choices of the original, only the candidates tell that the scores are wrong."""
    model, graph, plan, cut = cut_down("argmax", alike=False)
    choices = Choices()
    assert apart(model, cut, graph, plan, choices) < 1e-5
    assert not choices.overruled
    wrong = changed(cut, "score.weight", -0.5)
    assert apart(model, wrong, graph, plan, Choices()) > 1e-2
    assert not sc.verify(model, wrong, graph, plan).ok


def test_what_follows_a_choice_is_compared() -> None:
    model, graph, plan, cut = cut_down("topk")
    wrong = changed(cut, "head.weight", 0.01)
    assert apart(model, wrong, graph, plan, Choices()) > 5e-3
    assert not sc.verify(model, wrong, graph, plan).ok


def test_a_network_that_chooses_clearly_is_compared_as_it_is() -> None:
    model, graph, plan, cut = cut_down("topk", alike=False)
    proof = sc.verify(model, cut, graph, plan)
    assert proof.ok
    assert not proof.choices
    assert "choices" not in str(proof)
