"""Your own images in folders."""

from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image, ImageColor
from torch import Tensor
from torchvision.datasets import ImageFolder

from dd_lightning.datamodules.base import DistillationDataModule
from dd_lightning.datamodules.class_order import renumbered
from dd_lightning.datamodules.collect import collect, decoded, image_tensor
from dd_lightning.functional.errors import InputError, check_range


class ImageFolderDataModule(DistillationDataModule):
    """Images in ``root/train/<class>/`` and ``root/test/<class>/``; the folder names are the class names.

    Files of all formats that Pillow reads count, but hidden ones. Pictures are turned as their EXIF data say,
    transparent pixels show the background, 16-bit gray keeps its precision, and of an animation the first frame is
    taken. Each is scaled so that its shorter side fits, and cut to the square in its middle. The test data may lack
    classes. ZCA matrices have (channels * image_size^2)^2 entries.

    Args:
        root: Folder with ``train`` and ``test``.
        image_size: Height and width in pixels of what is distilled.
        grayscale: One channel instead of three.
        background: Color behind transparent pixels, by name or as ``#rrggbb``.
        **options: Those of :class:`DistillationDataModule`, but for ``download``.

    Raises:
        InputError: If ``image_size`` is below 1, or the color is unknown.
    """

    name = "image_folder"

    def __init__(
        self,
        root: str,
        image_size: int,
        grayscale: bool = False,
        background: str = "white",
        **options: Any,  # noqa: ANN401  (inherited)
    ) -> None:
        super().__init__(root, download=False, **options)
        check_range("image_size", image_size, 1)
        try:
            ImageColor.getrgb(background)
        except ValueError as error:
            raise InputError(f"background is {background!r}; give a color, such as black or #808080") from error
        self.image_size = image_size
        self.grayscale = grayscale
        self.background = background
        self._class_names: list[str] = []

    def load(self, train: bool) -> tuple[Tensor, Tensor]:
        """Decode images ``[n, C, image_size, image_size]`` in alphabetic order of the classes."""
        folder = self.root.absolute() / ("train" if train else "test")
        if not folder.is_dir():
            raise InputError(
                f"there is no folder {folder}: put images into {folder}/<class>/"
                + ("" if train else " (a test set is needed; val_fraction holds out training images besides)")
            )
        try:
            found = ImageFolder(folder, is_valid_file=is_picture, allow_empty=not train)
        except OSError as error:
            raise InputError(
                f"no classes in {folder} ({str(error).splitlines()[0]}): mend its class folders"
            ) from error
        if train:
            self._class_names = found.classes
        elif unknown := sorted(set(found.classes) - set(self._class_names)):
            raise InputError(
                f"{folder} has classes that train lacks, {', '.join(unknown)}: add or remove these folders"
            )
        self._animated = 0
        pairs = ((self._decode(Path(path)), label) for path, label in found.samples)
        images, labels = collect(pairs, len(found.samples), f"images in {folder}")
        if self._animated:
            rank_zero_warn(
                f"{self._animated} of {len(images)} files in {folder} have several frames: the first is taken"
            )
        return images, renumbered(labels, found.classes, self._class_names, str(folder), "train")

    def load_class_names(self) -> list[str]:
        """Return the names of the class folders."""
        return self._class_names

    def _decode(self, path: Path) -> Tensor:
        try:
            with Image.open(path) as file:
                self._animated += getattr(file, "n_frames", 1) > 1
                image = decoded(file, str(path), self.background)
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(f"{path} cannot be read as an image ({error}): mend or remove it") from error
        scale = self.image_size / min(image.size)
        width, height = (max(self.image_size, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - self.image_size) // 2, (height - self.image_size) // 2
        image = image.crop((left, top, left + self.image_size, top + self.image_size))
        if self.grayscale and image.mode == "RGB":
            image = image.convert("L")
        return image_tensor(image, str(path)).expand(1 if self.grayscale else 3, -1, -1)


def is_picture(path: str) -> bool:
    """Tell whether a file's name is that of a picture that Pillow reads."""
    name = Path(path)
    return Image.registered_extensions().get(name.suffix.lower()) in Image.OPEN and not name.name.startswith(".")
