"""Answers to prompts: every draw has its own seed, and a killed run ends with the file of an unbroken one."""

from __future__ import annotations

import json
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from openai_server import OpenAIServer
from tiny import tiny_model, tiny_tokenizer, with_lora

from qlora_dpo.cli import main
from qlora_dpo.labeling.call_cache import calls_path
from qlora_dpo.labeling.generate import seed_of
from qlora_dpo.labeling.records import Candidates, read_candidates
from qlora_dpo.models.generation import Completion, _DrawBySeed, complete, generate
from qlora_dpo.models.lora import save_adapter

ROOT = Path(__file__).resolve().parents[2]
SAMPLING: dict[str, Any] = {"max_new_tokens": 12, "end_token_ids": [2], "temperature": 1.0}
PROMPTS = [[1, 7, 8, 9], [1, 4], [1, 30, 31, 32, 33, 34, 35], [1, 5, 5]]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Nine prompts in the words of the tiny tokenizer, one of them messages, two with reference answers."""
    rows: list[dict[str, Any]] = [
        {"prompt": " ".join(f"w{3 + row + n}" for n in range(1 + row % 4))} for row in range(8)
    ]
    rows[1] |= {"reference_answer": "w9", "category": "math"}
    rows[2] |= {"reference_answer": " "}
    rows.append({"prompt": [{"role": "user", "content": "w9"}, {"role": "assistant", "content": "w4"},
                            {"role": "user", "content": "w5"}]})  # fmt: skip
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def arguments(prompts: Path, output: Path, *more: str) -> list[str]:
    return ["generate", "--prompts", str(prompts), "--output", str(output), "--max_new_tokens", "6", *more]


def local(prompts: Path, output: Path, model: Path, *more: str) -> int:
    given = ("--model_name_or_path", str(model), "--use_cpu", "--batch_size", "4")
    return main(arguments(prompts, output, *given, *more))


def served(prompts: Path, output: Path, url: str, *more: str) -> list[str]:
    return arguments(prompts, output, "--endpoint", url, "--endpoint_model", "m", *more)


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def by_seed(request: dict[str, Any]) -> str:
    return f"{request['messages'][-1]['content']} {request['seed']}"


def test_an_answer_depends_on_its_seed_and_not_on_its_batch() -> None:
    model, tokenizer = tiny_model().eval(), tiny_tokenizer()
    seeds = [11, 12, 13, 14]
    together = complete(model, tokenizer, PROMPTS, seeds, **SAMPLING)
    alone = [complete(model, tokenizer, [ids], [seed], **SAMPLING)[0] for ids, seed in zip(PROMPTS, seeds, strict=True)]
    backwards = complete(model, tokenizer, PROMPTS[::-1], seeds[::-1], **SAMPLING)[::-1]
    assert together == alone == backwards
    assert complete(model, tokenizer, PROMPTS, [11, 12, 13, 15], **SAMPLING)[:3] == together[:3]
    assert complete(model, tokenizer, PROMPTS, [11, 12, 13, 15], **SAMPLING)[3] != together[3]
    longer = complete(model, tokenizer, PROMPTS, seeds, **SAMPLING | {"max_new_tokens": 14})
    for long, short in zip(longer, together, strict=True):
        assert long.text.startswith(short.text)


def test_every_token_of_an_answer_is_drawn_anew() -> None:
    draw = _DrawBySeed([1, 2], 1.0, 20, torch.device("cpu"))
    drawn = torch.stack([draw(torch.zeros(2, 1), torch.zeros(2, 128)).argmax(dim=-1) for _ in range(20)])
    assert all(len(set(tokens)) > 10 for tokens in drawn.T.tolist())


def test_answers_are_drawn_from_the_models_own_distribution() -> None:
    model, tokenizer = tiny_model(seed=3).eval(), tiny_tokenizer()
    ids, count, temperature = [1, 7, 8], 4000, 0.5
    vars(model.generation_config).update(top_k=2, top_p=0.1, repetition_penalty=9.0, no_repeat_ngram_size=1)
    with torch.no_grad():
        expected = torch.softmax(model(torch.tensor([ids])).logits[0, -1] / temperature, dim=-1)
    drawn = complete(
        model, tokenizer, [ids] * count, range(count), max_new_tokens=1, end_token_ids=[2], temperature=temperature
    )
    words = tokenizer.convert_ids_to_tokens(range(128))
    found = torch.tensor([sum(answer.text == word for answer in drawn) / count for word in words])
    found[:3] = expected[:3]  # special tokens leave no text
    assert (found - expected).abs().max() < 5 * (expected.max() / count) ** 0.5
    assert (found - expected).abs().sum() < 0.3


def test_greedy_answers_are_those_of_generate() -> None:
    model, tokenizer = tiny_model().eval(), tiny_tokenizer()
    answers = complete(model, tokenizer, PROMPTS, [0] * 4, **SAMPLING | {"temperature": 0.0})
    options = {name: value for name, value in SAMPLING.items() if name != "temperature"}
    assert [answer.text for answer in answers] == generate(with_lora(model, zero=True), tokenizer, PROMPTS, **options)


def test_finish_reason_says_who_ended_the_answer() -> None:
    model, tokenizer = tiny_model().eval(), tiny_tokenizer()
    answers = complete(model, tokenizer, [[1, 7]] * 60, range(60), **SAMPLING | {"max_new_tokens": 60})
    assert {answer.finish_reason for answer in answers} == {"stop", "length"}
    for answer in answers:
        assert isinstance(answer, Completion)
        # The end token leaves no word; pad and BOS, which a random model also draws, leave none either.
        assert len(answer.text.split()) <= 60 - (answer.finish_reason == "stop")


def test_rows_are_what_the_labellers_read(prompts: Path, tmp_path: Path, model_folder: Path) -> None:
    output = tmp_path / "answers.jsonl"
    assert local(prompts, output, model_folder, "--n", "3") == 0
    rows = rows_of(output)
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in rows_of(prompts)]
    assert rows[1]["reference_answer"] == "w9" and rows[1]["category"] == "math"
    assert not {"reference_answer", "category"} & set(rows[0]) and "reference_answer" not in rows[2]
    assert all(len(set(row["answers"])) == 3 for row in rows)
    generation = rows[4]["generation"]
    assert generation["model"] == str(model_folder) and generation["seed"] == 42 and generation["row"] == 4
    assert len(generation["finish_reasons"]) == 3 and rows[4]["origin"] == f"{prompts}:5"
    assert all(isinstance(item, Candidates) for item in read_candidates(str(output)))


def test_adapter_changes_the_answers(prompts: Path, tmp_path: Path, model_folder: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    model = with_lora(tiny_model(), r=8)
    model.peft_config["default"].base_model_name_or_path = str(model_folder)
    save_adapter(model, adapter)
    base, aligned = tmp_path / "base.jsonl", tmp_path / "aligned.jsonl"
    assert local(prompts, base, model_folder) == 0
    assert main(arguments(prompts, aligned, "--adapter", str(adapter), "--use_cpu", "--batch_size", "4")) == 0
    assert [row["answers"] for row in rows_of(base)] != [row["answers"] for row in rows_of(aligned)]
    assert rows_of(aligned)[0]["generation"]["adapter"] == str(adapter)


@pytest.mark.parametrize("kept", [0, 3, 8])
def test_a_torn_local_run_ends_with_the_unbroken_file(
    kept: int, prompts: Path, tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, output = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    assert local(prompts, whole, model_folder) == 0
    lines = whole.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:kept]) + lines[kept][:-7])
    batches: list[int] = []

    def counted(*given: Any, **options: Any) -> list[Completion]:
        batches.append(len(given[2]))
        return complete(*given, **options)

    monkeypatch.setattr("qlora_dpo.models.generation.complete", counted)
    assert local(prompts, output, model_folder) == 0
    assert output.read_bytes() == whole.read_bytes()
    assert sum(batches) == 2 * (9 - kept // 2 * 2)  # two rows a batch; whole batches are not made again
    batches.clear()
    assert local(prompts, output, model_folder) == 0
    assert batches == [] and output.read_bytes() == whole.read_bytes()


def test_served_answers_stand_in_the_order_of_the_prompts(prompts: Path, tmp_path: Path) -> None:
    def slow_at_first(request: dict[str, Any]) -> str:
        time.sleep(0.2 if request["messages"][-1]["content"] == "w3" else 0)
        return by_seed(request)

    output = tmp_path / "answers.jsonl"
    with OpenAIServer(slow_at_first, faults=["500", "html", None, "429", "disconnect"]) as server:
        assert main(served(prompts, output, server.url, "--concurrency", "4", "--n", "2")) == 0
        assert len(server.requests) == 2 * 9 + 4
        assert server.requests[-1]["temperature"] == 1.0 and server.requests[-1]["max_tokens"] == 6
    rows = rows_of(output)
    assert [row["generation"]["row"] for row in rows] == list(range(9))
    assert rows[3]["answers"] == [f"{rows[3]['prompt']} {seed_of(42, 3, candidate)}" for candidate in (0, 1)]
    assert rows[3]["generation"]["finish_reasons"] == ["stop", "stop"]
    assert list(tmp_path.glob("*.sqlite*")) == []  # the calls stand in the output


@pytest.mark.slow
def test_a_served_run_that_was_killed_asks_nothing_twice(tmp_path: Path) -> None:
    prompts, output, whole = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl", tmp_path / "whole.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"question {row}"}) + "\n" for row in range(40)))
    with OpenAIServer(by_seed, delay=0.03) as server:
        command = served(prompts, output, server.url, "--concurrency", "3", "--n", "3")
        process = forks.Command(command)
        deadline = time.monotonic() + 60
        while len(server.requests) < 40 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        time.sleep(0.1)  # the server has noticed
        with closing(sqlite3.connect(calls_path(output))) as calls:
            (answered,) = calls.execute("SELECT count(*) FROM calls").fetchone()
        asked = len(server.requests)
        assert 0 < asked - answered <= 3  # those in flight
        assert main(command) == 0
        assert len(server.requests) - asked == 40 * 3 - answered
        assert main(served(prompts, whole, server.url, "--n", "3")) == 0
    assert output.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("policy", ["fail", "skip"])
def test_a_row_that_the_server_refuses_is_named_and_the_others_are_kept(
    policy: str, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fault(request: dict[str, Any]) -> str | None:
        return "400" if request["messages"][-1]["content"] == "w6 w7 w8 w9" else None

    output = tmp_path / "answers.jsonl"
    with OpenAIServer(by_seed, fault=fault) as server:
        code = main(served(prompts, output, server.url, "--bad_rows", policy))
    text = "".join(capsys.readouterr())
    assert code == (65 if policy == "fail" else 0)
    assert f"{prompts}:4: prompt: the server refuses it (400 (the prompt is longer" in text
    assert [row["generation"]["row"] for row in rows_of(output)] == [0, 1, 2, 4, 5, 6, 7, 8]


def test_one_bad_row_of_many_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    rows: list[dict[str, Any]] = [{"prompt": f"w{3 + row % 100}"} for row in range(1000)]
    rows[500] = {"prompt": 5}
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with OpenAIServer(by_seed) as server:
        assert main(served(prompts, output, server.url)) == 65
        assert f"1 of 1000 rows of {prompts} cannot be used:\n  {prompts}:501: prompt:" in capsys.readouterr().err
        assert server.requests == [] and not output.exists()


def test_prompts_of_pairs_are_taken(pairs_file: Path, tmp_path: Path) -> None:
    dialogues = tmp_path / "dialogues.jsonl"
    turn = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant: "
    dialogues.write_text(json.dumps({"chosen": f"{turn}good", "rejected": f"{turn}bad", "category": "c"}) + "\n")
    with OpenAIServer(by_seed) as server:
        assert main(served(dialogues, tmp_path / "a.jsonl", server.url, "--n", "1")) == 0
        assert main(served(pairs_file, tmp_path / "b.jsonl", server.url, "--n", "1")) == 0
    (row,) = rows_of(tmp_path / "a.jsonl")
    assert [message["content"] for message in row["prompt"]] == ["one", "two", "three"] and row["category"] == "c"
    assert [row["prompt"] for row in rows_of(tmp_path / "b.jsonl")] == [row["prompt"] for row in rows_of(pairs_file)]


def test_truncated_prompts_are_counted(prompts: Path, tmp_path: Path, model_folder: Path, capsys: Any) -> None:
    assert local(prompts, tmp_path / "a.jsonl", model_folder, "--max_prompt_length", "4") == 0
    assert "truncated: 5 prompts are longer than 4 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--seed", "7"], "seed 42, now 7"),
        (["--n", "3"], "n 2, now 3"),
        (["--temperature", "0.5"], "temperature 1.0, now 0.5"),
    ],
)
def test_answers_made_in_another_way_are_not_mixed(
    more: list[str], named: str, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "answers.jsonl"
    with OpenAIServer(by_seed) as server:
        assert main(served(prompts, output, server.url)) == 0
        before = output.read_bytes()
        assert main(served(prompts, output, server.url, *more)) == 2
        assert named in capsys.readouterr().err and output.read_bytes() == before
        prompts.write_text('{"prompt": "another"}\n')
        assert main(served(prompts, output, server.url)) == 2
        assert "answers a prompt that is not row 1 now" in capsys.readouterr().err


@pytest.mark.parametrize("content", ['{"prompt": "p", "chosen": "a", "rejected": "b"}', "my notes", "[]\n"])
def test_a_file_of_something_else_is_left_alone(
    content: str, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "answers.jsonl"
    output.write_text(content)
    assert main(served(prompts, output, "http://127.0.0.1:9/v1")) == 65
    assert "something else" in capsys.readouterr().err and output.read_text() == content


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ([], "nobody to answer"),
        (["--model_name_or_path", "m", "--concurrency", "4"], "--concurrency 4 would be ignored"),
        (["--model_name_or_path", "m", "--temperature", "0"], "all the same"),
        (["--model_name_or_path", "m", "--n", "0"], "--n 0: must be above 0"),
        (["--endpoint", "http://h/v1"], "--endpoint_model"),
        (
            ["--endpoint", "http://h/v1", "--endpoint_model", "m", "--batch_size", "3"],
            "--batch_size 3 would be ignored",
        ),
        (["--endpoint", "http://h/v1", "--model_name_or_path", "m"], "name one of them"),
        (["--adapter", "a", "--load_in_4bit", "false"], "--load_in_4bit False would be ignored"),
    ],
)
def test_what_cannot_work_is_refused(
    more: list[str], named: str, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(prompts, tmp_path / "a.jsonl", *more)) == 2
    assert named in capsys.readouterr().err
