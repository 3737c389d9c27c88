"""How the synthetic set is stored and where it starts."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dd_lightning.functional.errors import InputError, check_range
from dd_lightning.functional.formation import Formation, FormationKind
from dd_lightning.functional.random import step_generator
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.sets.class_batches import Features
from dd_lightning.sets.color_spaces import ColorSpace
from dd_lightning.sets.initial import Initialization, check_initial, class_labels, initial_images
from dd_lightning.sets.real import RealSet
from dd_lightning.sets.synthetic import ImageSpace, LabelKind, SyntheticSet


@dataclass(frozen=True)
class Storage:
    """What of S is stored, and from what it starts.

    Args:
        ipc: Stored images per class.
        factor: Multi-formation (IDC): each stored image is cut into factor x factor tiles, each enlarged to a training
            image. 1 is none; IDC uses 2 for CIFAR.
        formation: ``single`` cuts by ``factor``, ``multi`` by 1, 2, ..., ``factor``.
        image_space: ``network``: images are stored as networks see them. ``pixels``: in [0, 1], normalized on their way
            to a network, as in IDC and DREAM. Learning rates belong to one or the other.
        init: ``real`` images (MTT), those nearest to the centroids of ``kmeans`` (DREAM), or ``noise``.
        labels: ``hard``, or ``soft``: logits taken from the experts (DATM).

    Raises:
        InputError: If ``ipc`` or ``factor`` is below 1.
    """

    ipc: int = 1
    factor: int = 1
    formation: FormationKind = "single"
    image_space: ImageSpace = "network"
    init: Initialization = "real"
    labels: LabelKind = "hard"

    def __post_init__(self) -> None:
        check_range("ipc", self.ipc, low=1, hint="images per class")
        self.decoding  # noqa: B018  (refuses an odd factor)

    @property
    def decoding(self) -> Formation:
        """How a stored image decodes."""
        return Formation(self.factor, self.formation)

    @property
    def effective_ipc(self) -> int:
        """Images per class after decoding: what networks are trained on."""
        return self.ipc * self.decoding.per_image

    def check(self, real: RealSet, network: FunctionalNetwork) -> None:
        """Raise `InputError` if a class has too few images, or the network no features for k-means."""
        check_initial(real, self.ipc, self.init, self.decoding)
        if self.init == "kmeans":
            network.check_features()

    def check_set(self, synthetic: SyntheticSet, real: RealSet) -> None:
        """Refuse data that a set was not distilled from.

        Raises:
            InputError: If they have other classes or image shapes.
        """
        if synthetic.images.shape != (real.num_classes * self.ipc, *real.image_shape):
            raise InputError(
                f"the set holds {len(synthetic)} images {list(synthetic.images.shape[1:])}, {self.ipc} per class, but "
                f"the data have {real.num_classes} classes of {list(real.image_shape)}; give its own data"
            )

    def empty(self, real: RealSet, space: ColorSpace, student_lr: float) -> SyntheticSet:
        """Return a set of the right shapes on the device of ``real``; a checkpoint or :meth:`fill` gives the values."""
        size, device = real.num_classes * self.ipc, real.images.device
        images = torch.zeros(size, *real.image_shape, device=device)
        targets = class_labels(real.num_classes, self.ipc).to(device)
        if self.labels == "soft":
            targets = torch.zeros(size, real.num_classes, device=device)
        pixels = space if self.image_space == "pixels" else None
        return SyntheticSet(images, targets, student_lr, self.decoding, pixels).to(device)

    def fill(
        self,
        synthetic: SyntheticSet,
        real: RealSet,
        seed: int,
        features: Callable[[], Features],
        soft_labels: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        """Draw S_0; ``soft_labels`` is (images, hard labels) -> label logits, ``features`` what k-means clusters by."""
        generator = step_generator(seed, 0, "initial")
        images = initial_images(real, self.ipc, self.init, generator, self.decoding, features)
        labels = class_labels(real.num_classes, self.ipc).to(images.device)
        with torch.no_grad():
            synthetic.targets.copy_(soft_labels(images, labels) if self.labels == "soft" else labels)
            synthetic.images.copy_(images if synthetic.space is None else synthetic.space.decode(images))

    def valid_pixels(self, synthetic: SyntheticSet, space: ColorSpace) -> tuple[Tensor, Tensor]:
        """Return the smallest and the largest valid image, [1, ch, H, W] each, in the space that images are stored in.

        If that space is whitened, an `InputError`: its valid images are no box.
        """
        black, white = torch.zeros_like(synthetic.images[:1]), torch.ones_like(synthetic.images[:1])
        if self.image_space == "pixels":
            return black, white
        if space.kind == "zca":
            raise InputError(
                "clamp is true, but whitened images have no range of valid pixels; set image_space: pixels, or "
                "data.color_space: normalized"
            )
        return space.encode(black), space.encode(white)
