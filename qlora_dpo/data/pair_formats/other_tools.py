"""Files of other tools whose dialogue and answers stand in columns of their own: OpenAI, ms-swift, Argilla."""

from __future__ import annotations

from qlora_dpo.data.columns import Content, add_content
from qlora_dpo.data.messages import check_prompt, messages_of
from qlora_dpo.data.pair_formats.layout import Layout, answer_message, dialogue_of, message_pair, text_pair, text_prompt
from qlora_dpo.data.preferences import ParsedPair, RowError
from qlora_dpo.data.values import Values, kind, text_of, value_of

_QUESTION: list[dict[str, str]] = [{"role": "user", "content": "What is 2 + 3?"}]


def _answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _read_openai(values: Values) -> ParsedPair:
    given = value_of(values, "input")
    if not isinstance(given, dict):
        raise RowError("input", f"must be an object with messages (it is {kind(given)})")
    prompt = messages_of("input.messages", given.get("messages"))
    check_prompt("input.messages", prompt)
    chosen, rejected = (
        answer_message(column, value_of(values, column)) for column in ("preferred_output", "non_preferred_output")
    )
    content = add_content(given, ("messages",), prompt) or Content(prompt)
    return ParsedPair(message_pair(content.messages, chosen, rejected, tools=content.tools))


def _read_swift(values: Values) -> ParsedPair:
    *prompt, chosen = dialogue_of("messages", value_of(values, "messages"))
    check_prompt("messages", prompt)
    rejected = answer_message("rejected_response", value_of(values, "rejected_response"))
    return ParsedPair(message_pair(prompt, chosen, rejected))


def _read_swift_query(values: Values) -> ParsedPair:
    answers = text_of(values, "response"), text_of(values, "rejected_response")
    return text_pair(text_prompt(values, "query"), *answers)


def _read_argilla(values: Values) -> ParsedPair:
    answers = text_of(values, "chosen_response"), text_of(values, "rejected_response")
    return text_pair(text_prompt(values, "instruction"), *answers)


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
