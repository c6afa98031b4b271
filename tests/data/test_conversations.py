"""SFT data: rows to conversations, conversations to the ids that the chat template renders, only answers learned."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_dpo.data.chat import FOLD
from qlora_dpo.data.control_tokens import control_tokens, uses_bos
from qlora_dpo.data.conversation_tokens import ConversationTokenizer, TokenizedConversation
from qlora_dpo.data.conversations import (
    AFTER_THE_LAST_ANSWER,
    Conversation,
    ConversationColumns,
    check_conversation_format,
    detect_conversation_format,
    parse_conversation,
)
from qlora_dpo.data.dataset import ConversationDataset, load_conversation_dataset, split_by_prompt
from qlora_dpo.data.preferences import Message, RefusedRow, RowError
from qlora_dpo.errors import DataError, UsageError

TURNS = (
    ("user", "What is the answer?"),
    ("assistant", "The answer is here."),
    ("user", "Human: and 你好 🙂?"),
    ("assistant", "The quick answer é 🙂\n\nis here."),
    ("user", "ok"),
    ("assistant", "the lazy dog"),
)
# Like Qwen3's: a thought stays only in the answers after the last question, and there an empty one is added.
THINKING = (
    "{% for m in messages %}{% set text = m['content'] %}"
    "{% if m['role'] == 'assistant' %}"
    "{% if loop.last %}{% if '</think>' not in text %}{% set text = '<think>\\n\\n</think>\\n\\n' + text %}{% endif %}"
    "{% else %}{% set text = text.split('</think>')[-1].lstrip('\\n') %}{% endif %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + text + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def messages(*turns: tuple[str, str]) -> tuple[Message, ...]:
    return tuple({"role": role, "content": content} for role, content in turns)


def tokenize(tokenizer: Any, *turns: tuple[str, str], max_length: int = 1024) -> TokenizedConversation:
    (result,) = ConversationTokenizer(tokenizer, max_length).tokenize([Conversation(messages(*turns), "c", "f:3")])
    assert isinstance(result, TokenizedConversation), result
    return result


def learned(tokenizer: Any, conversation: TokenizedConversation) -> list[str]:
    return [tokenizer.decode(conversation.ids[start:end]) for start, end in conversation.spans]


def parse(values: dict[str, Any], names: ConversationColumns | None = None) -> Conversation:
    names = names or ConversationColumns()
    return parse_conversation(detect_conversation_format(values, names), values, names, "f:1").conversation


def test_rows_of_every_form_become_the_same_conversation() -> None:
    expected = messages(("user", "q"), ("assistant", "a"))
    rows: list[tuple[dict[str, Any], ConversationColumns]] = [
        ({"messages": list(expected), "source": "math"}, ConversationColumns()),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
         ConversationColumns(messages="conversations")),
        ({"prompt": "q", "response": "a"}, ConversationColumns()),
        ({"question": "q", "answer": "a"}, ConversationColumns(prompt="question", response="answer")),
    ]  # fmt: skip
    for values, names in rows:
        assert parse(values | {"category": "c"}, names) == Conversation(expected, "c", "f:1")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"messages": []}, "messages: an empty list of messages"),
        ({"messages": [{"role": "user", "content": "q"}]}, "messages: no message is the assistant's"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\].content: missing"),
        ({"messages": [{"role": "tool", "content": "q"}]}, "messages: no message is the assistant's"),
        ({"messages": list(messages(("user", "q"), ("assistant", " ")))}, r"messages\[1\]: the answer is empty"),
        ({"messages": list(messages(("user", ""), ("assistant", "a")))}, r"messages\[0\].content: an empty message"),
        ({"messages": list(messages(("assistant", "a"))), "tools": ["x"]}, r"tools\[0\]: must be an object"),
        ({"prompt": " ", "response": "a"}, "prompt: the prompt is empty"),
        ({"prompt": "q", "response": ""}, "response: the answer is empty"),
        ({"prompt": "q", "response": "a", "category": 3}, "category: must be text"),
    ],
)
def test_unusable_rows_are_refused_by_field_and_reason(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        parse(values)


def test_messages_after_the_last_answer_are_a_counted_repair() -> None:
    values = {"messages": list(messages(("user", "q"), ("assistant", "a"), ("user", "thanks")))}
    parsed = parse_conversation("messages", values, ConversationColumns(), "f:1")
    assert len(parsed.conversation.messages) == 2
    assert parsed.repairs == (AFTER_THE_LAST_ANSWER,)


def test_unknown_forms_name_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"columns are text \(text\).*--response_key"):
        detect_conversation_format({"text": "x"})
    with pytest.raises(UsageError, match=r"Did you mean messages"):
        check_conversation_format("message")


def test_ids_are_those_of_the_rendered_conversation(tokenizer: Any) -> None:
    conversation = tokenize(tokenizer, *TURNS)
    whole = tokenizer.apply_chat_template(list(messages(*TURNS)), tokenize=True)["input_ids"]
    ends_with_eos = whole[: len(conversation.ids)] != conversation.ids
    rendered = conversation.ids[:-1] if ends_with_eos else conversation.ids
    assert rendered == whole[: len(rendered)]
    assert ends_with_eos == (whole[-2:].count(conversation.ids[-1]) == 0)  # only where the template writes no end
    assert len(whole) - len(rendered) <= 1  # a newline after the last end token
    assert (conversation.ids[0] == tokenizer.bos_token_id) == uses_bos(tokenizer)


def test_every_answer_with_its_end_token_is_learned_and_nothing_else(tokenizers: Callable[[str], Any]) -> None:
    for kind, end, after in (
        ("chatml", "<|im_end|>", "<|im_end|>"),
        ("llama3", "<|eot_id|>", "<|eot_id|>"),
        ("llama2", " </s>", " </s>"),
        ("base", "", "</s>"),  # this template ends no answer but the last
        ("llama_hh", "", "</s>"),
    ):
        tokenizer = tokenizers(kind)
        texts = [text.strip() for text in learned(tokenizer, tokenize(tokenizer, *TURNS))]
        answers = [content for role, content in TURNS if role == "assistant"]
        assert texts == [f"{answers[0]}{end}", f"{answers[1]}{end}", f"{answers[2]}{after}"], kind


def test_control_text_in_a_message_stays_text(tokenizer: Any) -> None:
    specials = [token.content for token in control_tokens(tokenizer).values()]
    content = " a".join(specials) + " and " + "".join(specials)
    attack = tokenize(tokenizer, ("user", content), ("assistant", f"b {content} c"))
    plain = tokenize(tokenizer, ("user", "x"), ("assistant", "y"))
    known = set(control_tokens(tokenizer))
    assert [i for i in attack.ids if i in known] == [i for i in plain.ids if i in known]
    assert content in learned(tokenizer, attack)[0]


def test_answers_that_the_template_writes_otherwise_in_the_history_are_context(chatml: Any) -> None:
    tokenizer = copy.deepcopy(chatml)
    tokenizer.chat_template = THINKING
    turns = (("user", "q"), ("assistant", "<think>hm</think>one"), ("user", "r"), ("assistant", "two"))
    conversations = ConversationTokenizer(tokenizer)
    (result,) = conversations.tokenize([Conversation(messages(*turns))])
    assert isinstance(result, TokenizedConversation)
    assert learned(tokenizer, result) == ["<think>\n\n</think>\n\ntwo<|im_end|>"]
    assert "assistant\none<|im_end|>" in tokenizer.decode(result.ids)
    assert conversations.counts.context_turns == 1
    whole = tokenizer.apply_chat_template(list(messages(*turns)), tokenize=True)["input_ids"]
    assert result.ids == whole[: len(result.ids)]


def test_a_thought_of_the_last_answer_is_learned(chatml: Any) -> None:
    tokenizer = copy.deepcopy(chatml)
    tokenizer.chat_template = THINKING
    result = tokenize(tokenizer, ("user", "q"), ("assistant", "<think>hm</think>one"))
    assert learned(tokenizer, result) == ["<think>hm</think>one<|im_end|>"]


def test_a_template_that_drops_part_of_the_answer_refuses_the_row(chatml: Any) -> None:
    tokenizer = copy.deepcopy(chatml)
    tokenizer.chat_template = chatml.chat_template.replace("m['content']", "m['content'].split('</think>')[-1]")
    row = Conversation(messages(("user", "q"), ("assistant", "<think>hm</think>one")), origin="f:9")
    (refused,) = ConversationTokenizer(tokenizer).tokenize([row])
    assert str(refused) == "f:9: messages: the chat template drops or changes a part of the answer"


def test_an_opened_thought_that_nothing_closes_refuses_the_row(chatml: Any) -> None:
    tokenizer = copy.deepcopy(chatml)
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}")
    (refused,) = ConversationTokenizer(tokenizer).tokenize([Conversation(messages(*TURNS), origin="f:1")])
    assert isinstance(refused, RefusedRow) and "would end inside the thought" in refused.reason
    thought = Conversation(messages(*TURNS[:-1], ("assistant", "<think>\nhm\n</think>\n\nthe lazy dog")))
    (result,) = ConversationTokenizer(tokenizer).tokenize([thought])
    assert isinstance(result, TokenizedConversation)
    assert learned(tokenizer, result)[-1] == "hm\n</think>\n\nthe lazy dog<|im_end|>"


def test_a_token_across_the_begin_of_an_answer_is_cut_there(chatml: Any) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = copy.deepcopy(chatml)
    template = tokenizer.chat_template
    alphabet = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(alphabet | {"ĊĊ": len(alphabet)}, [("Ċ", "Ċ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizer.backend_tokenizer.decoder
    tokenizer = type(tokenizer)(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = template
    result = tokenize(tokenizer, ("user", "q"), ("assistant", "\na"))
    merged = tokenizer.convert_tokens_to_ids("ĊĊ")
    assert merged in tokenizer.apply_chat_template(
        list(messages(("user", "q"), ("assistant", "\na"))), tokenize=True
    )["input_ids"]  # fmt: skip
    assert merged not in result.ids
    assert learned(tokenizer, result) == ["\na<|im_end|>"]
    prompt = tokenizer.apply_chat_template(list(messages(("user", "q"))), tokenize=True, add_generation_prompt=True)
    assert result.prompt_ids == prompt["input_ids"]  # what the model sees when it generates


def test_a_long_conversation_loses_its_end(tokenizer: Any) -> None:
    whole = tokenize(tokenizer, *TURNS)
    second = whole.spans[1]
    conversations = ConversationTokenizer(tokenizer, second[0] + 2)
    (cut,) = conversations.tokenize([Conversation(messages(*TURNS))])
    assert isinstance(cut, TokenizedConversation)
    assert cut.ids == whole.ids[: second[0] + 2]
    assert cut.spans == [whole.spans[0], (second[0], second[0] + 2)]
    between = ConversationTokenizer(tokenizer, second[0])
    (shorter,) = between.tokenize([Conversation(messages(*TURNS))])
    assert isinstance(shorter, TokenizedConversation)
    assert shorter.ids == whole.ids[: whole.spans[0][1]]  # nothing is computed that nothing is learned from
    assert conversations.counts.truncated_conversations == between.counts.truncated_conversations == 1
    (refused,) = ConversationTokenizer(tokenizer, whole.spans[0][0]).tokenize([Conversation(messages(*TURNS))])
    assert isinstance(refused, RefusedRow) and "no answer begins within --max_length" in refused.reason


def test_a_conversation_that_the_template_refuses_is_one_refused_row(tokenizers: Callable[[str], Any]) -> None:
    rows = [
        Conversation(messages(*TURNS)),
        Conversation(messages(("system", "s"), *TURNS), origin="f:2"),
        Conversation(messages(*TURNS)),
    ]
    first, refused, last = ConversationTokenizer(tokenizers("llama2")).tokenize(rows)
    assert first == last
    assert str(refused) == f"f:2: messages: the chat template refuses it{FOLD} (no system message)"


GOOD = [{"messages": list(messages(("user", f"question {n // 2}"), ("assistant", f"answer {n}")))} for n in range(8)]


def load(source: str, tokenizer: Any, tmp_path: Path, **options: Any) -> ConversationDataset:
    return load_conversation_dataset(source, tokenizer=tokenizer, cache_dir=tmp_path / "cache", **options)


def test_conversations_come_back_from_the_cache_as_they_were_tokenized(
    chatml: Any, write_jsonl: Callable[..., str], tmp_path: Path
) -> None:
    path = write_jsonl([{**row, "category": "c"} for row in GOOD] + [{"messages": list(messages(*TURNS))}])
    first = load(path, chatml, tmp_path)
    again = load(path, chatml, tmp_path)
    assert again.report.from_cache and not first.report.from_cache
    assert again.fingerprint == first.fingerprint
    expected = ConversationTokenizer(chatml).tokenize(
        [parse(row | {"category": "c"}) for row in GOOD] + [parse({"messages": list(messages(*TURNS))})]
    )
    stored = list(again)
    assert [(row.ids, row.spans, row.category) for row in stored] == [
        (row.ids, row.spans, "c" if number < 8 else None)
        for number, row in enumerate(expected) if isinstance(row, TokenizedConversation)
    ]  # fmt: skip
    assert [row.origin for row in stored] == [f"{path}:{line}" for line in range(1, 10)]
    tokens, before, targets = again.lengths()
    assert tokens.tolist() == [len(row.ids) for row in stored]
    assert before.tolist() == [len(row.prompt_ids) for row in stored]
    assert targets.tolist() == [sum(end - start for start, end in row.spans) for row in stored]


def test_bad_rows_are_named_or_skipped_with_a_count(
    chatml: Any, write_jsonl: Callable[..., str], tmp_path: Path
) -> None:
    path = write_jsonl([*GOOD, {"messages": [{"role": "user", "content": "q"}]}, "{broken"])
    with pytest.raises(DataError) as error:
        load(path, chatml, tmp_path)
    assert "2 of 10 rows" in str(error.value)
    assert f"{path}:9: messages: no message is the assistant's" in str(error.value)
    report = load(path, chatml, tmp_path, bad_rows="skip").report
    assert report.rows_read == report.pairs + len(report.refused) == 10
    assert report.summary()[0] == f"{path}: 8 conversations from 10 rows (messages, from the cache)"


def test_what_only_the_length_limit_leaves_nothing_of_stops_no_run(
    chatml: Any, write_jsonl: Callable[..., str], tmp_path: Path
) -> None:
    path = write_jsonl([*GOOD, {"messages": list(messages(("user", "long " * 50), ("assistant", "a")))}])
    limit = max(len(row.ids) for row in load(write_jsonl(GOOD, "good.jsonl"), chatml, tmp_path))
    dataset = load(path, chatml, tmp_path, max_length=limit)
    assert len(dataset) == 8
    assert [row.field for row in dataset.report.refused] == ["messages"]


def test_conversations_of_one_prompt_are_held_out_together(
    chatml: Any, write_jsonl: Callable[..., str], tmp_path: Path
) -> None:
    dataset = load(write_jsonl(GOOD), chatml, tmp_path)
    train, held_out = split_by_prompt(dataset, 0.5, seed=1)
    assert len(held_out) == 4
    prompts = [{tuple(dataset[index].prompt_ids) for index in side} for side in (train, held_out)]
    assert prompts[0].isdisjoint(prompts[1])
