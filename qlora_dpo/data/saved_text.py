"""Lists and objects that were saved as text: as JSON, or as Python and numpy print them (pandas' `to_csv`)."""

from __future__ import annotations

import ast
import json
import re
import warnings
from typing import Any

import orjson

from qlora_dpo.data.preferences import RowError

NO_MESSAGES = "begins as messages that were saved as text, but neither JSON nor Python reads it"

_LONGEST = 1 << 20
"""Characters of a text that Python's parser gets; it takes hundreds of bytes for each."""
# A list, a tuple or an array of objects; quotes around it, and backslashes within, where it was saved twice.
_MAY_BE_MESSAGES = re.compile(r"""\s*(?:["']\s*)?(?:array\(\s*)?(?:[\[(]\s*)?\{""")
_SURELY_MESSAGES = re.compile(
    r"""\s*(?:["']\s*)?(?:array\(\s*)?[\[(]\s*\{\s*\\*["'](?:role|content|from|value)\\*["']\s*:"""
)
_SPEAKER = re.compile(r"""["'](?:role|from)\\*["']\s*:\s*\\*["']""")
_SAID = re.compile(r"""["'](?:content|value|tool_calls)\\*["']\s*:""")
_ROLE = re.compile(r"""["'](?:role|from)\\*["']\s*:\s*\\*["'](?:system|user|assistant|tool|human|gpt)\\*["']""")
_MAY_BE_PARTS = re.compile(r"""\s*[\[(]\s*\{\s*["'](?:type|text)["']\s*:""")
_ARRAY = re.compile(r"\s*array\((.*?)(?:,\s*dtype=\w+)?\)\s*", re.DOTALL)
# numpy prints no commas between the items of an array. Within a text a line end is printed as \n, so that this is none.
_BETWEEN_ITEMS = re.compile(r"\}\s*\n\s*\{")


def object_of(field: str, value: object, kinds: type | tuple[type, ...] = dict) -> Any:
    """Return an object (or list, by `kinds`) that is one, or is saved as text.

    Raises:
        RowError: when it is neither.
    """
    if isinstance(value, str):
        value = parsed_text(value)
    if not isinstance(value, kinds):
        what = "an object" if kinds is dict else "a list of objects"
        raise RowError(field, f"must be {what}, or the JSON text of it")
    return value


def saved_messages(field: str, text: str) -> Any | None:
    """Return the messages that a text stands for, None where it is a text of its own.

    Raises:
        RowError: when it begins as a list of messages and cannot be read.
    """
    surely = _SURELY_MESSAGES.match(text)
    is_cut = surely and "]" not in text  # before anything is said, maybe
    if not is_cut and not (_MAY_BE_MESSAGES.match(text) and _SPEAKER.search(text) and _SAID.search(text)):
        return None
    value = parsed_text(text)
    if isinstance(value, str):  # saved twice
        return saved_messages(field, value)
    if value is None and surely:
        raise RowError(field, NO_MESSAGES)
    messages = value if isinstance(value, list) else [value]
    return value if messages and all(_is_message(message) for message in messages) else None


def is_written_messages(text: str) -> bool:
    """The whole text is written as messages are, whether they can be read or not."""
    written = text.strip()
    is_list = written.startswith(("[", "{", "(", "array(", '"', "'")) and written.endswith(("]", "}", ")", '"', "'"))
    return bool(is_list and _MAY_BE_MESSAGES.match(written) and _ROLE.search(written) and _SAID.search(written))


def saved_parts(text: str) -> list[Any] | None:
    """The parts of a content that were saved as text, None where it is a text of its own."""
    value = parsed_text(text) if _MAY_BE_PARTS.match(text) else None
    if not isinstance(value, list) or not all(isinstance(part, dict) and "type" in part for part in value):
        return None
    texts = [part for part in value if part["type"] == "text"]
    return value if texts and all(part.keys() == {"type", "text"} for part in texts) else None


def _is_message(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    is_sharegpt = value.get("from") is not None
    speaker, said = (value.get("from"), "value") if is_sharegpt else (value.get("role"), "content")
    return isinstance(speaker, str) and (said in value or "tool_calls" in value)


def parsed_text(text: str) -> Any | None:
    """The value that a text of JSON or of Python stands for; None where it is neither."""
    try:
        return orjson.loads(text)
    except ValueError:
        pass
    try:  # with NaN, which is no JSON, and means that nothing is there
        return json.loads(text, parse_constant=_nothing) if "NaN" in text else _python_value(text)
    except (ValueError, RecursionError):
        return _python_value(text)


def _nothing(_name: str) -> None:
    return None


def _python_value(text: str) -> Any | None:
    if len(text) > _LONGEST:
        return None
    array = _ARRAY.fullmatch(text)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in a text that is no Python
            tree = ast.parse(_BETWEEN_ITEMS.sub("}, {", array[1] if array else text).strip(), mode="eval")
            return _with_lists(ast.literal_eval(_WithoutNan().visit(tree) if "nan" in text else tree))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


class _WithoutNan(ast.NodeTransformer):
    """Pandas writes nan where nothing is."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(None) if node.id == "nan" else node


def _with_lists(value: Any) -> Any:
    """The value with lists in place of tuples, as JSON has them."""
    if isinstance(value, dict):
        return {key: _with_lists(item) for key, item in value.items()}
    return [_with_lists(item) for item in value] if isinstance(value, (list, tuple)) else value
