"""`secateur export`."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from secateur.cli import options as o
from secateur.cli.options import RUN


def export(
    run: o.Run = None,
    model: o.MaybeModel = None,
    weights: o.Weights = None,
    out: Annotated[
        Path | None,
        Option(
            metavar="DIR", help="Folder for the files.", rich_help_panel=RUN, show_default="that of --run"
        ),
    ] = None,
    image_size: o.InputSize = None,
    channels: o.Channels = 3,
    classes: o.Classes = None,
    opset: Annotated[
        int, Option(min=1, metavar="N", help="Version of the ONNX operators.", rich_help_panel=RUN)
    ] = 18,
    overwrite: Annotated[
        bool, Option("--overwrite", help="Replace files that exist.", rich_help_panel=RUN)
    ] = False,
) -> None:
    """Write model.onnx and model.pt2 (torch.export), each checked against the PyTorch model.

    Give --run for the model of an earlier run, or --model, --weights and --out.
    """
    if (run is None) == (model is None):
        raise typer.BadParameter("give --run, or --model with --weights and --out")
    if run is not None and weights is not None:
        raise typer.BadParameter("--run has weights of its own; give --weights with --model only")
    out = out or run
    if out is None:
        raise typer.BadParameter("give --out, the folder for the files")
    import torch

    from secateur.cli.show import print_table, table
    from secateur.errors import FileError
    from secateur.export import export_onnx, export_program
    from secateur.files import explained
    from secateur.report.html import si
    from secateur.runs import SavedRun, fresh_model, load_into
    from secateur.runs.config import check_model_name
    from secateur.runs.subject import input_shape

    paths = [out / "model.onnx", out / "model.pt2"]
    if existing := [str(path) for path in paths if path.exists() and not overwrite]:
        raise FileError(
            f"{' and '.join(existing)} exist already. Replace them with --overwrite, or choose another --out."
        )
    if run is not None:
        saved = SavedRun.read(run)
        model, weights = saved.task["model"], run / "model.safetensors"
        shape, classes = saved.input_shape, saved.classes
    else:
        assert model is not None
        shape = input_shape(model, channels, image_size)
    check_model_name(model)
    network = fresh_model(model, classes, shape[0], seed=0)
    if weights is not None:
        load_into(network, weights)
    inputs = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
    rows = table(model, ("file", "size", "batch", "max error"), right=("size", "max error"))
    for check in (
        export_onnx(network, inputs, paths[0], opset=opset),
        export_program(network, inputs, paths[1]),
    ):
        batch = f"1 only: {check.static_because}" if check.static_because else "any"
        rows.add_row(str(check.path), si(check.file_bytes, "B"), batch, f"{check.max_abs_error:.1e}")
    print_table(rows)
