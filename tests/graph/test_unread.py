"""Parameters that only another way through their module reads: mask tokens, embeddings of what is to be denoised."""

import copy

import pytest
import torch
from torch import Tensor, nn

import secateur as sc


class Tokens(nn.Module):
    """Puts a token in the place of the patches that a mask hides, which the example does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(6, 16)
        self.hidden_token = nn.Parameter(torch.randn(1, 1, 16))
        self.position = nn.Parameter(torch.randn(1, 5, 16))

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        x = self.patches(x)
        if hidden is not None:
            x = torch.where(hidden[..., None], self.hidden_token, x)
        return x + self.position


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = Tokens(), nn.Linear(16, 3)

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        return self.head(self.tokens(x, hidden).relu())


class Denoising(nn.Module):
    """Two streams of one width; objects are embedded, and beside one of them, in training with targets only."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.memory = nn.Linear(6, 16), nn.Linear(16, 16)
        self.other = nn.Linear(6, 12)
        self.objects = nn.Embedding(7, 16)
        self.extra = nn.Linear(4, 16)
        self.head, self.side = nn.Linear(16, 3), nn.Linear(12, 3)

    def forward(self, x: Tensor, objects: Tensor | None = None) -> Tensor:
        queries = self.memory(self.project(x).relu()).relu()
        if objects is not None:
            boxes = self.extra(torch.ones(len(x), 1, 4))
            queries = torch.cat((self.objects(objects) + boxes, queries), 1)
        elif self.training:
            queries = queries + 0 * self.objects.weight.sum()
        return self.head(queries).sum(1) + self.side(self.other(x).relu()).sum(1)


def pruned(model: nn.Module, x: Tensor, **options: object) -> tuple[sc.Graph, nn.Module, nn.Module]:
    """The graph, the original with zeros for some units of every group, and the same cut."""
    graph = sc.analyze(model, x, **options)
    plan = sc.Plan.of(graph, [torch.arange(group.units) % 3 > 0 for group in graph.groups])
    cut = sc.cut_(copy.deepcopy(model), graph, plan)
    assert sc.verify(model, cut, graph, plan).ok
    return graph, sc.mask_(copy.deepcopy(model), graph, plan), cut


def test_a_token_follows_the_stream_it_is_put_into() -> None:
    torch.manual_seed(0)
    model, x = Masked().eval(), torch.randn(2, 5, 6)
    graph, masked, cut = pruned(model, x)
    assert not graph.unused
    assert cut.tokens.hidden_token.shape == (1, 1, 10)
    hidden = torch.arange(5) == torch.tensor([[1], [3]])
    torch.testing.assert_close(cut(x, hidden), masked(x, hidden))
    assert not torch.allclose(cut(x, hidden), cut(x))


def test_where_it_may_meet_two_streams_both_lose_the_same_as_it() -> None:
    torch.manual_seed(0)
    model, x = Denoising().eval(), torch.randn(2, 5, 6)
    graph, masked, cut = pruned(model, x)
    assert not graph.unused
    assert {group.units for group in graph.groups} == {16, 12}
    assert cut.objects.weight.shape == (7, 10)
    objects = torch.tensor([[0, 6], [2, 5]])
    torch.testing.assert_close(cut(x, objects), masked(x, objects))
    torch.testing.assert_close(cut.train()(x, objects), masked.train()(x, objects))


@pytest.mark.parametrize("name", ["objects", "memory"])
def test_what_is_frozen_keeps_both(name: str) -> None:
    graph, _, cut = pruned(Denoising().eval(), torch.randn(2, 5, 6), freeze=[name])
    assert cut.objects.weight.shape == (7, 16)
    assert [group.name for group in graph.groups][-1] == "other"


def test_what_may_meet_something_that_stays_keeps_all_that_is_as_wide() -> None:
    model, x = Denoising().eval(), torch.randn(2, 5, 6)
    model.register_forward_hook(
        lambda module, args, output: (output, module.project(args[0]))
    )  # is an output
    graph, _, cut = pruned(model, x)
    assert [group.name for group in graph.groups] == ["other"]
    assert cut.objects.weight.shape == (7, 16)
    model = Denoising().eval()
    model.objects, model.extra = nn.Embedding(7, 5), nn.Linear(4, 5)
    model.register_forward_hook(lambda module, args, output: (output, module.project(args[0])))
    assert [group.name for group in sc.analyze(model, x).groups] == ["memory", "other"]


def test_what_is_as_wide_as_nothing_is_left_alone() -> None:
    model = Masked().eval()
    model.tokens.hidden_token = nn.Parameter(torch.randn(1, 1, 5))
    graph, _, cut = pruned(model, torch.randn(2, 5, 6))
    assert graph.unused == ("tokens.hidden_token",)
    assert cut.tokens.hidden_token.shape == (1, 1, 5)
