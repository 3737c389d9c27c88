"""Where candidates come from."""

from dd_lightning.pools.base import (
    Candidate,
    CandidateKey,
    CandidatePool,
    PoolSetup,
    Process,
    SingleProcess,
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
    "Process",
    "SingleProcess",
    "TrajectoryPool",
    "TrajectorySegment",
    "teacher_logits",
]
