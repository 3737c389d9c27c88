"""Where candidates come from."""

from dd_lightning.pools.base import (
    Candidate,
    CandidateKey,
    CandidatePool,
    PoolSetup,
    teacher_logits,
)
from dd_lightning.pools.network_pool import LiveNetwork, NetworkPool
from dd_lightning.pools.trajectory_pool import TrajectoryPool, TrajectorySegment

__all__ = [
    "Candidate",
    "CandidateKey",
    "CandidatePool",
    "LiveNetwork",
    "NetworkPool",
    "PoolSetup",
    "TrajectoryPool",
    "TrajectorySegment",
    "teacher_logits",
]
