"""The processes of one run, one per GPU, which compute their shares of every step and act alike.

Each holds the whole adapter. Per step they exchange one small message (done, stop, out of memory; the sums of the
metrics) and the sum of their gradients, which is the gradient of the step: every loss is divided by all its pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qlora_dpo.errors import ModelError, ProcessLost, ResourceError
from qlora_dpo.training.signals import StopRequested

T = TypeVar("T")

BUCKET = 1 << 24  # numbers that are summed at once: few messages, and little memory for their copy
_LOST = ("gloo", "ncclRemoteError", "remote process", "Connection", "socket")  # messages about a process that is gone


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run; with one process every method is the identity, and nothing is exchanged."""

    rank: int = 0
    count: int = 1
    is_sharded: bool = False
    """Each process holds a part of the base (FSDP, ZeRO-3), so all must run the same passes through the model."""
    is_zero3: bool = False
    """DeepSpeed partitions the base, and the adapter is whole."""

    @property
    def is_main(self) -> bool:
        """The one that prints and writes the run folder."""
        return self.rank == 0

    @property
    def shards_adapter(self) -> bool:
        """Whether each process holds a part of the adapter, too (FSDP)."""
        return self.is_sharded and not self.is_zero3

    def gather(self, value: T) -> list[T]:
        """The value of every process, in their order."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        with lost_processes():
            dist.all_gather_object(found, value)
        return found

    def share(self, value: T) -> T:
        """The first process's value."""
        if self.count == 1:
            return value
        found: list[Any] = [value if self.is_main else None]
        with lost_processes():
            dist.broadcast_object_list(found, src=0)
        return found[0]  # type: ignore[no-any-return]

    def agree(self, value: T) -> T:
        """The first process's value where the base is sharded: what follows from it must be the same for all."""
        return self.share(value) if self.is_sharded else value

    def wait(self) -> None:
        """Return when every process has come here."""
        self.gather(None)

    def on_main(self, work: Callable[[], T]) -> T:
        """What `work` gives in the first process, which alone does it."""
        return self.share(work() if self.is_main else None)  # type: ignore[return-value]

    def main_first(self, work: Callable[[], T]) -> T:
        """What `work` gives here, once the first process has done it and left a cache behind."""
        if self.is_main:
            result = work()
        self.wait()
        return result if self.is_main else work()

    def together(self, work: Callable[[], T]) -> list[T]:
        """What `work` gives in every process. A signal or a lack of memory that ends it in one ends it in all.

        Raises:
            StopRequested, torch.OutOfMemoryError: in every process the same. Where the base is sharded, a lack of
                memory is raised at once: the others are waiting within the model and cannot be told.
        """
        if self.count == 1:
            return [work()]
        result: T | None = None
        failure: tuple[type[Exception], str] | None = None
        try:
            result = work()
        except StopRequested as signal:
            failure = (StopRequested, str(signal))
        except torch.OutOfMemoryError as error:
            if self.is_sharded:
                raise
            failure = (torch.OutOfMemoryError, str(error))
        outcomes = self.gather((result, failure))
        failures = [failure for _, failure in outcomes if failure is not None]
        for kind in (StopRequested, torch.OutOfMemoryError):
            for failed, message in failures:
                if failed is kind:
                    raise kind(message)
        return [result for result, _ in outcomes]  # type: ignore[misc]

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace the gradient of these by its sum over all processes; FSDP has done so in the backward pass.

        Raises:
            ResourceError: memory runs out, where the other processes are waiting for this one and cannot repeat.
        """
        if self.count == 1 or self.shards_adapter:
            return
        try:
            for parameter in parameters:
                if parameter.grad is None:  # a process without a pair in this step
                    parameter.grad = torch.zeros_like(parameter)
            for bucket in _buckets([parameter.grad for parameter in parameters if parameter.grad is not None]):
                _in_one(bucket, dist.all_reduce)
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"process {self.rank} has no memory left to sum the gradients of the processes. The same command with "
                "a smaller --max_tokens_per_microbatch continues from the newest checkpoint."
            ) from error

    def copy_main(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give these the values that they have in the first process, bit by bit; sharded ones are one set already."""
        if self.count == 1 or self.shards_adapter:
            return
        for bucket in _buckets([parameter.data for parameter in parameters]):
            _in_one(bucket, lambda flat: dist.broadcast(flat, src=0))

    def refuse_differences(self, value: Any, what: str) -> None:
        """Refuse processes that would not compute the same run.

        Raises:
            ModelError: in every process: one has another `value` than the first.
        """
        first, *others = self.gather(value)
        for rank, other in enumerate(others, start=1):
            if other != first:
                raise ModelError(
                    f"process {rank} has {what} other than process 0. All must see the same files and use the same "
                    "kind of device and the same versions (compare the `env` command's output on each machine)."
                )


ALONE = Ranks()


@contextmanager
def lost_processes() -> Iterator[None]:
    """Within this block a process that is gone is said to be so."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise process_lost(error) from error


def process_lost(error: BaseException) -> ProcessLost:
    """The error for an exchange that failed because nobody is there, in words."""
    _, _, reason = str(error).rpartition("Last error:")  # which NCCL puts last
    said = reason.strip().splitlines()[0][:200] if reason.strip() else type(error).__name__
    return ProcessLost(
        "a process of this run is gone without a word (killed, or its machine or the network is lost). The same "
        "command continues from the newest checkpoint; the system's log (dmesg) says whether memory ran out. What was "
        f"noticed: {said}"
    )


def is_lost(error: BaseException) -> bool:
    """Whether an error means that another process is gone."""
    if isinstance(error, ProcessLost | dist.DistNetworkError | dist.DistStoreError):
        return True
    return type(error) in (RuntimeError, dist.DistBackendError) and any(word in str(error) for word in _LOST)


def deal(costs: Sequence[int], count: int) -> list[list[int]]:
    """The places of these costs for each of `count` processes: the dearest first, each to whoever has least."""
    shares: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        least = loads.index(min(loads))
        shares[least].append(place)
        loads[least] += costs[place]
    return [sorted(share) for share in shares]


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(one.numel() for one in bucket) + tensor.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _in_one(bucket: Sequence[Tensor], exchange: Callable[[Tensor], object]) -> None:
    """Exchange these tensors as one."""
    flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
    with lost_processes():
        exchange(flat)
    parts = torch.split(flat, [tensor.numel() for tensor in bucket])
    for tensor, part in zip(bucket, parts, strict=True):
        tensor.copy_(part.view_as(tensor))
