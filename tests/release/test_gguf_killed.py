"""A `release gguf` that was killed while its files took their names is repeated by the same command."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf_models import make_family, write

from qlora_dpo.cli import main


class Killed(BaseException):
    """What ends the command between two renames."""


@pytest.fixture(scope="module")
def folder(sentencepiece_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_family("mistral", tmp_path_factory.mktemp("models") / "model", sentencepiece_file)


def killed_at(rename: int, folder: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write parts, and end before the rename of this number."""
    own, count = Path.rename, 0

    def counted(path: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count == rename:
            raise Killed
        return own(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", counted)
        with pytest.raises(Killed):
            write(folder, output, "--max_shard_size", "120KB")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("size", ["120KB", "70KB"])
@pytest.mark.parametrize("rename", [1, 2, 3, 4, 5])
def test_the_same_command_repeats_it(
    rename: int, size: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also into parts of another size: what was left does not stay."""
    for place in ("whole", "killed"):
        (tmp_path / place).mkdir()
    write(folder, tmp_path / "whole" / "m.gguf", "--max_shard_size", size)
    killed_at(rename, folder, tmp_path / "killed" / "m.gguf", monkeypatch)
    write(folder, tmp_path / "killed" / "m.gguf", "--max_shard_size", size)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert len(content(tmp_path / "whole")) >= 5


def test_a_whole_model_and_parts_of_others_stay(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "m.gguf"
    write(folder, file, "--max_shard_size", "120KB")
    before = content(tmp_path)
    assert main(["release", "gguf", str(folder), "--output", str(file), "--max_shard_size", "120KB"]) == 2
    assert "exists" in capsys.readouterr().err
    assert content(tmp_path) == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "m-00002-of-00009.gguf").write_bytes(b"GGUF")
    assert main(["release", "gguf", str(folder), "--output", str(other / "m.gguf")]) == 2
    assert content(other) == {"m-00002-of-00009.gguf": b"GGUF"}
