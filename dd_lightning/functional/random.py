"""Counter-based randomness: every draw is a function of (seed, step, stream, rank)."""

import hashlib

import torch


def step_generator(
    seed: int, step: int, stream: str, rank: int = 0, device: torch.device | None = None
) -> torch.Generator:
    """Return a fresh generator whose state depends on nothing but the arguments.

    A run that is killed and resumed asks for the same (seed, step, stream) again and gets the same numbers, so no
    random state has to be stored, and one stream cannot disturb another.

    Args:
        seed: The run's seed.
        step: The counter within the stream, usually the distillation step.
        stream: What the draws are for, such as ``"candidates"`` or ``"augment"``.
        rank: Offset for processes that must differ from one another.
        device: Where the draws are made. Left out, they are made on the host, and so are the same on every device.

    Example:
        >>> a = torch.rand(2, generator=step_generator(0, 7, "augment"))
        >>> b = torch.rand(2, generator=step_generator(0, 7, "augment"))
        >>> bool((a == b).all())
        True
    """
    key = f"{seed}/{step}/{stream}/{rank}".encode()
    mixed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1
    return torch.Generator(device=device).manual_seed(mixed)
