"""Color spaces: how pixels in [0, 1] become what a network sees, and back."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dd_lightning.functional.errors import InputError
from dd_lightning.functional.whitening import ZCA, apply_zca, invert_zca

ColorKind = Literal["pixel", "normalized", "zca"]


@dataclass(frozen=True, eq=False)
class PixelSpace:
    """Pixels as they are, in [0, 1]."""

    kind: ClassVar[Literal["pixel"]] = "pixel"

    def encode(self, images: Tensor) -> Tensor:
        """Return ``images``, ``[n, C, H, W]``, unchanged."""
        return images

    def decode(self, images: Tensor) -> Tensor:
        """Return ``images``, ``[n, C, H, W]``, unchanged."""
        return images

    def tensors(self) -> dict[str, Tensor]:
        """Return nothing: this space has no numbers of its own."""
        return {}


@dataclass(frozen=True, eq=False)
class NormalizedSpace:
    """Each channel minus its mean, divided by its standard deviation.

    Args:
        mean: Mean of each channel over pixels in [0, 1], float ``[C]``.
        std: Standard deviation of each channel, float ``[C]``, positive.

    Raises:
        InputError: If the shapes differ or a standard deviation is not positive.
    """

    mean: Tensor
    std: Tensor
    kind: ClassVar[Literal["normalized"]] = "normalized"

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or self.mean.shape != self.std.shape:
            raise InputError(
                f"mean {list(self.mean.shape)} and std {list(self.std.shape)} must both be [C]: "
                "give one number per channel"
            )
        if not bool((self.std > 0).all()):
            raise InputError(f"std {self.std.tolist()} must be positive: use 1 for a constant channel")

    def encode(self, images: Tensor) -> Tensor:
        """Normalize pixels in [0, 1], ``[n, C, H, W]``."""
        return (images - self._per_channel(self.mean, images)) / self._per_channel(self.std, images)

    def decode(self, images: Tensor) -> Tensor:
        """Undo :meth:`encode`; the result, ``[n, C, H, W]``, is not clamped to [0, 1]."""
        return images * self._per_channel(self.std, images) + self._per_channel(self.mean, images)

    def tensors(self) -> dict[str, Tensor]:
        """Return ``mean`` and ``std``, each ``[C]``."""
        return {"mean": self.mean, "std": self.std}

    @staticmethod
    def _per_channel(values: Tensor, images: Tensor) -> Tensor:
        return values.to(images)[:, None, None]


@dataclass(frozen=True, eq=False)
class ZCASpace:
    """Whitened pixels: the covariance of the training pixels becomes (nearly) the identity.

    Args:
        zca: Mean and matrices fitted on training pixels in [0, 1].
    """

    zca: ZCA
    kind: ClassVar[Literal["zca"]] = "zca"

    def encode(self, images: Tensor) -> Tensor:
        """Whiten pixels in [0, 1], ``[n, C, H, W]``."""
        return apply_zca(images, self.zca)

    def decode(self, images: Tensor) -> Tensor:
        """Undo :meth:`encode`; the result, ``[n, C, H, W]``, is not clamped to [0, 1]."""
        return invert_zca(images, self.zca)

    def tensors(self) -> dict[str, Tensor]:
        """Return ``mean`` ``[D]``, ``whiten`` and ``unwhiten`` ``[D, D]``, with ``D = C * H * W``."""
        return {"mean": self.zca.mean, "whiten": self.zca.whiten, "unwhiten": self.zca.unwhiten}


ColorSpace = PixelSpace | NormalizedSpace | ZCASpace


def color_space_from_tensors(kind: str, tensors: Mapping[str, Tensor]) -> ColorSpace:
    """Rebuild a color space from what its ``kind`` and ``tensors()`` said, for example from a file.

    Args:
        kind: ``"pixel"``, ``"normalized"`` or ``"zca"``.
        tensors: At least the tensors of that kind, by name; others are ignored.

    Raises:
        InputError: If the kind is unknown or one of its tensors is missing.

    Example:
        >>> space = NormalizedSpace(torch.tensor([0.5]), torch.tensor([0.25]))
        >>> color_space_from_tensors(space.kind, space.tensors()).encode(torch.ones(1, 1, 1, 1)).item()
        2.0
    """
    names = {"pixel": (), "normalized": ("mean", "std"), "zca": ("mean", "whiten", "unwhiten")}.get(kind)
    if names is None:
        raise InputError(f"color space {kind!r} is unknown: use one of 'pixel', 'normalized', 'zca'")
    missing = [name for name in names if name not in tensors]
    if missing:
        raise InputError(f"color space {kind!r} needs {', '.join(names)} but {', '.join(missing)} is missing: add it")
    values = [torch.as_tensor(tensors[name]) for name in names]
    if kind == "zca":
        return ZCASpace(ZCA(*values))
    return NormalizedSpace(*values) if kind == "normalized" else PixelSpace()
