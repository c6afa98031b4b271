"""The way of `--engine ray`: log-probs from the workers of a Ray cluster, each with its own model or asking servers.

Ray Data does the work of a queue: it starts the workers, hands out parts, gives those of a worker that died to another,
and takes no more results than the driver has written. The driver alone reads the dataset and writes the store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from qlora_dpo import errors
from qlora_dpo.data.packing import token_cost
from qlora_dpo.data.tokenization import TokenizedPair
from qlora_dpo.environment import prepare_process
from qlora_dpo.errors import DataError, ModelError, QloraDpoError
from qlora_dpo.models.loading import choose_device, out_of_memory
from qlora_dpo.reference.fill import Keep, Way
from qlora_dpo.reference.identity import differences
from qlora_dpo.reference.store import Logps, ModelIdentity
from qlora_dpo.scoring.ray_cluster import Workers, node_name
from qlora_dpo.scoring.served import MOST_REFUSED

PART = 128  # pairs that a worker gets at once, at most
PARTS = 4  # of a worker at least, so that all end at about the same time
SAMPLE = 256  # pairs by which a worker chooses its layout and measures its memory
DEATHS = 3  # of workers in a row while they load their models: killed, or on a node that goes away
PATIENCE = 2 * 60 * 60.0  # seconds in which no part comes back: a download, a slow machine; or workers that only die

MakeWay = Callable[[Sequence[Any]], Way]
"""Makes a worker's way of computing pairs; pickled by its name, so that every node needs this package."""

_PARTS = pa.schema(
    [(name, pa.list_(pa.int32())) for name in ("prompt_ids", "chosen_ids", "rejected_ids")] + [("origin", pa.string())]
)
_ANSWERS = pa.schema(
    [("key", pa.binary()), ("logps", pa.list_(pa.float32())), ("problem", pa.string()), ("words", pa.string())]
)


class RayWay:
    """Computes pairs on workers, the longest first, so that none is left alone with them at the end."""

    def __init__(self, make_way: MakeWay, pairs: Sequence[Any], identity: ModelIdentity, workers: Workers) -> None:
        self._make_way, self._pairs, self._identity, self._workers = make_way, pairs, identity, workers

    def __call__(self, places: Sequence[int], keep: Keep) -> None:
        """Compute the pairs at these places, and keep what comes back as it comes.

        Raises:
            DataError: servers do not take some of the rows; the others are kept.
            QloraDpoError: what went wrong on a worker, with the name of its node.
        """
        refused: list[QloraDpoError] = []
        answers = self._job(places).iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
        for answer in answers:
            keep(_rows(answer))
            for problem in _problems(answer):
                if not isinstance(problem, DataError):
                    raise problem
                refused.append(problem)
            if len(refused) == MOST_REFUSED:
                break
        if refused:
            more = f"\n{len(refused) - 1} more parts of the dataset have such rows." if len(refused) > 1 else ""
            raise DataError(f"{refused[0]}{more}")

    def _job(self, places: Sequence[int]) -> Any:
        import ray.data

        longest_first = sorted(places, key=lambda place: token_cost(self._pairs[place], "shared"), reverse=True)
        size = min(PART, -(-len(places) // (PARTS * self._workers.count)))
        parts = [longest_first[start : start + size] for start in range(0, len(places), size)]
        dataset = ray.data.from_arrow([self._table(part) for part in parts])
        context = dataset.context
        context.enable_progress_bars = context.print_on_execution_start = False
        context.max_consecutive_actor_init_deaths = DEATHS
        # A part is given to another worker as often as one dies over it; this is the end of that.
        context.execution_no_progress_timeout_s = PATIENCE
        return dataset.map_batches(
            Worker,
            fn_constructor_args=(self._make_way, _plain(islice(self._pairs, SAMPLE)), self._identity, self._workers),
            batch_size=size,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=self._workers.count),
            num_cpus=self._workers.cpus,
            num_gpus=self._workers.gpus,
        )

    def _table(self, places: Sequence[int]) -> pa.Table:
        pairs = [self._pairs[place] for place in places]
        return pa.table({name: [getattr(pair, name) for pair in pairs] for name in _PARTS.names}, schema=_PARTS)


class Worker:
    """One worker: it is constructed once, with its model, and called with one part after the other."""

    def __init__(
        self, make_way: MakeWay, sample: Sequence[TokenizedPair], expected: ModelIdentity, workers: Workers
    ) -> None:
        """What goes wrong here is told with the first part: a constructor that raises is Ray's affair, and no text for
        people."""
        prepare_process()
        if not workers.gpus:
            torch.set_num_threads(workers.cpus)  # Ray knows its share; torch sees all CPUs of the node
        self._pairs = list(sample)  # of which the way is made; each part takes their place
        self._problem = _problem_of(lambda: self._begin(make_way, expected))

    def _begin(self, make_way: MakeWay, expected: ModelIdentity) -> None:
        self._way = make_way(self._pairs)
        _refuse_another(self._way.identity, expected)

    def __call__(self, part: pa.Table) -> pa.Table:
        """Rows, and the problem that ended the part where there was one."""
        self._pairs[:] = [TokenizedPair(**row) for row in part.to_pylist()]
        rows: dict[bytes, Logps] = {}
        problem = self._problem or _problem_of(lambda: self._way.compute(range(len(self._pairs)), rows.update))
        return _answer(rows, problem)


def _problem_of(work: Callable[[], None]) -> QloraDpoError | None:
    """What goes wrong in it."""
    try:
        work()
    except QloraDpoError as error:
        return error
    except torch.OutOfMemoryError:
        return out_of_memory("computing the reference", choose_device(use_cpu=False))
    return None


def _refuse_another(found: ModelIdentity, expected: ModelIdentity) -> None:
    if found.fingerprint != expected.fingerprint:
        names = ", ".join(differences(found.description, expected.description))
        raise ModelError(
            f"its model is not the one that the store is filled for: it differs in {names} ({found.fingerprint[:16]} "
            f"instead of {expected.fingerprint[:16]}). Give every node the same files; what others computed is kept."
        )


def _answer(rows: dict[bytes, Logps], problem: QloraDpoError | None) -> pa.Table:
    table = pa.table([list(rows), list(rows.values()), *[pa.nulls(len(rows), pa.string())] * 2], schema=_ANSWERS)
    if problem is None:
        return table
    kind = next(kind.__name__ for kind in type(problem).__mro__ if kind.__module__ == errors.__name__)
    told = [{"problem": kind, "words": f"on the node {node_name()}: {problem}"}]
    return pa.concat_tables([table, pa.Table.from_pylist(told, schema=_ANSWERS)])


def _rows(answer: pa.Table) -> dict[bytes, Logps]:
    values = (row.values for row in answer["logps"] if row.is_valid)
    keys = (key for key in answer["key"].to_pylist() if key is not None)
    return {key: np.asarray(row, dtype=np.float32) for key, row in zip(keys, values, strict=True)}


def _problems(answer: pa.Table) -> list[QloraDpoError]:
    told = zip(answer["problem"].to_pylist(), answer["words"].to_pylist(), strict=True)
    return [getattr(errors, kind)(words) for kind, words in told if kind is not None]


def _plain(pairs: Iterable[Any]) -> list[TokenizedPair]:
    """Pairs without what is not needed to score them."""
    return [TokenizedPair(pair.prompt_ids, pair.chosen_ids, pair.rejected_ids, origin=pair.origin) for pair in pairs]
