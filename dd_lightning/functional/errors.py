"""What goes wrong, by kind: a person reads one line and knows the option, its value, the limit and the fix."""

import math
from collections.abc import Collection
from numbers import Real


class DistillationError(Exception):
    """Base of the errors that a person can act on; the command line prints them as one line."""


class InputError(DistillationError, ValueError):
    """An option, a file or data that cannot be used as given."""


class DivergenceError(DistillationError, RuntimeError):
    """A loss, a gradient or weights are no longer finite."""


class OutOfMemoryError(DistillationError, RuntimeError):
    """An allocation failed."""


def check_choice(option: str, value: object, choices: Collection[str]) -> None:
    """Raise `InputError` if the value of an option is none of the choices."""
    if value not in choices:
        raise InputError(f"{option} is {repr(value)[:100]}; use one of {', '.join(choices)}")


def check_range(
    option: str,
    value: float | None,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    exclude_low: bool = False,
    exclude_high: bool = False,
    hint: str = "",
) -> None:
    """Refuse a number outside a range, or one that is not finite; None, an option left out, passes.

    Limits belong to the range unless they are excluded; the hint says what to use instead, such as a usual value.

    Raises:
        InputError: If it lies outside.

    Example:
        >>> check_range("ipc", 0, low=1, hint="10 is usual")
        Traceback (most recent call last):
        ...
        dd_lightning.functional.errors.InputError: ipc is 0; it must be at least 1 (10 is usual)
    """
    if value is None:
        return
    if not isinstance(value, Real):
        raise InputError(f"{option} is {value!r}; it must be a number")
    above = value > low if exclude_low else value >= low
    below = value < high if exclude_high else value <= high
    if above and below and math.isfinite(value):
        return
    limits = []
    if low > -math.inf:
        limits.append(f"above {low:g}" if exclude_low else f"at least {low:g}")
    if high < math.inf:
        limits.append(f"below {high:g}" if exclude_high else f"at most {high:g}")
    limit = " and ".join(limits) or "a finite number"
    raise InputError(f"{option} is {value:g}; it must be {limit}" + (f" ({hint})" if hint else ""))
