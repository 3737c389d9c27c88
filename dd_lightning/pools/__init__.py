"""Where candidates come from."""

from dd_lightning.pools.base import Candidate, CandidateKey, CandidatePool, FullSetAccuracies, PoolSetup
from dd_lightning.pools.network_pool import LiveNetwork, NetworkPool
from dd_lightning.pools.trajectory_pool import TrajectoryPool, TrajectorySegment

__all__ = [
    "Candidate",
    "CandidateKey",
    "CandidatePool",
    "FullSetAccuracies",
    "LiveNetwork",
    "NetworkPool",
    "PoolSetup",
    "TrajectoryPool",
    "TrajectorySegment",
]
