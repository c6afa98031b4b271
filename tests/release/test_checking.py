"""A check passes a faithful export and names what is wrong with every other one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from gguf_models import byte_level
from openai_server import OpenAIServer
from tiny import tiny_model, tiny_tokenizer

from qlora_dpo.cli import main
from qlora_dpo.release.checking.comparing import answer_rows, why_other_ids
from qlora_dpo.release.checking.replay import Answer, Expected, read_answer


@pytest.fixture(scope="module")
def faithful(short_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Merged by PEFT itself."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    folder = tmp_path_factory.mktemp("exports") / "merged"
    base = json.loads((short_run / "adapter_config.json").read_text())["base_model_name_or_path"]
    model: Any = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), str(short_run)
    ).merge_and_unload()
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(short_run).save_pretrained(folder)
    (folder / "merge_report.json").write_text(json.dumps({"adapter": str(short_run)}))
    return folder


@pytest.fixture
def export(faithful: Path, tmp_path: Path) -> Path:
    return shutil.copytree(faithful, tmp_path / "export")


def check(folder: Path, *options: Any) -> int:
    return main(["release", "check", *map(str, (folder, "--max_prompts", 6, "--max_new_tokens", 8, *options))])


def test_a_faithful_export_passes(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(export) == 0
    output = capsys.readouterr().out
    assert "6 prompts of the 12 pairs that the run held out" in output
    assert "All 11 comparisons hold" in output
    assert "NO" not in output
    report = json.loads((export / "release_check.json").read_text())
    assert (report["passed"], report["problems"], report["prompts"]) == (True, [], 6)


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | changes))


def change_template(folder: Path, old: str, new: str) -> None:
    file = folder / "chat_template.jinja"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def without_update(folder: Path) -> None:
    tiny_model().save_pretrained(folder)


def adapted(folder: Path) -> list[str]:
    """The weights that the adapter changes."""
    from safetensors.torch import load_file

    base = tiny_model().state_dict()
    return [name for name, tensor in load_file(folder / "model.safetensors").items() if (tensor != base[name]).any()]


def mix(folder: Path, base: dict[str, Any], parts: dict[str, float]) -> None:
    """Of these weights keep so many parts of what sets them apart from the base."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors |= {name: base[name] + part * (tensors[name] - base[name]) for name, part in parts.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def with_other_words(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    content = json.loads(text)
    words = content["model"]["vocab"]
    words["w7"], words["w8"] = words["w8"], words["w7"]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def resized(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(136, mean_resizing=False)
    model.save_pretrained(folder)


BREAKS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "no template": (lambda folder: (folder / "chat_template.jinja").unlink(), "chat template", "has no chat template"),
    "other template": (lambda folder: change_template(folder, "'w5 '", "'w9 '"), "chat template", "where training had"),
    "no generation prompt": (
        lambda folder: change_template(folder, "{{ 'w5 ' }}", ""), "prompt ids", "its end is missing: 'w5'",
    ),
    "BOS doubled": (
        lambda folder: change_template(folder, "{{ bos_token }}", "{{ bos_token + ' ' + bos_token }}"), "prompt ids",
        "BOS (<s>) is doubled",
    ),
    "BOS missing": (
        lambda folder: change_template(folder, "{{ bos_token }}", ""), "prompt ids", "BOS (<s>) is missing",
    ),
    "no end token": (
        lambda folder: edit(folder / "generation_config.json", eos_token_id=9), "stops at", "answers would run on",
    ),
    "other eos": (
        lambda folder: edit(folder / "tokenizer_config.json", eos_token="w9"), "eos_token", "</s> in training",
    ),
    "other tokenizer": (with_other_words, "vocabulary", "another tokenizer ('w"),
    "resized": (resized, "embedding rows", "the base has 128 rows, the export 136"),
    "the base": (without_update, "log-probs", "look at the fidelity of the merge"),
    "a layer without its update": (
        lambda folder: mix(folder, tiny_model().state_dict(), {"model.layers.1.mlp.up_proj.weight": 0.0}), "weights",
        "1 tensors are not those of base and adapter: model.layers.1.mlp.up_proj.weight holds 0% of",
    ),
    "a doubled update": (
        lambda folder: mix(folder, tiny_model().state_dict(), dict.fromkeys(adapted(folder), 2.0)), "weights",
        "holds 200% of the adapter's update",
    ),
    "another base": (
        lambda folder: mix(folder, tiny_model(seed=3).state_dict(), {"model.embed_tokens.weight": 0.0}), "weights",
        "model.embed_tokens.weight is not that of the base",
    ),
}  # fmt: skip


@pytest.mark.parametrize("broken", BREAKS)
def test_what_is_wrong_is_named(broken: str, export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, row, reason = BREAKS[broken]
    spoil(export)
    assert check(export) == 1
    captured = capsys.readouterr()
    named = [line for line in captured.err.splitlines() if f": {row}: " in line]
    assert len(named) == 1, captured.err
    assert reason in named[0]
    assert any(line.startswith("NO") and f" {row} " in line for line in captured.out.splitlines())
    report = json.loads((export / "release_check.json").read_text())
    assert not report["passed"]
    assert any(reason in problem for problem in report["problems"])


def test_a_lost_leading_space_is_named() -> None:
    from tokenizers import pre_tokenizers

    tokenizer, other = byte_level("gpt-2", ["<|end|>"]), byte_level("gpt-2", ["<|end|>"])
    prefixed = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)])
    tokenizer.backend_tokenizer.pre_tokenizer = prefixed
    ids, own = tokenizer("Hello, world").input_ids, other("Hello, world").input_ids
    assert "a leading space is lost" in why_other_ids(ids, own, tokenizer, other)
    assert "a leading space is added" in why_other_ids(own, ids, other, tokenizer)


def test_prompts_of_a_file_and_those_that_cannot_be_replayed(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "w6 w4"}, {"prompt": "w5 </s> w6"}, {"prompt": [{"role": "user", "content": "w7"}]}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert check(export, "--prompts", file) == 0
    assert f"2 prompts of --prompts {file} (1 left out" in capsys.readouterr().out
    file.write_text(json.dumps({"prompt": "w5 </s> w6"}) + "\n")
    assert check(export, "--prompts", file) == 65
    assert "name of a control token" in capsys.readouterr().err
    file.write_text('{"prompt": 3}\n')
    assert check(export, "--prompts", file) == 65


def test_bad_input_is_named(export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error_of(code: int, folder: Path, *options: Any) -> str:
        assert check(folder, *options) == code
        return capsys.readouterr().err

    assert "no such folder" in error_of(74, tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "it is no export" in error_of(74, tmp_path / "empty")
    assert "is a whole model, not an adapter" in error_of(65, export, "--adapter", export)
    assert "no such file" in error_of(74, export, "--gguf", tmp_path / "absent.gguf")
    assert "would be ignored" in error_of(2, export, "--server_model", "m")
    assert "at least 1" in error_of(2, export, "--max_prompts", 0)
    (export / "model.safetensors").unlink()
    assert "cannot load it" in error_of(65, export)
    (export / "merge_report.json").unlink()
    assert "--adapter" in error_of(2, export)


def test_a_run_and_a_foreign_adapter_are_checked_against_themselves(
    short_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(short_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    edit_yaml(run / "config.yaml", load_in_4bit=True)  # in 16 bit its log-probs would be others
    assert check(run) == 0
    assert "No config.yaml beside the adapter" not in capsys.readouterr().out
    (run / "config.yaml").unlink()
    (run / "run.json").unlink()
    assert check(run) == 0
    assert "taking NF4 with double quantization and bfloat16" in capsys.readouterr().out


def edit_yaml(file: Path, **changes: Any) -> None:
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | changes))


def test_places_where_two_tokens_are_as_likely_are_left_out() -> None:
    answer = Answer((1,), (5, 6, 7, 2), "a b c", True, (-0.1,) * 4, (3.0, 0.3, 0.05, 3.0))
    expected = Expected(tiny_tokenizer(), [answer], 2, 128, 8, noise=0.02, gap_noise=0.4)

    def told(found: Answer) -> tuple[str, bool | None]:
        row = answer_rows(expected, [found], expected.tokenizer, 0.98, 0.05)[1]
        return row.value, row.holds

    def forced(*gaps: float) -> Answer:
        return replace(answer, ids=(), text="", ended=False, gaps=gaps)

    assert told(forced(2.0, -0.2, -0.3, 1.0)) == ("2 of 2 the same (2 too near to the next left out)", True)
    assert told(forced(2.0, 0.2, 0.3, -0.5)) == ("1 of 2 the same (2 too near to the next left out)", False)
    written = replace(answer, gaps=())
    assert told(written)[1]
    assert told(replace(written, ids=(5, 9, 9, 9), ended=False)) == (
        "1 of 1 the same (1 too near to the next left out)", True,
    )  # fmt: skip
    assert told(replace(written, ids=(9, 6, 7, 2))) == ("0 of 1 the same", False)
    assert told(replace(written, ids=(5, 6, 7, 9), ended=False))[1] is False, "the answer runs on"


def test_an_adapter_folder_is_checked_on_its_base(short_run: Path, tmp_path: Path) -> None:
    assert main(["release", "adapter", str(short_run), "--output", str(tmp_path / "adapter")]) == 0
    assert check(tmp_path / "adapter") == 0
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = {name: torch.zeros_like(tensor) for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    assert check(tmp_path / "adapter") == 1


class ServedModel(OpenAIServer):
    """A server of a folder, which renders chats itself; `tells_ids` as vLLM does where it is asked."""

    def __init__(self, folder: Path, tells_ids: bool = True, more: tuple[int, ...] = ()) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model, self.tells_ids, self.more = AutoModelForCausalLM.from_pretrained(folder), tells_ids, more
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        knows = ("prompt_logprobs",) if tells_ids else ()
        super().__init__(knows=knows, logps=self.scores, refuses_unknown=True)

    def scores(self, ids: Sequence[int]) -> list[float]:
        return [0.0, *read_answer(self.model, ids[:1], ids[1:])[0]]

    def _body(self, path: str, request: dict[str, Any], spoil: Any) -> dict[str, Any]:
        if not path.endswith("/chat/completions"):
            return super()._body(path, request, spoil)
        prompt = self.tokenizer.apply_chat_template(request["messages"], add_generation_prompt=True)["input_ids"]
        prompt = [*prompt, *self.more]
        limit = request["max_tokens"]
        with torch.no_grad():
            ids = self.model.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=limit, do_sample=False
            )[0, len(prompt) :].tolist()
        ended = ids[-1] == 2
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        choice = {"message": {"content": text}, "finish_reason": "stop" if ended else "length"}
        told = self.tells_ids and request.get("return_token_ids")
        ids_told = {"prompt_token_ids": prompt, "choices": [choice | {"token_ids": ids}]}
        return ids_told if told else {"choices": [choice]}


def check_served(folder: Path, server: ServedModel) -> int:
    return check(folder, "--server", server.url, "--server_model", "m")


def test_a_server_of_the_folder_is_replayed(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ServedModel(export) as server:
        assert check_served(export, server) == 0
        assert {request["temperature"] for request in server.requests if "messages" in request} == {0.0}
    assert "All 14 comparisons hold" in capsys.readouterr().out


def test_a_server_that_renders_otherwise_is_named(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ServedModel(export, more=(9,)) as server:
        assert check_served(export, server) == 1
    assert "prompt ids: prompts reach the model with other ids than in training: there is more at its end: 'w9'" in (
        capsys.readouterr().err
    )


def test_a_server_that_tells_only_texts_is_compared_by_them(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ServedModel(export, tells_ids=False) as server:
        assert check_served(export, server) == 0
    captured = capsys.readouterr()
    assert [line.split()[1:3] for line in captured.out.splitlines() if line.startswith("?")] == [
        ["prompt", "ids"], ["log-probs", "not"],
    ]  # fmt: skip
    assert "Its log-probs of 6 of 6 answers are not compared" in captured.err
