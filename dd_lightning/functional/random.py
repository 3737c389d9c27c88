"""Counter-based randomness: every draw is a function of (seed, step, stream, rank)."""

import hashlib
from dataclasses import dataclass

import torch


def step_generator(
    seed: int, step: int, stream: str, rank: int = 0, device: torch.device | None = None
) -> torch.Generator:
    """Return a fresh generator whose state depends on nothing but the arguments.

    So no random state has to be stored for a resumed run, and one stream cannot disturb another.

    Args:
        seed: The run's seed.
        step: The counter within the stream, usually the distillation step.
        stream: What the draws are for, such as ``"candidates"`` or ``"augment"``.
        rank: Offset for processes that must differ from one another.
        device: Where the draws are made; the host by default, whose draws are the same whatever the run's device.
    """
    key = f"{seed}/{step}/{stream}/{rank}".encode()
    mixed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1
    return torch.Generator(device=device).manual_seed(mixed)


@dataclass(frozen=True)
class StepContext:
    """Where a run is, the distillation step t, and the only source of its randomness; each process draws its own."""

    seed: int
    step: int
    rank: int = 0

    def generator(self, stream: str) -> torch.Generator:
        """Return the generator of one named stream at this step, on the host."""
        return step_generator(self.seed, self.step, stream, self.rank)
