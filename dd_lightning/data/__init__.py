"""Data modules: real data as tensors on the device, and a loader of step numbers."""

from dd_lightning.data.base import DistillationDataModule
from dd_lightning.data.by_name import datamodule_by_name
from dd_lightning.data.cifar import CIFAR10DataModule, CIFAR100DataModule
from dd_lightning.data.dataset import DatasetDataModule
from dd_lightning.data.digits import DigitsDataModule
from dd_lightning.data.image_folder import ImageFolderDataModule
from dd_lightning.data.mnist import FashionMNISTDataModule, MNISTDataModule
from dd_lightning.data.steps import StepLoader
from dd_lightning.data.svhn import SVHNDataModule

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
    "datamodule_by_name",
]
