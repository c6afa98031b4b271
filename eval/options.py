"""The options of `python -m eval`: frozen dataclasses whose help is the docstring under each field."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qlora_dpo.config.values import Names

_NO_NAMES = Names()


@dataclass(frozen=True)
class AppOptions:
    """Page: of which adapter or which recorded answers, and who can reach it."""

    adapter: Path | None = None
    """A finished run, a checkpoint folder, or any PEFT LoRA folder: its model is loaded and answers."""
    recorded: Path | None = None
    """Instead of an adapter: the folder of a comparison, its answers.jsonl, or a run. No model is loaded."""
    base_model: str | None = None
    """Where the base is now, when it is not where adapter_config.json says."""
    use_cpu: bool = False
    """Run on the CPU although there is a GPU."""
    host: str = "127.0.0.1"
    """Address to serve on. Any that others can reach needs --auth."""
    port: int = 7860
    """Port; 0 takes a free one."""
    auth: bool = False
    """Ask visitors for user and password, which the environment variable QLORA_DPO_APP_AUTH holds as user:password."""
    allowed_hosts: Names = _NO_NAMES
    """Names by which the page is reached besides its address, as that of a proxy. Others can reach it then: needs
    --auth. A page on 127.0.0.1 answers to localhost, 127.0.0.1 and [::1] only; on another address also to the name of
    the machine, that of --host, and any numeric address."""
    max_new_tokens: int = 256
    """Longest answer that a visitor can ask for."""
    language: Literal["en", "zh", "auto"] = "auto"
    """Of the page: English, Chinese, or that of the terminal."""


@dataclass(frozen=True)
class CompareOptions:
    """Compare: which adapter, on which prompts, and how the answers are drawn."""

    adapter: str
    """A finished run, a checkpoint folder of any run, or any PEFT LoRA folder."""
    prompts: str | None = None
    """held_out: the pairs that the run did not train on, whose chosen answers are the reference answers; built_in: 80
    prompts in English and Chinese by category; or a file, folder or Hub id of prompts or pairs. Default: held_out where
    the adapter's run held out pairs, else built_in."""
    output: Path | None = None
    """Folder of the result; the same command again continues what is there. Default: compare in the adapter's folder;
    of a checkpoint compare-checkpoint-N in its run."""
    base_model: str | None = None
    """Where the base is now, when it is not where adapter_config.json says."""
    use_cpu: bool = False
    """Run on the CPU although there is a GPU."""
    temperature: float = 0.0
    """0 takes the likeliest token, 1 draws from the model's own distribution."""
    max_new_tokens: int | None = None
    """Longest answer in tokens. Default: that of the run's --sample_generate; 256 for an adapter of no run."""
    seed: int = 42
    """Every prompt has its own seed, made of this one and its row; both answers to it are drawn by the same."""
    max_prompts: int | None = None
    """Take only the first N prompts. Default: all."""
    max_prompt_length: int | None = None
    """Tokens of the prompt; a longer one loses its beginning, which is said. Default: as in the run, else 1024."""
    batch_size: int = 64
    """Answers that are written at once; half as many from where the GPU's memory runs out."""
    kl_samples: int = 64
    """Of so many prompts the policy also draws one answer at temperature 1, to measure its KL divergence from the
    reference; 0 leaves that out."""
    prompt_key: str = "prompt"
    """Column of the prompt: text or messages."""
    reference_answer_key: str = "reference_answer"
    """Column of a good answer. Of pairs without that column it is the chosen one."""
    fact_key: str = "fact"
    """Column of a text that a right answer contains."""
    category_key: str = "category"
    """Column of the category."""
    bad_rows: Literal["fail", "skip"] = "fail"
    """What to do when rows cannot be used: name them and stop, or name them and go on with the rest."""


@dataclass(frozen=True)
class VerdictOptions:
    """Verdicts: who says which answer is better. Rules that hold answers against reference answers always do, where
    there are some; a reward model or a judge (--endpoint) when it is named."""

    tie_margin: float = 0.0
    """Rules: scores, which are between 0 and 1, that differ by no more are a tie."""
    reward_model: str | None = None
    """A local model folder or a Hub id that AutoModelForSequenceClassification loads, with one output."""
    reward_model_in_4bit: bool = False
    """Quantize the reward model to 4 bit (NF4)."""
    judge: Literal["gsb", "reference"] = "gsb"
    """gsb: better, same or worse, asked in both orders; a judge who contradicts itself sees a tie. reference: each
    answer is scored from 0 to 10 against the reference answer, by the rules of its category."""
    judge_tie_margin: float = 1.0
    """--judge reference: scores that differ by less are a tie."""
    judge_max_tokens: int = 512
    """Longest reply of the judge; one that thinks aloud needs more."""
    canaries: bool = True
    """Also show the judge 20 made-up answers that try to steer it, and report how often they did."""


@dataclass(frozen=True)
class GateOptions:
    """Gate: whether the numbers of a comparison are good enough."""

    result: Path
    """A run, the folder of a comparison, or its summary.json."""
    rules: Path | None = None
    """YAML list of rules. Default: eval/rules/default.yaml."""


@dataclass(frozen=True)
class ReportOptions:
    """Report: of which run, and where the page goes."""

    run: Path
    """Folder of a run, in any state."""
    output: Path | None = None
    """File to write. Default: report.html in the folder of the run."""
    comparison: Path | None = None
    """Folder of a comparison whose answers and verdicts are shown. Default: compare, in the folder of the run, where
    there is one."""
    png: Path | None = None
    """Folder for the curves as PNG files besides."""
    gpu_price_per_hour: float | None = None
    """Price of an hour of the machine, for the cost of the run so far."""
    language: Literal["en", "zh"] = "en"
    """Of the page: English or Chinese."""
