"""A reward model of transformers: one number for a conversation that ends with an answer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qlora_dpo.data.chat import Chat, Prompt
from qlora_dpo.data.templates import set_up_chat_template
from qlora_dpo.errors import ModelError, ResourceError, UsageError
from qlora_dpo.models.loading import (
    CPU_BLOCK,
    check_local_weights,
    choose_device,
    commit_of,
    load_config,
    load_tokenizer,
    refuse_hidden_adapter,
)
from qlora_dpo.training.folder.content import weights_fingerprint

HEADS = ["score", "classifier", "classification_head", "regression_head", "v_head"]  # stay in --dtype


class RewardScorer:
    """Scores answers with a sequence classifier of one output, as its own chat template writes a conversation.

    Text in a message that looks like a control token stays text. A conversation ends with its end token; one that is
    longer than `max_length` tokens loses its beginning (and keeps its BOS).
    """

    def __init__(self, model: Any, tokenizer: Any, max_length: int, device: torch.device) -> None:
        self._model, self._device = model, device
        self._chat = Chat(tokenizer)
        self._pad_id = int(tokenizer.pad_token_id)
        self._bos_id = tokenizer.bos_token_id
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.max_length = min(max_length, longest or max_length)
        self.truncated = 0

    def encode(self, prompt: Prompt, answer: str) -> list[int]:
        """The ids of a conversation that ends with this answer.

        Raises:
            UsageError: the chat template refuses it.
        """
        protected = self._chat.protected(prompt)
        protected.append(self._chat.protected_message({"role": "assistant", "content": answer}))
        try:
            (text,) = self._chat.render([protected], generation_prompt=False)
        except Exception as error:  # a template is a program and raises what it likes
            raise UsageError(f"the chat template refuses it ({error})") from error
        ids = self._chat.with_bos(self._chat.encoder.encode([self._chat.encoder.reveal(text)])[0])
        if self._chat.form.end is None:
            ids = [*ids, self._chat.form.end_id]
        return self._fit(ids)

    def score(self, conversations: Sequence[Sequence[int]], batch_size: int) -> list[float]:
        """The rewards of conversations, in their order; those of similar length share a batch.

        Raises:
            ResourceError: a batch does not fit into the device's memory.
        """
        order = sorted(range(len(conversations)), key=lambda number: len(conversations[number]), reverse=True)
        rewards = [0.0] * len(conversations)
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            for number, reward in zip(numbers, self._score([conversations[n] for n in numbers]), strict=True):
                rewards[number] = reward
        return rewards

    @torch.inference_mode()
    def _score(self, batch: Sequence[Sequence[int]]) -> list[float]:
        width = max(map(len, batch))
        ids = torch.tensor([[*row, *[self._pad_id] * (width - len(row))] for row in batch], device=self._device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch], device=self._device)
        try:
            rewards: list[float] = self._model(input_ids=ids, attention_mask=mask).logits[:, 0].double().tolist()
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"{self._device} ran out of memory while scoring {len(batch)} answers of up to {width} tokens. Lower "
                "--batch_size or --max_length, or use --load_in_4bit true."
            ) from error
        return rewards

    def _fit(self, ids: list[int]) -> list[int]:
        excess = len(ids) - self.max_length
        if excess <= 0:
            return ids
        self.truncated += 1
        kept = 1 if ids[0] == self._bos_id else 0
        return ids[:kept] + ids[kept + excess :]


def load_reward_scorer(
    name: str,
    *,
    revision: str | None = None,
    load_in_4bit: bool = False,
    use_cpu: bool = False,
    max_length: int = 2048,
    prompt_template: str | None = None,
) -> tuple[RewardScorer, str]:
    """A scorer and the version that stands for the model's weights and how they are read. Runs no code of the model's.

    Raises:
        ModelError: it is no sequence classifier with one output and trained weights for it.
        StorageError, UsageError: it cannot be found or loaded.
    """
    config = load_config(name, revision)
    if config.num_labels != 1:
        raise ModelError(f"--reward_model {name} has {config.num_labels} outputs (num_labels); a reward model has one.")
    tokenizer = load_tokenizer(name, revision)
    set_up_chat_template(tokenizer, prompt_template=prompt_template)
    if tokenizer.pad_token_id is None:
        raise ModelError(f"the tokenizer of {name} has neither a pad nor an end token; set pad_token in its config.")
    config.get_text_config().pad_token_id = config.pad_token_id = tokenizer.pad_token_id
    device = choose_device(use_cpu)
    model = _load(name, config, revision, device, load_in_4bit)
    scorer = RewardScorer(model, tokenizer, max_length, device)
    settings = f"{revision} {load_in_4bit} {device.type} {scorer.max_length} {tokenizer.chat_template}"
    parts = (config.to_json_string(), _weights_of(name, config), settings)
    return scorer, f"{Path(name).name} {hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"


def _load(name: str, config: Any, revision: str | None, device: torch.device, load_in_4bit: bool) -> Any:
    from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    check_local_weights(name)
    refuse_hidden_adapter(name, revision)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=HEADS
    )
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name, config=config, revision=revision, dtype=dtype, device_map={"": device}, use_safetensors=True,
            quantization_config=quantization if load_in_4bit else None, trust_remote_code=False,
            output_loading_info=True,
        )  # fmt: skip
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"{device} has too little memory for the reward model {name}. Use --load_in_4bit true, or a smaller one."
        ) from error
    except Exception as error:  # the library raises whatever its parts raise
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise ModelError(f"the reward model {name} cannot be loaded: {reason}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{name} is no trained reward model: its weights lack {missing[0]}, which would be random. Name a model "
            "that was saved as a sequence classifier."
        )
    if load_in_4bit and device.type == "cpu":
        _refuse_wrong_blocks(name, model)
    return model.eval().requires_grad_(False)


def _refuse_wrong_blocks(name: str, model: Any) -> None:
    """See `check_cpu_quantizable`: rows that are not whole blocks are dequantized wrongly on a CPU."""
    from bitsandbytes.nn import Linear4bit

    for path, module in model.named_modules():
        if isinstance(module, Linear4bit) and module.in_features % CPU_BLOCK:
            raise UsageError(
                f"{name}: {path} has {module.in_features} input features, not a multiple of {CPU_BLOCK}: bitsandbytes "
                "would dequantize it wrongly on a CPU. Leave out --load_in_4bit."
            )


def _weights_of(name: str, config: Any) -> str:
    folder = Path(name).expanduser()
    return weights_fingerprint(folder) if folder.is_dir() else str(commit_of(config))
