"""What all tests share."""

import contextlib
import functools
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real data and published weights: $SECATEUR_SHARED_DATA, or shared/data beside the checkout."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SECATEUR_SHARED_DATA") or beside)
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; set SECATEUR_SHARED_DATA to the folder of data and weights")
    return folder


@pytest.fixture(scope="session", autouse=True)
def one_table_of_onnx_operators() -> Iterator[None]:
    """PyTorch's exporter builds it for every file, which takes longer than to write a small network."""
    with pytest.MonkeyPatch.context() as patch:
        with contextlib.suppress(ImportError, AttributeError):  # it is not public
            from torch.onnx._internal.exporter._registration import ONNXRegistry

            built = functools.cache(ONNXRegistry.from_torchlib)
            patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(built))
        yield


def pytest_collection_finish() -> None:
    """The garbage collector leaves alone what is imported, and goes through all the rest less often."""
    gc.freeze()
    gc.set_threshold(700, 10, 50)


torch.set_num_threads(1)  # two test processes share the machine; threads of both would wait for each other
