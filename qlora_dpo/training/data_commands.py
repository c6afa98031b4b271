"""`data inspect` and `data lint`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlora_dpo.config.data import InspectOptions, LintOptions, PairFileOptions, TokenOptions
from qlora_dpo.data.dataset import PairDataset, load_preference_dataset
from qlora_dpo.data.files.sources import with_config
from qlora_dpo.data.inspection import count_texts, inspection, table
from qlora_dpo.data.inspection_plot import draw_inspection
from qlora_dpo.data.linting.lint import kept_texts, lint_pairs, text_source, tokenized_source
from qlora_dpo.data.linting.preview import preview
from qlora_dpo.data.linting.tokens import facts_of
from qlora_dpo.data.mixtures.mixture import is_mixture, read_mixture
from qlora_dpo.data.pair_reader import PairReader, reader_of
from qlora_dpo.data.preferences import PreferencePair, RefusedRow
from qlora_dpo.data.report import DataReport
from qlora_dpo.data.templates import set_up_chat_template
from qlora_dpo.errors import StorageError, UsageError
from qlora_dpo.files.atomic import PNG_MARK
from qlora_dpo.files.guard import IsOwn, check_output, json_with, marked
from qlora_dpo.terminal import print_colored
from qlora_dpo.training.folder.run_folder import write_atomically
from qlora_dpo.training.linting import refuse_errors

_IS_INSPECTION = json_with("source", "length_bias", "training")
_IS_LINT = json_with("files", "blocking", "rules")


def inspect(pairs: PairFileOptions, tokens: TokenOptions, options: InspectOptions) -> None:
    """Print what is in a file of pairs, and write it as JSON and as a picture where files are named.

    Raises:
        DataError, StorageError, UsageError: it cannot be read or no row is a pair; a result cannot be written.
    """
    _refuse_impossible(options)
    if is_mixture(pairs.file):
        raise UsageError(
            f"{pairs.file} is a mixture: `data mix` says what it is made of; inspect its sources one by one."
        )
    _check_results([pairs.file], json=(options.json, _IS_INSPECTION), png=(options.png, marked(PNG_MARK)))
    tokenizer = load_tokenizer_of(tokens)
    if tokenizer is not None:
        dataset = _tokenized(pairs, tokens, tokenizer)
        report, texts = dataset.report, (pair for _, pair in kept_texts(tokenized_source(dataset)))
        counts = count_texts(texts)
    else:
        dataset = None
        reader = reader_of(pairs)
        refused: list[RefusedRow] = []
        counts = count_texts(_usable(reader, refused))
        further, usable = reader.further_pairs, len(counts.lengths)
        report = DataReport(
            reader.source.name,
            reader.dataset_format,
            usable + len(refused) - further,
            usable,
            tuple(refused),
            repaired=dict(reader.repaired),
            unread_columns=reader.unread.names,
            further_pairs=further,
        )
        report.check("skip")
    found = inspection(report, counts, dataset)
    found["training"] = _training(found, options)
    print("\n".join(table(found)))
    if options.json is not None:
        _write(options.json, json.dumps(found, ensure_ascii=False, indent=1) + "\n")
    if options.png is not None:
        _draw(found, options.png)


def lint(pairs: PairFileOptions, tokens: TokenOptions, options: LintOptions) -> None:
    """Print what is wrong with a file of pairs, or with all sources of a mixture.

    Raises:
        DataError: a rule found errors and --lint is block; or no row is a pair.
        StorageError, UsageError: it cannot be read; a result cannot be written; an option cannot work.
    """
    for name, number in (("show_rows", options.show_rows), ("preview", options.preview)):
        if number < 0:
            raise UsageError(f"--{name} {number}: must be at least 0.")
    _check_results([pairs.file, options.eval_dataset], json=(options.json, _IS_LINT))
    tokenizer = load_tokenizer_of(tokens)
    if tokenizer is None and options.preview:
        raise UsageError("--preview shows tokens: name their tokenizer with --model_name_or_path or --tokenizer.")
    training = _sources_of(pairs)
    held_out = [replace(pairs, file=options.eval_dataset, dataset_config=None)] if options.eval_dataset else []
    files = [*training, *held_out]
    facts = None if tokenizer is None else facts_of(tokenizer, tokens.max_length, tokens.max_prompt_length)
    if tokenizer is not None and facts is not None:
        datasets = [_tokenized(file, tokens, tokenizer) for file in files]
        shown = datasets[0][: options.preview]
        if shown:
            print_colored("\n".join([*preview(shown, tokenizer, facts.end_id), ""]))
        sources = [tokenized_source(dataset) for dataset in datasets]
    else:
        sources = [text_source(reader_of(file)) for file in files]
    counts = [len(source.origins) for source in sources]
    places, trained = range(sum(counts)), sum(counts[: len(training)])
    report = lint_pairs(
        sources, train=places[:trained], held_out=places[trained:], facts=facts, bad_rows=options.bad_rows
    )
    print("\n".join(report.lines(options.show_rows)))
    if options.json is not None:
        content = {"files": [file.file for file in files], **report.as_json()}
        _write(options.json, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    if options.lint == "block":
        refuse_errors(report, pairs.file)


def load_tokenizer_of(tokens: TokenOptions) -> Any | None:
    """The tokenizer that the options name, with its prompt template; None where they name none.

    Raises:
        UsageError: two are named, or options of tokens would be ignored because none is.
    """
    if tokens.model_name_or_path and tokens.tokenizer:
        raise UsageError("--model_name_or_path and --tokenizer both name a tokenizer: leave one of them out.")
    name = tokens.model_name_or_path or tokens.tokenizer
    if name is None:
        default = TokenOptions()
        given = [
            f"--{option} {value} would be ignored: no tokenizer is named. Give --model_name_or_path or --tokenizer."
            for option, value in vars(tokens).items()
            if value != getattr(default, option)
        ]
        if given:
            raise UsageError("\n".join(given))
        return None
    from qlora_dpo.models.loading import load_tokenizer

    tokenizer = load_tokenizer(name, tokens.model_revision)
    set_up_chat_template(
        tokenizer,
        prompt_template=tokens.prompt_template,
        chat_template_kwargs=tokens.chat_template_kwargs,
        system_prompt=tokens.system_prompt,
    )
    return tokenizer


def _sources_of(pairs: PairFileOptions) -> list[PairFileOptions]:
    """The file itself, or the sources of a mixture, each with what the mixture says about how it is read."""
    if not is_mixture(pairs.file):
        return [pairs]
    default, file = PairFileOptions(pairs.file), pairs.file
    ignored = [name for name, value in vars(pairs).items() if value != getattr(default, name)]
    if ignored:
        raise UsageError(
            f"--{ignored[0]} would be ignored: {file} is a mixture; write it there, at the source that it is of."
        )
    return [
        replace(pairs, file=source.path, dataset_format=source.format, split=source.split, revision=source.revision,
                **{name: key for name, key in source.keys.items() if hasattr(pairs, name)})
        for source in read_mixture(file).sources
    ]  # fmt: skip


def _tokenized(pairs: PairFileOptions, tokens: TokenOptions, tokenizer: Any) -> PairDataset:
    return load_preference_dataset(
        with_config(pairs.file, pairs.dataset_config),
        tokenizer=tokenizer,
        dataset_format=pairs.dataset_format,
        split=pairs.split,
        revision=pairs.revision,
        prompt_key=pairs.prompt_key,
        chosen_key=pairs.chosen_key,
        rejected_key=pairs.rejected_key,
        category_key=pairs.category_key,
        confidence_key=pairs.confidence_key,
        ignore_columns=pairs.ignore_columns,
        max_length=tokens.max_length,
        max_prompt_length=tokens.max_prompt_length,
        bad_rows="skip",
    )


def _usable(reader: PairReader, refused: list[RefusedRow]) -> Iterator[PreferencePair]:
    for row in reader:
        if isinstance(row, PreferencePair):
            yield row
        else:
            refused.append(row)


def _refuse_impossible(options: InspectOptions) -> None:
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "tokens_per_second"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise UsageError(f"--{name} {value}: must be above 0.")


def _training(found: dict[str, Any], options: InspectOptions) -> dict[str, Any]:
    """Steps, and with a rate hours."""
    from qlora_dpo.training.schedule import make_schedule

    pairs_per_step = options.per_device_train_batch_size * options.gradient_accumulation_steps
    places, epochs, rate = range(found["pairs"]), options.num_train_epochs, options.tokens_per_second
    schedule = make_schedule(places, pairs_per_step, epochs=epochs, max_steps=-1, seed=0)
    if rate is not None and "sharing" not in found:
        raise UsageError(
            "--tokens_per_second would be ignored: no tokenizer counts the tokens. Give --model_name_or_path."
        )
    tokens = schedule.epoch(schedule.total_steps) * found["sharing"]["tokens"] if "sharing" in found else None
    return {
        "pairs_per_step": pairs_per_step,
        "epochs": epochs,
        "steps": schedule.total_steps,
        "tokens": None if tokens is None else round(tokens),
        "tokens_per_second": rate,
        "hours": None if rate is None or tokens is None else round(tokens / rate / 3600, 4),
    }


def _check_results(inputs: Sequence[str | None], **results: tuple[Path | None, IsOwn]) -> None:
    """Refuse files for results, by option, that are inputs or another program's."""
    for option, (file, is_own) in results.items():
        if file is not None:
            check_output(file, inputs=[name for name in inputs if name], is_own=is_own, option=option)


def _write(path: Path, text: str) -> None:
    try:
        write_atomically(path, text)
    except OSError as error:
        raise _unwritable(path, error) from error


def _draw(found: dict[str, Any], path: Path) -> None:
    try:
        draw_inspection(found, path)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> StorageError:
    return StorageError(f"cannot write {path}: {error.strerror or error}; check the path and its rights.")
