"""Docstrings as Markdown: examples become code; `Source`, `Differs` and descriptions of options become paragraphs."""

import re
from importlib import import_module
from typing import Any

import griffe

_EXAMPLE = re.compile(r"(?:^|(?<=\n))((?:>>> .*\n?)(?:(?!\n).+\n?)*)")
_NOTE = re.compile(r"^(Source|Differs): (.*(?:\n    .*)*)$", re.M)
_SECTION = re.compile(r"\n(Args|Attributes|Returns|Raises):\n")
_SHARED = re.compile(r"^    (\w+(?:, \w+)+): (.*\n?(?:        .*\n?)*)", re.M)
_ITEM = re.compile(r"^(`[^\n:]*`: )", re.M)


def as_markdown(text: str) -> str:
    """Text of a docstring, for the site."""
    text = _EXAMPLE.sub(lambda found: f"```pycon\n{found[1].rstrip()}\n```\n", text)
    text = _NOTE.sub(lambda found: f"\n**{found[1]}.** " + re.sub(r"\n +", " ", found[2]) + "\n", text)
    text = _SECTION.sub(r"\n\n\1:\n", text)
    text = _SHARED.sub(_apart, text)
    return _ITEM.sub(r"\n- \1", text)


def _apart(found: re.Match[str]) -> str:
    """Names that share a description, an entry each."""
    described = found[2] if found[2].endswith("\n") else f"{found[2]}\n"
    return "".join(f"    {name}: {described}" for name in found[1].split(", "))


class Docstrings(griffe.Extension):
    """Rewrites every docstring of the package once it is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        if obj.path == "secateur.cost.budget.Budget":  # it lists the measures, which are a table
            obj.docstring.value = import_module("secateur.cost").Budget.__doc__ or ""
        obj.docstring.value = as_markdown(obj.docstring.value)
