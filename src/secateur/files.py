"""Files that are either whole or not there: written beside their final name, synced, then renamed."""

import contextlib
import errno
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from secateur.errors import FileError

_ENTRY = "secateur"

_WHAT_TO_DO = {
    errno.ENOSPC: "Free some space or choose another folder",
    errno.EDQUOT: "Free some space or choose another folder",
    errno.ENOENT: "Create its folder first",
    errno.ENOTDIR: "Choose a path whose parents are folders",
    errno.EISDIR: "Choose a name that is not a folder's",
    errno.EACCES: "Choose a folder you may write to",
    errno.EPERM: "Choose a folder you may write to",
    errno.EROFS: "Choose a folder you may write to",
}


@contextlib.contextmanager
def explained(path: str | Path) -> Iterator[None]:
    """Turn what the operating system says against a write in the block into a `FileError` about `path`."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:  # safetensors wraps what the system says
        code, reason = None, str(error)
        if isinstance(error, OSError):
            code, reason = error.errno, error.strerror or reason
        advice = _WHAT_TO_DO.get(code or 0, "Check the disk and the folder")
        raise FileError(f"{path}: could not be written: {reason}. {advice}.") from error


def remove_unfinished(folder: Path, stem: str = "*") -> None:
    """Remove what a killed `replacing` left in a folder, of files of one stem or of all."""
    for path in folder.glob(f".{stem}.*.tmp*"):
        path.unlink()


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Lend a temporary path in the same folder; when the block ends well, it takes the place of `path`.

    At every moment `path` holds the old content or the new one, whole, even if the process is killed or
    the power fails. The temporary name keeps the suffix, because some writers choose a format by it. If
    the block raises, the temporary file is removed and `path` is as before.

    Args:
        path: the final name; its folder must exist.
    Raises:
        FileError: the operating system refused (disk full, no such folder, no permission).

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with replacing(Path(folder) / "plan.json") as temporary:
    ...         _ = temporary.write_text("{}")
    ...     [file.name for file in Path(folder).iterdir()]
    ['plan.json']
    """
    path = Path(path)
    if not path.name:
        raise FileError(f"{str(path)!r} names a folder, not a file. Give the name of the file to write.")
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        with explained(path):
            temporary.touch()
            mode = temporary.stat().st_mode  # as the umask says; some writers choose one of their own
            yield temporary
            temporary.chmod(mode)
            _sync(temporary, os.O_RDWR)
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # makes the rename itself lasting, where folders can be synced
        _sync(path.parent, os.O_RDONLY)


def atomic_write(path: str | Path, content: str | bytes) -> None:
    """Write text (UTF-8, newlines as they are) or bytes to `path`: all of it, or nothing.

    Args:
        path: the final name; its folder must exist.
        content: what the file will hold.
    Raises:
        FileError: the operating system refused (disk full, no such folder, no permission).
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write named tensors and a text dictionary as one safetensors file, atomically.

    Args:
        path: the final name; its folder must exist.
        tensors: any dtype and device; they may share memory, and are then stored once each.
        metadata: text by name.
    Raises:
        FileError: the operating system refused (disk full, no such folder, no permission).
    """
    separate: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        whole = tensor.detach().contiguous()
        if whole.untyped_storage().data_ptr() in seen:
            whole = whole.clone()  # safetensors refuses shared memory
        seen.add(whole.untyped_storage().data_ptr())
        separate[name] = whole
    with replacing(path) as temporary:
        # one entry, since safetensors writes several in any order, and equal models should give equal files
        safetensors.torch.save_file(separate, temporary, {_ENTRY: json.dumps(dict(metadata), sort_keys=True)})


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: its tensors (on the CPU) and the text that `write_tensors` put beside them.

    No code is run; a file of another writer has an empty dictionary.

    Raises:
        FileError: the file is missing, truncated or not a safetensors file.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            text = (file.metadata() or {}).get(_ENTRY, "{}")
        metadata = json.loads(text)
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise TypeError(f"metadata must be text by name, found {text[:40]!r}")
        return tensors, metadata
    except FileNotFoundError as error:
        raise FileError(f"{path}: no such file. Check the path.") from error
    except Exception as error:  # a hostile header can trip any of the parser's own checks
        raise FileError(
            f"{path}: not a readable safetensors file ({error}). It is truncated or was not written by "
            f"Secateur; use another copy."
        ) from error


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
