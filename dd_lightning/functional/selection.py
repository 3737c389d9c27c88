"""DynaDistill's choice among scored candidates, as functions of their losses."""

from typing import Literal

import torch
from torch import Tensor

Favor = Literal["high_loss", "low_loss"]
Normalize = Literal["none", "mean", "zscore"]


def selection_probabilities(
    losses: Tensor, temperature: float = 0.5, favor: Favor = "high_loss", normalize: Normalize = "none"
) -> Tensor:
    """Return softmax(+-losses / temperature), [M].

    Args:
        losses: Matching loss of each candidate, [M].
        temperature: 0.5 in the paper (section 4.1).
        favor: ``"high_loss"`` is Algorithm 1, line 11, to the letter: exp(+L). ``"low_loss"`` is what the paper's
            prose says, that better candidates are likelier.
        normalize: ``"mean"`` divides the losses by their mean, ``"zscore"`` by their standard deviation (after
            subtracting the mean), which makes the choice independent of the objective's scale.

    Example:
        >>> import math
        >>> p = selection_probabilities(torch.tensor([0.0, 0.5 * math.log(2.0), 0.5 * math.log(5.0)]))
        >>> [round(v, 3) for v in p.tolist()]  # exp(L / 0.5) = 1, 2, 5
        [0.125, 0.25, 0.625]
    """
    scores = losses.detach().double()  # sums of squares can be large: the exponent deserves the digits
    if normalize == "mean":
        scores = scores / scores.mean().abs().clamp_min(torch.finfo(scores.dtype).tiny)
    elif normalize == "zscore":
        scores = scores - scores.mean()
        scores = scores / scores.square().mean().sqrt().clamp_min(torch.finfo(scores.dtype).eps)
    sign = 1.0 if favor == "high_loss" else -1.0
    return torch.softmax(sign * scores / temperature, dim=0)


def sample_index(probabilities: Tensor, generator: torch.Generator) -> int:
    """Draw one index with the given probabilities [M], by inversion of one uniform number.

    Example:
        >>> sample_index(torch.tensor([0.0, 1.0, 0.0]), torch.Generator().manual_seed(0))
        1
    """
    uniform = torch.rand((), dtype=torch.float64, generator=generator, device=generator.device)
    cumulative = probabilities.double().cumsum(0)
    threshold = uniform.to(cumulative.device) * cumulative[-1]
    return int(torch.searchsorted(cumulative, threshold, right=True).clamp_max(len(probabilities) - 1))


def entropy(probabilities: Tensor) -> Tensor:
    """Return -sum p log p in nats; its exponential is the effective number of candidates.

    Example:
        >>> round(float(entropy(torch.full((3,), 1 / 3)).exp()), 6)
        3.0
    """
    total: Tensor = torch.special.entr(probabilities).sum()
    return total
