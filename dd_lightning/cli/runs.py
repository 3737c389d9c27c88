"""Folders of runs: ``<runs>/<name>/version_k``."""

import os
import re
from pathlib import Path

import torch

from dd_lightning.functional.errors import InputError

_VERSION = re.compile(r"version_(\d+)$")
_STEP = re.compile(r"step=(\d+)")


def check_writable(folder: Path) -> None:
    """Make a folder, and fail now rather than after hours if nothing can be written there.

    Raises:
        InputError: If it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"the run folder {folder.resolve()} cannot be written ({error.strerror}); choose another with --runs"
        ) from error


def last_checkpoint(folder: Path) -> Path:
    """Return the newest readable checkpoint of the newest version that has one.

    Lightning's own ``last`` looks only into the new version, which is empty, and starts over.

    Args:
        folder: ``<runs>/<name>``.

    Raises:
        InputError: If no version has a readable checkpoint.
    """
    versions = [path for path in folder.glob("version_*") if _VERSION.search(path.name)]
    for version in sorted(versions, key=lambda path: _number(_VERSION, path.name), reverse=True):
        checkpoints = sorted(
            (version / "checkpoints").glob("*.ckpt"), key=lambda path: _number(_STEP, path.name), reverse=True
        )
        for checkpoint in checkpoints:
            if is_checkpoint(checkpoint):
                return checkpoint
    raise InputError(
        f"--ckpt_path is 'last', but no run under {folder.resolve()} has a readable checkpoint; "
        "leave --ckpt_path out to start anew, or name the run with --name"
    )


def _number(pattern: re.Pattern[str], name: str) -> int:
    match = pattern.search(name)
    return int(match.group(1)) if match else -1


def is_checkpoint(path: Path) -> bool:
    """Tell whether a file is a whole checkpoint of a distillation run."""
    try:
        checkpoint = torch.load(path, weights_only=True, map_location="cpu")
    except Exception:  # noqa: BLE001, RUF100  (a damaged zip raises a different error for each way of damage)
        return False
    return "distillation" in checkpoint
