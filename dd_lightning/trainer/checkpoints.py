"""Checkpoint files that are either whole or not there."""

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from dd_lightning.distillation import CHECKPOINT_FORMAT
from dd_lightning.functional.errors import InputError
from dd_lightning.sets.atomic_write import write_atomically


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written beside their destination and moved into place, and checked when read.

    Lightning writes through the system's temporary folder: a copy that a full disk tears, under its final name.
    Remote paths (``s3://...``) are left to Lightning.
    """

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | Path,
        storage_options: Any | None = None,  # noqa: ANN401  (Lightning's own signature)
    ) -> None:
        """Write a checkpoint.

        Raises:
            InputError: If it cannot be written: the path and what to do.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomically(path, buffer.getvalue())

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint, tensors and plain values only unless ``weights_only`` is false.

        Raises:
            InputError: If it is damaged.
        """
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only)
        return read_checkpoint(path, map_location, weights_only is not False)


def read_checkpoint(
    path: str | Path, map_location: Callable[..., Any] | str | None = "cpu", weights_only: bool = True
) -> dict[str, Any]:
    """Read a checkpoint file, comparing every checksum in it, which ``torch.load`` does not.

    Raises:
        InputError: If it is no checkpoint of a distillation run, or damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        checkpoint = None if damaged else torch.load(path, map_location=map_location, weights_only=weights_only)
    except FileNotFoundError:
        raise InputError(f"--ckpt_path is {str(path)!r}, which is no file; give a checkpoint, or 'last'") from None
    except Exception as error:  # a damaged file raises a different one for each way of damage
        raise InputError(_damaged(path, type(error).__name__)) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("distillation"), dict):
        raise InputError(_damaged(path, f"checksum of {damaged}" if damaged else "no run in it"))
    return checkpoint


def reopen_epoch(checkpoint: dict[str, Any]) -> None:
    """Let training go on after a checkpoint's last finished step, wherever in Lightning's loops it was written.

    A run is one epoch of steps; at its end, or by an exception within a step, Lightning writes loop counters with which
    it would stop at once or count a step twice.
    """
    if "loops" not in checkpoint:  # weights only
        return
    fit = checkpoint["loops"]["fit_loop"]
    steps = checkpoint["global_step"]
    begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    taken = {"ready": steps, "started": steps, "processed": steps, "completed": steps - 1}  # within on_train_batch_end
    fit["epoch_progress"] = {"total": begun, "current": dict(begun)}
    fit["epoch_loop.batch_progress"] = {"total": taken, "current": dict(taken), "is_last_batch": False}
    fit["epoch_loop.state_dict"]["_batches_that_stepped"] = steps - 1


def check_format(state: dict[str, Any] | None) -> dict[str, Any]:
    """Return a checkpoint's state of a run, or refuse one that is none or of another format.

    Raises:
        InputError: It names both versions.
    """
    if state is None:
        raise InputError("the checkpoint holds no distillation run; give one that DistillationModule wrote")
    version = state.get("format_version", 1)
    if version != CHECKPOINT_FORMAT:
        raise InputError(
            f"the checkpoint has format {version}, but this dd_lightning reads format {CHECKPOINT_FORMAT}; resume it "
            "with the version that wrote it"
        )
    return state


def _damaged(path: str | Path, why: str) -> str:
    return (
        f"--ckpt_path is {str(path)!r}, which is damaged or no checkpoint of a distillation run ({why}); give another "
        "one, or 'last'"
    )
