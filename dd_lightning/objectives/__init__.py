"""Matching objectives: (S, T, candidate) -> matching loss."""

from dd_lightning.objectives.base import MatchingObjective, ScoredCandidate
from dd_lightning.objectives.trajectory_matching import TrajectoryMatching

__all__ = ["MatchingObjective", "ScoredCandidate", "TrajectoryMatching"]
