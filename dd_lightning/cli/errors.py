"""Errors as one line on stderr: for what a person gave, and never for a fault of our own."""

import errno
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException

from dd_lightning.functional.errors import DistillationError, InputError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _terminate(*_: object) -> NoReturn:
    raise SystemExit(128 + signal.SIGTERM)


def stop(message: str, status: int) -> NoReturn:
    """Print one line and exit: status 1 for bad input, 2 for an unknown option."""
    sys.stderr.write(f"dd-lightning: error: {' '.join(message.split())}\n")
    raise SystemExit(status)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Exit with one line where the input is at fault; any other exception is ours and keeps its traceback.

    SIGTERM ends in order, with status 143; Ctrl-C exits with 130, as programs do, where Lightning makes it 1.
    """
    with suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except KeyboardInterrupt:
        stop("interrupted", status=130)
    except SystemExit as ending:
        raise (SystemExit(130) if isinstance(ending.__context__, KeyboardInterrupt) else ending) from None
    except Exception as error:
        cause: BaseException | None = error
        # jsonargparse raises a ValueError of its own from what the class of an optional group raised.
        while isinstance(cause, ValueError) and not isinstance(cause, InputError):
            cause = cause.__cause__
        if not isinstance(cause, DistillationError | MisconfigurationException):
            raise
        stop(str(cause), status=1)


@contextmanager
def blame_paths(config: Namespace, output: str) -> Iterator[None]:
    """Turn an OSError about a path of the configuration into an InputError that names its option.

    Args:
        config: The resolved options.
        output: Key of the folder that the command writes to; it is named if a full disk's error names no file.
    """
    try:
        yield
    except OSError as error:
        key = _option_of(error, config)
        if key is None and error.errno in _NO_SPACE:
            key = output
        if key is None:
            raise
        remedy = "free some space there, or give another path" if error.errno in _NO_SPACE else "give another path"
        where = f" at {error.filename}" if error.filename else ""
        raise InputError(f"{key} is {config[key]!r}, but {error.strerror}{where}; {remedy}") from error


def _option_of(error: OSError, config: Namespace) -> str | None:
    """Return the key of the path that holds the file of an error, the longest if there are several."""
    if not isinstance(error.filename, str):
        return None
    file = Path(error.filename).absolute()
    values = {key: Path(value).absolute() for key, value in config.items() if isinstance(value, str) and value}
    holders = [key for key, path in values.items() if path == file or path in file.parents]
    return max(holders, key=lambda key: len(values[key].parts), default=None)
