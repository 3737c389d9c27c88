"""Color spaces: how pixels in [0, 1] become what a network sees, and back."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dd_lightning.functional.errors import InputError, check_choice
from dd_lightning.functional.whitening import ZCA, apply_zca, invert_zca

ColorKind = Literal["pixel", "normalized", "zca"]


@dataclass(frozen=True, eq=False)
class PixelSpace:
    """Pixels as they are, in [0, 1]."""

    kind: ClassVar[ColorKind] = "pixel"

    def encode(self, images: Tensor) -> Tensor:
        """Return ``images``, ``[n, C, H, W]``, unchanged."""
        return images

    decode = encode

    def tensors(self) -> dict[str, Tensor]:
        """Return nothing: this space has no numbers."""
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
    kind: ClassVar[ColorKind] = "normalized"

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
        eps: What was added to the eigenvalues; 0.1 in the trajectory-matching reference.

    Raises:
        InputError: If the matrices are not ``[D, D]`` for a mean ``[D]``.
    """

    zca: ZCA
    eps: float = 0.1
    kind: ClassVar[ColorKind] = "zca"

    def __post_init__(self) -> None:
        square = (self.zca.mean.numel(),) * 2
        if self.zca.mean.ndim != 1 or self.zca.whiten.shape != square or self.zca.unwhiten.shape != square:
            raise InputError(f"whitening has shapes {[list(each.shape) for each in self.zca]}, not [D], [D, D], [D, D]")

    def encode(self, images: Tensor) -> Tensor:
        """Whiten pixels in [0, 1], ``[n, C, H, W]``."""
        return apply_zca(images, self.zca)

    def decode(self, images: Tensor) -> Tensor:
        """Undo :meth:`encode`; the result, ``[n, C, H, W]``, is not clamped to [0, 1]."""
        return invert_zca(images, self.zca)

    def tensors(self) -> dict[str, Tensor]:
        """Return ``mean`` ``[D]``, ``eps``, ``whiten`` and ``unwhiten`` ``[D, D]``, with ``D = C * H * W``."""
        return self.zca._asdict() | {"eps": torch.tensor(self.eps, dtype=torch.float64)}


@dataclass(frozen=True, eq=False)
class ZCARecipe:
    """A :class:`ZCASpace` of ``mean [D]`` without its matrices, 75 MB at 32 x 32 pixels: fitting finds them again."""

    mean: Tensor
    eps: float = 0.1
    kind: ClassVar[ColorKind] = "zca"

    def encode(self, images: Tensor) -> Tensor:
        """Raise `InputError`: it takes the matrices."""
        raise InputError(
            f"{len(images)} images cannot be whitened or decoded: the set was stored without its whitening matrices; "
            "fit them on its training data"
        )

    decode = encode

    def tensors(self) -> dict[str, Tensor]:
        """Return ``mean`` ``[D]`` and ``eps``."""
        return {"mean": self.mean, "eps": torch.tensor(self.eps, dtype=torch.float64)}


ColorSpace = PixelSpace | NormalizedSpace | ZCASpace | ZCARecipe

_TENSORS = {"pixel": (), "normalized": ("mean", "std"), "zca": ("mean", "whiten", "unwhiten")}


def recipe(space: ColorSpace) -> dict[str, Tensor]:
    """Return the tensors that tell a space from others of its kind: all but whitening matrices."""
    return {name: tensor for name, tensor in space.tensors().items() if name not in ("whiten", "unwhiten")}


def same_space(first: ColorSpace, second: ColorSpace) -> bool:
    """Tell whether two spaces are one; means that were fitted on different machines may differ by rounding."""
    ours, theirs = recipe(first), recipe(second)
    return first.kind == second.kind and all(
        ours[name].shape == theirs[name].shape and torch.allclose(ours[name], theirs[name].to(ours[name]), atol=1e-5)
        for name in ours
    )


def color_space_from_tensors(kind: str, tensors: Mapping[str, Tensor]) -> ColorSpace:
    """Rebuild a color space from its ``kind`` and ``tensors()``; ``zca`` without both matrices gives a `ZCARecipe`.

    Raises:
        InputError: If the kind is unknown or one of its tensors is missing.
    """
    check_choice("color space", kind, _TENSORS)
    unfitted = kind == "zca" and not {"whiten", "unwhiten"} & tensors.keys()
    names = ("mean",) if unfitted else _TENSORS[kind]
    missing = [name for name in names if name not in tensors]
    if missing:
        raise InputError(f"color space {kind!r} needs {', '.join(names)}; add {', '.join(missing)}")
    values = [torch.as_tensor(tensors[name]) for name in names]
    if kind == "zca":
        eps = float(tensors.get("eps", 0.1))
        return ZCARecipe(values[0], eps) if unfitted else ZCASpace(ZCA(*values), eps)
    return NormalizedSpace(*values) if kind == "normalized" else PixelSpace()
