"""Rules about the text of one row."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from qlora_dpo.data.linting.findings import Rule
from qlora_dpo.data.preferences import PreferencePair
from qlora_dpo.data.saved_text import is_written_messages
from qlora_dpo.data.thoughts import THOUGHT_TAGS

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
# How a dialogue begins, and what must follow for it to be one.
_DIALOGUES: tuple[tuple[re.Pattern[str], re.Pattern[str] | None], ...] = (
    (
        re.compile(r"^[ \t]*(?:Human|User|用户|人类)[ \t]*[:：]", re.M | re.I),
        re.compile(r"^[ \t]*(?:Assistant|AI|Bot|助手)[ \t]*[:：]", re.M | re.I),
    ),
    (re.compile(r"\bUSER:"), re.compile(r"\bASSISTANT:")),
    (
        re.compile(r"^### ?(?:Instruction|Human|User|Question)\b", re.M),
        re.compile(r"^### ?(?:Response|Assistant|Answer)\b", re.M),
    ),
    (re.compile(r"\[INST\]"), re.compile(r"\[/INST\]")),
    (re.compile(r"<\|im_start\|>(?:system|user|assistant)\b"), None),
    (re.compile(r"<\|start_header_id\|>(?:system|user|assistant)\b"), None),
    (re.compile(r"<start_of_turn>(?:user|model)\b"), None),
    (re.compile(r"<\|(?:system|user)\|>"), re.compile(r"<\|assistant\|>")),
)
_LONGEST_TAG = max(len(tags.open) for tags in THOUGHT_TAGS)
_SHORTEST_PROMPT = 10  # bytes: an answer may well begin with a shorter one
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
            return f"{field} holds nothing that can be seen ({text[:20]!r})"
    return None


def _equal_but_for_space(pair: PreferencePair, _: Marks) -> str | None:
    if pair.chosen.split() == pair.rejected.split():
        return "the answers differ in nothing but white space"
    return None


def _template_residue(pair: PreferencePair, marks: Marks) -> str | None:
    return _residue(pair.chosen, marks) if marks.any.search(pair.chosen) else None


def _residue(text: str, marks: Marks) -> str | None:
    if found := marks.turn.search(text):
        return f"chosen goes on with another turn: {found[0]!r} at character {found.start()}"
    if found := marks.at_border.search(text):
        place = "ends" if found.end() == len(text) else "begins"
        return f"chosen {place} with {found[0].strip()!r} as text"
    return None


def _control_text(pair: PreferencePair, marks: Marks) -> str | None:
    for field, text in _texts(pair):
        found = marks.any.search(text)
        is_told_elsewhere = found and (_residue(text, marks) if field == "chosen" else _dialogue(field, text))
        if found and not is_told_elsewhere:
            return f"{field} holds {found[0]!r} at character {found.start()}"
    return None


def _answer_repeats_prompt(pair: PreferencePair, _: Marks) -> str | None:
    prompt = (pair.prompt if isinstance(pair.prompt, str) else pair.prompt[-1]["content"]).strip()
    repeated = bool(prompt) and all(answer.lstrip().startswith(prompt) for answer in (pair.chosen, pair.rejected))
    if repeated and len(prompt.encode(errors="replace")) >= _SHORTEST_PROMPT:
        return f"both answers begin with the prompt ({prompt[:20]!r})"
    return None


def _dialogue_in_prompt(pair: PreferencePair, _: Marks) -> str | None:
    return next((detail for field, text in _texts(pair) if (detail := _dialogue(field, text))), None)


def _dialogue(field: str, text: str) -> str | None:
    """Says where a dialogue begins in the text that a user wrote; a system prompt may show one."""
    if field != "prompt" and not field.endswith(".user"):
        return None
    for first, then in _DIALOGUES:
        found = first.search(text)
        if found and (then is None or then.search(text, found.end())):
            return f"{field} holds a dialogue as text, from {found[0].strip()!r} at character {found.start()} on"
    return None


def _messages_as_text(pair: PreferencePair, _: Marks) -> str | None:
    for field, text in _texts(pair):
        if is_written_messages(text):
            return f"{field} is a list of messages that was written as text ({text.strip()[:20]!r})"
    return None


def _open_thought(pair: PreferencePair, _: Marks) -> str | None:
    return _thought("chosen", pair.chosen)


def _open_thought_rejected(pair: PreferencePair, _: Marks) -> str | None:
    return _thought("rejected", pair.rejected)


def _thought(field: str, answer: str) -> str | None:
    begins = answer.lstrip()[:_LONGEST_TAG]
    for tags in THOUGHT_TAGS:
        if begins.startswith(tags.open) and answer.rfind(tags.open) > answer.rfind(tags.close):
            return f"{field} ends within a thought: {tags.open} without {tags.close} after it"
    return None


def _texts(pair: PreferencePair) -> Iterator[tuple[str, str]]:
    if isinstance(pair.prompt, str):
        yield "prompt", pair.prompt
    else:
        for number, message in enumerate(pair.prompt):
            yield f"prompt[{number}].{message['role']}", message["content"]
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
        "messages_as_text",
        "error",
        "prompts and answers that are a list of messages, written as JSON or as Python prints it",
        "Save the lists as lists (JSONL, Parquet), not as text: the model would learn to answer in JSON.",
        _messages_as_text,
        tolerated=0.01,
    ),
    Rule(
        "dialogue_in_prompt",
        "error",
        "prompts that hold a dialogue as text: Human: and Assistant:, [INST], <|im_start|>, ### Instruction",
        "Write its turns as messages: as text the whole dialogue is one question within the model's own template.",
        _dialogue_in_prompt,
        tolerated=0.01,
    ),
    Rule(
        "answer_repeats_prompt",
        "error",
        "pairs of which both answers begin with the prompt",
        "Cut the prompt off the answers: the model would learn to repeat the question before it answers.",
        _answer_repeats_prompt,
        tolerated=0.5,
    ),
    Rule(
        "open_thought",
        "error",
        "chosen answers that end within a thought: <think> without </think>, or within one that the template opens",
        "Close the thought or remove the row: the model would learn to think without an answer.",
        _open_thought,
        tolerated=0.01,
    ),
    Rule(
        "open_thought_rejected",
        "warning",
        "rejected answers that end within a thought",
        "Nothing to do where it is the endless thought that was rejected.",
        _open_thought_rejected,
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
