"""The LoRA adapters on the frozen base: the policy's, and where there is one the reference's."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_dpo.errors import ModelError, StorageError, UsageError
from qlora_dpo.models import experts
from qlora_dpo.models.saved_modules import refuse_unsavable, train_in_float32
from qlora_dpo.models.text_model import beside_text_pattern

POLICY, REFERENCE = "default", "reference"
_LONGEST_REASON = 200  # characters

# Fields of adapter_config.json. PEFT imports what the first two name; of the others only these belong to plain LoRA.
IMPORTING_FIELDS = ("auto_mapping", "megatron_config", "base_model_class", "parent_library")
LORA_FIELDS = {
    "peft_type", "task_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r",
    "lora_alpha", "lora_dropout", "lora_bias", "bias", "fan_in_fan_out", "use_rslora", "use_dora", "target_modules",
    "target_parameters", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern",
    "init_lora_weights", "ensure_weight_tying",
}  # fmt: skip
ROUTERS = ("gate", "router")  # as families name what chooses a token's experts
HARMLESS_DEFAULTS = {"megatron_core": "megatron.core", "qalora_group_size": 16}  # read only with another field


def add_adapter(
    base: nn.Module, *, r: int, alpha: int, dropout: float, target_modules: Sequence[str], seed: int,
    target_parameters: Sequence[str] = (), rank_pattern: Mapping[str, int] | None = None, use_rslora: bool = False,
    use_dora: bool = False, modules_to_save: Sequence[str] = (),
) -> Any:  # fmt: skip
    """Put a fresh LoRA adapter (B = 0, so the policy starts as the base) on the base; returns the PEFT model.

    DoRA's lengths start as those of the base's rows, and `modules_to_save` as copies, so that these start as the base,
    too.

    Raises:
        UsageError: a target that the model does not have.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=_targets(base, target_modules),
        exclude_modules=beside_text_pattern(base),
        target_parameters=list(target_parameters) or None,
        rank_pattern=dict(rank_pattern or {}),
        use_rslora=use_rslora,
        use_dora=use_dora,
        modules_to_save=list(modules_to_save) or None,
        bias="none",
        task_type="CAUSAL_LM",
    )
    refuse_unsavable(base, modules_to_save)
    torch.manual_seed(seed)
    try:
        with experts.shown_plain(base):
            _refuse_unknown_parameters(base, target_parameters)
            model = get_peft_model(base, config)
    except ValueError as error:
        known = sorted({name.split(".")[-1] for name, module in base.named_modules() if isinstance(module, nn.Linear)})
        asked = " ".join(target_modules)
        raise UsageError(
            f"--lora_target_modules {asked}: {error} This model's linear layers are {', '.join(known)}."
        ) from error
    experts.adapt_experts(model)
    _unround_lengths(model)
    train_in_float32(model, POLICY)
    return model


def _unround_lengths(model: nn.Module) -> None:
    """Set DoRA's lengths anew: PEFT rounds them to the base's type, and the first step would not start as the base."""
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer) and POLICY in layer.lora_magnitude_vector:
            length: Any = layer.lora_magnitude_vector[POLICY]
            length.update_layer(
                base_layer=layer.get_base_layer(), lora_A=layer.lora_A[POLICY].weight,
                lora_B=layer.lora_B[POLICY].weight, scaling=layer.scaling[POLICY],
            )  # fmt: skip


def _targets(base: nn.Module, asked: Sequence[str]) -> str | list[str]:
    """What `asked` means: for all-linear in a mixture of experts, its linear layers by name. PEFT would adapt experts
    and routers too, which is `target_parameters`."""
    if tuple(asked) != ("all-linear",):
        return list(asked)
    return linear_names(base) if experts.count_experts(base).weights else "all-linear"


def linear_names(base: Any) -> list[str]:
    """Linear layers of a mixture of experts that an adapter can be on: all but the head, routers, gates of one number,
    and names that PEFT takes for the experts' (`gate_proj` of shared experts in families that fuse `gate_proj`)."""
    head = base.get_output_embeddings()
    names = {
        path.rpartition(".")[2]
        for path, module in base.named_modules()
        if isinstance(module, nn.Linear) and module is not head and module.out_features > 1
        and not set(path.split(".")) & set(ROUTERS)
    }  # fmt: skip
    return sorted(name for name in names if not _is_taken_for_experts(base, name))


def _is_taken_for_experts(base: nn.Module, name: str) -> bool:
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(config, base, None)
    except ValueError:  # a part of what is fused
        return True
    return bool(config.target_parameters)


def describe_experts(count: experts.ExpertsCount, adapter: Any) -> str | None:
    """How a mixture of experts is held and what of it is trained, in a line; None for other models."""
    if not count.weights:
        return None
    gib = 2**30
    held = "in 4 bit" if not count.unpacked else f"{count.unpacked / gib:.1f} GiB of them not quantized"
    names = " ".join(sorted(adapter.target_modules or ()))
    trained = " ".join(sorted(adapter.target_parameters or ()))
    line = (
        f"Mixture of experts: {count.weights / 1e6:,.1f} M weights are experts' ({count.size / gib:.1f} GiB, {held}). "
    )
    if trained:
        return line + (
            f"The adapter is on {names} and, for each expert, on {trained}: --lora_target_modules {names} alone is "
            "much smaller."
        )
    return line + (
        f"They and the router get no adapter (--lora_target_modules {names}); --lora_target_parameters gate_up_proj "
        "down_proj trains the experts too."
    )


def _refuse_unknown_parameters(base: nn.Module, asked: Sequence[str]) -> None:
    """PEFT only warns of parameters that it does not find.

    Raises:
        UsageError: naming one, and those there are.
    """
    names = [name for name, parameter in base.named_parameters() if parameter.dim() > 1 and not name.endswith("bias")]
    for wanted in asked:
        if not any(f".{name}".endswith(f".{wanted}") for name in names):
            stacks = sorted({name for _, _, name in experts.stacks_of(base)})
            known = f"its experts' are {', '.join(stacks)}" if stacks else "it has no experts"
            raise UsageError(f"--lora_target_parameters {wanted}: the model has no such parameter; {known}.")


def load_adapter(base: nn.Module, folder: Path, *, trainable: bool) -> Any:
    """Put a saved LoRA adapter on the base as the policy.

    Raises:
        StorageError, ModelError: see `check_adapter_folder`.
    """
    from peft import PeftModel

    check_adapter_folder(folder)
    resize_to_adapter(base, folder)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")
            with experts.shown_plain(base):
                model = PeftModel.from_pretrained(base, str(folder), adapter_name=POLICY, is_trainable=trainable)
        unknown = _restored(model, folder)
    except (ValueError, RuntimeError, KeyError, UserWarning) as error:
        raise does_not_fit(folder, str(error)) from error
    if unknown:
        raise does_not_fit(folder, f"it has {unknown[0]}, and the base has no such layer")
    experts.adapt_experts(model)
    return model


def embedding_names(model: Any) -> list[str]:
    """The parameters of the embedding and of the output layer."""
    modules = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    return [f"{name}.weight" for name, module in model.named_modules() if id(module) in modules]


def resize_to_adapter(base: Any, folder: Path) -> int | None:
    """Give the base as many rows of embeddings as the adapter brings, whose tool added tokens; returns them, or None
    where they are the base's."""
    from safetensors import safe_open

    names = embedding_names(base)
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        found = [
            file.get_slice(key).get_shape()[0]
            for key in file.keys()
            if "lora_" not in key and key.endswith(tuple(f".{name}" for name in names))
        ]
    rows = max(found, default=None)
    if rows is None or rows == len(base.get_input_embeddings().weight):
        return None
    base.resize_token_embeddings(rows, mean_resizing=False)
    base.requires_grad_(False)
    return int(rows)


def does_not_fit(folder: Path, reason: str) -> ModelError:
    """The error for an adapter that finds no place in its base."""
    lines = [line.strip() for line in reason.splitlines() if not line.endswith(":")] or [
        ""
    ]  # torch begins with a title
    first = lines[0][:_LONGEST_REASON]
    return ModelError(f"{folder}: the adapter does not fit this base ({first}). Was it trained on another one?")


def add_frozen_reference(model: Any, folder: Path) -> None:
    """Load the adapter a second time, frozen, as the reference of a policy that started from it."""
    with experts.shown_plain(model):
        model.load_adapter(str(folder), adapter_name=REFERENCE, is_trainable=False)
    experts.adapt_experts(model)
    model.set_adapter(POLICY)


def check_adapter_folder(folder: Path) -> dict[str, Any]:
    """Read and check `adapter_config.json`; returns its content.

    Raises:
        StorageError: no adapter there.
        ModelError: an adapter that is not plain LoRA in safetensors, or one that would import code.
    """
    config_file = folder / "adapter_config.json"
    if not config_file.is_file():
        if (folder / "config.json").is_file():
            raise ModelError(
                f"{folder} is a whole model, not an adapter. The reference is the base itself or an adapter on it, "
                "never a second model in memory: name a folder with an adapter_config.json."
            )
        raise StorageError(
            f"{folder}: there is no adapter_config.json. Name the folder of an adapter or a finished run."
        )
    try:
        config: dict[str, Any] = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{config_file} is not valid JSON: {error}. Restore it from the training run.") from error
    if not isinstance(config, dict):
        raise ModelError(f"{config_file} holds no JSON object. Restore it from the training run.")
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{config_file}: peft_type is {config.get('peft_type')!r}; only LORA adapters are read.")
    _refuse_more_than_lora(config_file, config)
    if not (folder / "adapter_model.safetensors").is_file():
        raise StorageError(f"{folder}: adapter_model.safetensors is missing (a pickled adapter_model.bin is not read).")
    return config


def _refuse_more_than_lora(config_file: Path, config: dict[str, Any]) -> None:
    """An adapter is data: of what its config may ask PEFT for, only what plain LoRA needs is let through.

    Raises:
        ModelError: it asks to import code, for another method, or for an initialization that changes the base.
    """
    for field in IMPORTING_FIELDS:
        if config.get(field) and not _names_transformers(field, config[field]):
            raise ModelError(
                f"{config_file}: {field} asks to import code; such an adapter is refused. Remove the field."
            )
    for field, value in config.items():
        if (
            value
            and field not in LORA_FIELDS
            and field not in IMPORTING_FIELDS
            and value != HARMLESS_DEFAULTS.get(field)
        ):
            raise ModelError(
                f"{config_file}: {field} is {json.dumps(value)[:80]}, which plain LoRA does not have. Only plain LoRA "
                "adapters are read: other methods read files or change the base while they load."
            )
    start = config.get("init_lora_weights")
    if start not in (None, True, False, "gaussian", "orthogonal", "eva"):
        raise ModelError(
            f"{config_file}: init_lora_weights is {json.dumps(start)}, which can change the weights of the base when "
            "the adapter is loaded. Convert it to a plain LoRA adapter with PEFT (save_pretrained with "
            "path_initial_model_for_weight_conversion)."
        )


def _names_transformers(field: str, value: Any) -> bool:
    """What PEFT notes of a model class of transformers, which only its AutoPeftModel reads; nothing here imports it."""
    library = value.get("parent_library") if field == "auto_mapping" and isinstance(value, dict) else None
    return isinstance(library, str) and re.fullmatch(r"transformers\.models(\.\w+)+", library) is not None


@contextmanager
def reference_active(model: Any) -> Iterator[None]:
    """Within this block the model is the reference: the frozen adapter where there is one, else no adapter."""
    was_training = model.training
    model.eval()  # no LoRA dropout
    try:
        if REFERENCE in model.peft_config:
            model.set_adapter(REFERENCE, inference_mode=True)
            yield
        else:
            with model.disable_adapter():
                yield
    finally:
        if REFERENCE in model.peft_config:
            model.set_adapter(POLICY)
        model.train(was_training)


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The policy adapter's weights and the modules that are trained with it, in the model's order."""
    return [
        parameter
        for name, parameter in model.named_parameters()
        if ("lora_" in name or ".modules_to_save." in name) and f".{POLICY}." in name
    ]


def has_dropout(model: nn.Module) -> bool:
    """Whether two forward passes in training mode can differ."""
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())


def adapter_weights(model: Any) -> dict[str, Tensor]:
    """The policy adapter's weights themselves, by the names that PEFT saves them under."""
    from peft import get_peft_model_state_dict

    weights: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=POLICY, save_embedding_layers=False)
    return weights


def save_adapter(model: Any, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write the policy's adapter_model.safetensors and adapter_config.json, as PEFT reads them; `weights` are given
    where those of the model are sharded."""
    from safetensors.torch import save_file

    state = adapter_weights(model) if weights is None else weights
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = copy(model.peft_config[POLICY])
    config.inference_mode = True
    config.save_pretrained(str(folder))


def restore_adapter(model: Any, folder: Path) -> None:
    """Load a checkpoint's adapter into the policy."""
    _restored(model, folder)


def _restored(model: Any, folder: Path) -> list[str]:
    """Load an adapter's weights into the policy; returns the names of those that it has no place for."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    weights = load_file(folder / "adapter_model.safetensors")
    found: Any = set_peft_model_state_dict(model, weights, adapter_name=POLICY)
    return unknown_names(found.unexpected_keys)


def unknown_names(unexpected: Sequence[str]) -> list[str]:
    """Those of an adapter's names that the base has no place for; of a resized embedding PEFT saves each tensor a
    second time, under the names that it has within its wrapper."""
    return [name for name in unexpected if ".modules_to_save." not in name and ".original_module." not in name]
