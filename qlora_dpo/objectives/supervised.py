"""Supervised fine-tuning: the cross-entropy of the tokens that are learned, each of which counts the same."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SupervisedObjective:
    """The mean NLL over the supervised tokens of an optimizer step. It has no settings and no state."""

    @property
    def has_reference(self) -> bool:
        """It compares with nothing."""
        return False

    def __call__(self, per_token_logps: Tensor, tokens_of_step: int) -> Tensor:
        """Return the share of some tokens `[N]` in the loss of a step that has `tokens_of_step` of them."""
        return -per_token_logps.sum() / tokens_of_step


def token_metrics(per_token_logps: Tensor, is_likeliest: Tensor) -> dict[str, Tensor]:
    """Return each logged value token by token, detached, `[N]` each; exp of the mean loss is the perplexity."""
    return {"loss": -per_token_logps.detach(), "mean_token_accuracy": is_likeliest}
