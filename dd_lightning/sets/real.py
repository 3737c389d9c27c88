"""The real set: training or held-out data as one tensor on the device, with an index of every class."""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from dd_lightning.functional.errors import InputError, check_range


class RealSet:
    """Images and labels on one device, with the indices of every class.

    A whole data set of small images fits into a GPU's memory: a batch is one gather. The class index stays on the host;
    only the indices drawn travel.

    Args:
        images: Float ``[n, C, H, W]``, in the color space that networks see.
        labels: Class numbers ``0 .. num_classes - 1``, int64 ``[n]``.
        num_classes: How many classes there are.
        complete: Each must have an image; a test set may lack rare ones.

    Raises:
        InputError: If shapes or types do not fit, a label is out of range, or a class has no image.
    """

    def __init__(self, images: Tensor, labels: Tensor, num_classes: int, *, complete: bool = True) -> None:
        if images.ndim != 4 or not images.is_floating_point():
            raise InputError(
                f"images are {images.dtype} {list(images.shape)}; a real set needs floats [n, C, H, W]: convert them"
            )
        if labels.shape != (len(images),) or labels.dtype != torch.int64:
            raise InputError(
                f"labels are {labels.dtype} {list(labels.shape)} for {len(images)} images; "
                "a real set needs one int64 label per image: pass class numbers"
            )
        check_range("num_classes", num_classes, 1)
        on_host = labels.cpu()
        if len(labels) and not 0 <= int(on_host.min()) <= int(on_host.max()) < num_classes:
            raise InputError(
                f"labels run from {int(on_host.min())} to {int(on_host.max())}, outside 0 .. "
                f"{num_classes - 1}: renumber the classes or raise num_classes"
            )
        counts: list[int] = torch.bincount(on_host, minlength=num_classes).tolist()
        if complete and 0 in counts:
            raise InputError(
                f"class {counts.index(0)} of {num_classes} has no image; every class needs at least 1: "
                "add images of it or renumber the classes"
            )
        self.images = images
        self.labels = labels.to(images.device)
        self.num_classes = num_classes
        self._by_class: tuple[Tensor, ...] = torch.split(torch.argsort(on_host, stable=True), counts)

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        return f"RealSet({len(self)} images {self.image_shape}, {self.num_classes} classes, {self.images.device})"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape ``(C, H, W)`` of one image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def class_counts(self) -> tuple[int, ...]:
        """The number of images of each class."""
        return tuple(len(indices) for indices in self._by_class)

    def to(self, device: torch.device | str) -> "RealSet":
        """Return the same set on ``device``; the set itself when it is already there."""
        images = self.images.to(device)
        if images is self.images:
            return self
        moved = copy.copy(self)
        moved.images, moved.labels = images, self.labels.to(device)
        return moved

    def class_indices(self, label: int, positions: Tensor | None = None) -> Tensor:
        """Return where class ``label`` is, int64 ``[class_counts[label]]``, in the order of appearance.

        Positions, on the host, are those within the class that are wanted: only their indices travel.
        """
        indices = self._by_class[label]
        return (indices if positions is None else indices[positions]).to(self.images.device)

    def sample_per_class(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw ``count`` different images of every class, uniformly; all of a class that has fewer.

        Returns indices int64, ``[num_classes * count]`` at most, class by class. A host generator gives the same
        indices wherever the set lives.

        Raises:
            InputError: If ``count`` is below 1.
        """
        check_range("number of images per class", count, 1)
        chosen = [
            indices[torch.randperm(len(indices), generator=generator, device=generator.device)[:count].cpu()]
            for indices in self._by_class
        ]
        return torch.cat(chosen).to(self.images.device)

    def shuffled_batches(self, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Go through the set once in the order of one permutation, drawn at once.

        The batches are indices, int64 ``[batch_size]`` (at least 1; the last one may be shorter), on the set's device.
        """
        check_range("batch_size", batch_size, 1)
        order = torch.randperm(len(self), generator=generator, device=generator.device).to(self.images.device)
        return iter(torch.split(order, batch_size))
