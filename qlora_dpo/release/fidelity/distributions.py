"""The whole distributions of a model at the tokens of completions: kept in a file, and compared with another model's.

They come from the model's own forward pass on padded rows, as any transformers program runs it, so that every
architecture is measured as it is; a hook lets only the predicting positions reach the output layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qlora_dpo.data.conversation_tokens import TokenizedConversation
from qlora_dpo.data.packing import PackedBatch, cut, pack, target_count
from qlora_dpo.errors import ModelError, ResourceError
from qlora_dpo.release.staging import require_space

MAX_TOKENS = 2048  # that go through the model at once
OFFLOADED = 8192  # the same of a model whose weights are read anew from the disk each time
AT_ONCE = 128  # positions whose distributions are in memory in fp32
KEPT = 4096  # positions whose whole distributions are compared, spread evenly over all

Floats = NDArray[np.float64]
Places = NDArray[np.int64]


@dataclass(frozen=True)
class Compared:
    """A model's predictions of the tokens of completions, beside those that were recorded."""

    logps: Floats
    """[N] of the given tokens."""
    tops: Places
    """[N]: the likeliest token."""
    kl: Floats
    """KL(recorded || this) at the kept positions."""
    not_numbers: int
    """Positions where the model gives NaN."""

    @property
    def kl_mean(self) -> float:
        """Per token; what rounding makes of a difference that is none is not negative."""
        return max(float(self.kl.mean()), 0.0)

    @property
    def kl_p99(self) -> float:
        """What one token in a hundred exceeds."""
        return max(float(np.quantile(self.kl, 0.99)), 0.0)


class Recorded:
    """What one model predicts at each target of `rows`, with the whole distributions at some of them in a file."""

    def __init__(self, model: Any, rows: Sequence[TokenizedConversation], file: IO[bytes], folder: Path) -> None:
        """Run the model over all rows; `file` is on the disk of `folder`.

        Raises:
            StorageError: the distributions do not fit there.
            OSError: the disk refuses.
            ModelError: the model gives NaN.
            ResourceError: the device ran out of memory.
        """
        self.rows = rows
        self.lengths = [target_count(row) for row in rows]
        self._starts = np.cumsum([0, *self.lengths])
        count = sum(self.lengths)
        self._kept = np.unique(np.linspace(0, count - 1, min(KEPT, count)).round().astype(np.int64))
        self.logps, self.tops = np.empty(count), np.empty(count, np.int64)
        self._file, self._folder, self.vocabulary = file, folder, 0
        for places, logps, targets in self._pieces(model, range(len(rows)), _at_once(model)):
            self._keep(places, logps, targets)
        file.flush()
        if np.isnan(self.logps).any():
            raise ModelError(
                f"the trained adapter on its base gives log-probs that are not numbers at "
                f"{int(np.isnan(self.logps).sum()):,} of {count:,} tokens, so there is nothing to compare a merge with."
            )

    @property
    def kept(self) -> int:
        """At how many positions whole distributions are compared."""
        return len(self._kept)

    def compare(self, model: Any, *, first: int | None = None, alone: bool = False) -> Compared:
        """Run a model over all rows, or the first few; `alone` one by one instead of in batches.

        Raises:
            ModelError: it has another vocabulary.
            ResourceError: the device ran out of memory.
        """
        whole = np.memmap(self._file, np.float32, "r", shape=(self.kept, self.vocabulary))
        members = range(len(self.rows[:first]))
        count = int(self._starts[len(members)])
        found = Compared(np.empty(count), np.empty(count, np.int64), np.empty(np.searchsorted(self._kept, count)), 0)
        not_numbers = 0
        for places, logps, targets in self._pieces(model, members, 1 if alone else _at_once(model)):
            if logps.shape[1] != self.vocabulary:
                raise ModelError(
                    f"the merged model has a vocabulary of {logps.shape[1]:,} tokens, the trained one of "
                    f"{self.vocabulary:,}: they are not of the same base."
                )
            found.logps[places], found.tops[places] = _of_tokens(logps, targets)
            not_numbers += int(logps.isnan().any(-1).sum())
            within, ranks = self._ranks(places)
            recorded = torch.from_numpy(np.array(whole[ranks])).to(logps.device)
            found.kl[ranks] = _kl(recorded, logps[within]).cpu().numpy()
        return Compared(found.logps, found.tops, found.kl, not_numbers)

    def _keep(self, places: Places, logps: Tensor, targets: Tensor) -> None:
        if not self.vocabulary:
            self.vocabulary = logps.shape[1]
            require_space(self._folder, self.kept * self.vocabulary * 4, "measuring what the merge keeps")
        self.logps[places], self.tops[places] = _of_tokens(logps, targets)
        within, ranks = self._ranks(places)
        for rank, values in zip(ranks.tolist(), logps[within].cpu().numpy(), strict=True):
            self._file.seek(rank * self.vocabulary * 4)
            self._file.write(values.tobytes())

    def _ranks(self, places: Places) -> tuple[Tensor, Places]:
        """Which of these places are kept, and as which of the kept ones."""
        within = np.isin(places, self._kept)
        return torch.from_numpy(within.nonzero()[0]), np.searchsorted(self._kept, places[within])

    def _pieces(self, model: Any, members: Sequence[int], max_tokens: int) -> Iterator[tuple[Places, Tensor, Tensor]]:
        """The places of some targets, the distributions there [n, V] in fp32, and the targets [n]."""
        device = _input_device(model)
        for numbers in cut([self.rows[member] for member in members], max_tokens, "padded"):
            chosen = [members[number] for number in numbers]
            batch = pack([self.rows[member] for member in chosen], "padded").to(device)
            spans = [np.arange(self._starts[member], self._starts[member + 1]) for member in chosen]
            places = np.concatenate(spans)
            try:
                logits = _predictions(model, batch)
                for start in range(0, len(logits), AT_ONCE):
                    piece = slice(start, start + AT_ONCE)
                    targets = batch.target_ids[piece].to(logits.device)
                    yield places[piece], logits[piece].float().log_softmax(-1), targets
            except torch.OutOfMemoryError as error:
                raise ResourceError(
                    f"{device} ran out of memory while the merge was measured. Free it, or measure with --use_cpu."
                ) from error


def _at_once(model: Any) -> int:
    """Tokens of a batch."""
    places = getattr(model, "hf_device_map", {}).values()
    return OFFLOADED if "disk" in places else MAX_TOKENS


def _input_device(model: Any) -> torch.device:
    """Where inputs go: of an offloaded model accelerate moves them on."""
    device: torch.device = model.device
    return torch.device("cpu") if device.type == "meta" else device


@torch.no_grad()
def _predictions(model: Any, batch: PackedBatch) -> Tensor:
    """The model's own logits [N, V] at the positions that predict."""
    with _only_predicting(model.get_output_embeddings(), batch.predictor_index) as selected:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    logits = logits.flatten(0, 1)
    return logits if selected else logits.index_select(0, batch.predictor_index.to(logits.device))


@contextmanager
def _only_predicting(head: Any, index: Tensor) -> Iterator[list[bool]]:
    """Within this block the output layer sees these positions only; the list is filled when it does."""
    selected: list[bool] = []

    def select(_head: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *others = inputs
        selected.append(True)
        return (hidden.flatten(0, 1).index_select(0, index.to(hidden.device))[None], *others)

    hook = head.register_forward_pre_hook(select)
    try:
        yield selected
    finally:
        hook.remove()


def _of_tokens(logps: Tensor, targets: Tensor) -> tuple[Floats, Places]:
    """The log-probs of the given tokens, and the likeliest ones."""
    given = logps.gather(1, targets[:, None])[:, 0]
    return given.double().cpu().numpy(), logps.argmax(-1).cpu().numpy()


def _kl(logps: Tensor, others: Tensor) -> Tensor:
    """KL(p || q) [n] of log-probs [n, V]; a token that p excludes counts nothing, whatever q is."""
    shares = logps.exp()
    terms = torch.where(shares > 0, shares * (logps - others), 0.0)
    return terms.sum(-1, dtype=torch.float64)
