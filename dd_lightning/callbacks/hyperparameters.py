"""A run's settings as plain values, for TensorBoard's hparams."""

import inspect
from dataclasses import asdict
from typing import Any

from dd_lightning.module import DistillationModule


def hyperparameters(module: DistillationModule) -> dict[str, Any]:
    """Return the declared options of the module, its objective and its pool that are numbers, words or switches."""
    settings = {
        "objective": type(module.objective).__name__,
        "pool": type(module.pool).__name__,
        "network": module.problem.network.name,
        "dataset": module.datamodule.name,
        **asdict(module.storage),
        **asdict(module.optimizer),
        "seed": module.distillation.seed,
        "steps": module.trainer.max_steps,
    }
    for owner in (module.objective, module.pool):
        declared = inspect.signature(type(owner)).parameters
        values = {name: getattr(owner, name, None) for name in declared}
        settings |= {name: value for name, value in values.items() if isinstance(value, bool | int | float | str)}
    return settings
