"""ZCA matrices on disk: fitted once per training set, read back afterwards."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dd_lightning.functional.errors import InputError
from dd_lightning.functional.whitening import ZCA
from dd_lightning.sets.atomic_write import write_atomically
from dd_lightning.sets.synthetic_file import checksum


def cached_zca(path: Path, mean: Tensor, fit: Callable[[], ZCA]) -> ZCA:
    """Return the matrices stored at ``path``, or fit and store them.

    Runs that start together never read each other's half-written file. The cache only saves time: a damaged file is
    fitted anew and a folder that cannot be written is skipped, each with a warning.

    Args:
        path: The safetensors file; its name must identify the data that the matrices were fitted on.
        mean: Of the data, ``[D]``: stored matrices must be of the same.
        fit: Fits the matrices: ``mean`` ``[D]``, ``whiten`` and ``unwhiten`` ``[D, D]``.
    """
    try:
        if path.exists():
            return _read(path, mean)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        warnings.warn(f"the ZCA cache {path} is damaged ({str(error)[:200]}) and is fitted anew", stacklevel=2)
    zca = fit()
    tensors = {name: values.cpu().contiguous() for name, values in zca._asdict().items()}
    try:
        sums = {name: checksum(tensor) for name, tensor in tensors.items()}
        write_atomically(path, save(tensors, {"checksums": json.dumps(sums)}))
    except InputError as error:
        warnings.warn(
            f"the ZCA matrices could not be stored ({error}); every run will fit them anew: set cache_dir to a folder "
            "that can be written",
            stacklevel=2,
        )
    return zca


def _read(path: Path, mean: Tensor) -> ZCA:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in ZCA._fields}
        metadata = file.metadata()  # none in files of before
    if metadata and json.loads(metadata["checksums"]) != {name: checksum(tensor) for name, tensor in tensors.items()}:
        raise ValueError("a checksum differs")
    zca, dimension = ZCA(*(tensors[name] for name in ZCA._fields)), len(mean)
    square = (dimension, dimension)
    if zca.mean.shape != square[:1] or zca.whiten.shape != square or zca.unwhiten.shape != square:
        raise ValueError(f"the shapes do not fit D = {dimension}")
    if not all(bool(torch.isfinite(values).all()) for values in zca):
        raise ValueError("it holds numbers that are not finite")
    if not torch.allclose(zca.mean.to(mean), mean, atol=1e-4):
        raise ValueError("it was fitted on other data")
    return zca
