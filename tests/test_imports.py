"""Functions of the user's own, by name."""

from pathlib import Path

import pytest

from secateur.errors import SecateurError
from secateur.imports import imported

SOURCE = "calls = []\ndef make(x=1):\n    calls.append(x)\n    return calls\n"


def test_a_function_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_net.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    for name in ("./my_net.py:make", f"{tmp_path / 'my_net.py'}:make", "my_net:make"):
        made = imported("model", name)
        assert made is imported("model", "my_net.py:make")  # one module, however it is named
    assert made(2) == [2]
    assert made.__module__ == "my_net"


def test_a_file_named_like_a_module_that_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text(SOURCE)
    assert imported("model", f"{tmp_path / 'json.py'}:make")() == [1]
    import json

    assert json.loads("1") == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "cannot import '.*no.py': no such file"),
        ("x = 1", "has no function 'make'"),
        ("raise RuntimeError('it broke')", "cannot import .*: it broke"),
        ("def make(:", "cannot import .*: invalid syntax"),
    ],
)
def test_what_goes_wrong_is_said(tmp_path: Path, source: str | None, message: str) -> None:
    path = tmp_path / "no.py"
    if source is not None:
        path.write_text(source)
    with pytest.raises(SecateurError, match=message):
        imported("model", f"{path}:make")
