"""Training recipes: the settings that the weights of experts and live networks depend on."""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, get_args

import torch
from torch import Generator, Tensor

from dd_lightning.execution.precision import Precision
from dd_lightning.functional.cutmix import cutmix, draw_cutmix, label_logits
from dd_lightning.functional.errors import check_choice, check_range
from dd_lightning.functional.policies import AugmentationPolicy, PolicyName, augment_in_turn


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """SGD on the mean cross-entropy of augmented batches.

    Args:
        lr: Learning rate.
        momentum: SGD momentum.
        weight_decay: L2 penalty added to the gradient.
        batch_size: Images per step; the last batch of an epoch is smaller if the data do not divide.
        augmentation: DSA operations, joined by ``_``, or ``"none"``. Parameters are drawn per image.
        policy: How much of them a batch gets: ``dsa``, one operation; ``idc``, nearly all
            (:class:`~dd_lightning.functional.policies.AugmentationPolicy`).
        cutmix: Probability that a batch is mixed by CutMix after its augmentation.

    Raises:
        InputError: If a number is out of range, or the augmentation or the policy does not exist.
    """

    lr: float | None = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 256
    augmentation: str = "color_crop_cutout_flip_scale_rotate"
    policy: PolicyName = "dsa"
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        check_range("recipe.lr", self.lr, low=0, exclude_low=True, hint="0.01 is usual")
        check_range("recipe.momentum", self.momentum, low=0, high=1, exclude_high=True)
        check_range("recipe.weight_decay", self.weight_decay, low=0)
        check_range("recipe.batch_size", self.batch_size, low=1)
        check_range("recipe.cutmix", self.cutmix, low=0, high=1)
        _ = self._augmentation  # refuses unknown names

    @cached_property
    def _augmentation(self) -> AugmentationPolicy:
        return AugmentationPolicy(self.augmentation, self.policy)

    def targets(self, targets: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
        """Return targets that keep their shape whether or not a batch is mixed: label logits if any may be."""
        return label_logits(targets, num_classes, dtype) if self.cutmix > 0 else targets

    def augment(
        self, images: Tensor, targets: Tensor, num_classes: int, generator: Generator, mixes: Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return a batch augmented and, if CutMix strikes, mixed.

        Args:
            images: ``[B, C, H, W]``.
            targets: Class indices ``[B]`` or label logits ``[B, num_classes]``.
            num_classes: Number of classes.
            generator: Source of the augmentation. It advances alike whether or not the batch is mixed.
            mixes: Source of CutMix, if not the same.

        Returns:
            The images, and their targets: label logits if they are mixed.
        """
        size = (images.shape[-2], images.shape[-1])
        augmented = augment_in_turn(images, self._augmentation.draw(generator, len(images), size))
        mix = draw_cutmix(mixes or generator, len(images), size, self.cutmix)
        return (augmented, targets) if mix is None else cutmix(augmented, targets, mix, num_classes)


@dataclass(frozen=True, kw_only=True)
class ExpertRecipe(TrainingRecipe):
    """How experts are trained on the real data.

    Defaults are those of the trajectory-matching authors' expert script:
    https://github.com/GeorgeCazenavette/mtt-distillation/blob/50dccea/buffer.py#L116-L132

    Args:
        lr_decay: Multiply the learning rate by 0.1 once, after the epoch with index ``epochs // 2 + 1`` (off there).
            The trajectory then depends on its length, so it cannot be lengthened later. NOTE: the authors make a new
            optimizer at that point, which also clears the momentum; here it is kept.
        seed: Seed of initial weights, batches and augmentation. Each expert has its own streams.
        precision: What the network's layers compute in; weights, SGD and the loss stay in float32. It is part of what
            an expert is: a store holds experts of one precision. ``tf32`` matters on CUDA only, where ``float32``
            switches it off.

    Example:
        >>> ExpertRecipe().learning_rate(epoch=40, epochs=50)
        0.01
        >>> decayed = ExpertRecipe(lr_decay=True)
        >>> [decayed.learning_rate(epoch, epochs=50) for epoch in (0, 26, 27)]
        [0.01, 0.01, 0.001]
    """

    lr: float = 0.01
    momentum: float = 0.0
    weight_decay: float = 0.0
    lr_decay: bool = False
    seed: int = 0
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("precision", self.precision, get_args(Precision))

    def learning_rate(self, epoch: int, epochs: int) -> float:
        """Return the learning rate of one epoch.

        Args:
            epoch: Index of the epoch, from 0.
            epochs: How many epochs the whole trajectory has; it matters only with ``lr_decay``.
        """
        if self.lr_decay and epoch > epochs // 2 + 1:
            return self.lr / 10  # division: 0.01 * 0.1 is not 0.001 in floating point
        return self.lr

    def describe(self, epochs: int) -> dict[str, Any]:
        """Return the settings as plain values, as expert files record them.

        Options that came later are left out at their defaults, so that older stores stay readable.

        Args:
            epochs: How many epochs the whole trajectory has. Recorded (as ``decay_epochs``) only with ``lr_decay``;
                otherwise a shorter trajectory is the beginning of a longer one and may be continued.
        """
        plain = asdict(self)
        for name, default in {"precision": "float32", "policy": "dsa", "cutmix": 0.0}.items():
            if plain[name] == default:
                del plain[name]
        return plain | ({"decay_epochs": epochs} if self.lr_decay else {})


@dataclass(frozen=True, kw_only=True)
class NetworkRecipe(TrainingRecipe):
    """How the live networks of gradient and distribution matching go on training on the real data.

    Defaults are IDC's for CIFAR (`condense.py`, `train.py` and `argument.py` of
    https://github.com/snu-mllab/Efficient-Dataset-Condensation/tree/ceac95a). Its batches are as large as those of
    matching: 64, and 128 in DREAM. There is no cutout, since CutMix takes its place.

    Args:
        images_per_update: Images of one update, rounded up to whole batches (2000 there, hence 32 steps of 64).

    Example:
        >>> NetworkRecipe().steps_per_update
        32
    """

    lr: float = 0.01
    batch_size: int = 64
    augmentation: str = "color_crop"
    policy: PolicyName = "idc"
    cutmix: float = 0.5
    images_per_update: int = 2000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("recipe.images_per_update", self.images_per_update, low=1)

    @property
    def steps_per_update(self) -> int:
        """SGD steps of one update."""
        return -(-self.images_per_update // self.batch_size)
