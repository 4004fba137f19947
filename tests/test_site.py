"""The documentation builds in strict mode, its links lead somewhere, and it needs no network."""

import html
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

from secateur.methods import METHODS
from secateur.settings import options_of

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    for tool in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(tool, reason="the site needs pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def attributes(page: str, *names: str) -> list[str]:
    return [html.unescape(value) for value in re.findall(rf'\b(?:{"|".join(names)})="([^"]*)"', page)]


def test_links_lead_somewhere(site: Path) -> None:
    pages = {path: path.read_text() for path in site.rglob("*.html") if path.name != "404.html"}
    marks = {path: set(attributes(page, "id", "name")) for path, page in pages.items()}
    assert len(pages) > 40
    for path, page in pages.items():
        for link in set(attributes(page, "href", "src")):
            if re.match(r"\w+:", link):
                continue
            target, mark = urldefrag(link)
            found = (path.parent / unquote(target)).resolve() if target else path
            found = found / "index.html" if found.is_dir() else found
            assert found.is_file(), f"{path.relative_to(site)}: {link}"
            if mark and found in marks:
                assert unquote(mark) in marks[found] | {"__toc", "__drawer"}, (
                    f"{path.relative_to(site)}: {link}"
                )


def test_nothing_is_read_from_the_network(site: Path) -> None:
    for path in site.rglob("*.html"):
        tags = re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", path.read_text())
        assert not [tag for tag in tags if re.search(r'(?:src|href)="(?:https?:)?//', tag)], path
    for path in site.rglob("*.css"):
        assert not re.search(r"@import|url\((?:[\"']?)https?:", path.read_text()), path


def test_every_option_of_every_method_is_listed(site: Path) -> None:
    page = (site / "reference" / "methods.html").read_text()
    for name, method in METHODS.items():
        section = page.split(f'<h3 id="{name}"')[1].split("<h3 ")[0]
        for option in options_of(method):
            assert f"<td><code>{option}</code></td>" in section, f"{name}: {option}"


def test_docstrings_become_markdown() -> None:
    pytest.importorskip("griffe")
    spec = importlib.util.spec_from_file_location("docstrings", ROOT / "docs" / "docstrings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = "Add.\nArgs:\n    a, b: numbers.\nSource: a book,\n    page 3.\n\n>>> 1 + 1\n2"
    assert module.as_markdown(text) == (
        "Add.\n\nArgs:\n    a: numbers.\n    b: numbers.\n\n**Source.** a book, page 3.\n\n\n"
        "```pycon\n>>> 1 + 1\n2\n```\n"
    )
