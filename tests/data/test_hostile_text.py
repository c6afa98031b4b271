"""Text of data files, their names and columns: whatever a command says of it, the terminal is not steered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_dpo.cli import main

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\r"


def test_data_cannot_steer_the_terminal(
    write_jsonl: Callable[..., str], model_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows: list[Any] = [
        {"prompt": f"w1{HOSTILE}", "chosen": f"<s>{HOSTILE}", "rejected": HOSTILE, "category": f"{HOSTILE}\x1b[31m"},
        {"prompt": [{"role": HOSTILE, "content": "w1"}], "chosen": "w2", "rejected": "w3"},
        {"prompt": "w4", "chosen": "w5", "rejected": "w6", HOSTILE: HOSTILE},
        f'{{"prompt": "{HOSTILE}',
    ]
    file = write_jsonl(rows)
    named = ["--model_name_or_path", str(model_folder)]
    for words in (
        ["data", "lint", file],
        ["data", "lint", file, *named, "--preview", "3"],
        ["data", "inspect", file],
        ["data", "inspect", file, *named],
        ["data", "convert", file, "--to", "plaintext", "--output", f"{file}.csv"],
        ["data", "lint", f"{file}{HOSTILE}"],
        ["train", *named, "--dataset", file, "--output_dir", f"{file}.run"],
    ):
        main(words)
        said = "".join(capfd.readouterr())
        assert said
        assert not [character for character in said if not character.isprintable() and character not in "\n\t"], said
