"""Networks drawn from a grammar: whatever it builds is cut right, or the test prints the smallest that is not.

A network is a function of its number alone. SECATEUR_FUZZ=2000 tests that many numbers instead of the default,
SECATEUR_FUZZ_START moves the range, and a failure says how to run its network again.
"""

import os
import tempfile
from pathlib import Path

import pytest
import torch

import secateur as sc
from secateur.errors import SecateurError
from secateur.graph import named_tensors
from tests.fuzz.grammar import BLOCKS, SIZE, TAILS, Block, Recipe, build, draw, shrink
from tests.oracles import counted_macs, counted_params, random_masks, tensors_of, twin, without_units

COUNT = int(os.environ.get("SECATEUR_FUZZ", "150"))
START = int(os.environ.get("SECATEUR_FUZZ_START", "0"))
SHARD = 10


def check(recipe: Recipe, seed: int = 0) -> int:
    """Raise AssertionError or SecateurError unless a random cut of the network is right; returns its groups."""
    model = build(recipe)
    x = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    graph = sc.analyze(model, x)
    plan = sc.Plan.of(graph, random_masks(graph, seed))
    expected = without_units(model, graph, plan, x)
    cut = sc.cut_(twin(model), graph, plan)
    with torch.no_grad():
        found = tensors_of(cut(x))
    for a, b in zip(expected, found, strict=True):
        assert a.shape == b.shape
        error = ((a - b).abs().max() / a.abs().max()).item()
        assert error < 1e-9, f"cut and masked differ by {error:.1e}"
    cost, kept = sc.Cost(graph), plan.kept(graph)
    assert (cost.macs(), cost.params()) == (counted_macs(model, x), counted_params(model)), "dense cost"
    assert (cost.macs(kept), cost.params(kept)) == (counted_macs(cut, x), counted_params(cut)), "cut cost"
    with tempfile.TemporaryDirectory() as folder:
        sc.save(cut, Path(folder) / "cut.safetensors")
        loaded = sc.load(build(recipe), Path(folder) / "cut.safetensors")
    for (a, s), (b, t) in zip(named_tensors(cut), named_tensors(loaded), strict=True):
        assert a == b, "names of the loaded model"
        assert torch.equal(s, t), f"{a} of the loaded model"
    with torch.no_grad():
        for a, b in zip(found, tensors_of(loaded(x)), strict=True):
            assert torch.equal(a, b), "output of the loaded model"
    return len(graph.groups)


def failure(recipe: Recipe, seed: int) -> str:
    """Why a recipe fails; empty where it does not."""
    try:
        check(recipe, seed)
    except (
        AssertionError,
        SecateurError,
        ArithmeticError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as e:
        return f"{type(e).__name__}: {e}"
    return ""


def run(seeds: range) -> None:
    """Every seed of the range; the first failing one is reduced."""
    for seed in seeds:
        if failure(draw(seed), seed):
            small = shrink(draw(seed), lambda recipe, seed=seed: bool(failure(recipe, seed)))
            again = (
                f"SECATEUR_FUZZ_START={seed} SECATEUR_FUZZ=1 pytest {Path(__file__).name} -k random_networks"
            )
            pytest.fail(f"{again}\n{failure(small, seed)}\n{small}\n{build(small)}", pytrace=False)


def shards(start: int, count: int) -> list[object]:
    """Ranges of seeds; all but the first are slow."""
    parts = [range(i, min(i + SHARD, start + count)) for i in range(start, start + count, SHARD)]
    slow = [[pytest.mark.slow] * (part.start > start) for part in parts]
    names = [f"{part.start}-{part.stop - 1}" for part in parts]
    return [
        pytest.param(part, marks=marks, id=name) for part, marks, name in zip(parts, slow, names, strict=True)
    ]


@pytest.mark.parametrize("seeds", shards(START, COUNT))
def test_random_networks(seeds: range) -> None:
    run(seeds)


@pytest.mark.parametrize("kind", BLOCKS)
def test_every_block_can_be_pruned(kind: str) -> None:
    """One block between stem and head: something goes, and what remains is right."""
    assert min(check(Recipe(8, (Block(kind, seed),), Block("pool", 0)), seed) for seed in range(3)) > 0


@pytest.mark.parametrize("kind", TAILS)
def test_every_tail_can_be_pruned(kind: str) -> None:
    assert check(Recipe(8, (Block("Plain", 0),), Block(kind, 0))) > 0


def test_a_recipe_is_a_pure_function_of_its_seed() -> None:
    assert draw(5) == draw(5)
    first, second = build(draw(5)), build(draw(5))
    for (_, a), (_, b) in zip(named_tensors(first), named_tensors(second), strict=True):
        assert torch.equal(a, b)


def test_a_failure_is_reduced_to_the_blocks_that_cause_it() -> None:
    blocks = tuple(Block(kind, 0) for kind in ("Plain", "Shuffle", "Residual", "Grouped"))

    def fails(recipe: Recipe) -> bool:
        kinds = {block.kind for block in recipe.blocks}
        return {"Shuffle", "Grouped"} <= kinds

    small = shrink(Recipe(16, blocks, Block("flat", 1)), fails)
    assert small == Recipe(8, (blocks[1], blocks[3]), Block("pool", 0))
