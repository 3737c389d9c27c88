"""Real data to evaluate a stored set on."""

from dataclasses import replace

from dd_lightning.datamodules.base import DistillationDataModule
from dd_lightning.datamodules.class_order import renumbered
from dd_lightning.functional.errors import InputError
from dd_lightning.sets.color_spaces import ZCARecipe, same_space
from dd_lightning.sets.real import RealSet
from dd_lightning.sets.synthetic_file import SyntheticFile


def evaluation_data(file: SyntheticFile, data: DistillationDataModule) -> tuple[SyntheticFile, RealSet]:
    """Return a stored set that can be decoded, and the test images in its color space and order of classes.

    A whitened set that was stored without its matrices takes those of ``data``, fitted with the set's split or read
    from the cache, if they come from the set's training data. Matrices of two machines agree to rounding only.

    Args:
        file: The set.
        data: The data it was distilled from; :meth:`~DistillationDataModule.refit` for a set without its matrices.

    Raises:
        InputError: If the data are missing, have other classes or shapes, or a whitened set has other training data.
    """
    unfitted = isinstance(file.space, ZCARecipe)
    if unfitted:
        data.refit("zca", file.val_fraction, file.split_seed)
    try:
        data.setup()
    except InputError as error:
        if not unfitted:
            raise
        raise InputError(
            f"the set was whitened, and stored without the matrices, which are fitted on the training data of "
            f"{file.dataset}: {error}"
        ) from error
    if (data.num_classes, data.image_shape) != (file.num_classes, tuple(file.images.shape[1:])):
        raise InputError(
            f"the set holds {file.num_classes} classes of {tuple(file.images.shape[1:])} images, but {data.name} has "
            f"{data.num_classes} of {data.image_shape}; give the data it was distilled from with --data"
        )
    if unfitted and (data.fingerprint != file.fingerprint or not same_space(file.space, data.space)):
        raise InputError(
            f"the set was whitened with training data of fingerprint {file.fingerprint}, but {data.name} has "
            f"{data.fingerprint}; give the data it was distilled from with --data"
        )
    if unfitted:
        file = replace(file, space=data.space)
    return file, _as_set(file, data, data.test, complete=False)


def training_data(file: SyntheticFile, data: DistillationDataModule) -> RealSet:
    """Return the training images that a set may have been distilled from, in its color space and order of classes.

    Args:
        file: The set, as :func:`evaluation_data` returned it.
        data: The data that were given there.

    Raises:
        InputError: If the data lack a class.
    """
    return _as_set(file, data, data.train, complete=True)


def _as_set(file: SyntheticFile, data: DistillationDataModule, real: RealSet, complete: bool) -> RealSet:
    images = real.images
    labels = renumbered(real.labels, data.class_names, file.class_names, data.name, "the set")
    if not same_space(file.space, data.space):
        images = file.space.encode(data.space.decode(images))
    return RealSet(images, labels, data.num_classes, complete=complete)
