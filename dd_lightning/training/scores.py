"""DD-Ranking's scores (Li et al., 2025, https://arxiv.org/abs/2505.13300), of accuracies in [0, 1].

NOTE: The package ddranking 0.2.0 has the same formulas, but puts percentages into them.
"""

import math


def label_robust_score(full: float, hard: float, own: float, random: float, weight: float = 0.5) -> float:
    """Return LRS, in [0, 1]: what a set is worth whatever its labels are.

    With the hard-label recovery ``HLR = full - hard`` and the improvement over random ``IOR = own - random``, it is
    ``(e^a - e^-1) / (e - e^-1)`` of ``a = w IOR - (1 - w) HLR``.

    Args:
        full: Accuracy of all real images.
        hard: Accuracy of the set with hard labels.
        own: Accuracy of the set with its own labels.
        random: Accuracy of as many random real images.
        weight: w; 0.5 on the leaderboard.

    Example:
        >>> round(label_robust_score(full=0.848, hard=0.653, own=0.653, random=0.31), 3)
        0.302
    """
    return _normalized(weight * (own - random) - (1 - weight) * (full - hard))


def augmentation_robust_score(
    own: float, random: float, plain: float, plain_random: float, weight: float = 0.5
) -> float:
    """Return ARS, in [0, 1]: what a set is worth whether or not its networks are trained with augmentation.

    It is ``(e^b - e^-1) / (e - e^-1)`` of ``b = g (own - random) + (1 - g) (plain - plain_random)``.

    Args:
        own: Accuracy of the set, with augmentation.
        random: That of as many random real images.
        plain: Accuracy of the set, without augmentation.
        plain_random: That of the random real images.
        weight: g; 0.5 on the leaderboard.

    Example:
        >>> augmentation_robust_score(1.0, 0.0, 1.0, 0.0), augmentation_robust_score(0.0, 1.0, 0.0, 1.0)
        (1.0, 0.0)
    """
    return _normalized(weight * (own - random) + (1 - weight) * (plain - plain_random))


def _normalized(value: float) -> float:
    return (math.exp(value) - math.exp(-1)) / (math.e - math.exp(-1))
