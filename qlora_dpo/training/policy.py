"""The model that is trained and its tokenizer, as the options of a run say."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from qlora_dpo.config.training import ModelOptions, TrainConfig, quantization_of
from qlora_dpo.data.templates import set_up_chat_template
from qlora_dpo.data.tokenization import PairTokenizer
from qlora_dpo.models.experts import count_experts
from qlora_dpo.models.loading import commit_of, load_base, load_config, load_tokenizer, refuse_untrainable
from qlora_dpo.models.lora import POLICY, add_adapter, add_frozen_reference, describe_experts, load_adapter
from qlora_dpo.training.folder.content import refuse_reference_of_other_base


def load_training_tokenizer(config: TrainConfig, date: str | None = None) -> Any:
    """The base's tokenizer with the chat template of this run, which writes this date where it writes one.

    Without a date it is the one that this template was first used with on this machine.
    """
    assert config.model.model_name_or_path is not None
    tokenizer = load_tokenizer(
        config.model.model_name_or_path, config.model.model_revision, config.model.trust_remote_code
    )
    set_up_chat_template(
        tokenizer,
        prompt_template=config.data.prompt_template,
        chat_template_kwargs=config.data.chat_template_kwargs,
        system_prompt=config.data.system_prompt,
        date=date,
    )
    return tokenizer


def load_base_config(model: ModelOptions) -> Any:
    """The config of the base, which says whether it can be trained.

    Raises:
        StorageError, ModelError, UsageError: it cannot be read, or the base cannot be trained with these options.
    """
    name = str(model.model_name_or_path)
    config = load_config(name, model.model_revision, model.trust_remote_code)
    refuse_untrainable(name, config, quantization_of(model), model.trust_remote_code)
    return config


def load_policy(config: TrainConfig, device: torch.device) -> Any:
    """The quantized base with the policy's adapter, and the reference's where that is an adapter too."""
    name = str(config.model.model_name_or_path)
    refuse_reference_of_other_base(config.model)
    base = load_base_of(config.model, device)
    count = count_experts(base)
    if config.model.reference_model in (None, name):
        lora = config.lora
        model = add_adapter(
            base, r=lora.lora_r, alpha=lora.lora_alpha, dropout=lora.lora_dropout,
            target_modules=lora.lora_target_modules, target_parameters=lora.lora_target_parameters,
            seed=config.training.seed, use_rslora=lora.use_rslora, use_dora=lora.use_dora,
            modules_to_save=lora.modules_to_save,
        )  # fmt: skip
    else:
        folder = Path(str(config.model.reference_model))
        model = load_adapter(base, folder, trainable=True)
        if config.has_reference:
            add_frozen_reference(model, folder)
    if line := describe_experts(count, model.peft_config[POLICY]):
        print(line, file=sys.stderr)
    # What a reader of adapter_config.json needs to find this base again: a Hub id with its commit, or a full path.
    is_local = Path(name).is_dir()
    model.peft_config[POLICY].base_model_name_or_path = str(Path(name).resolve()) if is_local else name
    model.peft_config[POLICY].revision = None if is_local else commit_of(base.config)
    return model


def load_base_of(model: ModelOptions, device: torch.device) -> Any:
    """The base as these options quantize it."""
    return load_base(
        str(model.model_name_or_path),
        device=device,
        revision=model.model_revision,
        quantization=quantization_of(model),
        dtype=torch.float32 if model.dtype == "float32" else torch.bfloat16,
        trust_remote_code=model.trust_remote_code,
    )


def pair_tokenizer(config: TrainConfig, tokenizer: Any) -> PairTokenizer:
    """The tokenization of this run, for prompts to generate from."""
    data = config.data
    longest_prompt = data.max_length - 1 if data.objective == "sft" else data.max_prompt_length
    return PairTokenizer(tokenizer, data.max_length, longest_prompt)
