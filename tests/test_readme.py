"""The README's Python runs as it stands."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"


def test_the_snippets_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("torchvision")
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    scope: dict[str, object] = {
        "epochs": 2,
        "loader": [(torch.randn(2, 3, 64, 64), torch.tensor([0, 1]))],
    }
    for snippet in snippets:
        assert len([line for line in snippet.splitlines() if line.strip()]) <= 15
        exec(snippet, scope)
    printed = capsys.readouterr().out
    assert re.search(r"MACs: [\d,]+ -> [\d,]+ \((49\.\d|50\.0)% kept\)", printed)
    assert "equal to the masked original" in printed
    x = torch.randn(2, 3, 224, 224)
    assert scope["session"].finish().proof.ok
    pruned = scope["pruned"].model.eval()
    torch.testing.assert_close(scope["small"].eval()(x), pruned(x), rtol=0, atol=0)
    assert sum(p.numel() for p in scope["model"].parameters()) < 11_689_512  # cut in place
