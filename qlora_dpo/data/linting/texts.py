"""Rules about the text of one row."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from qlora_dpo.data.linting.findings import Rule
from qlora_dpo.data.preferences import PreferencePair

# Where a turn begins in well-known templates. Models that were trained on runs of these write the user's turn too.
_TURNS = (
    r"\n\n(?:Human|Assistant):",
    r"<\|im_start\|>",
    r"\[INST\]",
    r"<\|start_header_id\|>",
    r"<start_of_turn>",
    r"<\|(?:user|assistant|system)\|>",
    r"\n### (?:Instruction|Response|Human|Assistant):",
)
# Control tokens of well-known models, for data that were rendered for another one than is trained now.
_WELL_KNOWN = (
    "<s>", "</s>", "<|endoftext|>", "<|im_end|>", "<|begin_of_text|>", "<|end_of_text|>", "<|end_header_id|>",
    "<|eot_id|>", "[/INST]", "<<SYS>>", "<</SYS>>", "<bos>", "<eos>", "<end_of_turn>", "<|end|>", "<|eom_id|>",
)  # fmt: skip
_VISIBLE = re.compile(r"[^\s\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2064\u3164\ufeff]")


@dataclass(frozen=True, slots=True)
class Marks:
    """Text that only a template should write."""

    turn: re.Pattern[str]
    at_border: re.Pattern[str]
    any: re.Pattern[str]


TextCheck = Callable[[PreferencePair, Marks], str | None]


def find_marks(control_texts: Iterable[str] = ()) -> Marks:
    """The marks of well-known templates and these texts, a tokenizer's own control tokens."""
    # A tokenizer may have declared an ordinary word a control token.
    own = (text for text in control_texts if text and not text.isalnum())
    texts = sorted({*_WELL_KNOWN, *own}, key=len, reverse=True)
    turn, control = "|".join(_TURNS), "|".join(map(re.escape, texts))
    return Marks(
        re.compile(turn), re.compile(rf"\A\s*(?:{control})|(?:{control})\s*\Z"), re.compile(f"{turn}|{control}")
    )


def _empty_answer(pair: PreferencePair, _: Marks) -> str | None:
    for field, text in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if not _VISIBLE.search(text):
            return f"{field} holds nothing that can be seen ({text[:20]!a})"
    return None


def _equal_but_for_space(pair: PreferencePair, _: Marks) -> str | None:
    if pair.chosen.split() == pair.rejected.split():
        return "the answers differ in nothing but white space"
    return None


def _template_residue(pair: PreferencePair, marks: Marks) -> str | None:
    return _residue(pair.chosen, marks) if marks.any.search(pair.chosen) else None


def _residue(text: str, marks: Marks) -> str | None:
    if found := marks.turn.search(text):
        return f"chosen goes on with another turn: {found[0]!a} at character {found.start()}"
    if found := marks.at_border.search(text):
        place = "ends" if found.end() == len(text) else "begins"
        return f"chosen {place} with {found[0].strip()!a} as text"
    return None


def _control_text(pair: PreferencePair, marks: Marks) -> str | None:
    for field, text in _texts(pair):
        found = marks.any.search(text)
        if found and not (field == "chosen" and _residue(text, marks)):
            return f"{field} holds {found[0]!a} at character {found.start()}"
    return None


def _texts(pair: PreferencePair) -> Iterator[tuple[str, str]]:
    if isinstance(pair.prompt, str):
        yield "prompt", pair.prompt
    else:
        yield from ((f"prompt[{number}]", message["content"]) for number, message in enumerate(pair.prompt))
    yield "chosen", pair.chosen
    yield "rejected", pair.rejected


TEXT_RULES: tuple[Rule[TextCheck], ...] = (
    Rule(
        "empty_answer",
        "error",
        "answers without a character that can be seen",
        "Write the missing answer or remove the row: the model would learn to say nothing.",
        _empty_answer,
    ),
    Rule(
        "template_residue",
        "error",
        "chosen answers with a control token's text at their border, or with the marker of another turn",
        "Cut it off: the model would learn to spell the token out, or to speak for the user.",
        _template_residue,
        tolerated=0.01,
    ),
    Rule(
        "control_text",
        "warning",
        "the text of control tokens and turn markers anywhere else",
        "Nothing to do where the text speaks about templates. It is trained on as text, never as a control token.",
        _control_text,
    ),
    Rule(
        "equal_but_for_space",
        "warning",
        "answers that differ in white space alone",
        "Remove the row unless white space is what you want to teach.",
        _equal_but_for_space,
    ),
)
