"""Progress of long work: bars in a terminal, a line now and then in a file."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol

import rich
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column

_SECONDS_BETWEEN_UPDATES = 0.25
_SECONDS_BETWEEN_LINES = 30.0
_LOGGERS = ("lightning", "lightning.pytorch", "lightning.fabric")

_active: Progress | None = None


class Show(Protocol):
    """Shows how much is done."""

    def __call__(self, done: int, title: str | None = None) -> None:
        """Move the bar to ``done``, under another title if one is given."""


@contextmanager
def live_progress() -> Iterator[Progress]:
    """Yield the one display of bars; two would overwrite each other. It is disabled unless it can move.

    Messages, also those of Lightning's loggers, appear above the bars.
    """
    global _active
    if _active is not None:
        yield _active
        return
    console = rich.get_console()
    title = TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis"))
    columns = (title, BarColumn(bar_width=None), TaskProgressColumn(), TimeRemainingColumn())
    live = console.is_interactive or console.is_jupyter
    progress = Progress(*columns, console=console, transient=True, expand=True, refresh_per_second=4, disable=not live)
    handlers = [handler for name in _LOGGERS for handler in logging.getLogger(name).handlers]
    streams = [each for each in handlers if isinstance(each, logging.StreamHandler)]
    with ExitStack() as stack:
        stack.enter_context(progress)
        for handler in streams if live else ():  # rich has replaced what they were made with
            if (before := handler.setStream(sys.stderr)) is not None:
                stack.callback(handler.setStream, before)
        _active = progress
        try:
            yield progress
        finally:
            _active = None


@contextmanager
def epoch_bar(title: str, total: int, shown: bool = True) -> Iterator[Show]:
    """Show a bar that vanishes when the work is done; where none can move, a line every 30 seconds.

    Args:
        title: What is going on.
        total: Length of the bar.
        shown: If false, nothing is shown.

    Yields:
        A function to be called with how much is done.
    """
    if not shown:
        yield lambda done, title=None: None
        return
    with live_progress() as progress:
        task = progress.add_task(title, total=total)
        interval = _SECONDS_BETWEEN_LINES if progress.disable else _SECONDS_BETWEEN_UPDATES
        updated = time.perf_counter() if progress.disable else 0.0
        name = title

        def show(done: int, title: str | None = None) -> None:
            nonlocal updated, name
            name = title or name
            if (now := time.perf_counter()) - updated > interval:
                updated = now
                progress.update(task, completed=done, description=name)
                if progress.disable:
                    print(f"{name}: {done / max(total, 1):.0%}", flush=True)  # noqa: T201

        try:
            yield show
        finally:
            progress.remove_task(task)
