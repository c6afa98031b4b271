"""The trained adapter's greedy answers, and what an export predicts at each of their tokens by plain transformers."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_dpo.data.chat import Chat
from qlora_dpo.data.preferences import Message
from qlora_dpo.errors import ModelError, StorageError
from qlora_dpo.models import experts
from qlora_dpo.models.generation import complete
from qlora_dpo.models.lora import load_adapter
from qlora_dpo.release.artefact import Artefact
from qlora_dpo.training.trained_on import TrainedOn, base_held, load_base_as_trained

AT_ONCE = 8  # prompts that are answered together


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
    gaps: tuple[float, ...] = ()
    """How much likelier each of these is than the likeliest other token, in nats; below 0 where that is likelier."""


@dataclass(frozen=True)
class Expected:
    """The trained adapter: its tokenizer, its answers, what ended them, and how far rounding moves them."""

    tokenizer: Any
    answers: list[Answer]
    end_id: int
    rows: int
    """Of the embeddings."""
    max_new_tokens: int
    noise: float
    """Mean |difference| of an answer's log-probs between writing it token by token and reading it at once."""
    gap_noise: float
    """The largest difference of a gap between the two."""


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

    base = load_base_as_trained(artefact.origin, device)
    base.generation_config = GenerationConfig()  # nothing but the weights decides
    model = load_adapter(base, artefact.adapter, trainable=False).eval()
    chat = Chat(tokenizer)
    ids = [tuple(chat.prompt_ids(messages)) for messages in prompts]
    answers: list[Answer] = []
    differences: list[Tensor] = []
    for start in range(0, len(ids), AT_ONCE):
        batch = ids[start : start + AT_ONCE]
        seen = _Seen()
        found = complete(
            model, tokenizer, batch, [0] * len(batch), max_new_tokens=max_new_tokens, end_token_ids=[chat.form.end_id],
            temperature=0.0, look=seen,
        )  # fmt: skip
        for row, (prompt_ids, written) in enumerate(zip(batch, found, strict=True)):
            read = read_answer(model, prompt_ids, written.ids)
            differences.append(seen.of(row, len(written.ids)) - torch.tensor(read))
            answers.append(Answer(prompt_ids, written.ids, written.text, written.finish_reason == "stop", *read))
    rows = len(base.get_input_embeddings().weight)
    del model, base
    free_memory()
    logps, gaps = torch.cat(differences, dim=1).abs()
    noise, gap_noise = float(logps.mean()), float(gaps.max())
    return Expected(tokenizer, answers, chat.form.end_id, rows, max_new_tokens, noise, gap_noise)


class _Seen:
    """Looks on while answers are written: at each step the log-prob of the likeliest token, and its gap."""

    def __init__(self) -> None:
        self._steps: list[Tensor] = []

    def __call__(self, _ids: Tensor, logits: Tensor) -> Tensor:
        first, second = logits.float().log_softmax(-1).topk(2).values.unbind(-1)
        self._steps.append(torch.stack([first, first - second]).cpu())
        return logits

    def of(self, row: int, length: int) -> Tensor:
        """[2, length]: log-probs and gaps of an answer."""
        return torch.stack(self._steps[:length], dim=-1)[:, row]


def load_export(folder: Path, device: torch.device, origin: TrainedOn, gguf: Path | None = None) -> Export:
    """Load a merged folder, an adapter folder or a GGUF file as any program of transformers and PEFT would; an adapter
    that does not say how its base was held on `origin`.

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
            model = _on_its_base(folder, device, origin) if is_adapter else _whole(folder, device)
            tokenizer = AutoTokenizer.from_pretrained(folder if _has_tokenizer(folder) else origin.base)
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
    """What the export predicts in the adapter's answers, behind prompts that its own template renders; the exception
    where that refuses one."""
    return [
        _export_answer(export, messages, answer) for messages, answer in zip(prompts, expected.answers, strict=True)
    ]


def _export_answer(export: Export, messages: Sequence[Message], wanted: Answer) -> Answer | Exception:
    try:
        ids = export.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
    except Exception as error:  # no template, or one that raises what it likes
        return error
    prompt_ids = tuple(ids["input_ids"])
    if max(prompt_ids) >= export.rows:
        return ValueError(f"it makes token {max(prompt_ids)}, and the embeddings have {export.rows} rows")
    known = max(wanted.ids, default=0) < export.rows
    read = read_answer(export.model, prompt_ids, wanted.ids) if known else ((), ())
    return Answer(prompt_ids, (), "", False, *read)


def read_answer(model: Any, prompt_ids: Sequence[int], ids: Sequence[int]) -> tuple[tuple[float, ...], ...]:
    """Log-probs of an answer's tokens and their gaps, from the model's own logits."""
    row = torch.tensor([[*prompt_ids, *ids]], device=model.device)
    with torch.no_grad():
        logits = model(input_ids=row, use_cache=False).logits[0, len(prompt_ids) - 1 : -1]
    logps, given = logits.float().log_softmax(-1), row[0, len(prompt_ids) :, None]
    own = logps.gather(1, given)[:, 0]
    others = logps.scatter(1, given, -torch.inf).amax(-1)
    return tuple(own.tolist()), tuple((own - others).tolist())


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


def _on_its_base(folder: Path, device: torch.device, origin: TrainedOn) -> Any:
    """The adapter as its config says, on a base held as the export notes, else as `origin` says."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    quantization, dtype = base_held(folder) or (origin.quantization, origin.dtype)
    is_same_base = config.get("base_model_name_or_path") in (None, origin.base)
    with experts.quantizing():  # which neither transformers nor PEFT does
        base = AutoModelForCausalLM.from_pretrained(
            origin.base if is_same_base else config["base_model_name_or_path"],
            revision=origin.revision if is_same_base else config.get("revision"),
            dtype=dtype,
            quantization_config=BitsAndBytesConfig(**quantization) if quantization else None,
            use_safetensors=True,
            device_map={"": device},
        )
    with experts.shown_plain(base):
        model = PeftModel.from_pretrained(base, str(folder))
    experts.adapt_experts(model)
    return model


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


def _has_tokenizer(folder: Path) -> bool:
    """A merged folder without one is wrong; of another tool's adapter the base's is meant."""
    return (folder / "tokenizer_config.json").is_file() or (folder / "config.json").is_file()


def _known(*ids: int | None) -> tuple[int, ...]:
    return tuple(id_ for id_ in ids if id_ is not None)
