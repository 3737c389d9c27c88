"""Runs on several processes, for ``test_processes.py``: each rank writes its images after each step, and what it did.

python -m tests.several_processes DEVICES OUT CASE...

KILL=rank:step kills a rank within a step. A case that has a checkpoint is resumed.
"""

import os
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from dd_lightning.callbacks import SyntheticSetWriter, TrajectorySelectionCallback
from dd_lightning.execution.process import SingleProcess
from dd_lightning.module import DistillationModule
from dd_lightning.objectives import (
    BidirectionalMatching,
    DistributionMatching,
    GradientMatching,
    MatchingObjective,
    ScoredCandidate,
    TrajectoryMatching,
    student,
)
from dd_lightning.objectives.class_statistics import ClassMatching
from dd_lightning.objectives.student import Student
from dd_lightning.pools import NetworkPool, TrajectoryPool, TrajectorySegment
from dd_lightning.training import evaluation, experts
from tests import small

STEPS = 4
DONE: Counter[str] = Counter()
"""What this rank has computed in a case."""


class Alone(TrajectoryMatching):
    """An objective that knows nothing of several processes."""

    def score(self, problem: Any, *given: Any, **options: Any) -> list[ScoredCandidate]:  # noqa: ANN401
        return super().score(replace(problem, process=SingleProcess()), *given, **options)


class BrokenOnOneRank(TrajectoryPool):
    """On rank 1, the target of the second step's candidate is NaN."""

    loads = 0

    def load(self, key: Any) -> TrajectorySegment:  # noqa: ANN401
        segment = super().load(key)
        self.loads += 1
        if self.loads == 2 and torch.distributed.get_rank() == 1:
            return TrajectorySegment(key, segment.start, segment.target * float("nan"))
        return segment


def experts_of(store: Path, objective: MatchingObjective | None = None, **options: Any) -> DistillationModule:  # noqa: ANN401
    settings: dict[str, Any] = {"objective": objective or TrajectoryMatching(syn_steps=3), "student_lr_lr": 1e-4}
    return small.module(store, **settings | options)


def live(objective: MatchingObjective, **pool: Any) -> DistillationModule:  # noqa: ANN401
    options: dict[str, Any] = {"num_networks": 3, "age_limit": 2, **pool}
    return small.network_module(options, objective=objective, factor=2, image_space="pixels")


def representative(cls: type[BidirectionalMatching]) -> BidirectionalMatching:
    return cls(batch_real=8, sampling="representative", interval=2)


Case = tuple[Callable[[Path], DistillationModule], TrajectorySelectionCallback | None]
CASES: dict[str, Callable[[], Case]] = {
    "mtt": lambda: (experts_of, None),
    "mtt, selection": lambda: (experts_of, small.selection(num_candidates=3)),
    "mtt, batched": lambda: (experts_of, small.selection(num_candidates=3)),
    "mtt, refreshed": lambda: (experts_of, small.selection(num_candidates=3, refresh_per_step=1)),
    "mtt, held": lambda: (experts_of, small.selection(num_candidates=3, every_n_steps=2)),
    "mtt, first steps": lambda: (experts_of, small.selection(num_candidates=3, score_steps=2)),
    "mtt, threshold": lambda: (
        lambda store: experts_of(store, TrajectoryMatching(syn_steps=3, loss_threshold=1.0)),
        small.selection(num_candidates=3),
    ),
    "mtt, soft": lambda: (
        lambda store: experts_of(store, labels="soft", label_lr=0.1),
        small.selection(num_candidates=2),
    ),
    "mtt, Adam": lambda: (
        lambda store: experts_of(store, image_optimizer="adam", image_lr=0.01, equal_norm=True),
        small.selection(num_candidates=2),
    ),
    "alone": lambda: (lambda store: experts_of(store, Alone(syn_steps=3)), small.selection(num_candidates=2)),
    "idc": lambda: (lambda store: live(GradientMatching(batch_real=8), refresh="all"), None),
    "idc, selection": lambda: (
        lambda store: live(GradientMatching(batch_real=8), refresh="candidates"),
        small.selection(num_candidates=2),
    ),
    "dream_plus": lambda: (
        lambda store: live(representative(BidirectionalMatching), pretrain_epochs=1),
        small.selection(num_candidates=2),
    ),
    "dm": lambda: (
        lambda store: live(DistributionMatching(batch_real=8), refresh="none"),
        small.selection(num_candidates=2),
    ),
    "average": lambda: (lambda store: experts_of(store, processes="average"), small.selection(num_candidates=2)),
    "broken": lambda: (
        lambda store: experts_of(
            store,
            pool=BrokenOnOneRank(str(store), small.EXPERTS, 1, small.EPOCHS, recipe=small.RECIPE),
            processes="average",
            on_nonfinite="skip",
        ),
        None,
    ),
}


class Steps(Callback):
    """Keeps what is learned after each step."""

    def __init__(self) -> None:
        self.learned: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
        if os.environ.get("KILL") == f"{trainer.global_rank}:{trainer.global_step}":
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_start(self, *_: object) -> None:
        DONE["classes"] = 0  # without those that measured the memory of a step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        learned = [p.detach().flatten() for p in pl_module.parameters()]
        self.learned.append(torch.cat(learned).clone())


def counted(owner: Any, name: str, what: str, count: Callable[..., int]) -> None:  # noqa: ANN401
    original = getattr(owner, name)

    def wrapped(*given: Any, **options: Any) -> Any:  # noqa: ANN401
        DONE[what] += count(*given, **options)
        return original(*given, **options)

    setattr(owner, name, wrapped)


def run(devices: int, out: Path, name: str) -> None:
    DONE.clear()
    setattr(student, "batching_pays", lambda *_: name == "mtt, batched")  # noqa: B010  (the module does not export it)
    make, choice = CASES[name]()
    distilled, steps = make(out / f"store-{devices}"), Steps()
    curve = small.evaluation(every_n_steps=2, epochs=1, num_networks=5)
    saves = ModelCheckpoint(out / name, "{step}", every_n_train_steps=2)
    callbacks = [steps, curve, SyntheticSetWriter(every_n_steps=2), saves]
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_steps=STEPS,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks + ([choice] if choice else []),
        logger=CSVLogger(str(out / f"{name}-{devices}"), name="run"),
        use_distributed_sampler=False,
    )
    saved = sorted((out / name).glob("*.ckpt"))
    trainer.fit(distilled, datamodule=small.data(), ckpt_path=saved[-1] if saved else None)
    result = {
        "steps": torch.stack(steps.learned),
        "done": dict(DONE),
        "accuracies": [point.accuracies for point in curve.points],
        "skipped": distilled.distillation.skipped_steps,
        "pool": [member.theta for member in getattr(distilled.pool, "_members", [])],
        "files": sorted(path.name for path in (out / f"{name}-{devices}" / "run" / "version_0").iterdir()),
    }
    torch.save(result, out / f"{name}-{devices}-{trainer.global_rank}.pt")


def main(devices: str, out: str, *names: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    counted(Student, "unroll", "students", lambda self, synthetic, thetas, steps: len(thetas))
    counted(ClassMatching, "matched", "classes", lambda *_: 1)
    counted(ClassMatching, "compared", "classes", lambda *_: 1)
    counted(NetworkPool, "_train", "updates", lambda *_: 1)
    counted(evaluation, "train_fresh_networks", "evaluated", lambda i, t, lr, network, recipe, count, *_: count)
    counted(experts._Group, "__init__", "experts", lambda self, job, ids: len(ids))
    for name in names:
        run(int(devices), Path(out), name)


if __name__ == "__main__":
    main(*sys.argv[1:])
