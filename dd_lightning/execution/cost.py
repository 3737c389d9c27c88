"""What distillation costs, apart from what else a run does."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dd_lightning.execution.memory import peak_memory_bytes


class CostMeter:
    """Seconds and peak memory of distillation alone: whatever runs in :meth:`paused` does not count.

    A CUDA device's peak is reset at the start and after each pause; a CPU's is that of the process, whatever it did.

    Args:
        device: Where distillation runs.
        seconds: What it took before, in an interrupted run.
    """

    def __init__(self, device: torch.device, seconds: float = 0.0) -> None:
        self._device = device
        self._before = seconds
        self._peak = 0
        self._started: float | None = None

    def start(self) -> None:
        """Begin to count."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Wall-clock seconds."""
        running = 0.0 if self._started is None else time.perf_counter() - self._started
        return self._before + running

    @property
    def peak_memory(self) -> int | None:
        """Bytes; None where they cannot be known."""
        counting = self._started is not None or self._device.type != "cuda"
        now = peak_memory_bytes(self._device) if counting else None
        return max(self._peak, now or 0) or None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count what happens in this context."""
        self._peak, self._before, self._started = self.peak_memory or 0, self.seconds, None
        try:
            yield
        finally:
            self.start()
