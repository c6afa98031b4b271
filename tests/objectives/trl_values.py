"""Expected values from TRL itself: its `_compute_loss` runs unchanged on log-probs that we choose."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

PROMPT_LENGTH = 2
OPTIONS_KEPT_BY_NAME = (
    "beta",
    "ld_alpha",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "label_smoothing",
    "use_weighting",
)


def trl_loss(
    policy: Tensor,
    reference: Tensor,
    lengths: Sequence[int],
    *,
    log_squares: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, dict[str, float]]:
    """Return TRL's loss and metrics for flat `[N]` log-probs of chosen_0, rejected_0, chosen_1, ...

    The trainer is made without its `__init__`, which wants a model and a data set; its models are stand-ins
    that return the given log-probs in TRL's padded layout.
    """
    from trl import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    args = DPOConfig(output_dir="unused", report_to="none", use_cpu=True, bf16=False, **options)
    trainer = DPOTrainer.__new__(DPOTrainer)
    trainer.args = args
    for name in OPTIONS_KEPT_BY_NAME:
        setattr(trainer, name, getattr(args, name))
    trainer.loss_types = args.loss_type
    trainer.loss_weights = args.loss_weights or [1.0] * len(args.loss_type)
    trainer.precompute_ref_logps = False
    trainer.aux_loss_enabled = False
    trainer._metrics = {"train": defaultdict(list)}
    trainer._total_train_tokens, trainer._tp_size = 0, 1
    trainer.accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda value: value, gather_for_metrics=lambda value: value
    )
    mask = _completion_mask(lengths)
    trainer.model = _GivenLogps(_padded(policy, mask), None if log_squares is None else _padded(log_squares, mask))
    trainer.ref_model = _GivenLogps(_padded(reference, mask))
    inputs = {"input_ids": mask, "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    with _default_dtype(policy.dtype):  # TRL turns epsilon of EXO into a tensor of the default dtype
        loss = trainer._compute_loss(trainer.model, inputs, return_outputs=False)
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}


def _completion_mask(lengths: Sequence[int]) -> Tensor:
    """TRL's `[2B, T]`: all chosen completions, then all rejected ones, each after a prompt."""
    mask = torch.zeros(len(lengths), PROMPT_LENGTH + max(lengths), dtype=torch.long)
    for row, length in enumerate([*lengths[0::2], *lengths[1::2]]):
        mask[row, PROMPT_LENGTH : PROMPT_LENGTH + length] = 1
    return mask


def _padded(flat: Tensor, mask: Tensor) -> Tensor:
    """Put the flat row into TRL's rows; position t predicts token t + 1."""
    lengths = mask.sum(dim=1).tolist()
    pairs = len(lengths) // 2
    interleaved = [lengths[row] for pair in range(pairs) for row in (pair, pairs + pair)]
    completions = flat.split(interleaved)
    width = mask.shape[1] - 1
    rows = [
        torch.cat([flat.new_zeros(PROMPT_LENGTH - 1), row, flat.new_zeros(width - PROMPT_LENGTH + 1 - len(row))])
        for row in [*completions[0::2], *completions[1::2]]
    ]
    return torch.stack(rows)


class _GivenLogps(torch.nn.Module):
    """Answers every forward with the same log-probs."""

    is_gradient_checkpointing = False

    def __init__(self, log_probs: Tensor, log_squares: Tensor | None = None) -> None:
        super().__init__()
        zeros = torch.zeros_like(log_probs)
        self.outputs = SimpleNamespace(
            log_probs=log_probs,
            log_sum_sq_probs=log_squares,
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
        )

    def forward(self, **inputs: Any) -> SimpleNamespace:
        return self.outputs


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
