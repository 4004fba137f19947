"""Numbers that only another way through a module reads: export and deploy modes, fusing, training branches.

The pass that is captured, cut and proven does not read them, so that nothing there says what they must become. A
number is a candidate if it is named like a width and equals one, of the module or of what is inside of it, that was
cut. Other ways that do what forward does are run on trial, on copies: a second forward (`forward_split`), or a change
of the module that leaves its results as they are (`reparameterize`, `fuse_convs`). What makes them right again is set;
so is a number that no trial reads and that became one other everywhere. The rest may be stale, and is named.
"""

import functools
import inspect
import itertools
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from secateur.graph import mirrored
from secateur.graph.duplicate import cloned, duplicate
from secateur.graph.modes import evaluating
from secateur.graph.probe import difference, fit_norms_, floats, randomise_
from secateur.rewriting.known import known_attributes
from secateur.rewriting.rewrite import Rewritten, original_class, other_forwards

CHANGES = re.compile(r"fuse(_\w+)?|reparam\w*|merge_\w+|(switch|convert)_to_deploy")
"""Names of methods that turn a module into another that computes the same."""

SILENT = frozenset(("__init__", "__repr__", "extra_repr"))
"""Methods that do not matter after a module was made."""

MOST = 64
"""How many combinations of numbers one way is tried with."""

TOLERANCE = 1e-3
"""Largest relative difference of the same results in float32, computed in another way."""


@dataclass
class Elsewhere:
    """What other ways through the modules of a cut model need.

    Attributes:
        edits: module name -> attribute -> new value.
        stands_in: name of a rewritten module -> other forwards that did what its forward did, and now need its program.
        stale: what may be wrong on another way, in words.
    """

    edits: dict[str, dict[str, int]] = field(default_factory=dict)
    stands_in: dict[str, tuple[str, ...]] = field(default_factory=dict)
    stale: list[str] = field(default_factory=list)


def look_elsewhere(before: nn.Module, after: nn.Module, inputs: tuple[Any, Any], seed: int = 0) -> Elsewhere:
    """Find the numbers that other ways read, and what they must become.

    Args:
        before: the model before the cut; only read.
        after: the same after it; only read.
        inputs: args and kwargs of a call, in float32.
        seed: of random weights, so that nothing is hidden.
    """
    result = Elsewhere()
    candidates = find_candidates(before, after)
    modules = dict(after.named_modules())
    watched = {
        n for n, m in modules.items() if isinstance(m, Rewritten) and other_forwards(original_class(m))
    }
    for name, options in candidates.items():
        if any(readers(original_class(modules[name]), attribute) for attribute in options):
            watched.add(name)
        else:  # no code reads them: they are there to be looked at
            result.edits[name] = {a: next(iter(v)) for a, v in options.items() if len(v) == 1}
    if not watched:
        return result
    try:
        whole, small = (randomise_(duplicate(model).float(), seed) for model in (before, after))
        for model in (whole, small):
            fit_norms_(model, *cloned(inputs))
        calls = observed(whole, watched, inputs), observed(small, watched, inputs)
    except Exception:  # whatever its own code raises in this precision: nothing can be tried
        whole, small, calls = before, after, ({}, {})
    for name in sorted(watched):
        trial = Trial(whole.get_submodule(name), small.get_submodule(name), *(c.get(name) for c in calls))
        judge_module(result, name, trial, candidates.get(name, {}))
    return result


def find_candidates(before: nn.Module, after: nn.Module) -> dict[str, dict[str, set[int]]]:
    """Module name -> attribute named like a width that was cut and still as it was -> what that width became.

    A width is a dim of a tensor, or a number of a stock layer, of the module or inside of it. One that was not cut
    everywhere became also itself.
    """
    modules = dict(after.named_modules())
    whole = {name: module for name, module in before.named_modules() if name in modules}
    became: dict[str, dict[int, set[int]]] = {}
    for name, module in whole.items():
        found: dict[int, set[int]] = {}
        for old, new in zip(numbers(module), numbers(modules[name]), strict=False):
            found.setdefault(old, set()).add(new)
        around = name
        while True:
            own = became.setdefault(around, {})
            for old, values in found.items():
                own.setdefault(old, set()).update(values)
            if not around:
                break
            around = around.rpartition(".")[0]
    result: dict[str, dict[str, set[int]]] = {}
    for name, module in whole.items():
        now = known_attributes(modules[name])
        for attribute, value in known_attributes(module).items():
            if type(value) is int and value > 1 and now.get(attribute) == value:
                values = became[name].get(value, {value})
                if values != {value}:
                    result.setdefault(name, {})[attribute] = values
    return result


def numbers(module: nn.Module) -> Iterator[int]:
    """The dims of a module's own tensors, and the numbers that a stock layer keeps about them."""
    for _, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        yield from tensor.shape
    for value in mirrored(module, {}).values():
        yield from value if isinstance(value, tuple) else (value,)


Call = tuple[Any, Any, list[Tensor]]
"""Args, kwargs and results of a call."""


@dataclass
class Trial:
    """A module before and after the cut, and its first call in both; None: it was not called."""

    before: nn.Module
    after: nn.Module
    call_before: Call | None
    call_after: Call | None

    def works(self, way: str) -> bool:
        """Whether, before the cut, this way gives what forward gives."""
        return self.call_before is not None and right(self.before, way, self.call_before, {})

    def still_works(self, way: str, values: Mapping[str, int]) -> bool:
        """Whether, after the cut, it does with these values of attributes."""
        return self.call_after is not None and right(self.after, way, self.call_after, values)


def observed(model: nn.Module, names: set[str], inputs: tuple[Any, Any]) -> dict[str, Call]:
    """The first call of some modules in an evaluation pass."""
    calls: dict[str, Call] = {}
    given: dict[str, tuple[Any, Any]] = {}

    def enter(name: str, args: Any, kwargs: Any) -> None:
        given.setdefault(name, cloned((args, kwargs)))

    def leave(name: str, result: Any) -> None:
        calls.setdefault(name, (*given[name], [t.clone() for t in floats(result)]))

    with ExitStack() as stack, evaluating(model), torch.no_grad():
        for name in names:
            module = model.get_submodule(name)
            before = functools.partial(lambda name, _, args, kwargs: enter(name, args, kwargs), name)
            after = functools.partial(lambda name, _, args, result: leave(name, result), name)
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after).remove)
        args, kwargs = cloned(inputs)
        model(*args, **kwargs)
    return calls


# --- other ways through a module ---------------------------------------------------------------------------


def judge_module(result: Elsewhere, name: str, trial: Trial, options: Mapping[str, set[int]]) -> None:
    """Find what one module needs, and note it.

    Args:
        options: attribute -> what its value became.
    """
    after = trial.after
    cls = original_class(after)
    # what forward reads is right as it is, since forward was proven
    options = {
        attribute: values
        for attribute, values in options.items()
        if trial.call_after is None or all(trial.still_works("forward", {attribute: v}) for v in values)
    }
    chosen: dict[str, int] = {}
    judged: set[str] = set()
    for way in ways(cls):
        reads = sorted(readings(cls)[way] & options.keys())
        if not (reads or isinstance(after, Rewritten)) or not trial.works(way):
            continue
        several = [[chosen[a]] if a in chosen else [*options[a], getattr(after, a)] for a in reads]
        tries = (
            dict(zip(reads, c, strict=True)) for c in itertools.islice(itertools.product(*several), MOST)
        )
        found = next((values for values in tries if trial.still_works(way, values)), None)
        judged |= set(reads)
        if found is not None:
            chosen |= found
        elif isinstance(after, Rewritten) and way in other_forwards(cls):
            result.stands_in[name] = (*result.stands_in.get(name, ()), way)
        else:
            result.stale.append(f"{name or cls.__name__}: {way}() does not keep what forward gives")
    for attribute in options.keys() - judged:
        values, read_in = options[attribute], readers(cls, attribute)
        if len(values) == 1 and (trial.call_after is not None or not read_in):
            chosen[attribute] = next(iter(values))
        elif read_in:
            where = f"{name}.{attribute}".removeprefix(".")
            result.stale.append(f"{where} = {getattr(after, attribute)}, read in {', '.join(read_in[:2])}")
    changed = {a: v for a, v in sorted(chosen.items()) if v != getattr(after, a)}
    if changed:
        result.edits[name] = changed


def ways(cls: type[nn.Module]) -> list[str]:
    """Methods that may do what forward does, or change a module into another that does."""
    named = [
        name for name in methods(cls) if CHANGES.fullmatch(name) and inspect.isfunction(getattr(cls, name))
    ]
    changes = [name for name in named if len(inspect.signature(getattr(cls, name)).parameters) == 1]
    return [*other_forwards(cls), *changes]


def right(module: nn.Module, way: str, call: Call, values: Mapping[str, int]) -> bool:
    """Whether a way through a copy of a module gives what its forward gave, with some attributes set."""
    changes = not way.startswith("forward")
    args, kwargs, expected = cloned(call)
    try:
        module = duplicate(module, share=not changes)
        for attribute, value in values.items():
            setattr(module, attribute, value)
        with evaluating(module), torch.no_grad(), torch.random.fork_rng(devices=[]):
            if changes:
                getattr(module, way)()
            found = (module.eval() if changes else getattr(module, way))(*args, **kwargs)
        return difference(expected, floats(found))[1] <= TOLERANCE
    except Exception:  # whatever its own code raises
        return False


# --- what the code of a class reads ------------------------------------------------------------------------


def methods(cls: type[nn.Module]) -> dict[str, frozenset[str]]:
    """Name of a method or property of a module's class -> the names of attributes in its code."""
    found: dict[str, frozenset[str]] = {}
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for name, member in vars(base).items():
            function = getattr(member, "fget", None) or getattr(member, "__func__", member)
            code = getattr(inspect.unwrap(function) if callable(function) else None, "__code__", None)
            if code is not None:
                found[name] = found.get(name, frozenset()) | frozenset(_names(code))
    return found


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def readings(cls: type[nn.Module]) -> dict[str, frozenset[str]]:
    """Method -> the names of attributes in its code and in that of the methods that it names."""
    own = methods(cls)
    result = {}
    for method in own:
        seen, left = {method}, [method]
        while left:
            more = (own[left.pop()] & own.keys()) - seen - {"forward"}
            seen |= more
            left.extend(more)
        result[method] = frozenset().union(*(own[name] for name in seen))
    return result


def readers(cls: type[nn.Module], attribute: str) -> list[str]:
    """The methods whose own code reads an attribute."""
    return sorted(m for m, names in methods(cls).items() if attribute in names and m not in SILENT)
