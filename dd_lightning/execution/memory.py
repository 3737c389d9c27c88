"""The memory of a distillation step: estimated before a run, and told when it was not enough."""

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode  # the way that torch's notes on extending it document
from torch.utils._pytree import tree_leaves

from dd_lightning.functional.errors import InputError

try:
    import resource
except ImportError:  # Windows has no such module
    resource = None  # type: ignore[assignment]

GIB = 2**30

PROBE_SIZE = 2
"""Images of a probe; with a single one, sums over the batch are left out, and more of them tell nothing new."""


class MemoryPart(NamedTuple):
    """One reason for which memory is held.

    Attributes:
        name: What it is, such as ``"student paths"``.
        size: Bytes.
        note: More about it, in a few words.
    """

    name: str
    size: int
    note: str = ""


@dataclass(frozen=True)
class MemoryEstimate:
    """What the peak of a distillation step consists of, in bytes of tensors.

    What allocators lose between tensors and what kernels use inside comes on top. On a host that was 5 to 40 % of steps
    of half a GiB and more (``benchmarks/step_memory.py``). It may be as much again for smaller ones, because the C
    library keeps tensors below 32 MiB on its heap.

    Example:
        >>> estimate = MemoryEstimate((MemoryPart("real data", 2**29), MemoryPart("paths", 2**30, "3 candidates")))
        >>> estimate.total == 3 * 2**29, str(estimate)
        (True, 'about 1.5 GiB: real data 512 MiB, paths 1.0 GiB (3 candidates)')
    """

    parts: tuple[MemoryPart, ...]

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(part.size for part in self.parts)

    def __str__(self) -> str:
        said = [f"{p.name} {readable(p.size)}" + (f" ({p.note})" if p.note else "") for p in self.parts]
        return f"about {readable(self.total)}: {', '.join(said)}"


def readable(size: int) -> str:
    """Return a number of bytes in the unit that suits it.

    Example:
        >>> readable(3 * 2**30), readable(2**30 - 1), readable(1), readable(0)
        ('3.0 GiB', '1.0 GiB', '0.1 MiB', '0 MiB')
    """
    if size >= GIB or round(size / 2**20) >= 1024:
        return f"{size / GIB:.1f} GiB"
    mebibytes = size / 2**20
    return f"{mebibytes:.0f} MiB" if mebibytes >= 1 or size == 0 else f"{max(mebibytes, 0.1):.1f} MiB"


class LiveBytes(TorchDispatchMode):
    """Follows, while it is entered, how many bytes the tensors that were made since are holding.

    Forward, backward and double backward all pass here, operation by operation, so that the peak is that of the
    computation itself, whatever allocator serves it. What a kernel allocates inside is not seen.

    Attributes:
        trace: The bytes after every new allocation.

    Example:
        >>> with LiveBytes() as live:
        ...     first = torch.ones(100)
        ...     del first
        ...     second = torch.ones(50).view(5, 10)
        >>> live.trace, live.peak
        ([400, 200], 400)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace: list[int] = []
        self._held = 0
        self._storages: dict[int, weakref.ref[Any]] = {}

    def __enter__(self) -> Self:
        """Begin to follow."""
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    @property
    def peak(self) -> int:
        """The most bytes that were held at once."""
        return max(self.trace, default=0)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401  (torch's own signature)
        """Run an operation and count the storages that are new in what it returns."""
        del types
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def released(_: weakref.ref[Any]) -> None:
            del self._storages[key]
            self._held -= size

        # A storage keeps its Python object as long as it lives, so this is called when its memory is freed.
        self._storages[key] = weakref.ref(storage, released)
        self._held += size
        self.trace.append(self._held)


@dataclass(frozen=True)
class MemoryModel:
    """Peak memory of a computation as a function of how many images it is given.

    Attributes:
        moments: (fixed, per image of the first kind, of the second kind, ...) in bytes, at any moment that can be the
            peak. Every tensor grows linearly with the images, so each moment does.

    Example:
        >>> MemoryModel(frozenset({(100, 1), (0, 5)})).peak(10), MemoryModel(frozenset({(100, 1), (0, 5)})).peak(100)
        (110, 500)
    """

    moments: frozenset[tuple[int, ...]]

    def peak(self, *images: int) -> int:
        """Return the bytes that are held at the peak with so many images of each kind."""
        return max(
            fixed + sum(slope * count for slope, count in zip(slopes, images, strict=True))
            for fixed, *slopes in self.moments
        )


def memory_model(run: Callable[..., object], kinds: int = 1) -> MemoryModel:
    """Find out what a computation needs by running it on a few images, on the host.

    It is run with two images of every kind, and again with one more of each kind in turn. The same operations in the
    same order allocate the same tensors, so that the difference tells for every moment how it grows with the images:
    exactly, and the same on every machine.

    Args:
        run: Called with the number of images of each kind.
        kinds: How many kinds there are.

    Example:
        >>> memory_model(lambda n: torch.ones(100) + torch.ones(n, 100).sum(0)).peak(1000)
        400800
    """
    counts = [PROBE_SIZE] * kinds
    base = _trace(run, counts)
    grown = [_trace(run, [count + (kind == k) for k, count in enumerate(counts)]) for kind in range(kinds)]
    if any(len(trace) != len(base) for trace in grown):
        # It does something else with another number of images: take all of it to grow with all of them.
        slope = -(-max(max(trace) for trace in (base, *grown)) // PROBE_SIZE)
        return MemoryModel(frozenset({(0, *[slope] * kinds)}))
    moments = set()
    for at_base, *at_grown in zip(base, *grown, strict=True):
        slopes = [value - at_base for value in at_grown]
        moments.add((at_base - PROBE_SIZE * sum(slopes), *slopes))
    return MemoryModel(frozenset(moments))


def _trace(run: Callable[..., object], counts: Sequence[int]) -> list[int]:
    with LiveBytes() as live:
        run(*counts)
    return live.trace


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that an allocation failed, on an accelerator or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # torch has no exception of its own for the host, nor for what CUDA's libraries cannot allocate
    signs = ("not enough memory", "DefaultCPUAllocator", "STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


@contextmanager
def explain_oom(doing: str, estimate: MemoryEstimate | None, remedy: str) -> Iterator[None]:
    """Turn a failed allocation into one line.

    Args:
        doing: What the memory was needed for, such as ``"scoring 3 candidates at step 7"``.
        estimate: What had been expected; None if nothing was.
        remedy: The options to change, such as ``"lower objective.batch_syn"``.

    Raises:
        InputError: If an allocation fails within.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        expected = "" if estimate is None else f" (the estimate of a step is {estimate})"
        raise InputError(f"memory ran out while {doing}{expected}; {remedy}") from error


def peak_memory_bytes(device: torch.device) -> int | None:
    """Return the peak of the device's allocator, or of the process for the host; None where it cannot be known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere else
