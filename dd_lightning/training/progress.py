"""A progress bar for work that the Trainer does not show."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.progress import Progress

_SECONDS_BETWEEN_UPDATES = 0.25


class Show(Protocol):
    """Shows how much is done."""

    def __call__(self, done: int, title: str | None = None) -> None:
        """Move the bar to ``done``, under another title if one is given."""


@contextmanager
def epoch_bar(title: str, total: int, shown: bool = True) -> Iterator[Show]:
    """Show a bar that vanishes when the work is done; it may stand inside a Trainer's own (rich >= 14.1).

    Args:
        title: What is going on.
        total: Length of the bar.
        shown: If false, there is no bar.

    Yields:
        A function to be called with how much is done.
    """
    if not shown:
        yield lambda done, title=None: None
        return
    updated = 0.0
    with Progress(transient=True, refresh_per_second=4) as progress:
        task = progress.add_task(title, total=total)

        def show(done: int, title: str | None = None) -> None:
            nonlocal updated
            if (now := time.perf_counter()) - updated > _SECONDS_BETWEEN_UPDATES:
                updated = now
                progress.update(task, completed=done, description=title)

        yield show
