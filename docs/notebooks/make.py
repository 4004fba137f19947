"""Write the notebooks: pages of these docs as cells, with what their code prints.

    python docs/notebooks/make.py

The tests run the code of the pages, and check that the notebooks hold the same.
"""

import contextlib
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1]
NOTEBOOKS = {
    "first-pruning": ("index.md", "# First pruning", "## Your first pruning", "## What you get"),
    "comparing-methods": ("guides/compare-fairly.md", "# Comparing methods", "Most differences", "## Traps"),
}
"""Name -> page, title, and the text where it starts and ends."""


def cells(name: str) -> Iterator[tuple[str, str]]:
    """(kind, text) of the cells of a notebook, "markdown" or "code"."""
    page, title, first, last = NOTEBOOKS[name]
    text = (DOCS / page).read_text()
    text = f"{title}\n\n" + text[text.index(first) : text.index(last)].removeprefix(f"{first}\n")
    folder = f"../{Path(page).parent}/" if "/" in page else "../"
    for number, part in enumerate(re.split(r"^```python\n(.*?)^```\n", text, flags=re.S | re.M)):
        if number % 2:
            yield "code", part.rstrip("\n")
        elif part.strip():
            yield "markdown", re.sub(r"\]\((?!\w+:|#)", f"]({folder}", part.strip())


def notebook(name: str, printed: list[str]) -> dict[str, Any]:
    """A notebook in Jupyter's format.

    Args:
        name: which one.
        printed: by each code cell.
    """
    outputs = iter(printed)
    made = []
    for number, (kind, text) in enumerate(cells(name)):
        cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}}
        cell["source"] = text.splitlines(keepends=True)
        if kind == "code":
            said = next(outputs).splitlines(keepends=True)
            stream = [{"name": "stdout", "output_type": "stream", "text": said}] if said else []
            cell |= {"execution_count": sum(c["cell_type"] == "code" for c in made) + 1, "outputs": stream}
        made.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    about = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": made, "metadata": about, "nbformat": 4, "nbformat_minor": 5}


def run(name: str) -> list[str]:
    """What each code cell prints."""
    scope: dict[str, Any] = {"__name__": "__main__"}
    printed, back = [], os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for kind, text in cells(name):
                if kind == "code":
                    with contextlib.redirect_stdout(io.StringIO()) as said:
                        exec(compile(text, name, "exec"), scope)
                    printed.append(said.getvalue())
        finally:
            os.chdir(back)
    return printed


if __name__ == "__main__":
    for name in NOTEBOOKS:
        path = DOCS / "notebooks" / f"{name}.ipynb"
        path.write_text(json.dumps(notebook(name, run(name)), indent=1, ensure_ascii=False) + "\n")
