"""DC, DSA and DM: ``res_*.pt``, a dictionary whose ``data`` has one pair of images and labels per experiment.

The images are normalized channels. Accuracies lie beside them as NumPy scalars.
"""

from pathlib import Path

import numpy as np
import torch

from dd_lightning.functional.errors import InputError
from dd_lightning.sets.foreign.content import ForeignSet, Wanted, load_tensors, tensors_of

_SCALARS = [np._core.multiarray.scalar, np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType]  # type: ignore[attr-defined]


def read(path: Path, wanted: Wanted) -> ForeignSet:
    """Read the last experiment of a file."""
    del wanted
    names = [(_SCALARS[0], "numpy.core.multiarray.scalar"), *_SCALARS]  # its name before NumPy 2 as well
    with torch.serialization.safe_globals(names):
        content = load_tensors(path)
    try:
        images, labels = content["data"][-1]
    except (TypeError, KeyError, IndexError, ValueError) as error:
        raise InputError(f"{path} has no 'data' with images and labels, as DC writes it; is --format right?") from error
    images, labels = tensors_of(path, images, labels)
    return ForeignSet(images, labels, "normalized")
