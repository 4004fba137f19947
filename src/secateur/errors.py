"""What can go wrong, as one tree.

    SecateurError                 base: every mistake a user can make and correct
    ├── CaptureError              the model's graph cannot be read
    ├── BudgetError               the budget is malformed or out of reach
    ├── PlanError                 the plan does not fit the model, or is not a valid plan
    ├── CutError                  the cut could not be applied; the model is unchanged
    ├── ScoreError                a score got tensors it cannot rank
    ├── TrainingError             the training settings are wrong, or the loss stopped being a finite number
    ├── DataError                 a data set is missing, unreadable or of the wrong shape
    ├── ModelError                unknown model, or weights that do not fit it
    ├── ExportError               the model cannot be exported, or the exported file computes something else
    └── FileError                 a file is missing, truncated, hostile, or cannot be written

A message says where, what was found, what was expected, and what to do. The command line prints the
message alone and exits with code 2.
"""

import difflib
import re
from collections.abc import Iterable


class SecateurError(Exception):
    """Base of all errors that tell the user what to change."""


class CaptureError(SecateurError):
    """The model's graph cannot be read."""


class BudgetError(SecateurError):
    """The budget is malformed or out of reach."""


class PlanError(SecateurError):
    """The plan does not fit the model, or is not a valid plan."""


class CutError(SecateurError):
    """The cut could not be applied; the model is unchanged."""


class ScoreError(SecateurError):
    """A score got tensors it cannot rank."""


class TrainingError(SecateurError):
    """The training settings are wrong, or the loss stopped being a finite number."""


class DataError(SecateurError):
    """A data set is missing, unreadable or of the wrong shape."""


class ModelError(SecateurError):
    """The model is unknown, or the weights do not fit it."""


class ExportError(SecateurError):
    """The model cannot be exported, or what was exported computes something else; no file is left."""


class FileError(SecateurError):
    """A file is missing, truncated, hostile, or cannot be written."""


def unknown(kind: str, name: str, choices: Iterable[str]) -> str:
    """The message for a name that is not in a table: the choices, and the nearest of them.

    >>> unknown("score", "l3", ["l1", "taylor"])
    "unknown score 'l3'; choose one of: l1, taylor. Did you mean 'l1'?"
    >>> unknown("score", "norm", ["l1", "l2"])
    "unknown score 'norm'; choose one of: l1, l2"
    >>> unknown("model", "resnet2O", ["resnet20", "resnet32"])
    "unknown model 'resnet2O'; choose one of: resnet20, resnet32. Did you mean 'resnet20'?"
    """
    choices, said = sorted(choices), name.lower()

    def likeness(choice: str) -> tuple[float, int]:
        matcher = difflib.SequenceMatcher(None, choice, said)
        return matcher.ratio(), matcher.find_longest_match().size

    near = max(difflib.get_close_matches(said, choices, n=5, cutoff=0.5), key=likeness, default=None)
    hint = f". Did you mean {near!r}?" if near else ""
    return f"unknown {kind} {name!r}; choose one of: {', '.join(choices)}{hint}"


def first_line(error: BaseException) -> str:
    """What another library's error says, without its details, hints, full stop and terminal codes.

    >>> first_line(ValueError("\\x1b[31mtoo short\\x1b[0m.\\nSee the docs."))
    'too short'
    """
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", str(error)).strip() or type(error).__name__
    return text.splitlines()[0].partition(" Hint: ")[0].rstrip(".")[:300]
