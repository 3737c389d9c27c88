"""The command line: ``dd-lightning fit | experts | evaluate``."""

import json
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from jsonargparse import ArgumentParser, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from dd_lightning.callbacks import EvalCallback, EvaluationPoint, SyntheticSetWriter, TrajectorySelectionCallback
from dd_lightning.cli.report import closing_table, evaluation_table, show, summary
from dd_lightning.cli.runs import check_writable, is_checkpoint, last_checkpoint
from dd_lightning.datamodules import DigitsDataModule, DistillationDataModule, datamodule_by_name, evaluation_data
from dd_lightning.execution.memory import explain_oom
from dd_lightning.execution.options import Execution
from dd_lightning.functional.errors import DistillationError, InputError
from dd_lightning.module import DistillationModule
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.sets.atomic_write import write_atomically
from dd_lightning.sets.synthetic_file import SyntheticFile, load_synthetic
from dd_lightning.training.evaluation import RECIPES, EvaluationRecipe, evaluate_synthetic_set, get_recipe
from dd_lightning.training.expert_store import ExpertIdentity, ExpertStore
from dd_lightning.training.experts import train_experts
from dd_lightning.training.progress import epoch_bar
from dd_lightning.training.recipes import ExpertRecipe
from dd_lightning.version import __version__

USAGE = """\
usage: dd-lightning COMMAND [options]

Dataset distillation for PyTorch Lightning.

commands:
  fit        distil a dataset; trains the experts that are missing, evaluates, writes the run's folder
  experts    train and store expert trajectories
  evaluate   train fresh networks on a distilled set and test them on real data

  dd-lightning fit --config configs/quickstart.yaml                 bundled digits, on a CPU, no download
  dd-lightning fit --config A.yaml --config configs/dynadistill.yaml     any run with DynaDistill on top
  dd-lightning fit --config A.yaml --ckpt_path last                 go on where the newest run was stopped
  dd-lightning COMMAND --help                                       every option

dd-lightning --version prints the version.
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run a command; bad input is one line on stderr and exit status 1, an unknown option exit status 2.

    Args:
        args: Command and options; the process's own by default.
    """
    argv = list(sys.argv[1:] if args is None else args)
    command, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    try:
        if command == "fit":
            fit(rest)
        elif command == "experts":
            experts(rest)
        elif command == "evaluate":
            evaluate(rest)
        elif command in ("-h", "--help"):
            sys.stdout.write(USAGE)
        elif command == "--version":
            sys.stdout.write(f"dd-lightning {__version__}\n")
        else:
            _stop(f"unknown command {command!r}; use fit, experts or evaluate", status=2)
    except (MisconfigurationException, OSError, DistillationError) as error:
        _stop(str(error), status=1)
    except ValueError as error:
        cause = _input_error(error)
        if cause is None:
            raise
        _stop(str(cause), status=1)


def _stop(message: str, status: int) -> NoReturn:
    sys.stderr.write(f"dd-lightning: error: {' '.join(message.split())}\n")
    raise SystemExit(status)


def _input_error(error: BaseException | None) -> InputError | None:
    """Return the InputError that an exception is or comes from: jsonargparse wraps those of optional groups."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return error


class _OneLineErrors(ArgumentParser):
    """A parser that answers bad options with one line, where jsonargparse's own prints all of its usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Stop with the reason, without jsonargparse's representation of types and values."""
        cause = _input_error(ex)
        said = str(cause) if cause is not None else message.partition("Given value type:")[0].rstrip(" .\n")
        if no_class := re.search(
            r'"(?P<key>[^"]+)".*Expected a dot import path string: (?P<value>\S+)', said, re.DOTALL
        ):
            said = f"{no_class['key']} is {no_class['value']!r}, which is no class; name one, or give its import path"
        said = said.replace('"<unicode string>"', "the YAML file")
        parser = getattr(ex, "subcommand_parser", None) or self
        command = parser.prog.replace(" [options]", "")
        if not command.startswith("dd-lightning"):  # a parser that jsonargparse made for one class
            command = "dd-lightning COMMAND"
        _stop(f"{said}; see {command} --help", status=2)


class _FitParser(_OneLineErrors, LightningArgumentParser):
    """LightningCLI's parser, with errors of one line, and data that need not be named."""

    def add_lightning_class_args(
        self,
        lightning_class: Any,  # noqa: ANN401  (Lightning's own signature)
        nested_key: str,
        subclass_mode: bool = False,
        required: bool = True,
    ) -> list[str]:
        """Add a class's options; there is a default for the data, so Lightning need not ask for it."""
        required = required and nested_key != "data"
        return super().add_lightning_class_args(lightning_class, nested_key, subclass_mode, required)


class DistillationCLI(LightningCLI):
    """LightningCLI with optional groups for selection and evaluation, and a folder per run."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Keep ``fit`` alone."""
        return {"fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the groups that Lightning does not know."""
        parser.add_argument("--name", type=str, default="run", help="Name of the run: its folder below --runs.")
        parser.add_argument("--runs", type=str, default="runs", help="Folder of all runs.")
        parser.add_argument(
            "--selection",
            type=TrajectorySelectionCallback | None,
            default=None,
            help="DynaDistill; null is the base method.",
        )
        parser.add_argument(
            "--evaluation", type=EvalCallback | None, default=None, help="Accuracy curves; null evaluates nothing."
        )
        parser.add_lightning_class_args(SyntheticSetWriter, "writer")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "data": {"class_path": "dd_lightning.datamodules.DigitsDataModule"},
                "checkpoint.every_n_train_steps": 100,
                "checkpoint.save_top_k": 1,  # without a monitor: the newest one
                "checkpoint.filename": "{step}",
            }
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the arguments given, whatever the process's own are."""
        self.config = parser.parse_args(list(args or ()))

    def _parse_ckpt_path(self) -> None:
        # Lightning's own lets hyperparameters in the checkpoint override the command line without a word.
        config = self.config.fit
        check_writable(Path(config.runs) / config.name)
        if config.ckpt_path == "last":
            config.ckpt_path = str(last_checkpoint(Path(config.runs) / config.name))
        elif config.ckpt_path is not None and not Path(config.ckpt_path).is_file():
            raise InputError(f"--ckpt_path is {config.ckpt_path!r}, which is no file; give a checkpoint, or 'last'")
        elif config.ckpt_path is not None and not is_checkpoint(Path(config.ckpt_path)):
            raise InputError(
                f"--ckpt_path is {config.ckpt_path!r}, which is damaged or no checkpoint of a distillation run; give "
                "another one, or 'last'"
            )

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        chosen = [self._get(self.config_init, key) for key in ("selection", "evaluation")]
        if config.get("logger") in (None, True):
            # CSV first: it would complain about the folder that TensorBoard's events make.
            names = {"save_dir": self.config.fit.runs, "name": self.config.fit.name}
            events = TensorBoardLogger(**names, default_hp_metric=False)
            config["logger"] = [CSVLogger(**names, version=events.version), events]
        return super()._instantiate_trainer(config, [*(c for c in chosen if c is not None), *callbacks])

    def before_fit(self) -> None:
        """Give the writer the resolved configuration, so that the synthetic set carries it."""
        self._dump_config()
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SyntheticSetWriter):
                callback.config = self.config_dump

    def after_fit(self) -> None:
        """Write the run's summary and print it as a table."""
        if self.trainer.is_global_zero:
            evaluation = next((c for c in self.trainer.callbacks if isinstance(c, EvalCallback)), None)  # type: ignore[attr-defined]
            result = summary(self.trainer, self.model, evaluation)
            write_atomically(Path(result["files"]) / "summary.json", json.dumps(result, indent=1).encode())
            show(closing_table(result))


def fit(args: Sequence[str]) -> None:
    """Distil: LightningCLI's ``fit``."""
    with warnings.catch_warnings():
        for expected in _EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=expected)
        # Lightning 2.6 calls what jsonargparse 5 will remove.
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"lightning\.pytorch\.cli")
        DistillationCLI(
            DistillationModule,
            DistillationDataModule,
            subclass_mode_data=True,
            parser_class=_FitParser,
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
            parser_kwargs={"fit": {"default_env": False, "allow_abbrev": False}, "prog": "dd-lightning"},
            args=["fit", *args],
        )


_EXPECTED_WARNINGS = (
    ".*does not have many workers.*",  # the loader yields integers
    ".training_step. returned .None.",  # a skipped step
    ".*AMP with fp16 is not supported on CPU",  # nor is it by a distillation run: it is refused
    "The dirpath has changed",  # a resumed run has a folder of its own
    r".isinstance\(treespec, LeafSpec\). is deprecated",  # Lightning 2.6 with torch 2.14
)


def experts(args: Sequence[str]) -> None:
    """Train and store expert trajectories."""
    parser = _OneLineErrors(
        prog="dd-lightning experts",
        allow_abbrev=False,
        description="Train expert networks on the real data and store their trajectories. A store that is there is "
        "continued: what it holds is never trained again.",
    )
    parser.add_argument("-c", "--config", action="config", help="YAML file with the options below.")
    parser.add_subclass_arguments(DistillationDataModule, "data", required=False, help="Real data; digits by default.")
    parser.add_argument("--network", type=str, default="ConvNet-3", help="Architecture.")
    parser.add_argument("--path", type=str, default="experts", help="Folder of the store.")
    parser.add_argument("--num_experts", type=int, default=100, help="Experts the store shall hold (100 in MTT).")
    parser.add_argument("--epochs", type=int, default=50, help="Epochs each shall have (50 in MTT).")
    parser.add_class_arguments(ExpertRecipe, "recipe")
    parser.add_class_arguments(Execution, "execution", skip={"precision", "memory_gb"})
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:1, for example.")
    config = parser.parse_args(list(args))
    objects = parser.instantiate_classes(config)
    if config.num_experts < 1 or config.epochs < 1:
        raise InputError(f"num_experts is {config.num_experts} and epochs is {config.epochs}; both must be at least 1")
    data = _ready(objects.get("data"))
    device = _device(config.device)
    network = FunctionalNetwork(config.network, data.image_shape, data.num_classes).to(device)
    store = ExpertStore(config.path)
    identity = ExpertIdentity.of(
        network, objects.recipe, config.epochs, fingerprint=data.fingerprint, dataset=data.name
    )
    store.check(identity)
    train_experts(
        network,
        data.train.to(device),
        store,
        identity,
        objects.recipe,
        config.num_experts,
        config.epochs,
        held_out=data.test,
        execution=objects.execution,
    )
    sys.stdout.write(f"{len(store.ids())} experts in {Path(config.path).resolve()}\n")


def evaluate(args: Sequence[str]) -> None:
    """Evaluate a distilled set from its file."""
    parser = _OneLineErrors(
        prog="dd-lightning evaluate",
        allow_abbrev=False,
        description="Train fresh networks on a distilled set, as its file describes it, and test them on real data.",
    )
    parser.add_argument("file", type=str, help="A synthetic.safetensors.")
    parser.add_argument("-c", "--config", action="config", help="YAML file with the options below.")
    parser.add_argument("--networks", type=str, nargs="+", default=None, help="Architectures; the file's by default.")
    parser.add_argument("--num_networks", type=int, default=5, help="Fresh networks of each.")
    parser.add_argument(
        "--recipe",
        type=str | None,
        default=None,
        help=f"Protocol: {', '.join(sorted(RECIPES))}; the run's own by default, or mtt if it evaluated nothing.",
    )
    parser.add_argument("--epochs", type=int | None, default=None, help="Epochs, if other than the protocol's.")
    parser.add_argument(
        "--augmentation", type=str | None, default=None, help="DSA strategy, if other than the protocol's; or none."
    )
    parser.add_argument("--root", type=str, default="data", help="Folder of the real data.")
    parser.add_subclass_arguments(
        DistillationDataModule, "data", required=False, help="Real data, if other than the file's dataset in --root."
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of all draws.")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:1, for example.")
    config: Namespace = parser.parse_args(list(args))
    if config.num_networks < 1:
        raise InputError(f"num_networks is {config.num_networks}; it must be at least 1")
    file = load_synthetic(config.file)
    recipe = _recipe(file, config)
    given = parser.instantiate_classes(config).get("data")
    data = given or datamodule_by_name(file.dataset, root=config.root)
    file, held_out = evaluation_data(file, data)
    device = _device(config.device)
    held_out = held_out.to(device)
    images, targets = (tensor.to(device) for tensor in file.training_set())
    points = []
    specs = config.networks or [file.network]  # all are built before the first one is trained: a wrong name fails now
    for network in [FunctionalNetwork(spec, data.image_shape, data.num_classes).to(device) for spec in specs]:
        title = f"{config.num_networks} x {network.name}"
        with (
            explain_oom(f"training {title}", None, "set smaller --num_networks, or smaller --networks"),
            epoch_bar(title, recipe.epochs) as on_epoch,
        ):
            result = evaluate_synthetic_set(
                images,
                targets,
                file.evaluation_lr,
                held_out,
                network,
                recipe,
                config.num_networks,
                config.seed,
                on_epoch,
            )
        points.append(EvaluationPoint(file.step, network.name, result.accuracies, result.seconds, result.validations))
    show(evaluation_table(Path(config.file), len(file.images), len(images), points))


def _recipe(file: SyntheticFile, config: Namespace) -> EvaluationRecipe:
    """Return the protocol that was asked for, or else the one that the set's run used."""
    stored = file.evaluation_recipe
    if config.recipe is not None or not stored:
        return get_recipe(config.recipe or "mtt", config.epochs, config.augmentation)
    changes = {name: config[name] for name in ("epochs", "augmentation") if config[name] is not None}
    try:
        return EvaluationRecipe(**stored | {"milestones": tuple(stored["milestones"])} | changes)
    except (TypeError, KeyError) as error:
        raise InputError(f"the file's evaluation recipe is not understood ({error}); name one with --recipe") from error


def _ready(data: DistillationDataModule | None) -> DistillationDataModule:
    chosen = data if data is not None else DigitsDataModule()
    chosen.prepare_data()
    chosen.setup()
    return chosen


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device is {name!r}, which this machine does not have; use auto or cpu") from error
