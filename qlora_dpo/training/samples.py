"""Answers to fixed prompts, adapter off and on, printed at each evaluation and kept in samples.jsonl."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qlora_dpo.models.generation import generate


class SamplePrinter:
    """Shows how the answers to a few held-out prompts change while the adapter trains."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        file: Path,
        *,
        max_new_tokens: int,
        end_id: int,
        pause: Callable[[], None],
    ) -> None:
        """`pause` is called after each token and may raise to stop there."""
        self._model, self._tokenizer = model, tokenizer
        self._prompts, self._file = prompts, file
        self._settings: dict[str, Any] = {
            "max_new_tokens": max_new_tokens, "end_token_ids": [end_id], "pause": pause,
        }  # fmt: skip
        self._before: list[str] | None = None

    def __call__(self, step: int) -> None:
        """Generate, print and record the answers at `step`; the answers before training are made once."""
        if not self._prompts:
            return
        if self._before is None:
            self._before = self._generate(use_reference=True)
        after = self._generate(use_reference=False)
        with self._file.open("a", encoding="utf-8") as file:
            for ids, before, now in zip(self._prompts, self._before, after, strict=True):
                prompt = self._tokenizer.decode(ids, skip_special_tokens=True).strip()
                row = {"step": step, "prompt": prompt, "before": before, "after": now}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                tqdm.write(f"step {step}  {prompt}\n  before: {before}\n  after:  {now}")

    def _generate(self, use_reference: bool) -> list[str]:
        return generate(self._model, self._tokenizer, self._prompts, use_reference=use_reference, **self._settings)
