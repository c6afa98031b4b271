"""A run folder that a kill left before it held anything is still the run's own; any other folder is not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qlora_dpo.errors import UsageError
from qlora_dpo.training.folder.run_folder import CONFIG, STATUS, held_run_folder, open_run_folder


def test_kill_before_the_first_file_has_its_name_leaves_a_folder_that_continues(tmp_path: Path) -> None:
    run = tmp_path / "run"
    pid = os.fork()
    if pid == 0:
        Path.replace = lambda *_: os._exit(9)  # type: ignore[method-assign, assignment]
        open_run_folder(run, {"seed": 1}, fresh=False)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    (left,) = run.iterdir()
    assert left.name == f".{STATUS}.{pid}.tmp"
    with held_run_folder(run, {"seed": 1}, fresh=False):
        assert (run / CONFIG).is_file()


@pytest.mark.parametrize("name", ["thesis.tex", ".hidden", "config.yaml.tmp"])
def test_folder_of_something_else_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match="no run of this tool"):
        open_run_folder(tmp_path, {"seed": 1}, fresh=False)
    assert (tmp_path / name).read_text() == "mine"
