"""What the program of a file may ask for: numbers that no network needs are refused before anything runs."""

from typing import Any

import pytest
import torch

from secateur.rewriting.program import Dim, Size, value_of
from secateur.rewriting.program_json import ProgramReader, encode


def program(target: str, args: list[Any], kwargs: dict[str, Any] | None = None) -> dict[str, Any]:
    ops = [[target, args, {"dict": kwargs or {}}]]
    return {"arguments": {"dict": {}}, "inputs": 1, "tensors": [], "ops": ops, "output": {"ref": 1}}


@pytest.mark.parametrize(
    "op",
    [
        ("aten.zeros.default", [[2**29]]),
        ("aten.zeros.default", [[2**15, 2**15]]),
        ("aten.arange.default", [2**29]),
        ("aten.linspace.default", [0.0, 1.0, 2**29]),
        ("aten.eye.default", [2**15]),
        ("aten.mul.left_t", [[1, 2], 2**31]),
        ("aten.median.dim_values", [{"ref": 0}, 1], {"values": {"ref": 0}, "indices": {"ref": 0}}),
    ],
)
def test_what_no_network_needs_is_refused(op: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=r"larger than any|computes no tensors|into a given tensor"):
        ProgramReader([], []).read(program(*op))


SIZE = {"dim": [0, 0]}


def nested(levels: int) -> Any:
    return {"size": ["+", nested(levels - 1), 1]} if levels else SIZE


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"size": ["**", SIZE, 9]}, "a size cannot be"),
        ({"size": ["//", SIZE, 0]}, "divided by a positive number"),
        ({"size": ["%", SIZE, SIZE]}, "divided by a positive number"),
        ({"size": ["+", SIZE, 2**40]}, "no number a program may hold"),
        ({"size": ["+", SIZE, 0.5]}, "a size cannot be"),
        ({"size": ["+", SIZE, {"ref": 0}]}, "a size cannot be"),
        ({"size": ["*", {"size": ["*", SIZE, 2**15]}, 2**15]}, "larger than any"),
        ({"dim": [5, 0]}, "there is no dim"),
        ({"dim": [-2, 0]}, "there is no dim"),
        ({"dim": [0, 99]}, "there is no dim"),
        ({"size": [1, 1, [[3, 0]]]}, "there is no dim"),
        ({"size": [1, 0, [[0, 0]]]}, "over a positive number"),
        (nested(20), "a size cannot be"),
        ({"given": 10**6}, "an argument cannot be"),
    ],
)
def test_arithmetic_of_sizes_is_bounded(size: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProgramReader([], []).read(program("aten.zeros.default", [[size, 1]]))


def test_sizes_are_read_as_they_are_written() -> None:
    number = Size("//", Size("+", Size("*", Dim(0, 2), Dim(-1, 0)), -3), 7)
    read = ProgramReader([], []).read(program("aten.zeros.default", [[encode(number), encode(Dim(0, 1))]]))
    assert read.ops[0].args == ([number, Dim(0, 1)],)
    assert value_of(number, [torch.zeros(2, 3, 10)], {0: 5}) == 6


def test_sizes_of_older_files_are_read() -> None:
    read = ProgramReader([], []).read(program("aten.zeros.default", [[{"size": [6, 4, [[0, 0], [0, 1]]]}]]))
    ((size,),) = read.ops[0].args
    assert value_of(size, [torch.zeros(4, 3)], {}) == 18
    assert read.limits == ()


@pytest.mark.parametrize("limits", [5, [[]] * 3, [5], [[[1]]], [[[1, 2.5]]], [["x"]], [[None] * 40]])
def test_limits_are_least_and_most_sizes(limits: Any) -> None:
    with pytest.raises(ValueError, match=r"limit|no number"):
        ProgramReader([], []).read(program("aten.relu.default", [{"ref": 0}]) | {"limits": limits})


def test_what_a_network_needs_is_read() -> None:
    for op in (
        ("aten.zeros.default", [[64, 4096]]),
        ("aten.arange.default", [65536]),
        ("aten.eye.default", [1000]),
        ("aten.slice.Tensor", [{"ref": 0}, 1, 0, 2**63 - 1]),
    ):
        assert len(ProgramReader([], []).read(program(*op)).ops) == 1
