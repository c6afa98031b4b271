"""Answers of a model to prompts: of the 4-bit model here, in batches, or of a served one, with many requests in flight.

Every answer has its own seed, and a batch is always made of the same rows, so a run that was killed goes on to the very
file that it would have written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from qlora_dpo.config.labeling import (
    EndpointOptions,
    GenerateOptions,
    LocalModelOptions,
    SamplingOptions,
    refuse_ignored,
)
from qlora_dpo.data.preferences import RefusedRow
from qlora_dpo.endpoint import Endpoint, RequestRefused
from qlora_dpo.errors import ResourceError, UsageError
from qlora_dpo.files.guard import refuse_inputs
from qlora_dpo.labeling.answer_file import AnswerFile, Answers
from qlora_dpo.labeling.call_cache import CachedChat, CallCache, calls_path, is_call_cache
from qlora_dpo.labeling.prompts import PromptRow, load_prompts
from qlora_dpo.labeling.refused import report_refused


def generate(
    options: GenerateOptions, sampling: SamplingOptions, local: LocalModelOptions, server: EndpointOptions
) -> None:
    """The `generate` command: a file of prompts becomes a file of prompts with `n` answers each.

    Raises:
        UsageError: options that contradict each other, or an output that holds something else.
        DataError: rows without a prompt, or that the model does not take.
        EndpointError, ModelError, StorageError: model, server or disk refuse.
    """
    prompts = load_prompts(
        options.prompts,
        sampling.bad_rows,
        prompt_key=options.prompt_key,
        reference_answer_key=options.reference_answer_key,
        category_key=options.category_key,
    )
    model = options.model_name_or_path
    answers = answer(options.prompts, prompts, options.output, options.n, model, sampling, local, server)
    print(f"{options.output}: {options.n} answers each to {len(answers):,} prompts.")


def answer(
    source: str,
    prompts: Sequence[PromptRow],
    output: Path,
    n: int,
    model: str | None,
    sampling: SamplingOptions,
    local: LocalModelOptions,
    server: EndpointOptions,
) -> dict[int, dict[str, Any]]:
    """Write `n` answers to each prompt, but to those that are in the file already; returns its rows by number.

    Raises: as `generate`.
    """
    _check(n, model, sampling, local, server)
    settings = {
        "engine": "endpoint" if server.endpoint else "local",
        "model": server.endpoint_model if server.endpoint else model,
        "adapter": str(local.adapter) if local.adapter else None,
        "seed": sampling.seed,
        "temperature": sampling.temperature,
        "max_new_tokens": sampling.max_new_tokens,
    }
    refuse_inputs(output, [source], f"--output {output}")
    file = AnswerFile(output, prompts, settings, n)
    missing = [prompt for prompt in prompts if prompt.number not in file.rows]
    if file.rows:
        print(f"{output}: {len(file.rows):,} of {len(prompts):,} prompts are answered already.")
    refused: list[RefusedRow] = []
    if missing:
        # A batch must not depend on what was answered before, so the local engine gets all prompts.
        engine = (
            _served(missing, n, output, sampling, server)
            if server.endpoint
            else _local(prompts, {prompt.number for prompt in missing}, n, model, sampling, local)
        )
        for row in tqdm(engine, desc="answers", unit=" rows", total=len(missing), delay=1, leave=False):
            refused.append(row) if isinstance(row, RefusedRow) else file.add(*row)
    file.finish()
    report_refused(source, refused, len(prompts) - len(refused), sampling.bad_rows)
    if is_call_cache(calls_path(output)):
        calls_path(output).unlink()  # all of it stands in the output now
    return file.rows


Engine = Iterator[tuple[int, Answers] | RefusedRow]


def _local(
    prompts: Sequence[PromptRow],
    missing: set[int],
    n: int,
    model_name: str | None,
    sampling: SamplingOptions,
    local: LocalModelOptions,
) -> Engine:
    """Answers of a model in memory, batch by batch."""
    import torch

    from qlora_dpo.data.template_clock import pinned_date
    from qlora_dpo.data.templates import set_up_chat_template
    from qlora_dpo.models.generation import complete

    model, tokenizer = _load(model_name, local)
    set_up_chat_template(
        tokenizer,
        prompt_template=local.prompt_template,
        chat_template_kwargs=local.chat_template_kwargs,
        system_prompt=local.system_prompt,
        date=pinned_date(tokenizer),
    )
    ids, end_id, refused, _ = render(tokenizer, prompts, local.max_prompt_length, sampling.max_new_tokens)
    yield from refused
    if refused and sampling.bad_rows == "fail":
        return
    numbers = sorted(ids)
    rows_at_once = max(1, local.batch_size // n)
    for start in range(0, len(numbers), rows_at_once):
        batch = numbers[start : start + rows_at_once]
        if not missing.intersection(batch):
            continue
        candidates = [(number, candidate) for number in batch for candidate in range(n)]
        try:
            completions = complete(
                model, tokenizer, [ids[number] for number, _ in candidates],
                [seed_of(sampling.seed, *candidate) for candidate in candidates],
                max_new_tokens=sampling.max_new_tokens, end_token_ids=[end_id], temperature=sampling.temperature,
            )  # fmt: skip
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"the device ran out of memory with {len(candidates)} answers at once. Lower --batch_size "
                f"{local.batch_size} or --max_new_tokens {sampling.max_new_tokens} and run the same command again."
            ) from error
        answers: Answers = [(completion.text, completion.finish_reason) for completion in completions]
        for place, number in enumerate(batch):
            if number in missing:
                yield number, answers[place * n : (place + 1) * n]


def _served(
    prompts: Sequence[PromptRow], n: int, output: Path, sampling: SamplingOptions, server: EndpointOptions
) -> Engine:
    """Answers of a served model, in the order in which they come."""
    endpoint = Endpoint(
        server.endpoint, server.endpoint_model or "", server.concurrency, server.timeout, server.retries
    )
    print(f"The prompts of {len(prompts):,} rows go to {' and '.join(server.endpoint)}.")
    chat = CachedChat(endpoint, CallCache(calls_path(output)))

    async def work(row: PromptRow) -> Answers | RefusedRow:
        messages = [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else row.prompt
        answers: Answers = []
        for candidate in range(n):
            try:
                reply = await chat(
                    messages, max_tokens=sampling.max_new_tokens, temperature=sampling.temperature,
                    seed=seed_of(sampling.seed, row.number, candidate),
                )  # fmt: skip
            except RequestRefused as refusal:
                return RefusedRow(row.origin, "prompt", f"the server refuses it ({refusal})")
            answers.append((reply.text.strip(), reply.finish_reason))
        return answers

    try:
        for row, result in endpoint.results(prompts, work):
            yield result if isinstance(result, RefusedRow) else (row.number, result)
    finally:
        chat.cache.close()


def seed_of(seed: int, number: int, candidate: int) -> int:
    """The seed of one answer, which no other answer of the run shares."""
    digest = hashlib.sha256(f"{seed}:{number}:{candidate}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1  # servers take 31 bits


def _load(model_name: str | None, local: LocalModelOptions) -> tuple[Any, Any]:
    """(model, tokenizer), ready to generate."""
    import torch

    from qlora_dpo.config.training import ModelOptions, quantization_of
    from qlora_dpo.models.loading import choose_device, load_base, load_tokenizer
    from qlora_dpo.training.trained_on import load_trained

    if local.adapter is not None:
        return load_trained(local.adapter, base_model=model_name, use_cpu=local.use_cpu)
    assert model_name is not None
    quantization = quantization_of(ModelOptions(load_in_4bit=local.load_in_4bit))
    device = choose_device(local.use_cpu)
    tokenizer = load_tokenizer(model_name, local.model_revision)
    model = load_base(
        model_name, device=device, revision=local.model_revision, quantization=quantization, dtype=torch.bfloat16
    )
    return model.eval(), tokenizer


class Rendered(NamedTuple):
    """Prompts as token ids."""

    ids: dict[int, list[int]]
    """By row."""
    end_id: int
    """The token that ends an answer."""
    refused: list[RefusedRow]
    """Rows that the chat template refuses."""
    truncated: list[int]
    """Rows that lost their beginning."""


def render(tokenizer: Any, prompts: Sequence[PromptRow], max_prompt_length: int, max_new_tokens: int) -> Rendered:
    """Prompts as the model gets them; says how many lost their beginning."""
    from qlora_dpo.data.tokenization import PairTokenizer

    whole = PairTokenizer(tokenizer, max_length=2**31, max_prompt_length=2**31 - 1)
    fitting = PairTokenizer(
        tokenizer, max_length=max_prompt_length + max_new_tokens, max_prompt_length=max_prompt_length
    )
    ids: dict[int, list[int]] = {}
    refused: list[RefusedRow] = []
    truncated: list[int] = []
    for prompt in prompts:
        try:
            ids[prompt.number] = whole.render_prompt_ids(prompt.prompt)
        except UsageError as error:
            refused.append(RefusedRow(prompt.origin, "prompt", f"the chat template refuses it ({error.__cause__})"))
            continue
        if len(ids[prompt.number]) > max_prompt_length:
            truncated.append(prompt.number)
            ids[prompt.number] = fitting.render_prompt_ids(prompt.prompt)
    if truncated:
        print(f"truncated: {len(truncated):,} prompts are longer than {max_prompt_length} tokens (the end was kept)")
    return Rendered(ids, whole.end_id, refused, truncated)


def _check(
    n: int, model: str | None, sampling: SamplingOptions, local: LocalModelOptions, server: EndpointOptions
) -> None:
    """Refuse what cannot work, or would be ignored."""
    numbers = {"n": n, "max_new_tokens": sampling.max_new_tokens, "batch_size": local.batch_size}
    problems = [f"--{name} {value}: must be above 0." for name, value in numbers.items() if value < 1]
    if sampling.temperature < 0:
        problems.append(f"--temperature {sampling.temperature}: must be at least 0.")
    if n > 1 and sampling.temperature == 0:
        problems.append(f"--n {n} answers at --temperature 0 are all the same: raise it, or ask for one.")
    if server.endpoint and model:
        problems.append(f"the model {model} and --endpoint: name one of them; a served model is --endpoint_model.")
    if not server.endpoint and not model and not local.adapter:
        problems.append("nobody to answer: name a model, an --adapter, or an --endpoint with its --endpoint_model.")
    if problems:
        raise UsageError("\n".join(problems))
    if server.endpoint:
        refuse_ignored(local, "--endpoint is given, and the server has loaded its model already")
    else:
        refuse_ignored(server, "there is no --endpoint")
    if local.adapter:
        refuse_ignored(local, "--adapter names its base and how it is held", "model_revision", "load_in_4bit")
