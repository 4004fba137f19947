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
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from secateur.graph import mirrored
from secateur.graph.duplicate import cloned, duplicate
from secateur.graph.modes import chance_kept, evaluating
from secateur.graph.probe import difference, fit_norms_, floats, randomise_
from secateur.rewriting.known import known_attributes
from secateur.rewriting.rewrite import Rewritten, original_class, other_forwards

CHANGES = re.compile(r"fuse(_\w+)?|reparam\w*|merge_\w+|(switch|convert)_to_deploy")
"""Names of methods that turn a module into another that computes the same."""

SILENT = frozenset(("__init__", "__repr__", "extra_repr", "__getstate__", "__setstate__"))
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
    tried = {name for name, module in modules.items() if needs_trial(module, candidates.get(name, {}))}
    certain = any(len(values) == 1 for options in candidates.values() for values in options.values())
    whole, small = before, after
    calls_before: dict[str, Call] = {}
    calls: dict[str, Call] = {}
    with suppress(Exception):  # whatever its own code raises in this precision: then nothing can be tried
        if tried or certain:
            small = randomise_(duplicate(after).float(), seed)
            fit_norms_(small, *cloned(inputs))
        if tried:
            whole = randomise_(duplicate(before).float(), seed)
            fit_norms_(whole, *cloned(inputs))
            calls_before, calls = observed(whole, tried, inputs), observed(small, tried, inputs)
    with ExitStack() as stack:
        for name in sorted(
            {*candidates, *tried}, reverse=True
        ):  # inner modules first: outer ways go through theirs
            module = small.get_submodule(name)
            trial = Trial(whole.get_submodule(name), module, calls_before.get(name), calls.get(name))
            judge_module(result, name, trial, candidates.get(name, {}))
            for attribute, value in result.edits.get(name, {}).items():
                if small is not after:
                    stack.callback(setattr, module, attribute, getattr(module, attribute))
                    setattr(module, attribute, value)
    result.stale.sort()
    return harmless(result, small, inputs) if result.edits else result


def harmless(found: Elsewhere, model: nn.Module, inputs: tuple[Any, Any]) -> Elsewhere:
    """Leave out what would change the results of forward: what forward reads is right as it is.

    Args:
        model: a copy; it is changed.
    """

    def results(edits: Mapping[str, Mapping[str, int]]) -> list[Tensor] | None:
        args, kwargs = cloned(inputs)
        changed = duplicate(model, share=True)
        for name, values in edits.items():
            for attribute, value in values.items():
                setattr(changed.get_submodule(name), attribute, value)
        try:
            with evaluating(changed), torch.no_grad(), chance_kept():
                torch.manual_seed(0)
                return floats(changed(*args, **kwargs))
        except Exception:  # whatever its own code raises
            return None

    expected = results({})

    def same(edits: Mapping[str, Mapping[str, int]]) -> bool:
        changed = results(edits)
        return expected is not None and changed is not None and difference(expected, changed)[1] <= TOLERANCE

    if not same(found.edits):
        found.edits = {name: values for name, values in found.edits.items() if same({name: values})}
    return found


def find_candidates(before: nn.Module, after: nn.Module) -> dict[str, dict[str, set[int]]]:
    """Module name -> attribute named like a width that was cut and still as it was -> what that width became.

    A width is a dim of a tensor, or a number of a stock layer, of the module or inside of it. One that was not cut
    everywhere became also itself.
    """
    modules = dict(after.named_modules())
    whole = {
        name: module
        for name, module in before.named_modules()
        if name in modules and original_class(modules[name]) is original_class(module)  # not left out
    }
    became: dict[str, dict[int, set[int]]] = {}
    for name, module in whole.items():
        found: dict[int, set[int]] = {}
        for old, new in zip(numbers(module), numbers(modules[name]), strict=False):
            if new:  # what went with a block has become no other number
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


def needs_trial(module: nn.Module, options: Mapping[str, set[int]]) -> bool:
    """Whether other ways through a module, or its forward, may read what is not certain."""
    if not options and not isinstance(module, Rewritten):
        return False
    cls = original_class(module)
    reads = readings(cls)
    return (
        any(reads.get(way, frozenset()) & options.keys() for way in ways(cls))
        or (isinstance(module, Rewritten) and bool(other_forwards(cls)))
        or any(len(v) > 1 and attribute in reads.get("forward", ()) for attribute, v in options.items())
    )


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
    if trial.call_after is not None:  # what forward reads is right as it is, since forward was proven
        options = {a: v for a, v in options.items() if all(trial.still_works("forward", {a: n}) for n in v)}
    chosen: dict[str, int] = {}
    judged: set[str] = set()
    failed: set[str] = set()
    for way in ways(cls):
        reads = sorted(readings(cls).get(way, frozenset()) & options.keys())
        if not (reads or isinstance(after, Rewritten)) or not trial.works(way):
            continue
        several = [[chosen[a]] if a in chosen else [*options[a], getattr(after, a)] for a in reads]
        tries = (
            dict(zip(reads, c, strict=True)) for c in itertools.islice(itertools.product(*several), MOST)
        )
        found = next((values for values in tries if trial.still_works(way, values)), None)
        judged |= set(reads)
        if found is not None:  # with what it needs; another number that it names may be anything
            needed = (a for a in reads if not trial.still_works(way, {**found, a: getattr(after, a)}))
            chosen |= {a: found[a] for a in needed}
        elif isinstance(after, Rewritten) and way in other_forwards(cls):
            result.stands_in[name] = (*result.stands_in.get(name, ()), way)
        else:
            result.stale.append(f"{name or cls.__name__}: {way}() does not keep what forward gives")
            failed |= set(reads)  # they stay as they are, so that the proof finds the same
    for attribute, values in sorted(options.items()):
        read_in = readers(after, attribute)
        if len(values) == 1 and attribute not in failed:
            chosen.setdefault(attribute, next(iter(values)))
        elif read_in and attribute not in judged:
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
        with evaluating(module), torch.no_grad(), chance_kept():
            if not changes:
                return agree(expected, getattr(module, way), args, kwargs)
            made = getattr(module, way)()
            module = (made if isinstance(made, nn.Module) else module).eval()
            others = (getattr(module, other) for other in other_forwards(original_class(module)))
            return any(agree(expected, forward, args, kwargs) for forward in (module, *others))
    except Exception:  # whatever its own code raises
        return False


def agree(expected: list[Tensor], forward: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    """Whether a call gives what is expected."""
    try:
        args, kwargs = cloned((args, kwargs))
        return difference(expected, floats(forward(*args, **kwargs)))[1] <= TOLERANCE
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
    return {method: frozenset().union(*(own[name] for name in reached(own, method))) for method in own}


def reached(own: Mapping[str, frozenset[str]], method: str) -> set[str]:
    """A method and those that it names, directly or not; another way may lead to forward in the end."""
    seen, left = {method} & own.keys(), [method] if method in own else []
    while left:
        more = (own[left.pop()] & own.keys()) - seen - {"forward"}
        seen |= more
        left.extend(more)
    return seen


def readers(module: nn.Module, attribute: str) -> list[str]:
    """The methods of a module whose own code reads an attribute, but for those that only make it.

    What a rewritten module's forward was is not run any more.
    """
    own = methods(original_class(module))
    idle = {*SILENT, "forward", *module.stands_in} if isinstance(module, Rewritten) else set(SILENT)
    making = set().union(*(reached(own, method) for method in idle))
    used = frozenset().union(*(names for method, names in own.items() if method not in making))
    reading = (method for method, names in own.items() if attribute in names and method not in idle)
    return sorted(method for method in reading if method not in making or method in used)
