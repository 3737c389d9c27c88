"""Augmentation policies: which operations of DSA one call draws, and applying several draws in turn.

Two are published: trajectory matching and DSA draw one operation of the strategy per call; IDC (Kim et al., ICML 2022,
https://arxiv.org/abs/2205.14959) applies nearly all of them (`DiffAug` in
https://github.com/snu-mllab/Efficient-Dataset-Condensation/blob/ceac95a/misc/augment.py). Operations and ranges are
those of `DSA` in both; for oblong images IDC's rotation has a slightly different aspect ratio, which is not followed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Literal, get_args

import torch
from torch import Tensor

from dd_lightning.functional.augment import DSA, IDENTITY, AugmentationDraw, augment, most_memory_intensive
from dd_lightning.functional.errors import check_choice

PolicyName = Literal["dsa", "idc"]

_ONE_OF = ("crop", "scale", "rotate")


@dataclass(frozen=True)
class AugmentationPolicy:
    """A strategy, and how much of it one call applies.

    Args:
        strategy: As for `DSA`.
        name: ``dsa``: one operation of the strategy per call, uniformly. ``idc``: at every call flip, color, one of
            crop, scale and rotate, and cutout, in this order, as far as the strategy names them.

    Raises:
        InputError: If the strategy names an unknown operation or one twice, or the policy is unknown.

    Example:
        >>> policy = AugmentationPolicy("color_crop_cutout_flip", name="idc")
        >>> [draw.operation for draw in policy.draw(torch.Generator(), batch=4, size=(8, 8))]
        ['flip', 'color', 'crop', 'cutout']
    """

    strategy: str
    name: PolicyName = "dsa"
    _dsa: DSA = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_choice("augmentation policy", self.name, get_args(PolicyName))
        object.__setattr__(self, "_dsa", DSA(self.strategy))

    def most_memory_intensive(self) -> "AugmentationPolicy":
        """Return the policy that always draws what needs the most memory of all that this one may draw.

        Example:
            >>> AugmentationPolicy("color_crop_cutout_rotate", "idc").most_memory_intensive().strategy
            'color_cutout_rotate'
        """
        named = self._dsa.operations
        if self.name == "dsa":
            return AugmentationPolicy(most_memory_intensive(named), self.name)
        among = most_memory_intensive([operation for operation in named if operation in _ONE_OF])
        kept = [operation for operation in named if operation == among or operation not in _ONE_OF]
        return AugmentationPolicy("_".join(kept) or IDENTITY, self.name)

    def draw(
        self, generator: torch.Generator, batch: int, size: tuple[int, int], siamese: bool = False
    ) -> tuple[AugmentationDraw, ...]:
        """Draw what one call applies, in order, as :meth:`DSA.draw` does; operations are chosen once for the batch.

        Args:
            generator: Source of all randomness.
            batch: Number of samples.
            size: ``(H, W)`` of the images.
            siamese: Draw one set of parameters for all samples, as IDC does to match real with synthetic images, but
                not to train a network.

        Raises:
            InputError: If the batch is empty or an axis is shorter than 2 pixels.
        """
        if self.name == "dsa":
            return (self._dsa.draw(generator, batch, size, siamese),)
        named = self._dsa.operations
        operations: list[str] = [operation for operation in ("flip", "color") if operation in named]
        if among := [operation for operation in named if operation in _ONE_OF]:
            choice = torch.randint(len(among), (1,), generator=generator, device=generator.device)
            operations.append(among[int(choice)])
        if "cutout" in named:
            operations.append("cutout")
        return tuple(self._dsa.draw_operation(operation, generator, batch, size, siamese) for operation in operations)


def augment_in_turn(images: Tensor, draws: Sequence[AugmentationDraw]) -> Tensor:
    """`augment` images ``[B, C, H, W]`` by one draw after another; an `InputError` if one was made for other images."""
    return reduce(augment, draws, images)
