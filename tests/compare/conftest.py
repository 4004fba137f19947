"""A recipe for a network that trains in a second, a folder of the user's own code, and one comparison that is finished.

Tests only read what is finished; what they change is a copy.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from secateur.compare.recipe import Comparison
from secateur.compare.results import Outcome
from secateur.compare.run import compare
from secateur.methods import METHODS
from secateur.recipes.data import Batches

HEAD = """
model = "code_of_mine:network"
data = "digits"
image_size = 8
train_images = 100
test_images = 100
budgets = [{ macs = 0.6 }]
seeds = [0]
schedule = "tiny"
"""

ARMS = """
[arms.dense]

[arms."l2, fine-tuned"]
method = "oneshot"

[arms."uniform width"]
method = "oneshot"
options = { score = "random", allocation = "uniform" }
before = true

[arms."random weights"]
method = "random-weights"

[arms.gradual]
method = "gradual"
options = { rounds = 1, "removal.steps" = 2 }
"""

RECIPE = HEAD + ARMS

ABLE = [name for name, one in METHODS.items() if one.when == "before" or one.removes == "channels"]
"""Methods that bound what comparisons bound; the budget of masks of trained weights is a sparsity."""

SHORT = {
    "depgraph": "{ rounds = 1 }",
    "hesso": "{ periods = 1 }",
    "gate-decorator": "{ ticks = 1, ticks_per_tock = 1 }",
}
"""Method -> options with which it prunes within four steps."""

OWN = """
import os, signal
from pathlib import Path

from torch import nn

def network(classes, in_channels):
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8, momentum=0.5), nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12, momentum=0.5), nn.ReLU(),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(12 * 16, classes),
    )

def masked(model, inputs, budget, *, share=0.5):
    for p in model.parameters():
        if p.ndim > 1:
            mask = p.detach().abs() > p.detach().abs().flatten().quantile(share)
            p.data *= mask
            p.register_hook(lambda g, mask=mask: g * mask)
    return model

def cut(model, inputs, budget, *, data):
    from secateur import prune
    assert next(iter(data))[0].shape[1:] == inputs.shape[1:]
    return prune(model, inputs, budget=budget).model

def proven(model, inputs, budget):
    from secateur import prune
    return prune(model, inputs, budget=budget)

def nothing(model, inputs, budget):
    return None

def broken(model, inputs, budget):
    return 1 / 0

def endless(model, inputs, budget):
    Path(f"endless-{os.getpid()}").touch()
    while True:
        pass

endless_too = endless

def killed_once(model, inputs, budget):
    if not Path("killed").exists():
        Path("killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return proven(model, inputs, budget)
"""


@dataclass(frozen=True)
class Finished:
    """A comparison, what came of it, and what was seen meanwhile.

    Attributes:
        comparison: one seed; arms as in `ARMS`, an arm for each of the other methods, and some of the user's own.
        out: its folder.
        outcomes: by arm; where it has several budgets, of the last.
        all: the outcomes of all its cells.
        said: what it told.
        epochs: training epochs whose images each cell saw, by name.
        curves: after each cell, the files of measurements and when they were written.
    """

    comparison: Comparison
    out: Path
    outcomes: dict[str, Outcome]
    all: list[Outcome]
    said: list[str]
    epochs: dict[str, list[int]]
    curves: dict[str, dict[str, int]]

    def copy(self, arms: list[str], out: Path) -> Path:
        """Some of its runs in a folder of their own."""
        for arm in arms:
            shutil.copytree(self.out / arm, out / arm)
        return out


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with code of the user's own."""
    folder = tmp_path_factory.mktemp("workshop")
    (folder / "code_of_mine.py").write_text(OWN)
    return folder


@pytest.fixture(autouse=True)
def in_workshop(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workshop)


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    """Writes a recipe."""

    def write(text: str = RECIPE) -> Path:
        path = tmp_path / "recipe.toml"
        path.write_text(text)
        return path

    return write


@pytest.fixture(scope="session")
def finished(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    path, out = workshop / "all.toml", tmp_path_factory.mktemp("compared") / "out"
    text = RECIPE + '[arms.impossible]\nmethod = "gradual"\noptions = { rounds = 1000 }\n'
    text += '[arms."two budgets"]\nmethod = "rd"\nbudgets = [{ macs = 0.7 }, { macs = 0.6 }]\n'
    for name in ABLE:
        if f'method = "{name}"' not in text:
            text += f'[arms.{name}]\nmethod = "{name}"\noptions = {SHORT.get(name, "{}")}\n'
    for name in ("masked", "cut", "proven", "nothing", "broken"):
        text += f'[arms.{name}]\nmethod = "code_of_mine:{name}"\n'
    path.write_text(text)
    said: list[str] = []
    seen: list[int] = []
    epochs: dict[str, list[int]] = {}
    curves: dict[str, dict[str, int]] = {}
    honest = Batches.epoch

    def noted(self: Batches, number: int, **more: int) -> object:
        if self.shuffle:
            seen.append(number)
        return honest(self, number, **more)

    def tell(what: str) -> None:
        said.append(what)
        if "/seed-0: " in what:
            cell = what.split()[1].rstrip(":")
            epochs[cell] = seen.copy()
            curves[cell] = {file.name: file.stat().st_mtime_ns for file in out.glob("curves/*")}
            seen.clear()

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workshop)
        patch.setattr(Batches, "epoch", noted)
        comparison = Comparison.read(path)
        found = compare(comparison, out, tell=tell)
    return Finished(comparison, out, {o.arm: o for o in found}, found, said, epochs, curves)
