"""`secateur doctor`."""

import json
from typing import Any

import typer

from secateur.cli.flags import Given, command, flag

PACKAGES = "secateur torch torchvision timm onnx onnxruntime safetensors numpy scipy accelerate".split()


@command(flag("json", bool, "Print JSON."))
def doctor(given: Given) -> None:
    """Show versions, device, threads and what this machine computes fast: what a report of a problem needs."""
    found = examine()
    if "json" in given:
        typer.echo(json.dumps(found, indent=2))
        return
    from secateur.cli.show import print_table, table

    rows = table("This machine", ("", ""))
    rows.show_header = False
    for name, value in found.items():
        rows.add_row(
            name, value if isinstance(value, str) else "\n".join(f"{k} {v}" for k, v in value.items())
        )
    print_table(rows)


def examine() -> dict[str, Any]:
    """What there is to know about the machine, as plain JSON."""
    import os
    import platform
    import shutil
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from secateur.cost.latency import computes_bfloat16, device_name
    from secateur.runs.task import device

    def version_of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    home = device()
    vectors, threads = torch.backends.cpu.get_cpu_capability(), os.environ.get("OMP_NUM_THREADS", "not set")
    return {
        "Python": f"{platform.python_version()} on {platform.platform()}",
        "packages": {package: version_of(package) for package in PACKAGES},
        "device": f"{device_name(home)} ({home})",
        "CPU": f"{os.cpu_count()} cores, vector instructions {vectors}",
        "threads": f"{torch.get_num_threads()} by PyTorch, OMP_NUM_THREADS {threads}",
        "bfloat16": "computed by the processor"
        if computes_bfloat16(home)
        else "emulated: --precision bf16 will be slow",
        "oneDNN": "used" if torch._C._has_mkldnn else "missing: convolutions on CPUs will be slow",
        "C++ compiler": shutil.which("c++") or shutil.which("g++") or "none: --compile will not work on CPUs",
        "free disk": f"{shutil.disk_usage('.').free / 2**30:.1f} GiB in the working folder",
    }
