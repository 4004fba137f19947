"""Command-line flags made of settings classes: names, types, help and ranges come from their fields.

    @command(Flags(Task), Flags(RunSettings))
    def train(given: Given) -> None: ...

A flag that was not typed is not among what is given, so that the class's own default holds, and what a recipe says.
"""

import inspect
import json
import tomllib
import types
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from secateur.errors import FileError, SecateurError, unknown
from secateur.recipes.normalisation import Normalisation
from secateur.settings import Option, defaults_of, option, options_of, settings

if TYPE_CHECKING:
    from secateur.runs.folder import Mode

TRAINING, RUN = "Training", "Run"


class Flags:
    """Fields of a settings class as flags.

    Args:
        cls: the class.
        only: names of its fields; None: all that a flag can give.
        panel: heading for fields that name none.
        shown: name -> what is shown as its default, in place of the field's own.
    """

    def __init__(
        self,
        cls: type,
        *,
        only: Collection[str] | None = None,
        panel: str | None = None,
        shown: Mapping[str, str] | None = None,
    ) -> None:
        self.cls, self.panel, self.shown = cls, panel, dict(shown or {})
        hints = get_type_hints(cls)
        self.fields = {
            name: (hints[name], about)
            for name, about in options_of(cls).items()
            if name in (only or options_of(cls)) and _typed(hints[name]) is not None
        }

    def parameters(self) -> list[inspect.Parameter]:
        """One keyword parameter for each flag, as Typer reads them."""
        defaults = defaults_of(self.cls)
        found = []
        for name, (hint, about) in self.fields.items():
            kind = _typed(hint)
            flag = about.flag or f"--{name.replace('_', '-')}"
            shown = self.shown.get(name) or about.shown
            if kind is bool:
                default: Any = False
                shown = None
            else:
                default, kind = None, kind | None
                shown = shown or (_shown(defaults[name]) if name in defaults else None)
            words = about.help[0].upper() + about.help[1:] + _choices(hint, about) + "."
            told = typer.Option(
                flag,
                help=words,
                metavar=about.metavar or _metavar(hint),
                rich_help_panel=about.panel or self.panel,
                show_default=shown or False,
            )
            found.append(
                inspect.Parameter(
                    name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, told]
                )
            )
        return found


@settings
class RunSettings:
    """Where a run goes, and what it may use."""

    out: Path = option("folder for everything the run writes; new or empty", panel=RUN, metavar="DIR")
    threads: int | None = option(
        "CPU threads", default=None, least=1, panel=RUN, shown="as many as PyTorch likes"
    )
    resume: bool = option(
        "go on with the run in the folder where it was interrupted", default=False, panel=RUN
    )
    overwrite: bool = option("replace the run in the folder", default=False, panel=RUN)
    no_progress: bool = option("hide progress", default=False, panel=RUN)
    quiet: bool = option("print errors only; with --json the result too", default=False, panel=RUN)

    def check(self) -> None:
        if self.resume and self.overwrite:
            raise SecateurError("--resume and --overwrite exclude each other; give one of them")
        if self.threads is not None:
            import torch

            torch.set_num_threads(self.threads)

    @property
    def silent(self) -> bool:
        """Whether progress is hidden."""
        return self.no_progress or self.quiet

    @property
    def mode(self) -> "Mode":
        """What to do with a folder that holds a run."""
        return "resume" if self.resume else "overwrite" if self.overwrite else "new"


class Given(dict[str, Any]):
    """What was typed or stands in a recipe, by name."""

    def make(self, cls: type, **more: Any) -> Any:
        """The settings that these give, with some more; `more` that is None is left out.

        Raises:
            SecateurError: something that must be given is missing, or does not fit.
        """
        own = {name: value for name, value in self.items() if name in options_of(cls)}
        given = own | {name: value for name, value in more.items() if value is not None}
        missing = [n for n in options_of(cls) if n not in given and n not in defaults_of(cls)]
        if missing:
            flag = options_of(cls)[missing[0]].flag or f"--{missing[0].replace('_', '-')}"
            raise SecateurError(f"no {missing[0]}: give {flag}, the {options_of(cls)[missing[0]].help}")
        return cls(**given)

    def with_recipe(self, path: Path | None, able: Collection[str]) -> "Given":
        """These, and below them what a recipe says: a TOML file with the names of flags.

        Raises:
            FileError: it cannot be read.
            SecateurError: it names something that is not a setting.
        """
        if path is None:
            return self
        try:
            recipe = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise FileError(f"{path}: cannot be read as a recipe ({error})") from None
        for name in recipe:
            if name not in able:
                raise SecateurError(f"{path}: {unknown('setting', name, able)}")
        return Given({**{name: _read(name, value) for name, value in recipe.items()}, **self})


Body = Callable[[Given], None]


def command(*groups: Flags | inspect.Parameter) -> Callable[[Body], Callable[..., None]]:
    """Make a function of what was given a command with flags.

    Args:
        groups: flags, or single parameters as Typer reads them.
    """
    found: dict[str, inspect.Parameter] = {}
    for group in groups:
        for parameter in group.parameters() if isinstance(group, Flags) else [group]:
            found.setdefault(parameter.name, parameter)
    order = sorted(found.values(), key=lambda p: (p.kind, _place(p)))  # arguments before flags

    def decorate(body: Body) -> Callable[..., None]:
        def run(**typed: Any) -> None:
            given = {
                name: _read(name, value)
                for name, value in typed.items()
                if not (value is None or value is False or value == [])
            }
            body(Given(given))

        run.__name__, run.__doc__ = body.__name__, body.__doc__
        run.__signature__ = inspect.Signature(order)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in order}
        return run

    return decorate


def flag(
    name: str,
    kind: Any,
    help: str,
    *,
    panel: str | None = None,
    shown: str | None = None,
    metavar: str | None = None,
) -> inspect.Parameter:
    """A flag that stands for no field."""
    default = False if kind is bool else None
    told = typer.Option(
        f"--{name.replace('_', '-')}",
        help=help,
        rich_help_panel=panel,
        show_default=shown or False,
        metavar=metavar,
    )
    kind = kind if kind is bool else kind | None
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, told]
    )


FREEZE = flag(
    "freeze",
    list[str],
    "Module, or pattern such as 'layer4.*', that no cut may touch; may be repeated.",
    panel="Method",
    metavar="MODULE",
)


def argument(name: str, kind: Any, metavar: str, help: str) -> inspect.Parameter:
    """A word without a flag, which may be left out."""
    told = typer.Argument(metavar=metavar, help=help, show_default=False)
    return inspect.Parameter(
        name,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        default=None,
        annotation=Annotated[kind | None, told],
    )


def parse_options(given: Collection[str]) -> dict[str, Any]:
    """Read `NAME=VALUE`s; a value is JSON, or else text.

    >>> parse_options(["bypass=shared", "weight=2.5", "removal.steps=50", "learn=false"])
    {'bypass': 'shared', 'weight': 2.5, 'removal.steps': 50, 'learn': False}
    """
    options: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.replace(".", "_").isidentifier():
            raise SecateurError(f"--option {text}: expected NAME=VALUE, such as bypass=shared")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


PANELS = ("Model", "Data", "Budget", "Method", "Training", "Fine-tuning", "Run")
"""Headings in the order in which help shows them."""


def _place(parameter: inspect.Parameter) -> int:
    """Where in help a parameter stands."""
    panel = get_args(parameter.annotation)[1].rich_help_panel
    return PANELS.index(panel) if panel in PANELS else len(PANELS)


def _read(name: str, value: Any) -> Any:
    return Normalisation.parse(value) if name == "normalisation" and isinstance(value, str) else value


def _typed(hint: Any) -> Any:
    """What Typer is to read for a type; None: no flag can give it.

    >>> _typed(int | None), _typed(Literal["a", "b"]), _typed(tuple[str, ...]), _typed(dict[str, int])
    (<class 'int'>, <class 'str'>, list[str], None)
    """
    kinds = [k for k in get_args(hint) if k is not type(None)] if _is_union(hint) else [hint]
    for kind in kinds:
        origin = get_origin(kind) or kind
        if origin is Literal or origin is Normalisation:
            return str
        if origin in (bool, int, float, str, Path):
            return origin
        if origin is tuple and get_args(kind)[1:] == (Ellipsis,):
            return list[get_args(kind)[0]]  # type: ignore[misc]
    return None


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def _choices(hint: Any, about: Option) -> str:
    """`: a, b or c` for a field with few names that its help does not tell."""
    kinds = get_args(hint) if _is_union(hint) else [hint]
    names = [str(name) for kind in kinds if get_origin(kind) is Literal for name in get_args(kind)]
    return f": {', '.join(names[:-1])} or {names[-1]}" if names else ""


def _metavar(hint: Any) -> str | None:
    kind = _typed(hint)
    return {bool: None, int: "N", float: "X", Path: "PATH"}.get(kind, "NAME")


def _shown(default: Any) -> str | None:
    if default is None or default == () or default == {}:
        return None
    return str(default)
