"""Matching objectives: (S, T, candidate) -> matching loss.

Every file of this folder is imported, so that the command line knows the classes in it by their names.
"""

from importlib import import_module
from pkgutil import iter_modules

from dd_lightning.objectives.base import MatchingObjective, Problem, ScoredCandidate, Workload
from dd_lightning.objectives.bidirectional_matching import BidirectionalMatching
from dd_lightning.objectives.distribution_matching import DistributionMatching
from dd_lightning.objectives.gradient_matching import GradientMatching
from dd_lightning.objectives.trajectory_matching import TrajectoryMatching

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")

__all__ = [
    "BidirectionalMatching",
    "DistributionMatching",
    "GradientMatching",
    "MatchingObjective",
    "Problem",
    "ScoredCandidate",
    "TrajectoryMatching",
    "Workload",
]
