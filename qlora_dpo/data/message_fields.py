"""What a message holds besides its speaker and a text: parts of text, thoughts, calls of tools."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from qlora_dpo.data.preferences import RowError
from qlora_dpo.data.saved_text import object_of
from qlora_dpo.data.values import clean_text, is_empty, kind, shown


def joined_parts(field: str, parts: list[Any]) -> str:
    """The text of a content that is a list of parts, as templates that take parts write it: one after the other.

    Raises:
        RowError: when a part is none of text.
    """
    texts = []
    for number, part in enumerate(parts):
        if isinstance(part, dict):
            if part.get("type", "text") not in ("text", "input_text", "output_text"):
                raise RowError(f"{field}[{number}]", f"only parts of text are supported (it is {shown(part['type'])})")
            _refuse_others(f"{field}[{number}]", part, ("type", "text"), "a part of text")
            part = part.get("text")
        texts.append(clean_text(f"{field}[{number}]", part))
    return "".join(texts)


def other_fields(field: str, item: Mapping[str, Any], keys: tuple[str, str], role: str) -> dict[str, Any]:
    """What a message holds besides its `keys` of speaker and text; what is empty is as good as absent.

    Raises:
        RowError: when a key has no place in the message of this role.
    """
    more: dict[str, Any] = {}
    for key, value in item.items():
        if key in (*keys, "weight") or is_empty(value):
            continue
        name, read = _KEYS.get(key, (key, None))
        if read is None or (role != "assistant" and name in _OF_THE_ASSISTANT):
            raise RowError(field, f"a message has keys besides {' and '.join(keys)} ({shown(key)})")
        found = read(f"{field}.{key}", value)
        if more.setdefault(name, found) != found:
            raise RowError(f"{field}.{key}", f"says something else than another key of the message ({name})")
    return more


def calls_of(field: str, value: object) -> list[dict[str, Any]]:
    """Calls of tools, or the JSON text of them, as the OpenAI API has them.

    Raises:
        RowError: when they are none.
    """
    found = object_of(field, value, (list, dict))
    return [
        _call(f"{field}[{number}]", call) for number, call in enumerate(found if isinstance(found, list) else [found])
    ]


def _call(field: str, value: object) -> dict[str, Any]:
    call = object_of(field, value)
    is_nested = not is_empty(call.get("function"))
    function = object_of(f"{field}.function", call["function"]) if is_nested else call
    own = ("name", *_ARGUMENTS)
    _refuse_others(field, call, ("function", *_OF_A_CALL) if is_nested else (*own, *_OF_A_CALL), "a call")
    if is_nested:
        _refuse_others(f"{field}.function", function, own, "a function")
    if not isinstance(function.get("name"), str):
        raise RowError(f"{field}.function.name", f"must be text (it is {kind(function.get('name'))})")
    given = [key for key in _ARGUMENTS if not is_empty(function.get(key))]
    if len(given) > 1:
        raise RowError(f"{field}.function", f"has its arguments twice ({' and '.join(given)})")
    arguments = object_of(f"{field}.function.{given[0]}", function[given[0]]) if given else {}
    id_ = {} if is_empty(call.get("id")) else {"id": clean_text(f"{field}.id", call["id"])}
    return {**id_, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _refuse_others(field: str, item: Mapping[str, Any], known: tuple[str, ...], what: str) -> None:
    other = next((key for key, value in item.items() if key not in known and not is_empty(value)), None)
    if other is not None:
        raise RowError(field, f"{what} has a key that nothing is made of ({shown(other)})")


_ARGUMENTS = ("arguments", "parameters", "input", "args")
"""What OpenAI, Llama, Anthropic and LangChain call them."""
_OF_A_CALL = ("id", "type", "index")


_THOUGHT = ("reasoning_content", clean_text)
_CALLS = ("tool_calls", calls_of)

# The keys that a message may have besides: what each becomes, and how it is read.
_KEYS: dict[str, tuple[str, Callable[[str, Any], Any]]] = {
    "reasoning_content": _THOUGHT,
    "reasoning": _THOUGHT,
    "thinking": _THOUGHT,
    "tool_calls": _CALLS,
    "function_call": _CALLS,
    "tool_call_id": ("tool_call_id", clean_text),
    "name": ("name", clean_text),
}
_OF_THE_ASSISTANT = ("reasoning_content", "tool_calls")
