"""Files of other tools whose dialogue and answers stand in columns of their own: OpenAI, ms-swift, Argilla."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_dpo.data.messages import Values, check_prompt, kind, messages_of, text_of, value_of
from qlora_dpo.data.pair_formats.alpaca import history_of
from qlora_dpo.data.pair_formats.layout import Layout, answer_message, dialogue_of, message_pair
from qlora_dpo.data.pair_formats.sharegpt import refuse_unsupported, with_system
from qlora_dpo.data.preferences import Message, ParsedPair, PreferencePair, RowError

_QUESTION: list[dict[str, str]] = [{"role": "user", "content": "What is 2 + 3?"}]


def _answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _read_openai(values: Values) -> ParsedPair:
    given = value_of(values, "input")
    if not isinstance(given, dict):
        raise RowError("input", f"must be an object with messages (it is {kind(given)})")
    prompt = messages_of("input.messages", given.get("messages"))
    check_prompt("input.messages", prompt)
    refuse_unsupported(given)
    answers = [
        answer_message(column, value_of(values, column)) for column in ("preferred_output", "non_preferred_output")
    ]
    return ParsedPair(message_pair(prompt, *answers))


def _read_swift(values: Values) -> ParsedPair:
    refuse_unsupported(values)
    *prompt, chosen = dialogue_of("messages", value_of(values, "messages"))
    check_prompt("messages", prompt)
    rejected = answer_message("rejected_response", value_of(values, "rejected_response"))
    return ParsedPair(message_pair(with_system(values, prompt), chosen, rejected))


def _read_swift_query(values: Values) -> ParsedPair:
    refuse_unsupported(values)
    prompt: Sequence[Message] = [*history_of(values), {"role": "user", "content": text_of(values, "query")}]
    texts = text_of(values, "response"), text_of(values, "rejected_response")
    return ParsedPair(PreferencePair(tuple(with_system(values, list(prompt))), *texts))


def _read_argilla(values: Values) -> ParsedPair:
    messages: list[Message] = [{"role": "user", "content": text_of(values, "instruction")}]
    texts = text_of(values, "chosen_response"), text_of(values, "rejected_response")
    return ParsedPair(PreferencePair(tuple(with_system(values, messages)), *texts))


OPENAI = Layout(
    "input (an object with messages and tools), preferred_output, non_preferred_output (messages)",
    {
        "input": {"messages": _QUESTION},
        "preferred_output": [_answer("5")],
        "non_preferred_output": [_answer("6")],
    },
    ("input", "preferred_output", "non_preferred_output"),
    _read_openai,
)
SWIFT = Layout(
    "messages (with the better answer), rejected_response (text, or a message)",
    {"messages": [*_QUESTION, _answer("5")], "rejected_response": "6"},
    ("messages", "rejected_response"),
    _read_swift,
)
SWIFT_QUERY = Layout(
    "query, response, rejected_response (text), history (pairs of texts), system",
    {
        "query": "What is 2 + 3?",
        "response": "5",
        "rejected_response": "6",
        "history": [["Hello", "Hi"]],
        "system": "Answer with a number.",
    },
    ("query", "response", "rejected_response"),
    _read_swift_query,
)
ARGILLA = Layout(
    "instruction, chosen_response, rejected_response (text), system",
    {"instruction": "What is 2 + 3?", "chosen_response": "5", "rejected_response": "6"},
    ("instruction", "chosen_response", "rejected_response"),
    _read_argilla,
)
