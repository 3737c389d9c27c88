"""Writing a file so that a reader sees the old one or the new one, never half of it."""

import os
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from dd_lightning.functional.errors import InputError

TEMPORARY_SUFFIX = ".tmp"
"""Ends the name of a file that is still being written; readers skip such names."""


def write_atomically(path: Path | str, data: bytes) -> None:
    """Put ``data`` at ``path``, replacing what is there in one step.

    The bytes go to a hidden file in the same directory (a rename across file systems would be a copy), are flushed to
    the disk, and only then take the name. A process killed in between leaves the old file as it was. Missing parent
    directories are made.

    Args:
        path: Where to.
        data: All bytes of the file.

    Raises:
        InputError: If the place cannot be written: no permission, no space, or a parent that is no directory.

    Example:
        >>> import tempfile
        >>> place = Path(tempfile.mkdtemp()) / "new" / "note.txt"
        >>> write_atomically(place, b"first")
        >>> write_atomically(place, b"second")
        >>> place.read_bytes(), [file.name for file in place.parent.iterdir()]
        (b'second', ['note.txt'])
    """
    write_all_atomically([(Path(path), data)])


def write_all_atomically(files: Iterable[tuple[Path, bytes]]) -> None:
    """Put several files in place, each atomically, and nearly at once.

    All are written in full under temporary names before the first takes its own, so a kill can only separate a few
    renames. If one cannot be written, none is replaced.

    Args:
        files: Paths and contents, taken one by one: an iterator that makes them need not hold them all.

    Raises:
        InputError: As for :func:`write_atomically`.
    """
    temporaries: dict[Path, Path] = {}
    target = Path()
    try:
        for target, data in files:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
            temporaries[target] = temporary
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for target, temporary in temporaries.items():
            temporary.replace(target)
    except OSError as error:
        raise InputError(
            f"cannot write {target}: {error.strerror or error}; free some space or choose a path that can be written"
        ) from error
    finally:
        for temporary in temporaries.values():
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
