"""`--preview`: the very tokens, what is trained on, where an answer ends; nothing that a terminal would obey."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from qlora_dpo.data.conversation_tokens import TokenizedConversation
from qlora_dpo.data.linting.preview import preview, token_text, use_color
from qlora_dpo.data.preferences import PreferencePair
from qlora_dpo.data.tokenization import PairTokenizer, TokenizedPair
from qlora_dpo.terminal import visible


def pair_of(tokenizer: Any, pair: PreferencePair, max_length: int = 200) -> tuple[TokenizedPair, int]:
    pair_tokenizer = PairTokenizer(tokenizer, max_length, max_length // 2)
    (tokenized,) = pair_tokenizer.tokenize([pair])
    assert isinstance(tokenized, TokenizedPair)
    return tokenized, pair_tokenizer.end_id


def test_every_token_is_shown_once(tokenizer: Any) -> None:
    pair, end_id = pair_of(tokenizer, PreferencePair("What is 2 + 3?", "It is 5.", "It is 6.", origin="pairs.jsonl:7"))
    lines = preview([pair], tokenizer, end_id, color=False)
    assert lines[0] == "pairs.jsonl:7"
    assert [line.split()[0] for line in lines[1::2]] == ["prompt", "chosen", "rejected"]
    assert "masked" in lines[1]
    for line, ids in zip(lines[2::2], (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids), strict=True):
        assert line.strip().removesuffix(" <- end").split("|") == "|".join(
            token_text(tokenizer, id_) for id_ in ids
        ).split("|")
    assert lines[4].endswith(" <- end")


def test_colors_say_what_is_trained_on(chatml: Any) -> None:
    pair, end_id = pair_of(chatml, PreferencePair("a", "b", "c"))
    plain, colored = (preview([pair], chatml, end_id, color=color) for color in (False, True))
    assert [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in colored] == [line.removesuffix(" <- end") for line in plain]
    assert "\x1b[90m" in colored[2]
    assert "\x1b[32;7m<|im_end|>\x1b[0m" in colored[4]
    assert "\x1b[31;7m<|im_end|>\x1b[0m" in colored[6]


def test_a_cut_answer_is_marked(chatml: Any) -> None:
    pair, end_id = pair_of(chatml, PreferencePair("a", "b " * 100, "c"), max_length=60)
    lines = preview([pair], chatml, end_id, color=False)
    assert lines[4].endswith("[cut: no end token]")
    assert lines[6].endswith(" <- end")


def test_a_conversation_shows_what_is_masked_between_its_answers(chatml: Any) -> None:
    ids = chatml("one two three four five six", add_special_tokens=False).input_ids
    sample = TokenizedConversation(ids, [2, 4, 6, 7], origin="chat.jsonl:1")
    lines = preview([sample], chatml, end_id=-1, color=False)
    assert [line.split()[0] for line in lines[1::2]][:4] == ["prompt", "completion", "masked", "completion"]


def test_text_cannot_steer_the_terminal(chatml: Any) -> None:
    pair, end_id = pair_of(chatml, PreferencePair("\x1b[2J\x1b]0;title\x07", "a\rb\u202e", "c"))
    assert all(line.isprintable() for line in preview([pair], chatml, end_id, color=False))
    assert visible("a\x1b[2J\n") == "a\\x1b[2J\\n"


def test_letters_of_any_script_stay_readable(tokenizers: Callable[[str], Any]) -> None:
    llama = tokenizers("llama_hh")
    pair, end_id = pair_of(llama, PreferencePair("你好", "再见", "不"))
    lines = preview([pair], llama, end_id, color=False)
    assert "你|好" in lines[2]


def test_a_character_of_several_tokens_is_shown_whole(chatml: Any) -> None:
    ids = {text: chatml(text, add_special_tokens=False).input_ids for text in ("é", " 你", "🎉", "x", "\ufffd")}
    joined = [id_ for part in ids.values() for id_ in part]
    lines = preview([TokenizedPair(joined, [*ids["🎉"], *ids["🎉"][:2]], ids["x"])], chatml, -1, color=False)
    shown = {text: f"{text}[{len(part)}]" for text, part in ids.items() if len(part) > 1}
    assert [len(part) for part in ids.values()][:3] == [2, 4, 4]
    assert lines[2].startswith(f"    {shown['é']}|Ġ|你[3]|{shown['🎉']}|x|")
    assert "\ufffd" not in lines[2]
    # The answer is cut in the middle of a character: what is left has only the names of its tokens.
    names = chatml.convert_ids_to_tokens(ids["🎉"][:2])
    assert lines[4] == f"    {shown['🎉']}|{'|'.join(map(visible, names))}|[cut: no end token]"


@pytest.mark.parametrize(
    ("terminal", "no_color", "expected"), [(True, "", True), (True, "1", False), (False, "", False)]
)
def test_colors_are_for_terminals_that_want_them(
    terminal: bool, no_color: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("NO_COLOR", no_color)
    assert use_color() == expected
