"""Your own images in folders."""

from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder

from dd_lightning.datamodules.base import DistillationDataModule
from dd_lightning.datamodules.collect import collect
from dd_lightning.functional.errors import InputError, check_range


class ImageFolderDataModule(DistillationDataModule):
    """Images in ``root/train/<class>/`` and ``root/test/<class>/``; the folder names are the class names.

    Each image is scaled so that its shorter side fits, and cut to the square in its middle. ZCA matrices have
    (channels * image_size^2)^2 entries.

    Args:
        root: Folder with ``train`` and ``test``.
        image_size: Height and width in pixels of what is distilled.
        grayscale: One channel instead of three.
        **options: Those of :class:`DistillationDataModule`, but for ``download``.

    Raises:
        InputError: If ``image_size`` is below 1.
    """

    name = "image_folder"

    def __init__(
        self,
        root: str,
        image_size: int,
        grayscale: bool = False,
        **options: Any,  # noqa: ANN401  (inherited)
    ) -> None:
        super().__init__(root, download=False, **options)
        check_range("image_size", image_size, 1)
        self.image_size = image_size
        self.grayscale = grayscale
        self._class_names: dict[bool, list[str]] = {}

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        """Decode images uint8 ``[n, C, image_size, image_size]`` in alphabetic order of the classes."""
        folder = self.root.absolute() / ("train" if train else "test")
        if not folder.is_dir():
            raise InputError(
                f"there is no folder {folder}: put images into {folder}/<class>/"
                + ("" if train else " (a test set is needed; val_fraction holds out training images besides)")
            )
        try:
            found = ImageFolder(folder)
        except OSError as error:
            raise InputError(
                f"no classes in {folder} ({str(error).splitlines()[0]}): mend its class folders"
            ) from error
        self._class_names[train] = found.classes
        if not train and found.classes != self._class_names.get(True, found.classes):
            only_one_side = sorted(set(found.classes) ^ set(self._class_names[True]))
            raise InputError(
                f"{self.root.absolute()}: train and test must have the same classes, but only one has "
                f"{', '.join(only_one_side)}: add or remove these folders"
            )
        pairs = ((self._decode(Path(path)), label) for path, label in found.samples)
        return collect(pairs, len(found.samples), f"images in {folder}")

    def load_class_names(self) -> list[str]:
        """Return the names of the class folders."""
        return self._class_names[True]

    def _decode(self, path: Path) -> Image.Image:
        try:
            with Image.open(path) as file:
                image = file.convert("L" if self.grayscale else "RGB")
        except OSError as error:
            raise InputError(f"{path} cannot be read as an image: mend or remove it") from error
        scale = self.image_size / min(image.size)
        width, height = (max(self.image_size, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - self.image_size) // 2, (height - self.image_size) // 2
        return image.crop((left, top, left + self.image_size, top + self.image_size))
