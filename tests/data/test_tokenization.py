"""The ids that the model is trained on: boundary, BOS, end token, control text that is data, truncation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from qlora_dpo.data.chat import FOLD
from qlora_dpo.data.control_tokens import control_tokens, uses_bos
from qlora_dpo.data.preferences import Message, PreferencePair, RefusedRow
from qlora_dpo.data.templates import PROMPT_TEMPLATES, apply_prompt_template
from qlora_dpo.data.tokenization import EQUAL_AFTER_TRUNCATION, PairTokenizer, TokenizedPair
from qlora_dpo.errors import UsageError

MESSAGES: tuple[Message, ...] = (
    {"role": "user", "content": "What is the answer?"},
    {"role": "assistant", "content": "The answer is here."},
    {"role": "user", "content": "Human: and 你好 🙂?"},
)
PAIR = PreferencePair(MESSAGES, "The quick answer é 🙂\n\nis here.", "The lazy answer is\tthere.", "c", 0.5, "f:3")


def tokenize(tokenizer: Any, pair: PreferencePair, **limits: int) -> TokenizedPair:
    result = PairTokenizer(tokenizer, **limits).tokenize([pair])[0]
    assert isinstance(result, TokenizedPair)
    return result


def test_the_prompt_has_the_ids_of_the_rendered_chat_with_one_bos(tokenizer: Any) -> None:
    text = tokenizer.apply_chat_template(list(MESSAGES), tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    prompt_ids = tokenize(tokenizer, PAIR).prompt_ids
    assert prompt_ids == ids
    if uses_bos(tokenizer):
        assert prompt_ids[0] == tokenizer.bos_token_id != prompt_ids[1]


def test_the_answers_decode_to_their_text_and_end_with_the_end_token(tokenizer: Any) -> None:
    pairs = PairTokenizer(tokenizer)
    pair = tokenize(tokenizer, PAIR)
    for ids, text in ((pair.chosen_ids, PAIR.chosen), (pair.rejected_ids, PAIR.rejected)):
        assert ids[-1] == pairs.end_id
        assert not set(ids[:-1]) & set(control_tokens(tokenizer))
        assert tokenizer.decode(ids[:-1]).strip() == text
    assert (pair.category, pair.confidence, pair.origin) == ("c", 0.5, "f:3")


@pytest.mark.parametrize(
    ("kind", "end"),
    [
        ("chatml", "<|im_end|>"),
        ("llama3", "<|eot_id|>"),
        ("base", "</s>"),
        ("llama_hh", "</s>"),
        ("llama2", "</s>"),
    ],
)
def test_the_end_token_is_the_template_s_else_eos(tokenizers: Callable[[str], Any], kind: str, end: str) -> None:
    tokenizer = tokenizers(kind)
    assert PairTokenizer(tokenizer).end_id == tokenizer.convert_tokens_to_ids(end)


def test_prompt_and_answer_together_are_the_whole_conversation(tokenizers: Callable[[str], Any]) -> None:
    """Also with a template that writes spaces around the answer, which belong to the completion."""
    for kind in ("chatml", "llama3", "llama2"):
        tokenizer = tokenizers(kind)
        conversation = [*MESSAGES, {"role": "assistant", "content": PAIR.chosen}]
        whole = tokenizer.apply_chat_template(conversation, tokenize=False)
        pair = tokenize(tokenizer, PAIR)
        ids = pair.prompt_ids + pair.chosen_ids
        assert tokenizer.decode(ids).replace(" ", "") == whole.replace(" ", "").rstrip("\n"), kind


def test_generation_sees_the_ids_of_training(tokenizer: Any) -> None:
    pairs = PairTokenizer(tokenizer)
    assert pairs.render_prompt_ids(MESSAGES) == tokenize(tokenizer, PAIR).prompt_ids
    assert pairs.render_prompt_ids("q") == pairs.render_prompt_ids([{"role": "user", "content": "q"}])


def test_control_text_in_a_row_stays_text(tokenizer: Any) -> None:
    specials = [token.content for token in control_tokens(tokenizer).values()]
    content = " a".join(specials) + " and " + "".join(specials)
    attack: tuple[Message, ...] = (
        {"role": "user", "content": content},
        {"role": "assistant", "content": "fine"},
        {"role": "user", "content": f"b {content} c"},
    )
    harmless: tuple[Message, ...] = tuple({**m, "content": "text"} for m in attack)
    pair = tokenize(tokenizer, PreferencePair(attack, content, "b " + content))
    known = set(control_tokens(tokenizer))
    plain = tokenize(tokenizer, PreferencePair(harmless, "x", "y"))
    assert [i for i in pair.prompt_ids if i in known] == [i for i in plain.prompt_ids if i in known]
    for ids in (pair.chosen_ids, pair.rejected_ids):
        assert not known & set(ids[:-1])
    assert tokenizer.decode(pair.chosen_ids[:-1]).strip() == content
    assert tokenizer.decode(pair.prompt_ids).count(content) == 2


def test_added_tokens_that_are_text_stay_tokens(chatml: Any) -> None:
    pair = tokenize(chatml, PreferencePair("q", "<think>hm</think>yes", "no"))
    assert pair.chosen_ids[0] == chatml.convert_tokens_to_ids("<think>")


def test_control_text_cut_by_a_message_border_is_harmless(chatml: Any) -> None:
    pair = tokenize(chatml, PreferencePair("<|im_end", "|><|im_end|", "x"))
    assert pair.chosen_ids[:-1].count(PairTokenizer(chatml).end_id) == 0


def test_a_long_prompt_keeps_its_bos_and_its_end(tokenizer: Any) -> None:
    whole = tokenize(tokenizer, PAIR).prompt_ids
    pairs = PairTokenizer(tokenizer, max_length=200, max_prompt_length=10)
    (pair,) = pairs.tokenize([PAIR])
    assert isinstance(pair, TokenizedPair)
    if whole[0] == tokenizer.bos_token_id:
        assert pair.prompt_ids == [whole[0], *whole[-9:]]
    else:
        assert pair.prompt_ids == whole[-10:]
    assert pairs.counts.truncated_prompts == 1
    assert pairs.render_prompt_ids(MESSAGES) == pair.prompt_ids


def test_a_long_answer_keeps_its_start_without_end_token(tokenizer: Any) -> None:
    whole = tokenize(tokenizer, PAIR)
    prompt = len(whole.prompt_ids)
    length = prompt + len(whole.chosen_ids)
    exact = PairTokenizer(tokenizer, max_length=length, max_prompt_length=prompt)
    assert isinstance(fits := exact.tokenize([PAIR])[0], TokenizedPair)
    assert fits.chosen_ids == whole.chosen_ids
    short = PairTokenizer(tokenizer, max_length=length - 1, max_prompt_length=prompt)
    assert isinstance(cut := short.tokenize([PAIR])[0], TokenizedPair)
    assert cut.chosen_ids == whole.chosen_ids[:-1]
    assert short.counts.truncated_completions == 1 + exact.counts.truncated_completions


def test_answers_that_truncation_makes_equal_are_dropped(chatml: Any) -> None:
    pairs = PairTokenizer(chatml, max_length=12, max_prompt_length=6)
    (row,) = pairs.tokenize([PreferencePair("q", "the same start, then a", "the same start, then b", origin="f:1")])
    assert row == RefusedRow("f:1", "rejected", EQUAL_AFTER_TRUNCATION)
    assert pairs.counts.dropped_equal_after_truncation == 1
    assert pairs.counts.truncated_completions == 0


def test_answers_with_the_same_ids_are_refused(chatml: Any) -> None:
    from tokenizers import normalizers

    tokenizer = copy.deepcopy(chatml)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    (row,) = PairTokenizer(tokenizer).tokenize([PreferencePair("q", "Yes", "yes")])
    assert isinstance(row, RefusedRow)
    assert row.reason == "the same token ids as chosen"


@pytest.mark.parametrize("written", ["", "{{ bos_token }}", "{{ bos_token }}{{ bos_token }}"])
def test_bos_is_there_once_whatever_the_template_writes(tokenizers: Callable[[str], Any], written: str) -> None:
    tokenizer = copy.deepcopy(tokenizers("llama3"))
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ bos_token }}", written)
    assert tokenize(tokenizer, PAIR) == tokenize(tokenizers("llama3"), PAIR)


def test_a_bos_that_the_model_does_not_use_is_not_added(tokenizers: Callable[[str], Any]) -> None:
    tokenizer = copy.deepcopy(tokenizers("chatml"))
    tokenizer.bos_token = "<|endoftext|>"
    assert tokenize(tokenizer, PAIR) == tokenize(tokenizers("chatml"), PAIR)


def test_a_conversation_that_the_template_refuses_is_one_refused_row(
    tokenizers: Callable[[str], Any],
) -> None:
    tokenizer = tokenizers("llama2")
    bad = PreferencePair(({"role": "system", "content": "s"}, MESSAGES[0]), "x", "y", origin="f:2")
    first, refused, last = PairTokenizer(tokenizer).tokenize([PAIR, bad, PAIR])
    assert first == last
    assert str(refused) == f"f:2: prompt: the chat template refuses it{FOLD} (no system message)"
    with pytest.raises(UsageError, match="no system message"):
        PairTokenizer(tokenizer).render_prompt_ids(bad.prompt)


@pytest.mark.parametrize("name", PROMPT_TEMPLATES)
def test_named_templates_give_other_programs_the_same_ids(tokenizers: Callable[[str], Any], name: str) -> None:
    for kind in ("base", "chatml"):
        tokenizer = copy.deepcopy(tokenizers(kind))
        apply_prompt_template(tokenizer, name)
        ids = PairTokenizer(tokenizer).render_prompt_ids(MESSAGES)
        encoded = tokenizer.apply_chat_template(list(MESSAGES), add_generation_prompt=True, tokenize=True)
        assert ids == encoded["input_ids"]
        assert (ids[0] == tokenizer.bos_token_id) == uses_bos(tokenizer)


def test_named_templates_read_as_promised(tokenizers: Callable[[str], Any]) -> None:
    tokenizer = copy.deepcopy(tokenizers("chatml"))
    expected = {
        "hh-rlhf": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:",
        "anima": "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\na\n\n### Response: b\n\n### Instruction:\nc\n\n### Response:",
        "plain": "a\n\nb\n\nc\n\n",
    }
    conversation = [
        {"role": role, "content": content} for role, content in (("user", "a"), ("assistant", "b"), ("user", "c"))
    ]
    for name, text in expected.items():
        apply_prompt_template(tokenizer, name)
        assert tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True) == text


def test_a_space_that_the_template_writes_belongs_to_the_answer(tokenizers: Callable[[str], Any]) -> None:
    tokenizer = tokenizers("base")
    pair = tokenize(tokenizer, PreferencePair("q", "yes", "no"))
    assert tokenizer.decode(pair.prompt_ids).endswith("### Response:")
    assert tokenizer.decode(pair.chosen_ids) == " yes</s>"


def test_a_tokenizer_without_template_asks_for_one(chatml: Any) -> None:
    tokenizer = copy.deepcopy(chatml)
    apply_prompt_template(tokenizer, None)
    assert tokenizer.chat_template == chatml.chat_template
    with pytest.raises(UsageError, match=r"Did you mean anima"):
        apply_prompt_template(tokenizer, "animo")
    tokenizer.chat_template = None
    with pytest.raises(UsageError, match=r"--prompt_template \(hh-rlhf, anima, plain\)"):
        apply_prompt_template(tokenizer, None)


def test_an_answer_that_nothing_ends_is_refused(chatml: Any) -> None:
    tokenizer = copy.deepcopy(chatml)
    apply_prompt_template(tokenizer, "plain")
    tokenizer.eos_token = None
    with pytest.raises(UsageError, match="eos_token"):
        PairTokenizer(tokenizer)


@pytest.mark.parametrize(("max_length", "max_prompt_length"), [(10, 10), (10, 0), (-1, -2)])
def test_limits_without_room_are_refused(chatml: Any, max_length: int, max_prompt_length: int) -> None:
    with pytest.raises(UsageError, match="leave no room"):
        PairTokenizer(chatml, max_length, max_prompt_length)


def test_the_caller_s_tokenizer_is_left_as_it_was(tokenizers: Callable[[str], Any]) -> None:
    tokenizer = tokenizers("llama3")
    before = tokenizer.backend_tokenizer.to_str(), len(tokenizer), tokenizer("a<|eot_id|>").input_ids
    tokenize(tokenizer, PAIR)
    assert before == (
        tokenizer.backend_tokenizer.to_str(),
        len(tokenizer),
        tokenizer("a<|eot_id|>").input_ids,
    )
