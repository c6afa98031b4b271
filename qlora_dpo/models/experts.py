"""Mixtures of experts: the stacks of weights that transformers makes of them, held in 4 bit, and LoRA on them.

A layer's experts are 3-D parameters here, [E, out, in] (or [E, in, out], as `is_transposed` says), which bitsandbytes'
layers do not reach. Each is quantized as a whole while it is loaded: blocks of 64 weights lie within one expert. The
forward pass sorts the rows by expert, dequantizes a stack where it is used, and again in the backward pass; nothing
dense is kept in between. LoRA stays a product of two small matrices per expert,

    y = x W_e^T + s (x A_e^T) B_e^T,

where PEFT's own forward adds the update to the weight, in the weight's 16 bits. Names and shapes are PEFT's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STACKS = ("gate_up_proj", "up_proj", "down_proj")  # of transformers' experts
STACK_DIMENSIONS = 3
MOST = 2**31 - 1  # weights that bitsandbytes' kernels count
KERNEL_BYTES = 16  # of which rows and columns must be multiples in torch's grouped product


def stacks_of(model: nn.Module) -> Iterator[tuple[str, Any, str]]:
    """Every stack of expert weights that can be held in 4 bit: its full name, its module and its name there."""
    for path, module in model.named_modules():
        if hasattr(module, "_is_expert_parallel"):  # set by transformers' use_experts_implementation
            yield from ((f"{path}.{name}", module, name) for name in STACKS if name in module._parameters)


def is_packed(experts: Any, name: str) -> bool:
    """Whether this stack is in 4 bit."""
    return name in getattr(experts, "quant_states", {})


def stack_shape(experts: Any, name: str) -> torch.Size:
    """The shape of the weights, [E, out, in] or [E, in, out], also where they are in 4 bit."""
    if is_packed(experts, name):
        rows, columns = experts.quant_states[name].shape
        return torch.Size((experts.num_experts, rows // experts.num_experts, columns))
    return experts._parameters[name].shape  # type: ignore[no-any-return]


def dense_stack(experts: Any, name: str, dtype: torch.dtype) -> Tensor:
    """The stack in `dtype`, dequantized where it is in 4 bit."""
    from bitsandbytes.functional import dequantize_4bit

    weight = experts._parameters[name].detach()
    if is_packed(experts, name):
        weight = dequantize_4bit(weight, experts.quant_states[name]).view(stack_shape(experts, name))
    return weight.to(dtype)  # type: ignore[no-any-return]


def put_packed(experts: Any, name: str, packed: Any) -> None:
    """Make bitsandbytes' `Params4bit` of a stack, as rows [E * out, in], the stack."""
    experts._parameters[name] = packed
    # Beside the parameter, too: FSDP gathers the bytes alone.
    experts.__dict__.setdefault("quant_states", {})[name] = packed.quant_state
    experts.forward = partial(_forward, experts, {})


@dataclass(frozen=True)
class ExpertsCount:
    """The weights of all experts, the bytes they take, and those of them that are not in 4 bit; 0 without experts."""

    weights: int = 0
    size: int = 0
    unpacked: int = 0


def count_experts(model: nn.Module) -> ExpertsCount:
    """Count every stack of weights, also those that cannot be held in 4 bit."""
    found = {full: (stack_shape(module, name).numel(), stack_bytes(module, name), is_packed(module, name))
             for full, module, name in stacks_of(model)}  # fmt: skip
    for full, parameter in model.named_parameters():
        if parameter.dim() == STACK_DIMENSIONS and full not in found:
            found[full] = parameter.numel(), parameter.nbytes, False
    return ExpertsCount(
        sum(weights for weights, *_ in found.values()), sum(size for _, size, _ in found.values()),
        sum(size for _, size, packed in found.values() if not packed),
    )  # fmt: skip


def stack_bytes(experts: Any, name: str) -> int:
    """What a stack takes, with its scales where it is in 4 bit."""
    weight = experts._parameters[name]
    return packed_bytes(weight, experts.quant_states[name]) if is_packed(experts, name) else int(weight.nbytes)


def packed_bytes(weight: Tensor, state: Any) -> int:
    """Bytes of weights that bitsandbytes holds in 4 bit, with their scales."""
    tensors = [weight.data, state.absmax, state.code]
    if state.nested:
        tensors += [state.offset, state.state2.absmax, state.state2.code]
    return sum(tensor.nbytes for tensor in tensors)


@contextmanager
def quantizing() -> Iterator[None]:
    """Within this block transformers' loading in 4 bit quantizes experts, too."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    own = AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"]
    AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = _quantizer_class()
    try:
        yield
    finally:
        AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = own


def quantized_names(model: nn.Module) -> set[str]:
    """The stacks that loading in 4 bit quantizes."""
    return {full for full, module, name in stacks_of(model) if stack_shape(module, name).numel() <= MOST}


def _quantizer_class() -> Any:
    from transformers.integrations.bitsandbytes import Bnb4bitQuantize
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    of_tensor: Any = Bnb4bitQuantize
    of_model: Any = Bnb4BitHfQuantizer

    class Quantize(of_tensor):  # type: ignore[misc]
        """Quantizes a tensor that was read, a layer's weight or a stack of experts."""

        def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
            stacks = {name: value for name, value in input_dict.items() if name in self.hf_quantizer.stacks}
            layers = {name: value for name, value in input_dict.items() if name not in stacks}
            found = super().convert(layers, **kwargs) if layers else {}
            return found | {name: self.hf_quantizer.packed(value) for name, value in stacks.items()}

    class Quantizer(of_model):  # type: ignore[misc]
        """transformers' quantizer for 4 bit that knows experts."""

        stacks: frozenset[str] = frozenset()

        def _process_model_before_weight_loading(self, model: Any, device_map: Any, **kwargs: Any) -> None:
            super()._process_model_before_weight_loading(model, device_map, **kwargs)
            if not self.pre_quantized:
                self.stacks = frozenset(quantized_names(model))

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            for full, module, name in list(stacks_of(model)):
                if full in self.stacks and hasattr(module._parameters[name], "quant_state"):
                    put_packed(module, name, module._parameters[name])
            return super()._process_model_after_weight_loading(model, **kwargs)

        def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
            return param_name in self.stacks or super().param_needs_quantization(model, param_name, **kwargs)

        def get_quantize_ops(self) -> Any:
            return Quantize(self)

        def packed(self, value: Any) -> Any:
            """A stack in 4 bit."""
            from bitsandbytes.nn import Params4bit

            stack = value[0] if isinstance(value, list) else value
            config = self.quantization_config
            packed: Any = Params4bit(
                stack.reshape(-1, stack.shape[-1]), requires_grad=False, quant_type=config.bnb_4bit_quant_type,
                compress_statistics=config.bnb_4bit_use_double_quant,
            )  # fmt: skip
            return packed.to(stack.device)

    return Quantizer


@contextmanager
def shown_plain(model: nn.Module) -> Iterator[None]:
    """Within this block packed stacks have the shape and type of their weights, and no content, for PEFT to look at."""
    hidden = [
        (module, name, module._parameters[name]) for _, module, name in stacks_of(model) if is_packed(module, name)
    ]
    try:
        for module, name, weight in hidden:
            like = torch.empty((), dtype=module.quant_states[name].dtype, device=weight.device)
            module._parameters[name] = nn.Parameter(like.expand(stack_shape(module, name)), requires_grad=False)
        yield
    finally:
        for module, name, weight in hidden:
            module._parameters[name] = weight


def adapt_experts(model: nn.Module) -> int:
    """Give adapted experts the forward pass of this module in place of PEFT's; returns how many there are."""
    from peft.tuners.lora.layer import ParamWrapper

    inner = {id(module.base_layer) for module in model.modules() if isinstance(module, ParamWrapper)}
    count = 0
    modules: list[Any] = list(model.modules())
    for module in modules:
        if isinstance(module, ParamWrapper) and id(module) not in inner:
            experts, wrappers = _unwrapped(module)
            if hasattr(experts, "_is_expert_parallel") and wrappers.keys() <= set(STACKS):
                module.forward = partial(_forward, experts, wrappers)  # type: ignore[method-assign]
                count += 1
    return count


def _unwrapped(wrapper: Any) -> tuple[Any, dict[str, Any]]:
    """The experts within nested wrappers, and the wrappers by the stack that each one adapts."""
    from peft.tuners.lora.layer import ParamWrapper

    wrappers = {}
    while isinstance(wrapper, ParamWrapper):
        wrappers[wrapper.parameter_name] = wrapper
        wrapper = wrapper.base_layer
    return wrapper, wrappers


def _forward(
    experts: Any, wrappers: Mapping[str, Any], hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """transformers' experts; hidden [T, H], top_k_index and top_k_weights [T, K], result [T, H]."""
    tokens, top_k = top_k_index.shape
    ids, order = top_k_index.reshape(-1).sort(stable=True)
    offsets = torch.searchsorted(ids, torch.arange(experts.num_experts, device=ids.device), right=True).int()
    rows: Tensor = _Dispatch.apply(hidden, order, top_k)
    if experts.has_gate:
        rows = experts._apply_gate(_linear(experts, wrappers, "gate_up_proj", rows, ids, offsets))
    else:
        rows = experts.act_fn(_linear(experts, wrappers, "up_proj", rows, ids, offsets))
    rows = _linear(experts, wrappers, "down_proj", rows, ids, offsets)
    if experts.has_post_expert_norm:
        rows = experts.post_expert_norm(rows)
    rows = rows * top_k_weights.reshape(-1)[order, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return rows[back].view(tokens, top_k, -1).sum(1).to(hidden.dtype)


def _linear(experts: Any, wrappers: Mapping[str, Any], name: str, rows: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
    """One projection of rows [N, in], sorted by their experts `ids` [N], which end at `offsets` [E]."""
    output: Tensor = _Grouped.apply(rows, offsets, experts, name)
    if experts.has_bias:
        output = output + getattr(experts, f"{name}_bias")[ids].to(output.dtype)
    wrapper = wrappers.get(name)
    if wrapper is None or wrapper.disable_adapters or wrapper.merged:
        return output
    for adapter in wrapper.active_adapters:
        if adapter in wrapper.lora_A:
            output = output + _low_rank(wrapper, adapter, rows, offsets)
    return output


def _low_rank(wrapper: Any, adapter: str, rows: Tensor, offsets: Tensor) -> Tensor:
    """What the adapter adds. PEFT stacks A's rows by expert and B's columns by rank: A [E * r, in], B [out, r * E]."""
    a, b = (part[adapter].weight.to(rows.dtype) for part in (wrapper.lora_A, wrapper.lora_B))
    a = a.view(wrapper.num_experts, -1, a.shape[1]).transpose(1, 2)
    b = b.view(b.shape[0], -1, wrapper.num_experts).permute(2, 1, 0).contiguous()
    return _grouped_mm(_grouped_mm(rows, a, offsets), b, offsets) * wrapper.scaling[adapter]


class _Dispatch(torch.autograd.Function):
    """A copy of each row [T, H] for each of its `top_k` experts, in the order of the experts."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, order: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.top_k = top_k
        return hidden[order // top_k]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        sorted_back = torch.empty_like(grads[0])
        sorted_back[order] = grads[0]
        return sorted_back.view(-1, ctx.top_k, grads[0].shape[-1]).sum(1), None, None


class _Grouped(torch.autograd.Function):
    """Rows [N, in] times the transposed weights of their experts; the frozen stack is dequantized once each way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, offsets: Tensor, experts: Any, name: str) -> Tensor:
        ctx.save_for_backward(offsets)
        ctx.experts, ctx.name = experts, name
        weight = dense_stack(experts, name, rows.dtype)
        return _grouped_mm(rows, weight if experts.is_transposed else weight.transpose(1, 2), offsets)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (offsets,) = ctx.saved_tensors
        weight = dense_stack(ctx.experts, ctx.name, grads[0].dtype)
        weight = weight.transpose(1, 2) if ctx.experts.is_transposed else weight
        return _grouped_mm(grads[0].contiguous(), weight, offsets), None, None, None


def _grouped_mm(rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """rows [N, in] times weights [E, in, out], expert by expert."""
    aligned = all(size * rows.element_size() % KERNEL_BYTES == 0 for size in weights.shape[1:])
    if rows.dtype == torch.bfloat16 and aligned:
        return F.grouped_mm(rows, weights, offs=offsets)
    from transformers.integrations import moe  # noqa: F401  # registers the operation

    output: Tensor = torch.ops.transformers.grouped_mm_fallback(rows, weights, offsets)
    return output
