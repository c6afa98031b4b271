"""An objective: the losses that a run minimizes, their weights and settings, checked when it is made."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial

import torch
from torch import Tensor

from qlora_dpo.errors import UsageError
from qlora_dpo.objectives.divergences import F_DIVERGENCES
from qlora_dpo.objectives.losses import LOSSES, LossInputs, LossSettings, PreferenceLoss
from qlora_dpo.objectives.pairs import PairStatistics, length_tensors, pair_logps, wpo_weights

DISCOPOP_TAU = 0.05  # the paper's value
F_ALPHA_DIVERGENCE_COEF = 0.5
SIMPO_GAMMA, CPO_ALPHA = 0.5, 1.0  # TRL's


@dataclass(frozen=True)
class Objective:
    """A weighted sum of losses. It has no state: resuming a run needs nothing from it."""

    terms: tuple[tuple[PreferenceLoss, float], ...]
    settings: LossSettings
    divergence: Callable[[Tensor], Tensor]
    ld_alpha: float | None
    use_weighting: bool
    """WPO: the loop must then pass `per_token_log_squares`."""
    confidence_as: str = "weight"
    """weight: confidence multiplies a pair's loss; label_smoothing: 1 - confidence is its share of flipped labels."""

    @property
    def names(self) -> list[str]:
        """The losses by their names in the table."""
        return [name for term, _ in self.terms for name, loss in LOSSES.items() if loss is term]

    @property
    def beta(self) -> float:
        return self.settings.beta

    @property
    def couples_pairs(self) -> bool:
        """Whether a group of pairs must stay in one micro-batch, and weights per pair make no sense."""
        return any(loss.couples_pairs for loss, _ in self.terms)

    @property
    def has_reference(self) -> bool:
        """Whether its losses compare the policy with a reference."""
        return not any(loss.reference_free for loss, _ in self.terms)

    @property
    def averages_rewards(self) -> bool:
        """Whether the reward that a reference-free loss compares is a mean over tokens."""
        return any(loss.reference_free and loss.length_averaged for loss, _ in self.terms)

    @property
    def needs_token_normalizer(self) -> bool:
        """Whether `mean_chosen_length` must be counted for each optimizer step."""
        return any(loss.needs_token_normalizer for loss, _ in self.terms)

    def statistics(
        self,
        policy_per_token_logps: Tensor,
        reference_per_token_logps: Tensor,
        lengths: Sequence[int],
        *,
        per_token_log_squares: Tensor | None = None,
        confidence: Sequence[float] | None = None,
        mean_chosen_length: float | None = None,
    ) -> PairStatistics:
        """Gather what this objective reads about the B pairs of a micro-batch.

        The three `per_token` rows `[N]` run over all completion tokens in the order of `lengths`: chosen_0,
        rejected_0, chosen_1, ... `confidence`, B numbers in (0, 1], acts on each pair as `confidence_as` says.
        `mean_chosen_length` is counted over the whole optimizer step. The reference of a reference-free objective is 0.

        Raises: ValueError where a needed argument is missing; UsageError for confidence with coupled pairs.
        """
        policy = pair_logps(policy_per_token_logps, lengths, self.ld_alpha)
        reference = pair_logps(reference_per_token_logps, lengths, self.ld_alpha)
        is_scaled = self.ld_alpha is not None
        unscaled = pair_logps(policy_per_token_logps, lengths) if is_scaled else policy
        unscaled_reference = pair_logps(reference_per_token_logps, lengths) if is_scaled else reference
        is_weight = self.confidence_as == "weight"
        weights = self._confidence_weights(confidence, like=policy.chosen) if is_weight else None
        smoothing = None if is_weight else _confidence_smoothing(confidence, like=policy.chosen)
        if self.use_weighting:
            if per_token_log_squares is None:
                raise ValueError("WPO weighting needs per_token_log_squares")
            wpo = wpo_weights(policy_per_token_logps, per_token_log_squares, lengths)
            weights = wpo if weights is None else wpo * weights
        chosen_lengths, rejected_lengths = length_tensors(lengths, like=policy.chosen)
        return PairStatistics(
            policy=policy,
            reference=reference,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            unscaled=unscaled,
            unscaled_reference=unscaled_reference,
            weights=weights,
            label_smoothing=smoothing,
            mean_chosen_length=mean_chosen_length,
        )

    def __call__(self, pairs: PairStatistics) -> Tensor:
        """Return the loss of each pair, `[B]`; the loss of an optimizer step is the mean over its pairs."""
        losses = torch.zeros_like(pairs.policy.chosen)
        for loss, weight in self.terms:
            inputs, settings = self._inputs(pairs, loss.length_averaged), self._settings(pairs, loss)
            losses = losses + weight * loss.function(inputs, settings)
        return losses if pairs.weights is None else losses * pairs.weights

    def with_term(self, name: str, weight: float) -> "Objective":
        """Return this objective with one more loss of the table added to it."""
        return replace(self, terms=(*self.terms, (LOSSES[name], weight)))

    def at_reference(self, pairs: PairStatistics) -> Tensor:
        """Return the losses of a policy equal to the reference, `[B]`: what a fresh adapter must show."""
        return self(replace(pairs, policy=pairs.reference))

    def _confidence_weights(self, confidence: Sequence[float] | None, like: Tensor) -> Tensor | None:
        if confidence is None or all(value == 1 for value in confidence):
            return None
        if self.couples_pairs:
            raise UsageError(
                "Some pairs have a confidence below 1, but aot and aot_unpaired sort the pairs of a group: "
                "no loss belongs to one pair. Use another loss_type, or remove confidence from the data."
            )
        return torch.tensor(confidence, dtype=like.dtype, device=like.device)

    def _settings(self, pairs: PairStatistics, loss: PreferenceLoss) -> LossSettings:
        """The settings of the run, with each pair's own smoothing where that is the larger one."""
        if pairs.label_smoothing is None:
            return self.settings
        smoothing = pairs.label_smoothing.clamp(max=loss.most_smoothing).clamp(min=self.settings.label_smoothing)
        return replace(self.settings, label_smoothing=smoothing)

    def _inputs(self, pairs: PairStatistics, length_averaged: bool) -> LossInputs:
        chosen = self.beta * self.divergence(pairs.policy.chosen - pairs.reference.chosen)
        rejected = self.beta * self.divergence(pairs.policy.rejected - pairs.reference.rejected)
        if length_averaged:
            chosen, rejected = chosen / pairs.chosen_lengths, rejected / pairs.rejected_lengths
        return LossInputs(chosen_rewards=chosen, rejected_rewards=rejected, pairs=pairs)


def _confidence_smoothing(confidence: Sequence[float] | None, like: Tensor) -> Tensor:
    # Also where all are 1: a pair's loss must not depend on the pairs beside it, not even by a rounding
    if confidence is None:
        return torch.zeros_like(like)
    return 1 - torch.tensor(confidence, dtype=like.dtype, device=like.device)


def make_objective(
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = F_ALPHA_DIVERGENCE_COEF,
    discopop_tau: float = DISCOPOP_TAU,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
    confidence_as: str = "weight",
    simpo_gamma: float = SIMPO_GAMMA,
    cpo_alpha: float = CPO_ALPHA,
) -> Objective:
    """Build the objective that these options name; names and meanings are those of TRL's DPOConfig and CPOConfig.

    `confidence_as`, weight or label_smoothing, is this tool's own: what a pair's confidence below 1 does.

    Raises: UsageError for an unknown name, a value out of range, or an option that no chosen loss would read.
    """
    loss_type = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    _check_names("loss_type", loss_type, LOSSES)
    _check_names("f_divergence_type", [f_divergence_type], F_DIVERGENCES)
    weights = [1.0] * len(loss_type) if loss_weights is None else list(loss_weights)
    _check_weights(loss_type, weights)
    _require(
        math.isfinite(beta) and beta > 0,
        f"beta is {beta}: it divides and scales rewards. Use a number above 0.",
    )
    _require(
        math.isfinite(discopop_tau) and discopop_tau > 0,
        f"discopop_tau is {discopop_tau}: margins are divided by it. Use a number above 0.",
    )
    _require(
        ld_alpha is None or 0 <= ld_alpha <= 1,
        f"ld_alpha is {ld_alpha}: tokens beyond the shorter completion count that much. Use 0 to 1.",
    )
    _check_label_smoothing(loss_type, label_smoothing)
    _check_divergence(loss_type, f_divergence_type, f_alpha_divergence_coef)
    _check_combination(loss_type, discopop_tau, use_weighting)
    _check_reference_free(loss_type, ld_alpha, simpo_gamma, cpo_alpha)
    _check_confidence_as(loss_type, confidence_as)
    return Objective(
        terms=tuple((LOSSES[name], weight) for name, weight in zip(loss_type, weights, strict=True)),
        settings=LossSettings(beta, label_smoothing, discopop_tau, simpo_gamma, cpo_alpha),
        divergence=partial(F_DIVERGENCES[f_divergence_type], f_alpha_divergence_coef),
        ld_alpha=ld_alpha,
        use_weighting=use_weighting,
        confidence_as=confidence_as,
    )


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UsageError(message)


def _names(holds: Callable[[PreferenceLoss], bool]) -> list[str]:
    return [name for name, loss in LOSSES.items() if holds(loss)]


def _check_names(option: str, names: Sequence[str], known: Iterable[str]) -> None:
    _require(
        len(names) > 0,
        f"{option} is empty: a run needs something to minimize. Use one of {', '.join(known)}.",
    )
    for name in names:
        nearest = get_close_matches(name, known, n=1)
        advice = f"Did you mean {nearest[0]!r}? " if nearest else ""
        _require(name in known, f"{option} {name!r} is unknown. {advice}Use one of {', '.join(known)}.")


def _check_weights(loss_type: Sequence[str], weights: Sequence[float]) -> None:
    _require(
        len(weights) == len(loss_type),
        f"loss_weights has {len(weights)} numbers for {len(loss_type)} losses ({', '.join(loss_type)}): "
        "each loss needs its own. Give as many weights as loss types, or none to weigh each 1.",
    )
    for name, weight in zip(loss_type, weights, strict=True):
        _require(
            math.isfinite(weight) and weight > 0,
            f"loss_weights has {weight} for {name}: that would ignore or maximize it. Use a number above 0.",
        )


def _check_label_smoothing(loss_type: Sequence[str], label_smoothing: float) -> None:
    readers = _names(lambda loss: loss.smooths_labels)
    _require(
        0 <= label_smoothing < 0.5,
        f"label_smoothing is {label_smoothing}: it is the share of flipped labels, and from 0.5 on the "
        "rejected completion would be preferred. Use a number from 0 to below 0.5.",
    )
    _require(
        label_smoothing > 0 or "exo_pair" not in loss_type,
        "label_smoothing is 0, but exo_pair takes its logarithm. Set it above 0; the EXO paper uses 0.001.",
    )
    _require(
        label_smoothing == 0 or not set(readers).isdisjoint(loss_type),
        f"label_smoothing is {label_smoothing}, but {', '.join(loss_type)} would ignore it. "
        f"Leave it at 0, or use one of {', '.join(readers)}.",
    )


def _check_divergence(loss_type: Sequence[str], f_divergence_type: str, alpha: float) -> None:
    refused = [name for name in loss_type if not LOSSES[name].supports_f_divergence]
    _require(
        f_divergence_type == "reverse_kl" or not refused,
        f"f_divergence_type {f_divergence_type!r} does not work with {', '.join(refused)}: "
        "its rewards are known only up to a constant per prompt, which cancels only in margins. "
        f"Use reverse_kl, or losses among {', '.join(_names(lambda loss: loss.supports_f_divergence))}.",
    )
    _require(
        f_divergence_type == "alpha_divergence" or alpha == F_ALPHA_DIVERGENCE_COEF,
        f"f_alpha_divergence_coef is {alpha}, but f_divergence_type {f_divergence_type!r} would ignore it. "
        "Leave it out, or use f_divergence_type alpha_divergence.",
    )
    _require(math.isfinite(alpha), f"f_alpha_divergence_coef is {alpha}: it is an exponent. Use a finite number.")


def _check_combination(loss_type: Sequence[str], discopop_tau: float, use_weighting: bool) -> None:
    coupled = [name for name in loss_type if LOSSES[name].couples_pairs]
    _require(
        not (use_weighting and coupled),
        f"use_weighting does not work with {', '.join(coupled)}: they sort the pairs of a group, so the "
        "weight of a pair would reach the loss of another. Turn use_weighting off, or use another loss_type.",
    )
    _require(
        discopop_tau == DISCOPOP_TAU or "discopop" in loss_type,
        f"discopop_tau is {discopop_tau}, but {', '.join(loss_type)} would ignore it. Leave it out, or use discopop.",
    )


def _check_reference_free(
    loss_type: Sequence[str], ld_alpha: float | None, simpo_gamma: float, cpo_alpha: float
) -> None:
    free = [name for name in loss_type if LOSSES[name].reference_free]
    others = [name for name in loss_type if name not in (*free, "sft")]
    _require(
        not (free and others) and len(free) < 2,
        f"loss_type {' '.join(loss_type)}: the reward of {', '.join(free)} is made without a reference, and that of "
        f"{', '.join(others) or 'each'} otherwise, so beta means another thing in each. Use one of them, with sft or "
        "alone.",
    )
    _require(
        ld_alpha is None or not free,
        f"ld_alpha is {ld_alpha}, but it is defined for DPO's log-ratios only, and {', '.join(free)} has none. "
        "Leave it out.",
    )
    for option, value, default, reader in (
        ("simpo_gamma", simpo_gamma, SIMPO_GAMMA, "simpo"),
        ("cpo_alpha", cpo_alpha, CPO_ALPHA, "cpo"),
    ):
        _require(math.isfinite(value) and value >= 0, f"{option} is {value}. Use a number from 0 on.")
        _require(
            value == default or reader in loss_type,
            f"{option} is {value}, but {', '.join(loss_type)} would ignore it. Leave it out, or use {reader}.",
        )


def _check_confidence_as(loss_type: Sequence[str], confidence_as: str) -> None:
    _check_names("confidence_as", [confidence_as], ("weight", "label_smoothing"))
    able = _names(lambda loss: loss.smooths_labels and not loss.couples_pairs)
    # The sft term learns the chosen answer alone: no label of it can be flipped.
    unable = [name for name in loss_type if name not in (*able, "sft")] or ([] if set(able) & {*loss_type} else ["sft"])
    _require(
        confidence_as == "weight" or not unable,
        f"confidence_as label_smoothing does not work with {', '.join(unable)}: no smoothing of one pair's label is "
        f"defined there. Use confidence_as weight, or losses among {', '.join(able)}.",
    )
