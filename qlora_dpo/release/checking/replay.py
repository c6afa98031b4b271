"""Greedy answers and their log-probs: of the trained adapter, and of what was exported by plain transformers."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_dpo.data.chat import Chat
from qlora_dpo.data.preferences import Message
from qlora_dpo.errors import ModelError, StorageError
from qlora_dpo.models.generation import complete
from qlora_dpo.models.loading import load_base
from qlora_dpo.models.lora import load_adapter
from qlora_dpo.release.artefact import Artefact
from qlora_dpo.release.checking.prompts import training_ids

BASE_HELD = "base_quantization.json"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model made of one prompt."""

    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    """With the token that ended it."""
    text: str
    ended: bool
    """By itself, not by the limit."""
    logps: tuple[float, ...] = ()
    """Of the tokens of the trained adapter's answer."""


@dataclass(frozen=True)
class Expected:
    """The trained adapter: its tokenizer, its answers, and what ended them."""

    tokenizer: Any
    answers: list[Answer]
    end_id: int
    rows: int
    """Of the embeddings."""
    max_new_tokens: int


@dataclass(frozen=True)
class Export:
    """What was exported, in memory, loaded by plain transformers."""

    model: Any
    tokenizer: Any
    stop_ids: tuple[int, ...]
    """The tokens that its own generation config stops at."""
    stops_named_in: str
    rows: int


def expected_answers(
    artefact: Artefact, tokenizer: Any, prompts: Sequence[Sequence[Message]], device: torch.device, max_new_tokens: int
) -> Expected:
    """Load the trained adapter on its base as it was trained, let it answer, and free it."""
    from transformers import GenerationConfig

    origin = artefact.origin
    base: Any = load_base(
        origin.base, device=device, revision=origin.revision, quantization=origin.quantization, dtype=origin.dtype
    )
    base.generation_config = GenerationConfig()  # nothing but the weights decides
    model = load_adapter(base, artefact.adapter, trainable=False).eval()
    chat = Chat(tokenizer)
    answers = []
    for messages in prompts:
        prompt_ids = tuple(training_ids(chat, messages))
        (written,) = complete(
            model, tokenizer, [prompt_ids], [0], max_new_tokens=max_new_tokens, end_token_ids=[chat.form.end_id],
            temperature=0.0,
        )  # fmt: skip
        logps = answer_logps(model, prompt_ids, written.ids)
        answers.append(Answer(prompt_ids, written.ids, written.text, written.finish_reason == "stop", logps))
    rows = len(base.get_input_embeddings().weight)
    del model, base
    free_memory()
    return Expected(tokenizer, answers, chat.form.end_id, rows, max_new_tokens)


def load_export(folder: Path, device: torch.device, gguf: Path | None = None) -> Export:
    """Load a merged folder, an adapter folder or a GGUF file as any program of transformers and PEFT would.

    Raises:
        ModelError: they cannot.
        StorageError: there is no such folder, or nothing in it.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    is_adapter = gguf is None and (folder / "adapter_config.json").is_file()
    named = gguf or folder
    try:
        if gguf is not None:
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32, use_safetensors=True, device_map={"": device}
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        else:
            load = _on_its_base if is_adapter else _whole
            model, tokenizer = load(folder, device), AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{named}: plain transformers cannot load it ({reason}). Export it anew.") from error
    ends = model.generation_config.eos_token_id
    stops = (ends,) if isinstance(ends, int) else tuple(ends or ())
    where = "generation_config.json"
    if is_adapter or gguf is not None:  # which have no generation config of their own
        stops, where = (*stops, *_known(tokenizer.eos_token_id)), "the tokenizer's eos_token"
    stops = tuple(dict.fromkeys(stops))
    embeddings: Any = model.get_input_embeddings()
    return Export(model.eval(), tokenizer, stops, where, len(embeddings.weight))


def export_answers(
    export: Export, prompts: Sequence[Sequence[Message]], expected: Expected
) -> list[Answer | Exception]:
    """What the export makes of the prompts, rendered by its own template; the exception where that refuses one."""
    return [
        _export_answer(export, messages, answer, expected)
        for messages, answer in zip(prompts, expected.answers, strict=True)
    ]


def _export_answer(
    export: Export, messages: Sequence[Message], wanted: Answer, expected: Expected
) -> Answer | Exception:
    from transformers import GenerationConfig

    try:
        ids = export.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
    except Exception as error:  # no template, or one that raises what it likes
        return error
    prompt_ids = tuple(ids["input_ids"])
    if max(prompt_ids) >= export.rows:
        return ValueError(f"it makes token {max(prompt_ids)}, and the embeddings have {export.rows} rows")
    inputs = torch.tensor([prompt_ids], device=export.model.device)
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=expected.max_new_tokens, eos_token_id=list(export.stop_ids) or None,
        pad_token_id=export.stop_ids[0] if export.stop_ids else 0,
    )  # fmt: skip
    with torch.no_grad():
        written = export.model.generate(
            input_ids=inputs, attention_mask=torch.ones_like(inputs), generation_config=settings
        )
    answer = tuple(written[0, len(prompt_ids) :].tolist())
    text = export.tokenizer.decode(answer, skip_special_tokens=True).strip()
    known = max(wanted.ids, default=0) < export.rows
    logps = answer_logps(export.model, prompt_ids, wanted.ids) if known else ()
    return Answer(prompt_ids, answer, text, answer[-1:] != () and answer[-1] in export.stop_ids, logps)


def answer_logps(model: Any, prompt_ids: Sequence[int], ids: Sequence[int]) -> tuple[float, ...]:
    """Log-probs of an answer's tokens, from the model's own logits."""
    row = torch.tensor([[*prompt_ids, *ids]], device=model.device)
    with torch.no_grad():
        logits = model(input_ids=row, use_cache=False).logits[0, len(prompt_ids) - 1 : -1]
    logps = logits.float().log_softmax(-1).gather(1, row[0, len(prompt_ids) :, None])[:, 0]
    return tuple(logps.tolist())


def free_memory() -> None:
    """Give back what a deleted model held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _whole(folder: Path, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", use_safetensors=True, device_map={"": device}, local_files_only=True
    )


def _on_its_base(folder: Path, device: torch.device) -> Any:
    """The adapter as its config says, on a base held as the export notes."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    held = json.loads((folder / BASE_HELD).read_text(encoding="utf-8")) if (folder / BASE_HELD).is_file() else {}
    quantization = held.get("quantization")
    base = AutoModelForCausalLM.from_pretrained(
        config["base_model_name_or_path"],
        revision=config.get("revision"),
        dtype=getattr(torch, held.get("dtype", "bfloat16")),
        quantization_config=BitsAndBytesConfig(**quantization) if quantization else None,
        use_safetensors=True,
        device_map={"": device},
    )
    return PeftModel.from_pretrained(base, str(folder))


def refuse_missing(folder: Path) -> None:
    """Refuse a folder that holds neither a model nor an adapter.

    Raises:
        StorageError: naming what is missing.
    """
    if not folder.is_dir():
        raise StorageError(f"{folder}: there is no such folder. Name one that `merge` or `release adapter` wrote.")
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise StorageError(
            f"{folder} holds neither config.json nor adapter_config.json, so it is no export. Name a folder that "
            "`merge` or `release adapter` wrote."
        )


def _known(*ids: int | None) -> tuple[int, ...]:
    return tuple(id_ for id_ in ids if id_ is not None)
