"""What a merged model is held against: the adapter on its base as it was trained, run once and then freed.

Next to it stand two scales without which a difference means nothing: how far the adapter is from its reference (what
training changed), and how far it is from itself in batches of another shape (rounding).
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from qlora_dpo.data.conversation_tokens import TokenizedConversation
from qlora_dpo.data.packing import Sample, prompt_and_completions
from qlora_dpo.data.tokenization import PairTokenizer
from qlora_dpo.models.generation import complete
from qlora_dpo.models.lora import add_frozen_reference, check_adapter_folder, load_adapter, reference_active
from qlora_dpo.objectives.pairs import pair_logps
from qlora_dpo.release.artefact import Artefact, tokenizer_of
from qlora_dpo.release.fidelity.distributions import Compared, Floats, Recorded
from qlora_dpo.release.fidelity.held_out import HeldOut, read_held_out
from qlora_dpo.training.trained_on import load_base_as_trained

ANSWERS = 16  # prompts to which the adapter's own answers are measured too
LONGEST_ANSWER = 128
AGAIN = 32  # completions that are run a second time, one by one

# A difference is told from rounding where the limits on what a merge may lose (a fifth of what training changed, a
# twentieth of the margin) are at least twice and once the rounding.
OVER_NOISE_KL, OVER_NOISE_MARGIN = 10, 20
SMALLEST_KL, SMALLEST_MARGIN = 1e-7, 1e-6


@dataclass(frozen=True)
class Yardstick:
    """The trained adapter's predictions on held-out completions, and the scales to judge differences by."""

    source: str
    recorded: Recorded
    pairs: int
    """The first 2 * pairs completions are chosen and rejected answers."""
    answers: int
    """The last so many completions are the adapter's own."""
    beta: float
    reference: Compared
    """The model that training started from."""
    again: Compared
    """The adapter once more, on the first completions, one by one."""

    @property
    def scale(self) -> float:
        """KL(trained || reference) per token: what training changed."""
        return self.reference.kl_mean

    @property
    def noise(self) -> float:
        """KL of the trained adapter from itself per token: rounding."""
        return self.again.kl_mean

    @property
    def margins(self) -> Floats:
        """Implicit margins of the pairs under the trained adapter [pairs]."""
        return self.margins_of(self.recorded.logps)

    def margins_of(self, logps: Floats) -> Floats:
        """beta times how much likelier chosen became than rejected, against the reference, by pair."""
        lengths = self.recorded.lengths[: 2 * self.pairs]
        size = min(len(logps), sum(lengths))
        lengths = lengths[: 2 * (int(np.searchsorted(np.cumsum(lengths), size, "right")) // 2)]
        shifts = (logps - self.reference.logps[: len(logps)])[: sum(lengths)]
        sums = pair_logps(torch.from_numpy(shifts), lengths)
        return np.asarray(self.beta * (sums.chosen - sums.rejected), np.float64)

    @property
    def margin_noise(self) -> float:
        """How far rounding moves the mean margin."""
        again = self.margins_of(self.again.logps)
        spread = float(np.sqrt(np.mean((again - self.margins[: len(again)]) ** 2))) if len(again) else 0.0
        return spread / float(np.sqrt(max(self.pairs, 1)))

    @property
    def tells_kl(self) -> bool:
        """Whether what training changed stands out from rounding."""
        return self.scale > max(SMALLEST_KL, OVER_NOISE_KL * self.noise)

    @property
    def tells_margin(self) -> bool:
        """Whether the adapter's margin stands out from rounding."""
        return bool(self.pairs) and abs(self.margins.mean()) > max(
            SMALLEST_MARGIN, OVER_NOISE_MARGIN * self.margin_noise
        )

    def notes(self) -> list[str]:
        """What the reader of the numbers has to know."""
        notes = []
        if self.scale <= SMALLEST_KL:
            notes.append(
                "The adapter changes nothing on these tokens: it is untrained, or its updates are 0. There is nothing "
                "that a merge could lose, so none is refused for that."
            )
        elif not self.tells_kl:
            notes.append(
                f"The adapter is {self.scale:.2g} of KL per token from its base, and rounding alone is "
                f"{self.noise:.2g}: it changes too little here (below {OVER_NOISE_KL} times rounding) to say what "
                "share of it a merge keeps, so no merge is refused for that."
            )
        if self.pairs and not self.tells_margin:
            notes.append(
                f"The adapter's mean margin on these pairs is {self.margins.mean():.2g}, and rounding alone moves it "
                f"by {self.margin_noise:.2g}: too little to say what share of it a merge keeps."
            )
        elif self.pairs and self.margins.mean() < 0:
            notes.append(
                f"The adapter prefers the rejected answers of these pairs (mean margin {self.margins.mean():.3g})."
            )
        return notes

    def facts(self) -> dict[str, Any]:
        """What was measured, and the scales, as one flat object."""
        return {
            "source": self.source,
            "pairs": self.pairs,
            "own_answers": self.answers,
            "tokens": len(self.recorded.logps),
            "kl_positions": self.recorded.kept,
            "scale_kl_mean": self.scale,
            "scale_kl_p99": self.reference.kl_p99,
            "noise_kl_mean": self.noise,
            "noise_kl_p99": self.again.kl_p99,
            "noise_max_logp_difference": float(np.abs(self.again.logps - self._first(self.again)).max()),
            **(self._of_pairs() if self.pairs else {}),
            "notes": self.notes(),
        }

    def _of_pairs(self) -> dict[str, float]:
        return {
            "beta": self.beta,
            "margin": float(self.margins.mean()),
            "margin_noise": self.margin_noise,
            "reward_accuracy": float((self.margins > 0).mean()),
        }

    def _first(self, compared: Compared) -> Floats:
        return self.recorded.logps[: len(compared.logps)]


@contextmanager
def open_yardstick(
    artefact: Artefact, *, dataset: str | None, max_pairs: int, device: torch.device, folder: Path
) -> Iterator[Yardstick]:
    """Run the trained adapter and its reference on held-out samples; no model is left in memory.

    Until the block ends the distributions are kept in `folder`, in a file without a name: a kill leaves nothing there.

    Raises:
        UsageError: nothing was held out, and no dataset is named.
        DataError, ModelError, StorageError, ResourceError: data or model cannot be read, or do not fit.
        OSError: the disk refuses.
    """
    tokenizer = tokenizer_of(artefact)
    held_out = read_held_out(artefact, tokenizer, dataset, max_pairs)
    with tempfile.TemporaryFile(dir=folder) as file:
        yardstick = _measured(artefact, tokenizer, held_out, device, file, folder)
        free_memory()
        yield yardstick


def free_memory() -> None:
    """Give back what a model that nothing names any more held."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where there is no GPU


def load_as_trained(artefact: Artefact, device: torch.device) -> Any:
    """The adapter on its base, held as in training, with a frozen second adapter where its reference was one."""
    model = load_adapter(load_base_as_trained(artefact.origin, device), artefact.adapter, trainable=False)
    settings = artefact.settings
    reference = settings.get("reference_model")
    if reference not in (None, settings.get("model_name_or_path")):
        check_adapter_folder(Path(str(reference)).expanduser())
        add_frozen_reference(model, Path(str(reference)).expanduser())
    return model.eval()


def _measured(
    artefact: Artefact, tokenizer: Any, held_out: HeldOut, device: torch.device, file: IO[bytes], folder: Path
) -> Yardstick:
    model = load_as_trained(artefact, device)
    rows = [row for sample in held_out.samples for row in _completions(sample)]
    pairs = len(rows) // 2 if len(rows) == 2 * len(held_out.samples) else 0
    answers = _own_answers(model, tokenizer, held_out.samples[:ANSWERS], artefact.settings)
    recorded = Recorded(model, [*rows, *answers], file, folder)
    with reference_active(model):
        reference = recorded.compare(model)
    return Yardstick(
        source=held_out.source,
        recorded=recorded,
        pairs=pairs,
        answers=len(answers),
        beta=float(artefact.settings.get("beta", 0.1)),
        reference=reference,
        again=recorded.compare(model, first=AGAIN, alone=True),
    )


def _completions(sample: Sample) -> list[TokenizedConversation]:
    """Each completion of a sample behind its prompt."""
    if isinstance(sample, TokenizedConversation):
        return [sample]
    prompt, completions = prompt_and_completions(sample)
    return [_behind(prompt, completion.ids) for completion in completions]


def _behind(prompt: Sequence[int], ids: Sequence[int]) -> TokenizedConversation:
    return TokenizedConversation([*prompt, *ids], [len(prompt), len(prompt) + len(ids)])


def _own_answers(
    model: Any, tokenizer: Any, samples: Sequence[Sample], settings: dict[str, Any]
) -> list[TokenizedConversation]:
    """The adapter's greedy answers to the prompts of these samples, which are where its users will see it."""
    prompts = [prompt_and_completions(sample)[0] for sample in samples]
    found = complete(
        model, tokenizer, prompts, [0] * len(prompts), temperature=0.0,
        max_new_tokens=min(int(settings.get("max_new_tokens", LONGEST_ANSWER)), LONGEST_ANSWER),
        end_token_ids=[PairTokenizer(tokenizer).end_id],
    )  # fmt: skip
    return [_behind(prompt, answer.ids) for prompt, answer in zip(prompts, found, strict=True)]
