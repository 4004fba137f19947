import errno
import json
import os
import resource
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from secateur.errors import FileError
from secateur.files import atomic_write, read_tensors, replacing, write_tensors


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_content_arrives_whole(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a.txt", "né\r\n")
    atomic_write(tmp_path / "a.txt", "ne\n")
    atomic_write(tmp_path / "b", b"\x00\xff")
    assert (tmp_path / "a.txt").read_bytes() == b"ne\n"
    assert (tmp_path / "b").read_bytes() == b"\x00\xff"
    assert names(tmp_path) == ["a.txt", "b"]


def test_the_temporary_name_keeps_the_suffix(tmp_path: Path) -> None:
    with replacing(tmp_path / "model.onnx") as temporary:
        assert temporary.suffix == ".onnx"
        assert temporary.parent == tmp_path
        temporary.write_bytes(b"x")


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_every_file_has_the_permissions_of_a_new_one(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        write_tensors(tmp_path / "m.safetensors", {"a": torch.zeros(2)}, {})
        atomic_write(tmp_path / "a.json", "{}")
        with replacing(tmp_path / "b") as temporary:
            temporary.unlink()  # a writer that makes its own file
            os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o666 & ~mask}


def test_a_failing_block_changes_nothing(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a", "old")

    def fail_half_way() -> None:
        with replacing(tmp_path / "a") as temporary:
            temporary.write_text("ne")
            raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        fail_half_way()
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize(
    "write",
    [
        lambda path: atomic_write(path, b"x" * 20_000),
        lambda path: write_tensors(path, {"x": torch.zeros(5_000)}, {}),
    ],
    ids=["bytes", "tensors"],
)
def test_a_full_disk_keeps_the_old_file(tmp_path: Path, write: Callable[[Path], None]) -> None:
    """A limit on the size of files fails like a full disk: part of the file is there, the rest is refused."""
    path = tmp_path / "a"
    atomic_write(path, "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(FileError, match="could not be written"):
            write(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_no_space_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(FileError, match=r"No space left on device\. Free some space"):
        atomic_write(tmp_path / "a", "new")
    assert names(tmp_path) == []


def test_a_missing_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"No such file or directory\. Create its folder first"):
        atomic_write(tmp_path / "absent" / "a", "new")


def test_tensors_come_back(tmp_path: Path) -> None:
    a = torch.arange(6.0)
    tensors = {
        "a": a,
        "same": a,
        "part": a[2:],
        "transposed": a.view(2, 3).t(),
        "count": torch.tensor(3),
        "empty": torch.zeros(0, 2, dtype=torch.bfloat16),
        "flags": torch.tensor([True, False]),
    }
    write_tensors(tmp_path / "a.safetensors", tensors, {"key": "value"})
    read, metadata = read_tensors(tmp_path / "a.safetensors")
    assert metadata == {"key": "value"}
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_what_is_not_safetensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.zeros(4)}, {})
    whole = path.read_bytes()
    header = json.dumps({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}).encode()
    hostile = struct.pack("<Q", len(header)) + header + b"\0" * 4
    for content in (b"", whole[:5], whole[:-1], struct.pack("<Q", 2**60) + b"{}", b"\x80\x04." * 9, hostile):
        path.write_bytes(content)
        with pytest.raises(FileError, match="not a readable safetensors file"):
            read_tensors(path)
    with pytest.raises(FileError, match="no such file"):
        read_tensors(tmp_path / "absent")
