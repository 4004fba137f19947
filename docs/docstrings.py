"""Docstrings as Markdown: examples become code, `Source` and `Differs` paragraphs, and what is made at run time is read."""

import re
from importlib import import_module
from typing import Any

import griffe

_EXAMPLE = re.compile(r"(?:^|(?<=\n))((?:>>> .*\n?)(?:(?!\n).+\n?)*)")
_NOTE = re.compile(r"^(Source|Differs): (.*(?:\n    .*)*)$", re.M)
_ITEM = re.compile(r"^(`[^\n:]*`: )", re.M)


def as_markdown(text: str) -> str:
    """Text of a docstring, for the site.

    >>> as_markdown("Add.\\n\\n>>> 1 + 1\\n2")
    'Add.\\n\\n```pycon\\n>>> 1 + 1\\n2\\n```\\n'
    """
    text = _EXAMPLE.sub(lambda found: f"```pycon\n{found[1].rstrip()}\n```\n", text)
    text = _NOTE.sub(lambda found: f"\n**{found[1]}.** " + re.sub(r"\n +", " ", found[2]) + "\n", text)
    return _ITEM.sub(r"\n- \1", text)


class Docstrings(griffe.Extension):
    """Rewrites every docstring of the package once it is read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        if obj.path == "secateur.cost.budget.Budget":  # it lists the measures, which are a table
            obj.docstring.value = import_module("secateur.cost").Budget.__doc__ or ""
        obj.docstring.value = as_markdown(obj.docstring.value)
