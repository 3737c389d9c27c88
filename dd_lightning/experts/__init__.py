"""Experts: networks trained on the real data, whose weights after each epoch are kept."""

from dd_lightning.experts.training import (
    ExpertProgressBar,
    ExpertTraining,
    experts_together,
    micro_batch_of,
    train_experts,
)

__all__ = ["ExpertProgressBar", "ExpertTraining", "experts_together", "micro_batch_of", "train_experts"]
