"""Two orders of the same classes: labels are renumbered by name."""

from collections.abc import Sequence

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from dd_lightning.functional.errors import InputError


def renumbered(labels: Tensor, names: Sequence[str], wanted: Sequence[str], what: str, of: str) -> Tensor:
    """Return labels whose classes are numbered in the order of other data.

    Where all names are known, each class goes by its name. Names in the same place are taken for the same class, with
    a warning; plain numbers, as data without names have, are not compared.

    Args:
        labels: Class numbers, int64 ``[n]``.
        names: The name of each.
        wanted: The names in the order wanted.
        what: What is labelled, for messages.
        of: What has the order wanted, for messages.

    Raises:
        InputError: If a name is unknown and others are in another place.
    """
    if set(names) <= set(wanted):
        return torch.tensor([wanted.index(name) for name in names], device=labels.device)[labels]
    numbers = [str(number) for number in range(max(len(names), len(wanted)))]
    if list(names) == numbers[: len(names)] or list(wanted) == numbers[: len(wanted)]:
        return labels
    unknown = next(index for index, name in enumerate(names) if name not in wanted)
    moved = any(name in wanted and wanted.index(name) != index for index, name in enumerate(names))
    known = repr(wanted[unknown]) if unknown < len(wanted) else "no class"
    said = f"class {unknown} of {what} is {names[unknown]!r}, but {known} of {of}"
    if moved or len(names) > len(wanted):
        raise InputError(f"{said}; give data with the same class names")
    rank_zero_warn(f"{said}: they are taken for the same")
    return labels
