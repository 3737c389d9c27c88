"""Distances between what a network computes on synthetic and on real images, for matching class by class."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from dd_lightning.functional.errors import InputError

Metric = Literal["mse", "l1", "l1_mean", "cos"]

_COS_EPS = 1e-6  # added to the product of norms in the cosine, the value of both DC and IDC


def tensor_distance(synthetic: Tensor, real: Tensor, metric: Metric) -> Tensor:
    """Return the distance of two tensors of one shape, a scalar.

    Rows are what belongs to one output of a layer, ``tensor.flatten(1)``; a vector is one row.

    * ``mse``: the sum (no mean) of squared differences, IDC's choice for CIFAR;
    * ``l1``: the sum of absolute differences;
    * ``l1_mean``: the same, each row divided by its length;
    * ``cos``: the sum over rows of 1 - cosine, which is DC's own distance. A row that is zero on either side has the
      distance 1 and the derivative 0.

    NOTE: For vectors the published code takes each number for a row, which makes the cosine a comparison of signs.

    Example:
        >>> a, b = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
        >>> [round(float(tensor_distance(a, b, m)), 4) for m in ("mse", "l1", "l1_mean", "cos")]
        [3.0, 3.0, 1.5, 1.0]
    """
    if metric == "mse":
        return (synthetic - real).square().sum()
    if metric == "l1":
        return (synthetic - real).abs().sum()
    own, other = (t.flatten(1) if t.ndim > 1 else t[None] for t in (synthetic, real))
    if metric == "l1_mean":
        return (own - other).abs().mean(1).sum()
    present = (own != 0).any(1) & (other != 0).any(1)
    # Absent rows are replaced before the norm: their derivative would be the other row over eps, not 0.
    own, other = (torch.where(present[:, None], rows, 1.0) for rows in (own, other))
    norms = torch.linalg.vector_norm(own, dim=1) * torch.linalg.vector_norm(other, dim=1)
    cosine = (own * other).sum(1) / (norms + _COS_EPS)
    return (1 - torch.where(present, cosine, 0.0)).sum()


def gradient_distance(synthetic: Sequence[Tensor], real: Sequence[Tensor], metric: Metric) -> Tensor:
    """Return the sum of :func:`tensor_distance` over the gradients of layers, a scalar: D of gradient matching."""
    return torch.stack([tensor_distance(a, b, metric) for a, b in zip(synthetic, real, strict=True)]).sum()


def compared_layers(shapes: Sequence[Sequence[int]], include_classifier: bool, include_bias: bool) -> tuple[int, ...]:
    """Return which parameters gradient matching compares.

    What is neither a matrix nor a vector always is: convolutions, and the gains and shifts that layer norm has for each
    pixel, as in DC and IDC.

    Args:
        shapes: Shapes of a network's parameters.
        include_classifier: Also the weights of linear layers (DC and DSA do, IDC does not).
        include_bias: Also vectors: biases and the gains of norms (none of the three does).

    Raises:
        InputError: If nothing is left to compare.

    Example:
        >>> compared_layers([(8, 3, 3, 3), (8,), (10, 32), (10,)], include_classifier=True, include_bias=False)
        (0, 2)
    """
    wanted = {1: include_bias, 2: include_classifier}
    chosen = tuple(index for index, shape in enumerate(shapes) if wanted.get(len(shape), len(shape) > 0))
    if not chosen:
        raise InputError(
            f"none of the network's {len(shapes)} parameters is a convolution, so there is nothing to compare; "
            "set include_classifier: true"
        )
    return chosen


def step_per_iteration(lr: float, momentum: float, num_classes: int) -> tuple[float, float]:
    """Return the (lr, momentum) of one step per iteration that equals stepping once per class.

    The gradient-matching references step SGD over the whole image tensor after each of the C classes, so that the
    momentum mu, in [0, 1), of a class keeps moving its images during the other classes' turns. As a class's loss
    depends on its own images only, C such steps make up one with lr' = lr (1 - mu^C) / (1 - mu) and mu' = mu^C.

    NOTE: The equality holds at the times at which gradients are taken. In between, that is wherever the images are read
    or clamped at the end of an iteration, classes of the reference are at different stages of coasting, and differ
    by at most lr |v| mu / (1 - mu), v being a class's momentum buffer.
    """
    joint = momentum**num_classes
    return lr * (1 - joint) / (1 - momentum), joint
