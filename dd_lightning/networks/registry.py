"""Networks by name.

A network is named by a string such as ``ConvNet-3-W64`` or ``torchvision/resnet50``, by an import path such as
``my_package.models:tiny``, or is given as a factory. To add a family, write one file with a parser under
`register_family` and import it in the package's ``__init__``.
"""

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from torch import nn

from dd_lightning.functional.errors import InputError

NetworkFactory = Callable[[int, int, tuple[int, int]], nn.Module]
"""Builds a freshly initialized network from (channels, num_classes, image_size)."""

NetworkSpec = str | NetworkFactory
"""What a person may say where a network is wanted."""

FamilyParser = Callable[[Sequence[str]], tuple[str, NetworkFactory]]
"""Turns the name's parts after the family into the canonical name and the factory, or raises `InputError`."""


class _Family(NamedTuple):
    form: str
    parse: FamilyParser


_FAMILIES: dict[str, _Family] = {}


def register_family(family: str, form: str) -> Callable[[FamilyParser], FamilyParser]:
    """Register the parser under it for all names that start with ``family``.

    Args:
        family: First part of the name, up to the first hyphen; or up to the first slash and with it, for names
            whose parts are separated by slashes.
        form: What a full name looks like, for the message that lists the known names.

    Example:
        >>> @register_family("Linear", form="Linear")
        ... def parse(parts):
        ...     return "Linear", lambda channels, num_classes, image_size: nn.Sequential(
        ...         nn.Flatten(), nn.Linear(channels * image_size[0] * image_size[1], num_classes)
        ...     )
        >>> build_network("Linear", channels=1, num_classes=10, image_size=(8, 8))[1]
        Linear(in_features=64, out_features=10, bias=True)
        >>> del _FAMILIES["Linear"]
    """

    def register(parse: FamilyParser) -> FamilyParser:
        _FAMILIES[family] = _Family(form, parse)
        return parse

    return register


def known_names() -> tuple[str, ...]:
    """Return the forms of the names that are understood, sorted."""
    return tuple(sorted(family.form for family in _FAMILIES.values()))


def build_network(spec: NetworkSpec, channels: int, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
    """Build a freshly initialized network.

    Like any construction of a module, it draws from torch's global random state.

    Args:
        spec: A name, an import path ``package.module:function`` (or with a dot for the colon), or a factory.
        channels: Channels of the images.
        num_classes: Length of the network's output.
        image_size: ``(H, W)`` of the images.

    Raises:
        InputError: If the name is unknown, the path cannot be imported, or the factory returns no module.

    Example:
        >>> network = build_network("ConvNet-3-W32", channels=3, num_classes=10, image_size=(32, 32))
        >>> sum(p.numel() for p in network.parameters())
        24714
    """
    name, factory = _resolve(spec)
    network = factory(channels, num_classes, image_size)
    if not isinstance(network, nn.Module):
        raise InputError(f"network {name!r} gave a {type(network).__name__}: its factory must return a torch.nn.Module")
    return network


def network_name(spec: NetworkSpec) -> str:
    """Return the name under which results and stored experts of a network are filed.

    Names of one network are brought to one form: suffixes in a fixed order, defaults left out.

    Args:
        spec: As for `build_network`.

    Raises:
        InputError: If the name is unknown or the path cannot be imported.

    Example:
        >>> network_name("ConvNet-3-BN-W64-AP")
        'ConvNet-3-W64-BN'
    """
    return _resolve(spec)[0]


def _resolve(spec: NetworkSpec) -> tuple[str, NetworkFactory]:
    if not isinstance(spec, str):
        return _factory_name(spec), spec
    if "/" in spec:  # first, since a package's model may have a dot in its name
        package, *parts = spec.split("/")
        family = f"{package}/"
    elif ":" in spec or "." in spec:
        return _import_factory(spec)
    else:
        family, *parts = spec.split("-")
    if family not in _FAMILIES:
        raise InputError(
            f"unknown network {spec!r}: say one of {', '.join(known_names())}, "
            "or the import path of a factory, package.module:function"
        )
    return _FAMILIES[family].parse(parts)


def _factory_name(factory: Callable[..., nn.Module]) -> str:
    if isinstance(factory, partial):  # by its arguments too: two partials of one function are two networks
        bound = [*map(repr, factory.args), *(f"{key}={value!r}" for key, value in factory.keywords.items())]
        return f"{_factory_name(factory.func)}({', '.join(bound)})"
    named = factory if hasattr(factory, "__qualname__") else type(factory)
    return f"{named.__module__}:{named.__qualname__}"


def _import_factory(path: str) -> tuple[str, NetworkFactory]:
    module_name, _, attribute = path.partition(":") if ":" in path else path.rpartition(".")
    canonical = f"{module_name}:{attribute}"
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
    return canonical, factory
