"""Loads the tokenizer and the frozen, quantized base, and refuses early what would fail late."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_dpo.errors import ModelError, QloraDpoError, ResourceError, StorageError, UsageError
from qlora_dpo.models import experts
from qlora_dpo.models.comes_quantized import (
    DEQUANTIZABLE,
    dequantize_on_loading,
    format_of,
    hold_dequantized,
    refuse_unusable_format,
)
from qlora_dpo.models.loading_report import loading_reports, refuse_other_weights, say_ignored
from qlora_dpo.models.text_model import beside_text, refuse_other_than_text
from qlora_dpo.models.weight_files import model_folder, weight_files

CPU_BLOCK = 64  # bitsandbytes quantizes runs of 64 weights; its CPU kernel needs whole runs in every row


def choose_device(use_cpu: bool) -> torch.device:
    """The first GPU, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() and not use_cpu else torch.device("cpu")


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The model's own tokenizer, with a pad token (the end token where it has none; masks never look at it)."""
    from transformers import AutoTokenizer, LlamaTokenizer

    _check_local_folder(name)
    # From a bare SentencePiece file AutoTokenizer makes a tokenizer that loses the leading space of every text.
    is_bare = (Path(name) / "tokenizer.model").is_file() and not (Path(name) / "tokenizer_config.json").is_file()
    kind: Any = LlamaTokenizer if is_bare else AutoTokenizer
    try:
        tokenizer = kind.from_pretrained(name, **_source(revision, trust_remote_code))
    except Exception as error:
        raise _loading_error("tokenizer", name, revision, error) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(
    name: str,
    *,
    device: torch.device,
    revision: str | None = None,
    quantization: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load a causal language model, frozen and quantized, onto `device`.

    Args:
        quantization: keyword arguments of transformers' `BitsAndBytesConfig`, or None to keep `dtype`.

    Raises:
        StorageError: there is no such model, or its folder holds no weights.
        ModelError: its weights are not those that its config describes.
        UsageError: its layers cannot be quantized rightly on a CPU.
        ResourceError: it does not fit into the device's memory.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    config = load_config(name, revision, trust_remote_code)
    refuse_untrainable(name, config, quantization, trust_remote_code)
    dequantize_on_loading(config)
    stored_as = format_of(config)
    wanted = BitsAndBytesConfig(**quantization) if quantization and stored_as is None else None
    check_local_weights(name)
    refuse_hidden_adapter(name, revision)
    disable_dropout(config)
    if device.type == "cpu" and (quantization or {}).get("load_in_4bit"):
        check_cpu_quantizable(config, trust_remote_code)
    try:
        with loading_reports() as reports, experts.quantizing():
            model = AutoModelForCausalLM.from_pretrained(
                name,
                config=config,
                dtype=dtype,
                quantization_config=wanted,
                device_map={"": device},
                use_safetensors=True,
                **_source(revision, trust_remote_code),
            )
    except torch.OutOfMemoryError as error:
        raise out_of_memory(f"loading {name}", device) from error
    except Exception as error:
        raise _loading_error("model", name, revision, error) from error
    for report in reports:
        refuse_other_weights(name, model, report)
    say_ignored(name, model, model_folder(name, commit_of(config)))
    model.requires_grad_(False)
    keep_cpu_layers_differentiable(model)
    leave_float16(model, dtype)
    if stored_as in DEQUANTIZABLE:
        hold_dequantized(model, dtype)
    return model


def refuse_untrainable(
    name: str, config: Any, quantization: dict[str, Any] | None, trust_remote_code: bool = False
) -> None:
    """Refuse a base of which its config says that it cannot be trained, before the data or any weights are read.

    Raises:
        ModelError, UsageError: see `refuse_other_than_text` and `refuse_unusable_format`.
    """
    refuse_other_than_text(name, config, trust_remote_code)
    refuse_unusable_format(name, config, quantization)


def load_config(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The model's transformers config, without its weights.

    Raises:
        StorageError, ModelError: there is no such model, or its config cannot be read.
    """
    from transformers import AutoConfig

    _check_local_folder(name)
    if Path(name).expanduser().is_dir() and not (Path(name).expanduser() / "config.json").is_file():
        raise StorageError(
            f"{name}: the folder holds no config.json, so it is not a model. Name the folder that has one."
        )
    try:
        config = AutoConfig.from_pretrained(name, **_source(revision, trust_remote_code))
    except Exception as error:
        raise _loading_error("model", name, revision, error) from error
    _note_commit(config, name, revision)
    return config


def commit_of(config: Any) -> str | None:
    """The commit of the Hub model whose config `load_config` gave; None for a folder's."""
    return getattr(config, "_commit_hash", None)


def _note_commit(config: Any, name: str, revision: str | None) -> None:
    """Keep the commit in the config, which transformers did until 5.22: the cache names its folder by it."""
    from huggingface_hub import try_to_load_from_cache

    if commit_of(config) is None and not Path(name).expanduser().is_dir():
        found = try_to_load_from_cache(name, "config.json", revision=revision)
        config._commit_hash = Path(found).parent.name if isinstance(found, str) else None


def model_on_meta(config: Any, trust_remote_code: bool = False, **options: Any) -> Any:
    """A causal language model of this config without weights; its code, where it brings some, from the same commit."""
    from transformers import AutoModelForCausalLM

    if trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        options["code_revision"] = commit_of(config)  # transformers would take the newest code
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, **options)


def disable_dropout(config: Any) -> None:
    """Switch off the base's own dropout, as DPO trainers do: policy and reference must differ by the adapter alone."""
    text = config.get_text_config()
    for name, value in vars(text).items():
        if name.endswith(("dropout", "pdrop", "dropout_p")) and isinstance(value, float):
            setattr(text, name, 0.0)


def check_cpu_quantizable(config: Any, trust_remote_code: bool = False) -> None:
    """Refuse a model whose rows are not whole quantization blocks: bitsandbytes' AVX512 kernel reads the wrong
    scales for them and returns weights that are off by 40 to 90 percent, without a word.

    Raises:
        UsageError: naming the first such layer.
    """
    from transformers.pytorch_utils import Conv1D

    model = model_on_meta(config, trust_remote_code)
    head, beside = model.get_output_embeddings(), tuple(f"{name}." for name in beside_text(model))
    rows = {name: module.in_features if isinstance(module, nn.Linear) else module.nx
            for name, module in model.named_modules()
            if module is not head and isinstance(module, nn.Linear | Conv1D)}  # fmt: skip
    rows |= {name: experts.stack_shape(module, part)[-1] for name, module, part in experts.stacks_of(model)}
    for name, length in rows.items():
        if length % CPU_BLOCK and not name.startswith(beside):
            raise UsageError(
                f"{name} has {length} input features, not a multiple of {CPU_BLOCK}: bitsandbytes would "
                "dequantize it wrongly on a CPU. Use a GPU, or --load_in_4bit false."
            )


def keep_cpu_layers_differentiable(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking 4-bit weights in place on the first CPU forward pass without gradients: the
    repacked form has no backward, so later training would lose the gradient through the base without an error."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def leave_float16(model: nn.Module, dtype: torch.dtype) -> None:
    """Hold and compute in `dtype` what a base that comes quantized has in float16, in which DPO's gradients overflow:
    transformers leaves it so, whatever type is asked for."""
    from bitsandbytes.nn import Linear4bit

    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype == torch.float16:
            tensor.data = tensor.data.to(dtype)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            weight: Any = module.weight
            state = weight.quant_state
            if module.compute_dtype == torch.float16:
                module.compute_dtype = dtype
            if state.dtype == torch.float16:
                state.dtype = dtype


def out_of_memory(doing: str, device: torch.device) -> ResourceError:
    """The error for a device that is full, with what it holds and what to change."""
    free, total = torch.cuda.mem_get_info(device) if device.type == "cuda" else (0, 0)
    return ResourceError(
        f"{device} ran out of memory while {doing} ({free / 2**30:.1f} of {total / 2**30:.1f} GiB free now). Lower "
        "--max_tokens_per_microbatch or --lora_r, use --activation_checkpointing offload, or free the device."
    )


def _source(revision: str | None, trust_remote_code: bool) -> dict[str, Any]:
    """From where and how transformers loads. Code is taken from the pinned commit too: without `code_revision`, code
    that lives in another repository would come from its newest one. So that repository is refused: it lacks the commit.
    """
    source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    return source | ({"code_revision": revision} if trust_remote_code else {})


def refuse_hidden_adapter(name: str, revision: str | None) -> None:
    """Transformers silently loads an adapter that lies beside a model, pickled or not, and the base would not be it."""
    from transformers.utils.peft_utils import find_adapter_config_file

    if find_adapter_config_file(name, revision=revision) is not None:
        raise ModelError(
            f"{name} holds an adapter (adapter_config.json) beside the model, which would be loaded into the base "
            "unseen. Name the base without it, and the adapter with --reference_model."
        )


def _check_local_folder(name: str) -> None:
    """A path that looks local must exist: huggingface_hub would call it an invalid repository name."""
    path = Path(name).expanduser()
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not path.is_dir():
        raise StorageError(f"{name}: there is no such model folder. Name an existing folder or a Hub id (ORG/NAME).")


def check_local_weights(name: str) -> None:
    folder = Path(name).expanduser()
    if folder.is_dir():
        weight_files(folder)


def _loading_error(what: str, name: str, revision: str | None, error: Exception) -> QloraDpoError:
    """One sentence for the many ways in which the Hub or a folder can fail."""
    from huggingface_hub import errors as hub

    at = f" at revision {revision}" if revision else ""
    causes: list[Any] = [error]
    while causes[-1].__cause__ is not None and causes[-1].__cause__ not in causes:
        causes.append(causes[-1].__cause__)
    if any(isinstance(cause, hub.GatedRepoError) for cause in causes):
        return StorageError(f"{name} is gated: accept its terms on the Hub and log in (`hf auth login` or HF_TOKEN).")
    if any(isinstance(cause, hub.RevisionNotFoundError) for cause in causes):
        return StorageError(
            f"{name} has no revision {revision}, or its code lives in another repository, which that commit does not "
            "pin: check --model_revision."
        )
    if any(isinstance(cause, hub.RepositoryNotFoundError) for cause in causes):
        return StorageError(f"{name}: neither a local folder nor a model on the Hub{at}: check --model_name_or_path.")
    if any(
        isinstance(cause, hub.LocalEntryNotFoundError | ConnectionError | hub.OfflineModeIsEnabled) for cause in causes
    ):
        return StorageError(
            f"{name}: not a local folder, not in the cache, and the Hub cannot be reached. Name a local folder, or "
            "set HF_ENDPOINT to a mirror."
        )
    reason = (str(error) or type(error).__name__).strip().splitlines()[0]
    return ModelError(f"the {what} {name}{at} cannot be loaded: {reason}")
