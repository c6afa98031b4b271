"""A crash of llama.cpp is said, and does not end the command without a word."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from qlora_dpo.errors import ModelError
from qlora_dpo.release.checking import replay_llama_cpp
from qlora_dpo.release.checking.replay import Answer, Expected


def crash(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_crash_is_an_error_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay_llama_cpp, "replay", crash)
    expected = Expected(None, [Answer((1,), (2,), "", True)], 2, 8, 4, 0.0, 0.0)
    with pytest.raises(ModelError, match=r"llama\.cpp crashed"):
        replay_llama_cpp.llama_cpp_answers(Path("model.gguf"), [[]], expected)
