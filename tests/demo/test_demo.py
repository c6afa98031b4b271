"""What the demo promises: terse answers become explained ones, and facts stay right."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import yaml

from qlora_dpo.cli import main

FLIPPED = slice(3, None, 8)  # 14 of the 108 held-out pairs


@pytest.fixture(scope="module", params=[42, 1, 2])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The demo's run of a seed, and what it printed."""
    out, said = tmp_path_factory.mktemp("runs") / "demo", io.StringIO()
    with redirect_stdout(said):
        assert main(["train", "--output_dir", str(out), "--seed", str(request.param)]) == 0
    return out, said.getvalue()


@pytest.mark.slow
def test_demo_reaches_its_goals(trained: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    out, said = trained
    result = json.loads((out / "before_after.json").read_text(encoding="utf-8"))
    assert result["questions"] >= 60
    assert result["reward_accuracy"] >= 0.95
    assert result["terse_before"] >= 0.95 * result["questions"]
    assert result["explained_after"] >= 0.8 * result["terse_before"]
    assert result["right_before"] >= 0.95 * result["questions"]
    assert result["still_right_after"] >= 0.9 * result["right_before"]
    assert "Held-out reward accuracy" in said and "python -m eval app --adapter" in said
    seed = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))["seed"]
    assert main(["train", "--output_dir", str(out), "--seed", str(seed)]) == 0
    assert capsys.readouterr().out.count("Held-out reward accuracy") == 1  # shown again, not trained again


@pytest.mark.slow
def test_score_finds_the_labels_that_were_turned_around(trained: tuple[Path, str], tmp_path: Path) -> None:
    out, _ = trained
    rows = [json.loads(line) for line in (out / "pairs" / "held_out.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows[FLIPPED]:
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    pairs, scores = tmp_path / "new_pairs.jsonl", tmp_path / "scores.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert main(["score", "--adapter", str(out), "--dataset", str(pairs), "--output", str(scores)]) == 0
    margins = [json.loads(line)["margin"] for line in scores.read_text(encoding="utf-8").splitlines()]
    assert [margin < 0 for margin in margins] == [number in range(len(rows))[FLIPPED] for number in range(len(rows))]
    flipped = json.loads((tmp_path / "scores.summary.json").read_text(encoding="utf-8"))["flipped_labels"]
    assert flipped["low"] < len(rows[FLIPPED]) / len(rows) < flipped["high"]


def test_option_that_the_demo_would_ignore_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--prompt_key", "question"]) == 2
    assert "--prompt_key question would be ignored" in capsys.readouterr().err
