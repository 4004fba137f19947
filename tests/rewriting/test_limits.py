"""What the program of a file may ask for: numbers that no network needs are refused before anything runs."""

from typing import Any

import pytest

from secateur.rewriting.program_json import ProgramReader


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


def test_what_a_network_needs_is_read() -> None:
    for op in (
        ("aten.zeros.default", [[64, 4096]]),
        ("aten.arange.default", [65536]),
        ("aten.eye.default", [1000]),
        ("aten.slice.Tensor", [{"ref": 0}, 1, 0, 2**63 - 1]),
    ):
        assert len(ProgramReader([], []).read(program(*op)).ops) == 1
