"""How many positions a base knows: a table ends there, and rotations go on untrained."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from qlora_dpo.errors import UsageError

_PADDED = 2  # rows that some tables have in front of the first position (OPT)


def known_positions(config: Any) -> int | None:
    """The positions that the base was trained on, or that its scaling of rotations stretches these to; None for one
    without, such as ALiBi or a state-space model."""
    text = config.get_text_config()
    count = getattr(text, "max_position_embeddings", None)
    if not isinstance(count, int):
        return None
    ropes = getattr(text, "rope_parameters", None) or {}
    parts = [part for part in (ropes, *ropes.values()) if isinstance(part, dict)]
    stretched = [
        int((part.get("original_max_position_embeddings") or count) * part["factor"])
        for part in parts
        if part.get("rope_type", "default") != "default" and part.get("factor")
    ]
    return max([count, *stretched])


def table_of_positions(model: Any) -> int | None:
    """The rows of the model's table of positions, learned or computed; None where positions are rotated or not there.
    The weights may be on the meta device."""
    count = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(count, int) or getattr(model.config.get_text_config(), "rope_parameters", None):
        return None
    of_words = model.get_input_embeddings()
    tables = [
        module.weight.shape for module in model.modules() if isinstance(module, nn.Embedding) and module is not of_words
    ] + [buffer.shape for buffer in model.buffers() if buffer.dim() == 2]
    return count if any(shape[0] in (count, count + _PADDED) for shape in tables) else None


def room_for_answer(model: Any, prompt: int, asked: int) -> int:
    """How many of the tokens asked for a prompt of that many leaves room for; says once where they go past what the
    base knows.

    Raises:
        UsageError: the prompt alone fills the table of positions.
    """
    known = known_positions(model.config)
    if known is None or prompt + asked <= known:
        return asked
    table = table_of_positions(model)
    if table is None:
        _say_once(
            model,
            f"warning: prompts of {prompt} tokens and answers of up to {asked} go past the {known} positions that "
            "this model knows, where answers get worse. Lower --max_prompt_length or --max_new_tokens.",
        )
        return asked
    if prompt >= table:
        raise UsageError(
            f"a prompt of {prompt} tokens leaves no room for an answer: this model has {table} positions. Shorten it, "
            "or lower --max_prompt_length."
        )
    return table - prompt


def _say_once(model: Any, text: str) -> None:
    if not getattr(model, "_positions_were_said", False):
        model._positions_were_said = True
        print(text, file=sys.stderr)
