"""The processes of a run, as all that is shared between them knows them."""

from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")


class Process(Protocol):
    """This process among those of a run. All of them must make the same calls in the same order."""

    @property
    def rank(self) -> int:
        """Its number."""

    @property
    def size(self) -> int:
        """How many there are."""

    def barrier(self) -> None:
        """Wait for the others."""

    def broadcast(self, value: Value, source: int = 0) -> Value:
        """Return the value of process ``source``; a tensor has the same shape and type in all of them."""

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes."""


class SingleProcess:
    """The only process of a run."""

    rank, size = 0, 1

    def barrier(self) -> None:
        """Wait for nobody."""

    def broadcast(self, value: Value, source: int = 0) -> Value:
        """Return the value."""
        del source
        return value

    def sum(self, value: Tensor) -> Tensor:
        """Return the tensor."""
        return value


class DistributedProcess:
    """A process of torch.distributed's default group.

    Args:
        device: Where its tensors are exchanged: NCCL wants its GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._device = device

    def barrier(self) -> None:
        """Wait for the others."""
        dist.barrier()

    def broadcast(self, value: Value, source: int = 0) -> Value:
        """Return the value of process ``source``."""
        if isinstance(value, Tensor):
            shared = value.detach().to(self._device).clone()
            dist.broadcast(shared, source)
            return shared.to(value.device)  # type: ignore[return-value]  # a Tensor, as Value is
        values = [value]
        dist.broadcast_object_list(values, source, device=self._device)
        return values[0]

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes."""
        shared = value.detach().to(self._device).clone()
        dist.all_reduce(shared)
        return shared.to(value.device)


def holds_anywhere(process: Process, condition: bool) -> bool:
    """Tell whether a condition holds in any process."""
    return condition if process.size == 1 else bool(process.sum(torch.tensor(int(condition))) > 0)
