"""DD-Ranking's scores (Li et al., 2025, https://arxiv.org/abs/2505.13300), of accuracies in [0, 1].

NOTE: The package ddranking 0.2.0 has the same formulas, but puts percentages into them.
"""

import math


def label_robust_score(full: float, hard: float, own: float, random: float, weight: float = 0.5) -> float:
    """Return LRS, in [0, 1]: ``(e^a - e^-1) / (e - e^-1)`` of ``a = w (own - random) - (1 - w) (full - hard)``.

    Accuracies are of all real images, of the set with hard labels, of the set with its own, and of as many random real
    images; w is 0.5 on the leaderboard.

    Example:
        >>> round(label_robust_score(full=0.848, hard=0.653, own=0.653, random=0.31), 3)  # MTT, CIFAR-10
        0.302
    """
    return _normalized(weight * (own - random) - (1 - weight) * (full - hard))


def augmentation_robust_score(
    own: float, random: float, plain: float, plain_random: float, weight: float = 0.5
) -> float:
    """Return ARS, in [0, 1]: the same of ``b = g (own - random) + (1 - g) (plain - plain_random)``.

    Accuracies are of the set and of as many random real images, with augmentation and without; g is 0.5 on the
    leaderboard.
    """
    return _normalized(weight * (own - random) + (1 - weight) * (plain - plain_random))


def _normalized(value: float) -> float:
    return (math.exp(value) - math.exp(-1)) / (math.e - math.exp(-1))
