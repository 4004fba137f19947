"""Every public function, method and session with wrong arguments: it works, or one of our errors says what is wrong.

Whatever happens, the model is as it was, and so are gradients' switch, default precision and random numbers.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.allocate import allocate
from secateur.errors import SecateurError
from secateur.export import export_program, onnx_runner
from secateur.methods import METHODS, TrainingMethod, budget_in_macs, method_named
from secateur.recipes.train import TrainConfig
from secateur.scores import score_groups
from secateur.settings import options_of
from tests.test_bad_input import unchanged

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 2),
    ).eval()


MODEL = network()
GRAPH = sc.analyze(MODEL, X)
PLAN = sc.Plan.of(GRAPH, [torch.arange(group.units) < 4 for group in GRAPH.groups])
CUT = sc.cut_(network(), GRAPH, PLAN)
COST = sc.Cost(GRAPH)
PRUNED = sc.prune(MODEL, X, budget=sc.Budget(macs=0.5))

WRONG: dict[str, Any] = {
    "None": None,
    "text": "text",
    "empty text": "",
    "a negative number": -1,
    "nothing": 0,
    "a large number": 10**6,
    "a fraction": 0.5,
    "not a number": math.nan,
    "infinity": math.inf,
    "True": True,
    "a list": ["a", 1],
    "an empty list": [],
    "a tuple": (),
    "a dict": {},
    "an object": object(),
    "a class": nn.Conv2d,
    "a function": lambda *args, **kwargs: 1 / 0,
    "a tensor": torch.rand(3),
    "an empty batch": torch.zeros(0, 3, 6, 6),
    "images of another kind": torch.zeros(2, 5, 6, 6),
    "a batch of NaN": torch.full((2, 3, 6, 6), math.nan),
    "another model": nn.Conv2d(3, 4, 1),
    "a folder": Path("/"),
}


def calls(folder: Path) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Name -> function and good arguments by name."""
    scores = [torch.rand(group.units) for group in GRAPH.groups]
    masks = PLAN.masks(GRAPH)
    file = folder / "model.safetensors"
    sc.save(CUT, file)
    PLAN.save(folder / "plan.json")
    data = [(X, Y)]
    budget = sc.Budget(macs=0.5)
    gradual = sc.methods.Gradual(rounds=1)
    return {
        "analyze": (sc.analyze, {"model": MODEL, "inputs": X, "freeze": (), "attention": "heads"}),
        "prune": (sc.prune, {"model": MODEL, "inputs": X, "budget": budget, "method": "oneshot", "data": data,
                             "loss": nn.functional.cross_entropy, "clock": None, "cache": None, "progress": None,
                             "score": "l2", "min_keep": 1, "freeze": ()}),
        "prune by taylor": (sc.prune, {"model": MODEL, "inputs": X, "budget": budget, "method": "oneshot",
                                       "data": data, "loss": nn.functional.cross_entropy, "score": "taylor"}),
        "cut_": (sc.cut_, {"model": network(), "graph": GRAPH, "plan": PLAN, "optimizer": None}),
        "mask_": (sc.mask_, {"model": network(), "graph": GRAPH, "plan": PLAN}),
        "verify": (sc.verify, {"model": MODEL, "cut": CUT, "graph": GRAPH, "plan": PLAN, "seed": 0}),
        "save": (sc.save, {"model": CUT, "path": file}),
        "load": (sc.load, {"model": network(), "path": file}),
        "register_pad": (sc.register_pad, {"cls": nn.Identity, "before": "front", "after": "back"}),
        "Budget": (sc.Budget, {"macs": 0.5, "params": 0.5, "latency_ms": None}),
        "Cost.macs": (COST.macs, {"kept": [4, 4]}),
        "Cost.of": (COST.of, {"measure": "macs", "kept": [4, 4]}),
        "Cost": (sc.Cost, {"graph": GRAPH}),
        "Plan.of": (sc.Plan.of, {"graph": GRAPH, "masks": masks, "origin": None}),
        "Plan.masks": (PLAN.masks, {"graph": GRAPH}),
        "Plan.kept": (PLAN.kept, {"graph": GRAPH}),
        "Plan.check": (PLAN.check, {"graph": GRAPH}),
        "Plan.save": (PLAN.save, {"path": folder / "plan.json"}),
        "Plan.load": (sc.Plan.load, {"path": folder / "plan.json"}),
        "Plan.from_json": (sc.Plan.from_json, {"text": PLAN.to_json()}),
        "Pruned.save": (PRUNED.save, {"path": file}),
        "export_program": (export_program, {"model": MODEL, "inputs": X, "path": folder / "m.pt2"}),
        "onnx_runner": (onnx_runner, {"path": folder / "none.onnx", "threads": None}),
        "allocate": (allocate, {"scores": scores, "cost": COST, "budget": budget, "allocation": "global",
                                "relative": True, "min_keep": 1, "round_to": 1}),
        "score_groups": (score_groups, {"model": MODEL, "graph": GRAPH, "score": "l2"}),
        "budget_in_macs": (budget_in_macs, {"model": MODEL, "inputs": X, "budget": budget}),
        "method_named": (method_named, {"method": "oneshot", "options": {"score": "l2"}}),
        "start": (gradual.start, {"model": network(), "inputs": X, "budget": budget, "steps": 20}),
    }  # fmt: skip


FUNCTIONS = [
    "analyze", "prune", "prune by taylor", "cut_", "mask_", "verify", "save", "load", "register_pad", "Budget",
    "Cost.macs", "Cost.of", "Cost", "Plan.of", "Plan.masks", "Plan.kept", "Plan.check", "Plan.save", "Plan.load",
    "Plan.from_json", "Pruned.save", "export_program", "onnx_runner", "allocate", "score_groups",
    "budget_in_macs", "method_named", "start",
]  # fmt: skip


IN_PLACE = ("cut_", "mask_", "load", "start")
OWN_CODE = ("score", "loss", "clock", "progress", "method", "allocation")
"""Arguments that may be functions; what these raise is the user's own."""


@contextmanager
def same_state() -> Iterator[None]:
    """Global state of torch is as it was."""
    before = (
        torch.get_rng_state(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
    )
    yield
    after = torch.get_rng_state(), torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_wrong_arguments(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.graph.modules._PADS", {})
    monkeypatch.chdir(tmp_path)  # some wrong arguments are good names of files
    problems = []
    function, good = calls(tmp_path)[name]
    for argument in good:
        for kind, wrong in WRONG.items():
            if callable(wrong) and argument in OWN_CODE:
                continue
            given = good | ({"model": network()} if name in IN_PLACE else {})
            model = given.get("model")
            with same_state(), unchanged(MODEL):
                try:
                    if isinstance(model, nn.Module) and argument != "model":
                        with unchanged_if_refused(model):
                            function(**{**given, argument: wrong})
                    else:
                        function(**{**given, argument: wrong})
                except SecateurError:
                    pass
                except Exception as error:
                    problems.append(f"{argument} = {kind}: {type(error).__name__}: {str(error)[:100]}")
    assert not problems, "\n".join(problems)


@contextmanager
def unchanged_if_refused(model: nn.Module) -> Iterator[None]:
    watch = unchanged(model)
    watch.__enter__()
    try:
        yield
    except Exception:
        watch.__exit__(None, None, None)
        raise


ORDERS: dict[str, Callable[[Any, torch.optim.Optimizer], object]] = {
    "entered before an optimizer is there": lambda session, optimizer: session.__enter__(),
    "left without being entered": lambda session, optimizer: session.__exit__(None, None, None),
    "finished at once": lambda session, optimizer: session.finish(),
    "steps outside": lambda session, optimizer: (session.before_step(), session.after_step()),
    "finished inside": lambda session, optimizer: session.attach(optimizer).__enter__().finish(),
    "entered twice": lambda session, optimizer: session.attach(optimizer).__enter__().__enter__(),
    "no optimizer": lambda session, optimizer: session.attach(None),
    "parameters in place of an optimizer": lambda session, optimizer: session.attach(MODEL.parameters()),
    "another model's optimizer": lambda session, optimizer: session.attach(
        torch.optim.SGD(MODEL.parameters(), lr=0.1)
    ),
    "followers that are none": lambda session, optimizer: session.attach(optimizer, followers=3),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "kind",
    [kind for kind in METHODS.values() if issubclass(kind, TrainingMethod)],
    ids=lambda kind: kind.name,
)
def test_a_session_used_in_the_wrong_order(kind: type[TrainingMethod], order: str) -> None:
    model = nn.Sequential(*network()[:4], nn.BatchNorm2d(6), *network()[4:])
    method = kind(bypass="none") if kind.name == "lapp" else kind()
    session = method.start(model, X, budget=sc.Budget(macs=0.95), steps=200)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with same_state(), unchanged(model):
        try:
            ORDERS[order](session, optimizer)
        except SecateurError:
            pass
        finally:
            session.__exit__(None, None, None)


@pytest.mark.parametrize(
    "kind", [*METHODS.values(), TrainConfig], ids=lambda kind: getattr(kind, "name", "training")
)
def test_wrong_options(kind: type) -> None:
    with same_state():
        for name in options_of(kind):
            for wrong in WRONG.values():
                with suppress(SecateurError):
                    kind(**{name: wrong})
