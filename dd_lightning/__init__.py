"""Dataset distillation for PyTorch Lightning."""

from dd_lightning.callbacks import EvalCallback, SyntheticSetWriter, TrajectorySelectionCallback
from dd_lightning.datamodules import (
    CIFAR10DataModule,
    CIFAR100DataModule,
    DatasetDataModule,
    DigitsDataModule,
    DistillationDataModule,
    FashionMNISTDataModule,
    ImageFolderDataModule,
    MNISTDataModule,
    SVHNDataModule,
    SyntheticDataModule,
    import_set,
)
from dd_lightning.functional.errors import InputError
from dd_lightning.module import DistillationModule
from dd_lightning.objectives import (
    BidirectionalMatching,
    BilevelUnroll,
    DistributionMatching,
    GradientMatching,
    TrajectoryMatching,
)
from dd_lightning.pools import NetworkPool, TrajectoryPool
from dd_lightning.sets.foreign import export_set
from dd_lightning.sets.synthetic_file import load_synthetic, save_synthetic
from dd_lightning.training.evaluation import EvaluationRecipe, evaluate_synthetic_set
from dd_lightning.training.recipes import ExpertRecipe, NetworkRecipe
from dd_lightning.version import __version__

__all__ = [
    "BidirectionalMatching",
    "BilevelUnroll",
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "DatasetDataModule",
    "DigitsDataModule",
    "DistillationDataModule",
    "DistillationModule",
    "DistributionMatching",
    "EvalCallback",
    "EvaluationRecipe",
    "ExpertRecipe",
    "FashionMNISTDataModule",
    "GradientMatching",
    "ImageFolderDataModule",
    "InputError",
    "MNISTDataModule",
    "NetworkPool",
    "NetworkRecipe",
    "SVHNDataModule",
    "SyntheticDataModule",
    "SyntheticSetWriter",
    "TrajectoryMatching",
    "TrajectoryPool",
    "TrajectorySelectionCallback",
    "__version__",
    "evaluate_synthetic_set",
    "export_set",
    "import_set",
    "load_synthetic",
    "save_synthetic",
]
