"""Runs side by side, in processes."""

import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from secateur.compare.recipe import Comparison
from secateur.compare.run import compare
from secateur.errors import SecateurError

from .conftest import HEAD, Finished

pytestmark = pytest.mark.xdist_group("comparison")

Write = Callable[..., Path]


def test_processes_do_what_one_does_and_end_with_the_command_that_started_them(
    finished: Finished, recipe: Write, workshop: Path, tmp_path: Path
) -> None:
    psutil = pytest.importorskip("psutil")
    arms = ("proven", "cut", "endless", "endless_too")
    tables = [f'[arms.{arm}]\nmethod = "code_of_mine:{arm}"\n' for arm in arms]
    path, out, errors = recipe(HEAD + "".join(tables)), tmp_path / "out", tmp_path / "errors"
    command = [sys.executable, "-m", "secateur.cli", "compare", str(path), "--out", str(out), "--jobs", "2"]

    with errors.open("w") as stderr:
        process = psutil.Popen(command, stderr=stderr)
    try:
        deadline = time.monotonic() + 240
        while len(list(workshop.glob("endless-*"))) < 2:
            assert process.poll() is None, errors.read_text()
            assert time.monotonic() < deadline, errors.read_text()
            time.sleep(0.05)
        workers = [p for p in process.children(recursive=True) if "spawn_main" in " ".join(p.cmdline())]
        assert len(workers) == 2
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
        process.wait()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
    for o in compare(Comparison.read(path), out, gather=True):
        one = finished.outcomes[o.arm]
        assert (o.error, o.accuracy, o.kept, o.widths) == ("", one.accuracy, one.kept, one.widths)


def test_it_is_said_when_a_process_is_killed_and_it_goes_on_from_there(recipe: Write, tmp_path: Path) -> None:
    comparison = Comparison.read(recipe(), arms={"killed": {"method": "code_of_mine:killed_once"}})
    with pytest.raises(SecateurError, match="a process that trained was killed from outside"):
        compare(comparison, tmp_path, jobs=2)
    (outcome,) = compare(comparison, tmp_path)
    assert (outcome.error, outcome.epochs) == ("", 2)
