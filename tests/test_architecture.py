"""Data flows one way: a file imports only from what stands above it, and the core stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import secateur

SOURCE = Path(secateur.__file__).parent
ORDER = [
    "errors", "settings", "files", "imports", "measures", "graph", "cost", "scores", "allocate", "plan", "rewriting",
    "surgery", "proof", "reconstruction", "report", "engine", "methods", "integrations", "recipes", "export", "int8",
    "onnx_clock", "runs", "compare", "cli",
]  # fmt: skip

COMPARE = [
    "words", "schedule", "recipe", "results", "cells", "pool", "statistics", "advice", "tables", "figures", "page",
    "run",
]  # fmt: skip
"""The files of that room, in which data flows one way too."""


def part_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def modules(path: Path) -> set[str]:
    """What a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def imported(path: Path, room: str = "secateur") -> set[str]:
    """Parts of the package, or of a room of it, that a file imports."""
    return {
        name.removeprefix(f"{room}.").split(".")[0] for name in modules(path) if name.startswith(f"{room}.")
    }


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_upwards(path: Path) -> None:
    part = part_of(path)
    if part == "__init__":  # the public names
        return
    below = {name for name in imported(path) if ORDER.index(name) > ORDER.index(part)}
    assert not below, f"{part} may not import {below}"


@pytest.mark.parametrize("name", COMPARE)
def test_a_comparison_flows_one_way(name: str) -> None:
    assert {path.stem for path in (SOURCE / "compare").glob("*.py")} == {*COMPARE, "__init__"}
    later = COMPARE[COMPARE.index(name) + 1 :]
    assert not imported(SOURCE / "compare" / f"{name}.py", "secateur.compare").intersection(later)


@pytest.mark.parametrize("framework", ["lightning", "transformers", "ultralytics"])
def test_a_framework_is_imported_in_its_own_file_only(framework: str) -> None:
    found = [
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*.py")
        if any(name.split(".")[0] == framework for name in modules(path))
    ]
    assert found == [f"integrations/{'huggingface' if framework == 'transformers' else framework}.py"]


LIBRARIES = (
    "onnx onnxscript onnxruntime jinja2 accelerate tensorboard torchvision timm typer rich lightning transformers "
    "ultralytics"
).split()
FILES = "export report recipes.train recipes.models.weights recipes.data".split()


@pytest.mark.parametrize(
    ("files", "libraries"),
    [
        ([], [*LIBRARIES, "PIL"]),
        (FILES, LIBRARIES),  # each loads what it works with when it is called
    ],
    ids=["core", "files"],
)
def test_importing_loads_nothing_that_is_not_used(files: list[str], libraries: list[str]) -> None:
    names = ", ".join(["sys", "secateur", *(f"secateur.{file}" for file in files)])
    code = f"import {names}; print([m for m in {libraries} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_there_are_at_most_fifteen_public_names() -> None:
    assert len(secateur.__all__) <= 15
    assert all(getattr(secateur, name).__doc__ for name in secateur.__all__)
