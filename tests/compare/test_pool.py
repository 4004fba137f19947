"""Runs side by side, in processes."""

import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from secateur.compare import Comparison, compare
from secateur.errors import SecateurError

from .conftest import Finished

Write = Callable[..., Path]


def test_processes_do_what_one_does_and_it_is_said_when_one_is_killed(
    finished: Finished, recipe: Write, tmp_path: Path
) -> None:
    methods = {"proven": "code_of_mine:proven", "killed": "code_of_mine:killed_once"}
    arms = {"dense": {}} | {name: {"method": method} for name, method in methods.items()}
    comparison, out, said = Comparison.read(recipe(), arms=arms), tmp_path / "out", []
    with pytest.raises(SecateurError, match="a process that trained was killed from outside"):
        compare(comparison, out, jobs=2, tell=said.append)
    assert said[0].startswith("1/3")  # in another process
    outcomes = compare(comparison, out)
    assert [o.error for o in outcomes] == ["", "", ""]
    for o in outcomes[:2]:
        assert (o.accuracy, o.widths) == (finished.outcomes[o.arm].accuracy, finished.outcomes[o.arm].widths)


def test_processes_end_with_the_command_that_started_them(recipe: Write, tmp_path: Path) -> None:
    psutil = pytest.importorskip("psutil")
    out, errors = tmp_path / "out", tmp_path / "errors"
    command = [
        sys.executable,
        "-m",
        "secateur.cli",
        "compare",
        str(recipe()),
        "--out",
        str(out),
        "--jobs",
        "2",
    ]
    with errors.open("w") as stderr:
        process = psutil.Popen([*command, "--schedule", "paper"], stderr=stderr)
    try:
        while len(list(out.glob("*/*/*/metrics.jsonl"))) < 2:
            assert process.poll() is None, errors.read_text()
            time.sleep(0.05)
        workers = [p for p in process.children(recursive=True) if "spawn_main" in " ".join(p.cmdline())]
        assert len(workers) == 2
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
        process.wait()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
