"""Configuration files: found by path or by packaged name; names of earlier versions are understood or refused."""

import difflib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

import dd_lightning
from dd_lightning.functional.errors import InputError

_PACKAGE = Path(dd_lightning.__file__).parent
PACKAGED = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"
"""The package's configurations: inside it when installed from a wheel, beside it in a checkout."""

_MOST_BYTES, _MOST_VALUES = 1 << 18, 100_000
"""What a configuration may have; a resolved one has some 4,000 bytes and 150 values."""

_MOVED = {
    "model.objective": ("compile", "precision", "micro_batch", "memory_gb"),
    "model.pool": ("compile", "precision"),
    "model.pool.recipe": ("compile", "micro_batch"),
    "evaluation": ("compile",),
    "recipe": ("compile", "micro_batch"),
}
RENAMED = {
    f"{place}.{option}": f"execution.{option}"
    if place == "recipe"
    else f"model.execution.{option}, or for this part alone {place.removesuffix('.recipe')}.execution.{option}"
    for place, options in _MOVED.items()
    for option in options
} | {"evaluation.early_networks": "evaluation.num_networks_intermediate"}
"""Options of earlier versions, and what replaces them."""

_OLD_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "compile": ("off", False),
    "precision": ("float32",),
    "micro_batch": ("auto",),
    "memory_gb": (8.0,),
    "early_networks": (None,),
}


def current_names(text: str) -> str:
    """Replace the full path of a public class by the one that no move of files changes.

    Example:
        >>> current_names("--data=dd_lightning.data.digits.DigitsDataModule")
        '--data=dd_lightning.DigitsDataModule'
    """

    def replace(match: re.Match[str]) -> str:
        return f"dd_lightning.{match['name']}" if match["name"] in dd_lightning.__all__ else match[0]

    return re.sub(r"(?<![\w.])dd_lightning(?:\.[a-z_]\w*)+\.(?P<name>[A-Z]\w*)\b", replace, text)


def find_config(name: str) -> Path:
    """Return the configuration file at a path, or the packaged one of that name, with or without ``.yaml``.

    Raises:
        InputError: If there is none; the message has the nearest packaged name.
    """
    for path in (Path(name), PACKAGED / name, PACKAGED / f"{name}.yaml"):
        if path.is_file():
            return path
    if Path(name).is_dir():
        raise InputError(f"--config is {name!r}, which is a folder; give a YAML file")
    names = [path.relative_to(PACKAGED).with_suffix("").as_posix() for path in PACKAGED.rglob("*.yaml")]
    near = difflib.get_close_matches(name.removeprefix("configs/").removesuffix(".yaml"), names)
    hint = f"did you mean {' or '.join(near)}?" if near else "give a path, or a packaged name such as quickstart"
    raise InputError(f"--config is {name!r}, which is neither a file nor a packaged configuration; {hint}")


def resolve_args(args: Sequence[str]) -> list[str]:
    """Return command-line arguments with each ``--config`` read and the class paths of earlier versions replaced.

    Raises:
        InputError: If a configuration does not exist, or is no mapping.
    """
    resolved = []
    tokens = iter(args)
    for token in tokens:
        option, equals, value = token.partition("=")
        if option not in ("-c", "--config"):
            resolved.append(current_names(token))
        elif equals or (value := next(tokens, "")):
            resolved.append(f"--config={yaml.safe_dump(_read_config(value), sort_keys=False)}")
        else:
            resolved.append(token)
    return resolved


def _read_config(given: str) -> dict[str, Any]:
    """Return the options of a path, of a packaged name or of YAML text, without old defaults of renamed ones."""
    name = "--config" if ": " in given else given
    try:
        if name == given:
            with find_config(given).open("rb") as file:
                data = file.read(_MOST_BYTES + 1)
            if len(data) > _MOST_BYTES:
                raise InputError(f"--config is {name!r}, which is too long; it must have at most {_MOST_BYTES:,} bytes")
            given = data.decode()
        size = _count(yaml.compose(given, getattr(yaml, "CSafeLoader", yaml.SafeLoader)), {})
        if size > _MOST_VALUES:
            raise InputError(
                f"{name} has {size:,} values with its aliases written out; it must have at most {_MOST_VALUES:,}"
            )
        values = get_loader("yaml")(current_names(given))
    except OSError as error:
        raise InputError(f"--config is {name!r}, but {error.strerror}; give another path") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        why = " ".join(str(error).replace('in "<unicode string>",', "at").split())[:300]
        raise InputError(f"{name} is not YAML: {why}") from error
    if not isinstance(values, dict):
        raise InputError(f"{name} holds no options; it must be a YAML mapping, such as 'model: {{ipc: 1}}'")
    _drop_old_defaults(values)
    return values


def _count(node: yaml.Node | None, known: dict[int, float]) -> float:
    """Return the number of values below a node, those of aliases included: infinite if one is within itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        parts = node.value if isinstance(node, yaml.CollectionNode) else ()
        inner = [each for part in parts for each in (part if isinstance(part, tuple) else (part,))]
        known[id(node)] = 1 + sum(_count(each, known) for each in inner)
    return known[id(node)]


def _drop_old_defaults(values: dict[str, Any], prefix: str = "") -> None:
    """Remove renamed options at their old default: resolved configurations of earlier versions hold them all."""
    for name, value in list(values.items()):
        key = prefix if name == "init_args" else f"{prefix}{'.' * bool(prefix)}{name}"
        if isinstance(value, dict):
            _drop_old_defaults(value, key)
        elif key in RENAMED and value in _OLD_DEFAULTS[name]:
            del values[name]
