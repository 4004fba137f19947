"""What widths are multiples of: what hardware takes at once, less where groups are narrow or budgets tight."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.cost.multiples import HARDWARE, choose_multiples, hardware_of
from secateur.errors import BudgetError, SecateurError
from secateur.methods import Context, OneShot, PreCrop
from tests.networks import network


def chain(*widths: int) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    layers = [m for a, b in pairwise((3, *widths)) for m in (nn.Conv2d(a, b, 3), nn.ReLU())]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], 5, 3)), torch.randn(1, 3, 12, 12)


@pytest.mark.parametrize(("hardware", "expected"), [("avx512", (2, 8, 16, 16)), ("arm", (2, 8, 8, 8))])
def test_a_group_can_always_be_halved(hardware: str, expected: tuple[int, ...]) -> None:
    model, x = chain(5, 24, 32, 200)
    found = choose_multiples(model, sc.analyze(model, x), hardware, lambda kept: True)
    assert found.units == expected
    assert found.why.startswith(f"Widths are multiples of {HARDWARE[hardware].multiple}, for")


def test_units_of_many_channels_count_as_such() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(96, 3 * 96), nn.Linear(96, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, 6, 16).permute(2, 0, 3, 1, 4)
            y = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.out(y.transpose(1, 2).flatten(2))

    model, x = Attention(), torch.randn(2, 4, 96)
    for attention, expected in (("heads", {1}), ("dims", {8})):
        graph = sc.analyze(model, x, attention=attention)
        assert set(choose_multiples(model, graph, "avx512", lambda kept: True).units) == expected


def test_grouped_convolutions_count_channels_of_one_group() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 64, 1), nn.ReLU(), nn.Conv2d(64, 64, 3, groups=2), nn.ReLU(), nn.Conv2d(64, 4, 1)
    )
    graph = sc.analyze(model, torch.randn(1, 3, 8, 8))
    found = choose_multiples(model, graph, "avx512", lambda kept: True)
    for group, step in zip(graph.groups, found.units, strict=True):
        assert step == (16 if group.units >= 32 else 8)


def test_a_budget_that_multiples_cannot_meet_makes_them_finer() -> None:
    model, x = chain(32, 32)
    for share, most in ((0.5, 16), (0.1, 8), (0.04, 4)):
        pruned = sc.prune(model, x, budget=sc.Budget(macs=share), method=OneShot(round_to="avx512"))
        steps = pruned.plan.origin["multiples"]["units"]
        assert max(steps.values()) <= most
        assert pruned.after["macs"] <= share * pruned.before["macs"]
        kept = pruned.plan.kept(pruned.graph)
        assert all(k % steps[g.name] == 0 for k, g in zip(kept, pruned.graph.groups, strict=True))
    with pytest.raises(BudgetError, match="out of reach: macs 10 asks"):
        sc.prune(model, x, budget=sc.Budget(macs=10), method=OneShot(round_to="avx512"))


def test_no_step_more_would_fit() -> None:
    net = network("torchvision/mobilenet_v3_small", dtype=torch.float32)
    pruned = sc.prune(net.model, net.inputs, budget=sc.Budget(macs=0.6), method="oneshot", round_to="avx512")
    cost, kept = sc.Cost(pruned.graph), pruned.plan.kept(pruned.graph)
    limit = int(0.6 * cost.macs())
    assert cost.macs(kept) <= limit
    for number, (k, step) in enumerate(
        zip(kept, pruned.plan.origin["multiples"]["units"].values(), strict=True)
    ):
        full = cost.full[number]
        assert k == full or k % step == 0
        if k < full:
            assert cost.macs([*kept[:number], min(full, k + step), *kept[number + 1 :]]) > limit


def test_what_was_chosen_is_told() -> None:
    model, x = chain(24, 64)
    pruned = sc.prune(model, x, budget=sc.Budget(macs=0.5), method="oneshot")
    origin = pruned.plan.origin
    assert origin["round_to"] == hardware_of(model)
    assert origin["multiples"]["why"] in str(pruned)
    assert origin["multiples"]["why"] in pruned.report.notes
    assert sc.Plan.from_json(pruned.plan.to_json()).origin["multiples"] == origin["multiples"]
    plain = sc.prune(model, x, budget=sc.Budget(macs=0.5), method="oneshot", round_to=1)
    assert plain.plan.origin["round_to"] == 1
    assert "multiples" not in str(plain)


def test_widths_before_training_are_multiples_too() -> None:
    model, x = chain(64, 64, 64)
    pruned = PreCrop(round_to="avx512").prune(model, x, sc.Budget(macs=0.5), Context())
    assert all(width % 16 == 0 for width in pruned.plan.origin["widths"].values())
    assert pruned.after["macs"] <= 0.5 * pruned.before["macs"]


def test_an_unknown_name_lists_the_choices() -> None:
    with pytest.raises(
        SecateurError, match=r"round_to is 'sse'; expected a whole number, at least 1, or one of auto, avx512"
    ):
        OneShot(round_to="sse")
    with pytest.raises(SecateurError, match="round_to is 0"):
        OneShot(round_to=0)
