"""Two processes against one: the time of candidates, classes, experts and evaluations that are shared.

Two threads of one core are no two processors, so the benchmark first measures r, the time of two independent one-thread
jobs together over that of one. Sharing everything perfectly would take r / 2 of one process's time. Rounds take turns,
and each figure is the median over rounds of the ratio within a round.

    python benchmarks/processes.py --out benchmarks/results/processes_cpu.json
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import TensorDataset

from dd_lightning import (
    DatasetDataModule,
    DistillationModule,
    EvalCallback,
    EvaluationRecipe,
    ExpertRecipe,
    GradientMatching,
    NetworkPool,
    NetworkRecipe,
    TrajectoryMatching,
    TrajectoryPool,
    TrajectorySelectionCallback,
)

CLASSES, PER_CLASS = 10, 64


def data(size: int) -> DatasetDataModule:
    """Return noise, of which the time does not depend."""
    images = torch.rand(CLASSES * PER_CLASS, 3, size, size, generator=torch.Generator().manual_seed(0))
    items = TensorDataset(images, torch.arange(len(images)) % CLASSES)
    return DatasetDataModule(items, items)


class Clock(Callback):
    """Seconds of setup (experts), of steps after the first, and of evaluations."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()
        self._evaluating = 0.0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Start at the end of the first step, stop at the end of the last."""
        if trainer.global_step == 1:
            self._started = time.perf_counter()
        elif trainer.global_step == trainer.max_steps:
            self.seconds["steps"] = time.perf_counter() - self._started


def worker(kind: str, devices: int, folder: Path, network: str, size: int) -> None:
    """Run one kind of work on some processes, and write its seconds."""
    warnings.simplefilter("ignore")
    recipe = ExpertRecipe(batch_size=64)
    pool = TrajectoryPool(str(folder / "experts"), 2, 1, 2, recipe=recipe)
    objective: Any = TrajectoryMatching(syn_steps=10)
    steps, callbacks, clock = 5, list[Callback](), Clock()
    if kind == "classes":
        objective = GradientMatching(batch_real=32)
        live: Any = NetworkPool(refresh="none", recipe=NetworkRecipe(batch_size=64))
    else:
        live = pool
    if kind == "candidates":
        callbacks.append(TrajectorySelectionCallback(2))
    if kind == "experts":
        live = TrajectoryPool(str(folder / f"new-{devices}-{time.time_ns()}"), 2, 2, 1, recipe=recipe)
        steps = 1
    evaluation = EvalCallback(
        every_n_steps=10**6, num_networks=4, recipe=EvaluationRecipe(epochs=40, lr=0.01), compare_random=False
    )
    if kind == "evaluation":
        callbacks.append(evaluation)
        steps = 1
    module = DistillationModule(objective, live, network=network, ipc=1, image_lr=1e-6, student_lr_lr=0.0)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_steps=steps,
        callbacks=[clock, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    trainer.fit(module, datamodule=data(size))
    if trainer.is_global_zero:
        seconds = {
            "candidates": clock.seconds.get("steps", 0.0),
            "classes": clock.seconds.get("steps", 0.0),
            "experts": module.pool.summary().get("seconds_training_experts", 0.0),
            "evaluation": evaluation.seconds if kind == "evaluation" else 0.0,
        }[kind]
        (folder / "seconds.json").write_text(json.dumps(seconds))


def job(size: int) -> float:
    """Return the seconds of a one-thread job."""
    images, weights = torch.rand(64, 32, size, size), torch.rand(32, 32, 3, 3)
    started = time.perf_counter()
    for _ in range(60):
        torch.nn.functional.conv2d(images, weights, padding=1)
    return time.perf_counter() - started


def started(*words: str) -> "subprocess.Popen[str]":
    """Start this file with arguments, on one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: "subprocess.Popen[str]") -> str:
    """Wait for it, and return what it printed."""
    out, error = process.communicate()
    if process.returncode != 0:
        raise SystemExit(error[-3000:])
    return out


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="ConvNet-3-W32")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", nargs=3, metavar=("KIND", "DEVICES", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--job", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print(job(args.size))
        return
    if args.worker:
        worker(args.worker[0], int(args.worker[1]), Path(args.worker[2]), args.network, args.size)
        return
    size = ["--network", args.network, "--size", str(args.size)]
    ratios: dict[str, list[float]] = {"r": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for _ in range(args.rounds):
            alone = float(ended(started("--job", *size)))
            pair = [started("--job", *size) for _ in range(2)]
            ratios["r"].append(max(float(ended(each)) for each in pair) / alone)
            for kind in ("candidates", "classes", "experts", "evaluation"):
                seconds = []
                for devices in (1, 2):
                    ended(started("--worker", kind, str(devices), name, *size))
                    seconds.append(json.loads((folder / "seconds.json").read_text()))
                ratios.setdefault(kind, []).append(seconds[1] / seconds[0])
    r = statistics.median(ratios["r"])
    for kind, values in ratios.items():
        of_best = "" if kind == "r" else f", {statistics.median(values) / (r / 2):.2f} of r / 2"
        print(f"{kind:12s} {statistics.median(values):.2f}{of_best}  ({', '.join(f'{each:.2f}' for each in values)})")
    if args.out:
        what = {
            "command": "python benchmarks/processes.py",
            "hardware": platform.processor() or platform.machine(),
            "processors": os.cpu_count(),
            "torch": torch.__version__,
            "network": args.network,
            "size": args.size,
            "ratios": ratios,
        }
        args.out.write_text(json.dumps(what, indent=2) + "\n")


if __name__ == "__main__":
    main()
