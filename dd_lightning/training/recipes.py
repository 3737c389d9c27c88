"""How networks are trained on the real data: the settings that their weights depend on."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from dd_lightning.execution.compile import Compile, compile_choice
from dd_lightning.execution.precision import Precision
from dd_lightning.functional.errors import InputError
from dd_lightning.functional.policies import AugmentationPolicy, PolicyName


@dataclass(frozen=True)
class ExpertRecipe:
    """Settings of plain SGD on the real data.

    Defaults are those of the trajectory-matching authors' expert script:
    https://github.com/GeorgeCazenavette/mtt-distillation/blob/50dccea/buffer.py#L116-L132

    Args:
        lr: Learning rate (0.01 there).
        momentum: Momentum of SGD (0 there).
        weight_decay: L2 penalty added to the gradient (0 there).
        batch_size: Images per step; the last batch of an epoch is smaller where the data do not divide (256
            there).
        lr_decay: Multiply the learning rate by 0.1 once, after the epoch with index ``epochs // 2 + 1`` (off
            there). The whole trajectory then depends on how many epochs it is to have, so it cannot be
            lengthened later. NOTE: the authors make a new optimizer at that point, which also clears the
            momentum; here it is kept.
        augmentation: Differentiable augmentation as words joined by ``_``, or ``"none"``
            (``color_crop_cutout_flip_scale_rotate`` there).
        seed: Seed of initial weights, batches and augmentation of all experts. Every expert has its own
            streams.
        precision: What the network's layers compute in; weights, SGD and the loss are in float32 whatever it
            is. It is part of what an expert is, so a store holds experts of one precision. ``tf32`` tells on
            CUDA alone, where ``float32`` switches it off.
        compile: Compile the gradient of an expert's loss. That takes up to minutes, and the rounding is another
            one; an expert is what it is with or without, so a store may hold both. ``auto`` does so on CUDA
            alone, in jobs of at least 50,000 steps (experts x epochs x batches), unless deterministic
            algorithms are asked for; where it is impossible, the job goes on without.
        micro_batch: The most images that pass through an expert at once. A batch is then computed in pieces,
            which is exact up to rounding, and not possible with batch norm. ``auto``: on a host, as many images
            as keep what one pass holds near the processor (36 MiB by the estimate; 16 images of 32 x 32 for
            ConvNet-3), which was 1.6 times as fast as whole batches; on accelerators whole batches. Null:
            always whole batches.

    Raises:
        InputError: If a value is out of range.

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
    batch_size: int = 256
    lr_decay: bool = False
    augmentation: str = "color_crop_cutout_flip_scale_rotate"
    seed: int = 0
    precision: Precision = "float32"
    compile: Compile | bool = "off"
    micro_batch: int | Literal["auto"] | None = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "compile", compile_choice(self.compile))
        if self.precision not in get_args(Precision):
            raise InputError(f"expert precision is {self.precision!r}; use one of {', '.join(get_args(Precision))}")
        if isinstance(self.micro_batch, int) and self.micro_batch < 1:
            raise InputError(
                f"expert micro_batch is {self.micro_batch}; use at least 1 image, auto, or null for whole batches"
            )
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise InputError(f"expert lr is {self.lr}, it must be above 0; the usual value is 0.01")
        if not 0 <= self.momentum < 1:
            raise InputError(f"expert momentum is {self.momentum}, it must be in [0, 1); the usual value is 0")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise InputError(f"expert weight_decay is {self.weight_decay}, it must be at least 0; use 0 for none")
        if self.batch_size < 1:
            raise InputError(f"expert batch_size is {self.batch_size}, it must be at least 1; the usual value is 256")

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
        """Return the settings as plain values, the form in which a file of expert weights records them.

        What changes the rounding alone, ``compile`` and ``micro_batch``, is left out; so is the precision where it is
        ``float32``, that of all files which do not name one.

        Args:
            epochs: How many epochs the whole trajectory has. Recorded (as ``decay_epochs``) only with
                ``lr_decay``, for otherwise a shorter trajectory is the beginning of a longer one and may be
                continued.
        """
        plain = asdict(self)
        del plain["compile"], plain["micro_batch"]
        if self.precision == "float32":
            del plain["precision"]
        if self.lr_decay:
            plain["decay_epochs"] = epochs
        return plain


@dataclass(frozen=True)
class NetworkRecipe:
    """How the live networks of gradient and distribution matching go on training on the real data.

    Defaults are IDC's for CIFAR (`condense.py`, `train.py` and `argument.py` of
    https://github.com/snu-mllab/Efficient-Dataset-Condensation/tree/ceac95a).

    Args:
        lr: Learning rate of SGD (0.01 there).
        momentum: Its momentum (0.9 there).
        weight_decay: Its L2 penalty (5e-4 there).
        batch_size: Images per step (there it is the size of the real batches of matching: 64; 128 in DREAM).
        images_per_update: Images of one update, rounded up to whole batches (2000 there, hence 32 steps of 64).
        augmentation: Operations, joined by ``_``, or ``"none"`` (``color_crop`` there: cutout makes way for CutMix).
        policy: How they are combined, ``idc`` or ``dsa`` (``idc`` there), with parameters for each image.
        cutmix: Probability that a batch is mixed by CutMix (0.5 there, for CIFAR).

    Raises:
        InputError: If a value is out of range.

    Example:
        >>> NetworkRecipe().steps_per_update
        32
    """

    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 64
    images_per_update: int = 2000
    augmentation: str = "color_crop"
    policy: PolicyName = "idc"
    cutmix: float = 0.5

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise InputError(f"the pool's recipe.lr is {self.lr}, it must be above 0; the usual value is 0.01")
        if not 0 <= self.momentum < 1:
            raise InputError(f"the pool's recipe.momentum is {self.momentum}, it must be in [0, 1); 0.9 is usual")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise InputError(f"the pool's recipe.weight_decay is {self.weight_decay}, it must be at least 0")
        if self.batch_size < 1 or self.images_per_update < 1:
            raise InputError(
                f"the pool's recipe has batch_size {self.batch_size} and images_per_update {self.images_per_update}; "
                "both must be at least 1"
            )
        if not 0 <= self.cutmix <= 1:
            raise InputError(f"the pool's recipe.cutmix is {self.cutmix}, a probability must be in [0, 1]")
        self.policy_of_augmentation()

    @property
    def steps_per_update(self) -> int:
        """SGD steps of one update."""
        return -(-self.images_per_update // self.batch_size)

    def policy_of_augmentation(self) -> AugmentationPolicy:
        """Return the augmentation of the real batches."""
        return AugmentationPolicy(self.augmentation, self.policy)
