"""The guard of files to write: an input is no output, whatever it is called, and another program's file stays."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_dpo.cli import main
from qlora_dpo.errors import UsageError
from qlora_dpo.files.atomic import PNG_MARK, save_picture, write_whole
from qlora_dpo.files.guard import check_output, json_with, lines_with, marked, refuse_used_folder


@pytest.mark.parametrize("name", ["in.jsonl", "./in.jsonl", "sub/../in.jsonl", "hard.jsonl", "soft.jsonl"])
def test_an_input_is_no_output_under_any_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sub").mkdir()
    Path("in.jsonl").write_text("")  # not even an empty one
    Path("hard.jsonl").hardlink_to("in.jsonl")
    Path("soft.jsonl").symlink_to("in.jsonl")
    for source in ("in.jsonl", Path("in.jsonl").absolute(), "hard.jsonl"):
        with pytest.raises(UsageError, match=r"is where \S+ is read from"):
            check_output(Path(name), inputs=["org/none", source], is_own=lambda _: True)


def test_an_output_may_lie_beside_an_input_but_not_in_one(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    check_output(tmp_path / "out.jsonl", inputs=[tmp_path / "in"])
    with pytest.raises(UsageError, match="is read from"):
        check_output(tmp_path / "in" / "out.jsonl", inputs=[tmp_path / "in"])


def test_what_is_there_is_replaced_only_where_it_is_the_commands_own(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    check_output(file)
    file.touch()
    check_output(file)  # nothing is lost with an empty file
    file.write_text("mine")
    with pytest.raises(UsageError, match=r"--json \S+ exists and was not written by this command"):
        check_output(file, is_own=json_with("rules"), option="json")
    with pytest.raises(UsageError, match=r"^\S+out.json exists\. Name another --output, or move it away\.$"):
        check_output(file, option=None)
    check_output(file, is_own=lambda _: True)
    assert file.read_text() == "mine"


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("nowhere", path)])
def test_a_folder_a_device_and_a_link_are_no_files_to_write(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "out")
    with pytest.raises(UsageError, match=r"is a (link|folder or a device)"):
        check_output(tmp_path / "out", is_own=lambda _: True)


def test_a_folder_to_write_is_new_or_empty_and_no_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "empty").mkdir()
    refuse_used_folder(tmp_path / "new")
    refuse_used_folder(tmp_path / "empty")
    for used in (tmp_path, tmp_path / "link"):
        with pytest.raises(UsageError, match="is in use"):
            refuse_used_folder(used)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"a": 1}', b'{"a": 1, "b"', b"\xff\x00", b"[" * 9999, b'"ab"'])
def test_other_content_is_not_taken_for_the_commands_own(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(content)
    assert not json_with("a", "b")(file)
    assert not lines_with(lambda row: row["b"]["c"])(file)
    assert not marked(b"by me")(file)


def test_own_content_is_recognized(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    file = tmp_path / "file"
    write_whole(file, b'{"a": 1, "b": {"c": 1}, "more": []}\n{"torn')
    assert lines_with(lambda row: row["b"]["c"])(file)
    write_whole(file, b'{"a": 1, "b": 2}')
    assert json_with("a", "b")(file)
    save_picture(Figure(), file, dpi=20)
    assert marked(PNG_MARK)(file) and file.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_link_under_a_staged_name_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    (tmp_path / f".out.{os.getpid()}.tmp").symlink_to("thesis.tex")
    write_whole(tmp_path / "out", b"new")
    assert (tmp_path / "thesis.tex").read_text() == "mine" and (tmp_path / "out").read_text() == "new"


def test_the_same_command_replaces_its_own_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs, results = tmp_path / "pairs.jsonl", [tmp_path / name for name in ("a.json", "a.png", "b.json")]
    pairs.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 2)
    for _ in range(2):
        assert main(["data", "inspect", str(pairs), "--json", str(results[0]), "--png", str(results[1])]) == 0
        assert main(["data", "lint", str(pairs), "--json", str(results[2]), "--lint", "warn"]) == 0
    capsys.readouterr()
    assert main(["data", "lint", str(pairs), "--json", str(results[0])]) == 2  # another command's result
    assert "was not written by this command" in capsys.readouterr().err
