"""The options of the commands that make pairs: answers of a model, and who says which one is better."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from qlora_dpo.config.values import Names
from qlora_dpo.errors import UsageError

_NO_NAMES = Names()


@dataclass(frozen=True)
class EndpointOptions:
    """Server: a model behind an OpenAI-compatible API. A key is read from the environment only (OPENAI_API_KEY)."""

    endpoint: Names = _NO_NAMES
    """Address of the server with its version, http://localhost:8000/v1. Several servers share the requests."""
    endpoint_model: str | None = None
    """Name of the model on the server."""
    concurrency: int = 16
    """Requests in flight, on all servers together."""
    timeout: float = 120.0
    """Seconds without a sign of life after which a request is sent again."""
    retries: int = 6
    """How often a request is sent again, with growing pauses, after 429, 5xx, a timeout or a lost connection."""


@dataclass(frozen=True)
class LocalModelOptions:
    """Model in memory: how it is loaded and how it reads a prompt. None of it goes with --endpoint."""

    adapter: Path | None = None
    """A run or a PEFT LoRA folder: its adapter on its base, quantized as in training."""
    model_revision: str | None = None
    """Commit, tag or branch of a Hub model."""
    load_in_4bit: bool = True
    """Quantize the model to 4 bit (NF4)."""
    use_cpu: bool = False
    """Generate on the CPU although there is a GPU."""
    batch_size: int = 16
    """Answers that are written at once. All answers to one prompt share a batch."""
    prompt_template: str | None = None
    """Named template (hh-rlhf, anima, plain) for a tokenizer without a chat template, or instead of it."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Arguments of the chat template, as JSON: '{"enable_thinking": false}'. Those of a row's own column
    chat_template_kwargs outrank them."""
    system_prompt: Literal["keep", "fold"] = "keep"
    """fold puts a system prompt in front of the first question, for models without a system role."""
    max_prompt_length: int = 512
    """Tokens of the prompt. A longer prompt loses its beginning, as in training."""


@dataclass(frozen=True)
class SamplingOptions:
    """Sampling: how an answer is drawn."""

    temperature: float = 1.0
    """1 draws from the model's own distribution, 0 takes the likeliest token."""
    max_new_tokens: int = 256
    """Longest answer in tokens."""
    seed: int = 42
    """Every answer has its own seed, made of this one, its row and its number."""
    bad_rows: Literal["fail", "skip"] = "fail"
    """What to do when rows cannot be used: name them and stop, or name them and go on with the rest."""


@dataclass(frozen=True)
class GenerateOptions:
    """Generate: answers of a model to prompts."""

    prompts: str
    """File, folder or Hub id of rows with a prompt; of pairs the prompt is taken."""
    output: Path
    """JSON Lines file to write. The same command again continues what is there."""
    model_name_or_path: str | None = None
    """A local model folder or a Hub id; with --adapter, where its base is now."""
    n: int = 2
    """Answers to each prompt."""
    prompt_key: str = "prompt"
    """Column of the prompt: text or messages."""
    reference_answer_key: str = "reference_answer"
    """Column of a reference answer, which is handed on to the labellers."""
    category_key: str = "category"
    """Column of the category."""


@dataclass(frozen=True)
class JudgeOptions:
    """Judge: a strong model says which answer is better."""

    candidates: str
    """Rows of `generate`, or pairs of any format, whose labels the judge does not see."""
    output: Path
    """JSON Lines file of pairs to write; the verdicts are in *.labels.jsonl beside it."""
    mode: Literal["gsb", "reference"] = "gsb"
    """gsb: better, same or worse, asked in both orders; a judge who contradicts itself sees a tie. reference: each
    answer is scored from 0 to 10 against the row's reference answer, by the rules of its category."""
    tie_margin: float = 1.0
    """reference: scores that differ by less are a tie."""
    cache: Path | None = None
    """SQLite file of every call by its content, so that no call is paid twice. Default: *.calls.sqlite beside
    --output."""
    price_per_million_input: float | None = None
    """Price of a million tokens that the judge reads."""
    price_per_million_output: float | None = None
    """Price of a million tokens that the judge writes."""
    judge_max_tokens: int = 512
    """Longest reply of the judge; one that thinks aloud needs more."""
    canaries: bool = True
    """Also show the judge 20 made-up answers that try to steer it, and report how often they did."""
    bad_rows: Literal["fail", "skip"] = "fail"
    """What to do when rows cannot be used: name them and stop, or name them and go on with the rest."""


@dataclass(frozen=True)
class ReferenceLabelOptions:
    """Reference answers: the reference answer is chosen, the model's own answer rejected."""

    questions: str
    """File, folder or Hub id of questions with reference answers."""
    output: Path
    """JSON Lines file of pairs to write; the model's answers are in *.answers.jsonl beside it."""
    model: str | None = None
    """A local model folder or a Hub id; with --adapter, where its base is now."""
    question_key: str = "question"
    """Column of the question: text or messages."""
    reference_answer_key: str = "std_answer"
    """Column of the reference answer."""
    category_key: str = "class"
    """Column of the category."""


@dataclass(frozen=True)
class RulesOptions:
    """Rules: a weighted list of checks says which answer is better."""

    candidates: str
    """Rows of `generate`, or pairs of any format, whose labels the rules do not see."""
    rules: Path
    """YAML list of rules with their weights."""
    output: Path
    """JSON Lines file of pairs to write; the verdicts are in *.labels.jsonl beside it."""
    min_margin: float = 0.05
    """Scores, which are between 0 and 1, that differ by less are a tie."""
    bad_rows: Literal["fail", "skip"] = "fail"
    """What to do when rows cannot be used: name them and stop, or name them and go on with the rest."""


@dataclass(frozen=True)
class RewardModelOptions:
    """Reward model: a sequence classifier with one output says which answer is better."""

    candidates: str
    """Rows of `generate`, or pairs of any format, whose labels the model does not see."""
    reward_model: str
    """A local model folder or a Hub id that AutoModelForSequenceClassification loads, with one output."""
    output: Path
    """JSON Lines file of pairs to write; the verdicts are in *.labels.jsonl beside it."""
    model_revision: str | None = None
    """Commit, tag or branch of a Hub model."""
    load_in_4bit: bool = False
    """Quantize the model to 4 bit (NF4). It then needs a quarter of the memory, and its scores are a little off."""
    use_cpu: bool = False
    """Score on the CPU although there is a GPU."""
    batch_size: int = 16
    """Answers that are scored at once."""
    max_length: int = 2048
    """Tokens of prompt and answer. A longer text loses its beginning."""
    prompt_template: str | None = None
    """Named template (hh-rlhf, anima, plain) for a tokenizer without a chat template, or instead of it."""
    min_margin: float = 0.0
    """Scores that differ by less are a tie; equal ones always are."""
    bad_rows: Literal["fail", "skip"] = "fail"
    """What to do when rows cannot be used: name them and stop, or name them and go on with the rest."""


@dataclass(frozen=True)
class HumanOptions:
    """People: a page shows the answers in a blind order, and a person says which one is better."""

    candidates: str
    """Rows of `generate`, or pairs of any format, whose labels the page does not show."""
    output: Path
    """JSON Lines file of pairs to write; the verdicts are in *.labels.jsonl beside it, those of all annotators."""
    annotator: str
    """Who is labelling: the order of the answers and the place to go on from are of this name."""
    port: int = 7861
    """Port on 127.0.0.1; 0 takes a free one."""
    bad_rows: Literal["fail", "skip"] = "fail"
    """What to do when rows cannot be used: name them and stop, or name them and go on with the rest."""


def refuse_ignored(options: Any, reason: str, *names: str) -> None:
    """Refuse options (all of the group, where none is named) that differ from their default though nothing reads them.

    Raises:
        UsageError: naming each of them.
    """
    ignored = [
        f"--{option.name} {getattr(options, option.name)} would be ignored: {reason}."
        for option in fields(options)
        if option.name in (names or vars(options)) and getattr(options, option.name) != option.default
    ]
    if ignored:
        raise UsageError("\n".join(ignored))
