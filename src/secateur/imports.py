"""Functions and classes of the user's own, named `module:function` or `file.py:function`."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from secateur.errors import SecateurError, unknown

T = TypeVar("T")


def imported(kind: str, name: str, error: type[SecateurError] = SecateurError) -> Callable[..., Any]:
    """What `module:function` or `path/file.py:function` names; modules are looked for in the working directory too.

    Args:
        kind: what it is to be, for messages.
        name: module and function.
        error: raised if there is no such thing.

    >>> imported("method", "math:sqrt")(4.0)
    2.0
    """
    module_name, _, function_name = name.rpartition(":")
    with working_directory_importable():
        try:
            module = (
                _from_file(Path(module_name))
                if module_name.endswith(".py")
                else importlib.import_module(module_name)
            )
        except Exception as problem:  # whatever the user's module does when it is imported
            raise error(f"{kind} {name!r}: cannot import {module_name!r}: {problem}") from problem
    found = getattr(module, function_name, None)
    if not callable(found):
        raise error(f"{kind} {name!r}: {module_name!r} has no function {function_name!r}")
    return found  # type: ignore[no-any-return]


def _from_file(path: Path) -> ModuleType:
    """The module in a file, which is imported once."""
    path = path.resolve()
    for module in list(sys.modules.values()):
        if getattr(module, "__file__", None) == str(path) and module.__name__ != "__main__":
            return module
    if not path.is_file():
        raise ImportError("no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    name = path.stem if path.stem not in sys.modules else str(path)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def look_up(
    kind: str,
    value: str | Callable[..., Any],
    table: Mapping[str, T],
    enter: Callable[[Callable[..., Any], str], T],
    error: type[SecateurError] = SecateurError,
) -> T:
    """An entry of a table by its name; or one for a function, given as such or as `module:function`.

    Args:
        kind: what it is to be, for messages.
        value: the name or the function.
        table: the entries by name.
        enter: makes an entry of a function and what it is called.
        error: raised if there is no such thing.

    >>> look_up("score", len, {}, lambda function, name: (function, name))
    (<built-in function len>, 'len')
    """
    if callable(value):
        return enter(value, getattr(value, "__name__", "your own"))
    if ":" in value:
        return enter(imported(kind, value, error), value)
    if value not in table:
        raise error(unknown(kind, value, table))
    return table[value]


@contextmanager
def working_directory_importable() -> Iterator[None]:
    """Look for modules in the working directory too, after everything else."""
    sys.path.append("")
    try:
        yield
    finally:
        sys.path.remove("")
