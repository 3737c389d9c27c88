"""Writing a file so that a reader sees the old one or the new one, never half of it."""

import os
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from dd_lightning.functional.errors import InputError


def write_atomically(path: Path | str, data: bytes) -> None:
    """Put ``data`` at ``path``, replacing what is there in one step; missing parent directories are made.

    The bytes go to a hidden file in the same directory (a rename across file systems would be a copy), are flushed to
    the disk, and only then take the name.

    Raises:
        InputError: If the place cannot be written: no permission, no space, or a parent that is no directory.
    """
    write_all_atomically([(Path(path), data)])


def write_all_atomically(files: Iterable[tuple[Path, bytes]]) -> None:
    """Put files in place, from an iterator of paths and contents: each atomically, and nearly at once.

    All are written in full under temporary names before the first takes its own, so a kill can only separate a few
    renames. If one cannot be written, which is an `InputError`, none is replaced.
    """
    temporaries: dict[Path, Path] = {}
    target = Path()
    try:
        for target, data in files:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporaries[target] = temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
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
