"""A bar for work that no Trainer shows."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import Progress

_SECONDS_BETWEEN_UPDATES = 0.25


@contextmanager
def epoch_bar(title: str, epochs: int, shown: bool = True) -> Iterator[Callable[[int], None] | None]:
    """Show a bar that vanishes when the work is done; it may stand inside a Trainer's own.

    Args:
        title: What is going on.
        epochs: Length of the bar.
        shown: If false there is no bar, and None instead of the function.

    Yields:
        A function to be called with the number of epochs done.
    """
    if not shown:
        yield None
        return
    updated = 0.0
    with Progress(transient=True, refresh_per_second=4) as progress:
        task = progress.add_task(title, total=epochs)

        def on_epoch(done: int) -> None:
            nonlocal updated
            if (now := time.perf_counter()) - updated > _SECONDS_BETWEEN_UPDATES:
                updated = now
                progress.update(task, completed=done)

        yield on_epoch
