"""Models and inputs at the edge: each works, or is refused by a message that names the module and the way out.

Whatever happens, the user's model is as it was: tensors, modes, hooks, gradients and attributes.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import secateur as sc
from secateur.errors import BudgetError, CaptureError, CutError, ScoreError, SecateurError
from secateur.methods import Pruned

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BUDGET = sc.Budget(macs=0.6)


def network(*middle: nn.Module) -> nn.Sequential:
    """Four convolutions; `middle` sits before the last but one."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        *middle,
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1),
    )


def state(model: nn.Module) -> dict[str, object]:
    """Everything about a model that a user could miss."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "modes": [module.training for module in model.modules()],
        "hooks": [[list(getattr(module, name)) for name in hooks] for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "numbers": [
            {k: v for k, v in vars(module).items() if isinstance(v, int | float | str)}
            for module in model.modules()
        ],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "identity": [id(t) for t in (*model.parameters(), *model.buffers())],
    }


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    before, tensors = state(model), copy.deepcopy(model.state_dict())
    grads = [p.grad for p in model.parameters()]
    try:
        yield
    finally:
        assert state(model) == before
        assert [p.grad for p in model.parameters()] == grads
        after = model.state_dict()
        assert list(after) == list(tensors)
        for name, tensor in tensors.items():
            assert tensor.is_meta or torch.equal(tensor, after[name]), name


def pruned(model: nn.Module, inputs: object = X) -> Pruned:
    """Prune, with the model watched; the result has been verified."""
    with unchanged(model):
        result = sc.prune(model, inputs, budget=BUDGET, round_to=1)
    assert result.proof.ok
    assert result.after["macs"] <= 0.6 * result.before["macs"]
    return result


def refused(model: nn.Module, error: type[SecateurError], match: str, inputs: object = X) -> None:
    with unchanged(model), pytest.raises(error, match=match):
        sc.prune(model, inputs, budget=BUDGET)


# --- control flow that depends on the data -----------------------------------------------------------------


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu() if x.sum() > 0 else x


class Repeat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x.mean().abs()) + 1):
            x = x.relu()
        return x


class ToNumpy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy())


@pytest.mark.parametrize("kind", [Branch, Repeat, ToNumpy])
def test_control_flow_on_data_stays_and_is_named(
    kind: type[nn.Module], capfd: pytest.CaptureFixture[str]
) -> None:
    result = pruned(network(kind()))
    assert result.graph.parts.names == ["0", "1", "2", "4", "5", "6", "7"]
    assert "  3: stays (" in str(result)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", [Branch, Repeat, ToNumpy])
def test_a_model_with_nothing_else_is_refused_by_name(kind: type[nn.Module]) -> None:
    alone = nn.Sequential(nn.Conv2d(3, 4, 1), kind())
    refused(alone, CaptureError, rf"^1 \({kind.__name__}\): .* cannot be captured: .* torch.where")


def test_a_list_of_images_is_one_argument() -> None:
    class Images(nn.Module):
        """Takes a list of images; the example is one of them, whose first dim is no batch."""

        def __init__(self) -> None:
            super().__init__()
            self.body = network()
            self.mean = torch.tensor([0.4, 0.5, 0.6])

        def forward(self, images: list[Tensor]) -> Tensor:
            y = self.body(torch.stack([image - self.mean[:, None, None] for image in images]))
            return y if y.sum() > 0 else -y

    result = pruned(Images(), [X[0]])
    assert result.graph.parts.names == ["body"]
    assert result.before["macs"] == pruned(network(), X).before["macs"]


def test_noise_in_evaluation_mode_is_named() -> None:
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.randn_like(x)

    refused(network(Noise()), CaptureError, r"^3: its forward is random in evaluation mode \(aten.randn_like")


# --- inputs and outputs ------------------------------------------------------------------------------------


class Fusion(nn.Module):
    """Two images and a number in, a nest of containers out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.body = nn.Conv2d(3, 8, 1), nn.Conv2d(1, 8, 1), network()[2:]

    def forward(self, image: Tensor, depth: Tensor, scale: float = 1.0) -> object:
        y = self.body(self.a(image) + scale * self.b(depth))
        return {"logits": [y, None], "count": 3, "name": "fusion"}


@pytest.mark.parametrize("form", [tuple, list, dict])
def test_several_inputs_and_nested_outputs(form: type) -> None:
    depth = torch.randn(1, 1, 8, 8)
    inputs = {"depth": depth, "image": X, "scale": 0.5} if form is dict else form([X, depth, 0.5])
    result = pruned(Fusion().eval(), inputs)
    assert result.model.a.out_channels == result.model.b.out_channels < 8


def test_a_missing_input_is_named() -> None:
    refused(
        Fusion(), CaptureError, "Fusion: does not run on .*missing 1 required positional argument: 'depth'"
    )


@dataclass
class Answer:
    logits: Tensor
    auxiliary: Tensor | None = None


class Answering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: Tensor) -> Answer:
        return Answer(self.body(x))


def test_a_dataclass_output_keeps_its_class() -> None:
    result = pruned(Answering())
    answer = result.model(X)
    assert isinstance(answer, Answer)
    assert answer.logits.shape == (1, 4, 8, 8)


def test_an_output_without_visible_tensors_is_left_to_the_model() -> None:
    class Box:
        def __init__(self, content: Tensor) -> None:
            self.content = content

    class Boxing(Answering):
        def forward(self, x: Tensor) -> Box:
            return Box(self.body(x))

    result = pruned(Boxing())
    assert result.graph.parts.names == ["body"]
    assert "the model returns an object of class Box" in result.graph.parts.left[""]
    assert result.model(X).content.shape == (1, 4, 8, 8)


# --- weights that are not plain parameters -----------------------------------------------------------------


WRAPPED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


@pytest.mark.parametrize("how", WRAPPED)
def test_parametrised_layers_stay_or_shrink_right(how: str) -> None:
    model = network()
    WRAPPED[how](model[4])
    result = pruned(model.eval())
    assert result.model[0].out_channels < 8


def test_tied_weights_stay_tied() -> None:
    model = network()
    model[4].weight = model[2].weight
    result = pruned(model)
    assert result.model[4].weight is result.model[2].weight
    assert result.model[2].weight.shape == (result.model[2].out_channels, result.model[2].in_channels, 3, 3)


def test_a_weight_computed_by_a_hook_is_named() -> None:
    model = network()
    prune.l1_unstructured(model[2], "weight", amount=0.5)
    refused(model, ScoreError, r"group '2': .* computed from other tensors.*torch.nn.utils.prune.remove")


def test_a_mask_made_permanent_is_just_a_weight() -> None:
    model = network()
    prune.l1_unstructured(model[2], "weight", amount=0.5)
    prune.remove(model[2], "weight")
    pruned(model)


# --- state of the model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_kept_and_makes_no_difference(training: bool) -> None:
    model = network(nn.BatchNorm2d(8), nn.Dropout(0.5)).train(training)
    model[0].eval()
    result = pruned(model)
    assert [m.training for m in result.model.modules()] == [m.training for m in model.modules()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_precisions(dtype: torch.dtype) -> None:
    result = pruned(network(nn.BatchNorm2d(8)).to(dtype), X.to(dtype))
    assert {p.dtype for p in result.model.parameters()} == {dtype}


def test_the_image_size_that_would_do_is_named() -> None:
    deep = nn.Sequential(nn.Conv2d(3, 8, 3, stride=8), nn.ReLU(), nn.Conv2d(8, 4, 6))
    where = r"2 \(Conv2d\): does not run on .*Kernel size.*It does run on images of shape \(2, 3, 64, 48\)"
    refused(deep, CaptureError, where, torch.randn(2, 3, 32, 24))
    with pytest.raises(CaptureError) as caught:
        sc.analyze(deep, torch.randn(2, 4, 32, 24))
    assert "It does run" not in str(caught.value)


def test_inputs_of_another_dtype_are_named() -> None:
    refused(
        network().double(), CaptureError, r"0 \(Conv2d\): does not run on .*\(1, 3, 8, 8\) float32 on cpu"
    )


def test_hooks_run_in_the_cut_model_and_leave_nothing_behind() -> None:
    model, seen = network(), []
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    model[2].register_forward_pre_hook(lambda module, args: setattr(module, "last", args[0].detach()))
    handle = model[4].register_full_backward_hook(lambda *args: seen.append(1))
    result = pruned(model)
    assert not hasattr(model[2], "last")
    result.model(X).sum().backward()
    assert result.model[2].last.shape[1] == result.model[0].out_channels
    assert seen
    handle.remove()


def test_a_forward_that_counts_its_calls_is_not_counted_up() -> None:
    class Counting(Answering):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0
            self.register_buffer("steps", torch.zeros((), dtype=torch.long))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.steps += 1
            return self.body(x)

    pruned(Counting())
    refused(Counting(), CaptureError, "does not run on", torch.randn(1, 5, 8, 8))


def test_a_cache_filled_by_forward_stays_empty() -> None:
    class Caching(Answering):
        def __init__(self) -> None:
            super().__init__()
            self.by_size: dict[int, Tensor] = {}
            self.seen: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(x)
            y = self.body[0](x)
            if len(x) not in self.by_size:
                self.by_size[len(x)] = y * 2
            return self.body[1:](y)

    model = Caching()
    sc.analyze(model, X)
    assert not model.seen
    assert not model.by_size


def test_a_cache_that_evaluation_filled_is_not_taken_for_a_constant() -> None:
    class Biased(nn.Module):
        """Keeps a tensor from call to call until it is trained, as LeViT keeps its attention biases."""

        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = network(), nn.Conv2d(4, 4, 1)
            self.body[6] = nn.Conv2d(8, 4, 1)
            self.table = nn.Parameter(torch.ones(4, 2))
            self.kept: dict[str, Tensor] = {}

        def train(self, mode: bool = True) -> "Biased":
            super().train(mode)
            if mode:
                self.kept = {}
            return self

        def forward(self, x: Tensor) -> Tensor:
            table = torch.cat([self.table, self.table], 1)
            if not self.training:
                table = self.kept.setdefault("table", table)
            return self.head(self.body(x).softmax(1) + table.mean(1)[:, None, None])

    model = Biased().eval()
    with torch.no_grad():
        model(X)
    before = model.kept["table"]
    graph = sc.analyze(model, X)
    assert model.kept["table"] is before
    assert not graph.trace.captured.constants
    result = sc.prune(model, X, budget=BUDGET)
    assert result.proof.ok
    result.model.train()(X).sum().backward()
    assert result.model.table.grad is not None


def test_frozen_parameters_are_cut_and_stay_frozen() -> None:
    model = network().requires_grad_(False)
    model[4].requires_grad_(True)
    result = pruned(model)
    assert [p.requires_grad for p in result.model.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]


def test_gradients_are_cut_along_and_the_original_keeps_its_own() -> None:
    model = network()
    model(X).sum().backward()
    result = pruned(model)
    assert all(p.grad is None or p.grad.shape == p.shape for p in result.model.parameters())


def test_a_forward_without_gradients_can_be_pruned() -> None:
    class Inference(Answering):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    pruned(Inference())


def test_an_already_pruned_model_is_pruned_further() -> None:
    once = pruned(network()).model
    twice = pruned(once).model
    assert sum(p.numel() for p in twice.parameters()) < sum(p.numel() for p in once.parameters())


def test_a_precision_that_forward_sets_itself_is_named() -> None:
    class Mixed(Answering):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.body(x)

    refused(Mixed(), CutError, r"^the model: its forward opens a region .*around the call of the model")


# --- what is no model, or none with weights -----------------------------------------------------------------


def inference_network() -> nn.Module:
    with torch.inference_mode():
        return network()


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "scripted": (lambda: torch.jit.script(network()), "TorchScript; pass the module it was made from"),
    "parallel": (lambda: nn.DataParallel(network()), "^DataParallel: is wrapped .*prune its .module"),
    "lazy": (lambda: nn.Sequential(nn.LazyConv2d(4, 3)), "^0: weight of this LazyConv2d has no shape yet"),
    "inference": (inference_network, r"^0: weight was made under torch.inference_mode\(\)"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_cannot_be_read(kind: str) -> None:
    make, message = REFUSED[kind]
    with pytest.raises(CaptureError, match=message):
        sc.prune(make(), X, budget=BUDGET)


def test_something_that_is_no_module() -> None:
    with pytest.raises(CaptureError, match=r"function; expected a torch.nn.Module"):
        sc.prune(lambda x: x, X, budget=BUDGET)


def test_a_model_without_values_is_analysed_but_not_pruned() -> None:
    model = network().to("meta")
    assert len(sc.analyze(model, X.to("meta")).groups) == 3
    refused(model, ScoreError, r"^0.weight has no values \(device meta\)", X.to("meta"))


def test_a_model_with_nothing_to_prune() -> None:
    refused(nn.Sequential(nn.Conv2d(3, 4, 1)), BudgetError, "nothing can be pruned")
