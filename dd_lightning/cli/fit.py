"""``dd-lightning fit``: LightningCLI with optional groups for selection and evaluation, and a folder per run."""

import json
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn

from dd_lightning.callbacks import EvalCallback, StepProgressBar, SyntheticSetWriter, TrajectorySelectionCallback
from dd_lightning.cli.errors import blame_paths
from dd_lightning.cli.parser import OneLineParser
from dd_lightning.cli.runs import checkpoint_path, new_version, run_folder
from dd_lightning.cli.summary import closing_table, show, summary
from dd_lightning.datamodules import DistillationDataModule
from dd_lightning.functional.errors import InputError
from dd_lightning.module import DistillationModule
from dd_lightning.sets.atomic_write import write_atomically
from dd_lightning.trainer.endings import Endings

_EXPECTED_WARNINGS = (
    ".*does not have many workers.*",  # the loader yields integers
    ".training_step. returned .None.",  # a skipped step
    ".*AMP with fp16 is not supported on CPU",  # nor is it by a distillation run: it is refused
    "The dirpath has changed",  # a resumed run has a folder of its own
    r".isinstance\(treespec, LeafSpec\). is deprecated",  # Lightning 2.6 with torch 2.14
)


_WITHOUT_EFFECT = (  # a run is one epoch of steps, and evaluates in callbacks
    "min_epochs",
    "limit_val_batches",
    "limit_test_batches",
    "limit_predict_batches",
    "val_check_interval",
    "check_val_every_n_epoch",
    "num_sanity_val_steps",
    "reload_dataloaders_every_n_epochs",
    "inference_mode",
    "sync_batchnorm",
    "enable_autolog_hparams",
    "model_registry",
)

DYNADISTILL = "_dynadistill"
"""Ends the name of a run with a selection, unless it was typed."""


def _is_about_this_run(record: logging.LogRecord) -> bool:
    """Tell advertisements from messages."""
    text = record.getMessage()
    return not text.startswith(("💡 Tip", "TPU available")) and "`max_epochs=1` reached" not in text


class FitParser(OneLineParser, LightningArgumentParser):
    """LightningCLI's parser, with errors of one line."""


class DistillationCLI(LightningCLI):
    """The module, data, callbacks and Trainer of a run, built from options; it does not run by itself."""

    def __init__(self, args: Sequence[str]) -> None:
        self.arguments = without_option(args, "--ckpt_path")
        super().__init__(
            DistillationModule,
            DistillationDataModule,
            parser_class=FitParser,
            parser_kwargs={
                "prog": "dd-lightning fit",
                "usage": "dd-lightning fit --config CONFIG [--config OVERLAY ...] [options]",
                "description": "Distill a dataset: train missing experts, distill, evaluate, write the run's folder.",
            },
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            trainer_defaults={
                "max_epochs": 1,  # one pass over the step indices
                "max_steps": 2000,  # the paper's number
                "num_sanity_val_steps": 0,
                "log_every_n_steps": 10,
                "enable_model_summary": False,
                "use_distributed_sampler": False,
            },
            run=False,
            args=list(args),
        )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add all options, our own first: that is the order of ``--help``."""
        parser.add_argument(
            "--name",
            type=str,
            default="run",
            help=f"Name of the run: its folder below --runs. Unless typed, it ends in {DYNADISTILL} with a selection.",
        )
        parser.add_argument("--runs", type=str, default="runs", help="Folder of all runs.")
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            default=None,
            help="Checkpoint to resume; 'last' is the newest one of the runs of this name.",
        )
        parser.add_argument(
            "--selection",
            type=TrajectorySelectionCallback | None,
            default=None,
            help="DynaDistill; null is the base method.",
        )
        parser.add_argument(
            "--evaluation", type=EvalCallback | None, default=None, help="Accuracy curves; null evaluates nothing."
        )
        parser.add_lightning_class_args(DistillationModule, "model")
        parser.add_lightning_class_args(DistillationDataModule, "data", subclass_mode=True, required=False)
        parser.add_lightning_class_args(SyntheticSetWriter, "writer")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(Trainer, "trainer")
        parser.add_argument("--weights_only", type=bool | None, default=None, help="Of Trainer.fit.")
        parser.set_defaults({f"trainer.{key}": value for key, value in self.trainer_defaults.items()})
        parser.set_defaults(
            {
                "checkpoint.every_n_train_steps": 100,
                "checkpoint.save_top_k": 1,  # without a monitor: the newest one
                "checkpoint.filename": "{step}",
            }
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the arguments given, whatever the process's own are; there is no default for the data."""
        self.config = parser.parse_args(list(args or ()))
        if self.config.data is None:
            parser.error("no data; give --config, such as --config quickstart, or --data, such as CIFAR10DataModule")
        if not 0 <= (seed := self.config.seed_everything) < 2**32:
            raise InputError(f"seed_everything is {seed}; it must be from 0 to {2**32 - 1}")

    def _parse_ckpt_path(self) -> None:
        # Lightning's own lets hyperparameters in the checkpoint silently override the command line.
        folder = run_folder(self.config.runs, self.run_name)
        others = [Path(self.config.runs, name) for name in (self.config.name, self.config.name + DYNADISTILL)]
        self.config.ckpt_path = checkpoint_path(self.config.ckpt_path, folder, *others)

    @property
    def run_name(self) -> str:
        """Name of the run's folder: ``--name`` as typed, or the configuration's and whether there is a selection."""
        name: str = self.config.name
        typed = without_option(self.arguments, "--name") != self.arguments
        return name if typed or self.config.selection is None else name + DYNADISTILL

    @property
    def command(self) -> str:
        """What was typed, without the checkpoint."""
        return shlex.join(["dd-lightning", "fit", *self.arguments])

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        chosen = [self._get(self.config_init, key) for key in ("selection", "evaluation")]
        own = config.get("callbacks") or []
        if config.get("enable_progress_bar") is not False and not any(isinstance(each, ProgressBar) for each in own):
            callbacks = [StepProgressBar(), *callbacks]
        idle = {
            name: config[name] for name in _WITHOUT_EFFECT if config[name] != self.parser.get_default(f"trainer.{name}")
        }
        for name, refused in (("barebones", True), ("enable_checkpointing", False)):
            if config[name] is refused:
                given, other = str(refused).lower(), str(not refused).lower()
                raise InputError(f"trainer.{name} is {given}; it must be {other}: a run saves what it learns")
        devices, cores = str(config.get("devices")), os.cpu_count() or 1
        if config.get("accelerator") == "cpu" and devices.isdigit() and int(devices) > cores:
            raise InputError(f"trainer.devices is {devices}; it must be at most {cores}, the CPU's threads")
        version = new_version(Path(self.config.runs, self.run_name))
        if config.get("logger") in (None, True):
            names = {"save_dir": self.config.runs, "name": self.run_name, "version": int(version.name.split("_")[1])}
            # CSV first: it would complain about the folder that TensorBoard's events make.
            config["logger"] = [CSVLogger(**names), TensorBoardLogger(**names, default_hp_metric=False)]
            idle |= {"default_root_dir": root} if (root := config["default_root_dir"]) is not None else {}
        config["default_root_dir"] = config["default_root_dir"] or str(version)
        try:
            trainer = super()._instantiate_trainer(config, [*(c for c in chosen if c is not None), *callbacks])
        except (MisconfigurationException, ValueError, TypeError) as error:
            with suppress(OSError):
                version.rmdir()
            raise InputError(f"the Trainer refuses its options: {error}") from error
        if idle:
            said = ", ".join(f"trainer.{name} {value}" for name, value in idle.items())
            rank_zero_warn(f"without effect: {said}; --evaluation says when to evaluate, --runs where files go")
        return trainer


def without_option(args: Sequence[str], option: str) -> list[str]:
    """Return the arguments without an option and its value."""
    kept: list[str] = []
    rest = iter(args)
    for each in rest:
        if each == option:
            next(rest, None)
        elif not each.startswith(f"{option}="):
            kept.append(each)
    return kept


def fit(args: Sequence[str]) -> None:
    """Distill."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_about_this_run)
    with warnings.catch_warnings():
        for expected in _EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=expected)
        # Lightning 2.6 calls what jsonargparse 5 will remove.
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"lightning\.pytorch\.cli")
        run(DistillationCLI(args))


@contextmanager
def resume_line(cli: DistillationCLI) -> Iterator[None]:
    """Where a run ends before its time, say how to go on."""
    try:
        yield
    except BaseException as error:
        endings = next((c for c in cli.trainer.callbacks if isinstance(c, Endings)), None)  # type: ignore[attr-defined]
        saved = endings is not None and endings.last_checkpoint is not None
        if saved or isinstance(error, SystemExit):  # finished experts are kept
            sys.stderr.write(f"dd-lightning: to go on: {cli.command}{' --ckpt_path last' * saved}\n")
        raise
    if cli.trainer.global_step < cli.trainer.max_steps:  # by max_time, or by somebody's callback
        sys.stderr.write(f"dd-lightning: to go on: {cli.command} --ckpt_path last\n")


def run(cli: DistillationCLI) -> None:
    """Run what was built, write the run's summary and print it as a table."""
    cli._dump_config()
    for callback in cli.trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SyntheticSetWriter):
            callback.config, callback.command = cli.config_dump, cli.command
    with blame_paths(cli.config, output="runs"), resume_line(cli):
        cli.trainer.fit(
            cli.model, datamodule=cli.datamodule, ckpt_path=cli.config.ckpt_path, weights_only=cli.config.weights_only
        )
    result = summary(cli.trainer, cli.model)  # by all processes: the Trainer's folder is a broadcast
    if cli.trainer.is_global_zero:
        write_atomically(Path(result["files"]) / "summary.json", json.dumps(result, indent=1).encode())
        show(closing_table(result))
