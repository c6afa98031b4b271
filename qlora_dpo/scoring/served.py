"""The way of `reference --endpoint`: log-probs of a served model, a sample of which is computed here too."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from tqdm import tqdm

from qlora_dpo.config.labeling import EndpointOptions
from qlora_dpo.config.reference import ServedOptions
from qlora_dpo.data.preferences import Message, PreferencePair, RefusedRow
from qlora_dpo.endpoint import Endpoint
from qlora_dpo.errors import DataError
from qlora_dpo.models.scoring import TOLERANCE
from qlora_dpo.redaction import redacted
from qlora_dpo.reference.drift import drift_between, refuse_drift
from qlora_dpo.reference.endpoint_logps import EndpointLogps
from qlora_dpo.reference.fill import Keep, Way, keys_of
from qlora_dpo.reference.identity import identity_of
from qlora_dpo.reference.served_tokens import LogpsRequest
from qlora_dpo.reference.store import Logps, ModelRows, completion_key
from qlora_dpo.training.referencing import Recomputed, own_rounding

MOST_REFUSED = 20  # rows, before the command ends without asking for the others
ROUNDING = TOLERANCE[torch.bfloat16]  # nats per token between two ways to compute one model, as servers hold it

Texts = Iterable[PreferencePair | RefusedRow]
Load = Callable[[], Recomputed]
"""Loads the model of the trainer."""


def served_way(
    server: EndpointOptions, served: ServedOptions, pairs: Sequence[Any], texts: Sequence[Texts], tokenizer: Any,
    load: Load, beta: float,
) -> Way:  # fmt: skip
    """With servers, whose rows are kept apart from those of the model that is trained.

    Raises:
        UsageError: an address, a number or the model's name cannot be used.
    """
    endpoint = Endpoint(
        server.endpoint, server.endpoint_model or "", server.concurrency, server.timeout, server.retries
    )
    name = served.served_as or f"{server.endpoint_model}@server"
    words = {"model": endpoint.model, "servers": redacted(" ".join(server.endpoint))}
    logps = EndpointLogps(endpoint, lambda token: str(tokenizer.decode([token])))
    way = ServedWay(logps, pairs, texts, name)
    return Way(
        identity_of({"served_as": name}, words),
        way,
        lambda rows: way.check(rows, load, count=served.verify, max_drift=served.max_drift, beta=beta),
    )


class ServedWay:
    """Asks for the log-probs of pairs, completion by completion."""

    def __init__(self, logps: EndpointLogps, pairs: Sequence[Any], texts: Sequence[Texts], name: str) -> None:
        self._logps, self._pairs, self._texts, self._name = logps, pairs, FoundTexts(texts), name
        self._sample: dict[bytes, Logps] = {}  # what was asked for to be compared, and is sound

    def __call__(self, places: Sequence[int], keep: Keep) -> None:
        """Ask for the pairs at these places, and keep each answer as it comes.

        Raises:
            DataError: the servers do not take some of the rows; the others are kept.
            EndpointError: no server gives log-probs, or one scores other tokens than it is sent.
        """
        keep(self._sample)
        refused = []
        for request, values in self._logps(self._requests(places)):
            if isinstance(values, RefusedRow):
                refused.append(values)
            else:
                keep({request.key: values})
            if len(refused) == MOST_REFUSED:
                break
        if refused:
            listed = "\n".join(f"  {row}" for row in refused)
            raise DataError(
                f"{len(refused)} answers have no log-probs from the server"
                f"{', and the others are not asked for' if len(refused) == MOST_REFUSED else ''}:\n{listed}\nWhat it "
                "answered is kept. Lower --max_length, leave these rows out, or serve the model with a longer context "
                "and with the chat template that it has here."
            )

    def check(self, rows: ModelRows, load: Load, *, count: int, max_drift: float | None, beta: float) -> None:
        """Ask for a sample of the pairs; compare it with what is kept under this name and with what is computed here.

        Raises:
            ModelError: the served model is not the one that answered before, or not the one that is here.
        """
        if not count:
            _say(f"--verify 0: nothing says whether {self._name} is the model that is trained, or how far from it.")
            return
        sample = range(0, len(self._pairs), max(1, len(self._pairs) // count))[:count]
        answers = {request.key: values for request, values in self._logps(self._requests(sample))}
        logps = {key: values for key, values in answers.items() if not isinstance(values, RefusedRow)}
        places = [place for place in sample if logps.keys() >= set(keys_of(self._pairs[place]))]
        if not places:
            return  # all are refused, which is told when they are asked for
        keys = [key for place in places for key in keys_of(self._pairs[place])]
        theirs = [logps[key] for key in keys]
        self._compare_with_kept(keys, theirs, rows, beta)
        _say(f"Computing {len(places)} of {len(self._pairs):,} pairs here, to compare with {self._name}.")
        recomputed = load()
        ours = recomputed(places)
        drift, limit = drift_between(theirs, ours, beta), ROUNDING if max_drift is None else max_drift
        _say(str(drift))
        if max_drift is None and drift.mean_per_token > limit:
            limit = max(limit, own_rounding(recomputed, places, ours))
        refuse_drift(
            drift, limit, f"the log-probs of {self._name}",
            "Nothing was kept. A server computes in bfloat16, the trainer in 4 bit unless --load_in_4bit is false: if "
            "that is the reason, accept it with a larger --max_drift, or compute the reference here (no --endpoint).",
        )  # fmt: skip
        self._sample = logps
        _say(
            f"They are kept as {self._name}, apart from those of the model that is trained. A run takes them as its "
            f"reference with --reference_store {rows.store.path} --reference_source {self._name}; its loss then pulls "
            f"towards the served model, and begins where these numbers say."
        )

    def _compare_with_kept(self, keys: list[bytes], theirs: list[Logps], rows: ModelRows, beta: float) -> None:
        kept = rows.get(keys)
        places = [2 * pair + side for pair in range(len(keys) // 2) for side in (0, 1)
                  if kept.keys() >= set(keys[2 * pair : 2 * pair + 2])]  # fmt: skip
        if places:
            drift = drift_between([kept[keys[place]] for place in places], [theirs[place] for place in places], beta)
            refuse_drift(
                drift, ROUNDING, f"the rows that {rows.store.path} has of {self._name}",
                "Keep those of the model that answers now under another name, with --served_as.",
            )  # fmt: skip

    def _requests(self, places: Iterable[int]) -> Iterator[LogpsRequest]:
        for place in places:
            pair = self._pairs[place]
            text = self._texts.of(pair.origin) if self._logps.may_need_messages else None
            for field, ids in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
                if completion_key(pair.prompt_ids, ids) in self._sample:
                    continue
                messages = None if text is None else _conversation(text, field)
                yield LogpsRequest(pair.prompt_ids, ids, pair.origin, field, messages)


class FoundTexts:
    """The texts of pairs, which are asked for in about the order in which their sources have them."""

    def __init__(self, sources: Sequence[Texts]) -> None:
        self._sources = sources
        self._rest: Iterator[PreferencePair | RefusedRow] = iter(())

    def of(self, origin: str) -> PreferencePair | None:
        """The pair that stands there; None where the source has changed."""
        for _ in range(2):
            for pair in self._rest:
                if pair.origin == origin and isinstance(pair, PreferencePair):
                    return pair
            self._rest = chain.from_iterable(self._sources)
        return None


def _conversation(pair: PreferencePair, field: str) -> list[Message]:
    return [*pair.messages, {"role": "assistant", "content": getattr(pair, field)}]


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)
