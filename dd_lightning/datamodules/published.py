"""Reading the published data sets through torchvision, as whole tensors, with one-line errors."""

import os
import pickle
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any

from dd_lightning.functional.errors import InputError

_UNREADABLE = (OSError, EOFError, KeyError, ValueError, pickle.UnpicklingError, HTTPException)


def read_published(
    title: str,
    root: Path,
    files: str,
    read: Callable[[], Any],
    fetch: Callable[[], Any] | None,
    remedy: str | None,
) -> Any:  # noqa: ANN401  (torchvision ships no types)
    """Read a data set, fetching it only when it is not there.

    Args:
        title: What the data set is called in messages.
        root: Folder to look in.
        files: The file or folder below ``root`` that the data set consists of.
        read: Reads what is there; raises ``RuntimeError`` when it is missing or fails its check.
        fetch: Downloads and reads; ``None`` when downloading is not wanted.
        remedy: What to do about files that are there but fail the check of ``read``. They may be somebody's
            own, so a download must not overwrite them. ``None`` where ``read`` compares no checksums.

    Raises:
        InputError: If the data are missing, fail their check, cannot be read or cannot be fetched; the line
        names
            the absolute path.
    """
    place = root.absolute()
    if place.exists() and not (place.is_dir() and os.access(place, os.R_OK | os.X_OK)):
        raise InputError(f"root {place} is not a folder that can be read: change root or its permissions")
    try:
        return read()
    except RuntimeError:
        pass  # missing, or not the published files
    except _UNREADABLE as error:
        raise InputError(
            f"{title} in {place / files} cannot be read ({_first_line(error)}): delete it and fetch it again"
        ) from error
    if remedy is not None and (place / files).exists():
        raise InputError(f"{title} in {place / files} is incomplete or differs from the published files: {remedy}")
    if fetch is None:
        raise InputError(
            f"{title} is not in {place / files} and download is off: set root to the folder that holds it, "
            "or download to true"
        )
    try:
        return fetch()
    except (RuntimeError, *_UNREADABLE) as error:
        raise InputError(
            f"{title} is not in {place / files} and could not be fetched ({_first_line(error)}): "
            "copy it there or set root to the folder that holds it"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__
