"""Each lean layer alone against the layer that it replaces: seconds forward and backward, bytes kept in between.

python benchmarks/levers.py        writes benchmarks/results/levers.{json,md}

bf16 on a CPU, at the shape of `vs_trl.py`, in alternating rounds. SwiGLU is here because it was tried and not taken.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.processes import RESULTS, run
from benchmarks.programs import RANK, SHAPE, TINY_SHAPE, Shape, environment, machine_line

TOKENS, ROUNDS = 2048, 15
Candidate = tuple[str, str, Callable[[], Any], Callable[[], Any]]
"""Lever, whether it is used, and calls of the replaced and the lean form; each makes a graph from fresh leaves."""


def main() -> None:
    """Measure every lever; print and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a few tokens of a tiny shape; needs --output")
    parser.add_argument("--output", type=Path, default=None, help="folder of the results")
    options = parser.parse_args()
    if options.tiny and options.output is None:
        parser.error("--tiny needs --output, so that it cannot replace real results")
    shape, tokens, rounds = (TINY_SHAPE, 64, 3) if options.tiny else (SHAPE, TOKENS, ROUNDS)
    rows = run(measure, shape, tokens, rounds)
    results = {"environment": run(environment), "shape": shape, "tokens": tokens, "rounds": rounds, "rows": rows}
    folder = options.output or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "levers.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (folder / "levers.md").write_text(table(results), encoding="utf-8")
    print(table(results))


def measure(shape: Shape, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Median milliseconds and kept bytes of both forms of every lever."""
    rows = []
    for name, use, own, lean in candidates(shape, tokens):
        seconds: dict[str, list[list[float]]] = {"own": [], "lean": []}
        for _ in range(rounds):
            for form, call in (("own", own), ("lean", lean)):
                seconds[form].append(time_once(call))
        row: dict[str, Any] = {"lever": name, "used": use}
        for form, call in (("own", own), ("lean", lean)):
            forward, backward = (statistics.median(column) * 1e3 for column in zip(*seconds[form], strict=True))
            row[form] = {"forward_ms": forward, "backward_ms": backward, "kept_bytes": kept_bytes(call)}
        rows.append(row)
    return rows


def time_once(call: Callable[[], Any]) -> list[float]:
    """Seconds of one forward and one backward pass."""
    import torch

    started = time.perf_counter()
    outputs = call()
    between = time.perf_counter()
    torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    return [between - started, time.perf_counter() - between]


def kept_bytes(call: Callable[[], Any]) -> int:
    """Bytes of the tensors that the graph keeps, parameters and leaves left out."""
    import torch

    kept: dict[int, int] = {}

    def note(tensor: Any) -> Any:
        if not tensor.requires_grad or tensor.grad_fn is not None:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = call()
    del outputs
    return sum(kept.values())


def candidates(shape: Shape, tokens: int) -> list[Candidate]:
    """The levers at this shape."""
    import torch
    import torch.nn.functional as F
    from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

    from qlora_dpo.models.lean_layers import _norm, _Rotate

    torch.manual_seed(0)
    width, inner, heads = (shape[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads"))
    size = width // heads
    norm = LlamaRMSNorm(width).bfloat16().requires_grad_(False)
    x = torch.randn(1, tokens, width).bfloat16()
    wide = [torch.randn(1, tokens, inner).bfloat16() for _ in range(2)]
    angles = [torch.randn(1, tokens, size).bfloat16() for _ in range(2)]

    def leaf(tensor: Any) -> Any:
        return tensor.detach().requires_grad_()

    def turned(rotate: Callable[..., Any], *cos_sin: Any) -> Any:
        by_head = [leaf(x).view(1, tokens, heads, size).transpose(1, 2) for _ in range(2)]
        return rotate(*by_head, *cos_sin)

    own_lora, lean_lora = lora_layers(width, inner)
    return [
        ("RMSNorm", "yes", lambda: (norm(leaf(x)),), lambda: (_norm(norm.weight, 1e-6, 0.0, leaf(x)),)),
        ("rotary positions, query and key", "yes", lambda: turned(apply_rotary_pos_emb, *angles),
         lambda: turned(_Rotate.apply, *(angle[:, None] for angle in angles))),
        (f"LoRA linear, r={RANK}, NF4", "yes", lambda: (own_lora(leaf(x)),), lambda: (lean_lora(leaf(x)),)),
        ("SwiGLU that keeps gate and up only", "no", lambda: (F.silu(leaf(wide[0])) * leaf(wide[1]),),
         lambda: (swiglu(leaf(wide[0]), leaf(wide[1])),)),
    ]  # fmt: skip


def lora_layers(width: int, inner: int) -> list[Any]:
    """The same 4-bit LoRA layer with PEFT's forward and with the fused one."""
    import torch
    from bitsandbytes.nn import Linear4bit
    from peft import LoraConfig, get_peft_model
    from torch import nn

    from qlora_dpo.models.fused_lora import fuse_lora
    from qlora_dpo.models.loading import keep_cpu_layers_differentiable

    layers = []
    for fuse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(Linear4bit(width, inner, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"))
        model = model.to("cpu").requires_grad_(False)
        keep_cpu_layers_differentiable(model)
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"], init_lora_weights=False)
        policy = get_peft_model(model, config).train()
        if fuse:
            assert fuse_lora(policy) == 1
        layers.append(policy)
    return layers


def swiglu(gate: Any, up: Any) -> Any:
    """`silu(gate) * up` that recomputes the activation in its backward pass."""
    import torch
    import torch.nn.functional as F

    class SwiGLU(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, gate: Any, up: Any) -> Any:
            ctx.save_for_backward(gate, up)
            return F.silu(gate).mul_(up)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            gate, up = ctx.saved_tensors
            return torch.ops.aten.silu_backward(grads[0] * up, gate), F.silu(gate).mul_(grads[0])

    return SwiGLU.apply(gate, up)


def table(results: dict[str, Any]) -> str:
    """One line per lever."""
    shape = results["shape"]
    lines = [
        "# Lean layers, each alone",
        "",
        machine_line(results["environment"]),
        f"{results['tokens']} tokens, {shape['hidden_size']} wide ({shape['intermediate_size']} inside), bf16; medians "
        f"of {results['rounds']} alternating rounds.",
        "",
        "| lever | forward, ms | backward, ms | kept, MiB | used |",
        "|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        own, lean = row["own"], row["lean"]
        cells = [f"{own[key]:.1f} → {lean[key]:.1f}" for key in ("forward_ms", "backward_ms")]
        kept = f"{own['kept_bytes'] / 2**20:.1f} → {lean['kept_bytes'] / 2**20:.1f}"
        lines.append(f"| {row['lever']} | {' | '.join(cells)} | {kept} | {row['used']} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
