import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from secateur import Plan, analyze
from secateur.errors import BudgetError, FileError, ModelError, SecateurError
from secateur.files import read_tensors
from secateur.methods import method_named
from secateur.recipes.data import Normalisation
from secateur.recipes.models import build_model
from secateur.recipes.train_config import TrainConfig
from secateur.report.data import LayerCost
from secateur.runs.config import PruneConfig, Task, TrainRunConfig
from secateur.runs.demo import demo_config
from secateur.runs.folder import RunFolder, SavedRun, Watch
from secateur.runs.pipeline import prune_run, train_run
from secateur.runs.summary import pair_layers
from secateur.runs.task import fresh_model, load_into, load_task

TASK = Task(model="resnet8", data="digits", image_size=8, train_images=100, test_images=100)
SETTINGS = {"task": {"model": "resnet8", "data": "digits"}, "score": "l2"}
SAVED = SavedRun(
    kind="prune",
    command="secateur prune",
    settings=SETTINGS,
    input_shape=(1, 8, 8),
    classes=10,
    normalisation=Normalisation((0.5,), (0.25,)),
)


def without_exports(**settings: object) -> PruneConfig:
    """For tests that are about other things: exporting takes longer than all the rest of a small run."""
    return PruneConfig(**{"task": TASK, "exports": False, **settings})  # type: ignore[arg-type]


def begun(path: Path) -> RunFolder:
    folder = RunFolder(path, "prune", SETTINGS)
    folder.begin(SAVED)
    return folder


def test_looking_at_a_folder_writes_nothing(tmp_path: Path) -> None:
    RunFolder(tmp_path / "a" / "b", "prune", SETTINGS)
    RunFolder(tmp_path / "a" / "b", "prune", SETTINGS, "overwrite")
    assert list(tmp_path.iterdir()) == []


def test_what_a_folder_was_begun_with_can_be_read(tmp_path: Path) -> None:
    begun(tmp_path / "a" / "b")
    assert SavedRun.read(tmp_path / "a" / "b") == SAVED
    assert json.loads((tmp_path / "a" / "b" / "config.json").read_text())["secateur"]


def test_results_are_computed_once(tmp_path: Path) -> None:
    calls = []

    def compute() -> list[float]:
        calls.append(1)
        return [0.1, 1e-17]

    folder = begun(tmp_path)
    assert folder.once("x", compute) == folder.once("x", compute) == [0.1, 1e-17]
    resumed = RunFolder(tmp_path, "prune", SETTINGS, "resume")
    assert resumed.once("x", compute) == [0.1, 1e-17]
    assert calls == [1]


def test_resuming_keeps_the_first_command(tmp_path: Path) -> None:
    begun(tmp_path)
    resumed = RunFolder(tmp_path, "prune", SETTINGS, "resume")
    resumed.begin(replace(SAVED, command="secateur prune --resume"))
    assert resumed.command == SavedRun.read(tmp_path).command == "secateur prune"


def test_what_a_killed_write_left_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".config.0123abcd.tmp.json").write_text("{")
    (tmp_path / ".finetune.checkpoint.0123abcd.tmp.safetensors").write_text("")
    begun(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_resumed_run_removes_what_a_killed_write_left(tmp_path: Path) -> None:
    begun(tmp_path)
    (tmp_path / ".model.0123abcd.tmp.safetensors").write_text("")
    RunFolder(tmp_path, "prune", SETTINGS, "resume").begin(SAVED)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_folder_that_may_not_be_written_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(FileError, match=r"could not be written: Permission denied\. Choose"):
        RunFolder(tmp_path / "new" / "run", "prune", SETTINGS)


def test_a_model_for_other_classes_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nets.py").write_text(
        NETS.replace("def net(classes, in_channels)", "def net(in_channels, classes=5)")
    )
    (tmp_path / "fixed.py").write_text("from nets import net as make\ndef net(): return make(1, 5)\n")
    monkeypatch.chdir(tmp_path)
    config = without_exports(task=replace(TASK, model="fixed.py:net"), budget={"macs": 0.5}, method="oneshot")
    with pytest.raises(ModelError, match=r"returned \(2, 5\) .*Build the model for 10 classes"):
        prune_run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_takes_widths_for_the_hardware_it_began_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {}
    config = without_exports(task=TASK, budget={"macs": 0.5}, method="oneshot", latency=False)
    for name, hardware, mode in (("a", "avx512", "new"), ("b", "arm", "new"), ("a", "arm", "resume")):
        monkeypatch.setattr("secateur.runs.pipeline.hardware_of", lambda model, found=hardware: found)
        if mode == "resume":
            for path in tmp_path.glob("a/[pcr]*"):  # all but what the run began with
                if path.name not in ("config.json", "progress.json"):
                    path.unlink()
            (tmp_path / "a" / "progress.json").write_text(json.dumps({"hardware": "avx512"}))
        prune_run(config, tmp_path / name, mode=mode)  # type: ignore[arg-type]
        plan = Plan.load(tmp_path / name / "plan.json")
        kept[name, mode] = plan.removed
        assert (
            json.loads((tmp_path / name / "progress.json").read_text())["hardware"] == plan.origin["round_to"]
        )
    assert kept["a", "new"] == kept["a", "resume"] != kept["b", "new"]


def test_exports_without_a_clock_and_the_other_way_round(tmp_path: Path) -> None:
    common = {"task": TASK, "budget": {"macs": 0.5}, "method": "oneshot"}
    report = prune_run(PruneConfig(**common, latency=False), tmp_path / "files")
    assert (tmp_path / "files" / "model.onnx").exists()
    assert report.latency_pytorch is report.latency_onnxruntime is None
    assert report.onnx_bytes_before is None
    assert report.onnx_bytes_after > 0
    report = prune_run(PruneConfig(**common, exports=False, latency=True), tmp_path / "clock")
    assert not (tmp_path / "clock" / "model.onnx").exists()
    assert report.latency_pytorch is not None
    assert report.latency_onnxruntime is None
    told = [note for note in report.notes if "became saved time" in note]
    assert len(told) == report.latency_pytorch.steady


def test_resume_of_nothing_starts(tmp_path: Path) -> None:
    assert RunFolder(tmp_path / "new", "prune", SETTINGS, "resume").resumed is None


@pytest.mark.parametrize("name", ["report.pdf", "model.safetensors.bak", "sub/model.onnx", "tensorboard/x"])
@pytest.mark.parametrize("mode", ["new", "resume", "overwrite"])
def test_foreign_files_are_never_touched(name: str, mode: str, tmp_path: Path) -> None:
    begun(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileError, match="holds what no run writes"):
        RunFolder(tmp_path, "prune", SETTINGS, mode)  # type: ignore[arg-type]
    assert (tmp_path / name).read_text() == "mine"


def test_links_are_removed_but_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("mine")
    begun(tmp_path / "run")
    (tmp_path / "run" / "tensorboard").symlink_to(outside)
    RunFolder(tmp_path / "run", "prune", SETTINGS, "overwrite").begin(SAVED)
    assert (outside / "precious").read_text() == "mine"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_damaged_progress_is_refused(tmp_path: Path) -> None:
    begun(tmp_path)
    (tmp_path / "progress.json").write_text('{"cut": ')
    with pytest.raises(FileError, match=r"progress\.json"):
        RunFolder(tmp_path, "prune", SETTINGS, "resume")


def test_densities_of_your_own_can_come_from_a_file() -> None:
    options = {"densities": {"block3.conv1": 0.5}}
    config = without_exports(
        method="precrop", budget={"params": 0.9}, options=options, finetune=TrainConfig(epochs=1)
    )
    assert not config.chosen.needs_data
    assert config.to_json()["options"] == options


@pytest.mark.parametrize(
    ("keep", "least"), [({}, 1), ({"min_keep": 3}, 3), ({"min_keep": 3, "round_to": 4}, 4)]
)
def test_the_named_range_is_the_reachable_one(keep: dict[str, int], least: int, tmp_path: Path) -> None:
    """A share at the end of the range that the message names is accepted by the allocation, too."""
    graph = analyze(build_model("resnet8", in_channels=1), torch.zeros(1, 1, 8, 8))
    with pytest.raises(BudgetError, match="at least") as error:
        without_exports(budget={"macs": 1e-6}, method="oneshot", options=keep).check_reach(graph)
    low = float(str(error.value).split("at least ")[1].split(",")[0])
    config = without_exports(budget={"macs": low}, method="oneshot", options=keep)
    config.check_reach(graph)
    report = prune_run(config, tmp_path / "run")
    assert report is not None
    assert min(group.kept for group in report.groups) == least


def test_several_bounds_hold_together(tmp_path: Path) -> None:
    config = without_exports(budget={"macs": 0.6, "params": 0.3, "units": 0.8})
    report = prune_run(config, tmp_path)
    assert report is not None
    assert report.share("macs") <= 0.6
    assert report.share("params") <= 0.3
    assert sum(g.kept for g in report.groups) <= 0.8 * sum(g.units for g in report.groups)


def same_tensors(a: Path, b: Path) -> bool:
    ours, theirs = read_tensors(a)[0], read_tensors(b)[0]
    return ours.keys() == theirs.keys() and all(torch.equal(t, theirs[name]) for name, t in ours.items())


def test_equal_configurations_give_equal_models(tmp_path: Path) -> None:
    config = without_exports(
        budget={"macs": 0.5},
        method="oneshot",
        options={"score": "random"},
        train=TrainConfig(epochs=1),
        finetune=TrainConfig.finetune(1, distill_weight=0.5),
    )
    for name in ("a", "b"):
        prune_run(config, tmp_path / name)
    for name in ("dense.safetensors", "model.safetensors"):
        assert same_tensors(tmp_path / "a" / name, tmp_path / "b" / name), name
    assert Plan.load(tmp_path / "a" / "plan.json") == Plan.load(tmp_path / "b" / "plan.json")
    prune_run(replace(config, task=replace(TASK, seed=1)), tmp_path / "c")
    assert not same_tensors(tmp_path / "a" / "dense.safetensors", tmp_path / "c" / "dense.safetensors")
    assert Plan.load(tmp_path / "a" / "plan.json") != Plan.load(tmp_path / "c" / "plan.json")
    assert [
        line["phase"] for line in RunFolder(tmp_path / "a", "prune", config.to_json(), "resume").metrics()
    ] == [
        "train",
        "finetune",
    ]


def test_weights_of_another_built_in_model_name_it(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    other = build_model("resnet20_b", classes=3).state_dict()
    save_file(
        {f"module.{n.replace('shortcut', 'downsample')}": t for n, t in other.items()},
        tmp_path / "b.safetensors",
    )
    with pytest.raises(ModelError, match=r"12 in the file only.*Its convolutions are those of resnet20_b\.$"):
        load_into(build_model("resnet20", classes=3), tmp_path / "b.safetensors")
    save_file({"conv.weight": torch.zeros(3, 3, 5, 5)}, tmp_path / "c.safetensors")
    with pytest.raises(ModelError, match=r"saved from\.$"):
        load_into(build_model("resnet20", classes=3), tmp_path / "c.safetensors")


REPEATED = [
    ("lapp", {"bypass": bypass, "side": side})
    for bypass, side in (
        ("full", "depthwise"),
        ("full", "pointwise"),
        ("shared", "depthwise"),
        ("none", "depthwise"),
    )
] + [
    ("lapp", {"bypass": "none", "removal": {"steps": 2}}),
    ("paam", {}),
    ("gradual", {"score": "random", "rounds": 2}),
    ("gradual", {"rounds": 1, "removal": {"steps": 2, "restore": True}}),
    ("depgraph", {}),
    ("oto", {}),
    ("hesso", {"periods": 2}),
    ("gate-decorator", {"ticks": 1, "ticks_per_tock": 1}),
    ("precrop", {}),
    ("preconfig", {}),
    ("snip", {}),
    ("random-weights", {}),
]


@pytest.mark.parametrize(("method", "options"), REPEATED, ids=str)
def test_one_seed_is_one_model_whatever_was_drawn_before(
    method: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    during = method_named(method).when == "during"
    config = without_exports(
        task=replace(TASK, model="nets.py:net", train_images=30, test_images=10),
        budget={"macs": 0.6},
        method=method,
        options=options,
        **{"train" if during else "finetune": TrainConfig(epochs=2, batch_size=10)},
    )
    for number in range(2):
        torch.manual_seed(number)
        prune_run(config, tmp_path / str(number))
    assert same_tensors(*(tmp_path / str(number) / "model.safetensors" for number in range(2)))


NETS = """
from torch import nn
def net(classes, in_channels):
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))
"""


def test_a_seed_stands_for_the_weights_whatever_was_drawn_before() -> None:
    torch.manual_seed(1)
    first = fresh_model("resnet8", 10, 1, seed=0).state_dict()
    torch.manual_seed(2)
    second = fresh_model("resnet8", 10, 1, seed=0).state_dict()
    other = fresh_model("resnet8", 10, 1, seed=1).state_dict()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


def test_the_seed_is_also_that_of_the_fine_tuning(tmp_path: Path) -> None:
    train_run(TrainRunConfig(task=TASK, train=TrainConfig(epochs=1)), tmp_path / "train")
    task = replace(TASK, weights=tmp_path / "train" / "model.safetensors")
    for seed in (0, 1):
        config = without_exports(
            task=replace(task, seed=seed),
            budget={"macs": 0.5},
            method="oneshot",
            finetune=TrainConfig.finetune(1),
        )
        prune_run(config, tmp_path / str(seed))
    plans = [Plan.load(tmp_path / str(seed) / "plan.json").removed for seed in (0, 1)]
    assert plans[0] == plans[1]
    assert not same_tensors(tmp_path / "0" / "model.safetensors", tmp_path / "1" / "model.safetensors")


def test_the_score_is_checked_before_the_dense_model_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plain_models.py").write_text(
        "from torch import nn\n"
        "def plain(): return nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 6), nn.Flatten(), nn.Linear(8, 10))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    task = replace(TASK, model="plain_models:plain")
    config = without_exports(
        task=task,
        budget={"macs": 0.5},
        method="oneshot",
        options={"score": "bn-scale"},
        train=TrainConfig(epochs=1),
    )
    with pytest.raises(SecateurError, match="no batch-norm follows"):
        prune_run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_exported_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from secateur.errors import ExportError

    def fail(*_: object) -> None:
        raise ExportError("no such operator")

    monkeypatch.setattr("secateur.runs.measure.export_onnx", fail)
    report = prune_run(PruneConfig(task=TASK, budget={"macs": 0.5}), tmp_path)
    assert report is not None
    assert "No ONNX file: no such operator" in report.notes
    assert report.latency_onnxruntime is None
    assert not (tmp_path / "model.onnx").exists()
    assert (tmp_path / "model.pt2").exists()


def test_a_run_tells_what_it_does(tmp_path: Path) -> None:
    class Told(Watch):
        def __init__(self) -> None:
            self.lines: list[str] = []

        def tell(self, what: str) -> None:
            self.lines.append(what)

    told = Told()
    train_run(TrainRunConfig(task=TASK, train=TrainConfig(epochs=1)), tmp_path / "train", watch=told)
    assert told.lines == ["Training: 1 × 100 images"]
    weights = tmp_path / "train" / "model.safetensors"
    prune_run(
        without_exports(task=replace(TASK, weights=weights), budget={"macs": 0.5}, method="oneshot"),
        tmp_path / "prune",
        watch=told,
    )
    assert told.lines[1].startswith("Accuracy of the dense model: ")
    assert told.lines[2].startswith("Accuracy of the cut model: ")


def test_training_goes_on_from_weights(tmp_path: Path) -> None:
    first = train_run(TrainRunConfig(task=TASK, train=TrainConfig(epochs=1)), tmp_path / "first")
    task = replace(TASK, weights=tmp_path / "first" / "model.safetensors")
    still = TrainConfig(epochs=1, lr=1e-12, momentum=0, nesterov=False)
    second = train_run(TrainRunConfig(task=task, train=still), tmp_path / "second")
    before, after = (read_tensors(tmp_path / name / "model.safetensors")[0] for name in ("first", "second"))
    torch.testing.assert_close(before["conv1.weight"], after["conv1.weight"])
    assert second.history[0].loss < first.history[0].loss


def test_a_pruned_model_can_be_pruned_again_with_its_normalisation(tmp_path: Path) -> None:
    half = Normalisation((0.5,), (0.5,))
    first = prune_run(
        without_exports(task=replace(TASK, normalisation=half), budget={"macs": 0.5}), tmp_path / "first"
    )
    task = replace(TASK, weights=tmp_path / "first" / "model.safetensors")
    assert load_task(task).data.normalisation == half
    second = prune_run(without_exports(task=task, budget={"macs": 0.5}), tmp_path / "second")
    assert first is not None
    assert second is not None
    assert second.before["macs"] == first.after["macs"]
    model = build_model("resnet8", classes=10, in_channels=1)
    assert load_into(model, tmp_path / "second" / "model.safetensors") == ""
    assert sum(p.numel() for p in model.parameters()) == second.after["params"]


def test_the_demo_is_one_configuration() -> None:
    config = demo_config(seed=3)
    assert config.task.seed == 3
    assert config.train is not None
    assert config.finetune is not None


DURING = without_exports(
    budget={"macs": 0.6},
    method="lapp",
    options={"prune_share": 0.6, "bypass": "none"},
    train=TrainConfig(epochs=3, batch_size=25, checkpoint_every=1),
)


def test_a_method_that_prunes_in_training_makes_a_whole_run(tmp_path: Path) -> None:
    report = prune_run(DURING, tmp_path)
    assert report is not None
    assert 0.5 < report.share("macs") <= 0.6
    assert report.is_proven
    assert report.accuracy_after is not None
    assert report.accuracy_before is report.accuracy_cut is None
    assert report.pruning_history[-1]["macs"] == report.share("macs")
    page = (tmp_path / "report.html").read_text()
    assert all(f'id="{plot}"' in page for plot in ("plot-cost", "plot-units", "plot-learnt"))
    model = fresh_model("resnet8", 10, 1, 7)
    load_into(model, tmp_path / "model.safetensors")
    plan = Plan.load(tmp_path / "plan.json")
    graph = analyze(build_model("resnet8", in_channels=1), torch.zeros(1, 1, 8, 8))
    plan.check(graph)
    assert {g.name: k for g, k in zip(graph.groups, plan.kept(graph), strict=True)} == {
        g.name: g.units for g in analyze(model, torch.zeros(1, 1, 8, 8)).groups
    }


def test_a_killed_run_of_such_a_method_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from secateur.methods import LAPP, Session

    prune_run(DURING, tmp_path / "whole")
    advance = LAPP.advance

    def interrupted(self: LAPP, session: Session[Any]) -> None:
        advance(self, session)
        if session.step == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LAPP, "advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prune_run(DURING, tmp_path / "killed")
    prune_run(DURING, tmp_path / "killed", mode="resume")
    assert same_tensors(tmp_path / "killed" / "model.safetensors", tmp_path / "whole" / "model.safetensors")


PRECROP = {"method": "precrop", "options": {}, "train": None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": {"bypas": "none"}}, "method lapp: unknown option 'bypas'"),
        ({"options": {"bypass": "wide"}}, "bypass is 'wide'"),
        ({"options": {"rounds": 4}}, "method lapp: unknown option 'rounds'"),
        ({"method": "paam", "options": {"removal.steps": 5}}, "method paam: unknown option 'removal'"),
        ({"options": {"removal.steps": 3, "removal.restore": True}}, "use a removal without restore"),
        ({"options": {"removal.steps": 0}}, "Decay: steps is 0; expected a whole number, at least 1"),
        ({"options": {"removal.step": 3}}, "Decay: unknown option 'step'"),
        ({"train": None}, "method lapp prunes while the model is trained"),
        ({"finetune": TrainConfig(epochs=1)}, "no fine-tuning after it"),
        ({"method": "lap"}, "unknown method 'lap'"),
        ({"train": TrainConfig(epochs=1, distill_weight=0.5)}, "needs a trained dense model as its teacher"),
        (
            PRECROP | {"finetune": TrainConfig(epochs=1, distill_weight=0.5)},
            "needs a trained dense model as its teacher",
        ),
        (
            PRECROP | {"task": replace(DURING.task, weights=Path(__file__))},
            "method precrop draws fresh weights; leave out weights",
        ),
        (
            {"method": "rd-weights", "options": {"min_keep": 2}, "budget": {"units": 0.5}},
            "method rd-weights: unknown option 'min_keep'",
        ),
    ],
)
def test_wrong_settings_of_a_method_are_named(
    changes: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SecateurError, match=message):
        prune_run(replace(DURING, **changes), tmp_path / "run")  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_decay_reaches_the_method(tmp_path: Path) -> None:
    options = {"rounds": 2, "removal.steps": 3, "removal.restore": True}
    config = replace(DURING, method="gradual", options=options, exports=False)
    report = prune_run(config, tmp_path)
    assert report is not None
    assert report.method.startswith("gradual, rounds 2, removal steps 3 restore criterion radial")
    removal = Plan.load(tmp_path / "plan.json").origin["removal"]
    assert removal["steps"] == 3
    assert removal["restore"]["criterion"] == "radial"


def test_widths_before_training_make_a_whole_run(tmp_path: Path) -> None:
    config = without_exports(
        budget={"macs": 0.5},
        method="precrop",
        finetune=TrainConfig(epochs=2, batch_size=25, checkpoint_every=1),
    )
    report = prune_run(config, tmp_path)
    assert report is not None
    assert report.share("macs") <= 0.5
    assert report.accuracy_before is report.accuracy_cut is None
    assert report.accuracy_after is not None
    assert [line["phase"] for line in report.history] == ["train", "train"]


@pytest.mark.parametrize("when", ["after", "during"])
def test_milliseconds_are_a_budget(when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def clock(model: nn.Module) -> float:
        return 10 * sum(p.numel() for p in model.parameters()) / dense

    dense = sum(p.numel() for p in fresh_model(TASK.model, 10, 1, 0).parameters())
    monkeypatch.setattr("secateur.runs.measure.here", lambda *_: clock)
    config = without_exports(budget={"latency_ms": 6.0}, method="oneshot")
    if when == "during":
        config = replace(DURING, budget={"latency_ms": 6.0})
    report = prune_run(config, tmp_path)
    assert report is not None
    assert report.share("params") <= (0.6 if when == "after" else 0.8)
    assert report.budget == {"latency_ms": 6.0}
    assert "latency ≤ 6 ms" in (tmp_path / "report.html").read_text()
    origin = Plan.load(tmp_path / "plan.json").origin
    assert ("latency_ms" in origin) == (when == "after")


def test_milliseconds_need_channels_and_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BudgetError, match="zeros do not make dense layers faster"):
        without_exports(budget={"latency_ms": 1.0}, method="rd-weights")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BudgetError, match="then give keep-macs"):
        without_exports(budget={"latency_ms": 1.0})


def test_what_the_method_made_of_the_weights_is_what_is_measured(tmp_path: Path) -> None:
    """Method rd solves the remaining weights again; the run must not cut the original a second time."""
    trained = TrainRunConfig(
        task=replace(TASK, train_images=200), train=TrainConfig(epochs=2, batch_size=20, lr=0.05)
    )
    train_run(trained, tmp_path / "dense")
    task = replace(TASK, weights=tmp_path / "dense" / "model.safetensors")
    options = {"levels": 3}
    found = {}
    for compensation in ("none", "least-squares"):
        config = without_exports(
            task=task,
            budget={"macs": 0.5},
            method="rd",
            options=options | {"compensation": compensation},
            calibration_images=64,
        )
        prune_run(config, tmp_path / compensation)
        found[compensation], _ = read_tensors(tmp_path / compensation / "cut.safetensors")
        final, _ = read_tensors(tmp_path / compensation / "model.safetensors")
        assert all(torch.equal(t, final[name]) for name, t in found[compensation].items())
    assert found["none"].keys() == found["least-squares"].keys()
    assert not torch.equal(found["none"]["fc.weight"], found["least-squares"]["fc.weight"])


def test_fine_tuning_that_harms_is_undone(tmp_path: Path) -> None:
    config = without_exports(
        task=replace(TASK, train_images=400),
        budget={"macs": 0.9},
        train=TrainConfig(epochs=4, batch_size=32, lr=0.1, schedule="one-cycle"),
        finetune=TrainConfig.finetune(1, batch_size=32, lr=2.0, warmup_epochs=0.0),
    )
    out = tmp_path / "better"
    report = prune_run(config, out)
    assert report is not None
    assert report.undone
    assert report.accuracy_after == report.accuracy_cut > 0.5
    assert "the cut model was kept" in report.outcome
    assert any("the fine-tuned one is in finetuned.safetensors" in note for note in report.notes)
    kept, cut, tuned = (read_tensors(out / f"{n}.safetensors")[0] for n in ("model", "cut", "finetuned"))
    assert all(torch.equal(kept[name], cut[name]) for name in cut)
    assert any(not torch.equal(kept[name], tuned[name]) for name in cut)
    again = prune_run(config, out, mode="resume")
    assert again is not None
    assert again.accuracy_after == report.accuracy_after

    last = prune_run(replace(config, keep="last"), tmp_path / "last")
    assert last is not None
    assert not last.undone
    assert last.accuracy_after < report.accuracy_after
    assert any("is in cut.safetensors" in note for note in last.notes)


def test_layers_of_both_models_are_paired() -> None:
    def row(layer: str, kind: str, macs: int, ms: float) -> dict[str, Any]:
        return {"layer": layer, "kind": kind, "macs": macs, "ms": ms}

    before = [
        row("", "Net", 0, 0.5), row("a", "Conv2d", 100, 2.0), row("bn", "BatchNorm2d", 0, 0.25),
        row("b", "Conv2d", 50, 1.0), row("bn2", "BatchNorm2d", 0, 0.25), row("c", "Linear", 10, 0.5),
    ]  # fmt: skip
    after = [
        row("", "Net", 0, 0.25), row("a", "Conv2d", 40, 1.0), row("bn", "BatchNorm2d", 0, 0.25),
        row("b", "Bypassed", 0, 0.125), row("b.conv", "Conv2d", 20, 0.5), row("b.side", "Conv2d", 5, 0.25),
        row("c", "Linear", 4, 0.25),
    ]  # fmt: skip
    assert pair_layers({"before": before, "after": after}) == [
        LayerCost("a", 100, 40, 2.0, 1.0),
        LayerCost("b", 50, None, 1.0, None),
        LayerCost("b.conv", None, 20, None, 0.5),
        LayerCost("b.side", None, 5, None, 0.25),
        LayerCost("c", 10, 4, 0.5, 0.25),
        LayerCost("what forward does between them", None, None, 0.5, 0.375),
        LayerCost("BatchNorm2d (2×)", None, None, 0.5, 0.25),
    ]
    assert pair_layers({}) == []
