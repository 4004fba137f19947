"""What the tests of trainers share, and which files hold tests: the others import a framework, which may be missing."""

import pytest

from tests.methods.examples import analyze_once

collect_ignore = ["huggingface_run.py", "lightning_run.py", "ultralytics_run.py"]


@pytest.fixture(autouse=True)
def analysed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network of these tests is analysed once for all of them."""
    monkeypatch.setattr("secateur.engine.method.analyze", analyze_once)
