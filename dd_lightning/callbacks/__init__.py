"""Lightning callbacks: selection, evaluation, files."""

from dd_lightning.callbacks.accuracy_curve import EvaluationPoint
from dd_lightning.callbacks.evaluation import EvalCallback
from dd_lightning.callbacks.progress import StepProgressBar
from dd_lightning.callbacks.selection import TrajectorySelectionCallback
from dd_lightning.callbacks.writer import SyntheticSetWriter

__all__ = ["EvalCallback", "EvaluationPoint", "StepProgressBar", "SyntheticSetWriter", "TrajectorySelectionCallback"]
