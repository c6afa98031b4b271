"""The options of the commands that read, check and write data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qlora_dpo.config.values import Names

_NO_NAMES = Names()


@dataclass(frozen=True)
class PairFileOptions:
    """Pairs: where they are and how they are read."""

    file: str
    """A .jsonl, .json, .csv or .parquet file, a folder of these, a save_to_disk folder, a Hub id, or
    modelscope:ORG/NAME."""
    dataset_format: str = "auto"
    """Format to read; auto looks at the columns."""
    split: str | None = None
    """Split of a folder or Hub dataset. Default: train, or the only one there is."""
    revision: str | None = None
    """Commit, tag or branch of a Hub dataset."""
    dataset_config: str | None = None
    """Config of a Hub dataset that has several; as good as ID:CONFIG."""
    prompt_key: str = "prompt"
    """Column of the prompt (plaintext, messages)."""
    chosen_key: str = "chosen"
    """Column of the preferred answer."""
    rejected_key: str = "rejected"
    """Column of the dispreferred answer."""
    category_key: str = "category"
    """Column of the category, a text; '' for none."""
    confidence_key: str = "confidence"
    """Column of how sure the label is, above 0 and at most 1; '' for none."""
    ignore_columns: Names = _NO_NAMES
    """Columns to leave out, although they may carry content (system, input, context, tools, ...)."""


@dataclass(frozen=True)
class ConvertOptions:
    """Convert: what is written."""

    to: str
    """Format to write: hh-rlhf, plaintext, messages, opendpo, sharegpt, alpaca."""
    output: Path
    """File to write; its suffix says of what kind: .jsonl, .json, .csv, .parquet."""
    drop: Names = _NO_NAMES
    """What may be lost where the format to write has no place for it: system, history (all turns but the last),
    whitespace (around texts), thoughts, tools, chat_template_kwargs, reference_logps. A row that would lose anything
    else is refused."""
    system_prompt: Literal["keep", "fold"] = "keep"
    """fold puts a system prompt in front of the first question, for models without a system role."""
    bad_rows: Literal["fail", "skip"] = "fail"
    """What to do with rows that cannot be read or written: list them and stop, or list them and write the rest."""


@dataclass(frozen=True)
class UnpairedOptions:
    """Pair: single answers with labels or ratings, and where their pairs are written."""

    file: str
    """A .jsonl, .json, .csv or .parquet file, a folder of these, a save_to_disk folder, a Hub id, or
    modelscope:ORG/NAME. Its rows have any format of SFT data, with a label (true: good) or a rating beside it."""
    output: Path
    """File for the pairs: .jsonl, .json (also .gz) or .parquet; their format is messages."""
    rating_key: str | None = None
    """Column of the label or the rating. Default: label, kto_tag, rating, score, helpfulness, reward or
    overall_score, whichever is there."""
    dataset_format: str = "auto"
    """Format to read (of SFT data); auto looks at the columns."""
    split: str | None = None
    """Split of a folder or Hub dataset. Default: train, or the only one there is."""
    revision: str | None = None
    """Commit, tag or branch of a Hub dataset."""
    dataset_config: str | None = None
    """Config of a Hub dataset that has several; as good as ID:CONFIG."""
    messages_key: str = "messages"
    """Column of a whole conversation (messages)."""
    prompt_key: str = "prompt"
    """Column of the prompt (plaintext)."""
    response_key: str = "response"
    """Column of the answer (plaintext)."""
    bad_rows: Literal["fail", "skip"] = "fail"
    """What to do with rows that cannot be read: list them and stop, or count them and pair the rest."""


@dataclass(frozen=True)
class MixOptions:
    """Mix: sources of pairs, or their categories, at rates."""

    file: Path
    """The mixture: a .yaml with sources and their sample_rate, or OpenDPO's ratio file."""
    output: Path | None = None
    """File for the rows of one epoch: .jsonl, .json (also .gz) or .parquet. Without it only the table is printed."""
    seed: int = 42
    """With --epoch it decides which rows are taken; `train` draws by the same rule."""
    epoch: int = 0
    """Which epoch's rows are written, counted from 0."""
    bad_rows: Literal["fail", "skip"] = "fail"
    """What to do when rows are unusable: list them and stop, or count them and mix the rest."""


@dataclass(frozen=True)
class CompareLabelsOptions:
    """Two labellings of the same answers."""

    first: str
    """A record (*.labels.jsonl), or pairs of any format."""
    second: str
    """What it is compared with, of either kind."""


@dataclass(frozen=True)
class TokenOptions:
    """Tokens: whose they are, and how many a pair may have; as in `train`."""

    model_name_or_path: str | None = None
    """Model whose tokenizer reads the pairs: a local folder or a Hub id. Its weights are not read."""
    model_revision: str | None = None
    """Commit, tag or branch of a Hub model."""
    tokenizer: str | None = None
    """Folder or Hub id of a tokenizer, where there is no model yet."""
    prompt_template: str | None = None
    """Named template (hh-rlhf, anima, plain) for a tokenizer without a chat template, or instead of it."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Arguments of the chat template, as JSON: '{"enable_thinking": false}'. Those of a row's own column
    chat_template_kwargs outrank them."""
    system_prompt: Literal["keep", "fold"] = "keep"
    """fold puts a system prompt in front of the first question, for models without a system role."""
    max_length: int = 1024
    """Tokens of prompt plus completion."""
    max_prompt_length: int = 512
    """Tokens of the prompt."""


@dataclass(frozen=True)
class InspectOptions:
    """Inspect: what training would take, and where the results go."""

    per_device_train_batch_size: int = 1
    """With --gradient_accumulation_steps: their product is the number of pairs of one optimizer step."""
    gradient_accumulation_steps: int = 16
    """See --per_device_train_batch_size."""
    num_train_epochs: float = 1.0
    """Passes over the pairs."""
    tokens_per_second: float | None = None
    """Tokens that are trained on per second, where it was measured, for the time that training takes."""
    json: Path | None = None
    """File for the results as JSON."""
    png: Path | None = None
    """File for the histograms as a picture."""


@dataclass(frozen=True)
class LintOptions:
    """Lint: what the pairs are held against, and where the results go."""

    eval_dataset: str | None = None
    """Held-out pairs, same format: answers on both sides are an error above 1 % of them, prompts a warning."""
    lint: Literal["warn", "block"] = "block"
    """What errors do: warn prints them, block also ends the command with exit code 65."""
    bad_rows: Literal["fail", "skip"] = "fail"
    """Whether rows that are no pairs are errors or, as they would be left out of training, warnings."""
    show_rows: int = 5
    """Rows that are printed for each rule; all are counted, and are in --json."""
    preview: int = 0
    """Show the very tokens of this many pairs."""
    json: Path | None = None
    """File for the results as JSON, with every row."""
