"""Residual branches as units: found, costed, cut, proven, saved, exported and trained."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import secateur as sc
from secateur.cost import Budget, Cost
from secateur.cost.prices import measure_prices
from secateur.errors import BudgetError, CaptureError, CutError, FileError, PlanError
from secateur.export import export_onnx
from secateur.files import read_tensors, write_tensors
from secateur.graph import Graph, analyze, named_tensors
from secateur.methods import RD, OneShot
from secateur.plan import Plan
from secateur.proof import verify
from secateur.recipes.models import build_model
from secateur.scores import score_groups
from secateur.surgery import cut_, embed, load, mask_, save
from secateur.surgery.absent import Absent
from secateur.surgery.cut import cut_copy
from tests.methods.examples import Residual


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out((q @ k.mT / 4).softmax(-1) @ v)


class DropPath(nn.Module):
    """Leaves out the branch of some images while it trains."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * torch.rand(len(x), 1, 1, device=x.device).gt(0.1)


class Layer(nn.Module):
    """Attention and MLP, with layer scale and drop path."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.scale = nn.Parameter(torch.full((width,), 0.5))
        self.drop = DropPath()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.scale * self.mlp(self.norm2(x)))


class Transformer(nn.Module):
    def __init__(self, width: int = 16, layers: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def fresh(name: str) -> tuple[nn.Module, Tensor]:
    """A network in evaluation mode whose norms hide nothing, and an image."""
    torch.manual_seed(0)
    model = Transformer() if name == "transformer" else build_model(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return model.eval(), torch.randn(2, 3, 32, 32)


def blocks_of(graph: Graph) -> list[str]:
    return [group.name for group in graph.groups if group.branch]


def plan_without(graph: Graph, gone: set[str], share: float = 0.0) -> Plan:
    """A plan that leaves out some blocks, and the first units of every group of channels."""
    masks = []
    for group in graph.groups:
        mask = torch.ones(group.units, dtype=torch.bool)
        mask[: int(share * group.units)] = False
        masks.append(torch.tensor([group.name not in gone]) if group.branch else mask)
    return Plan.of(graph, masks)


def macs_of(model: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return int(counter.get_total_flops()) // 2 // len(x)


def params_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("resnet20", 9),  # shortcuts pad with zeros
        ("resnet20_b", 9),  # two of them are projections, which stay
        ("mobilenet_v2_cifar", 10),
        ("vgg16_bn_cifar", 0),
        ("transformer", 6),
        ("torchvision/resnet50", 16),
        ("torchvision/efficientnet_b0", 9),
        ("torchvision/convnext_tiny", 18),
        ("torchvision/vit_b_16", 24),
        ("timm/swin_tiny_patch4_window7_224", 24),
    ],
)
def test_blocks_are_found_in_the_graph(name: str, count: int) -> None:
    library = name.partition("/")[0]
    if "/" in name:
        pytest.importorskip(library)
    with torch.device("meta") if "/" in name else torch.device("cpu"):
        model = Transformer() if name == "transformer" else build_model(name)
        x = torch.zeros(1, 3, 224, 224) if "/" in name else torch.zeros(1, 3, 32, 32)
    graph = analyze(model.eval(), x, granularity="blocks")
    assert len(graph.groups) == len(blocks_of(graph)) == count
    assert all(group.units == 1 and group.least == 0 for group in graph.groups)


def test_what_is_no_residual_branch() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d, self.e = (nn.Conv2d(4, 4, 1) for _ in range(5))
            self.head = nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x, y = self.a(x), self.b(x)
            z = self.e(x) + torch.sigmoid(y)  # from two tensors, of which neither is a shortcut
            z = z * x * y
            z = self.c(z) + z + self.c(z)  # weights that are read twice
            z = z + torch.tanh(z)  # nothing is multiplied
            return self.head(z + self.d(torch.relu_(z)))  # a branch, though something is written in place

    graph = analyze(Net(), torch.zeros(2, 4, 4, 4), granularity="both")
    assert [group.branch.tensors for group in graph.groups if group.branch] == [("d.weight", "d.bias")]
    plan = plan_without(graph, set(blocks_of(graph)))
    model = Net()
    assert verify(model, cut_copy(model, graph, plan), graph, plan).ok


def test_names_freezing_and_wrong_words() -> None:
    model, x = fresh("transformer")
    names = blocks_of(analyze(model, x, granularity="both"))
    assert names[:2] == ["layers.0.attn (block)", "layers.0.mlp (block)"]
    kept = blocks_of(analyze(model, x, granularity="both", freeze=["layers.0.attn.out", "layers.1"]))
    assert kept == ["layers.0.mlp (block)", "layers.2.attn (block)", "layers.2.mlp (block)"]
    with pytest.raises(CaptureError, match="channels, blocks, both"):
        analyze(model, x, granularity="layers")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("resnet8", 0.0),
        ("resnet20_b", 0.25),
        ("mobilenet_v2_x0_5_cifar", 0.25),
        ("transformer", 0.0),
        ("transformer", 0.25),
    ],
)
def test_cut_equals_masked_and_costs_are_true(name: str, share: float, tmp_path: Path) -> None:
    model, x = fresh(name)
    graph = analyze(model, x, granularity="both")
    blocks = blocks_of(graph)
    plan = plan_without(graph, {*blocks[::3], blocks[1]}, share)
    assert Plan.from_json(plan.to_json()) == plan
    small = cut_copy(model, graph, plan)
    proof = verify(model, small, graph, plan)
    assert proof.ok, str(proof)
    cost, kept = Cost(graph), plan.kept(graph)
    assert macs_of(small, x) == cost.macs(kept) < cost.macs()
    assert params_of(small) == cost.params(kept) < cost.params()
    masked = mask_(copy.deepcopy(model), graph, plan)
    if not proof.statistics:
        torch.testing.assert_close(small(x), masked(x), rtol=1e-4, atol=1e-4)
    assert any(isinstance(module, Absent) for module in small.modules())

    save(small, tmp_path / "small.safetensors")
    again, _ = fresh(name)
    load(again, tmp_path / "small.safetensors")
    assert torch.equal(again(x), small(x))
    assert params_of(again) == params_of(small)

    whole = embed(model, small, graph, plan)
    if not proof.statistics:
        torch.testing.assert_close(mask_(whole, graph, plan)(x), small(x), rtol=1e-4, atol=1e-4)


def test_a_block_of_which_nothing_is_left_is_no_call() -> None:
    model, x = fresh("transformer")
    graph = analyze(model, x, granularity="blocks")
    plan = plan_without(graph, {"layers.1.attn (block)", "layers.1.mlp (block)", "layers.2.mlp (block)"})
    small = cut_copy(model, graph, plan)
    assert isinstance(small.layers[1], Absent)  # type: ignore[index]
    assert isinstance(small.layers[2].mlp, Absent)  # type: ignore[index, union-attr]
    assert small.layers[2].scale.numel() == 0  # type: ignore[index, union-attr]
    assert type(small.layers[0]) is Layer  # type: ignore[index]
    assert verify(model, small, graph, plan).ok


def test_it_trains_on_with_drop_path() -> None:
    model, x = fresh("transformer")
    graph = analyze(model, x, granularity="both")
    small = cut_copy(model, graph, plan_without(graph, set(blocks_of(graph)[1::2]), 0.25)).train()
    optimizer = torch.optim.SGD(small.parameters(), 0.05, momentum=0.9)
    y = torch.tensor([1, 3])
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(small(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_what_is_written_in_place_is_a_copy() -> None:
    """A relu in place behind the sum must not write to what went before."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            out = self.conv(x)
            out += x
            return self.relu(out)

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Block(), Block(), nn.Flatten(), nn.Linear(4 * 64, 3))
    x = torch.randn(2, 3, 8, 8)
    graph = analyze(model, x, granularity="blocks")
    plan = plan_without(graph, {"1 (block)", "2 (block)"})
    small = cut_copy(model, graph, plan)
    assert verify(model, small, graph, plan).ok
    seen: list[Tensor] = []
    small[0].register_forward_hook(lambda *args: seen.append(args[2]))
    small.train()(x).sum().backward()
    assert (seen[0] < 0).any()  # the stem's output is as it was


def test_optimizer_follows_and_failure_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = fresh("resnet20")
    graph = analyze(model, x, granularity="both")
    plan = plan_without(graph, set(blocks_of(graph)[:4]), 0.25)
    before = {name: t.clone() for name, t in named_tensors(model)}
    kinds = [type(module) for module in model.modules()]
    with monkeypatch.context() as patched:
        patched.setattr("secateur.surgery.cut.settle", lambda *args: 1 / 0)
        with pytest.raises(CutError):
            cut_(model, graph, plan)
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(before[name], t) for name, t in named_tensors(model))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model.train()(x).sum().backward()
    optimizer.step()
    cut_(model, graph, plan, optimizer=optimizer)
    model(x).sum().backward()
    optimizer.step()


def test_files_are_checked(tmp_path: Path) -> None:
    model, x = fresh("mobilenet_v2_x0_5_cifar")
    graph = analyze(model, x, granularity="blocks")
    small = cut_copy(model, graph, plan_without(graph, set(blocks_of(graph)[:2])))
    path = tmp_path / "small.safetensors"
    save(small, path)
    tensors, metadata = read_tensors(path)
    recipe = json.loads(metadata["recipe"])
    recipe["absent"]["elsewhere"] = {"copies": False}
    write_tensors(path, tensors, metadata | {"recipe": json.dumps(recipe)})
    other, _ = fresh("mobilenet_v2_x0_5_cifar")
    kinds = [type(module) for module in other.modules()]
    with pytest.raises(FileError, match="is to be left out"):
        load(other, path)
    assert [type(module) for module in other.modules()] == kinds


def test_plans_of_blocks_are_checked() -> None:
    model, x = fresh("resnet20")
    plain, blocks = analyze(model, x), analyze(model, x, granularity="blocks")
    plan = plan_without(blocks, set(blocks_of(blocks)))  # all of them may go
    with pytest.raises(PlanError, match="granularity="):
        plan.check(plain)
    with pytest.raises(PlanError, match="at least 1 must stay"):
        Plan.of(plain, [torch.zeros(group.units, dtype=torch.bool) for group in plain.groups])


@pytest.mark.parametrize("score", ["l2", "taylor"])
@pytest.mark.parametrize("granularity", ["blocks", "both"])
def test_one_shot_meets_budgets(score: str, granularity: str) -> None:
    model, x = fresh("resnet8")
    method = OneShot(score=score, granularity=granularity)
    data = [(torch.randn(8, 3, 32, 32), torch.arange(8))]
    pruned = sc.prune(model, x, budget=Budget(macs=0.5), method=method, data=data)
    assert pruned.proof is not None
    assert pruned.proof.ok
    assert macs_of(pruned.model, x) == pruned.after["macs"] <= 0.5 * pruned.before["macs"]
    names = [name for name in pruned.plan.removed if name.endswith("(block)")]
    assert names if granularity == "blocks" else pruned.plan.removed
    assert any(group.name.endswith("(block)") for group in pruned.report.groups)


def test_taylor_of_a_block_is_the_change_of_the_loss_to_first_order() -> None:
    model, x = fresh("resnet20")
    model.double()
    graph = analyze(model, x.double(), granularity="blocks")
    data = [(torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.arange(4))]
    scores = score_groups(model, graph, "taylor", data=data)
    number = blocks_of(graph).index("layer2.1 (block)")
    block = model.layer2[1]
    seen: list[Tensor] = []
    handle = block.bn2.register_forward_hook(lambda *args: seen.append(args[2]))
    loss = nn.functional.cross_entropy(model(data[0][0]), data[0][1])
    handle.remove()
    (grad,) = torch.autograd.grad(loss, seen)
    assert scores[number].item() == pytest.approx((grad * seen[0]).sum().abs().item(), rel=1e-5)


def test_rd_takes_the_blocks_that_do_nothing() -> None:
    """Of blocks whose output is almost zero, rd takes as many as the budget needs, and no channels."""
    model, x = fresh("resnet8")
    for block in (model.block1, model.block3):
        nn.init.constant_(block.bn2.weight, 1e-4)
        nn.init.constant_(block.bn2.bias, 0.0)
    data = [torch.randn(16, 3, 32, 32)]
    dense = model(data[0])
    cost = Cost(graph := analyze(model, x, granularity="both"))
    wanted = {"block1 (block)", "block3 (block)"}
    budget = cost.macs(plan_without(graph, wanted).kept(graph))
    how = RD(granularity="both", exponents=(1.0,), block_weights=(1.0,))
    pruned = sc.prune(model, x, budget=Budget(macs=budget), method=how, data=data)
    assert set(pruned.plan.removed) == wanted
    assert pruned.after["macs"] == budget == macs_of(pruned.model, x)
    assert (pruned.model(data[0]) - dense).abs().max() < 0.1 * dense.abs().max()


def test_rd_with_blocks_and_channels_chooses_no_worse_than_with_either() -> None:
    model, x = fresh("resnet8")
    data = [torch.randn(16, 3, 32, 32)]
    found = {}
    for granularity in ("channels", "blocks", "both"):
        how = RD(  # type: ignore[arg-type]
            granularity=granularity,
            exponents=(1.0,),
            curves="measured",
            levels=4,
            round_to=4,
            block_weights=(1.0,),
        )
        pruned = sc.prune(model, x, budget=0.6, method=how, data=data)
        assert macs_of(pruned.model, x) == pruned.after["macs"] <= 0.6 * pruned.before["macs"]
        assert pruned.proof is not None
        assert pruned.proof.ok
        found[granularity] = pruned.facts["predicted"]
    assert found["both"] <= 1.001 * min(found["channels"], found["blocks"])


def test_rd_chooses_by_milliseconds() -> None:
    """Where a block takes time beyond its MACs, blocks go for milliseconds, though channels go for MACs."""
    model, x = Residual().eval(), torch.randn(1, 3, 8, 8)
    data = [torch.randn(16, 3, 8, 8)]
    graph = analyze(model, x, granularity="both")

    def clock(some: nn.Module) -> float:
        return macs_of(some, x) / macs_of(model, x) + sum(
            2.0
            for block in ("blocks.0", "blocks.1")
            if hasattr(getattr(some.get_submodule(block), "conv1", None), "weight")
        )

    prices = measure_prices(model, graph, lambda masks: cut_copy(model, graph, Plan.of(graph, masks)), clock)
    assert prices.dense == 5.0
    assert prices.per_mac * Cost(graph).macs() == pytest.approx(1.0, rel=1e-6)
    assert list(prices.extra.values()) == pytest.approx([2.0, 2.0])
    formula, kept = prices.formula(graph), torch.tensor([group.units for group in graph.groups])
    assert formula(kept).item() == pytest.approx(5e6)
    kept[-1] = 0
    assert formula(kept).item() == pytest.approx(1e6 * (2 + Cost(graph).macs(kept) / Cost(graph).macs()))

    how = RD(granularity="both", exponents=(1.0,), block_weights=(1.0,))
    pruned = sc.prune(model, x, budget=Budget(latency_ms=3.0), method=how, data=data, clock=clock)
    gone = [name for name in pruned.plan.removed if name.endswith("(block)")]
    assert len(gone) == 1
    assert clock(pruned.model) == pruned.after["latency_ms"] <= 3.0
    assert pruned.before["latency_ms"] == 5.0
    with pytest.raises(BudgetError, match="fits already"):
        sc.prune(model, x, budget=Budget(latency_ms=6.0), method=how, data=data, clock=clock)
    with pytest.raises(BudgetError, match="no other bound"):
        sc.prune(model, x, budget=Budget(latency_ms=3.0, macs=0.5), method=how, data=data, clock=clock)


def test_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model, x = fresh("transformer")
    graph = analyze(model, x, granularity="both")
    small = cut_copy(model, graph, plan_without(graph, set(blocks_of(graph)[1:4]), 0.25))
    check = export_onnx(small, x, tmp_path / "small.onnx")
    assert check.max_rel_error < 1e-4
