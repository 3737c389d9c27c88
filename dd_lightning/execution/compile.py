"""torch.compile: whether a run compiles, how pure functions are compiled, and what happens where it fails."""

import warnings
from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

from dd_lightning.execution.memory import is_out_of_memory
from dd_lightning.functional.errors import InputError

REPAYING_CALLS = 50_000
"""Calls of a run from which ``compile: auto`` compiles, on CUDA: a minute is 1.2 ms for each of so many."""

Made = TypeVar("Made")

Compile = Literal["auto", "on", "off"]

Backend = str | Callable[..., Any]
"""What torch.compile calls so."""


def compile_choice(value: Compile | bool) -> Compile:
    """Return the choice that a person has made; YAML reads a bare ``on`` or ``off`` as a boolean.

    Raises:
        InputError: If it is none.

    Example:
        >>> compile_choice(False), compile_choice("auto")
        ('off', 'auto')
    """
    if isinstance(value, bool):
        return "on" if value else "off"
    if value not in get_args(Compile):
        raise InputError(f"compile is {value!r}; use one of {', '.join(get_args(Compile))}")
    return value


def compiled(function: Any, backend: Backend = "inductor") -> Callable[..., Any]:  # noqa: ANN401
    """Return a pure function of tensors compiled, for each set of shapes at its first use.

    Compiling takes up to minutes. Shapes are never made symbolic: code for one shape is faster, and a run has one or
    two. Compiled code is bound to the properties of the tensors that it was compiled for and to whether gradients were
    being recorded: make these the same in every call.

    Args:
        function: Written with ``def``; it depends on nothing but its arguments and what it encloses.
        backend: Of torch.compile.

    Example:
        >>> def double(x):
        ...     return 2 * x
        >>> compiled(double, backend="eager")(torch.ones(1))
        tensor([2.])
    """
    # torch keeps what it has compiled by code object, and refuses to hold more than eight versions of one. Functions
    # that one `def` makes share its code object, and so would all runs in a process: each gets a copy of its own.
    own = type(function)(
        function.__code__.replace(), function.__globals__, function.__name__, None, function.__closure__
    )
    # A pure function's tensors alone tell whether a call is of the kind that was compiled. To look through a whole
    # network each time took a tenth of a student's step on 8 x 8 images.
    options: dict[str, Any] = {"guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe}
    return torch.compile(own, fullgraph=True, dynamic=False, backend=backend, options=options)


def laid_out(images: Tensor) -> Tensor:
    """Return a copy of images ``[B, ch, H, W]`` in the layout that compiled code is fastest with, without a graph.

    On a host, a convolution of 3 channels in float32 is nine times faster with the channels last, and compiled code
    keeps to it. A copy has the strides of its layout even where an axis of length 1 leaves a choice, so that to
    compiled code all images of a shape are of one kind.

    Example:
        >>> laid_out(torch.zeros(2, 3, 8, 8)).stride(), laid_out(torch.zeros(2, 1, 8, 8)).stride()
        ((192, 1, 24, 3), (64, 64, 8, 1))
    """
    last = images.dim() == 4 and images.shape[1] > 1 and images.device.type == "cpu" and images.dtype == torch.float32
    return images.detach().clone(memory_format=torch.channels_last if last else torch.contiguous_format)


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


def try_compile(make: Callable[[], Made], choice: Compile | bool, what: str, option: str) -> Made | None:
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
