"""What the demo promises: terse answers become explained ones, and facts stay right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_dpo.cli import main


@pytest.mark.slow
@pytest.mark.parametrize("seed", [42, 1, 2])
def test_demo_reaches_its_goals(seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    assert main(["train", "--output_dir", str(out), "--seed", str(seed)]) == 0
    said = capsys.readouterr().out
    result = json.loads((out / "before_after.json").read_text(encoding="utf-8"))
    assert result["questions"] >= 60
    assert result["reward_accuracy"] >= 0.95
    assert result["terse_before"] >= 0.95 * result["questions"]
    assert result["explained_after"] >= 0.8 * result["terse_before"]
    assert result["right_before"] >= 0.95 * result["questions"]
    assert result["still_right_after"] >= 0.9 * result["right_before"]
    assert "Held-out reward accuracy" in said and "python -m eval app --adapter" in said
    assert main(["train", "--output_dir", str(out), "--seed", str(seed)]) == 0
    assert capsys.readouterr().out.count("Held-out reward accuracy") == 1  # shown again, not trained again


def test_option_that_the_demo_would_ignore_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--prompt_key", "question"]) == 2
    assert "--prompt_key question would be ignored" in capsys.readouterr().err
