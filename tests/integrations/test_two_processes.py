"""A model that the framework wraps in DistributedDataParallel is cut while wrapped, alike in every process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integrations.examples import FEW

SCRIPT = Path(__file__).with_name("two_processes.py")


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["lightning", "transformers"])
def test_two_processes_take_the_same_decisions(framework: str, tmp_path: Path) -> None:
    pytest.importorskip(framework)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = os.pathsep.join([str(SCRIPT.parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*launch, str(SCRIPT), framework, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=1800,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{framework}.{rank}.json").read_text()) for rank in range(2))
    assert list(first) == FEW
    for name in first:
        assert first[name] == second[name], name
