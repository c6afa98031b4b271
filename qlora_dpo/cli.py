"""The table of commands."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from qlora_dpo.command_line import Command, run_commands
from qlora_dpo.config.checks import fill_config, plan_config, score_config, train_config, verify_config
from qlora_dpo.config.data import (
    CompareLabelsOptions,
    ConvertOptions,
    InspectOptions,
    LintOptions,
    MixOptions,
    PairFileOptions,
    TokenOptions,
    UnpairedOptions,
)
from qlora_dpo.config.labeling import (
    EndpointOptions,
    GenerateOptions,
    HumanOptions,
    JudgeOptions,
    LocalModelOptions,
    ReferenceLabelOptions,
    RewardModelOptions,
    RulesOptions,
    SamplingOptions,
)
from qlora_dpo.config.reference import (
    FillOptions,
    RayOptions,
    ScoreOptions,
    ServedOptions,
    StoreExportOptions,
    StoreImportOptions,
    StoreInfoOptions,
    StoreVerifyOptions,
)
from qlora_dpo.config.release import AdapterExportOptions, CheckOptions, GgufOptions, MergeOptions, PushOptions
from qlora_dpo.config.training import TRAIN_GROUPS, DataOptions, ModelOptions, PlanOptions
from qlora_dpo.training.signals import terminable

COMMANDS = {
    "train": Command(
        "Align a model with DPO: quantize, train a LoRA adapter, show before and after. No arguments: the demo.",
        tuple(TRAIN_GROUPS.values()),
        "qlora_dpo.demo.run:run_training",
        lambda options: (train_config(options),),
        defaults="qlora_dpo.demo.base_model:default_model",
    ),
    "plan": Command(
        "Say where each GB goes, how long it takes and what it costs, before anything is loaded.",
        (*TRAIN_GROUPS.values(), PlanOptions),
        "qlora_dpo.training.memory.plan:plan",
        plan_config,
    ),
    "reference": Command(
        "Compute the reference's log-probs of a dataset ahead, for all runs to come.",
        (ModelOptions, DataOptions, FillOptions, EndpointOptions, ServedOptions, RayOptions),
        "qlora_dpo.scoring.reference:fill_store",
        fill_config,
    ),
    "reference info": Command(
        "Say what a reference store holds.",
        (StoreInfoOptions,),
        "qlora_dpo.reference.commands:info",
        positional=("store",),
    ),
    "reference verify": Command(
        "Check a reference store, and compute some of it again.",
        (StoreVerifyOptions, ModelOptions, DataOptions),
        "qlora_dpo.scoring.reference:verify_store",
        verify_config,
        positional=("store",),
    ),
    "reference export": Command(
        "Write a reference store as Parquet.",
        (StoreExportOptions,),
        "qlora_dpo.reference.commands:export",
        positional=("store", "output"),
    ),
    "reference import": Command(
        "Add the rows of an exported file to a reference store.",
        (StoreImportOptions,),
        "qlora_dpo.reference.commands:import_rows",
        positional=("file", "store"),
    ),
    "score": Command(
        "Say how far an adapter agrees with any file of pairs, row by row, and which labels look wrong.",
        (ScoreOptions, ModelOptions, DataOptions, RayOptions),
        "qlora_dpo.scoring.score:score",
        score_config,
        defaults="qlora_dpo.scoring.adapter:defaults_of_adapter",
    ),
    "data convert": Command(
        "Write pairs in another format and kind of file.",
        (PairFileOptions, ConvertOptions),
        "qlora_dpo.data.convert:convert",
        positional=("file",),
    ),
    "data pair": Command(
        "Make pairs of single answers with labels (KTO) or ratings, of the rows that share a prompt.",
        (UnpairedOptions,),
        "qlora_dpo.data.unpaired:pair",
        positional=("file",),
    ),
    "data mix": Command(
        "Say what a mixture of sources is made of, and write the rows of one epoch.",
        (MixOptions,),
        "qlora_dpo.data.mixtures.mix:mix",
        positional=("file",),
    ),
    "data inspect": Command(
        "Say what is in a file of pairs: lengths, turns, languages, duplicates, what training on it takes.",
        (PairFileOptions, TokenOptions, InspectOptions),
        "qlora_dpo.training.data_commands:inspect",
        positional=("file",),
    ),
    "data lint": Command(
        "Say what is wrong with a file of pairs, row by row.",
        (PairFileOptions, TokenOptions, LintOptions),
        "qlora_dpo.training.data_commands:lint",
        positional=("file",),
    ),
    "merge": Command(
        "Merge an adapter into a plain model folder, the best of the measured candidates.",
        (MergeOptions,),
        "qlora_dpo.release.merging.merge:merge",
    ),
    "release check": Command(
        "Replay prompts on an exported folder, a GGUF file or a server, and compare with the trained adapter.",
        (CheckOptions,),
        "qlora_dpo.release.checking.check:check",
        positional=("folder",),
    ),
    "release gguf": Command(
        "Write a merged folder as GGUF for llama.cpp and Ollama.",
        (GgufOptions,),
        "qlora_dpo.release.gguf.export:write_gguf",
        positional=("folder",),
    ),
    "release adapter": Command(
        "Write the trained adapter alone, with its base, tokenizer and card.",
        (AdapterExportOptions,),
        "qlora_dpo.release.adapter_export:export_adapter",
        positional=("adapter",),
    ),
    "release push": Command(
        "Say what would be uploaded of a run, a merged folder or GGUF files, to which repository; --execute does it.",
        (PushOptions,),
        "qlora_dpo.release.pushing.push:push",
        positional=("folder",),
    ),
    "generate": Command(
        "Write answers of a model to prompts, to be compared or rejected.",
        (GenerateOptions, SamplingOptions, LocalModelOptions, EndpointOptions),
        "qlora_dpo.labeling.generate:generate",
    ),
    "label reference": Command(
        "Make pairs of reference answers (chosen) and a model's own answers (rejected).",
        (ReferenceLabelOptions, SamplingOptions, LocalModelOptions, EndpointOptions),
        "qlora_dpo.labeling.reference_answers:label_by_reference",
    ),
    "label judge": Command(
        "Label pairs by a strong model behind an OpenAI-compatible server.",
        (JudgeOptions, EndpointOptions),
        "qlora_dpo.labeling.judge:label_by_judge",
    ),
    "label rules": Command(
        "Label pairs by a YAML list of rules.", (RulesOptions,), "qlora_dpo.labeling.rules:label_by_rules"
    ),
    "label reward_model": Command(
        "Label pairs by a reward model of transformers.",
        (RewardModelOptions,),
        "qlora_dpo.labeling.reward_model:label_by_reward_model",
    ),
    "label human": Command(
        "Label pairs by hand, on a blind page.", (HumanOptions,), "qlora_dpo.labeling.human:label_by_hand"
    ),
    "data compare-labels": Command(
        "Say how far two labellings agree.",
        (CompareLabelsOptions,),
        "qlora_dpo.labeling.compare:compare_labels",
        positional=("first", "second"),
    ),
    "env": Command("Print versions and devices, for a bug report.", (), "qlora_dpo.environment:print_description"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. A user's mistake is one clear text on stderr, no traceback."""
    with terminable():
        return run_commands("qlora_dpo", COMMANDS, sys.argv[1:] if argv is None else list(argv))
