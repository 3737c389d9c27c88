"""Which process trains which expert: a file per expert, kept fresh while its process lives."""

import os
import socket
import threading
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from dd_lightning.functional.errors import InputError

STALE_SECONDS = 60.0
"""A claim that was not renewed for so long is free, as is one of a process of this machine that is gone."""

_HEARTBEAT_SECONDS = 10.0


class Claims:
    """Claims on numbered work in a folder that several processes share; they need nothing but its file system.

    Two processes may, very rarely, both take over a claim whose owner died. They then make the same expert.

    Args:
        folder: Of the work; it is made if need be.

    Raises:
        InputError: If it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._held: set[Path] = set()
        self._stopped = threading.Event()
        self._owner = f"{socket.gethostname()} {os.getpid()}"

    def __enter__(self) -> Self:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._now()
        except OSError as error:
            raise InputError(
                f"the expert store {self.folder} cannot be written ({error.strerror}); choose another path"
            ) from error
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self.release()

    def take(self, ids: Iterable[int], count: int) -> list[int]:
        """Claim up to ``count`` of ``ids``, in their order, that no living process has claimed."""
        taken: list[int] = []
        for id in ids:
            if len(taken) == count:
                break
            if self._take(self._path(id)):
                taken.append(id)
        return taken

    def release(self) -> None:
        """Give all claims up."""
        while self._held:
            self._held.pop().unlink(missing_ok=True)

    def _path(self, id: int) -> Path:
        return self.folder / f".expert_{id:05d}.claim"

    def _take(self, path: Path) -> bool:
        if path in self._held:
            return True
        if path.exists() and self._is_stale(path):
            path.unlink(missing_ok=True)
        with suppress(FileExistsError), path.open("x") as file:
            file.write(self._owner)
            self._held.add(path)
            return True
        return False

    def _is_stale(self, path: Path) -> bool:
        try:
            host, _, number = path.read_text().partition(" ")
            age = self._now() - path.stat().st_mtime
        except OSError:  # it is gone just now
            return True
        if host == socket.gethostname() and number.isdigit():
            try:
                os.kill(int(number), 0)
            except ProcessLookupError:
                return True
            except PermissionError:
                pass
        return age > STALE_SECONDS

    def _now(self) -> float:
        """Return the time by the file system's clock, which need not be this machine's."""
        probe = self.folder / f".now.{uuid.uuid4().hex}.tmp"
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()

    def _beat(self) -> None:
        while not self._stopped.wait(_HEARTBEAT_SECONDS):
            for path in tuple(self._held):
                with suppress(OSError):
                    os.utime(path)
