"""Matching objectives: (S, T, candidate) -> matching loss.

Every file of this folder is imported, so that the command line knows the classes in it by their names.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import Literal

from dd_lightning.functional.errors import InputError, check_choice
from dd_lightning.objectives.base import MatchingObjective, Problem, ScoredCandidate, Workload, check_method
from dd_lightning.objectives.bidirectional_matching import BidirectionalMatching
from dd_lightning.objectives.distribution_matching import DistributionMatching
from dd_lightning.objectives.gradient_matching import GradientMatching
from dd_lightning.objectives.trajectory_matching import TrajectoryMatching

for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")

ObjectiveName = Literal["mtt", "idc", "dream_plus", "dm"]

NAMED: dict[ObjectiveName, type[MatchingObjective]] = {
    "mtt": TrajectoryMatching,
    "idc": GradientMatching,
    "dream_plus": BidirectionalMatching,
    "dm": DistributionMatching,
}
"""Published methods by the names of their configurations."""


def make_objective(given: object) -> MatchingObjective:
    """Return an objective as it is, or by its name with its defaults.

    Raises:
        InputError: If it is neither.
    """
    if isinstance(given, MatchingObjective):
        return given
    if isinstance(given, type):
        raise InputError(f"objective is the class {given.__name__}; make one of it: {given.__name__}()")
    check_choice("objective", given, NAMED)
    return NAMED[given]()  # type: ignore[index]  # just checked


__all__ = [
    "BidirectionalMatching",
    "DistributionMatching",
    "GradientMatching",
    "MatchingObjective",
    "ObjectiveName",
    "Problem",
    "ScoredCandidate",
    "TrajectoryMatching",
    "Workload",
    "check_method",
    "make_objective",
]
