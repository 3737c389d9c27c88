"""Stratified splits: the same share of every class is held out."""

import torch
from torch import Tensor

from dd_lightning.functional.errors import InputError, check_range
from dd_lightning.functional.random import step_generator


def stratified_split(labels: Tensor, fraction: float, seed: int, stream: str) -> tuple[Tensor, Tensor]:
    """Hold out the same share of every class, rounded to whole images (halves up), but never all of them.

    Args:
        labels: Class numbers, int64 ``[n]``.
        fraction: Share to hold out, above 0 and below 1.
        seed: Seed of the choice; class ``c`` draws from ``step_generator(seed, c, stream)``.
        stream: What the split is for, such as ``"val split"``.

    Returns:
        The indices that stay and the indices that are held out, both int64 on the host and ascending.

    Raises:
        InputError: If the fraction is out of range, or holds out nothing at all.
    """
    check_range("the held-out fraction", fraction, 0, 1, exclude_low=True, exclude_high=True)
    labels = labels.cpu()
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(int(labels.max()) + 1):
        members = torch.nonzero(labels == label).flatten()
        if not len(members):
            continue
        count = min(int(fraction * len(members) + 0.5), len(members) - 1)
        order = torch.randperm(len(members), generator=step_generator(seed, label, stream))
        held_out[members[order[:count]]] = True
    if not held_out.any():
        raise InputError(
            f"holding out {fraction} of each class takes none of {len(labels)} images: choose a larger one"
        )
    return torch.nonzero(~held_out).flatten(), torch.nonzero(held_out).flatten()
