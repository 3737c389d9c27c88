"""Networks: how they are named and built, and how they become functions of a flat parameter vector."""

from dd_lightning.execution.precision import Parameters
from dd_lightning.networks.alexnet import AlexNet
from dd_lightning.networks.convnet import ConvNet
from dd_lightning.networks.densenet import DenseNet
from dd_lightning.networks.functional_network import FunctionalNetwork, training_loss
from dd_lightning.networks.registry import (
    NetworkFactory,
    NetworkSpec,
    build_network,
    known_names,
    network_name,
    register_family,
)
from dd_lightning.networks.resnet import ResNet
from dd_lightning.networks.vgg import VGG
from dd_lightning.networks.zoo import ZooNetwork

__all__ = [
    "VGG", "AlexNet", "ConvNet", "DenseNet", "FunctionalNetwork", "NetworkFactory", "NetworkSpec", "Parameters",
    "ResNet", "ZooNetwork", "build_network", "known_names", "network_name", "register_family", "training_loss",
]  # fmt: skip
