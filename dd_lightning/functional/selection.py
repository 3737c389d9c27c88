"""DynaDistill's choice among scored candidates, as functions of their losses."""

from typing import Literal

import torch
from torch import Tensor

Favor = Literal["high_loss", "low_loss", "scheduled"]
Normalize = Literal["none", "mean", "zscore"]


def selection_probabilities(
    losses: Tensor,
    temperature: float = 0.5,
    favor: Favor = "high_loss",
    normalize: Normalize = "none",
    progress: float = 0.0,
) -> Tensor:
    """Return softmax(beta * losses / temperature), [M]; a loss that is not finite has probability 0.

    Args:
        losses: Matching loss of each candidate, [M].
        temperature: 0.5 in the paper (section 4.1).
        favor: ``"high_loss"``, beta = 1, is Algorithm 1, line 11, as printed: exp(+L). ``"low_loss"``, beta = -1, is
            what the paper's prose says, that better candidates are likelier. ``"scheduled"`` goes from 1 to -1,
            linearly in ``progress``; it is not in the paper.
        normalize: ``"mean"`` divides the losses by their mean, ``"zscore"`` by their standard deviation (after
            subtracting the mean), which makes the choice independent of the objective's scale.
        progress: Which part of the run's steps is done, in [0, 1].

    Returns:
        Probabilities, float64; uniform if no loss is finite.

    Example:
        >>> import math
        >>> p = selection_probabilities(torch.tensor([0.0, 0.5 * math.log(2.0), 0.5 * math.log(5.0)]))
        >>> [round(v, 3) for v in p.tolist()]  # exp(L / 0.5) = 1, 2, 5
        [0.125, 0.25, 0.625]
        >>> selection_probabilities(torch.tensor([1.0, math.nan, 1.0])).tolist()
        [0.5, 0.0, 0.5]
    """
    every = losses.detach().double()  # sums of squares can be large: the exponent deserves the digits
    finite = torch.isfinite(every)
    if not finite.any():
        return torch.full_like(every, 1 / len(every))
    scores = every[finite]
    if normalize == "mean":
        scores = scores / scores.mean().abs().clamp_min(torch.finfo(scores.dtype).tiny)
    elif normalize == "zscore":
        scores = scores - scores.mean()
        scores = scores / scores.square().mean().sqrt().clamp_min(torch.finfo(scores.dtype).eps)
    beta = {"high_loss": 1.0, "low_loss": -1.0, "scheduled": 1.0 - 2.0 * progress}[favor]
    probabilities = torch.zeros_like(every)
    probabilities[finite] = torch.softmax(beta * scores / temperature, dim=0)
    return probabilities


def sample_index(probabilities: Tensor, generator: torch.Generator) -> int:
    """Draw one index with the given probabilities [M], by inversion of one uniform number."""
    uniform = torch.rand((), dtype=torch.float64, generator=generator, device=generator.device)
    cumulative = probabilities.double().cumsum(0)
    threshold = uniform.to(cumulative.device) * cumulative[-1]
    return int(torch.searchsorted(cumulative, threshold, right=True).clamp_max(len(probabilities) - 1))


def entropy(probabilities: Tensor) -> Tensor:
    """Return -sum p log p of [M] in nats; its exponential is the effective number of candidates."""
    total: Tensor = torch.special.entr(probabilities).sum()
    return total
