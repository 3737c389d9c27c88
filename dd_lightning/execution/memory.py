"""The memory of a distillation step: estimated before a run, and explained when it runs out."""

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode  # the way that torch's notes on extending it document
from torch.utils._pytree import tree_leaves

from dd_lightning.functional.errors import OutOfMemoryError

try:
    import resource
except ImportError:  # Windows has no such module
    resource = None  # type: ignore[assignment]

GIB = 2**30

PROBE_SIZE = 2
"""Images of a probe; with a single one, sums over the batch are left out, and more of them tell nothing new."""


class MemoryPart(NamedTuple):
    """A name such as ``"student paths"``, the bytes it holds, and a note of a few words."""

    name: str
    size: int
    note: str = ""


@dataclass(frozen=True)
class MemoryEstimate:
    """The peak of a distillation step, in bytes of tensors, by parts, and the options to change where memory runs out.

    What allocators lose between tensors and what kernels use inside comes on top: on a CPU 5 to 40 % for steps of half
    a GiB and more (``benchmarks/step_memory.py``), and up to as much again for smaller ones, because the C library
    keeps tensors below 32 MiB on its heap.

    Example:
        >>> estimate = MemoryEstimate((MemoryPart("real data", 2**29), MemoryPart("paths", 2**30, "3 candidates")))
        >>> estimate.total == 3 * 2**29, str(estimate)
        (True, 'about 1.5 GiB: real data 512 MiB, paths 1.0 GiB (3 candidates)')
    """

    parts: tuple[MemoryPart, ...]
    remedy: str = "use a smaller network, or fewer images per class"

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(part.size for part in self.parts)

    def __str__(self) -> str:
        parts = [f"{p.name} {readable(p.size)}" + (f" ({p.note})" if p.note else "") for p in self.parts]
        return f"about {readable(self.total)}: {', '.join(parts)}"


def readable(size: int) -> str:
    """Return a number of bytes in a readable unit.

    Example:
        >>> readable(3 * 2**30), readable(2**30 - 1), readable(1), readable(0)
        ('3.0 GiB', '1.0 GiB', '0.1 MiB', '0 MiB')
    """
    if size >= GIB or round(size / 2**20) >= 1024:
        return f"{size / GIB:.1f} GiB"
    mebibytes = size / 2**20
    return f"{mebibytes:.0f} MiB" if mebibytes >= 1 or size == 0 else f"{max(mebibytes, 0.1):.1f} MiB"


class LiveBytes(TorchDispatchMode):
    """Tracks the bytes held by the tensors made while it is active, backward passes included.

    ``trace`` holds the bytes after every new allocation, independent of the allocator. What kernels allocate inside is
    not seen.

    Example:
        >>> with LiveBytes() as live:
        ...     first = torch.ones(100)
        ...     del first
        ...     second = torch.ones(50).view(5, 10)
        >>> live.trace
        [400, 200]
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace: list[int] = []
        self._held = 0
        self._storages: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401  (torch's own signature)
        """Run an operation and count the storages that are new in its result."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._storages:
                self._follow(tensor.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def released(_: weakref.ref[Any]) -> None:
            del self._storages[key]
            self._held -= size

        # A storage keeps its Python object as long as it lives, so this is called when its memory is freed.
        self._storages[key] = weakref.ref(storage, released)
        self._held += size
        self.trace.append(self._held)


@dataclass(frozen=True)
class MemoryModel:
    """Peak memory of a computation as a function of its numbers of images.

    ``moments`` are (fixed, per image of the first kind, of the second kind, ...) in bytes, at moments that can be the
    peak. Every tensor grows linearly with the images, so every moment does.
    """

    moments: frozenset[tuple[int, ...]]

    def peak(self, *images: int) -> int:
        """Return the bytes held at the peak, given the number of images of each kind."""
        return max(
            fixed + sum(slope * count for slope, count in zip(slopes, images, strict=True))
            for fixed, *slopes in self.moments
        )


def memory_model(run: Callable[..., object], kinds: int = 1) -> MemoryModel:
    """Measure what a computation needs by running it on a few images, on the CPU.

    It runs with two images of every kind, and again with one more of each kind in turn. The same operations in the same
    order allocate the same tensors, so the differences give the growth of every moment exactly.

    Args:
        run: Called with the number of images of each kind.
        kinds: Number of kinds.

    Example:
        >>> memory_model(lambda n: torch.ones(100) + torch.ones(n, 100).sum(0)).peak(1000)
        400800
    """

    def trace(grown: int | None = None) -> list[int]:
        live = LiveBytes()
        with live:
            run(*(PROBE_SIZE + (kind == grown) for kind in range(kinds)))
        return live.trace

    base, grown = trace(), [trace(kind) for kind in range(kinds)]
    if any(len(sizes) != len(base) for sizes in grown):
        # Other operations for another number of images: assume that everything grows with all of them.
        slope = -(-max(max(sizes) for sizes in (base, *grown)) // PROBE_SIZE)
        return MemoryModel(frozenset({(0, *[slope] * kinds)}))
    moments = set()
    for at_base, *at_grown in zip(base, *grown, strict=True):
        slopes = [value - at_base for value in at_grown]
        moments.add((at_base - PROBE_SIZE * sum(slopes), *slopes))
    return MemoryModel(frozenset(moments))


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that an allocation failed, on an accelerator or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # torch has no exception of its own for the CPU, nor for what CUDA's libraries cannot allocate
    signs = ("not enough memory", "DefaultCPUAllocator", "STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


@contextmanager
def explain_oom(doing: str, estimate: MemoryEstimate | None, remedy: str) -> Iterator[None]:
    """Turn a failed allocation into one line.

    Args:
        doing: What needed it, such as ``"scoring 3 candidates at step 7"``.
        estimate: Of a step, if there is one.
        remedy: The options to change, such as ``"lower objective.batch_syn"``.

    Raises:
        OutOfMemoryError: If an allocation fails within.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        expected = "" if estimate is None else f" (the estimate of a step is {estimate})"
        raise OutOfMemoryError(f"memory ran out while {doing}{expected}; {remedy}") from error


def peak_memory_bytes(device: torch.device) -> int | None:
    """Return the peak of the device's allocator, or of the process for the CPU; None where it is unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere else
