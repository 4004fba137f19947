"""The contract of methods that prune while the model trains, for each of them."""

import copy
import functools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur import Budget, Plan, analyze, cut_
from secateur.engine.method import Context
from secateur.engine.session import Session
from secateur.engine.training_method import TrainingMethod
from secateur.errors import BudgetError, SecateurError, TrainingError
from secateur.files import read_tensors
from secateur.recipes.checkpoint import State
from secateur.recipes.train import fit
from secateur.settings import options_of
from tests.methods.examples import CONFIG, INPUTS, KINDS, METHODS, STEPS, Make, Residual, lapp, train
from tests.processes import start_ranks
from tests.recipes.test_train import toy_data

in_one_process = pytest.mark.xdist_group("whole runs")
"""Tests that compare with whole runs, so that these are made once."""

every_method = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def loop(session: Session[Any], optimizer: torch.optim.Optimizer, steps: int) -> None:
    """The loop of the documentation."""
    torch.manual_seed(0)
    for _ in range(steps):
        x, y = torch.randn(16, 3, 8, 8), torch.arange(16) % 3
        loss = F.cross_entropy(session.model(x), y) + session.penalty()
        loss.backward()
        session.before_step()
        optimizer.step()
        session.after_step()
        optimizer.zero_grad()


@every_method
def test_beside_the_users_own_loop(make: Make) -> None:
    model = Residual()
    before = hooks(model)
    session = make(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with session.attach(optimizer):
        loop(session, optimizer, STEPS)
    assert hooks(model) == before
    pruned = session.finish()
    assert pruned.model is model
    assert pruned.proof.ok
    assert pruned.after["macs"] <= 0.6 * pruned.before["macs"]
    for p in model.parameters():  # the momentum was cut along, so that training can go on
        slot = optimizer.state.get(p, {}).get("momentum_buffer")
        assert slot is None or slot.shape == p.shape
    loss = F.cross_entropy(model(torch.randn(4, 3, 8, 8)), torch.arange(4) % 3)
    loss.backward()


@every_method
def test_widths_are_multiples(make: Make) -> None:
    model = Residual()
    session = make(model, round_to=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with session.attach(optimizer):
        loop(session, optimizer, STEPS)
    pruned = session.finish()
    assert pruned.after["macs"] <= 0.6 * pruned.before["macs"]
    widths = pruned.plan.kept(pruned.graph)
    assert all(width % 4 == 0 for width in widths)
    assert widths != [group.units for group in pruned.graph.groups]
    assert pruned.plan.origin["multiples"]["units"] == {group.name: 4 for group in pruned.graph.groups}


def test_multiples_out_of_reach_are_refused_at_the_start() -> None:
    with pytest.raises(BudgetError, match="lower round_to"):
        lapp(bypass="none", round_to=16)(Residual())


# LAPP and PAAM fold what they learn into the layers it stands behind; Taylor scores need gradients.
leave_frozen = [n for n in METHODS if n.startswith(("gradual, l2", "depgraph", "oto", "hesso", "gate", "a "))]


@pytest.mark.parametrize("make", [METHODS[name] for name in leave_frozen], ids=leave_frozen)
@pytest.mark.parametrize("known", [False, True])
def test_layers_that_do_not_train(make: Make, known: bool) -> None:
    """Frozen layers, in the optimizer or not, are cut along and otherwise stay as they are."""
    model = Residual()
    frozen = [model.stem, model.blocks[0].conv1, model.blocks[1].bn1]
    for module in frozen:
        module.requires_grad_(False)
    whole = copy.deepcopy(model)
    session = make(model)
    optimizer = torch.optim.Rprop([p for p in model.parameters() if known or p.requires_grad], lr=0.001)
    with session.attach(optimizer):
        loop(session, optimizer, STEPS)
    pruned = session.finish()
    assert pruned.proof.ok
    assert pruned.after["macs"] <= 0.6 * pruned.before["macs"]
    names = [name for name, p in whole.named_parameters() if not p.requires_grad]
    left = cut_(whole, pruned.graph, pruned.plan).state_dict()
    for name in names:
        assert not model.get_parameter(name).requires_grad, name
        assert torch.equal(model.get_parameter(name), left[name]), name


@dataclass
class Whole:
    """An uninterrupted run, with copies of its checkpoint on the way."""

    make: Make
    folder: Path
    copies: Path
    losses: list[float]
    weights: dict[str, torch.Tensor]
    session: Session[Any]
    plan: Plan


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Whole]:
    """The whole run of a method, made when a test first asks for it."""
    return functools.cache(lambda name: train_whole(METHODS[name], tmp_path_factory))


@pytest.fixture(params=METHODS)
def whole(request: pytest.FixtureRequest, run: Callable[[str], Whole]) -> Whole:
    return run(request.param)


def train_whole(make: Make, folders: pytest.TempPathFactory) -> Whole:
    folder, copies = folders.mktemp("whole"), folders.mktemp("copies")
    with pytest.MonkeyPatch.context() as patch:
        save = State.save

        def save_and_copy(self: State, path: Path, run: Mapping[str, Any]) -> None:
            save(self, path, run)
            shutil.copy(path, copies / f"{self.epoch * self.tally.shape[1] + self.batch}.safetensors")

        patch.setattr(State, "save", save_and_copy)
        session, result = train(make, folder)
    weights = {name: tensor.clone() for name, tensor in session.model.state_dict().items()}
    losses = [epoch.loss for epoch in result.history]
    return Whole(make, folder, copies, losses, weights, session, session.plan())


@in_one_process
@pytest.mark.parametrize("step", [4, 8, 12])  # while thresholds move, at the end of pruning, after it
def test_a_resumed_run_equals_an_uninterrupted_one(whole: Whole, step: int, tmp_path: Path) -> None:
    shutil.copy(whole.copies / f"{step}.safetensors", tmp_path / "train.checkpoint.safetensors")
    session, result = train(whole.make, tmp_path, resume=True, seed=1)
    assert [epoch.loss for epoch in result.history] == whole.losses
    for name, tensor in session.model.state_dict().items():
        assert torch.equal(tensor, whole.weights[name]), name
    assert session.plan() == whole.plan
    assert session.history == whole.session.history
    assert session.endings == whole.session.endings
    assert all(torch.equal(a, b) for a, b in zip(session.scores, whole.session.scores, strict=True))


@in_one_process
def test_the_budget_is_met_within_one_unit(whole: Whole) -> None:
    session = whole.session
    pruned = session.finish()
    counts = pruned.plan.kept(pruned.graph)
    assert any(kept < group.units for kept, group in zip(counts, pruned.graph.groups, strict=True))
    limit, macs = session.limits["macs"], session.cost.macs(counts)
    one = [[kept - (n == number) for n, kept in enumerate(counts)] for number in session.targets]
    assert limit - max(macs - session.cost.macs(fewer) for fewer in one) < macs <= limit


@every_method
def test_a_moving_average_is_cut_along(make: Make, tmp_path: Path) -> None:
    session, result = train(make, tmp_path, replace(CONFIG, ema=0.5))
    assert session.finish().proof.ok
    assert 0 <= result.accuracy <= 1


@every_method
def test_a_skipped_step_does_not_count(make: Make) -> None:
    model = Residual()
    session = make(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with session.attach(optimizer):
        loop(session, optimizer, 1)
        state, _ = session.state()
        before = {name: tensor.clone() for name, tensor in state.items()}
        F.cross_entropy(model(torch.randn(4, 3, 8, 8)), torch.arange(4) % 3).backward()
        session.before_step()
        session.after_step()  # without optimizer.step(), as a gradient scaler does
        assert session.step == 1
        for name, tensor in session.state()[0].items():
            assert torch.equal(tensor, before[name]), name


@every_method
def test_an_interrupted_training_leaves_no_hook(make: Make) -> None:
    model = Residual()
    session = make(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, weight_decay=1e-3)

    def interrupted() -> None:
        with session.attach(optimizer):
            loop(session, optimizer, 4)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert hooks(model) == 0
    assert not optimizer._optimizer_step_post_hooks
    assert optimizer.param_groups[0]["weight_decay"] == 1e-3


def test_training_cut_short_is_an_error() -> None:
    model = Residual()
    session = lapp()(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with session.attach(optimizer):
        loop(session, optimizer, 2)
    with pytest.raises(TrainingError, match=f"after 2 of {STEPS} steps"):
        session.finish()


@every_method
def test_the_end_comes_after_the_block(make: Make) -> None:
    model = Residual()
    session = make(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with session.attach(optimizer):
        loop(session, optimizer, STEPS)
        with pytest.raises(TrainingError, match="after the block"):
            session.finish()
    first, second = session.finish(), session.finish()
    assert first.proof.ok
    assert second.proof.ok
    assert first.after == second.after


def wrong_values() -> Iterator[tuple[type[TrainingMethod], str, Any]]:
    """For each option of each method a value that it does not take."""
    for kind in KINDS:
        for name, option in options_of(kind).items():
            bounds = ((option.least, -1), (option.above, 0), (option.most, 1), (option.below, 0))
            for bound, beyond in bounds:
                if bound is not None:
                    yield kind, name, bound + beyond
            yield kind, name, object()


@pytest.mark.parametrize(("kind", "name", "value"), list(wrong_values()))
def test_a_wrong_option_is_named(kind: type[TrainingMethod], name: str, value: Any) -> None:
    with pytest.raises(SecateurError, match=f"^{kind.__name__}: {name} is "):
        kind(**{name: value})


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_option_lists_the_choices(kind: type[TrainingMethod]) -> None:
    with pytest.raises(
        SecateurError, match=f"^{kind.__name__}: unknown option 'sped'; choose one of: .*freeze"
    ):
        kind(sped=1)
    with pytest.raises(SecateurError, match=f"method {kind.name}: unknown option 'sped'"):
        kind.of({"sped": 1})


@pytest.mark.parametrize("kind", KINDS)
def test_options_survive_plain_json(kind: type[TrainingMethod]) -> None:
    """What plans and checkpoints say is enough to make the same method again."""
    given = {"removal.steps": 7} if "removal" in options_of(kind) else {}
    method = kind.of({"freeze": ["stem.*"], **given})
    record = json.loads(json.dumps(method.record()))
    assert record.pop("method") == kind.name
    assert set(record) == {f.name for f in fields(kind)}
    assert kind.of(record) == method
    assert record.get("removal", {"steps": 7})["steps"] == 7


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_training_it_says_what_to_do(kind: type[TrainingMethod]) -> None:
    with pytest.raises(SecateurError, match=rf"{kind.__name__}\(...\).start\(model, inputs"):
        kind().prune(Residual(), INPUTS, Budget(macs=0.5), Context())
    with pytest.raises(SecateurError, match="give"):
        kind().start(Residual(), INPUTS, budget=None, steps=STEPS)
    with pytest.raises(TrainingError, match="steps is 0"):
        kind().start(Residual(), INPUTS, budget=Budget(macs=0.5), steps=0)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_modules_keep_their_units(kind: type[TrainingMethod]) -> None:
    options = {"ticks": 1, "ticks_per_tock": 1} if "ticks" in options_of(kind) else {}
    options |= {"bypass": "none"} if "bypass" in options_of(kind) else {}
    session = kind(freeze=("blocks.0",), **options).start(
        Residual(), INPUTS, budget=Budget(macs=0.8), steps=200
    )
    names = {session.whole.groups[number].name for number in session.targets}
    assert "blocks.1.conv1" in names
    assert "blocks.0.conv1" not in names


def test_the_optimizer_must_know_the_bypass() -> None:
    model = Residual()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    session = lapp()(model)
    with pytest.raises(TrainingError, match="does not know"):
        session.attach(optimizer)


def test_the_method_must_be_for_this_training(tmp_path: Path) -> None:
    model = Residual()
    with pytest.raises(TrainingError, match="another model"):
        fit(Residual(), toy_data(), CONFIG, tmp_path, session=lapp()(model), progress=False)
    with pytest.raises(TrainingError, match=f"expected this model and {STEPS} steps"):
        fit(model, toy_data(), CONFIG, tmp_path, session=lapp(steps=7)(model), progress=False)


def test_an_unreachable_budget_says_what_can_be_reached() -> None:
    with pytest.raises(BudgetError, match="stay"):
        lapp(budget=Budget(macs=0.01))(Residual())


def test_a_cut_while_an_old_loss_is_alive() -> None:
    """Autograd keeps a node for a parameter as long as a graph does; it must not remember the old shape."""
    model = Residual()
    graph = analyze(model, INPUTS)
    loss = model(torch.randn(2, 3, 8, 8)).sum()
    loss.backward()
    masks = [torch.arange(group.units) > 1 for group in graph.groups]
    cut_(model, graph, Plan.of(graph, masks))
    model.zero_grad()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    assert loss.requires_grad


def test_shrink_equals_a_second_analysis() -> None:
    from secateur.cost import Cost
    from secateur.graph.shrink import shrink

    model = Residual()
    graph = analyze(model, INPUTS)
    masks = [
        torch.rand(group.units, generator=torch.Generator().manual_seed(n)) > 0.4
        for n, group in enumerate(graph.groups)
    ]
    whole = copy.deepcopy(model)
    cut_(model, graph, Plan.of(graph, masks))
    ours, theirs = shrink(graph, model, masks), analyze(model, INPUTS)
    assert ours.fingerprint == theirs.fingerprint
    for a, b in zip(ours.groups, theirs.groups, strict=True):
        assert (a.name, a.units) == (b.name, b.units)
        for m, n in zip(a.members, b.members, strict=True):
            assert (m.tensor, m.dim, m.role) == (n.tensor, n.dim, n.role)
            assert m.index.tolist() == n.index.tolist()
    assert Cost(theirs).macs() == Cost(ours).macs([g.units for g in ours.groups])
    assert whole.stem[0].out_channels == 8


TIES = {"paam, free, streams"}
"""Adam's first step moves all free scores by ±lr, so that rounding decides which of them are selected."""


def train_all(folder: Path) -> None:
    for number, (name, make) in enumerate(METHODS.items()):
        if name not in TIES:
            train(make, folder / str(number), replace(CONFIG, checkpoint_every=STEPS))


@in_one_process
@pytest.mark.slow
def test_two_processes_take_the_same_decisions_as_one(run: Callable[[str], Whole], tmp_path: Path) -> None:
    """For every method: the same units go, and the weights agree as far as sums in another order allow."""
    two = start_ranks(tmp_path / "printed", train_all, tmp_path / "two")
    assert two.end() == 0, two.err
    for number, name in enumerate(METHODS):
        if name in TIES:
            continue
        ours, theirs = (
            read_tensors(folder / "train.checkpoint.safetensors")[0]
            for folder in (tmp_path / "two" / str(number), run(name).folder)
        )
        assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}, name
        for key, tensor in ours.items():
            if ".kept." in key:
                assert torch.equal(tensor, theirs[key]), (name, key)
            if key.startswith("model."):
                torch.testing.assert_close(tensor, theirs[key], rtol=0.01, atol=2e-3, msg=f"{name}: {key}")
