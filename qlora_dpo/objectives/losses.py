"""The preference losses as rows of one table: each a pure function from rewards to one loss per pair.

The implicit reward of a completion is beta * log(pi / pi_ref), or beta * f'(pi / pi_ref) under another
f-divergence; the margin m is the chosen reward r_w minus the rejected reward r_l. A reference-free loss is given
log pi_ref = 0, so that a reward is beta * log pi. Every function returns `[B]`: the loss of a step is the mean over its
pairs, however the step was cut into micro-batches.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from qlora_dpo.objectives.pairs import PairStatistics


@dataclass(frozen=True)
class LossSettings:
    """The numbers that shape a loss."""

    beta: float
    label_smoothing: float | Tensor
    """One share of flipped labels for all pairs, or `[B]`."""
    discopop_tau: float
    simpo_gamma: float
    cpo_alpha: float


@dataclass(frozen=True)
class LossInputs:
    """Implicit rewards of B pairs, `[B]` each, and the statistics that they were made from."""

    chosen_rewards: Tensor
    rejected_rewards: Tensor
    pairs: PairStatistics

    @property
    def margins(self) -> Tensor:
        return self.chosen_rewards - self.rejected_rewards


def sigmoid_loss(inputs: LossInputs, settings: LossSettings) -> Tensor:
    """DPO (arXiv 2305.18290, eq. 7); with label smoothing, cDPO (ericmitchell.ai/cdpo.pdf, eq. 3)."""
    return _smoothed(inputs.margins, settings.label_smoothing)


def hinge_loss(inputs: LossInputs, settings: LossSettings) -> Tensor:
    """SLiC's hinge (arXiv 2305.10425) on the margin, as in RSO (arXiv 2309.06657): max(0, 1 - m)."""
    return relu(1 - inputs.margins)


def ipo_loss(inputs: LossInputs, settings: LossSettings) -> Tensor:
    """IPO (arXiv 2310.12036, eq. 17): (h - 1 / (2 tau))^2 with tau = beta and h averaged over tokens."""
    return (inputs.margins / settings.beta - 1 / (2 * settings.beta)) ** 2


def exo_pair_loss(inputs: LossInputs, settings: LossSettings) -> Tensor:
    """EXO-pref (arXiv 2402.00856, eq. 16) with K = 2: KL of (sigma(m), sigma(-m)) from (1 - eps, eps)."""
    margins = inputs.margins
    log_right, log_flipped = _log_shares(settings.label_smoothing)
    chosen = torch.sigmoid(margins) * (logsigmoid(margins) - log_right)
    rejected = torch.sigmoid(-margins) * (logsigmoid(-margins) - log_flipped)
    return chosen + rejected


def nca_pair_loss(inputs: LossInputs, settings: LossSettings) -> Tensor:
    """NCA for K = 2 (arXiv 2402.05369): -log sigma(r_w) - (log sigma(-r_w) + log sigma(-r_l)) / 2."""
    chosen, rejected = inputs.chosen_rewards, inputs.rejected_rewards
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def robust_loss(inputs: LossInputs, settings: LossSettings) -> Tensor:
    """Robust DPO (arXiv 2403.00409): the DPO loss, unbiased under a share of flipped labels."""
    margins, flipped = inputs.margins, settings.label_smoothing
    return (-(1 - flipped) * logsigmoid(margins) + flipped * logsigmoid(-margins)) / (1 - 2 * flipped)


def bco_pair_loss(inputs: LossInputs, settings: LossSettings) -> Tensor:
    """BCO (arXiv 2404.04656) on pairs, without its reward shift: -log sigma(r_w) - log sigma(-r_l)."""
    return -logsigmoid(inputs.chosen_rewards) - logsigmoid(-inputs.rejected_rewards)


def sppo_hard_loss(inputs: LossInputs, settings: LossSettings) -> Tensor:
    """SPPO (arXiv 2405.00675, eq. 4.7) for a certain preference: log-ratios pulled to +-1 / (2 beta)."""
    chosen, rejected = inputs.chosen_rewards / settings.beta, inputs.rejected_rewards / settings.beta
    return (chosen - 0.5 / settings.beta) ** 2 + (rejected + 0.5 / settings.beta) ** 2


def aot_loss(inputs: LossInputs, settings: LossSettings) -> Tensor:
    """AOT, paired (arXiv 2406.05882): sorted log(chosen / rejected) of the policy against the reference's."""
    policy, reference = inputs.pairs.policy, inputs.pairs.reference
    quantiles = torch.sort(policy.chosen - policy.rejected).values
    reference_quantiles = torch.sort(reference.chosen - reference.rejected).values
    return _smoothed(settings.beta * (quantiles - reference_quantiles), settings.label_smoothing)


def aot_unpaired_loss(inputs: LossInputs, settings: LossSettings) -> Tensor:
    """AOT, unpaired (arXiv 2406.05882): the sorted chosen rewards against the sorted rejected rewards."""
    quantile_margins = torch.sort(inputs.chosen_rewards).values - torch.sort(inputs.rejected_rewards).values
    return _smoothed(quantile_margins, settings.label_smoothing)


def apo_zero_loss(inputs: LossInputs, settings: LossSettings) -> Tensor:
    """APO-zero (arXiv 2408.06266, eq. 7): chosen up, rejected down; 1 - sigma(r_w) + sigma(r_l)."""
    return torch.sigmoid(-inputs.chosen_rewards) + torch.sigmoid(inputs.rejected_rewards)


def apo_down_loss(inputs: LossInputs, settings: LossSettings) -> Tensor:
    """APO-down (arXiv 2408.06266, eq. 8): both down, rejected more; sigma(r_w) + 1 - sigma(r_w - r_l)."""
    return torch.sigmoid(inputs.chosen_rewards) + torch.sigmoid(-inputs.margins)


def discopop_loss(inputs: LossInputs, settings: LossSettings) -> Tensor:
    """DiscoPOP (arXiv 2406.08414, eq. 5): logistic and exponential loss blended by sigma(m / tau)."""
    margins = inputs.margins
    exponential_share = torch.sigmoid(margins / settings.discopop_tau)
    return -logsigmoid(margins) * (1 - exponential_share) + torch.exp(-margins) * exponential_share


def sft_loss(inputs: LossInputs, settings: LossSettings) -> Tensor:
    """The NLL term of RPO (arXiv 2404.19733) and MPO (arXiv 2411.10442), per chosen token of the whole step.

    The mean of these `[B]` over the pairs of a step is the step's summed NLL divided by its chosen tokens.

    Raises: ValueError without `mean_chosen_length`.
    """
    if inputs.pairs.mean_chosen_length is None:
        raise ValueError("the sft loss needs mean_chosen_length: chosen tokens of the step divided by its pairs")
    return -inputs.pairs.unscaled.chosen / inputs.pairs.mean_chosen_length


def simpo_loss(inputs: LossInputs, settings: LossSettings) -> Tensor:
    """SimPO (arXiv 2405.14734, eq. 6): -log sigma(r_w - r_l - gamma) with r = beta * log pi averaged over tokens."""
    return _smoothed(inputs.margins - settings.simpo_gamma, settings.label_smoothing)


def orpo_loss(inputs: LossInputs, settings: LossSettings) -> Tensor:
    """ORPO (arXiv 2403.07691, eq. 6 and 7): NLL - lambda * log sigma(log odds_w - log odds_l) with lambda = beta.

    odds = p / (1 - p) with log p averaged over tokens (eq. 1 and 4); the NLL is that of `sft_loss`.
    """
    log_odds = _log_odds(inputs.chosen_rewards / settings.beta) - _log_odds(inputs.rejected_rewards / settings.beta)
    return sft_loss(inputs, settings) - settings.beta * logsigmoid(log_odds)


def cpo_loss(inputs: LossInputs, settings: LossSettings) -> Tensor:
    """CPO (arXiv 2401.08417): -log sigma(r_w - r_l) with r = beta * log pi, plus cpo_alpha times `sft_loss`."""
    return _smoothed(inputs.margins, settings.label_smoothing) + settings.cpo_alpha * sft_loss(inputs, settings)


def _log_odds(logps: Tensor) -> Tensor:
    # A probability that rounds to 1 has infinite odds, whose gradient would be NaN
    logps = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    return logps - torch.log(-torch.expm1(logps))


def _smoothed(margins: Tensor, label_smoothing: float | Tensor) -> Tensor:
    return -(1 - label_smoothing) * logsigmoid(margins) - label_smoothing * logsigmoid(-margins)


def _log_shares(flipped: float | Tensor) -> tuple[float | Tensor, float | Tensor]:
    """Logarithms of the share of right labels and of the share of flipped ones."""
    if isinstance(flipped, Tensor):
        return torch.log1p(-flipped), torch.log(flipped)
    return math.log1p(-flipped), math.log(flipped)


@dataclass(frozen=True)
class PreferenceLoss:
    """One row of the table: a loss and what it asks of the loop that calls it."""

    function: Callable[[LossInputs, LossSettings], Tensor]
    length_averaged: bool = False
    """Rewards are divided by the completion's length first."""
    supports_f_divergence: bool = True
    """False where single rewards are read: their unknown constant per prompt cancels only in margins."""
    couples_pairs: bool = False
    """Sorts a group of pairs: it must stay in one micro-batch, and no loss belongs to a single pair."""
    smooths_labels: bool = False
    """Reads `label_smoothing`."""
    most_smoothing: float = 0.5
    """Where the smoothing of a pair ends that its confidence asks for."""
    needs_token_normalizer: bool = False
    """Reads `mean_chosen_length`."""
    reference_free: bool = False
    """Its rewards are the policy's alone, so that no reference is computed."""


LOSSES: dict[str, PreferenceLoss] = {
    "sigmoid": PreferenceLoss(sigmoid_loss, smooths_labels=True),
    # Length-normalized DPO, arXiv 2411.15124, eq. 6
    "sigmoid_norm": PreferenceLoss(sigmoid_loss, smooths_labels=True, length_averaged=True),
    "hinge": PreferenceLoss(hinge_loss),
    # The paper has no lengths; its authors confirmed to TRL that their results used means over tokens
    "ipo": PreferenceLoss(ipo_loss, length_averaged=True),
    "exo_pair": PreferenceLoss(exo_pair_loss, smooths_labels=True),
    "nca_pair": PreferenceLoss(nca_pair_loss, supports_f_divergence=False),
    # It divides by 1 - 2 epsilon: at 0.4 a pair counts five times, at 0.5 its loss would be infinite
    "robust": PreferenceLoss(robust_loss, smooths_labels=True, most_smoothing=0.4),
    "bco_pair": PreferenceLoss(bco_pair_loss, supports_f_divergence=False),
    "sppo_hard": PreferenceLoss(sppo_hard_loss, supports_f_divergence=False),
    "aot": PreferenceLoss(aot_loss, supports_f_divergence=False, couples_pairs=True, smooths_labels=True),
    "aot_unpaired": PreferenceLoss(
        aot_unpaired_loss, supports_f_divergence=False, couples_pairs=True, smooths_labels=True
    ),
    "apo_zero": PreferenceLoss(apo_zero_loss, supports_f_divergence=False),
    "apo_down": PreferenceLoss(apo_down_loss, supports_f_divergence=False),
    "discopop": PreferenceLoss(discopop_loss),
    "sft": PreferenceLoss(sft_loss, needs_token_normalizer=True),
    "simpo": PreferenceLoss(
        simpo_loss, supports_f_divergence=False, smooths_labels=True, length_averaged=True, reference_free=True
    ),
    "orpo": PreferenceLoss(
        orpo_loss, supports_f_divergence=False, length_averaged=True, needs_token_normalizer=True, reference_free=True
    ),
    "cpo": PreferenceLoss(
        cpo_loss, supports_f_divergence=False, smooths_labels=True, needs_token_normalizer=True, reference_free=True
    ),
}
