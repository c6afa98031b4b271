"""What a chat template writes for an answer behind its generation prompt.

Prompt and completion together are the template's own rendering of the conversation, up to and with the last control
token before the next turn. Where the generation prompt opens a thought, the answer goes on inside it, or closes it as
the template itself does. What the template cannot write so is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import takewhile

from qlora_dpo.data.preferences import Message, RowError
from qlora_dpo.data.thoughts import ThoughtTags, inline_thought, opened_thought

OTHERWISE = "the chat template does not write the answer behind its own generation prompt"
OPEN_THOUGHT = "the answer would end inside the thought that the generation prompt opens"


@dataclass(frozen=True, slots=True)
class Completion:
    """A rendered answer; `has_end` is False where the template writes no end token and eos is to be added."""

    text: str
    has_end: bool


@dataclass(slots=True)
class AnswerForm:
    """What the template writes behind an answer, and the token that ends the turn.

    `end` is that token as the template writes it, None where it writes none and eos is added; `trailer` is what comes
    behind it at the end of a conversation and belongs to no answer.
    """

    end: str | None
    trailer: str
    control: re.Pattern[str]
    end_id: int = -1
    tags: ThoughtTags | None = None
    """What the template marks thoughts by; None where it knows none."""


def closing_of(whole: str, next_turn: str, answer: str, control: re.Pattern[str]) -> AnswerForm:
    """Learn the form from a rendered conversation that ends with `answer`, and from one that goes on with a question.

    What both have in common up to its last control token ends the answer; where they have no control token in common
    (gpt-oss ends only the last answer with `<|return|>`), the last one of the first does.
    """
    (before, _, behind), followed = whole.rpartition(answer), next_turn.rpartition(answer)[2]
    pieces = list(zip(_pieces(behind, control), _pieces(followed, control), strict=False))
    common = "".join(piece for piece, _ in takewhile(lambda pair: pair[0] == pair[1], pieces))
    ends = [*control.finditer(common)] or [*control.finditer(behind)]
    rest = behind[len(common) :].strip()
    if rest and rest in before and len(ends) > 1 and ends[-1].end() == len(common):
        ends.pop()  # a template that always writes the next generation prompt: this token begins it
    if not ends:
        return AnswerForm(None, behind, control)
    return AnswerForm(ends[-1][0], behind[ends[-1].end() :], control)


def find_completion(
    prompt: str, whole: str, answer: Message, form: AnswerForm, render: Callable[[Message], str]
) -> Completion:
    """The completion of one conversation; `render` renders it with the answer written in another way.

    Raises:
        RowError: the template cannot write this answer behind this prompt.
    """
    if answer.get("reasoning_content") and inline_thought(answer["content"]) is not None:
        raise RowError("answer", "the answer has two thoughts, one in its text and another one apart")
    written = _behind(prompt, whole, answer)
    if written is None:
        written = next(_otherwise_written(prompt, whole, answer, form, render), None)
    if written is None:
        raise _refusal(prompt, whole, answer)
    opened = opened_thought(prompt)
    if opened is not None and opened[1].close not in written:
        raise RowError("answer", OPEN_THOUGHT)
    return _cut(written, answer, form)


def holds(text: str, part: str) -> bool:
    """A text holds another, whatever white space a template trims or adds."""
    part = part.strip()
    return part in text or _squeezed(part) in _squeezed(text)


def _behind(prompt: str, whole: str, answer: Message) -> str | None:
    """What stands behind the prompt; None where something else does, or a part of the answer is missing."""
    if not whole.startswith(prompt):
        return None
    written = whole[len(prompt) :]
    return written if _is_whole(written, answer) else None


def _is_whole(written: str, answer: Message) -> bool:
    """A rendered answer holds all of the answer, and no thought besides its own."""
    thought = inline_thought(answer["content"])
    if thought is not None and written.count(thought.tags.close) > answer["content"].count(thought.tags.close):
        return False
    return all(holds(written, part) for part in _parts(answer))


def _parts(answer: Message) -> Iterator[str]:
    """What a rendered answer must hold."""
    thought = inline_thought(answer["content"])
    yield from (answer["content"],) if thought is None else (thought.thought, thought.answer)
    yield answer.get("reasoning_content", "")
    for call in answer.get("tool_calls", ()):
        yield str(call.get("function", call).get("name", ""))


def _otherwise_written(
    prompt: str, whole: str, answer: Message, form: AnswerForm, render: Callable[[Message], str]
) -> Iterator[str]:
    """The same answer with its thought apart, or within its text, or with an empty thought, as the template likes."""
    forms = [(answer, whole)]
    for other in _other_forms(prompt, answer, form.tags):
        try:
            forms.append((other, render(other)))
        except Exception:  # a template is a program and raises what it likes
            continue
    for write in (_behind, _inside_opened_thought):
        for other, text in forms:
            written = write(prompt, text, other)
            if written is not None:
                yield written


def _other_forms(prompt: str, answer: Message, tags: ThoughtTags | None) -> Iterator[Message]:
    thought, opened = inline_thought(answer["content"]), opened_thought(prompt)
    if answer.get("reasoning_content"):
        if tags is None:
            return
        text = f"{tags.open}\n{answer['reasoning_content']}\n{tags.close}\n\n{answer['content']}"
        inline: Message = {**answer, "content": text}
        del inline["reasoning_content"]
        yield inline
    elif thought is not None:
        yield {**answer, "content": thought.answer.strip("\n"), "reasoning_content": thought.thought.strip("\n")}
    elif opened is not None:
        yield {**answer, "reasoning_content": ""}


def _inside_opened_thought(prompt: str, whole: str, answer: Message) -> str | None:
    """The answer's thought behind the prompt's own tag, where the template drops thoughts (DeepSeek-R1's)."""
    opened, thought = opened_thought(prompt), inline_thought(answer["content"])
    if opened is None or thought is None or opened[1] != thought.tags:
        return None
    start, tags = opened
    written = whole[start:].lstrip()
    rest = thought.answer.lstrip()
    if not whole.startswith(prompt[:start]) or not written.startswith(rest.rstrip()):
        return None
    if tags.open in written or tags.close in written:
        return None  # the template writes thoughts, but not so
    between = thought.answer[: len(thought.answer) - len(rest)]
    opening = prompt[start + len(tags.open) :]
    return thought.thought.removeprefix(opening) + tags.close + between + written


def _refusal(prompt: str, whole: str, answer: Message) -> RowError:
    if opened_thought(prompt) is not None and inline_thought(answer["content"]) is None:
        return RowError("answer", OPEN_THOUGHT)
    if not holds(whole, answer.get("reasoning_content", "")):
        return RowError("answer", "the chat template does not write the answer's thought")
    if not all(holds(whole, part) for part in _parts(answer)):
        return RowError("answer", "the chat template drops or changes a part of the answer")
    shared = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(whole))
    return RowError(
        "answer",
        f"{OTHERWISE} ({prompt[shared : shared + 20]!r} there, {whole[shared : shared + 20]!r} in the conversation)",
    )


def _cut(written: str, answer: Message, form: AnswerForm) -> Completion:
    """The completion with its end token, without what belongs to no answer."""
    text = written.removesuffix(form.trailer)
    if form.end is None:
        return Completion(text, False)
    ends = [match.end() for match in form.control.finditer(text)]
    content = answer["content"].strip()
    if ends and (ends[-1] == len(text) or ends[-1] > text.rfind(content) + len(content) - 1):
        return Completion(text[: ends[-1]], True)
    return Completion(text, False)


def _pieces(text: str, control: re.Pattern[str]) -> list[str]:
    """The text in control tokens and single characters."""
    pieces: list[str] = []
    place = 0
    for match in control.finditer(text):
        pieces += [*text[place : match.start()], match[0]]
        place = match.end()
    return [*pieces, *text[place:]]


def _squeezed(text: str) -> str:
    """A text without its white space, which templates trim and add."""
    return "".join(text.split())
