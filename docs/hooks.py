"""What the site takes from the code: options of methods, help of commands, and the pages that lie in the root.

`<!-- methods -->` in a page becomes a section for each method, `<!-- commands -->` one for each command, and
`<!-- options module:Class -->` the table of what is set in a class.
"""

import inspect
import json
import re
import sys
from pathlib import Path, PurePosixPath
from typing import Any, get_type_hints

from mkdocs.structure.files import File, Files

from secateur.imports import imported

ROOT = Path(__file__).parents[1]
OUTSIDE = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""File in the root -> page of the site."""


def on_files(files: Files, config: Any) -> Files:
    for name, page in OUTSIDE.items():
        text = (ROOT / name).read_text().replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    up = "../" * (len(PurePosixPath(page.file.src_uri).parts) - 1)
    for name, target in OUTSIDE.items():
        markdown = markdown.replace(f"](../{up}{name}", f"]({up}{target}")
    for marker, made in (("<!-- methods -->", methods), ("<!-- commands -->", commands)):
        if marker in markdown:
            markdown = markdown.replace(marker, made())
    return re.sub(r"<!-- options (\S+) -->", lambda found: _options(imported("class", found[1])), markdown)


def methods() -> str:
    """A section per method: its docstring, and a table of its options."""
    from secateur.methods import METHODS

    parts = []
    for when, title in (
        ("after", "For trained models"),
        ("during", "While the model trains"),
        ("before", "Before training"),
    ):
        parts.append(f"## {title}\n")
        for name, method in METHODS.items():
            if method.when == when:
                parts += [f"### {name}\n", _about(method), _options(method)]
    return "\n".join(parts)


def _about(method: type[Any]) -> str:
    block = f"::: secateur.methods.{method.__name__}"
    options = (
        "members: false",
        "show_bases: false",
        "show_root_heading: false",
        "show_root_toc_entry: false",
    )
    shown = "\n".join(f"      {line}" for line in options)
    head = f"`secateur.methods.{method.__name__}`, `--method {method.name}`; removes {method.removes}."
    if "Source:" not in (method.__doc__ or ""):  # then the module names it
        source = re.search(
            r"^Source: (.*?)$(?=\n\n|\s*\Z)", sys.modules[method.__module__].__doc__ or "", re.M | re.S
        )
        shown += f"\n\n**Source.** {' '.join(source[1].split())}" if source else ""
    return f"{head}\n\n{block}\n    options:\n{shown}\n"


def _options(cls: type[Any]) -> str:
    from secateur.settings import defaults_of, expected, options_of, plain

    hints, defaults = get_type_hints(cls), defaults_of(cls)
    rows = []
    for name, about in options_of(cls).items():
        default = json.dumps(plain(defaults[name]), default=str) if name in defaults else "must be given"
        rows.append((f"`{name}`", f"`{default}`", about.help, expected(hints[name], about)))
    return _table(("option", "default", "what it is", "may be"), rows)


def commands() -> str:
    """A section per command: what it does, its arguments and its flags."""
    import typer

    from secateur.cli import EXIT_CODES, app

    command: Any = typer.main.get_command(app)
    parts = [f"{EXIT_CODES}\n"]
    for name, one in command.commands.items():
        text, _, example = _plain(inspect.cleandoc(one.help or "")).partition("Example:")
        parts += [f"## secateur {name}\n", f"{text.strip()}\n"]
        if example:
            parts.append(f"```bash\n{inspect.cleandoc(example)}\n```\n")
        rows = [
            (
                f"`{', '.join(p.opts) if p.param_type_name == 'option' else (p.metavar or p.name.upper())}`",
                _help(p),
            )
            for p in one.params
            if p.name != "help"
        ]
        parts.append(_table(("flag", "what it does"), rows))
    return "\n".join(parts)


def _help(parameter: Any) -> str:
    text = _plain(getattr(parameter, "help", None) or "")
    shown = getattr(parameter, "show_default", None)
    return f"{text} Default: {shown}." if isinstance(shown, str) and shown else text


def _plain(text: str) -> str:
    """Help without the marks of Rich and of Click."""
    return re.sub(r"\[/?(bold|dim|italic)?\]", "", text.replace("\b\n", ""))


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    def line(cells: tuple[str, ...]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    return "\n".join([line(head), line(("---",) * len(head)), *map(line, rows), ""])
