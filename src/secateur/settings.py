"""Settings as dataclass fields: each option says once what it is for, its default, and which values it takes.

    @settings
    class Fade:
        steps: int = option("steps until a unit is zero", default=1, least=1)

From these fields follow the checks at construction, command-line flags, lists of options, files and tables in the docs.
Nothing here needs PyTorch, so that `secateur --help` need not wait for it.
"""

import collections.abc
import dataclasses
import functools
import inspect
import math
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import (
    Any,
    Literal,
    ParamSpec,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

from secateur.errors import SecateurError, unknown

T = TypeVar("T")


@dataclass(frozen=True)
class Option:
    """What a field says about itself.

    Attributes:
        help: one line, without a full stop.
        choices: names that it may take, or a function that gives them.
        custom: whether it may also be a function, or `module:function`.
        least, most: bounds that are allowed themselves.
        above, below: bounds that are not.
        panel: heading under which the command line shows it.
        flag: its flag on the command line; None: made of its name.
        metavar: what the command line shows in place of a value.
        shown: what the command line shows as the default.
    """

    help: str
    choices: Collection[str] | Callable[[], Collection[str]] | None = None
    custom: bool = False
    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    panel: str | None = None
    flag: str | None = None
    metavar: str | None = None
    shown: str | None = None

    @property
    def names(self) -> list[str] | None:
        """The choices; None: there are none to choose from."""
        if self.choices is None:
            return None
        return list(self.choices() if callable(self.choices) else self.choices)

    @property
    def range(self) -> str:
        """The bounds in words; empty if there are none."""
        words = [
            f"{word} {bound:g}"
            for word, bound in (
                ("at least", self.least),
                ("above", self.above),
                ("at most", self.most),
                ("below", self.below),
            )
            if bound is not None
        ]
        return ", ".join(words)

    def holds(self, number: float) -> bool:
        """Whether a number is within the bounds."""
        return (
            math.isfinite(number)
            and (self.least is None or number >= self.least)
            and (self.most is None or number <= self.most)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )


def option(help: str, *, default: Any = MISSING, **about: Any) -> Any:
    """A field of a settings class: one line of help, the default unless it must be given, and more as for `Option`."""
    metadata = {"option": Option(help, **about)}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(option, dataclasses.field))
def settings(cls: type[T]) -> type[T]:
    """Make a class a frozen dataclass of options that are checked when it is constructed.

    A method `check(self)` of the class, if there is one, then checks what options must be to one another. The class
    attribute `error` is what is raised, by default `SecateurError`.

    >>> @settings
    ... class Fade:
    ...     steps: int = option("steps until a unit is zero", default=1, least=1)
    >>> Fade(steps=0)
    Traceback (most recent call last):
    secateur.errors.SecateurError: Fade: steps is 0; expected a whole number, at least 1
    >>> Fade(step=3)
    Traceback (most recent call last):
    secateur.errors.SecateurError: Fade: unknown option 'step'; choose one of: steps. Did you mean 'steps'?
    """
    made = dataclass(frozen=True, kw_only=True)(cls)
    plain = made.__init__
    error: type[SecateurError] = getattr(cls, "error", SecateurError)

    @functools.wraps(plain)
    def construct(self: Any, *args: Any, **given: Any) -> None:
        able = options_of(made)
        if args:
            raise error(f"{cls.__name__}: give its options by name: {', '.join(able)}")
        for name in given:
            if name not in able:
                raise error(f"{cls.__name__}: {unknown('option', name, able)}")
        for f in fields(made):  # type: ignore[arg-type]
            if f.name not in given and f.default is MISSING and f.default_factory is MISSING:
                raise error(f"{cls.__name__}: no {f.name}; it is the {able[f.name].help}")
        plain(self, **given)
        _check(self, error)

    made.__init__ = construct  # type: ignore[method-assign]
    return made


def options_of(cls: Any) -> dict[str, Option]:
    """Option by name, of a settings class or an instance of one, in the order of its fields."""
    return {f.name: f.metadata["option"] for f in fields(cls) if "option" in f.metadata}


def defaults_of(cls: Any) -> dict[str, Any]:
    """Default by name, of those options that have one."""
    found = {}
    for f in fields(cls):
        if f.default is not MISSING:
            found[f.name] = f.default
        elif f.default_factory is not MISSING:
            found[f.name] = f.default_factory()
    return found


def expected(hint: Any, option: Option) -> str:
    """What an option may be, in words.

    >>> expected(float | None, Option("", above=0))
    'a number above 0, or None'
    >>> expected(int | str, Option("", least=1, choices=("auto", "gpu")))
    'a whole number, at least 1, or one of auto, gpu'
    """
    kinds, optional = _kinds(hint)
    if (names := _names(hint, option)) is not None:
        words = f"one of {', '.join(names)}" + (", a function or module:function" if option.custom else "")
        if int in kinds:
            words = f"{_bounded('a whole number', option)}, or {words}"
    elif bool in kinds:
        words = "True or False"
    elif int in kinds and float not in kinds:
        words = _bounded("a whole number", option)
    elif float in kinds:
        words = _bounded("a number", option)
    elif str in kinds or Path in kinds:
        words = "text"
    else:
        origins = {get_origin(kind) or kind for kind in kinds}
        if tuple in origins:
            words = "a list" + (f" of numbers, each {option.range}" if option.range else "")
        elif origins & {dict, Mapping}:
            words = "a table"
        else:
            words = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
    return words + (", or None" if optional else "")


def _bounded(what: str, option: Option) -> str:
    """`a number above 0`, `a number, at least 0`."""
    if not option.range:
        return what
    return f"{what} {option.range}" if option.range.startswith("above") else f"{what}, {option.range}"


def plain(value: Any) -> Any:
    """Settings as plain JSON: dataclasses become tables, paths absolute text, functions `module:name`."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, Path):
        return str(value.resolve())
    if callable(value):
        return f"{value.__module__}:{getattr(value, '__qualname__', type(value).__qualname__)}"
    return value


def differences(saved: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """What differs between two trees of settings, one sentence each.

    >>> list(differences({"train": {"lr": 1}, "seed": 0}, {"train": {"lr": 3}, "seed": 0}))
    ['train.lr was 1, is now 3']
    """
    for key in dict.fromkeys([*saved, *now]):
        then, today = saved.get(key), now.get(key)
        if isinstance(then, dict) and isinstance(today, dict):
            yield from differences(then, today, f"{where}{key}.")
        elif then != today:
            yield f"{where}{key} was {_shown(then)}, is now {_shown(today)}"


def _shown(value: Any) -> str:
    return "not given" if value is None else "given" if isinstance(value, dict) else str(value)


def _check(given: Any, error: type[SecateurError]) -> None:
    hints = get_type_hints(type(given))
    for name, option in options_of(given).items():
        value = getattr(given, name)
        try:
            fit = _fitted(value, hints[name], option)
        except _Unfit:
            raise error(
                f"{type(given).__name__}: {name} is {value!r}; expected {expected(hints[name], option)}"
            ) from None
        if fit is not value:
            object.__setattr__(given, name, fit)
    if check := getattr(given, "check", None):
        check()


P = ParamSpec("P")
R = TypeVar("R")


def checked(
    error: type[SecateurError], *, but: Collection[str] = ()
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A function whose arguments are checked against its type hints before it runs.

    Args:
        error: what is raised for a wrong one; the message says what was given and what may be.
        but: arguments that the function checks itself.

    >>> @checked(SecateurError)
    ... def shorten(text: str, to: int | None = 3) -> str:
    ...     return text[:to]
    >>> shorten("unit")
    'uni'
    >>> shorten("unit", "all")
    Traceback (most recent call last):
    secateur.errors.SecateurError: shorten: to is 'all'; expected a whole number, or None
    >>> shorten("unit", most=2)
    Traceback (most recent call last):
    secateur.errors.SecateurError: shorten: got an unexpected keyword argument 'most'; its arguments are: text, to
    """

    def check(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        hints = functools.cache(lambda: get_type_hints(function))

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                given_to = signature.bind(*args, **kwargs).arguments
            except TypeError as wrong:
                raise error(f"{function.__name__}: {wrong}; {_arguments(signature)}") from None
            for name, value in given_to.items():
                kind = signature.parameters[name].kind
                several = kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
                if not several and name not in but and name in hints() and not _holds(value, hints()[name]):
                    words = _class_words(hints()[name]) or expected(hints()[name], Option(""))
                    given = repr(value) if isinstance(value, PLAIN) else f"a {type(value).__name__}"
                    raise error(f"{function.__name__}: {name} is {given[:80]}; expected {words}")
            return function(*args, **kwargs)

        return call

    return check


def _arguments(signature: inspect.Signature) -> str:
    """The arguments of a function in words."""
    by_name_only = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
    named = [name for name, p in signature.parameters.items() if p.kind in by_name_only]
    others = [name for name in signature.parameters if name not in ("self", *named)]
    by_name = f"; by name (argument=value): {', '.join(named)}" if named else ""
    return f"its arguments are: {', '.join(others)}{by_name}"


PLAIN = (bool, int, float, str, types.NoneType, Path)
"""Types whose values a message may show."""


def _class_words(hint: Any) -> str | None:
    """`a torch.nn.Module`, for a class."""
    if not isinstance(hint, type) or hint in (bool, int, float, str, Path, tuple, dict, list):
        return None
    start = "torch.nn." if hint.__module__.startswith("torch.nn.") else ""
    return f"a {start}{hint.__name__}"


def _holds(value: Any, hint: Any) -> bool:
    """Whether a value is of a type; what cannot be looked into (iterables, functions) counts by its kind alone."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any or isinstance(hint, TypeVar | str):
        return True
    if hint is None or hint is types.NoneType:
        return value is None
    if origin in (Union, types.UnionType):
        return any(_holds(value, part) for part in args)
    if origin is Literal:
        return value in args
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    kind = origin or hint
    if not isinstance(kind, type):
        return callable(value) if kind is Callable else True
    if kind in (collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection):
        parts = value if isinstance(value, list | tuple) else ()
        inner = [part for part in args if part is not Ellipsis][:1]
        return (
            isinstance(value, kind)
            and not isinstance(value, str)
            and all(_holds(part, hint) for part in parts for hint in inner)
        )
    return isinstance(value, kind)


class _Unfit(Exception):
    pass


def _kinds(hint: Any) -> tuple[list[Any], bool]:
    """The types of a hint, and whether None is among them."""
    parts = list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]
    return [part for part in parts if part is not type(None)], type(None) in parts


def _names(hint: Any, option: Option) -> list[str] | None:
    if option.names is not None:
        return option.names
    kinds, _ = _kinds(hint)
    literal = [name for kind in kinds if get_origin(kind) is Literal for name in get_args(kind)]
    return literal or None


def _fitted(value: Any, hint: Any, option: Option) -> Any:
    """The value as its type asks for it: lists become tuples, tables become settings.

    Raises:
        _Unfit: it is none of what it may be.
    """
    kinds, optional = _kinds(hint)
    if value is None:
        if optional:
            return None
        raise _Unfit
    if option.custom and (callable(value) or (isinstance(value, str) and ":" in value)):
        return value
    names = _names(hint, option)
    if names is not None and isinstance(value, str) and value in names:
        return value
    for kind in kinds:
        for fit in _as(value, kind, option, names):
            return fit
    raise _Unfit


def _as(value: Any, kind: Any, option: Option, names: list[str] | None) -> Iterator[Any]:
    """The value as one type, if it can be that."""
    origin = get_origin(kind) or kind
    if origin is bool and isinstance(value, bool):
        yield value
    elif origin in (int, float) and isinstance(value, int | float) and not isinstance(value, bool):
        if option.holds(value) and (origin is float or isinstance(value, int)):
            yield value
    elif origin is str and isinstance(value, str) and names is None:
        yield value
    elif origin is Path and isinstance(value, str | Path):
        yield Path(value)
    elif origin is tuple and isinstance(value, list | tuple | str):
        parts = (value,) if isinstance(value, str) else tuple(value)
        yield from _tuple(parts, get_args(kind), option, names)
    elif origin in (dict, Mapping) and isinstance(value, Mapping):
        yield value
    elif isinstance(origin, type) and is_dataclass(origin):
        if isinstance(value, origin):
            yield value
        elif isinstance(value, Mapping):
            yield origin(**value)
        elif value is True:
            yield origin()
    elif (
        isinstance(origin, type)
        and origin not in (bool, int, float, str, tuple, dict)
        and isinstance(value, origin)
    ):
        yield value


def _tuple(
    parts: tuple[Any, ...], kinds: tuple[Any, ...], option: Option, names: list[str] | None
) -> Iterator[Any]:
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(parts)
    if len(kinds) != len(parts):
        return
    found = []
    for part, kind in zip(parts, kinds, strict=True):
        if names is not None and part in names:
            found.append(part)
            continue
        fits = list(_as(part, kind, option, names))
        if not fits:
            return
        found.append(fits[0])
    yield tuple(found)
