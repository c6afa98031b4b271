"""Per-token log-probs of completions: a packed forward pass, then the head on the predicting positions only."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_dpo.data.conversation_tokens import TokenizedConversation
from qlora_dpo.data.packing import LayoutKind, PackedBatch, Sample, pack, prompt_and_completions
from qlora_dpo.models import attention
from qlora_dpo.objectives.logps import chunked_logps, chunked_logps_and_hits, chunked_logps_and_squares

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
        if with_squares:
            return chunked_logps_and_squares(hidden, self._weight(hidden), target_ids, **self._form)
        return chunked_logps(hidden, self._weight(hidden), target_ids, **self._form), None

    def logps_and_hits(self, hidden: Tensor, target_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The log-probs [N], and whether no token is likelier than the target."""
        return chunked_logps_and_hits(hidden, self._weight(hidden), target_ids, **self._form)

    def _weight(self, hidden: Tensor) -> Tensor:
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return weight.to(hidden.dtype) if weight.requires_grad else weight  # a trained head is held in fp32

    @property
    def _form(self) -> dict[str, Any]:
        return {
            "head_bias": getattr(self.module, "bias", None),
            "softcap": self.softcap,
            "logit_scale": self.scale,
        }


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
            return _own_logps(causal_lm, batch)[:2]
        return self.head.logps(_predicting(causal_lm, batch), batch.target_ids, with_squares)

    def per_token_logps_and_hits(self, model: Any, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """The log-probs [N], and whether no token is likelier than the target."""
        causal_lm = model.get_base_model()
        if self.head is None:
            logps, _, hits = _own_logps(causal_lm, batch)
            return logps, hits
        return self.head.logps_and_hits(_predicting(causal_lm, batch), batch.target_ids)


def choose_scorer(model: Any, sample: Sample, device: torch.device) -> Scorer:
    """The fastest scorer that gives this model's own log-probs on a real pair or conversation.

    Tries the shared layout, then padded rows, both with the chunked head; falls back to the model's own logits.
    """
    causal_lm = model.get_base_model()
    head = _find_head(causal_lm)
    plain = pack([sample], "padded").to(device)
    own_attention = causal_lm.config._attn_implementation
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            expected = _own_logps(causal_lm, plain)[0]
            for scorer in (Scorer("shared", head), Scorer("padded", head)):
                reason = _disagreement(scorer, model, sample, expected, device)
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


def _disagreement(scorer: Scorer, model: Any, sample: Sample, expected: Tensor, device: torch.device) -> str | None:
    """Why this scorer cannot be used, or None when it reproduces `expected` [N]."""
    causal_lm = model.get_base_model()
    if scorer.kind == "shared":
        reason = why_not_shared(causal_lm)
        if reason:
            return reason
    try:
        with attention.counted_calls() as calls:
            found = scorer.per_token_logps(model, pack([sample], scorer.kind).to(device))
    except (NotImplementedError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    layers = causal_lm.config.get_text_config().num_hidden_layers
    if scorer.kind == "shared" and calls.count != layers:
        return f"{calls.count} of {layers} layers use the shared attention"
    difference = (found - expected).abs().mean().item()
    limit = TOLERANCE.get(causal_lm.dtype, TOLERANCE[torch.bfloat16])
    if difference <= limit or difference <= NOISE_MARGIN * _own_noise(causal_lm, sample, expected, device):
        return None
    return f"log-probs differ by {difference:.2g} per token"


def _own_noise(causal_lm: Any, sample: Sample, expected: Tensor, device: torch.device) -> float:
    """How far the plain path is from itself when a row's padding or the number of rows changes: the rounding of this
    model."""
    prompt_ids, completions = prompt_and_completions(sample)
    noise = []
    expected_of = torch.split(expected, [len(completion.targets) for completion in completions])
    for completion, logps in zip(completions, expected_of, strict=True):
        places = [len(prompt_ids) + place for place in completion.targets]
        borders = [border for place in places for border in (place, place + 1)]
        alone = TokenizedConversation([*prompt_ids, *completion.ids], borders)
        twice = _own_logps(causal_lm, pack([alone, alone], "padded").to(device))[0]
        noise.append((twice[: len(logps)] - logps).abs().mean().item())
    return float(max(noise))


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


def _predicting(causal_lm: Any, batch: PackedBatch) -> Tensor:
    """Hidden states [N, H] at the positions that predict."""
    decoder = getattr(causal_lm, causal_lm.base_model_prefix)
    output = decoder(**_inputs(batch), use_cache=False)
    hidden: Tensor = output.last_hidden_state.flatten(0, 1)  # (rows * T, H)
    return hidden.index_select(0, batch.predictor_index)


def _own_logps(causal_lm: Any, batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """The plain path: padded rows through the model as it came, full logits; log-probs, log(sum_v p_v^2) and hits."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    logits = causal_lm(**inputs, use_cache=False).logits.flatten(0, 1)
    logps = logits.index_select(0, batch.predictor_index).float().log_softmax(-1)
    of_targets = logps.gather(1, batch.target_ids[:, None])[:, 0]
    return of_targets, (2 * logps.detach()).logsumexp(-1), of_targets.detach() >= logps.detach().amax(-1)


def _find_head(causal_lm: Any) -> Head:
    """The output layer with the scales that some families put behind it; `choose_scorer` checks the guess."""
    config = causal_lm.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return Head(causal_lm.get_output_embeddings(), scale, getattr(config, "final_logit_softcapping", None))
