"""The folder of one run: who may write it, what is in it, and what a resumed run need not do again."""

import contextlib
import errno
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

from secateur import __version__
from secateur.errors import FileError
from secateur.files import atomic_write, explained, remove_unfinished
from secateur.recipes.data import Normalisation
from secateur.settings import differences

Mode = Literal["new", "resume", "overwrite"]
"""What to do with a folder that holds a run: refuse it, go on with it, or replace it."""

_LARGEST = 64 * 2**20  # bytes of a JSON file that are read at most
_OWN = re.compile(
    r"(config|plan|progress|report)\.json|report\.html|metrics\.jsonl|(dense|model|cut|finetuned|masks)\.safetensors|model\.(onnx|pt2)"
    r"|(train|finetune)\.checkpoint\.safetensors|\.[\w.]+\.[0-9a-f]{8}\.tmp\.\w+"
    r"|tensorboard(/(train|finetune)(/events\.out\.tfevents\.[^/]+)?)?"
)


class Watch:
    """What a run tells while it goes on; this one keeps it to itself."""

    bars = False
    """Whether training may draw its progress bar."""

    def doing(self, what: str) -> AbstractContextManager[None]:
        """Say that something takes a while, and when it is done."""
        return contextlib.nullcontext()

    def tell(self, what: str) -> None:
        """Say what came out."""

    def progress(self, done: int, total: int) -> None:
        """Say how far what is being done has got."""


def is_main_process() -> bool:
    """Whether this is the one process, of those that were launched together, that writes and speaks."""
    return os.environ.get("RANK", "0") == "0"


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """What `config.json` says.

    Attributes:
        kind: "prune" or "train".
        command: as it was typed.
        settings: the configuration, as plain JSON.
        input_shape: of one image: channels, height, width.
        classes: size of the output.
        normalisation: of the images.
    """

    kind: str
    command: str
    settings: Mapping[str, Any]
    input_shape: tuple[int, int, int]
    classes: int
    normalisation: Normalisation

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """Read a run folder's configuration.

        Raises:
            FileError: it is not a run folder, or the file is damaged.
        """
        path = Path(folder) / "config.json"
        data = _read_json(path)
        try:
            task, normalisation = data["settings"]["task"], data["normalisation"]
            channels, height, width = (int(n) for n in data["input_shape"])
            for name in ("model", "data"):
                if not isinstance(task[name], str):
                    raise TypeError(f"{name} is {task[name]!r}")
            return cls(
                kind=str(data["kind"]),
                command=str(data["command"]),
                settings=data["settings"],
                input_shape=(channels, height, width),
                classes=int(data["classes"]),
                normalisation=Normalisation(
                    tuple(float(m) for m in normalisation["mean"]),
                    tuple(float(s) for s in normalisation["std"]),
                    float(normalisation["scale"]),
                ),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FileError(
                f"{path}: not the configuration of a run ({error!r}). Use another copy."
            ) from None

    @property
    def task(self) -> Mapping[str, Any]:
        """The task's fields, as plain JSON."""
        task: Mapping[str, Any] = self.settings["task"]
        return task

    def to_json(self) -> str:
        """The text of `config.json`."""
        return json.dumps({"secateur": __version__, **asdict(self)}, indent=2) + "\n"


class RunFolder:
    """One folder, for one run.

    Making the object only looks: it refuses what it may not touch. `begin` writes first.

    Args:
        path: the folder; it need not exist.
        kind: "prune" or "train".
        settings: the configuration, as plain JSON.
        mode: what to do with a folder that holds a run.
    Attributes:
        resumed: what `config.json` says, if the run is resumed.
        command: that started the run, once it has begun.
        known: results by name, as kept in `progress.json`.
    Raises:
        FileError: the folder holds a run and may neither be resumed nor overwritten, or holds other files,
            or holds the run of another configuration.
    """

    def __init__(self, path: str | Path, kind: str, settings: Mapping[str, Any], mode: Mode = "new") -> None:
        self.path = Path(path)
        self.kind = kind
        self.settings = settings
        self.resumed: SavedRun | None = None
        self.command = ""
        self.known: dict[str, Any] = {}
        with explained(self.path):
            foreign = self._foreign()
            exists = (self.path / "config.json").is_file()
            parent = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
            if not os.access(parent, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(parent))
        if foreign:
            shown = ", ".join(foreign[:3]) + (", …" if len(foreign) > 3 else "")
            raise FileError(
                f"{self.path}: holds what no run writes ({shown}), so it is left alone. "
                f"Choose a new or empty folder."
            )
        if exists and mode == "new":
            raise FileError(
                f"{self.path}: holds a run already. Continue it with --resume, replace it with --overwrite, "
                f"or choose another folder."
            )
        if exists and mode == "resume":
            self.resumed = self._same_run()
            if (self.path / "progress.json").exists():
                self.known = _read_json(self.path / "progress.json")

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def begin(self, run: SavedRun) -> None:
        """Make the folder ready: remove what an overwritten run left, and write `config.json`.

        Raises:
            FileError: the operating system refused.
        """
        with explained(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if self.resumed:
                self.command = self.resumed.command
                remove_unfinished(self.path)
                return
            # config.json goes last: until then the folder is known to hold a run
            paths = sorted(_walk(self.path), key=lambda path: (path.name == "config.json", -len(path.parts)))
            for path in paths:
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        atomic_write(self / "config.json", run.to_json())
        self.command = run.command

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """A result in plain JSON: computed, and kept in `progress.json` for when the run is resumed."""
        if name not in self.known:
            value = compute()
            atomic_write(self / "progress.json", json.dumps({**self.known, name: value}))
            self.known[name] = value
        return self.known[name]

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`."""
        path = self / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def _foreign(self) -> list[str]:
        """What is in the folder and was written by no run."""
        if self.path.exists() and not self.path.is_dir():
            raise FileError(f"{self.path}: is a file. Choose a folder.")
        if not self.path.exists():
            return []
        names = [path.name for path in self.path.iterdir() if not _OWN.fullmatch(path.name)]
        if not names:  # only now: an arbitrary folder may be large
            relative = (path.relative_to(self.path).as_posix() for path in _walk(self.path))
            names = [name for name in relative if not _OWN.fullmatch(name)]
        return sorted(names)

    def _same_run(self) -> SavedRun:
        saved = SavedRun.read(self.path)
        if saved.kind != self.kind:
            raise FileError(
                f"{self.path}: holds a run of `{saved.kind}`, not of `{self.kind}`. Choose another folder."
            )
        found = list(differences(saved.settings, self.settings))
        if found:
            raise FileError(
                f"{self.path}: holds a run with other settings: {'; '.join(found[:5])}. Give the "
                f"settings it was started with, replace it with --overwrite, or choose another folder."
            )
        return saved


def _walk(folder: Path) -> Iterator[Path]:
    """Everything in a folder and below it; links are not followed."""
    for path in folder.iterdir():
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"larger than {_LARGEST >> 20} MiB")
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError("not an object")
    except FileNotFoundError:
        raise FileError(f"{path}: no such file. Name the folder of a run.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{path}: cannot be read as JSON of a run ({error}). Use another copy.") from None
    return data
