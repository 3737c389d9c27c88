"""Distilled sets in the formats of other projects: one file per format."""

from collections.abc import Callable
from pathlib import Path

from dd_lightning.functional.errors import InputError, check_choice
from dd_lightning.sets.atomic_write import write_all_atomically
from dd_lightning.sets.foreign import dc, ddranking, folder, grid, huggingface, idc, mtt, pt
from dd_lightning.sets.foreign.content import ForeignSet, ForeignSpace, Wanted
from dd_lightning.sets.synthetic_file import SyntheticFile

READERS: dict[str, Callable[[Path, Wanted], ForeignSet]] = {
    "mtt": mtt.read,
    "idc": idc.read,
    "dc": dc.read,
    "ddranking": ddranking.read,
    "folder": folder.read,
    "grid": grid.read,
    "pt": pt.read,
}
WRITERS: dict[str, Callable[[Path, SyntheticFile], dict[Path, bytes]]] = {
    "folder": folder.write,
    "hf": huggingface.write,
    "pt": pt.write,
    "grid": grid.write,
    "mtt": mtt.write,
    "idc": idc.write,
    "ddranking": ddranking.write,
}


def export_set(synthetic: SyntheticFile, format: str, path: Path | str) -> list[Path]:
    """Write a set in another format, and return the files that were written.

    Args:
        synthetic: The set; :func:`~dd_lightning.datamodules.evaluation_data` completes one that needs its matrices.
        format: ``folder``, ``hf``, ``pt``, ``grid``, ``mtt``, ``idc`` or ``ddranking``.
        path: A file for ``pt``, ``grid`` and ``idc``, else a folder.

    Raises:
        InputError: If the format is unknown or cannot hold the set, or there is something at the path.
    """
    check_choice("format", format, WRITERS)
    path = Path(path)
    if path.exists() and (path.is_file() or any(path.iterdir())):
        raise InputError(f"{path} exists; give a new path")
    files = WRITERS[format](path, synthetic)
    write_all_atomically(files.items())
    return list(files)


__all__ = ["READERS", "WRITERS", "ForeignSet", "ForeignSpace", "Wanted", "export_set"]
