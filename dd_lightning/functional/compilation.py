"""torch.compile, as the derivatives of a pure loss need it."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dd_lightning.functional.errors import InputError

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
