"""Networks: how they are named and built, and how they become functions of a flat parameter vector."""

from dd_lightning.networks.convnet import ConvNet
from dd_lightning.networks.functional_network import FunctionalNetwork
from dd_lightning.networks.registry import (
    NetworkFactory,
    NetworkSpec,
    build_network,
    known_names,
    network_name,
    register_family,
)

__all__ = [
    "ConvNet",
    "FunctionalNetwork",
    "NetworkFactory",
    "NetworkSpec",
    "build_network",
    "known_names",
    "network_name",
    "register_family",
]
