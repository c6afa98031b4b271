"""What is measured, in the order of its worth: checks, the headline, TRL, the caps, then everything else."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from benchmarks.gpu.scale import Scale
from benchmarks.run_trl import TrlForm

Key = tuple[str, str]
"""Table and row."""

PACKAGE = "benchmarks.gpu"


@dataclass(frozen=True)
class Job:
    """One process: a function that yields rows, the rows that it owes, and the seconds that it may take."""

    part: str
    call: str
    arguments: dict[str, Any]
    rows: tuple[Key, ...]
    seconds: float
    needs_cuda: bool = False
    joins: bool = False
    """Runs in the process of the job before it: its memory need not be fresh."""

    def arguments_for(self, rows: Collection[Key]) -> dict[str, Any]:
        """The arguments with only those levers and cases that give these rows."""
        arguments = dict(self.arguments)
        if "levers" in arguments:
            arguments["levers"] = [name for name in arguments["levers"] if self._key(name) in rows]
        if "cases" in arguments:
            arguments["cases"] = [case for case in arguments["cases"] if memory_key(arguments["model"], *case) in rows]
        return arguments

    def _key(self, lever: str) -> Key:
        return "levers", f"{self.arguments['model']}: {lever}"

    def as_dict(self) -> dict[str, Any]:
        """For the process."""
        return asdict(self)


ATTENTION_CASES = (
    "lower-right causal", "grouped queries", "sliding window", "grouped queries and window", "head size 64",
)  # fmt: skip
ENGINE_CHECKS = (
    "first step: |loss - ln 2|", "packed log-probs, per token", "packed LoRA gradients, relative", "preflight's budget",
    "paged_adamw_8bit", "out of memory",
)  # fmt: skip
CAPS = (("33B", 16, 24.0), ("70B", 16, 48.0))
# The most likely best forms first: what fits without checkpointing, then large batches with it.
TRL_FORMS = (TrlForm(1, True, False), TrlForm(4, True, True), TrlForm(2, True, False), TrlForm(16, True, True))
MAIN_LEVERS = ("no lever", "all but prompt sharing", "all levers, selective checkpointing",
               "all levers, full checkpointing", "all levers, none checkpointing")  # fmt: skip
LEVER_WORDS = ("prompt sharing", "packing", "reference known", "fused LoRA", "lean layers", "chunked head",
               "chosen checkpointing")  # fmt: skip
ALL_LEVERS = (
    "no lever", *(f"{form} {words}" for words in LEVER_WORDS for form in ("all but", "only")),
    *(f"all levers, {level} checkpointing" for level in ("none", "selective", "full")),
)  # fmt: skip


def make_jobs(scale: Scale) -> list[Job]:
    """Every job at this scale, in order."""
    return real_jobs(scale) if scale.name == "real" else tiny_jobs(scale)


def real_jobs(scale: Scale) -> list[Job]:
    """All that is worth a card's time."""
    rest_of_levers = tuple(name for name in ALL_LEVERS if name not in MAIN_LEVERS)
    return [
        *self_checks(scale),
        ours(scale, "33B", MAIN_LEVERS, 150),
        trl(scale, "33B", TRL_FORMS[0], 90),
        cap(scale, CAPS[0], 60),
        cap(scale, CAPS[1], 75),
        gpu_tests(75),
        trl(scale, "33B", TRL_FORMS[1], 80),
        memory(scale, "33B", 75),
        demo(75),
        ours(scale, "7B", (*MAIN_LEVERS, *rest_of_levers), 110),
        trl(scale, "7B", TRL_FORMS[1], 45),
        memory(scale, "7B", 45),
        memory(scale, "70B", 75),
        ours(scale, "Qwen2.5-7B", (), 50),
        trl(scale, "Qwen2.5-7B", TRL_FORMS[1], 45),
        trl(scale, "7B", TRL_FORMS[0], 45),
        *(trl(scale, "33B", form, 80) for form in TRL_FORMS[2:]),
        more_levers(scale, "33B", rest_of_levers, 150),
    ]


def tiny_jobs(scale: Scale) -> list[Job]:
    """One of each kind, for tests."""
    return [
        *self_checks(scale),
        ours(scale, "33B", ("no lever", "all but prompt sharing", "only chunked head"), 60),
        trl(scale, "33B", TRL_FORMS[1], 60),
        cap(scale, CAPS[0], 60),
        gpu_tests(60),
        memory(scale, "70B", 60),
    ]


def self_checks(scale: Scale) -> tuple[Job, ...]:
    """Attention, the engine, and what the card reaches, in one process."""
    attention = tuple(f"attention: {case}" for case in ATTENTION_CASES)
    return (
        checks(scale, "attention_check:measure_attention", attention, 45),
        replace(checks(scale, "engine_checks:measure_engine", ENGINE_CHECKS, 60), joins=True),
        replace(ceilings(scale, 20), joins=True),
    )


def checks(scale: Scale, call: str, names: Iterable[str], seconds: float) -> Job:
    """Self-checks on the device."""
    rows = tuple(("checks", name) for name in names)
    return Job("checks", f"{PACKAGE}.{call}", {"scale_name": scale.name}, rows, seconds)


def gpu_tests(seconds: float) -> Job:
    """The repository's tests that need a GPU."""
    call = f"{PACKAGE}.suites:run_gpu_tests"
    return Job("checks", call, {"limit": seconds - 5}, (("checks", "tests marked gpu"),), seconds, needs_cuda=True)


def demo(seconds: float) -> Job:
    """The embedded demo."""
    return Job("demo", f"{PACKAGE}.suites:run_demo", {"limit": seconds - 5}, (("checks", "demo"),), seconds)


def ours(scale: Scale, model: str, levers: tuple[str, ...], seconds: float) -> Job:
    """This tool's speed on a model, the split of a step, and some levers."""
    rows = (
        ("models", model), ("speed", f"{model}: ours, reference known"), ("speed", f"{model}: ours, first epoch"),
        ("split", model), *(("levers", f"{model}: {name}") for name in levers),
    )  # fmt: skip
    arguments = {"scale_name": scale.name, "model": model, "levers": list(levers)}
    return Job("speed", f"{PACKAGE}.ours:headline", arguments, rows, seconds)


def more_levers(scale: Scale, model: str, levers: tuple[str, ...], seconds: float) -> Job:
    """The levers that the first process on a model leaves out."""
    rows = tuple(("levers", f"{model}: {name}") for name in levers)
    arguments = {"scale_name": scale.name, "model": model, "levers": list(levers)}
    return Job("levers", f"{PACKAGE}.ours:measure_levers", arguments, rows, seconds)


def trl(scale: Scale, model: str, form: TrlForm, seconds: float) -> Job:
    """TRL in one form."""
    arguments = {"scale_name": scale.name, "model": model, "form": asdict(form)}
    rows = (("speed", f"{model}: {form}"),)
    return Job("trl", f"{PACKAGE}.against_trl:measure_trl", arguments, rows, seconds)


def cap(scale: Scale, case: tuple[str, int, float], seconds: float) -> Job:
    """A run that may not take more than a smaller card has."""
    model, rank, card = case
    arguments = {"scale_name": scale.name, "model": model, "rank": rank, "card_gb": card}
    rows = (("caps", f"{model}, r={rank}, {card:g} GB"),)
    return Job("caps", f"{PACKAGE}.memory:measure_cap", arguments, rows, seconds, needs_cuda=True)


def memory(scale: Scale, model: str, seconds: float) -> Job:
    """The plan against the peak at every rank and budget."""
    cases = list(product(scale.ranks, scale.budgets))
    rows = (("models", model), *(memory_key(model, *case) for case in cases))
    arguments = {"scale_name": scale.name, "model": model, "cases": cases}
    return Job("memory", f"{PACKAGE}.memory:measure_memory", arguments, rows, seconds)


def memory_key(model: str, rank: int, tokens: int) -> Key:
    """The row of a case of the memory table."""
    return "memory", f"{model}, r={rank}, {tokens} tokens"


def ceilings(scale: Scale, seconds: float) -> Job:
    """The rates that the card reaches."""
    side = 8192 if scale.name == "real" else 256
    names = (
        f"bf16 product, {side} x {side} x {side}", "copy on the device, read and written",
        "NF4 with double quantization to bf16", "1,000 small operations, one after the other",
    )  # fmt: skip
    rows = tuple(("ceilings", name) for name in names)
    return Job("ceilings", f"{PACKAGE}.ceilings:measure_ceilings", {"side": side}, rows, seconds)
