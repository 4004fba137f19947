"""`secateur export`."""

from pathlib import Path

from secateur.cli.check import EARLIER
from secateur.cli.flags import RUN, Flags, Given, command, flag
from secateur.cli.inspect import CHANNELS, CLASSES, INPUT_SIZE
from secateur.errors import SecateurError
from secateur.runs.config import Task


@command(
    EARLIER,
    Flags(Task, only=["model", "weights", "data", "data_dir", "normalisation"]),
    flag("out", Path, "Folder for the files.", panel=RUN, shown="that of --run", metavar="DIR"),
    INPUT_SIZE,
    CHANNELS,
    CLASSES,
    flag(
        "any_size",
        bool,
        "Let model.onnx and model.pt2 take images of other sizes too, as far as the model does.",
    ),
    flag("python", bool, "Also write model.py: plain PyTorch layers, with weights beside it."),
    flag(
        "int8",
        bool,
        "Also write model-int8.onnx, in 8-bit integers with ranges from training images: of --run, or of --data.",
    ),
    flag("calibration_images", int, "Training images for --int8.", shown="256", metavar="N"),
    flag("opset", int, "Version of the ONNX operators.", panel=RUN, shown="18", metavar="N"),
    flag("overwrite", bool, "Replace files that exist.", panel=RUN),
)
def export(given: Given) -> None:
    """Write model.onnx and model.pt2 (torch.export), and on demand others, each checked against the PyTorch model.

    Give --run for the model of an earlier run, or --model, --weights and --out.
    """
    run = given.get("run")
    if (run is None) == ("model" not in given):
        raise SecateurError("give --run, or --model with --weights and --out")
    if run is not None and "weights" in given:
        raise SecateurError("--run has weights of its own; give --weights with --model only")
    out = given.get("out", run)
    if out is None:
        raise SecateurError("give --out, the folder for the files")
    if run is not None and "data" in given:
        raise SecateurError("--run has data of its own; give --data with --model only")
    if "int8" in given and run is None and "data" not in given:
        raise SecateurError("--int8 measures ranges on real images; give --data, or --run")
    import torch

    from secateur.cli.show import print_table, say, table
    from secateur.errors import FileError
    from secateur.export import export_onnx, export_program, export_python
    from secateur.files import explained
    from secateur.int8 import export_int8
    from secateur.report.html import percent, si
    from secateur.runs.config import check_model_name
    from secateur.runs.folder import SavedRun
    from secateur.runs.task import fresh_model, input_shape, load_into, load_task

    names = ["model.onnx", "model.pt2"]
    names += ["model.py"] if "python" in given else []
    names += ["model-int8.onnx"] if "int8" in given else []
    paths = [out / name for name in names]
    if existing := [str(path) for path in paths if path.exists() and "overwrite" not in given]:
        raise FileError(
            f"{' and '.join(existing)} exist already. Replace them with --overwrite, or choose another --out."
        )
    weights, classes = given.get("weights"), given.get("classes")
    if run is not None:
        saved = SavedRun.read(run)
        model, weights = saved.task["model"], run / "model.safetensors"
        given |= {n: saved.task[n] for n in ("data", "data_dir", "image_size") if saved.task.get(n)}
        shape, classes = saved.input_shape, saved.classes
    else:
        model = given["model"]
        shape = input_shape(model, given.get("channels", 3), given.get("image_size"))
    check_model_name(model)
    network = fresh_model(model, classes, shape[0], seed=0)
    if weights is not None:
        load_into(network, weights)
    inputs = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
    sized = "any_size" in given
    columns = ("file", "size", "batch", *(["images"] if sized else []), "max error")
    rows = table(model, columns, right=("size", "max error"))
    checks = [export_onnx(network, inputs, paths[0], opset=given.get("opset", 18), any_size=sized)]
    checks += [export_program(network, inputs, paths[1], any_size=sized)]
    checks += [export_python(network, inputs, out / "model.py")] if "python" in given else []
    for check in checks:
        batch = f"1 only: {check.static_because}" if check.static_because else "any"
        reason = (
            check.one_size_because and f"{' × '.join(map(str, shape[1:]))} only: {check.one_size_because}"
        )
        taken = [reason or "any"] if sized else []
        rows.add_row(str(check.path), si(check.file_bytes, "B"), batch, *taken, f"{check.max_abs_error:.1e}")
    print_table(rows)
    if "int8" in given:
        task = load_task(Given({**given, "model": model, "weights": weights}).make(Task))
        images = [x for x, _ in task.batches(given.get("calibration_images", 256))]
        small = export_int8(network, inputs, paths[-1], images, opset=given.get("opset", 18))
        same = (
            "" if small.same_answer is None else f", the same answer to {percent(small.same_answer)} of them"
        )
        say(
            f"{small.path}: {si(small.file_bytes, 'B')}, ranges from {small.images} training images{same}. "
            f"Accuracy may have fallen; only test images tell."
        )
