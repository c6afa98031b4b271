"""Per-token log-probs of completions: a packed forward pass, then the head on the predicting positions only."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from qlora_dpo.data.packing import LayoutKind, PackedBatch, Pair, pack
from qlora_dpo.models import attention
from qlora_dpo.objectives.logps import chunked_logps, chunked_logps_and_squares

logger = logging.getLogger(__name__)

# Largest mean |difference| of log-probs per token between two exact paths, by compute type: rounding, not error.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
NOISE_MARGIN = 3  # times the plain path's own rounding is allowed too, for models that round more than most


@dataclass(frozen=True)
class Head:
    """How a model turns hidden states into logits: `softcap(scale * (hidden @ weight.T + bias))`."""

    module: nn.Module
    scale: float
    softcap: float | None

    def logps(self, hidden: Tensor, target_ids: Tensor, with_squares: bool) -> tuple[Tensor, Tensor | None]:
        """Log-probs [N] in fp32 of `target_ids` [N] given the hidden states [N, H] that predict them, and on request
        log(sum_v p_v^2) [N] of the same positions."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        form: dict[str, Any] = {
            "head_bias": getattr(self.module, "bias", None),
            "softcap": self.softcap,
            "logit_scale": self.scale,
        }
        if with_squares:
            return chunked_logps_and_squares(hidden, weight, target_ids, **form)
        return chunked_logps(hidden, weight, target_ids, **form), None


@dataclass(frozen=True)
class Scorer:
    """The way in which this model's completions are scored; found by `choose_scorer`."""

    kind: LayoutKind
    head: Head | None
    """None: the model's own logits, for a head whose form is not known."""

    def per_token_logps(self, model: Any, batch: PackedBatch) -> Tensor:
        """Log-probs [N] in fp32 of the batch's completion tokens under `model` as it is now (adapter on or off)."""
        return self.per_token_logps_and_squares(model, batch, with_squares=False)[0]

    def per_token_logps_and_squares(
        self, model: Any, batch: PackedBatch, *, with_squares: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """The log-probs [N], and log(sum_v p_v^2) [N] of the same positions, which WPO reads."""
        causal_lm = model.get_base_model()
        if self.head is None:
            return _own_logps(causal_lm, batch)
        decoder = getattr(causal_lm, causal_lm.base_model_prefix)
        output = decoder(**_inputs(batch), use_cache=False)
        hidden = output.last_hidden_state.flatten(0, 1)  # (rows * T, H)
        return self.head.logps(hidden.index_select(0, batch.predictor_index), batch.target_ids, with_squares)


def choose_scorer(model: Any, pair: Pair, device: torch.device) -> Scorer:
    """The fastest scorer that gives this model's own log-probs on a real pair.

    Tries the shared layout, then padded rows, both with the chunked head; falls back to the model's own logits.
    """
    causal_lm = model.get_base_model()
    head = _find_head(causal_lm)
    plain = pack([pair], "padded").to(device)
    own_attention = causal_lm.config._attn_implementation
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            expected, _ = _own_logps(causal_lm, plain)
            for scorer in (Scorer("shared", head), Scorer("padded", head)):
                reason = _disagreement(scorer, model, pair, expected, device)
                if reason is None:
                    return scorer
                logger.warning(
                    "%s scoring is not exact for this model (%s); using the next slower way.",
                    scorer.kind,
                    reason,
                )
                if causal_lm.config._attn_implementation != own_attention:
                    causal_lm.set_attn_implementation(own_attention)
    finally:
        model.train(was_training)
    return Scorer("padded", None)


def _disagreement(scorer: Scorer, model: Any, pair: Pair, expected: Tensor, device: torch.device) -> str | None:
    """Why this scorer cannot be used, or None when it reproduces `expected` [N]."""
    causal_lm = model.get_base_model()
    if scorer.kind == "shared":
        reason = why_not_shared(causal_lm)
        if reason:
            return reason
    try:
        with attention.counted_calls() as calls:
            found = scorer.per_token_logps(model, pack([pair], scorer.kind).to(device))
    except (NotImplementedError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    layers = causal_lm.config.get_text_config().num_hidden_layers
    if scorer.kind == "shared" and calls.count != layers:
        return f"{calls.count} of {layers} layers use the shared attention"
    difference = (found - expected).abs().mean().item()
    limit = TOLERANCE.get(causal_lm.dtype, TOLERANCE[torch.bfloat16])
    if difference <= limit or difference <= NOISE_MARGIN * _own_noise(causal_lm, pair, expected, device):
        return None
    return f"log-probs differ by {difference:.2g} per token"


@dataclass(frozen=True)
class _SameTwice:
    """A pair of one completion and itself: two rows without padding."""

    prompt_ids: Sequence[int]
    chosen_ids: Sequence[int]

    @property
    def rejected_ids(self) -> Sequence[int]:
        return self.chosen_ids


def _own_noise(causal_lm: Any, pair: Pair, expected: Tensor, device: torch.device) -> float:
    """How far the plain path is from itself when a row's padding changes: the rounding of this model."""
    borders = (0, len(pair.chosen_ids), len(pair.chosen_ids) + len(pair.rejected_ids))
    noise = []
    for completion, (start, end) in zip((pair.chosen_ids, pair.rejected_ids), pairwise(borders), strict=True):
        unpadded = pack([_SameTwice(pair.prompt_ids, completion)], "padded").to(device)
        logps, _ = _own_logps(causal_lm, unpadded)
        noise.append((logps[: end - start] - expected[start:end]).abs().mean().item())
    return max(noise)


def why_not_shared(causal_lm: Any) -> str | None:
    """The structural reasons against one row for two completions; switches the attention on when there is none."""
    config = causal_lm.config.get_text_config()
    recurrent = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if recurrent:
        return f"it has {', '.join(sorted(recurrent))} layers"
    if getattr(config, "attention_dropout", 0.0) or getattr(config, "attn_pdrop", 0.0):
        return "it has attention dropout"
    attention.register()
    try:
        causal_lm.set_attn_implementation(attention.IMPLEMENTATION)
    except ValueError as error:
        return str(error).splitlines()[0]
    replaced = causal_lm.config._attn_implementation == attention.IMPLEMENTATION
    return None if replaced else "its attention cannot be replaced"


def _inputs(batch: PackedBatch) -> dict[str, Any]:
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
    if batch.layout is None:
        return inputs | {"attention_mask": batch.attention_mask}
    # A 4-D mask is passed on untouched by every mask builder; an empty one makes a layer that drops the layout fail.
    empty = torch.empty(1, 1, 0, 0, device=batch.input_ids.device)
    return inputs | {"attention_mask": empty, "prefix_layout": batch.layout}


def _own_logps(causal_lm: Any, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """The plain path: padded rows through the model as it came, full logits."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    logits = causal_lm(**inputs, use_cache=False).logits.flatten(0, 1)
    logps = logits.index_select(0, batch.predictor_index).float().log_softmax(-1)
    return logps.gather(1, batch.target_ids[:, None])[:, 0], (2 * logps.detach()).logsumexp(-1)


def _find_head(causal_lm: Any) -> Head:
    """The output layer with the scales that some families put behind it; `choose_scorer` checks the guess."""
    config = causal_lm.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return Head(causal_lm.get_output_embeddings(), scale, getattr(config, "final_logit_softcapping", None))
