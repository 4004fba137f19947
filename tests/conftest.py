"""What all tests share."""

import os
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


torch.set_num_threads(1)  # two test processes share the machine; threads of both would wait for each other
