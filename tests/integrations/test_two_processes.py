"""A model that the framework wraps in DistributedDataParallel is cut while wrapped, alike in every process."""

import importlib
import json
from pathlib import Path

import pytest

from tests.integrations.examples import FEW
from tests.integrations.two_processes import main
from tests.processes import start_ranks

RUNS = {
    "lightning": "tests.integrations.lightning_run",
    "transformers": "tests.integrations.huggingface_run",
}


@pytest.mark.slow
@pytest.mark.parametrize("framework", RUNS)
def test_two_processes_take_the_same_decisions(framework: str, tmp_path: Path) -> None:
    pytest.importorskip(framework)
    run = importlib.import_module(RUNS[framework]).run
    two = start_ranks(tmp_path / "printed", main, framework, run, tmp_path)
    assert two.end() == 0, two.err
    first, second = (json.loads((tmp_path / f"{framework}.{rank}.json").read_text()) for rank in range(2))
    assert list(first) == FEW
    for name in first:
        assert first[name] == second[name], name
