"""The guides' Python runs as it stands, their commands exist, and every page of the site can be reached."""

import json
import re
import runpy
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from secateur.cli import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))
RUN = ["index.md", *(page for page in PAGES if page.startswith("guides/"))]
LIMIT = 40
"""Seconds of processor time that one page may take; all together stay within a minute."""


def within(pruned: Any, share: float, measure: str = "macs") -> bool:
    """Whether a budget is met from below; widths of small networks in whole multiples may stay far below."""
    return 0.5 * share <= pruned.after[measure] / pruned.before[measure] <= share


CHECKS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "index.md": lambda it: within(it["pruned"], 0.3) and it["tuned"] > 0.6,
    "guides/too-slow.md": lambda it: (
        it["deployed"].after["latency_ms"] <= it["limit"]
        and all(m.out_channels % 8 == 0 for m in it["even"].model if isinstance(m, it["nn"].Conv2d))
        and 0 < it["check"].rel_error < 0.2
    ),
    "guides/blocks.md": lambda it: (
        len(it["graph"].groups) == 4
        and len(it["shallow"].plan.removed) == 2
        and within(it["both"], 0.5)
        and it["fast"].after["latency_ms"] <= 0.8 * it["fast"].before["latency_ms"]
    ),
    "guides/own-loop.md": lambda it: within(it["pruned"], 0.5) and it["right_after"] > 0.5 * it["dense"],
    "guides/while-training.md": lambda it: within(it["pruned"], 0.4) and it["pruned"].proof.ok,
    "guides/lightning.md": lambda it: within(it["prune"].pruned, 0.4) and it["prune"].pruned.proof.ok,
    "guides/hugging-face-trainer.md": lambda it: (
        within(it["prune"].pruned, 0.5) and it["prune"].pruned.proof.ok
    ),
    "guides/ultralytics-training.md": lambda it: within(it["prune"].pruned, 0.6) and it["top"] in (0, 1),
    "guides/detector.md": lambda it: (
        all(within(it[name], 0.5) for name in ("pruned", "measured"))
        and all(within(it[name], 0.6) for name in ("whole", "by_loss"))
        and it["by_loss"].plan.origin["score"] == "taylor"
    ),
    "guides/ultralytics.md": lambda it: (
        within(it["pruned"], 0.5) and it["pruned"].proof.ok and not it["pruned"].proof.stale
    ),
    "guides/transformer.md": lambda it: all(within(it[name], 0.6) for name in ("narrow", "dims")),
    "guides/hugging-face.md": lambda it: (
        within(it["pruned"], 0.5) and type(it["loaded"].config) is it["ConvNextConfig"]
    ),
    "guides/segmentation.md": lambda it: within(it["pruned"], 0.5) and within(it["decoder"], 0.9),
    "guides/budget.md": lambda it: within(it["both"], 0.4, "params"),
    "guides/compare-fairly.md": lambda it: (
        len(it["outcomes"]) == 6 and not any(o.error for o in it["outcomes"])
    ),
    "guides/many-machines.md": lambda it: len(it["cells"]) == 3 * (2 + 2 + 1) and within(it["front"][1], 0.5),
    "guides/add-a-method.md": lambda it: within(it["result"], 0.5) and within(it["pruned"], 0.5),
    "guides/without-secateur.md": lambda it: within(it["pruned"], 0.5),
    "guides/frozen-or-refused.md": lambda it: all(
        any(all(part.strip() in message for part in heading.split("…")) for message in it["seen"])
        for heading in re.findall("^### “(.*)”$", (DOCS / "guides/frozen-or-refused.md").read_text(), re.M)
    ),
}
"""Page -> whether what it computed is as it says, from its names."""


NEEDS = {
    "guides/ultralytics.md": "ultralytics",
    "guides/lightning.md": "lightning",
    "guides/hugging-face-trainer.md": "transformers",
    "guides/ultralytics-training.md": "ultralytics",
}
"""Page -> the framework it is about."""

NOISE = (
    "ignore:.*does not have many workers",
    "ignore:The number of training batches",
    "ignore:.*treespec, LeafSpec:FutureWarning",
    "ignore:.*pin_memory.*no accelerator",
    "ignore:.*lr_scheduler.step",
    "ignore:.*torch.jit.*deprecated",
    "ignore::torch.jit.TracerWarning",
)
"""What the frameworks warn about in their own code."""


def fences(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(), re.S | re.M)


@pytest.mark.filterwarnings(*NOISE)
@pytest.mark.parametrize("page", [page for page in RUN if page != "guides/index.md"])
def test_its_python_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    pytest.importorskip(NEEDS.get(page, "torch"))
    monkeypatch.chdir(tmp_path)
    start, scope = time.process_time(), {"__name__": "guide"}
    for number, fence in enumerate(fences(page, "python"), 1):
        exec(compile(fence, f"{page}, fence {number}", "exec"), scope)
    assert CHECKS[page](scope)
    assert time.process_time() - start < LIMIT


@pytest.mark.parametrize("page", PAGES)
def test_its_commands_exist(page: str) -> None:
    commands: dict[str, Any] = typer.main.get_command(app).commands
    text = (DOCS / page).read_text().replace("\\\n", " ")
    for line in re.findall(r"^(?: {4})?(secateur .*|.* -m secateur\.cli .*)$", text, re.M):
        words = shlex.split(line.replace("…", ""), comments=True)
        words = words[words.index("secateur" if "secateur" in words else "secateur.cli") + 1 :]
        if not words or words[0].startswith("--"):
            continue
        able = {name for parameter in commands[words[0]].params for name in parameter.opts}
        for word in words[1 : words.index("|") if "|" in words else None]:
            assert not word.startswith("--") or word.partition("=")[0] in able, f"{line}: {word}"


@pytest.mark.parametrize("name", ["first-pruning", "comparing-methods"])
def test_a_notebook_holds_its_page(name: str) -> None:
    make = runpy.run_path(str(DOCS / "notebooks" / "make.py"))
    file = DOCS / "notebooks" / f"{name}.ipynb"
    found = json.loads(file.read_text())
    code = [cell for cell in found["cells"] if cell["cell_type"] == "code"]
    printed = ["".join(line for out in cell["outputs"] for line in out["text"]) for cell in code]
    assert found == make["notebook"](name, printed), f"python docs/notebooks/make.py writes {file.name} again"
    assert all(text for cell, text in zip(code, printed, strict=True) if "print(" in "".join(cell["source"]))
    assert file.stat().st_size < 20_000


def test_every_page_is_in_the_navigation() -> None:
    named = re.findall(r"^ +- (?:.*: )?([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(named) == sorted([*PAGES, "contributing.md", "changelog.md"])
