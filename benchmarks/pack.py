"""A folder of data in parts that are small enough to be sent one by one, and the folder again from the parts.

    python benchmarks/pack.py pack DATA PARTS [--mib 60]
    python benchmarks/pack.py unpack PARTS DATA

PARTS gets `part-1.bin`, `part-2.bin` … and `manifest.json` with the checksums of all. Compressed images (`.npy.xz`) are
compressed again, each value as its difference from the one above it, which takes a seventh less; what is read from them
stays the same. `unpack` checks parts and files, and writes a file only when it is right.
"""

import argparse
import hashlib
import io
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np

from secateur.files import atomic_write

ROW = 256
"""The largest distance that the filter can look back."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["pack", "unpack"])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--mib", type=float, default=60, help="of a part at most")
    options = parser.parse_args()
    if options.what == "pack":
        for path in pack(options.source, options.target, int(options.mib * 2**20)):
            print(f"{path}  {path.stat().st_size / 2**20:.1f} MiB")
    else:
        for path in unpack(options.source, options.target):
            print(path)


def pack(folder: Path, target: Path, largest: int) -> list[Path]:
    """Write the files of a folder as parts of equal size, each of at most `largest` bytes; the paths of the parts."""
    files = {path.name: squeeze(path) for path in sorted(folder.iterdir()) if path.is_file()}
    if not files:
        raise SystemExit(f"{folder}: no files to pack. Name the folder that holds them.")
    whole = b"".join(files.values())
    count = max(1, -(-len(whole) // largest))
    size = max(1, -(-len(whole) // count))
    parts = {f"part-{n + 1}.bin": whole[n * size : (n + 1) * size] for n in range(count)}
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob("part-*.bin"):
        old.unlink()
    for name, content in parts.items():
        atomic_write(target / name, content)
    manifest = {"files": list(map(facts, *zip(*files.items(), strict=True)))}
    manifest["parts"] = list(map(facts, *zip(*parts.items(), strict=True)))
    atomic_write(target / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    return [target / name for name in parts]


def unpack(source: Path, folder: Path) -> list[Path]:
    """Join parts, and write the files that are in them; their paths."""
    manifest = json.loads((source / "manifest.json").read_text())
    whole = b"".join(checked(part, read(source / part["name"]), source) for part in manifest["parts"])
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for file in manifest["files"]:
        content, whole = whole[: file["bytes"]], whole[file["bytes"] :]
        paths.append(folder / Path(file["name"]).name)
        atomic_write(paths[-1], checked(file, content, source))
    return paths


def squeeze(path: Path) -> bytes:
    """The content of a file; of images as an `.xz` file that is smaller, if it can be."""
    content = path.read_bytes()
    if not path.name.endswith(".npy.xz"):
        return content
    raw = lzma.decompress(content)
    shape = np.load(io.BytesIO(raw), allow_pickle=False).shape
    above = int(np.prod(shape[2:]))  # values in a row of an image, n h w c or n h w
    if not 1 <= above <= ROW:
        return content
    filters = [
        {"id": lzma.FILTER_DELTA, "dist": above},
        {"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 4, "lp": 0, "pb": 0},
    ]
    smaller = lzma.compress(raw, filters=filters)
    if lzma.decompress(smaller) != raw:
        raise SystemExit(f"{path}: reads differently after it was compressed again. Try once more.")
    return min(content, smaller, key=len)


def facts(name: str, content: bytes) -> dict[str, Any]:
    return {"name": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def read(path: Path) -> bytes:
    if not path.is_file():
        raise SystemExit(f"{path}: is missing. Bring all parts and manifest.json into one folder.")
    return path.read_bytes()


def checked(expected: dict[str, Any], content: bytes, source: Path) -> bytes:
    """The content, if it is what was packed."""
    if facts(expected["name"], content) != expected:
        raise SystemExit(f"{source}: {expected['name']} is not what was packed. Send it again.")
    return content


if __name__ == "__main__":
    main()
