"""A comparison as data: arms, budgets and seeds on one model and one data set; and reading it from a TOML file.

Nothing here imports PyTorch before a comparison is made: command-line flags come from these classes.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from secateur.compare.schedule import SCHEDULES, Schedule
from secateur.compare.words import DENSE, MEASURES, plain_name
from secateur.errors import FileError, SecateurError, unknown
from secateur.runs.config import DATA, RUN, Task
from secateur.settings import option, options_of, settings


@settings
class Arm:
    """One row of the comparison: a method with its options, or the dense model."""

    method: str | None = option(
        "name of a method, or module:function of your own; without one the dense model is trained",
        default=None,
    )
    options: Mapping[str, Any] = option(
        "options of the method; a.b is option b of the settings in its option a", default={}
    )
    before: bool = option(
        "prune the fresh model, with a method for trained ones, and train the small one", default=False
    )
    distill: float = option(
        "share of the loss after the cut that is distance to the dense model", default=0.0, least=0, most=1
    )
    budgets: tuple[Mapping[str, float], ...] | None = option(
        "its own budgets, in place of the comparison's", default=None
    )
    against: str = option(
        "arm that its accuracy is compared with, seed by seed, and at the same budget if that arm has one",
        default=DENSE,
    )
    note: str = option("what a reader of the table must know about this arm", default="")

    def check(self) -> None:
        """Raise SecateurError for what options must be to one another."""
        if self.distill and (self.method is None or self.before):
            raise SecateurError("there is no trained dense model to distill from; set distill to 0")
        if self.method is None and self.options:
            raise SecateurError("options are those of a method, and there is none; name the method")
        _check_budgets(self.budgets or ())


@settings
class Comparison:
    """What to compare on what. All arms see the same images, in the same order, for equally many epochs."""

    task: Task = option("model and data; its seed does not count")
    arms: Mapping[str, Arm] = option("arms by name")
    budgets: tuple[Mapping[str, float], ...] = option(
        "budgets, each a table of shares of the dense model that may stay, such as { macs = 0.5 }"
    )
    seeds: tuple[int, ...] = option("random seeds of weights, order and augmentation", default=(0,), least=0)
    schedule: str = option(
        f"training schedule, the same for every arm: {', '.join(SCHEDULES)}",
        default="short",
        choices=SCHEDULES,
        panel=DATA,
    )
    epochs: int | None = option(
        "epochs of every training",
        default=None,
        least=1,
        panel=DATA,
        shown="the schedule's",
    )
    tune_lr: float | None = option(
        "peak learning rate of training on from weights",
        default=None,
        above=0,
        panel=DATA,
        shown="the schedule's",
    )
    lr_shape: Literal["one-cycle", "cosine", "steps", "constant"] | None = option(
        "how the learning rate goes", default=None, panel=DATA, metavar="NAME", shown="the schedule's"
    )
    precision: Literal["no", "bf16"] = option(
        "precision of the training, float32 or bfloat16 where that is safe; `secateur doctor` says if it is fast",
        default="no",
        panel=RUN,
        metavar="NAME",
    )
    compile: bool = option(
        "run the steps in which no method prunes through torch.compile", default=False, panel=RUN
    )
    latency_batch: int = option("images per pass where latency is measured", default=1, least=1)
    latency_runtime: Literal["pytorch", "onnxruntime"] = option(
        "what runs the networks where latency is measured; onnxruntime runs them on the CPU",
        default="pytorch",
        panel=RUN,
        metavar="NAME",
    )

    def check(self) -> None:
        """Raise SecateurError for what options must be to one another."""
        if not self.arms:
            raise SecateurError("compare: no arms; give at least one method")
        folders: dict[str, str] = {}
        for name, arm in self.arms.items():
            if not isinstance(arm, Arm):
                raise SecateurError(f"arms: {name} is {arm!r}; expected a table per arm")
            folder = plain_name(name)
            if not folder.strip("."):
                raise SecateurError(
                    f"arm {name!r}: its runs need a folder; use letters or digits in its name"
                )
            if folders.setdefault(folder, name) != name:
                raise SecateurError(
                    f"arms {folders[folder]!r} and {name!r} would share the folder {folder}; rename one"
                )
            if arm.against not in (*self.arms, DENSE):
                raise SecateurError(f"arm {name!r}: against {unknown('arm', arm.against, self.arms)}")
        _check_budgets(self.budgets)

    @property
    def plan(self) -> Schedule:
        """How all arms train."""
        given: dict[str, Any] = {
            "epochs": self.epochs,
            "tune_epochs": self.epochs,
            "tune_lr": self.tune_lr,
            "schedule": self.lr_shape,
        }
        return replace(SCHEDULES[self.schedule], **{name: v for name, v in given.items() if v is not None})

    @classmethod
    def read(cls, path: str | Path | None, **changes: Any) -> "Comparison":
        """Read a recipe: a TOML file with the fields of `Task` and of this class, and a table per arm.

        Args:
            path: the file; None: `changes` say it all.
            changes: of the task, such as `data_dir`, and of the comparison, such as `seeds` and `arms`.
        Raises:
            FileError: it cannot be read.
            SecateurError: a name or value in it is wrong, or something is missing.
        """
        given: dict[str, Any] = {}
        if path is not None:
            try:
                given = tomllib.loads(Path(path).read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
                raise FileError(f"{path}: cannot be read as a recipe ({error})") from None
        given |= {name: value for name, value in changes.items() if value is not None}
        where = path or "compare"
        for name, flag in (("model", "--model"), ("data", "--data"), ("budgets", "--keep-macs")):
            if name not in given:
                raise SecateurError(f"{where}: no {name}; give {flag}, or `{name}` in a recipe")
        own = options_of(cls).keys() - {"task"}
        of_task = options_of(Task).keys() - {"normalisation", "seed"}
        for name in given:
            if name not in own | of_task:
                raise SecateurError(f"{where}: {unknown('setting', name, own | of_task)}")
        arms = given.get("arms", {})
        if not (isinstance(arms, Mapping) and all(isinstance(arm, Mapping) for arm in arms.values())):
            raise SecateurError(f"{where}: arms: expected a table per arm")
        try:
            return cls(
                task=Task(**{name: given[name] for name in of_task & given.keys()}),
                arms={name: _read_arm(name, table) for name, table in arms.items()},
                **{name: given[name] for name in own & given.keys() - {"arms"}},
            )
        except SecateurError as error:
            raise type(error)(f"{where}: {error}") from None

    def with_arms(self, names: Sequence[str]) -> "Comparison":
        """This comparison with some of its arms, in its own order.

        Raises:
            SecateurError: there is no such arm.
        """
        for name in names:
            if name not in self.arms:
                raise SecateurError(unknown("arm", name, self.arms))
        return replace(self, arms={name: arm for name, arm in self.arms.items() if name in names})


def _read_arm(name: str, table: Mapping[str, Any]) -> Arm:
    try:
        return Arm(**table)
    except SecateurError as error:
        raise SecateurError(f"arm {name!r}: {error}") from None


def _check_budgets(budgets: Sequence[Mapping[str, float]]) -> None:
    for budget in budgets:
        if not budget:
            raise SecateurError("budgets: one of them is empty; expected a table such as { macs = 0.5 }")
        for measure, share in budget.items():
            if measure not in MEASURES:
                raise SecateurError(f"budgets of a comparison: {unknown('measure', measure, MEASURES)}")
            if type(share) not in (int, float) or not 0 < share < 1:
                raise SecateurError(
                    f"budgets of a comparison: {measure} is {share!r}; expected the share that may stay, above 0 and "
                    f"below 1"
                )
