"""The model behind the page: two answers, streamed, scored, within limits; whoever leaves ends the writing."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from tiny import tiny_model, tiny_tokenizer, with_lora

from eval.page import answers
from eval.page.answers import Asked, Comparison
from eval.page.limits import MAX_PROMPT_CHARACTERS, Refused, number_of, prompt_of
from eval.page.words import words_in
from qlora_dpo.models.lora import reference_active

WORDS = words_in("en")


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return Comparison(with_lora(tiny_model(), r=8), tiny_tokenizer(), longest_answer=24)


def test_answers_differ_between_adapter_off_and_on_and_repeat_with_the_seed(comparison: Comparison) -> None:
    def texts(asked: Asked) -> list[str]:
        return [answer.text for answer in comparison(asked)]

    first = texts(Asked("w7 w8", 8))
    assert first == texts(Asked("w7 w8", 8))
    assert first[0] != first[1]
    sampled = texts(Asked("w7 w8", 8, 1.0, 3))
    assert sampled == texts(Asked("w7 w8", 8, 1.0, 3)) != texts(Asked("w7 w8", 8, 1.0, 4))


def test_before_is_the_base_itself(comparison: Comparison) -> None:
    before = comparison(Asked("w9", 8))[0]
    with comparison._model.disable_adapter():
        assert comparison(Asked("w9", 8))[1].text == before.text


def test_what_is_streamed_grows_to_the_answer(comparison: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "BETWEEN_SHOWS", 0.0)
    shown = list(comparison.stream(Asked("w7 w8", 24)))
    last_before, last_after = shown[-1]
    for side, last in ((0, last_before), (1, last_after)):
        texts = [both[side].text for both in shown]
        assert all(last.text.startswith(text) for text in texts)
        assert len(set(texts)) > 2
    assert [both[1].tokens for both in shown if both[0].ended is None] == [0] * sum(
        both[0].ended is None for both in shown
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_log_probs_are_those_of_the_models(comparison: Comparison, temperature: float) -> None:
    before, after = comparison(Asked("w7 w8", 10, temperature))
    model, tokenizer = comparison._model, comparison._tokenizer
    prompt = comparison._prompts.render_prompt_ids("w7 w8")
    for answer in (before, after):
        ids = [tokenizer.convert_tokens_to_ids(part.text.strip()) for part in answer.parts]
        assert len(ids) == answer.tokens
        for name in ("before", "after"):
            with torch.no_grad():
                whole = torch.tensor([prompt + ids])
                if name == "before":
                    with reference_active(model):
                        logits = model(whole).logits
                else:
                    logits = model(whole).logits
            expected = logits[0, len(prompt) - 1 : -1].log_softmax(-1)[range(len(ids)), ids]
            found = torch.tensor([getattr(part, name) for part in answer.parts])
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    own = sum(part.after for part in after.parts)
    assert after.logp == pytest.approx(own, abs=1e-4)
    assert after.reward == pytest.approx(0.1 * (own - sum(part.before for part in after.parts)), abs=1e-4)


def test_a_visitor_who_leaves_ends_the_writing(comparison: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[float] = []
    generate = comparison._model.generate

    def slow(*arguments: Any, stopping_criteria: Any, **more: Any) -> Any:
        def count(ids: Any, scores: Any, **_: Any) -> Any:
            steps.append(time.monotonic())
            time.sleep(0.05)
            return torch.zeros(len(ids), dtype=torch.bool)

        stopping_criteria.append(count)
        return generate(*arguments, stopping_criteria=stopping_criteria, **more)

    monkeypatch.setattr(comparison._model, "generate", slow)
    stream = comparison.stream(Asked("w7 w8", 24))
    next(stream)
    stream.close()
    written = len(steps)
    time.sleep(0.3)
    assert written <= len(steps) < 20
    assert len(steps) == written
    assert len(comparison(Asked("w7", 2))) == 2  # the model is free for the next one


def test_a_visitor_who_is_never_told_of_ends_it_too(comparison: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "LEFT_ALONE", -1.0)
    before, after = comparison(Asked("w7 w8", 24))
    assert (before.tokens, before.ended, after.ended) == (0, "time", "time")


def test_an_answer_ends_when_its_time_is_over(comparison: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "MAX_SECONDS", -1.0)
    assert comparison(Asked("w7 w8", 24))[0].ended == "time"


def test_an_error_while_writing_reaches_the_visitor(comparison: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(comparison._model, "generate", fail)
    with pytest.raises(torch.OutOfMemoryError):
        comparison(Asked("w7", 4))


def test_limits_are_checked_on_the_server(comparison: Comparison) -> None:
    assert all(answer.tokens <= 24 for answer in comparison(Asked("w7", 10_000)))
    for value, said in (("  \n", "Write"), (None, "Write"), (7, "Write"), ("\ud83d", "half of a character")):
        with pytest.raises(Refused, match=said):
            prompt_of(value, WORDS)
    with pytest.raises(Refused, match="100,000"):
        prompt_of("w" * 100_000, WORDS)
    assert len(prompt_of("w" * MAX_PROMPT_CHARACTERS, WORDS)) == MAX_PROMPT_CHARACTERS
    assert prompt_of(" 🎉\x07 ", WORDS) == "🎉\x07"
    assert [number_of(value, 0, 2, 1) for value in (-5, 5, None, float("nan"), "x", 1.5)] == [0, 2, 1, 1, 1, 1.5]
