"""`hh-rlhf`: chosen and rejected as whole dialogues, as Anthropic's hh-rlhf writes them (Anima).

Rules: white space around a turn and before the first marker is no part of it; two turns of one speaker in a
row become one, joined with a blank line (a repair); all else that is not Human, Assistant, Human, ... is
refused.
"""

from __future__ import annotations

import re
from typing import Any

from qlora_dpo.data.messages import check_texts_only, check_turns
from qlora_dpo.data.preferences import ColumnNames, Message, NoPlaceError, ParsedPair, PreferencePair, RowError
from qlora_dpo.data.values import Values, all_text, is_empty, text_of

COLUMNS = "chosen, rejected (dialogues '\\n\\nHuman: ... \\n\\nAssistant: ...')"
EXAMPLE: dict[str, Any] = {
    "chosen": "\n\nHuman: What is 2 + 3?\n\nAssistant: 5",
    "rejected": "\n\nHuman: What is 2 + 3?\n\nAssistant: 6",
}

JOINED_TURNS = "two turns in a row by the same speaker, joined with a blank line"
DIALOGUE = "a dialogue in the text of the prompt, read as its turns"

# Begins with a plain character, which makes the search five times faster; a \r before it is stripped anyway.
_MARKER = re.compile(r"\n\r?\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_SPEAKERS = {role: speaker for speaker, role in _ROLES.items()}


def holds_dialogues(values: Values, names: ColumnNames) -> bool:
    """Both answers are texts that begin as a dialogue does."""
    return all_text(values, names.chosen, names.rejected) and all(
        values[column].lstrip().startswith("Human:") for column in (names.chosen, names.rejected)
    )


def reads(names: ColumnNames) -> tuple[str, ...]:
    """The columns of this form."""
    return names.prompt, names.chosen, names.rejected


def matches(values: Values, names: ColumnNames) -> bool:
    """Tell by its columns whether a row has this form."""
    # An instruction beside whole dialogues could mean either; the user has to say.
    return "instruction" not in values and holds_dialogues(values, names)


def parse(values: Values, names: ColumnNames) -> ParsedPair:
    """Read a row. Raises: RowError."""
    chosen, chosen_joined = split_dialogue(names.chosen, text_of(values, names.chosen))
    rejected, rejected_joined = split_dialogue(names.rejected, text_of(values, names.rejected))
    history = common_history(chosen, rejected)
    if not is_empty(values.get(names.prompt)) and not _holds(history, text_of(values, names.prompt)):
        reason = f"holds dialogues of which {names.prompt} is no part (--ignore_columns {names.prompt} leaves it out)"
        raise RowError(names.chosen, reason)
    pair = PreferencePair(history, chosen[-1]["content"], rejected[-1]["content"])
    return ParsedPair(pair, (JOINED_TURNS,) if chosen_joined or rejected_joined else ())


def write(pair: PreferencePair) -> dict[str, Any]:
    """Make a row. Raises: RowError when the prompt is no dialogue, or a text would be read back as another."""
    check_texts_only(pair)
    messages = pair.messages
    if messages[0]["role"] == "system":
        raise NoPlaceError("prompt", "a system prompt", "system")
    check_turns("prompt", messages)
    for text in (*(message["content"] for message in messages), pair.chosen, pair.rejected):
        if text != text.strip():
            raise NoPlaceError("text", "white space around a turn", "whitespace")
        if _MARKER.search(text):
            raise RowError("text", "a turn holds a marker of the format (an empty line, then Human: or Assistant:)")
    before = "".join(f"\n\n{_SPEAKERS[message['role']]}: {message['content']}" for message in messages)
    before += "\n\nAssistant: "
    return {"chosen": before + pair.chosen, "rejected": before + pair.rejected}


def split_dialogue(field: str, text: str) -> tuple[list[Message], bool]:
    """Cut one dialogue into its turns, the last of which is the answer.

    Returns the turns and whether turns had to be joined.

    Raises:
        RowError: when the text is not a dialogue that ends with an answer.
    """
    before, *pieces = _MARKER.split("\n\n" + text.strip())
    if before.strip():
        raise RowError(field, f"text before the first marker ({len(before.strip())} characters)")
    if not pieces:
        raise RowError(field, "holds no dialogue")
    speakers, texts = pieces[0::2], [piece.strip() for piece in pieces[1::2]]
    if speakers[0] != "Human":
        raise RowError(field, "the dialogue does not start with Human")
    if speakers[-1] != "Assistant":
        raise RowError(field, "the dialogue ends with Human, so there is no answer")
    _refuse_empty_turns(field, texts)
    return _join_repeated(speakers, texts)


def open_dialogue(text: str) -> tuple[Message, ...] | None:
    """The turns of a text that is a dialogue and waits for an answer, None where it is none.

    It ends with Human, or with an empty turn of Assistant. One turn of Human alone is a dialogue where empty lines
    stand before its marker; without them it may be what somebody asked.
    """
    start = len(text) - len(text.lstrip())
    if not text.startswith("Human:", start):
        return None
    pieces = _MARKER.split("\n\n" + text.strip())[1:]
    speakers, texts = pieces[0::2], [piece.strip() for piece in pieces[1::2]]
    if speakers[-1] == "Assistant" and not texts[-1]:
        speakers, texts = speakers[:-1], texts[:-1]
    elif len(speakers) == 1 and text.count("\n", 0, start) < 2:
        return None
    return tuple(_join_repeated(speakers, texts)[0]) if speakers[-1] == "Human" and all(texts) else None


def answer_in_dialogue(text: str) -> str:
    """The answer to an open dialogue, without the space and the marker before it."""
    return text.strip().removeprefix("Assistant:").strip()


def _holds(history: tuple[Message, ...], prompt: str) -> bool:
    """The prompt is the whole dialogue before the answers, or a question in it."""
    return open_dialogue(prompt) == history or any(
        turn["role"] == "user" and turn["content"] == prompt.strip() for turn in history
    )


def common_history(chosen: list[Message], rejected: list[Message]) -> tuple[Message, ...]:
    """Return the turns before the answers.

    Raises:
        RowError: when the two histories are not the same.
    """
    if chosen[:-1] == rejected[:-1]:
        return tuple(chosen[:-1])
    shorter = min(len(chosen), len(rejected)) - 1
    turn = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter) + 1
    raise RowError("rejected", f"its history differs from that of chosen (turn {turn})")


def _refuse_empty_turns(field: str, texts: list[str]) -> None:
    if not texts[-1]:
        raise RowError(field, "the answer is empty")
    for number, text in enumerate(texts, 1):
        if not text:
            raise RowError(field, f"a turn of the history is empty (turn {number})")


def _join_repeated(speakers: list[str], texts: list[str]) -> tuple[list[Message], bool]:
    turns: list[Message] = []
    for speaker, text in zip(speakers, texts, strict=True):
        role = _ROLES[speaker]
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += "\n\n" + text
        else:
            turns.append({"role": role, "content": text})
    return turns, len(turns) < len(texts)
