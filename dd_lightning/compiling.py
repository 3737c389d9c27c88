"""Whether a run compiles, and what it does where torch.compile fails."""

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

from dd_lightning.functional.compilation import Compile, compile_choice
from dd_lightning.functional.errors import InputError
from dd_lightning.memory import is_out_of_memory

REPAYING_CALLS = 50_000
"""Calls of a run from which ``compile: auto`` compiles, on CUDA: a minute is 1.2 ms for each of so many."""

Made = TypeVar("Made")


def compiles(choice: Compile | bool, device: torch.device, calls: int) -> bool:
    """Tell whether a run compiles what it will call so many times.

    ``auto`` does so on CUDA alone, where the calls repay it, and unless algorithms are to be deterministic, for the
    compiler may choose other kernels in another process.

    Args:
        choice: What the person has said.
        device: Where it is computed.
        calls: How many calls the whole run will make.
    """
    choice = compile_choice(choice)
    if choice != "auto":
        return choice == "on"
    return device.type == "cuda" and calls >= REPAYING_CALLS and not torch.are_deterministic_algorithms_enabled()


def compiled_or_told(make: Callable[[], Made], choice: Compile | bool, what: str, option: str) -> Made | None:
    """Return what ``make`` compiles, or None, with a warning, where that fails and nobody insists on it.

    Args:
        make: Compiles and tries out all that the run will need.
        choice: What the person has said.
        what: What is compiled, in a few words.
        option: The option that they have said it with.

    Raises:
        InputError: If it fails and the choice is ``on``.
        RuntimeError: If memory runs out, as torch says it; or another of its errors of that kind.
    """
    try:
        return make()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        cause = getattr(error, "inner_exception", error)  # the compiler's own, behind torch's
        line = (str(cause).strip().splitlines() or [""])[0]
        reason = f"torch.compile fails for {what} ({type(cause).__name__}: {line})"
        if compile_choice(choice) == "on":
            raise InputError(f"compile is 'on', but {reason}; set {option}: off") from error
        warnings.warn(f"{reason}: going on without; set {option}: off to try no more", stacklevel=2)
        return None
