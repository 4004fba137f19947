"""The benchmark for one GPU, rehearsed on the CPU: rows that survive a kill, its limit, its page, and packed data."""

import importlib
import json
import lzma
import multiprocessing
import os
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from secateur.compare.recipe import Comparison

FOLDER = Path(__file__).parents[1] / "benchmarks"

TINY = (
    "--device cpu --data digits --model resnet8 --train-images 128 --test-images 50 --schedule tiny --modes eager "
    "--jobs 1 --papers precrop"
)


@pytest.fixture
def in_time(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("in_time")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("gpu")


def test_its_papers_are_arms_of_the_recipes(gpu: ModuleType) -> None:
    for paper in gpu.PAPERS:
        comparison = Comparison.read(gpu.RECIPES / f"{paper.recipe}.toml", model=paper.model)
        assert comparison.with_arms(paper.arms).arms.keys() == set(paper.arms)


@pytest.mark.slow
def test_a_killed_rehearsal_keeps_its_rows_and_goes_on(tmp_path: Path) -> None:
    psutil = pytest.importorskip("psutil")
    rows, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    words = [str(tmp_path / "runs"), *TINY.split(), "--rows", str(rows), "--out", str(page)]
    command = [sys.executable, str(FOLDER / "gpu.py"), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def read() -> list[dict[str, Any]]:
        return list(map(json.loads, rows.read_text().splitlines())) if rows.exists() else []

    with (tmp_path / "said").open("w") as said:
        process = psutil.Popen(command, stdout=said, stderr=said, env=environment)
    deadline = time.monotonic() + 240
    while not [row for row in read() if row["kind"] == "run"]:
        assert process.poll() is None, (tmp_path / "said").read_text()
        assert time.monotonic() < deadline, (tmp_path / "said").read_text()
        time.sleep(0.02)
    others = process.children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(others, timeout=30)
    assert all(one.status() == psutil.STATUS_ZOMBIE for one in alive)
    before = read()
    assert [row["kind"] for row in before[:4]] == ["check", "check", "check", "epoch"]
    assert before[3]["seconds"] > 0
    cut = page.read_text()
    assert "Unfinished when this was written" in cut
    assert "- precrop/uniform-width/macs-0.5/seed-0: " in cut

    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    after = read()
    assert after[: len(before)] == before
    names = [row["name"] for row in after]
    assert len(names) == len(set(names)) == 7
    runs = {row["arm"]: row for row in after if row["kind"] == "run"}
    assert runs.keys() == {"cropped", "random weights", "uniform width"}
    assert all(row["kept"]["macs"] <= 0.5 and row["epochs"] == 2 for row in runs.values())
    text = page.read_text()
    assert done.stdout.endswith(text + "\n")
    assert "Unfinished" not in text
    assert "A rehearsal on a CPU: nothing here is a result" in text
    line = next(line for line in text.splitlines() if "| cropped |" in line)
    assert f"| {100 * runs['cropped']['accuracy']:.2f} |" in line
    assert f"| {runs['cropped']['kept']['macs']:.3f} |" in line
    assert text.count("| equal |") == 3


def test_what_goes_on_at_the_limit_is_stopped(in_time: ModuleType) -> None:
    works = [in_time.Work("short", partial(pow, 2, 3)), in_time.Work("long", partial(time.sleep, 60))]
    works.append(in_time.Work("wrong", partial(pow, 0, -1)))
    started = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks, where this process has threads
        answers = {a.work.name: a for a in in_time.run_until(started + 8, works, 2, start="fork")}
    assert time.monotonic() - started < 16
    assert answers.keys() == {"short", "wrong"}
    assert (answers["short"].value, answers["short"].error) == (8, "")
    assert answers["wrong"].error.startswith("ZeroDivisionError")
    assert not multiprocessing.active_children()


def training(in_time: ModuleType, folder: Path, epochs: int, *seconds: float) -> Any:
    """A run of so many epochs, of which those that are over took so long."""
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(f'{{"seconds": {one}}}\n' for one in seconds))
    return in_time.Work(folder.name, print, "net", epochs, folder)


def test_only_what_ends_in_time_is_begun(in_time: ModuleType, tmp_path: Path) -> None:
    """Ten epochs of two seconds and five seconds around them are 25 s; beside another one, at worst 45 s."""

    def gate(seconds: float) -> Any:
        return in_time.InTime(time.monotonic() + seconds, {"net": 2.0}, 5.0)

    one, two = (training(in_time, tmp_path / name, 10) for name in ("one", "two"))
    assert not gate(24).lets(one, [])
    assert gate(26).lets(one, [])
    assert not gate(44).lets(two, [one])
    assert gate(46).lets(two, [one])
    assert not gate(1000).lets(in_time.Work("other", print, "unmeasured", 1, tmp_path), [])

    begun = gate(32)
    begun.watch([one, two])
    for epochs in range(1, 4):  # side by side they are hardly slower
        one, two = (training(in_time, tmp_path / name, 10, *[2.2] * epochs) for name in ("one", "two"))
        begun.watch([one, two])
    assert begun.paces["one"].beside == 2
    third = training(in_time, tmp_path / "third", 5)
    assert begun.needs(one, [one, two]) == pytest.approx(5 + 7 * 2.2)
    assert begun.needs(one, [one, two, third]) == pytest.approx(5 + 7 * 2.2 * 1.5)
    assert begun.needs(third, [one, two, third]) == pytest.approx(5 + 5 * 3.3)
    assert begun.lets(third, [one, two])
    assert not begun.lets(training(in_time, tmp_path / "fourth", 10), [one, two])
    begun.watch([one, two, third])  # the third is being loaded and slows nobody yet
    for epochs in (4, 5):
        one = training(in_time, tmp_path / "one", 10, *[2.2] * epochs)
        begun.watch([one, two, third])
    assert begun.paces["one"].beside == 2


def test_a_loss_that_differs_is_said(gpu: ModuleType) -> None:
    row = {"name": "check of net", "expected": [2.0, 1.9], "losses": [2.0, 1.9001], "tolerance": 1e-3}
    assert gpu.verdict(row) == "equal"
    assert gpu.check_line(row)[-1] == "equal"
    for losses in ([2.0, 1.91], [2.0, float("nan")], [float("nan"), 1.9], [float("inf"), 1.9]):
        assert gpu.verdict(row | {"losses": losses}).startswith("DIFFERENT"), losses
        assert gpu.check_line(row | {"losses": losses})[-1] == "DIFFERENT"
    assert gpu.verdict({"name": "", "error": "no GPU"}) == "FAILED: no GPU"


def test_a_failed_check_heads_the_page_and_fails_the_command(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is left to do but to look at what is known; no time is left to begin a run."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    rows, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    where = {"device": gpu.device_name("cpu"), "data": "digits", "train_images": 128, "test_images": 50}
    check = where | {"kind": "check", "expected": [2.0], "losses": [2.0], "tolerance": 1e-3}
    known = [check | {"name": f"check of resnet8, {way}"} for way in gpu.CHECKS if "eager" in way]
    known[1] |= {"losses": [2.1]}
    epoch = {"kind": "epoch", "name": "epoch of resnet8, eager", "precision": "no", "model": "resnet8"}
    known.append(
        where | epoch | {"compiled": False, "seconds": 1.0, "wall": 4.0, "images_per_second": 128, "start": 0}
    )
    rows.write_text("".join(json.dumps(row) + "\n" for row in known))
    words = f"gpu.py {tmp_path}/runs {TINY} --rows {rows} --out {page} --minutes 0"
    monkeypatch.setattr("sys.argv", words.split())
    with pytest.raises(SystemExit, match=r"check of resnet8, TF32, eager: DIFFERENT: by 5\.0e-02"):
        gpu.main()
    assert "!!!" in capsys.readouterr().out
    text = page.read_text()
    assert "**The check failed: do not trust the numbers below.**" in text
    assert "| resnet8 | float32, eager | 1.00 | 128 | 0.0 |" in text
    assert "- precrop/cropped/macs-0.5/seed-0: 0 of 2 epochs" in text
    assert rows.read_text().count("\n") == len(known)


def test_packed_data_comes_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    script = importlib.import_module("pack")
    data, parts, back = (tmp_path / name for name in ("data", "parts", "back"))
    data.mkdir()
    rng = np.random.default_rng(0)
    images = np.cumsum(rng.integers(-3, 4, (20, 32, 32, 3)), 1).astype(np.uint8)  # smooth downwards
    with lzma.open(data / "some_images.npy.xz", "wb") as file:
        np.save(file, images)
    np.save(data / "some_labels.npy", np.arange(20))

    monkeypatch.setattr("sys.argv", ["pack.py", "pack", str(data), str(parts), "--mib", "0.01"])
    script.main()
    sizes = [path.stat().st_size for path in parts.glob("part-*.bin")]
    assert len(sizes) > 1
    assert max(sizes) <= 0.01 * 2**20
    assert sum(sizes) < sum(path.stat().st_size for path in data.iterdir())
    monkeypatch.setattr("sys.argv", ["pack.py", "unpack", str(parts), str(back)])
    script.main()
    with lzma.open(back / "some_images.npy.xz") as file:
        assert np.array_equal(np.load(file), images)
    assert (back / "some_labels.npy").read_bytes() == (data / "some_labels.npy").read_bytes()

    part = parts / "part-1.bin"
    content = part.read_bytes()
    part.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(SystemExit, match=r"part-1\.bin is not what was packed"):
        script.unpack(parts, tmp_path / "damaged")
    assert not (tmp_path / "damaged").exists()
    part.unlink()
    with pytest.raises(SystemExit, match=r"part-1\.bin: is missing"):
        script.unpack(parts, tmp_path / "damaged")
