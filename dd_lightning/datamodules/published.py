"""Reading the published data sets through torchvision, as whole tensors, with one-line errors."""

import os
import pickle
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any

from dd_lightning.functional.errors import InputError

_UNREADABLE = (OSError, EOFError, KeyError, ValueError, AssertionError, pickle.UnpicklingError, HTTPException)


def read_published(
    title: str,
    root: Path,
    files: str,
    dataset: Callable[..., Any],
    download: bool,
    remedy: str = "delete it to fetch it again",
) -> Any:  # noqa: ANN401  (torchvision ships no types)
    """Read a data set, fetching it only if none of it is there.

    Args:
        title: What the data set is called in messages.
        root: Folder to look in.
        files: The file or folder below ``root`` that the data set consists of.
        dataset: Reads what is there; raises ``RuntimeError`` if it is missing or fails its check. Called with
            ``download=True``, it fetches first.
        download: Whether to fetch.
        remedy: What to do about files that fail the check. They may be somebody's own, so no download overwrites them.

    Raises:
        InputError: If the data are missing, fail their check, or cannot be read or fetched; it names the absolute path.
    """
    folder = root.absolute()
    if folder.exists() and not (folder.is_dir() and os.access(folder, os.R_OK | os.X_OK)):
        raise InputError(f"root {folder} is not a folder that can be read: change root or its permissions")
    place = folder / files
    try:
        return dataset()
    except RuntimeError:
        pass  # missing, or not the published files
    except _UNREADABLE as error:
        raise InputError(
            f"{title} in {place} cannot be read ({_first_line(error)}): delete it to fetch it again"
        ) from error
    if _holds_data(place):
        raise InputError(f"{title} in {place} is incomplete or differs from the published files: {remedy}")
    if not download:
        raise InputError(
            f"{title} is not in {place} and download is off: set root to the folder that holds it, or download to true"
        )
    try:
        return dataset(download=True)
    except (RuntimeError, *_UNREADABLE) as error:
        raise InputError(
            f"{title} is not in {place} and could not be fetched ({_first_line(error)}): copy it there or set root to "
            "the folder that holds it"
        ) from error


def _holds_data(place: Path) -> bool:
    """Tell whether a download could overwrite data; torchvision checks archives itself before it unpacks them."""
    return place.is_file() or (place.is_dir() and any(file.suffix != ".gz" for file in place.iterdir()))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__
