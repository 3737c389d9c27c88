"""Networks: how they are named and built, and how they become functions of a flat parameter vector."""

from dd_lightning.networks.convnet import ConvNet
from dd_lightning.networks.functional_network import FunctionalNetwork, Parameters, training_loss
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
    "Parameters",
    "build_network",
    "known_names",
    "network_name",
    "register_family",
    "training_loss",
]
