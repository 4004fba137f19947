"""Memory is bounded: what networks have computed goes to the disk where it is too much, and comes back as it was."""

import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from secateur.graph.replay import Replay, chunks
from secateur.reconstruction import held as held_module
from secateur.reconstruction.compensate import compensate, layers, reestimate, see
from secateur.reconstruction.held import Held, size_of
from tests.small import residual_net


def test_what_is_too_much_comes_back_from_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_module, "MEMORY", 1000)
    held = Held(tmp_path)
    base = torch.arange(100.0)
    values = {3: base, "view": base[::2], "list": [base + 1, 7, None]}
    held.put(0, values)
    held.put(1, values)
    assert held.bytes == 800
    assert [path.name for path in tmp_path.iterdir()] == ["1.pt"]
    for number in (1, 0):
        back = held.take(number)
        assert torch.equal(back["view"], base[::2])
        back["view"].zero_()
        assert float(back[3][0]) == float(back[3][2]) == 0  # still a view of the other
        assert back["list"][1:] == [7, None]
        base = torch.arange(100.0)
        values["view"].copy_(base[::2])
    assert held.bytes == 0
    assert not list(tmp_path.iterdir())


class Most:
    """The most bytes of activations that are alive between any two calls of a forward pass in steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes, alive = 0, weakref.WeakSet[torch.Tensor]()
        run = Replay.compute

        def compute(program: Replay, *args: object) -> object:
            found = run(program, *args)  # type: ignore[arg-type]
            if isinstance(found, torch.Tensor):
                alive.add(found)
            self.bytes = max(self.bytes, size_of(list(alive)))
            return found

        monkeypatch.setattr(Replay, "compute", compute)


@pytest.mark.parametrize("what", ["compensate", "reestimate", "see"])
def test_more_images_take_no_more_memory(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = residual_net(images=8)
    program = Replay(model, x)
    monkeypatch.setattr(held_module, "MEMORY", 20_000)

    def alive(batches: int) -> int:
        with monkeypatch.context() as patch:
            most = Most(patch)
            with torch.no_grad():
                if what == "see":
                    see(program, [x] * batches)
                elif what == "reestimate":
                    reestimate(program, [x] * batches, {})
                else:
                    whole = {
                        layer.weight: torch.ones_like(program.tensor(layer.weight), dtype=torch.bool)
                        for layer in layers(program)
                    }
                    compensate(program, [x] * batches, whole)
        return most.bytes

    most = alive(1) + 20_000
    assert most > 20_000
    assert alive(30) <= most
    if what != "see":  # which never holds more than one batch
        monkeypatch.setattr(held_module, "MEMORY", 2**31)
        assert alive(30) > 2 * most


def test_the_disk_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = residual_net(images=24)
    program, batches = Replay(model, x), list(x.split(8))
    whole = {layer.weight: torch.rand_like(program.tensor(layer.weight)) > 0.4 for layer in layers(program)}
    found = []
    for limit in (2**31, 0):
        monkeypatch.setattr(held_module, "MEMORY", limit)
        tensors = compensate(program, batches, whole).tensors
        found.append({**tensors, **reestimate(program, batches, {})})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_large_batches_are_gone_through_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = residual_net(images=24)
    program = Replay(model, x)
    assert [len(part) for part in chunks(program, [x])] == [24]  # type: ignore[arg-type]
    monkeypatch.setattr("secateur.graph.replay.PASS", 10 * program.bytes_per_image)
    assert [len(part) for part in chunks(program, [x])] == [10, 10, 4]  # type: ignore[arg-type]


def test_the_norms_statistics_are_those_of_all_images() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    x = torch.randn(20, 3, 6, 6) + 5
    with torch.no_grad():
        found = reestimate(Replay(model, x[:8]), [x[:8], x[8:11], x[11:]], {})
        inner = model[0](x).double()
    torch.testing.assert_close(found["1.running_mean"].double(), inner.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        found["1.running_var"].double(), inner.var((0, 2, 3), correction=0), rtol=1e-5, atol=1e-6
    )
