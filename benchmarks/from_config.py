"""A run's module and data from its configuration file, for benchmarks that drive the Trainer themselves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from dd_lightning.datamodules import DistillationDataModule
from dd_lightning.module import DistillationModule


def from_config(path: Path, changes: Mapping[str, Any]) -> tuple[DistillationModule, DistillationDataModule]:
    """Return the module and the data that ``dd-lightning fit --config`` would make.

    Args:
        path: A configuration of ``dd-lightning fit``.
        changes: Values to replace, by their dotted names in the file, such as ``model.pool.init_args.path``.
    """
    values = yaml.safe_load(path.read_text())
    for name, value in changes.items():
        *groups, last = name.split(".")
        inner = values
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[last] = value
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DistillationModule, "model")
    parser.add_subclass_arguments(DistillationDataModule, "data")
    made = parser.instantiate_classes(parser.parse_object({"model": values["model"], "data": values["data"]}))
    module: DistillationModule = made.model
    data: DistillationDataModule = made.data
    return module, data
