"""`release check`: an exported folder, a GGUF file or a server must treat prompts as the trained adapter does.

The trained adapter answers first and is freed. What was exported is then loaded by plain transformers: no code of this
tool touches that model.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qlora_dpo.config.release import CheckOptions
from qlora_dpo.data.preferences import Message
from qlora_dpo.errors import QloraDpoError, StorageError, UsageError
from qlora_dpo.files.guard import check_output, json_with
from qlora_dpo.models.loading import choose_device
from qlora_dpo.release.adapter_export import refuse_whole_model
from qlora_dpo.release.artefact import Artefact, open_artefact, say_what_is_assumed, tokenizer_of
from qlora_dpo.release.cards.records import CHECK_REPORT, MERGE_REPORT
from qlora_dpo.release.checking.comparing import Row, answer_rows, stop_rows, table, template_row, tokenizer_rows
from qlora_dpo.release.checking.prompts import check_prompts
from qlora_dpo.release.checking.replay import (
    Expected,
    expected_answers,
    export_answers,
    free_memory,
    load_export,
    refuse_missing,
)
from qlora_dpo.release.checking.weights import weights_row
from qlora_dpo.training.folder.content import weights_fingerprint
from qlora_dpo.training.folder.run_folder import write_atomically
from qlora_dpo.training.trained_on import BASE_HELD

_READ_BACK = ("LlamaForCausalLM", "Qwen2ForCausalLM")  # architectures whose GGUF transformers reads as it was written


class NotTheTrainedModel(QloraDpoError):
    """What was exported does not do what was trained."""

    exit_code = 1


def check(options: CheckOptions) -> None:
    """The `release check` command: print what holds.

    Raises:
        NotTheTrainedModel: something does not.
        UsageError: nothing says which run the folder was made from, or an option has no meaning.
        StorageError, ModelError, EndpointError: adapter, export or server cannot be read.
    """
    _refuse(options)
    check_output(options.folder / CHECK_REPORT, is_own=json_with("passed", "problems", "compared"), option=None)
    adapter = options.adapter or _adapter_of(options.folder)
    refuse_whole_model(adapter)
    artefact = open_artefact(adapter, base_model=options.base_model)
    say_what_is_assumed(artefact)
    tokenizer = tokenizer_of(artefact)
    prompts = check_prompts(options.prompts, options.max_prompts, artefact, tokenizer)
    device = choose_device(options.use_cpu)
    expected = expected_answers(artefact, tokenizer, prompts.rows, device, options.max_new_tokens)
    ended = sum(answer.ended for answer in expected.answers)
    left_out = f" ({prompts.left_out} left out: too long, or with a control token's name)" if prompts.left_out else ""
    print(
        f"{artefact.named}: {len(prompts.rows)} prompts of {prompts.source}{left_out}; {ended} of its answers "
        f"end within {options.max_new_tokens} tokens. Rounding alone moves their log-probs by {expected.noise:.2g}."
    )
    found: dict[str, list[Row]] = {}
    for name, rows in _compared(options, artefact, expected, prompts.rows, device):
        print(f"\n{name}\n" + "\n".join(table(rows)), flush=True)
        found[name] = rows
    problems = [
        f"{name}: {row.name}: {row.advice}" for name, rows in found.items() for row in rows if row.holds is False
    ]
    compared = sum(map(len, found.values()))
    _note(options.folder, found, problems, prompts.source, len(prompts.rows))
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise NotTheTrainedModel(f"{len(problems)} of {compared} comparisons do not hold:\n{listed}")
    print(f"\nAll {compared} comparisons hold: what was exported does what was trained.")


def _note(folder: Path, found: dict[str, list[Row]], problems: list[str], source: str, count: int) -> None:
    """Leave the verdict in the folder, for its card and for whoever publishes it."""
    compared = {name: [asdict(row) for row in rows] for name, rows in found.items()}
    content = {
        "passed": not problems, "problems": problems, "prompts": count, "source": source, "compared": compared,
        "weights": weights_fingerprint(folder),
    }  # fmt: skip
    try:
        write_atomically(folder / CHECK_REPORT, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise StorageError(f"{folder / CHECK_REPORT} cannot be written: {error.strerror or error}.") from error


def _compared(
    options: CheckOptions, artefact: Artefact, expected: Expected, prompts: Sequence[Sequence[Message]], device: Any
) -> Iterator[tuple[str, list[Row]]]:
    """Each thing that was exported, with its rows; one model in memory at a time."""
    limits = options.min_same_tokens, options.max_difference
    export = load_export(options.folder, device, artefact.origin)
    rows = [*tokenizer_rows(expected, export), template_row(expected, export, prompts), *stop_rows(expected, export)]
    rows += answer_rows(expected, export_answers(export, prompts, expected), export.tokenizer, *limits)
    del export
    free_memory()
    yield f"{options.folder}, by transformers", [*rows, weights_row(artefact, options.folder, device)]
    if options.gguf is not None and importlib.util.find_spec("llama_cpp"):
        from qlora_dpo.release.checking.replay_llama_cpp import llama_cpp_answers

        answers = llama_cpp_answers(options.gguf, prompts, expected)
        yield f"{options.gguf}, by llama.cpp", answer_rows(expected, answers, expected.tokenizer, *limits)
    elif options.gguf is not None:
        export = load_export(options.folder, device, artefact.origin, options.gguf)
        rows = [template_row(expected, export, prompts), *stop_rows(expected, export)]
        rows += answer_rows(expected, export_answers(export, prompts, expected), export.tokenizer, *limits)
        del export
        free_memory()
        yield f"{options.gguf}, read back by transformers (llama-cpp-python is not installed)", rows
    if options.server is not None:
        from qlora_dpo.release.checking.replay_served import served_answers

        answers = served_answers(options.server, options.server_model, prompts, expected)
        yield options.server, answer_rows(expected, answers, expected.tokenizer, *limits)


def _refuse(options: CheckOptions) -> None:
    if options.max_prompts < 1 or options.max_new_tokens < 1:
        raise UsageError(
            f"--max_prompts {options.max_prompts} and --max_new_tokens {options.max_new_tokens} must be at least 1."
        )
    if options.server_model and not options.server:
        raise UsageError(f"--server_model {options.server_model} would be ignored: --server names no server.")
    refuse_missing(options.folder)
    if options.gguf is not None and not options.gguf.is_file():
        raise StorageError(f"--gguf {options.gguf}: there is no such file. Write it with `release gguf`.")
    if options.gguf is not None and not importlib.util.find_spec("llama_cpp"):
        _refuse_read_back(options.gguf, options.folder)


def _refuse_read_back(gguf: Path, folder: Path) -> None:
    """transformers reads back the head sizes and rotary scalings of few families: it would accuse a faithful file."""
    config = folder / "config.json"
    names = (json.loads(config.read_text(encoding="utf-8")).get("architectures") if config.is_file() else None) or []
    other = [name for name in names if name not in _READ_BACK]
    if other:
        raise UsageError(
            f"--gguf {gguf} is of a {other[0]}, of which transformers does not read all that the file says. Install "
            "llama-cpp-python: it is replayed by llama.cpp then."
        )


def _adapter_of(folder: Path) -> Path:
    """The run that an export names; an adapter that names none is a run's, or another tool's, and is its own.

    Raises:
        UsageError: it names none, or that is gone.
    """
    is_adapter = (folder / "adapter_config.json").is_file()
    named = str(folder) if is_adapter else None
    for name in (BASE_HELD,) if is_adapter else (MERGE_REPORT,):
        if (folder / name).is_file():
            named = json.loads((folder / name).read_text(encoding="utf-8")).get("adapter")
    if named is None:
        raise UsageError(f"{folder} does not say which run it was made from: name that with --adapter.")
    if not Path(named).is_dir():
        raise UsageError(f"{folder} was made from {named}, which is gone: name the run with --adapter.")
    return Path(named)
