"""Captures of one forward at several sizes as the same list of operators.

PyTorch leaves out what changes nothing at the size at hand: a slice of everything, the copy of what is contiguous;
and many a forward pads only where it must. Where one capture has such a step and another lacks it, the other gets
it too, with numbers by which it changes nothing. A dropout that runs in training mode only is such a step as well.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from secateur.graph.operators import Step
from secateur.rewriting.listing import Listing
from secateur.rewriting.program import Made, Ref, refs

DROPOUTS = frozenset("dropout dropout_ feature_dropout alpha_dropout feature_alpha_dropout".split())
"""Operators that change nothing in evaluation mode."""

IDLE = DROPOUTS | {"alias", "contiguous", "slice", "pad", "constant_pad_nd"}
"""Operators that change nothing for some numbers."""

Row = list[int | None]
"""One step of the common list: its number in every listing; None where it is missing."""


def align(listings: Sequence[Listing]) -> list[Listing] | None:
    """The listings with idle steps added, so that all have the same steps and registers; None if they differ in more.

    A call of a submodule is one step, whatever runs in it.
    """
    first = listings[0]
    if not all(same_constants(first, other) for other in listings[1:]):
        return None
    rows: list[Row] = [[i] for i in range(len(first.steps))]
    for number, other in enumerate(listings[1:], 1):
        found = _merge(rows, listings[:number], other)
        if found is None:
            return None
        rows = found
    try:
        return _Common(listings, rows).aligned()
    except LookupError:
        return None


def same_constants(lines: Listing, other: Listing) -> bool:
    """Whether two captures have as many inputs, and constants that are equal up to their precision."""
    a, b = lines.captured.constants, other.captured.constants
    return len(lines.inputs) == len(other.inputs) and all(
        a[n].shape == b[n].shape and torch.allclose(a[n].double(), b[n].double(), 1e-4, 1e-6, equal_nan=True)
        for n in {*lines.names} & {*other.names} & a.keys() & b.keys()
    )


def _merge(rows: list[Row], known: Sequence[Listing], other: Listing) -> list[Row] | None:
    result: list[Row] = []
    ours = [_any_step(known, row) for row in rows]
    i = j = 0
    while i < len(rows) or j < len(other.steps):
        theirs = other.steps[j] if j < len(other.steps) else None
        if theirs and counts(theirs) and not (i < len(rows) and _key(ours[i]) == _key(theirs)):
            j += 1
            continue
        run = list(itertools.takewhile(lambda step: step.op in IDLE, ours[i:]))
        if theirs and i < len(rows) and _key(ours[i]) == _key(theirs):
            result.append([*rows[i], j])
            i, j = i + 1, j + 1
        elif run and (theirs is None or theirs.op not in IDLE or _key(theirs) in map(_key, run)):
            result.append([*rows[i], None])
            i += 1
        elif theirs and theirs.op in IDLE:
            result.append([*(None for _ in known), j])
            j += 1
        else:
            return None
    return result


def counts(step: Step) -> bool:
    """Whether a step only counts batches, as batch norm does in training mode."""
    return step.op == "add_" and not step.node.args[0].meta["val"].is_floating_point()  # type: ignore[union-attr]


def _key(step: Step) -> tuple[Any, ...]:
    """What two steps must have in common to be the same one."""
    return step.target, step.args.get("dim") if step.op == "slice" else None


def _any_step(listings: Sequence[Listing], row: Row) -> Step:
    return next(listing.steps[n] for listing, n in zip(listings, row, strict=False) if n is not None)


class _Common:
    """The common list, made step by step for all captures at once.

    Where an added step changes nothing, several registers of a capture hold the same tensor. What a step reads is a
    register that holds the right one in every capture.
    """

    def __init__(self, listings: Sequence[Listing], rows: Sequence[Row]) -> None:
        first = listings[0]
        self._rows = rows
        self._old = listings
        self._start = len(first.nodes) - len(first.steps)
        self._new = [Listing(old.captured, old.inputs, old.tensors) for old in listings]
        self._register = [_named_alike(first, other) for other in listings]
        self._starts = [len(other.nodes) - len(other.steps) for other in listings]
        self._same = [{i: [i] for i in range(self._start)} for _ in listings]
        for new, old, same in zip(self._new, listings, self._register, strict=True):
            where = {theirs: ours for ours, theirs in same.items()}
            new.nodes = [old.nodes[where[i]] for i in range(self._start)]
            new.tensors = new.nodes[len(new.inputs) :]

    def aligned(self) -> list[Listing]:
        """The listings.

        Raises:
            LookupError: a step reads different tensors in different captures.
        """
        everyone = range(len(self._old))
        for i, row in enumerate(self._rows):
            steps = {k: self._old[k].steps[n] for k in everyone if (n := row[k]) is not None}
            args = self._joined({k: step.args for k, step in steps.items()})
            for k in everyone:
                if k in steps:
                    step = Step(steps[k].node, steps[k].target, args[k], steps[k].shapes)
                    self._register[k][self._starts[k] + (row[k] or 0)] = self._start + i
                    self._same[k][self._start + i] = [self._start + i]
                else:
                    step = _idle(_any_step(self._old, row), next(iter(args.values())), self._new[k])
                    alike = self._same[k][_source(step.args)]
                    alike.append(self._start + i)
                    self._same[k][self._start + i] = alike
                self._new[k].steps.append(step)
                self._new[k].nodes.append(step.node)
        complete(*(new.steps for new in self._new))
        outputs = self._joined({k: self._old[k].output for k in everyone})
        for k in everyone:
            self._new[k].output = outputs[k]
        return self._new

    def _joined(self, args: Mapping[int, Any]) -> dict[int, Any]:
        """Arguments by capture, with the same references in all."""
        first = next(iter(args.values()))
        if all(isinstance(arg, Ref) for arg in args.values()):
            same = [set(self._same[k][self._register[k][arg.index]]) for k, arg in args.items()]
            both = set.intersection(*same)
            if not both:
                raise LookupError
            return dict.fromkeys(args, Ref(max(both)))
        if all(isinstance(arg, dict) for arg in args.values()):
            keys = dict.fromkeys(key for arg in args.values() for key in arg)
            parts = {key: self._joined({k: a[key] for k, a in args.items() if key in a}) for key in keys}
            return {k: {key: parts[key][k] for key in arg} for k, arg in args.items()}
        if all(isinstance(arg, Made) and arg.cls is first.cls for arg in args.values()):
            entries = self._joined({k: dict(arg.entries) for k, arg in args.items()})
            return {k: Made(first.cls, made) for k, made in entries.items()}
        if all(isinstance(arg, list | tuple) and len(arg) == len(first) for arg in args.values()):
            each = [self._joined({k: arg[i] for k, arg in args.items()}) for i in range(len(first))]
            return {k: type(arg)(part[k] for part in each) for k, arg in args.items()}
        if any(refs(arg) for arg in args.values()):
            raise LookupError
        return dict(args)


def _idle(model: Step, args: Mapping[str, Any], lines: Listing) -> Step:
    """A step like another one, of a tensor that it leaves as it is."""
    args = dict(args)
    node = lines.nodes[_source(args)]
    shape = tuple(node.meta["val"].shape)
    if model.op == "slice":
        args |= {"start": 0, "end": shape[args["dim"]], "step": 1}
    elif "pad" in args:
        args["pad"] = [0] * len(args["pad"])
    elif model.op in DROPOUTS:
        args["train"] = False
    return Step(node, model.target, args, (shape,))


def _source(args: Mapping[str, Any]) -> int:
    """The register that an idle step hands on."""
    return int(args["input" if "input" in args else "self"].index)


def _named_alike(lines: Listing, other: Listing) -> dict[int, int]:
    """The registers of the inputs and named tensors of a listing -> those of the same ones in the first.

    Raises:
        LookupError: it lacks one.
    """
    inputs = len(lines.inputs)
    found = {i: i for i in range(inputs)}
    place = {name: i for i, name in enumerate(other.names)}
    return found | {inputs + place[name]: inputs + i for i, name in enumerate(lines.names)}


def complete(*steps: Sequence[Step]) -> None:
    """Give each step the arguments that any of its counterparts has: the default, where it is left out.

    A pad may name more dims in one of them; the others do not pad these.
    """
    for counterparts in zip(*steps, strict=True):
        if any("pad" in step.args for step in counterparts):
            dims = max(len(step.args["pad"]) for step in counterparts)
            for step in counterparts:
                if step.args.get("mode", "constant") == "constant":
                    step.args["pad"] = step.args["pad"] + [0] * (dims - len(step.args["pad"]))
        for key in {key for step in counterparts for key in step.args}:
            for step in counterparts:
                if key not in step.args:
                    step.args[key] = step.default(key)
