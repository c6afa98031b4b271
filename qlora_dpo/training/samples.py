"""Answers to fixed prompts, adapter off and on, printed at each evaluation and kept in samples.jsonl."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qlora_dpo.models.generation import generate
from qlora_dpo.training.records.mirrors import Samples


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
        mirror: Callable[[int, Samples], None] = lambda step, samples: None,
    ) -> None:
        """`pause` is called after each token and may raise to stop there; `mirror` is told the rows, too."""
        self._model, self._tokenizer, self._mirror = model, tokenizer, mirror
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
        texts = (self._tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in self._prompts)
        rows: Samples = [
            {"step": step, "prompt": prompt, "before": before, "after": now}
            for prompt, before, now in zip(texts, self._before, after, strict=True)
        ]
        for row in rows:
            tqdm.write("step {step}  {prompt}\n  before: {before}\n  after:  {after}".format(**row))
        self._mirror(step, rows)
        with self._file.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def _generate(self, use_reference: bool) -> list[str]:
        return generate(self._model, self._tokenizer, self._prompts, use_reference=use_reference, **self._settings)
