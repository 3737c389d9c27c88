"""The precision of a network's layers, while parameters, images and losses stay in float32."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Literal

import torch
from torch import Tensor

Precision = Literal["float32", "tf32", "bfloat16"]
"""What a network's layers compute in. ``tf32`` rounds the factors of products, on CUDA only."""

Parameters = Tensor | Sequence[Tensor]
"""Parameters of one network: the vector [P], or its parts in their own shapes."""


def in_precision(
    network: Callable[[Parameters, Tensor], Tensor], precision: Precision
) -> Callable[[Parameters, Tensor], Tensor]:
    """Return a network whose layers compute in bfloat16 and whose outputs are float32; itself in other precisions.

    Derivatives by its parameters and images have their precision.
    """
    if precision != "bfloat16":
        return network

    def rounded(theta: Parameters, images: Tensor) -> Tensor:
        low = theta.bfloat16() if isinstance(theta, Tensor) else [part.bfloat16() for part in theta]
        return network(low, images.bfloat16()).float()

    return rounded


@contextmanager
def tensor_float(precision: Precision, device: torch.device) -> Iterator[None]:
    """Use TF32 for convolutions (torch's default) and matrix products on CUDA exactly if it is the precision."""
    if device.type != "cuda":
        if precision == "tf32":
            warn_of_no_effect(device.type)
        yield
        return
    allowed, matmul = precision == "tf32", torch.backends.cuda.matmul
    before, cudnn = matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before, cudnn


@cache
def warn_of_no_effect(device: str) -> None:
    """Say, once in a process, that TF32 does nothing on a kind of device."""
    warnings.warn(f"precision is 'tf32', which is float32 on {device}; it has an effect on CUDA only", stacklevel=2)
