"""Processes of their own that start at once: they are forked from one process that has imported the library.

That one has run nothing, so a forked process has no thread, no random state and no setting of the tests.
"""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import start_processes

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["secateur.cli", "secateur.runs.pipeline", "torch.export._trace", "accelerate", "torch.utils.tensorboard"]
)


@dataclass(frozen=True)
class Running:
    """A process, and the files of what it prints."""

    process: BaseProcess
    folder: Path

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text()

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text()

    def end(self, timeout: float = 600) -> int | None:
        """Wait for the end; the exit code. What takes too long is killed."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        return self.process.exitcode


def start(folder: Path, function: Callable[..., object], *arguments: Any, **environment: str) -> Running:
    """Call a function of a module in a new process; what it prints goes to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    given = (folder, os.environ | environment, function, arguments)
    process = FORKS.Process(target=_begin, args=given)
    process.start()
    return Running(process, folder)


def _begin(
    folder: Path, environment: dict[str, str], function: Callable[..., object], arguments: tuple[Any, ...]
) -> None:
    for name, number in (("out", 1), ("err", 2)):
        with (folder / name).open("w") as file:
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    function(*arguments)


def start_ranks(folder: Path, function: Callable[..., object], *arguments: Any) -> Running:
    """Call a function of a module in two processes that know of each other, as `torchrun` starts them."""
    return start(folder, _lead, function, arguments)


def _lead(function: Callable[..., object], arguments: tuple[Any, ...], count: int = 2) -> None:
    with closing(socket.create_server(("localhost", 0))) as free:
        port = free.getsockname()[1]
    os.environ |= {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "tests",
    }
    start_processes(_rank, (function, arguments), count, start_method="fork")


def _rank(rank: int, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    function(*arguments)


def command_line(*arguments: object) -> None:
    """`secateur` with arguments."""
    from secateur.cli import main

    sys.argv = ["secateur", *map(str, arguments)]
    main()
