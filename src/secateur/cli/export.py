"""`secateur export`."""

from pathlib import Path

from secateur.cli.check import EARLIER
from secateur.cli.flags import RUN, Flags, Given, command, flag
from secateur.cli.inspect import CHANNELS, CLASSES, INPUT_SIZE
from secateur.errors import SecateurError
from secateur.runs.config import Task


@command(
    EARLIER,
    Flags(Task, only=["model", "weights"]),
    flag("out", Path, "Folder for the files.", panel=RUN, shown="that of --run", metavar="DIR"),
    INPUT_SIZE,
    CHANNELS,
    CLASSES,
    flag("opset", int, "Version of the ONNX operators.", panel=RUN, shown="18", metavar="N"),
    flag("overwrite", bool, "Replace files that exist.", panel=RUN),
)
def export(given: Given) -> None:
    """Write model.onnx and model.pt2 (torch.export), each checked against the PyTorch model.

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
    import torch

    from secateur.cli.show import print_table, table
    from secateur.errors import FileError
    from secateur.export import export_onnx, export_program
    from secateur.files import explained
    from secateur.report.html import si
    from secateur.runs.config import check_model_name
    from secateur.runs.folder import SavedRun
    from secateur.runs.task import fresh_model, input_shape, load_into

    paths = [out / "model.onnx", out / "model.pt2"]
    if existing := [str(path) for path in paths if path.exists() and "overwrite" not in given]:
        raise FileError(
            f"{' and '.join(existing)} exist already. Replace them with --overwrite, or choose another --out."
        )
    weights, classes = given.get("weights"), given.get("classes")
    if run is not None:
        saved = SavedRun.read(run)
        model, weights = saved.task["model"], run / "model.safetensors"
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
    rows = table(model, ("file", "size", "batch", "max error"), right=("size", "max error"))
    for check in (
        export_onnx(network, inputs, paths[0], opset=given.get("opset", 18)),
        export_program(network, inputs, paths[1]),
    ):
        batch = f"1 only: {check.static_because}" if check.static_because else "any"
        rows.add_row(str(check.path), si(check.file_bytes, "B"), batch, f"{check.max_abs_error:.1e}")
    print_table(rows)
