"""Chats as text: what the tokenizer's chat template writes, with text in messages kept apart from control tokens.

Texts between the methods are as the template writes them, control text of messages replaced by markers;
`encoder.reveal` makes them ready for the encoder.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qlora_dpo.data.chat_context import NO_CONTEXT, RESERVED_ARGUMENTS, ChatContext, form_of, probes
from qlora_dpo.data.completions import OPEN_THOUGHT, AnswerForm, Completion, closing_of, find_completion, holds
from qlora_dpo.data.control_tokens import ControlTokenEncoder, uses_bos
from qlora_dpo.data.preferences import Message, RowError
from qlora_dpo.data.template_clock import dated_template
from qlora_dpo.data.thoughts import THOUGHT_TAGS, inline_thought
from qlora_dpo.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | Sequence[Message]


FOLD = "; --system_prompt fold puts the system prompt before the first question"


class Chat:
    """Renders conversations for one tokenizer.

    Raises:
        UsageError: the chat template cannot be used, or nothing ends an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.encoder = ControlTokenEncoder(tokenizer)
        self._bos_id: int | None = tokenizer.bos_token_id
        self._adds_bos = uses_bos(tokenizer)
        self._special_tokens: dict[str, Any] = tokenizer.special_tokens_map
        self._left_out: dict[tuple[Any, ...], str | None] = {}
        self.form = self._find_answer_form()

    def render_prompts(
        self, conversations: Sequence[list[Message]], contexts: Sequence[ChatContext]
    ) -> list[str | Exception]:
        """Render (protected) prompts up to where the answer begins; an exception where the template refuses one.

        A template that leaves out a system prompt, a question or the tools counts as refusing it.
        """
        texts = self.render_all(conversations, contexts)
        return [
            text if isinstance(text, Exception) else self._missing(text, conversation, context) or text
            for text, conversation, context in zip(texts, conversations, contexts, strict=True)
        ]

    def render_answers(
        self,
        conversations: Sequence[list[Message]],
        prompts: Sequence[str | Exception],
        answers: Sequence[Message],
        contexts: Sequence[ChatContext],
    ) -> list[Completion | Exception]:
        """What the template writes for an answer behind each rendered prompt; an exception where it cannot."""
        protected = [self.protected_message(answer) for answer in answers]
        whole = [[*turns, answer] for turns, answer in zip(conversations, protected, strict=True)]
        texts = self.render_all(whole, contexts, generation_prompt=False)
        return [
            self._completion(prompt, text, turns, context)
            for prompt, text, turns, context in zip(prompts, texts, whole, contexts, strict=True)
        ]

    def render_all(
        self,
        conversations: Sequence[list[Message]],
        contexts: Sequence[ChatContext],
        generation_prompt: bool = True,
    ) -> list[str | Exception]:
        """Render conversations; the exception of the template where it refuses one."""
        if not any(contexts):
            try:
                return [*self.render(conversations, generation_prompt)]
            except Exception:  # a template is a program and raises what it likes; one conversation spoils the batch
                pass
        rows = zip(conversations, contexts, strict=True)
        return [self._render_one(conversation, generation_prompt, context) for conversation, context in rows]

    def render(
        self,
        conversations: Sequence[list[Message]],
        generation_prompt: bool = True,
        context: ChatContext = NO_CONTEXT,
    ) -> list[str]:
        """What the template writes. Raises: what the template raises.

        `apply_chat_template` does the same three times slower, because it copies every message.
        """
        from transformers.utils.chat_template_utils import _compile_jinja_template

        if taken := RESERVED_ARGUMENTS & context.kwargs.keys():
            raise ValueError(f"chat_template_kwargs: {min(taken)} is no argument of a template")
        tools = protect_all(list(context.tools), self.encoder.protect) or None
        source = dated_template(self.tokenizer, tools is not None) or self.tokenizer.get_chat_template(tools=tools)
        template: Any = _compile_jinja_template(source)
        given = {
            "documents": None,
            "add_generation_prompt": generation_prompt,
            **self._special_tokens,
            **protect_all(context.kwargs, self.encoder.protect),
        }
        return [
            template.render(messages=[_with_thinking(message) for message in turns], tools=tools, **given)
            for turns in conversations
        ]

    def protected(self, prompt: Prompt) -> list[Message]:
        """The messages with control text in them replaced by markers."""
        if isinstance(prompt, str):
            return [{"role": "user", "content": self.encoder.protect(prompt)}]
        return [self.protected_message(message) for message in prompt]

    def protected_message(self, message: Message) -> Message:
        """A message with control text in it replaced by markers; the tags of an answer's thought stay."""
        protect, content = self.encoder.protect, message["content"]
        thought = inline_thought(content) if message["role"] == "assistant" else None
        if thought is not None and thought.thought.strip() == message.get("reasoning_content", "").strip() != "":
            content, thought = thought.answer.lstrip("\n"), None  # the same thought twice
        if thought is not None and self.encoder.pattern.search(thought.tags.close):
            opening = thought.tags.open if content.lstrip().startswith(thought.tags.open) else ""
            text = opening + protect(thought.thought) + thought.tags.close + protect(thought.answer)
        else:
            text = protect(content)
        if len(message) == 2:
            return {"role": message["role"], "content": text}
        return {**protect_all(message, protect), "role": message["role"], "content": text}  # type: ignore[typeddict-item]

    def _completion(
        self, prompt: str | Exception, text: str | Exception, turns: Sequence[Message], context: ChatContext
    ) -> Completion | Exception:
        for rendered in (prompt, text):
            if isinstance(rendered, Exception):
                return rendered
        assert isinstance(prompt, str) and isinstance(text, str)
        *before, answer = turns

        def render(message: Message) -> str:
            return self.render([[*before, message]], False, context)[0]

        try:
            return find_completion(prompt, text, answer, self.form, render)
        except RowError as error:
            return RowError(error.field, error.reason + self._way_out(error, answer))

    def _way_out(self, error: RowError, answer: Message) -> str:
        """What a template that can be told to think or not is to be told."""
        thinks = has_thought(answer)
        if "enable_thinking" not in str(self.tokenizer.chat_template) or not (thinks or error.reason == OPEN_THOUGHT):
            return ""
        return f"; try --chat_template_kwargs '{{\"enable_thinking\": {str(thinks).lower()}}}'"

    def prompt_ids(self, prompt: Prompt, context: ChatContext = NO_CONTEXT) -> list[int]:
        """The ids that a model is given to answer a prompt, uncut.

        Raises:
            UsageError: the chat template refuses the conversation.
        """
        (rendered,) = self.render_prompts([self.protected(prompt)], [context])
        if isinstance(rendered, Exception):
            raise UsageError(f"the chat template refuses this prompt: {rendered}; change its messages.") from rendered
        return self.with_bos(self.encoder.encode([self.encoder.reveal(rendered)])[0])

    def with_bos(self, ids: list[int]) -> list[int]:
        """Start with exactly one BOS if the template or the tokenizer wants one."""
        if self._bos_id is None:
            return ids
        written = next((i for i, id_ in enumerate(ids) if id_ != self._bos_id), len(ids))
        return [self._bos_id, *ids[written:]] if written or self._adds_bos else ids

    def _missing(self, text: str, conversation: list[Message], context: ChatContext) -> RowError | None:
        """What the template leaves out of a prompt: texts of this one, or parts of all prompts of its form."""
        for message in conversation:
            if message["role"] in ("system", "user") and not holds(text, message["content"]):
                return RowError("prompt", f"the chat template does not write the {message['role']} message")
        if len(conversation) == 1 and not context:
            return None
        form = form_of(conversation, context)
        if form not in self._left_out:
            turns, tools, words = probes(conversation, context)
            probed = self._render_one(turns, True, tools)
            missing = [] if isinstance(probed, Exception) else [what for what, word in words if word not in probed]
            self._left_out[form] = missing[0] if missing else None
        left_out = self._left_out[form]
        if left_out is None:
            return None
        return RowError("tools" if "tool" in left_out else "prompt", f"the chat template does not write the {left_out}")

    def _render_one(
        self, conversation: list[Message], generation_prompt: bool, context: ChatContext
    ) -> str | Exception:
        try:
            return self.render([conversation], generation_prompt, context)[0]
        except Exception as error:
            texts = [_with_arguments_as_text(message) for message in conversation]
            if texts == conversation:
                return error
        try:  # some templates (DeepSeek's) want the arguments of calls as text
            return self.render([texts], generation_prompt, context)[0]
        except Exception as error:
            return error

    def _find_answer_form(self) -> AnswerForm:
        """Learn from a rendered conversation what the template writes behind an answer."""
        question, answer = (f"{word}{secrets.token_hex(8)}" for word in ("question", "answer"))
        asked: list[Message] = [{"role": "user", "content": question}]
        answered: list[Message] = [*asked, {"role": "assistant", "content": answer}]
        name = self.tokenizer.name_or_path or "the model"
        try:
            whole = self.render([answered], generation_prompt=False)[0]
        except Exception as error:
            raise UsageError(
                f"the chat template of {name} cannot render one question and its answer: {error}; "
                "choose another with --prompt_template."
            ) from error
        for part, text in (("question", question), ("answer", answer)):
            if text not in whole:
                raise UsageError(
                    f"the chat template of {name} does not write the {part} that it is given: it reads messages of "
                    "another form (content as a list of parts, for images), so there is nothing to train on. Choose "
                    "another template with --prompt_template, or a model for text."
                )
        try:
            next_turn = self.render([[*answered, *asked]], generation_prompt=False)[0]
        except Exception:  # no second question
            next_turn = whole
        form = closing_of(whole, next_turn, answer, self.encoder.pattern)
        end_id = self.tokenizer.convert_tokens_to_ids(form.end) if form.end else self.tokenizer.eos_token_id
        if end_id is None:
            raise UsageError(
                "no token ends an answer: the chat template writes none and the tokenizer has no eos_token; "
                "set eos_token in tokenizer_config.json."
            )
        form.end_id = int(end_id)  # type: ignore[arg-type]
        source = str(self.tokenizer.chat_template)
        form.tags = next((tags for tags in THOUGHT_TAGS if tags.close in source), None)
        return form


def has_thought(answer: Message) -> bool:
    """The answer brings a thought along, apart or within its text."""
    return bool(answer.get("reasoning_content")) or inline_thought(answer["content"]) is not None


def protect_all(value: Any, protect: Callable[[str], str]) -> Any:
    """A JSON value with all its texts protected."""
    if isinstance(value, str):
        return protect(value)
    if isinstance(value, Mapping):
        return {protect(key): protect_all(item, protect) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [protect_all(item, protect) for item in value]
    return value


def _with_thinking(message: Message) -> Message:
    """A thought under all names that templates read."""
    if "reasoning_content" not in message:
        return message
    thought = message["reasoning_content"]
    return {**message, "thinking": thought, "reasoning": thought}  # type: ignore[typeddict-unknown-key]


def _with_arguments_as_text(message: Message) -> Message:
    """The arguments of calls as JSON text."""
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function", call)
        arguments = function.get("arguments")
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        function = {**function, "arguments": text}
        calls.append({**call, "function": function} if "function" in call else function)
    return {**message, "tool_calls": calls}
