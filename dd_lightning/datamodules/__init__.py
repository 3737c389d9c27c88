"""Data modules: real data as tensors on the device, and a loader of step numbers."""

from dd_lightning.datamodules.base import DistillationDataModule
from dd_lightning.datamodules.by_name import datamodule_by_name
from dd_lightning.datamodules.cifar import CIFAR10DataModule, CIFAR100DataModule
from dd_lightning.datamodules.dataset import DatasetDataModule
from dd_lightning.datamodules.digits import DigitsDataModule
from dd_lightning.datamodules.foreign import import_set
from dd_lightning.datamodules.held_out import evaluation_data, training_data
from dd_lightning.datamodules.image_folder import ImageFolderDataModule
from dd_lightning.datamodules.mnist import FashionMNISTDataModule, MNISTDataModule
from dd_lightning.datamodules.steps import StepLoader
from dd_lightning.datamodules.svhn import SVHNDataModule
from dd_lightning.datamodules.synthetic import SyntheticDataModule

__all__ = [
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "DatasetDataModule",
    "DigitsDataModule",
    "DistillationDataModule",
    "FashionMNISTDataModule",
    "ImageFolderDataModule",
    "MNISTDataModule",
    "SVHNDataModule",
    "StepLoader",
    "SyntheticDataModule",
    "datamodule_by_name",
    "evaluation_data",
    "import_set",
    "training_data",
]
