"""Checking a method's options: names among choices, numbers in range."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from secateur.errors import SecateurError

Names = Mapping[str, Sequence[str]]
"""Option -> its choices."""

Numbers = Mapping[str, tuple[Callable[[Any], bool], str]]
"""Option -> whether a value will do, and in words what will."""


def check_options(method: str, options: Mapping[str, Any], names: Names, numbers: Numbers) -> None:
    """Raise SecateurError, naming the first option that will not do.

    >>> check_options("LAPP", {"weight": -1}, {}, {"weight": (lambda v: v >= 0, "at least 0")})
    Traceback (most recent call last):
    secateur.errors.SecateurError: LAPP: weight is -1; expected at least 0
    """
    for name, choices in names.items():
        if options[name] not in choices:
            raise SecateurError(
                f"{method}: {name} is {options[name]!r}; expected one of {', '.join(choices)}"
            )
    for name, (holds, expected) in numbers.items():
        try:
            fits = holds(options[name])
        except TypeError:
            fits = False
        if not fits:
            raise SecateurError(f"{method}: {name} is {options[name]!r}; expected {expected}")
