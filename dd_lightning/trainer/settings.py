"""A run's settings as plain values: what a checkpoint records, and a resumed run is held against."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from dd_lightning.execution.options import Execution
from dd_lightning.functional.errors import InputError
from dd_lightning.objectives import MatchingObjective
from dd_lightning.pools import CandidatePool
from dd_lightning.training.recipes import ExpertRecipe, NetworkRecipe

MAY_CHANGE = (
    "model.image_lr",
    "model.student_lr_lr",
    "model.label_lr",
    "model.student_lr_floor",
    "model.on_nonfinite",
    "model.pool.path",
    "model.pool.train_missing",
    "model.pool.skip_damaged",
)
"""What a resumed run may have otherwise, besides every ``execution``: it is applied from its first step on."""


def as_plain(value: Any) -> Any:  # noqa: ANN401  (whatever an option may be)
    """Return an option's value as numbers, words, lists and dictionaries; a dataclass names its class."""
    if is_dataclass(value) and not isinstance(value, type):
        options = {field.name: as_plain(getattr(value, field.name)) for field in fields(value) if field.init}
        return {"class": _name(type(value)), **options}
    if isinstance(value, Mapping):
        return {str(key): as_plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(each) for each in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return _name(value if hasattr(value, "__qualname__") else type(value))


def from_plain(option: str, value: Any) -> Any:  # noqa: ANN401
    """Return what :func:`as_plain` was given: only our own classes, since a file must not choose what is run.

    Args:
        option: Name of the option, for messages.
        value: Its plain value.

    Raises:
        InputError: If it names another class, or its options do not fit.
    """
    if not isinstance(value, Mapping) or "class" not in value:
        return value
    known = {cls.__name__: cls for base in (MatchingObjective, CandidatePool) for cls in _subclasses(base)}
    known |= {"Execution": Execution, "ExpertRecipe": ExpertRecipe, "NetworkRecipe": NetworkRecipe}
    name = value["class"]
    if name not in known:
        raise InputError(
            f"{option} is of class {name!r}, which is not one of dd_lightning's, and no class is imported because a "
            f"file names it; pass {option}=... yourself"
        )
    try:
        return known[name](**{key: from_plain(key, each) for key, each in value.items() if key != "class"})
    except TypeError as error:
        raise InputError(f"{option} does not fit {name}: {error}; pass {option}=... yourself") from error


def run_settings(
    options: Mapping[str, Any],
    objective: MatchingObjective,
    pool: CandidatePool,
    fingerprint: str,
    selection: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return all that makes a run what it is, by the options' names.

    Args:
        options: The module's, as plain values.
        objective: As it is now.
        pool: As it is now.
        fingerprint: Of the training data and their color space.
        selection: Its options as plain values; None without one.
    """
    parts = {"objective": as_plain(objective), "pool": as_plain(pool)}
    model = {name: value for name, value in options.items() if name != "seed"}  # the checkpoint's own is used
    return {"model": model | parts, "data": {"fingerprint": fingerprint}, "selection": as_plain(selection)}


def check_same_run(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to resume with settings that are not those of the checkpoint's run.

    Raises:
        InputError: It names each difference.
    """
    before, after = dict(_flat(saved)), dict(_flat(now))
    changed = [key for key in (before | after) if before.get(key) != after.get(key)]
    replaced = tuple(key.removesuffix("class") for key in changed if key.endswith(".class"))  # with all their options
    differences = [
        f"{key} is {after.get(key)!r}, but the checkpoint's run has {before.get(key)!r}"
        for key in changed
        if not _may_change(key, before.get(key), after.get(key))
        and (key.endswith(".class") or not key.startswith(replaced))
    ]
    if differences:
        raise InputError(f"{'; '.join(differences)}: resume with the run's own settings, or start anew")


def _may_change(key: str, before: object, after: object) -> bool:
    if key.endswith("_lr") and (before == 0) != (after == 0):
        return False  # whether something is learned at all
    return key in MAY_CHANGE or "execution" in key.split(".")


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        else:
            yield name, value


def _subclasses(base: type) -> Iterator[type]:
    cls: type
    for cls in base.__subclasses__():
        if cls.__module__.startswith("dd_lightning."):
            yield cls
        yield from _subclasses(cls)


def _name(value: Any) -> str:  # noqa: ANN401  (a class or a function)
    inside = value.__module__.startswith("dd_lightning.")
    return str(value.__qualname__) if inside else f"{value.__module__}:{value.__qualname__}"
