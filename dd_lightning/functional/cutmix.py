"""CutMix: a box of each image is replaced by the same box of another, and the labels are mixed by area.

The method is of Yun et al. (ICCV 2019, https://arxiv.org/abs/1905.04899); the box and the partners are drawn as in IDC
(`rand_bbox`, `random_indices` in https://github.com/snu-mllab/Efficient-Dataset-Condensation/blob/ceac95a/misc/utils.py).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dd_lightning.functional.errors import InputError, check_range


class CutMixDraw(NamedTuple):
    """Everything random about one CutMix.

    Attributes:
        permutation: ``[B]`` int64; image i receives the box of image ``permutation[i]``.
        box: (top, bottom, left, right) in pixels, bottom and right exclusive; may be empty.
        ratio: Share of an image's pixels that stay its own, from 0 to 1, with the box cut off at the border.
    """

    permutation: Tensor
    box: tuple[int, int, int, int]
    ratio: float


def draw_cutmix(generator: torch.Generator, batch: int, size: tuple[int, int], probability: float) -> CutMixDraw | None:
    """Draw whether to mix (None: not), with whom, and one box for the whole batch.

    The share lambda that stays is uniform, Beta(1, 1), as in IDC. The box spans sqrt(1 - lambda) of each axis, rounded
    down; its center is uniform over the pixels, and it reaches half of that span, rounded down, either way (an odd span
    loses a pixel: the reference's rule). What lies outside the image is cut off.

    Args:
        generator: Advances equally whether or not the images are mixed, so that later draws do not depend on the
            probability; an accelerator's synchronizes.
        batch: Number of samples B.
        size: ``(H, W)`` of the images.
        probability: Probability of mixing at all; 0.5 in IDC for CIFAR.

    Raises:
        InputError: If the batch or an axis is empty, or the probability is out of range.
    """
    check_range("CutMix batch", batch, 1)
    check_range("CutMix size", min(size), 1)
    check_range("CutMix probability", probability, 0, 1)
    device = generator.device
    chance, own, *center = torch.rand(4, generator=generator, device=device, dtype=torch.float64).tolist()
    permutation = torch.randperm(batch, generator=generator, device=device)
    if chance >= probability:
        return None
    limits: list[int] = []
    for length, position in zip(size, center, strict=True):
        # a product below 1 may round up to the length itself
        middle = min(int(position * length), length - 1)
        reach = int(length * math.sqrt(1 - own)) // 2
        limits += [max(middle - reach, 0), min(middle + reach, length)]
    top, bottom, left, right = limits
    box = (top, bottom, left, right)
    return CutMixDraw(permutation, box, _own_share(box, size))


def cutmix(images: Tensor, targets: Tensor, draw: CutMixDraw, num_classes: int) -> tuple[Tensor, Tensor]:
    """Paste the box of each image's partner into it and mix their labels: a pure function.

    `classification_loss` of the mixed labels is ``ratio`` times its value for the images' own labels plus
    ``1 - ratio`` times its value for their partners'. It need not know of CutMix: a mixture is the softmax of logits.

    Args:
        images: ``[B, C, H, W]``.
        targets: Class indices, ``[B]``; or label logits, ``[B, classes]``, whose softmax is the target distribution.
        draw: From `draw_cutmix`, for the same batch and image size.
        num_classes: Number of classes.

    Returns:
        The images, and label logits ``[B, classes]``: the logarithm of the mixture, hence -inf for probability 0.

    Raises:
        InputError: If the draw was made for another batch or image size, or the logits have other classes.
    """
    size = (images.shape[-2], images.shape[-1])
    if len(draw.permutation) != len(images):
        raise InputError(f"CutMix drawn for {len(draw.permutation)} samples, got {len(images)}: draw again")
    top, bottom, left, right = draw.box
    if bottom > size[0] or right > size[1] or not math.isclose(draw.ratio, _own_share(draw.box, size), abs_tol=1e-9):
        raise InputError(
            f"CutMix box {draw.box} with ratio {draw.ratio:g} was not drawn for images of size {size}: draw again"
        )
    partner = draw.permutation.to(images.device)
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = images[..., top:bottom, left:right][partner]
    own = label_logits(targets, num_classes, images.dtype).log_softmax(dim=1)
    return mixed, torch.logaddexp(own + _log(draw.ratio), own[partner] + _log(1 - draw.ratio))


def label_logits(targets: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """Return label logits ``[B, classes]``, whose softmax is the target distribution.

    Class indices ``[B]`` become 0 for the class and -inf for all others, in ``dtype``.

    Raises:
        InputError: If the logits have another number of classes.
    """
    if targets.is_floating_point():
        if targets.shape[-1] != num_classes:
            raise InputError(f"label logits have shape {tuple(targets.shape)}, but there are {num_classes} classes")
        return targets
    # As in the cross-entropy, it is torch that notices an index out of range: testing here would synchronize.
    empty = torch.full((len(targets), num_classes), -math.inf, dtype=dtype, device=targets.device)
    return empty.scatter(1, targets[:, None].to(torch.int64), 0.0)


def _own_share(box: tuple[int, int, int, int], size: tuple[int, int]) -> float:
    top, bottom, left, right = box
    return 1 - (bottom - top) * (right - left) / (size[0] * size[1])


def _log(share: float) -> float:
    return math.log(share) if share > 0 else -math.inf
