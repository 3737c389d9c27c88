"""ZCA matrices on disk: fitted once per training set, read back afterwards."""

import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from dd_lightning.functional.whitening import ZCA

_NAMES = ("mean", "whiten", "unwhiten")


def cached_zca(path: Path, dimension: int, fit: Callable[[], ZCA]) -> ZCA:
    """Return the matrices stored at ``path``, or fit and store them.

    The file appears whole or not at all, so runs that start together cannot read each other's half-written
    file. The cache only saves time: a damaged file is fitted anew and a folder that cannot be written is
    passed over, each with a warning.

    Args:
        path: The safetensors file; its name must identify the data that the matrices were fitted on.
        dimension: ``D = C * H * W``, the size that the matrices must have.
        fit: Fits the matrices: ``mean`` ``[D]``, ``whiten`` and ``unwhiten`` ``[D, D]``.
    """
    stored = _read(path, dimension)
    if stored is not None:
        return stored
    zca = fit()
    try:
        _write(path, zca)
    except OSError as error:
        warnings.warn(
            f"the ZCA matrices could not be stored at {path} ({error}); every run will fit them anew: "
            "set cache_dir to a folder that can be written",
            stacklevel=2,
        )
    return zca


def _read(path: Path, dimension: int) -> ZCA | None:
    try:
        if not path.exists():
            return None
        tensors = load_file(path)
        mean, whiten, unwhiten = (tensors[name] for name in _NAMES)
    except (OSError, SafetensorError, KeyError) as error:
        _warn_damaged(path, str(error))
        return None
    square = (dimension, dimension)
    if mean.shape != (dimension,) or whiten.shape != square or unwhiten.shape != square:
        _warn_damaged(path, f"the shapes do not fit D = {dimension}")
        return None
    if not all(bool(torch.isfinite(values).all()) for values in (mean, whiten, unwhiten)):
        _warn_damaged(path, "it holds numbers that are not finite")
        return None
    return ZCA(mean, whiten, unwhiten)


def _warn_damaged(path: Path, reason: str) -> None:
    warnings.warn(f"the ZCA cache {path} is damaged ({reason}) and is fitted anew", stacklevel=4)


def _write(path: Path, zca: ZCA) -> None:
    content = save({name: values.cpu().contiguous() for name, values in zip(_NAMES, zca, strict=True)})
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)  # noqa: PTH105  (atomic on one file system)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
