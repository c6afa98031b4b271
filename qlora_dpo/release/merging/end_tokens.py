"""The tokens at which programs stop: those of the base, and the one that ended every answer in training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qlora_dpo.data.tokenization import PairTokenizer
from qlora_dpo.errors import UsageError
from qlora_dpo.release.artefact import Artefact, tokenizer_of

FILE = "generation_config.json"


def write_end_tokens(artefact: Artefact, base: Path, folder: Path) -> str | None:
    """Write the base's generation_config.json with training's end token among those it names; returns that token where
    the base did not stop at it."""
    if (base / FILE).is_file():
        (folder / FILE).write_bytes((base / FILE).read_bytes())
    tokenizer = tokenizer_of(artefact)
    try:
        end_id = PairTokenizer(tokenizer).end_id if tokenizer.chat_template else None
    except UsageError:  # nothing ends an answer, or another tool's template cannot be used
        end_id = None
    content: dict[str, Any] = _read(base / FILE)
    named = content.get("eos_token_id", _read(base / "config.json").get("eos_token_id"))
    ends = named if isinstance(named, list) else [] if named is None else [named]
    if end_id is None or end_id in ends:
        return None
    content["eos_token_id"] = [*ends, end_id]
    (folder / FILE).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return f"{tokenizer.convert_ids_to_tokens(end_id)} ({end_id})"


def _read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return content
