"""Functions and classes of the user's own, named `module:function` on command lines and in recipes."""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from secateur.errors import SecateurError


def imported(kind: str, name: str, error: type[SecateurError] = SecateurError) -> Callable[..., Any]:
    """What `module:function` names; modules are looked for in the working directory too.

    Args:
        kind: what it is to be, for messages.
        name: module and function.
        error: raised if there is no such thing.

    >>> imported("method", "math:sqrt")(4.0)
    2.0
    """
    module_name, _, function_name = name.partition(":")
    with working_directory_importable():
        try:
            module = importlib.import_module(module_name)
        except (ImportError, ValueError) as problem:
            raise error(f"{kind} {name!r}: cannot import {module_name!r}: {problem}") from problem
    found = getattr(module, function_name, None)
    if not callable(found):
        raise error(f"{kind} {name!r}: {module_name!r} has no function {function_name!r}")
    return found  # type: ignore[no-any-return]


@contextmanager
def working_directory_importable() -> Iterator[None]:
    """Look for modules in the working directory too, after everything else."""
    sys.path.append("")
    try:
        yield
    finally:
        sys.path.remove("")
