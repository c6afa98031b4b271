"""A model without its weights: the policy as training has it, on torch's meta device, where tensors have shapes only.

It is the real code, the real 4-bit layers and the real adapter, so what is counted on it follows whatever they do.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qlora_dpo.errors import ModelError
from qlora_dpo.models import experts
from qlora_dpo.models.fused_lora import fuse_lora
from qlora_dpo.models.lean_layers import make_lean
from qlora_dpo.models.loading import disable_dropout, model_on_meta
from qlora_dpo.models.lora import add_adapter, trainable_parameters
from qlora_dpo.models.text_model import text_model

BLOCK, NESTED_BLOCK = 64, 256  # weights per scale, and scales per scale of scales, as bitsandbytes quantizes


@dataclass(frozen=True)
class WeightCount:
    """The frozen base: bytes of its quantized and of its other weights, of the largest weight once it is dequantized,
    and the parameters that a token is multiplied with (`head` apart; of experts only those it is sent to)."""

    quantized: int
    other: int
    largest: int
    active_parameters: int
    head_parameters: int
    experts: experts.ExpertsCount


@dataclass(frozen=True)
class Skeleton:
    """The policy on the meta device with one decoder layer of each kind; `kinds` names each layer's kind, in order."""

    policy: Any
    stack: nn.ModuleList
    samples: tuple[nn.Module, ...]
    kinds: tuple[int, ...]
    weights: WeightCount
    r: int
    adapter_parameters: int
    adapter_bytes: int
    dtype: torch.dtype


def build_skeleton(
    config: Any,
    *,
    quantization: dict[str, Any] | None,
    dtype: torch.dtype,
    r: int,
    target_modules: Sequence[str],
    target_parameters: Sequence[str] = (),
    rank_pattern: Mapping[str, int] | None = None,
    use_dora: bool = False,
    modules_to_save: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> Skeleton:
    """Build the policy of a transformers config without weights.

    `quantization` holds keyword arguments of transformers' `BitsAndBytesConfig`, or is None.

    Raises:
        ModelError: the architecture has no stack of decoder layers to count.
        UsageError: a target module that the model does not have.
    """
    config = deepcopy(config)
    disable_dropout(config)
    base = _base_on_meta(config, quantization, dtype, trust_remote_code)
    weights = _count_weights(base, dtype)
    stack = _decoder_stack(base)
    samples, kinds = _kinds(stack)
    _put(stack, samples)
    with torch.device("meta"), torch.random.fork_rng(range(torch.cuda.device_count())), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the real adapter says it too
        policy = add_adapter(
            base, r=r, alpha=r, dropout=0.0, target_modules=target_modules, target_parameters=target_parameters,
            rank_pattern=rank_pattern, use_dora=use_dora, modules_to_save=modules_to_save, seed=0,
        )  # fmt: skip
    fuse_lora(policy)
    make_lean(policy)
    # PEFT replaces modules within the layers, not the layers; each sample stands for every layer of its kind.
    per_kind = [trainable_parameters(sample) for sample in samples]
    within = {id(parameter) for parameters in per_kind for parameter in parameters}
    outside = [parameter for parameter in trainable_parameters(policy) if id(parameter) not in within]
    everything = [*outside, *(parameter for kind in kinds for parameter in per_kind[kind])]
    return Skeleton(
        policy, stack, samples, kinds, weights, r,
        adapter_parameters=sum(parameter.numel() for parameter in everything),
        adapter_bytes=sum(parameter.nbytes for parameter in everything),
        dtype=dtype,
    )  # fmt: skip


def _base_on_meta(config: Any, quantization: dict[str, Any] | None, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    try:
        base = model_on_meta(config, trust_remote_code, dtype=dtype)
        base.requires_grad_(False)
        if quantization:
            _quantize(base, quantization, dtype)
    except Exception as error:  # whatever the architecture's code raises
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise ModelError(f"a {config.model_type} model cannot be built without its weights: {reason}") from error
    return base


def show_alike(skeleton: Skeleton, kind: int, layers: int) -> None:
    """Let the model consist of that many layers of this kind."""
    config = skeleton.policy.get_base_model().config.get_text_config()
    config.num_hidden_layers = layers
    types = getattr(config, "layer_types", None)
    if types is not None and len(types) < layers:
        config.layer_types = [*types, *types[-1:] * layers]
    _put(skeleton.stack, [skeleton.samples[kind]] * layers)


def _put(stack: nn.ModuleList, layers: Sequence[nn.Module]) -> None:
    del stack[:]
    stack.extend(layers)


def _decoder_stack(base: nn.Module) -> nn.ModuleList:
    from transformers.modeling_layers import GradientCheckpointingLayer

    stacks = [
        module
        for module in text_model(base).modules()
        if isinstance(module, nn.ModuleList) and all(isinstance(layer, GradientCheckpointingLayer) for layer in module)
    ]
    longest = max(stacks, key=len, default=nn.ModuleList())
    if not longest:
        raise ModelError(
            f"{type(base).__name__} has no stack of decoder layers that can be checkpointed, so its memory cannot be "
            "counted. Set --activation_checkpointing none."
        )
    return longest


def _kinds(stack: nn.ModuleList) -> tuple[tuple[nn.Module, ...], tuple[int, ...]]:
    """The last layer of each kind, and the kind of every layer; layers of the same shapes are of one kind."""
    signatures = [
        (type(layer), tuple((name, parameter.shape) for name, parameter in layer.named_parameters())) for layer in stack
    ]
    samples = dict(zip(signatures, stack, strict=True))  # the last one of its kind
    order = list(samples)
    return tuple(samples.values()), tuple(order.index(signature) for signature in signatures)


def _quantize(base: Any, quantization: dict[str, Any], dtype: torch.dtype) -> None:
    """Put bitsandbytes' layers where loading would put them."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    with experts.quantizing():
        quantizer = AutoHfQuantizer.from_config(BitsAndBytesConfig(**quantization), pre_quantized=False)
    quantizer.preprocess_model(model=base, device_map=None)
    quantizer.postprocess_model(model=base)
    for module in base.modules():
        if isinstance(module, Linear4bit):
            old: Any = module.weight
            packed = _packed(old, dtype, old.quant_type, old.compress_statistics, module)
            module.weight, module.quant_state = packed, packed.quant_state
        elif isinstance(module, Linear8bitLt):
            _quantize_8bit(module)
    for full, module, name in list(experts.stacks_of(base)):
        if quantization.get("load_in_4bit") and full in quantizer.stacks:
            rows = module._parameters[name].flatten(0, 1)
            config = quantizer.quantization_config
            packed = _packed(rows, dtype, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant)
            experts.put_packed(module, name, packed)
    base.requires_grad_(False)


def _packed(weight: Tensor, dtype: torch.dtype, quant_type: str, nested: bool, module: Any = None) -> Any:
    """The packed weight, with its scales, that a weight would be after loading."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Params4bit

    meta = torch.device("meta")
    blocks = -(-weight.numel() // BLOCK)
    common: dict[str, Any] = {
        "shape": weight.shape, "dtype": dtype, "blocksize": BLOCK, "quant_type": quant_type,
        "code": torch.empty(16, device=meta),
    }  # fmt: skip
    if nested:
        scales = torch.empty(-(-blocks // NESTED_BLOCK), device=meta)
        inner = QuantState(scales, blocksize=NESTED_BLOCK, code=torch.empty(256, device=meta), dtype=torch.float32)
        eight_bit = torch.empty(blocks, dtype=torch.uint8, device=meta)
        state = QuantState(eight_bit, offset=torch.empty((), device=meta), state2=inner, **common)
    else:
        state = QuantState(torch.empty(blocks, device=meta), **common)
    packed = torch.empty((weight.numel() + 1) // 2, 1, dtype=torch.uint8, device=meta)
    return Params4bit(
        packed, requires_grad=False, quant_state=state, quant_type=quant_type, bnb_quantized=True, module=module,
        compress_statistics=nested,
    )  # fmt: skip


def _quantize_8bit(layer: Any) -> None:
    from bitsandbytes.nn import Int8Params

    weight = torch.empty(layer.weight.shape, dtype=torch.int8, device="meta")
    scales = torch.empty(len(weight), device="meta")
    layer.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False, CB=weight, SCB=scales)
    layer.forward = partial(_Int8OnMeta.apply, layer)


class _Int8OnMeta(torch.autograd.Function):
    """What bitsandbytes' 8-bit product keeps and allocates; the product itself has no form without data."""

    @staticmethod
    def forward(ctx: Any, layer: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        return x.new_empty(*x.shape[:-1], layer.out_features)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        (x,) = ctx.saved_tensors
        return None, grads[0] @ ctx.layer.weight.to(x.dtype)


def _count_weights(base: Any, dtype: torch.dtype) -> WeightCount:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    quantized, largest, active, seen = 0, 0, 0, set()
    head = base.get_output_embeddings()
    for module in base.modules():
        if isinstance(module, Linear4bit | Linear8bitLt):
            seen.add(id(module.weight))
            quantized += _bytes_4bit(module) if isinstance(module, Linear4bit) else _bytes_8bit(module)
            largest = max(largest, module.in_features * module.out_features * dtype.itemsize)
        if isinstance(module, nn.Linear) and module is not head:
            active += module.in_features * module.out_features
    for _, module, name in experts.stacks_of(base):
        if experts.is_packed(module, name):
            seen.add(id(module._parameters[name]))
            quantized += experts.stack_bytes(module, name)
            largest = max(largest, experts.stack_shape(module, name).numel() * dtype.itemsize)
    others = {id(parameter): parameter for parameter in base.parameters() if id(parameter) not in seen}
    buffers = sum(buffer.nbytes for buffer in base.buffers())
    config = base.config.get_text_config()
    count = next((n for key in ("num_local_experts", "num_experts", "n_routed_experts")
                  if (n := getattr(config, key, None))), 1)  # fmt: skip
    used = getattr(config, "num_experts_per_tok", None) or count
    of_experts = experts.count_experts(base)
    active += of_experts.weights * used // count
    return WeightCount(
        quantized, sum(parameter.nbytes for parameter in others.values()) + buffers, largest, active,
        0 if head is None else head.weight.numel(), of_experts,
    )  # fmt: skip


def _bytes_4bit(layer: Any) -> int:
    return experts.packed_bytes(layer.weight, layer.weight.quant_state)


def _bytes_8bit(layer: Any) -> int:
    return int(layer.weight.numel() + 4 * layer.out_features)
