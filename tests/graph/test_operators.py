"""The table of operators: nothing about an entry is left open, and what may be called from a file is harmless."""

import contextlib

import pytest
import torch

from secateur.graph.operators import OPERATORS, Constants, Operator, norm
from secateur.graph.operators.table import PLAIN, Decisions, operator
from secateur.rewriting.program import operator_named

SIZES = {
    "size",
    "shape",
    "sizes",
    "split_size",
    "split_sizes",
    "normalized_shape",
    "groups",
    "num_groups",
    "sections",
}
"""Arguments that say how wide a tensor is, or in how many parts it comes."""

ATEN = {name: entry for name, entry in OPERATORS.items() if "." not in name}


def schemas(name: str) -> list[torch._C.FunctionSchema]:
    """Of the overloads that a program may call."""
    found = []
    for overload in getattr(torch.ops.aten, name).overloads():
        with contextlib.suppress(ValueError):
            found.append(operator_named(f"aten.{name}.{overload}")._schema)
    return found


@pytest.mark.parametrize("name", ATEN)
def test_an_entry_is_decided(name: str) -> None:
    entry, found = ATEN[name], schemas(name)
    assert bool(found) == entry.program
    arguments = [argument for schema in found for argument in schema.arguments]
    written = {a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write}
    assert written <= {"self", "input"}, "a program may write nothing but the first operand"
    if any(argument.name in SIZES for argument in arguments) and name != "unfold":  # the size of its windows
        assert entry.constants != PLAIN.constants, "it has numbers that may follow a width"
    if entry.trains:
        assert entry.trains in {argument.name for argument in arguments}


@pytest.mark.parametrize(
    "rule", [norm.reduction, norm.softmax, norm.layer_norm, norm.group_norm, norm.channelwise_norm]
)
def test_a_statistic_says_what_it_is_over_survivors(rule: object) -> None:
    assert all(entry.survivors for entry in OPERATORS.values() if entry.rule is rule)


@pytest.mark.parametrize("missing", ["constants", "survivors", "program"])
def test_an_entry_with_an_open_decision_is_refused(missing: str) -> None:
    decided = {"constants": Constants(), "survivors": None, "program": True}
    del decided[missing]
    with pytest.raises(TypeError, match=missing):
        Decisions(**decided)


def test_no_operator_has_two_entries() -> None:
    decide = operator("relu", PLAIN)
    with pytest.raises(AssertionError, match="relu is in the table twice"):
        decide(norm.softmax)
    assert isinstance(OPERATORS["relu"], Operator)
    assert OPERATORS["relu"].program


FORBIDDEN = """
aten.mul.left_t aten.add.t aten.relu.out aten.median.dim_values aten.randn_like.default aten.set_.source_Tensor
torchvision.roi_align.default
"""


@pytest.mark.parametrize("target", FORBIDDEN.split())
def test_what_a_file_may_not_call(target: str) -> None:
    """Lists that repeat themselves, results written into given tensors, random numbers, other storage."""
    with pytest.raises(ValueError, match=target):
        operator_named(target)
