"""From one flat row of token log-probs to what a preference loss reads about each pair.

A micro-batch holds the completions in the order chosen_0, rejected_0, chosen_1, rejected_1, ...; `lengths`
has the tokens of each in that order, and N is their sum. B pairs have 2B completions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairLogps:
    """Log-probs of whole completions, `[B]` each."""

    chosen: Tensor
    rejected: Tensor


@dataclass(frozen=True)
class PairStatistics:
    """Everything the losses and metrics read about B pairs; each tensor is `[B]`."""

    policy: PairLogps
    reference: PairLogps
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    unscaled: PairLogps
    """Of the policy, summed over all tokens with the same weight, whatever the loss."""
    unscaled_reference: PairLogps
    """The same of the reference."""
    weights: Tensor | None = None
    """What each pair's loss is multiplied by; None where every pair counts once."""
    label_smoothing: Tensor | None = None
    """The share of flipped labels that each pair's confidence stands for; None where it is no matter of labels."""
    mean_chosen_length: float | None = None
    """Chosen tokens of the whole optimizer step divided by its pairs; only the `sft` term needs it."""

    @property
    def shift_per_token(self) -> PairLogps:
        """Log-prob of each completion under the policy minus that under the reference, per token."""
        return PairLogps(
            (self.unscaled.chosen - self.unscaled_reference.chosen) / self.chosen_lengths,
            (self.unscaled.rejected - self.unscaled_reference.rejected) / self.rejected_lengths,
        )


def pair_logps(per_token_logps: Tensor, lengths: Sequence[int], ld_alpha: float | None = None) -> PairLogps:
    """Sum each completion of `per_token_logps [N]`; a pair's sums do not depend on its neighbors in the row.

    With `ld_alpha`, tokens beyond the pair's shorter completion count that much (LD-DPO, arXiv 2409.06411).

    Raises: ValueError where `lengths` is odd in number or does not add up to N.
    """
    if len(lengths) % 2 or sum(lengths) != len(per_token_logps):
        raise ValueError(f"{len(lengths)} lengths of {sum(lengths)} tokens do not pair {len(per_token_logps)} logps")
    if ld_alpha is None:
        # One sum per completion: a padded or scattered sum would round differently with the pairs beside it
        sums = [tokens.sum() for tokens in torch.split(per_token_logps, list(lengths))]
    else:
        shared = [min(pair) for pair in zip(lengths[0::2], lengths[1::2], strict=True) for _ in pair]
        completions = zip(torch.split(per_token_logps, list(lengths)), shared, strict=True)
        sums = [tokens[:size].sum() + ld_alpha * tokens[size:].sum() for tokens, size in completions]
    logps = torch.stack(sums) if sums else per_token_logps
    return PairLogps(chosen=logps[0::2], rejected=logps[1::2])


def wpo_weights(per_token_logps: Tensor, log_squares: Tensor, lengths: Sequence[int]) -> Tensor:
    """Weigh each pair by how likely the policy itself would write it, without gradient: `[B]`.

    `log_squares [N]` is log(sum_v p_v^2) at each token. A completion weighs the geometric mean over its
    tokens of p(token) / sum_v p_v^2, a pair the product of its two (WPO, arXiv 2406.11827, eq. 2).
    """
    aligned = pair_logps(per_token_logps.detach() - log_squares, lengths)
    chosen_lengths, rejected_lengths = length_tensors(lengths, like=aligned.chosen)
    return torch.exp(aligned.chosen / chosen_lengths + aligned.rejected / rejected_lengths)


def length_tensors(lengths: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the chosen and the rejected lengths, `[B]` each, at least 1 so that means over tokens exist."""
    counts = torch.tensor(lengths, dtype=like.dtype, device=like.device).clamp(min=1)
    return counts[0::2], counts[1::2]
