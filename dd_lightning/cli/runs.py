"""Folders of runs: ``<runs>/<name>/version_k``."""

import os
import re
from contextlib import suppress
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from dd_lightning.functional.errors import InputError
from dd_lightning.trainer.checkpoints import read_checkpoint

_VERSION = re.compile(r"version_(\d+)$")
_STEP = re.compile(r"step=(\d+)")


def run_folder(runs: str, name: str) -> Path:
    """Make the folder of all versions of a run, and fail now rather than after hours if it cannot be written.

    Raises:
        InputError: If it cannot be made or written, or does not lie below ``runs``.
    """
    if not runs:
        raise InputError("--runs is ''; give the folder of all runs")
    if not Path(name).parts or Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError(f"--name is {name!r}; give a name, which becomes a folder below --runs")
    return writable(Path(runs) / name, "run folder", "--runs")


def writable(folder: Path, what: str, option: str) -> Path:
    """Make a folder, and fail now rather than after hours if it cannot be written: with an `InputError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"the {what} {folder.resolve()} cannot be written ({error.strerror}); choose another with {option}"
        ) from error
    return folder


def new_version(folder: Path) -> Path:
    """Make the folder of a run's next version: one that no other run takes that starts at the same moment.

    Only the first process of a run makes one; the others are told its place by Lightning.
    """
    number = max((_number(_VERSION, path.name) for path in _versions(folder)), default=-1)
    while True:
        number += 1
        version = folder / f"version_{number}"
        if getattr(rank_zero_only, "rank", 0):
            return version
        with suppress(FileExistsError):
            version.mkdir()
            return version


def checkpoint_path(given: str | None, *folders: Path) -> str | None:
    """Return the checkpoint to resume from.

    Args:
        given: A path, ``last`` or None.
        folders: Where to look for ``last``.

    Raises:
        InputError: If there is none, or it is damaged.
    """
    if given is None:
        return None
    if given == "last":
        return str(last_checkpoint(*folders))
    read_checkpoint(given)
    return given


def last_checkpoint(*folders: Path) -> Path:
    """Return the newest readable checkpoint of the newest version that has one, in the first folder that has any.

    Lightning's own ``last`` looks only into the new version, which is empty, and starts over.

    Args:
        folders: ``<runs>/<name>``, and other ones of the run.

    Raises:
        InputError: If no version has a readable checkpoint.
    """
    for version in (version for folder in folders for version in _versions(folder)):
        checkpoints = sorted(
            (version / "checkpoints").glob("*.ckpt"), key=lambda path: _number(_STEP, path.name), reverse=True
        )
        for checkpoint in checkpoints:
            with suppress(InputError):
                read_checkpoint(checkpoint)
                return checkpoint
    raise InputError(
        f"--ckpt_path is 'last', but no run under {folders[0].resolve()} has a readable checkpoint; "
        "leave --ckpt_path out to start anew, or name the run with --name"
    )


def synthetic_file(path: Path) -> Path:
    """Return the synthetic set at a path: a file, or the folder of a run or of one of its versions.

    Args:
        path: Of a folder with several versions, the newest one that has a set counts.

    Raises:
        InputError: If a folder holds no set.
    """
    if not path.is_dir():
        return path
    for folder in (path, *_versions(path)):
        if (file := folder / "synthetic.safetensors").is_file():
            return file
    raise InputError(f"{path} holds no synthetic.safetensors, nor does any version_* in it; give the folder of a run")


def _versions(folder: Path) -> list[Path]:
    """Return the versions of a run, newest first."""
    versions = [path for path in folder.glob("version_*") if _VERSION.search(path.name)]
    return sorted(versions, key=lambda path: _number(_VERSION, path.name), reverse=True)


def _number(pattern: re.Pattern[str], name: str) -> int:
    match = pattern.search(name)
    return int(match.group(1)) if match else -1
