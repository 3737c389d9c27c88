"""Networks by name.

A network is a name such as ``ConvNet-3-W64`` or ``torchvision/resnet50``, an import path such as
``my_package.models:tiny``, or a factory. To add a family, write one file that calls `register_names` (or
`register_family`, for names of another form) and import it in the package's ``__init__``.
"""

import importlib
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from dd_lightning.functional.errors import InputError

NetworkFactory = Callable[[int, int, tuple[int, int]], nn.Module]
"""Builds a freshly initialized network from (channels, num_classes, image_size)."""

NetworkSpec = str | NetworkFactory
"""What names a network: a name, an import path or a factory."""

FamilyParser = Callable[[Sequence[str]], tuple[str, NetworkFactory]]


_FAMILIES: dict[str, tuple[str, FamilyParser]] = {}  # forms and parsers


def register_family(family: str, form: str, parse: FamilyParser) -> None:
    """Register a parser for all names that start with ``family``.

    Args:
        family: First part of the name, up to the first hyphen; or up to and with the first slash.
        form: What a full name looks like, for messages.
        parse: Turns the name's other parts into the canonical name and the factory, or raises `InputError`.

    Example:
        >>> def linear(channels, num_classes, image_size):
        ...     return nn.Sequential(nn.Flatten(), nn.Linear(channels * image_size[0] * image_size[1], num_classes))
        >>> register_family("Linear", "Linear", lambda parts: ("Linear", linear))
        >>> build_network("Linear", channels=1, num_classes=10, image_size=(8, 8))[1]
        Linear(in_features=64, out_features=10, bias=True)
        >>> del _FAMILIES["Linear"]
    """
    _FAMILIES[family] = (form, parse)


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit()


class Suffix(NamedTuple):
    """One thing that a name may say after its family and depth.

    Attributes:
        option: The constructor's option that it sets, such as ``norm``.
        default: What holds where a name says nothing, such as ``IN``.
        words: What each word means; empty for a number after the default's first letter.
    """

    option: str
    default: str
    words: Mapping[str, Any] = {}

    def read(self, part: str) -> str | None:
        """Return the choice in its canonical form, or None if the part is about something else."""
        if part and part in self.words:
            return part
        if not self.words and part[:1] == self.default[0] and _is_count(part[1:]):
            return f"{self.default[0]}{int(part[1:])}"
        return None


def register_names(
    network: type[nn.Module], form: str, suffixes: Sequence[Suffix] = (), depths: Collection[int] | None = ()
) -> None:
    """Register the names of a family: its class's name, a depth, and suffixes in any order.

    Args:
        network: The class. It is built with ``depth``, if there is more than one, and the suffixes' options.
        form: What a full name looks like, for messages.
        suffixes: What may be said, in the canonical order.
        depths: The depths that a name may give; none at all if empty, any if None.
    """
    family = network.__name__

    def parse(parts: Sequence[str]) -> tuple[str, NetworkFactory]:
        name, canonical, options = "-".join([family, *parts]), [family], dict[str, Any]()
        if depths is None or depths:
            if not parts or not _is_count(parts[0]):
                raise InputError(f"network {name!r} has no depth: the form is {form}")
            depth, *parts = int(parts[0]), *parts[1:]
            if depths is not None and depth not in depths:
                allowed = " or ".join(map(str, depths))
                raise InputError(f"network {name!r} has depth {depth}: use {allowed}; the form is {form}")
            canonical.append(str(depth))
            if depths is None or len(depths) > 1:
                options["depth"] = depth
        said: dict[str, str] = {}
        for part in parts:
            choice = {suffix.option: word for suffix in suffixes if (word := suffix.read(part)) is not None}
            if not choice:
                raise InputError(f"network {name!r} has the unknown suffix {part!r}: the form is {form}")
            ((option, word),) = choice.items()
            if option in said:
                raise InputError(f"network {name!r} gives its {option} twice: keep one of {said[option]} and {word}")
            said |= choice
        for suffix in suffixes:
            word = said.get(suffix.option, suffix.default)
            options[suffix.option] = suffix.words[word] if suffix.words else int(word[1:])
            canonical += [word] * (word != suffix.default)
        return "-".join(canonical), partial(network, **options)

    register_family(family, form, parse)


def known_names() -> tuple[str, ...]:
    """Return the forms of all known names, sorted."""
    return tuple(sorted(form for form, _ in _FAMILIES.values()))


def build_network(spec: NetworkSpec, channels: int, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
    """Build a freshly initialized network; like any module's construction, it draws from torch's global random state.

    Args:
        spec: A name, an import path ``package.module:function`` (or with a dot for the colon), or a factory.
        channels: Channels of the images.
        num_classes: Length of the network's output.
        image_size: ``(H, W)`` of the images.

    Raises:
        InputError: If the name is unknown, the path cannot be imported, or the factory returns no module.
    """
    name, factory = _resolve(spec)
    try:
        return factory(channels, num_classes, image_size)
    except (RuntimeError, MemoryError) as error:  # weights that no memory holds
        line = " ".join(str(error).split())[:120]
        raise InputError(f"network {name!r} cannot be built ({line}): give a narrower one") from error


def is_import_path(spec: NetworkSpec) -> bool:
    """Tell whether a spec is the path of a factory, which is imported, and not a name or a factory."""
    return isinstance(spec, str) and "/" not in spec and (":" in spec or "." in spec)


def network_name(spec: NetworkSpec) -> str:
    """Return the one name under which a network's results and stored experts are filed: options in order, no defaults.

    Raises:
        InputError: If the name is unknown or the path cannot be imported.

    Example:
        >>> network_name("ConvNet-3-BN-W64-AP")
        'ConvNet-3-W64-BN'
    """
    return _resolve(spec)[0]


def _resolve(spec: NetworkSpec) -> tuple[str, NetworkFactory]:
    if not isinstance(spec, str):
        return _checked(_factory_name(spec), spec)
    if "/" in spec:  # first: a package's model may have a dot in its name
        package, *parts = spec.split("/")
        family = f"{package}/"
    elif is_import_path(spec):
        return _checked(*_import_factory(spec))
    else:
        family, *parts = spec.split("-")
    if family not in _FAMILIES:
        raise InputError(
            f"unknown network {spec!r}: use one of {', '.join(known_names())}, or the import path of a factory, "
            "package.module:function"
        )
    return _FAMILIES[family][1](parts)


def _checked(name: str, factory: Callable[..., Any]) -> tuple[str, NetworkFactory]:
    """Return somebody's factory so that its failures are one line; a model of torchvision or timm goes by its name."""
    package = f"{name.partition('.')[0]}/"
    if package in _FAMILIES and inspect.isfunction(factory):
        return _FAMILIES[package][1]([factory.__name__])
    if isinstance(factory, nn.Module):
        raise InputError(f"network is a {name} that was built already; give its class or a function: all start afresh")

    def build(channels: int, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
        given = f"channels {channels}, num_classes {num_classes}, image_size {image_size}"
        try:
            network = factory(channels, num_classes, image_size)
        except InputError:
            raise
        except Exception as error:
            line = (str(error).splitlines() or [""])[0]
            raise InputError(
                f"network {name!r} fails with {type(error).__name__} ({line}): a factory is called with {given}"
            ) from error
        if not isinstance(network, nn.Module):
            raise InputError(f"network {name!r} gave a {type(network).__name__}: it must return a torch.nn.Module")
        return network

    return name, build


def _factory_name(factory: Callable[..., nn.Module]) -> str:
    if isinstance(factory, partial):  # two partials of one function are two networks
        bound = [*map(repr, factory.args), *(f"{key}={value!r}" for key, value in factory.keywords.items())]
        return f"{_factory_name(factory.func)}({', '.join(bound)})"
    named = factory if hasattr(factory, "__qualname__") else type(factory)
    return f"{named.__module__}:{named.__qualname__}"


def _import_factory(path: str) -> tuple[str, NetworkFactory]:
    module_name, _, attribute = path.partition(":") if ":" in path else path.rpartition(".")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"cannot import network {path!r} ({error}): give the path of a factory as package.module:function"
        ) from error
    if not callable(factory):
        raise InputError(
            f"network {path!r} is a {type(factory).__name__}: it must be a function of "
            "(channels, num_classes, image_size)"
        )
    return f"{module_name}:{attribute}", factory
