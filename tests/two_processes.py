"""A run on two processes, for ``test_processes.py``: each rank writes what it has learned.

python -m tests.two_processes STORE OUT
"""

import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from dd_lightning.callbacks import SyntheticSetWriter
from dd_lightning.objectives import TrajectoryMatching
from dd_lightning.pools import CandidateKey, TrajectoryPool, TrajectorySegment
from tests import small

STEPS = 4


class BrokenOnOneRank(TrajectoryPool):
    """On rank 1, the target of the second step's candidate is NaN."""

    loads = 0

    def load(self, key: CandidateKey) -> TrajectorySegment:
        segment = super().load(key)
        self.loads += 1
        if self.loads == 2 and torch.distributed.get_rank() == 1:
            return TrajectorySegment(key, segment.start, segment.target * float("nan"))
        return segment


def main(store: str, out: str) -> None:
    warnings.simplefilter("ignore")
    pool = BrokenOnOneRank(store, small.EXPERTS, 1, small.EPOCHS, recipe=small.RECIPE)
    objective = TrajectoryMatching(syn_steps=2)
    distilled = small.module(Path(store), pool=pool, objective=objective, on_nonfinite="skip")
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=STEPS,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=CSVLogger(out, name="run"),
        callbacks=[small.evaluation(every_n_steps=2, epochs=1), SyntheticSetWriter(every_n_steps=2)],
        use_distributed_sampler=False,
    )
    trainer.fit(distilled, datamodule=small.data())
    images, student_lr = small.learned(distilled)
    run = distilled.distillation
    result = {"images": images, "student_lr": student_lr, "skipped": run.skipped_steps, "steps": trainer.global_step}
    torch.save(result, Path(out) / f"rank-{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
