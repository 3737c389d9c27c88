"""The tables that a command closes with."""

import math
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch import Trainer
from rich.console import Console
from rich.table import Table

from dd_lightning.callbacks import EvalCallback, EvaluationPoint
from dd_lightning.cost import peak_memory_bytes
from dd_lightning.module import DistillationModule


def percent(accuracies: Sequence[float]) -> str:
    """Format accuracies in [0, 1] as mean and population standard deviation.

    Example:
        >>> percent([0.5, 0.7])
        '60.0 ± 10.0 %'
    """
    mean = sum(accuracies) / len(accuracies)
    std = math.sqrt(sum((a - mean) ** 2 for a in accuracies) / len(accuracies))
    return f"{100 * mean:.1f} ± {100 * std:.1f} %"


def closing_table(trainer: Trainer, module: DistillationModule, evaluation: EvalCallback | None) -> Table:
    """Return what a run achieved, what it cost and where its files are."""
    table = Table(title="Dataset distillation", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    images = len(module.synthetic_set)
    if evaluation is not None:
        for name in dict.fromkeys(point.network for point in evaluation.points):
            last, best = evaluation.last(name), evaluation.best(name)
            how = f"{len(last.accuracies)} fresh {name}, held-out {evaluation.split}"
            table.add_row(f"{images} distilled images", f"{percent(last.accuracies)}  (step {last.step}; {how})")
            if evaluation.random_real is not None and name == evaluation.random_real.network:
                baseline = evaluation.random_real
                gain = 100 * (last.result.mean - baseline.result.mean)
                table.add_row(
                    f"{images} random real images",
                    f"{percent(baseline.accuracies)}  (same recipe; distilled is {gain:+.1f} points)",
                )
            table.add_row("best step, chosen afterwards", f"{percent(best.accuracies)}  (step {best.step})")
    full = module.pool.full_set_accuracies()
    if full is not None:
        table.add_row("full training set", f"{percent(full.accuracies)}  ({full.description})")
    table.add_row("steps", _steps(trainer, module))
    table.add_row("seconds", _seconds(module, evaluation))
    peak = peak_memory_bytes(module.device)
    if peak is not None:
        what = "allocator" if module.device.type == "cuda" else "process"
        table.add_row("peak memory", f"{peak / 2**20:,.0f} MiB ({what}, {module.device})")
    table.add_row("files", str(trainer.log_dir or trainer.default_root_dir))
    return table


def evaluation_table(file: Path, images: int, points: Sequence[EvaluationPoint]) -> Table:
    """Return the accuracies of one synthetic set on several architectures."""
    table = Table(title=f"{file}: {images} images", title_justify="left")
    for heading in ("network", "networks trained", "held-out accuracy", "seconds"):
        table.add_column(heading)
    for point in points:
        table.add_row(point.network, str(len(point.accuracies)), percent(point.accuracies), f"{point.seconds:.0f}")
    return table


def show(table: Table) -> None:
    """Print a table to the terminal."""
    Console().print(table)


def _steps(trainer: Trainer, module: DistillationModule) -> str:
    skipped = f", {module.skipped_steps} of them skipped" if module.skipped_steps else ""
    return f"{trainer.global_step}{skipped}; {module.candidate_evaluations} candidates evaluated"


def _seconds(module: DistillationModule, evaluation: EvalCallback | None) -> str:
    parts = []
    if module.expert_seconds > 0:
        parts.append(f"{module.expert_seconds:.0f} training experts before it")
    if evaluation is not None:
        parts.append(f"{evaluation.seconds:.0f} of it evaluating")
    return f"{module.seconds:.0f}" + (f"  ({', '.join(parts)})" if parts else "")
