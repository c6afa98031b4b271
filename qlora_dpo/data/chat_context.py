"""What a row gives the chat template besides messages, and probes that find out what a template leaves out."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qlora_dpo.data.preferences import Message


@dataclass(frozen=True, slots=True)
class ChatContext:
    """What a row gives the chat template besides messages."""

    tools: Sequence[Mapping[str, Any]] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.tools or self.kwargs)


NO_CONTEXT = ChatContext()
# What decides how a template is applied, which no row may.
RESERVED_ARGUMENTS = frozenset(
    """conversation messages tools documents chat_template add_generation_prompt continue_final_message tokenize padding
    truncation max_length return_tensors return_dict return_assistant_tokens_mask sanitize_control_tokens
    tokenizer_kwargs""".split()
)


def form_of(conversation: Sequence[Message], context: ChatContext) -> tuple[Any, ...]:
    """What decides which parts of a conversation a template writes."""
    turns = tuple((turn["role"], bool(turn["content"]), len(turn.get("tool_calls", ()))) for turn in conversation)
    return (*turns, len(context.tools), repr(context.kwargs))


def probes(
    conversation: Sequence[Message], context: ChatContext
) -> tuple[list[Message], ChatContext, list[tuple[str, str]]]:
    """The conversation with made-up words in place of its texts, and (what a word stands for, the word)."""
    words: list[tuple[str, str]] = []

    def word(what: str) -> str:
        words.append((what, f"probe{secrets.token_hex(8)}"))
        return words[-1][1]

    turns: list[Message] = []
    for message in conversation:
        turn: Message = {**message, "content": word(f"{message['role']} message") if message["content"] else ""}
        if "tool_calls" in message:
            turn["tool_calls"] = [
                {
                    "type": "function",
                    "function": {"name": word("call of a tool"), "arguments": {"a": word("call of a tool")}},
                }
                for _ in message["tool_calls"]
            ]
        turns.append(turn)
    tools = tuple(
        {
            "type": "function",
            "function": {"name": word("tools"), "description": "x", "parameters": {"type": "object", "properties": {}}},
        }
        for _ in context.tools
    )
    return turns, ChatContext(tools, context.kwargs), words
