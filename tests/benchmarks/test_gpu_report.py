"""The report: nothing is left out that was not measured, and its few sums are right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.jobs import make_jobs
from benchmarks.gpu.lengths import LONGEST, cut_as_seed, seed_lengths
from benchmarks.gpu.report import headline, report
from benchmarks.gpu.rows import NOT_MEASURED, Row
from benchmarks.gpu.scale import SCALES
from benchmarks.gpu.tables import best_trl
from benchmarks.processes import RESULTS, ROOT

HEAD = {"scale": "real", "seed": 0, "minutes": 8, "runs": []}
JOBS = make_jobs(SCALES["real"])


def speed(name: str, seconds: float, **values: object) -> Row:
    common = {"seconds": [seconds] * 3, "pairs_per_second": 16 / seconds, "tokens_per_second": 1.0, "peak_gib": 50.0}
    return Row("speed", name, common | values)


OURS = speed("33B: ours, reference known", 2.0, reference_seconds=0.8, preflight_seconds=9.0, pairs_per_step=16)
TRL = [speed("33B: TRL, one", 8.0, reference_seconds=4.0), speed("33B: TRL, two", 9.0, reference_seconds=1.0)]


def test_every_row_is_there_before_anything_is_measured() -> None:
    text = report(HEAD, [], JOBS)
    names = {name.replace("|", "\\|") for job in JOBS for table, name in job.rows if table != "split"}
    for name in names:
        assert f"| {name} | {NOT_MEASURED} |" in text
    assert text.count(NOT_MEASURED) > len(names)


def test_headline_is_made_from_the_measured_steps() -> None:
    found = headline({(OURS.table, OURS.name): OURS})
    assert found is not None
    assert found["known"] == pytest.approx(200) and found["first"] == pytest.approx(200 + 1000 * 0.8 / 16)
    text = report(HEAD, [OURS], JOBS)
    assert "| 100 steps of 16 pairs, 33B, r=256; the reference known | 200 | 1/90.0 |" in text
    assert "the median of 3 measured steps (2.00 s)" in text


def test_like_is_compared_with_like() -> None:
    rows = {(row.table, row.name): row for row in TRL}
    assert best_trl("33B", rows, first_epoch=False) == ("TRL, one", 8.0)
    assert best_trl("33B", rows, first_epoch=True) == ("TRL, two", 10.0)
    assert best_trl("7B", rows, first_epoch=True) is None
    text = report(HEAD, [OURS, speed("33B: ours, first epoch", 2.5), *TRL], JOBS)
    assert "| pairs/s against TRL, 33B, reference known | 4.0 times (TRL, one) |" in text
    assert "| pairs/s against TRL, 33B, first epoch | 4.0 times (TRL, two) |" in text


def test_what_failed_is_said() -> None:
    values = {"passed": False, "found": "1", "limit": "0", "how": "made"}
    rows = [Row("checks", "out of memory", values), Row("caps", "33B, r=16, 24 GB", note="stopped after 60 s")]
    text = report(HEAD, rows, JOBS)
    assert "| out of memory | **FAILED** | 1 | 0 | made |" in text
    assert text.count("| 33B, r=16, 24 GB | stopped after 60 s |") == 2


def test_lengths_are_cut_as_the_seed_cuts_them() -> None:
    assert cut_as_seed((100, 700, 20)) == (100, 500, 20)
    assert cut_as_seed((900, 5, 5)) == (598, 2, 2)
    lengths = seed_lengths()
    assert len(lengths) == 434 and all(p + max(c, r) <= LONGEST for p, c, r in lengths)
    assert min(min(row) for row in seed_lengths(shorter=8)) >= 2


def test_empty_tables_are_written_and_never_over_measured_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "gpu"
    assert main(["--empty", "--output", str(output)]) == 0
    assert NOT_MEASURED in (tmp_path / "gpu.md").read_text()
    results = json.loads((tmp_path / "gpu.json").read_text())
    (tmp_path / "gpu.json").write_text(json.dumps(results | {"rows": [{"values": {"x": 1}}]}))
    for words in (["--empty"], ["--only", "memory"]):
        with pytest.raises(SystemExit):
            main([*words, "--output", str(output)])
        assert f"{words[0]} would replace the measured rows" in capsys.readouterr().err


def test_tiny_numbers_do_not_replace_measured_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--tiny"])
    assert "--output" in capsys.readouterr().err


def test_real_shapes_are_not_tried_on_a_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "hardware", lambda: {"gpus": []})
    with pytest.raises(SystemExit, match="names no GPU"):
        main(["--output", str(tmp_path / "gpu")])
    assert list(tmp_path.iterdir()) == []


def test_results_of_another_card_are_not_continued(tmp_path: Path) -> None:
    (tmp_path / "gpu.json").write_text(json.dumps(HEAD | {"rows": [], "runs": [{"gpus": ["another"], "torch": "1"}]}))
    with pytest.raises(SystemExit, match="measured elsewhere"):
        main(["--continue", "--output", str(tmp_path / "gpu")])
    with pytest.raises(SystemExit, match="nothing to continue"):
        main(["--continue", "--output", str(tmp_path / "missing")])


def test_what_waits_for_the_measurements_stays_small() -> None:
    code = "import sys, benchmarks.gpu.__main__; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_stored_results_have_a_line_for_every_row_of_today() -> None:
    text = (RESULTS / "gpu.md").read_text(encoding="utf-8")
    for job in JOBS:
        for table, name in job.rows:
            assert table == "split" or f"| {name.replace('|', chr(92) + '|')} |" in text, name


@pytest.mark.slow
def test_a_tiny_run_measures_everything_that_a_cpu_can(tmp_path: Path) -> None:
    assert main(["--tiny", "--output", str(tmp_path / "gpu")]) == 0
    rows = [Row(**row) for row in json.loads((tmp_path / "gpu.json").read_text())["rows"]]
    owed = {key for job in make_jobs(SCALES["tiny"]) for key in job.rows}
    assert {(row.table, row.name) for row in rows} == owed
    assert {row.note for row in rows if not row.values} == {"needs CUDA"}
    assert {row.table for row in rows if row.note} == {"checks", "caps"}
    text = (tmp_path / "gpu.md").read_text()
    assert NOT_MEASURED not in text.partition("## Rows for the README")[0] and "toy shapes" in text.lower()
