"""torch.compile: whether a run compiles, how pure functions are compiled, and what happens if that fails."""

import warnings
from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

from dd_lightning.execution.memory import is_out_of_memory
from dd_lightning.functional.errors import InputError, check_choice

REPAYING_CALLS = 50_000
"""Calls of a run from which ``compile: auto`` compiles, on CUDA: a minute is 1.2 ms for each of so many."""

Made = TypeVar("Made")
Compile = Literal["auto", "on", "off"]
Backend = str | Callable[..., Any]


def compile_choice(value: Compile | bool) -> Compile:
    """Return the choice (else an `InputError`) in one spelling; YAML reads a bare ``on`` or ``off`` as a boolean."""
    if isinstance(value, bool):
        return "on" if value else "off"
    check_choice("compile", value, get_args(Compile))
    return value


def compiled(function: Any, backend: Backend = "inductor") -> Callable[..., Any]:  # noqa: ANN401
    """Return a pure function of tensors compiled, for each set of shapes at its first use, which takes up to minutes.

    Results have no graph. Shapes are never symbolic: code for one shape is faster, and a run has one or two.

    Args:
        function: Written with ``def``; it depends on nothing but its arguments and its closure.
        backend: Backend of torch.compile.
    """
    # torch keeps what it has compiled by code object, and refuses to hold more than eight versions of one. Functions
    # that one `def` makes share its code object, and so would all runs in a process: each gets a copy of its own.
    own = type(function)(
        function.__code__.replace(), function.__globals__, function.__name__, None, function.__closure__
    )
    # Its tensors alone tell whether a call is of the kind that was compiled. To look through a whole network each time
    # took a tenth of a student's step on 8 x 8 images.
    options: dict[str, Any] = {"guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe}
    code: Callable[..., Any] = torch.compile(own, fullgraph=True, dynamic=False, backend=backend, options=options)

    # Compiled code is bound to the gradient mode and to its arguments' strides and storage (a student's state is a row
    # of a larger storage, which forward mode refuses): the same in every call.
    def call(*arguments: Any) -> Any:  # noqa: ANN401
        with torch.no_grad():
            return code(*(laid_out(value) if isinstance(value, Tensor) else value for value in arguments))

    return call


def laid_out(tensor: Tensor) -> Tensor:
    """Return a copy without a graph, in the layout in which compiled code is fastest.

    On a CPU, a convolution of 3 channels in float32 is nine times faster with the channels last. A copy has the strides
    of its layout even where an axis of length 1 leaves a choice: compiled code sees all images of a shape as one kind.

    Example:
        >>> laid_out(torch.zeros(2, 3, 8, 8)).stride(), laid_out(torch.zeros(2, 1, 8, 8)).stride()
        ((192, 1, 24, 3), (64, 64, 8, 1))
    """
    last = tensor.dim() == 4 and tensor.shape[1] > 1 and tensor.device.type == "cpu" and tensor.dtype == torch.float32
    return tensor.detach().clone(memory_format=torch.channels_last if last else torch.contiguous_format)


def compiles(choice: Compile | bool, device: torch.device, calls: int) -> bool:
    """Return whether a run compiles what it calls ``calls`` times on a device; for ``auto`` see `Execution`."""
    choice = compile_choice(choice)
    if choice != "auto":
        return choice == "on"
    return device.type == "cuda" and calls >= REPAYING_CALLS and not torch.are_deterministic_algorithms_enabled()


def compile_for_run(
    make: Callable[[], Made],
    choice: Compile | bool,
    device: torch.device,
    calls: int,
    what: str,
    say: Callable[[str], None],
) -> Made | None:
    """Return what ``make`` compiles and tries out as the run will, after telling ``say``; None if the run does not.

    It does not unless :func:`compiles` says so, nor, with a warning, where torch cannot compile ``what``.

    Raises:
        InputError: If it fails and the choice is ``on``.
        RuntimeError: torch's own, if memory runs out.
    """
    if not compiles(choice, device, calls):
        return None
    say(f"compiling {what}: the first distillation step may be minutes away")
    try:
        return make()
    except (RuntimeError, InputError) as error:  # the compiler's errors are RuntimeErrors; others are bugs of ours
        if is_out_of_memory(error):
            raise
        cause = getattr(error, "inner_exception", error)  # the compiler's own, behind torch's
        line = (str(cause).strip().splitlines() or [""])[0]
        reason = f"torch.compile fails for {what} ({type(cause).__name__}: {line})"
        if compile_choice(choice) == "on":
            raise InputError(f"compile is 'on', but {reason}; set execution.compile: off") from error
        warnings.warn(f"{reason}: going on without; set execution.compile: off to try no more", stacklevel=2)
        return None
