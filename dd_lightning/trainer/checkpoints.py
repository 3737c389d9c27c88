"""Checkpoint files that are either whole or not there, and modules that come back from them."""

import io
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule

from dd_lightning.distillation import CHECKPOINT_FORMAT
from dd_lightning.functional.errors import DistillationError, InputError
from dd_lightning.networks.registry import is_import_path
from dd_lightning.sets.atomic_write import write_atomically
from dd_lightning.sets.synthetic import SyntheticSet


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
            return super().load_checkpoint(path, map_location, weights_only is not False)
        return read_checkpoint(path, map_location, weights_only is not False)


class SavedModule(LightningModule):
    """A LightningModule with a synthetic set that comes back from a file only if that is whole.

    Nothing is imported because a file names it.
    """

    synthetic: SyntheticSet | None

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:  # noqa: ANN401
        """Return the module that a checkpoint holds; arguments are Lightning's, then options in place of saved ones.

        Raises:
            InputError: If the file is damaged or no checkpoint of a run, or names a class or a network of your own,
                which you then pass yourself.
        """
        kwargs.setdefault("weights_only", True)
        with explained_content(checkpoint_path):
            if isinstance(checkpoint_path, str | Path) and "://" not in str(checkpoint_path):
                saved = read_checkpoint(checkpoint_path, weights_only=kwargs["weights_only"])["hyper_parameters"]
                if "network" not in kwargs and is_import_path(saved["network"]):
                    raise InputError(
                        f"network is {saved['network']!r}, and no code is imported because a file names it; pass "
                        "network=... yourself"
                    )
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Restore the images, in a module that has none yet as well."""
        if self.synthetic is None:
            self.synthetic = SyntheticSet.from_state(state_dict, prefix="synthetic.")
        return super().load_state_dict(state_dict, *args, **kwargs)


@contextmanager
def explained_content(path: str | Path) -> Iterator[None]:
    """Make an `InputError` of whatever is raised where a checkpoint does not hold what it should."""
    try:
        yield
    except DistillationError:
        raise
    except Exception as error:  # each missing or odd value raises another one
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"{path} does not hold such a module ({why}); give a checkpoint that `fit` wrote") from error


def read_checkpoint(
    path: str | Path, map_location: Callable[..., Any] | str | None = "cpu", weights_only: bool = True
) -> dict[str, Any]:
    """Read a checkpoint file, comparing every checksum in it, which ``torch.load`` does not.

    Raises:
        InputError: If it is no checkpoint of a distillation run, or damaged.
    """
    try:
        if not Path(path).is_file():  # a pipe would be waited for
            raise FileNotFoundError
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        checkpoint = None if damaged else torch.load(path, map_location=map_location, weights_only=weights_only)
    except FileNotFoundError:
        raise InputError(f"--ckpt_path is {str(path)!r}, which is no file; give a checkpoint, or 'last'") from None
    except Exception as error:  # a damaged file raises a different one for each way of damage
        raise InputError(_damaged(path, type(error).__name__)) from error
    parts: dict[str, Any] = checkpoint if isinstance(checkpoint, dict) else {}
    if not all(isinstance(parts.get(name), dict) for name in ("distillation", "state_dict")):
        raise InputError(_damaged(path, f"checksum of {damaged}" if damaged else "no run in it"))
    return parts


def reopen_epoch(checkpoint: dict[str, Any]) -> None:
    """Let training go on after a checkpoint's last finished step, wherever in Lightning's loops it was written.

    A run is one epoch of steps; at its end, or by an exception within a step, Lightning writes loop counters with which
    it would stop at once or count a step twice. ``max_time`` is that of each fit: with the time of before, a run that
    it stopped could not go on.
    """
    checkpoint.get("callbacks", {}).pop("Timer", None)
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
            f"the checkpoint has format {str(version)[:40]}, but this dd_lightning reads format {CHECKPOINT_FORMAT}; "
            "resume it with the version that wrote it"
        )
    return state


def _damaged(path: str | Path, why: str) -> str:
    return (
        f"--ckpt_path is {str(path)!r}, which is damaged or no checkpoint of a distillation run ({why}); give another "
        "one, or 'last'"
    )
