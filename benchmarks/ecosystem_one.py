"""One model of a framework: pruned, trained on, saved, loaded, exported. For `benchmarks/ecosystem.py`."""

import importlib
import json
import resource
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from cases import measured
from torch import Tensor, nn

import secateur as sc
from secateur.errors import first_line
from secateur.export import export_onnx
from secateur.graph.capture import as_call, with_images
from secateur.graph.modes import evaluating
from secateur.graph.probe import floats, randomise_
from secateur.graph.samples import random_floats

BUDGET = 0.7
"""Share of the MACs that may stay."""

STEPS = 4
"""Steps of training."""

RATE = 1e-3
"""Learning rate."""

Row = dict[str, Any]
Inputs = Any


def main(framework: str, name: str, seconds: int, file: Path) -> None:
    """Run one model; what is known of it so far is in the file after every stage."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    start = time.process_time()
    row: Row = {"framework": framework, "model": name, "stage": "build"}
    file.write_text(json.dumps(row))
    try:
        for found in stages(importlib.import_module(f"ecosystem_{framework}"), name):
            row |= found
            file.write_text(json.dumps(row))
    except sc.SecateurError as error:
        row |= {"error": type(error).__name__, "refused": True, "message": " ".join(str(error).split())}
    except Exception as error:  # a model that fails is a result
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        row |= {"error": type(error).__name__, "message": f"{' '.join(str(error).split())[:300]} ({where})"}
    file.write_text(json.dumps(row | {"cpu_s": time.process_time() - start, "ended": True}))


def warm_up() -> None:
    """What every process would load and work out for itself, once, before they are forked."""
    net, x = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)), torch.zeros(1, 3, 8, 8)
    sc.analyze(net, x)
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(net, x, Path(folder) / "model.onnx")


def stages(framework: ModuleType, name: str) -> Iterator[Row]:
    """What is found out, stage by stage."""
    make = framework.CASES[name]
    model, inputs = fresh(make, 0)
    yield {"params": sum(p.numel() for p in model.parameters()), "stage": "prune"}
    start = time.process_time()
    pruned = sc.prune(model, inputs, budget=BUDGET, allocation="uniform", round_to=1)
    small, proof = pruned.model, pruned.proof
    assert proof is not None
    yield {
        "prune_s": time.process_time() - start,
        "error64": proof.max_rel_error,
        "error32": proof.max_rel_error_float32,
        "proven": proof.ok and proof.sensitivity > 0,
        "macs": pruned.after["macs"] / pruned.before["macs"],
        "rewritten": list(proof.rewritten),
        "tied": list(proof.tied),
        "sizes": proof.sizes,
        "stage": "count",
    }
    if pruned.graph.parts is None:
        dense, left = (measured("macs", one, inputs) for one in (model, small))
        yield {"macs_counted": left / dense}
    else:  # how many regions there are to count depends on the weights
        yield {"macs_counted": pruned.after["macs"] / pruned.before["macs"]}
    yield {"stage": "train"}
    loss = getattr(framework, "loss", lambda model, inputs: None)
    trained = Training(small, inputs, loss)
    reference = Training(fresh(make, 0)[0], inputs, loss)
    trained.step(), reference.step()
    missing = reference.moved() - trained.moved()
    losses = trained.go_on()
    falling = falls(losses) or not falls(reference.go_on())
    yield {
        "losses": losses,
        "unreached": sorted(missing)[:5],
        "trains": not missing and all(map(finite, losses)) and falling,
        "stage": "load",
    }
    with tempfile.TemporaryDirectory() as folder:
        pruned.save(Path(folder) / "pruned.safetensors")
        torch.save(trained.optimizer.state_dict(), Path(folder) / "optimizer.pt")
        again = sc.load(fresh(make, 1)[0], Path(folder) / "pruned.safetensors")
        resumed = Training(again, inputs, loss)
        resumed.optimizer.load_state_dict(torch.load(Path(folder) / "optimizer.pt"))
        resumed.last = trained.last
    same = equal(small, again, inputs)
    resumed.step(), trained.step()
    yield {
        "resumes": same and resumed.last == trained.last and equal(small, again, inputs),
        "stage": "export",
    }
    export = getattr(framework, "export", export_onnx)
    yield {"exports": exported(export, small, inputs, lambda: fresh(make, 0)[0]), "stage": "done"}


def fresh(make: Callable[[], tuple[nn.Module, Inputs]], seed: int) -> tuple[nn.Module, Inputs]:
    """The model in evaluation mode, with weights that hide nothing, and its inputs."""
    torch.manual_seed(seed)
    model, inputs = make()
    args, kwargs = as_call(inputs)
    for draw in range(10):  # some end with a ReLU, and would answer nothing but zeros
        randomise_(model.eval(), seed + 10 * draw)
        with torch.no_grad():
            if all(x.any() for x in floats(model(*args, **kwargs))):
                break
    return model, inputs


def falls(losses: Sequence[float]) -> bool:
    """Whether a loss is ever below the first."""
    return min(losses[1:]) < losses[0]


class Training:
    """A few steps of Adam with the loss of the framework's own, or else the mean square of every output.

    Args:
        model: is trained.
        inputs: at least two images are made of them, where the model takes as many.
        loss: of the framework: (model, inputs) -> loss, or None.
    """

    def __init__(
        self, model: nn.Module, inputs: Inputs, loss: Callable[[nn.Module, Inputs], Tensor | None]
    ) -> None:
        self._model = model
        self._inputs = random_floats(with_images(inputs, 2), 0)
        self._loss = loss
        self.optimizer = torch.optim.Adam(model.parameters(), RATE)
        self.last = float("nan")

    def step(self) -> float:
        """One step; its loss. Random numbers are the same in each, so that losses can be compared."""
        self._model.train()
        torch.manual_seed(0)
        self.optimizer.zero_grad()
        loss = self._loss(self._model, self._inputs)
        if loss is None:
            args, kwargs = as_call(self._inputs)
            outputs = [x for x in floats(self._model(*args, **kwargs)) if x.requires_grad]
            loss = torch.stack([x[x.isfinite()].square().mean() for x in outputs]).mean()
        loss.backward()
        self.optimizer.step()
        self._model.eval()
        self.last = loss.item()
        return self.last

    def go_on(self) -> list[float]:
        """The remaining steps; the losses of the last one and of these."""
        return [self.last, *(self.step() for _ in range(STEPS - 1))]

    def moved(self) -> set[str]:
        """Names of the parameters that got a gradient."""
        return {name for name, p in self._model.named_parameters() if p.grad is not None}


def finite(x: float) -> bool:
    return abs(x) < float("inf")


def equal(model: nn.Module, other: nn.Module, inputs: Inputs) -> bool:
    """Whether two models answer the same bits."""
    args, kwargs = as_call(inputs)
    answers = []
    for one in (model, other):
        with evaluating(one), torch.no_grad():
            answers.append(floats(one(*args, **kwargs)))
    return len(answers[0]) == len(answers[1]) and all(map(torch.equal, *answers))


def exported(
    export: Callable[[nn.Module, Inputs, Path], Any],
    model: nn.Module,
    inputs: Inputs,
    original: Callable[[], nn.Module],
) -> str:
    """ "yes", or why not; where the original cannot be exported either, "as little as the original: …"."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        try:
            export(model, inputs, path)
        except Exception as error:
            reason = first_line(error)
        else:
            return "yes"
        try:
            export(original(), inputs, path)
        except Exception as error:
            return f"as little as the original: {first_line(error)}"
        return reason
