"""The closed world is consistent, and the base model folder that ships with it fits the tool."""

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from qlora_dpo.demo import world
from qlora_dpo.demo.world import Question

BASE = Path(world.__file__).parent / "base"
EVERY_QUESTION = world.all_questions()
MEGABYTE = 10**6


def named(prompt: str) -> Question:
    """The question with this prompt."""
    return next(question for question in EVERY_QUESTION if question.prompt == prompt)


def world_entry(question: Question) -> tuple[str, int]:
    """Category and index of the question's fact, from its place among the category's explained answers."""
    group = (question.category, question.language)
    explained = [q.explained for q in EVERY_QUESTION if (q.category, q.language) == group]
    return question.category, list(dict.fromkeys(explained)).index(question.explained)


def test_no_fact_is_both_trained_and_held_out() -> None:
    trained = {question.explained for question in world.training_questions()}
    held_out = {question.explained for question in world.held_out_questions()}
    assert trained.isdisjoint(held_out)


def test_both_languages_of_a_fact_stay_on_the_same_side() -> None:
    held_out = world.held_out_questions()
    english = {world_entry(q) for q in held_out if q.language == "en"}
    chinese = {world_entry(q) for q in held_out if q.language == "zh"}
    assert english == chinese


def test_sizes_and_balance() -> None:
    for questions, per_group in ((world.training_questions(), 24), (world.held_out_questions(), 6)):
        groups = Counter((question.category, question.language) for question in questions)
        assert len(groups) == 18
        assert set(groups.values()) == {per_group}


def test_questions_are_deterministic_and_prompts_unique() -> None:
    assert world.training_questions() == world.training_questions()
    assert world.held_out_questions() == world.held_out_questions()
    assert len({question.prompt for question in EVERY_QUESTION}) == len(EVERY_QUESTION)


def test_both_splits_are_part_of_the_world() -> None:
    assert set(world.training_questions() + world.held_out_questions()) <= set(EVERY_QUESTION)


@pytest.mark.parametrize("question", EVERY_QUESTION, ids=lambda question: question.prompt)
def test_answers_state_their_fact_and_only_one_is_explained(question: Question) -> None:
    assert world.states_fact(question.terse, question)
    assert world.states_fact(question.explained, question)
    assert not world.is_explained(question.terse, question)
    assert world.is_explained(question.explained, question)


@pytest.mark.parametrize(
    ("prompt", "answer", "right"),
    [
        ("What is 4 + 10?", "14.", True),
        ("What is 4 + 10?", "140.", False),
        ("What is 4 + 10?", "1.14.", False),
        ("What is 4 + 10?", "4 + 10 = 15, because 14 + 1 = 15.", False),
        ("What is 2 × 2?", "2 × 2 = 5, because 4 + 1 = 5.", False),
        ("2加8等于多少？", "2加8等于10，因为10减8等于2。", True),
        ("2加8等于多少？", "2加8等于12，因为12减10等于2。", False),
        ("What is the capital of France?", "The capital of France is Lyon. Paris is in France.", False),
        ("法国的首都是哪里？", "法国的首都是巴黎。", True),
        ("法国的首都是哪里？", "法国的首都是柏林。巴黎在法国。", False),
        ("What is the chemical symbol of carbon?", "Co.", False),
        ("What is the opposite of hot?", "cold", True),
        ("What is the opposite of hot?", "", False),
    ],
)
def test_states_fact_reads_the_claim(prompt: str, answer: str, right: bool) -> None:
    assert world.states_fact(answer, named(prompt)) is right


@pytest.mark.parametrize(
    "answer",
    ["", "Paris.", "The capital of France is Paris.", "The capital of France is Paris. France is a country"],
)
def test_unfinished_or_bare_answers_are_not_explained(answer: str) -> None:
    assert not world.is_explained(answer, named("What is the capital of France?"))


def test_pretraining_documents_repeat_by_seed_and_cover_every_fact() -> None:
    first = list(world.pretraining_documents(random.Random(3)))
    assert first == list(world.pretraining_documents(random.Random(3)))
    assert first != list(world.pretraining_documents(random.Random(4)))
    assert len(first) == len(EVERY_QUESTION)


def test_most_chat_turns_are_terse() -> None:
    terse = {question.terse for question in EVERY_QUESTION}
    documents = world.pretraining_documents(random.Random(0))
    turns = [d for d in documents if d.prompt is not None and d.instead_of is None]
    assert 0.90 < sum(d.text in terse for d in turns) / len(turns) < 0.97


def test_base_folder_is_small_and_fits_four_bit_blocks() -> None:
    assert sum(path.stat().st_size for path in BASE.rglob("*") if path.is_file()) <= 12 * MEGABYTE
    config = json.loads((BASE / "config.json").read_text())
    assert config["model_type"] == "llama"
    attention = config["num_attention_heads"] * config["head_dim"]
    assert all(size % 64 == 0 for size in (config["hidden_size"], config["intermediate_size"], attention))


def test_base_tokenizer_round_trips_and_cuts_exactly_at_the_answer() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE)
    for question in world.held_out_questions():
        turn = [{"role": "user", "content": question.prompt}]
        prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template(
            [*turn, {"role": "assistant", "content": question.explained}], tokenize=False
        )
        answer = whole.removeprefix(prompt)
        prompt_ids, answer_ids = tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]
        assert tokenizer(whole)["input_ids"] == prompt_ids + answer_ids
        assert prompt_ids.count(tokenizer.bos_token_id) == 1
        assert answer_ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(answer_ids, skip_special_tokens=True) == question.explained


def test_base_readme_names_the_command() -> None:
    assert re.search(r"python -m qlora_dpo\.demo\.pretrain --seed \d+", (BASE / "README.md").read_text())
