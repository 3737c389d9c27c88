"""``dd-lightning experts`` and ``dd-lightning evaluate``."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from jsonargparse import Namespace

from dd_lightning.callbacks import EvaluationPoint
from dd_lightning.cli.errors import blame_paths
from dd_lightning.cli.parser import OneLineParser
from dd_lightning.cli.runs import synthetic_file
from dd_lightning.cli.summary import evaluation_table, show
from dd_lightning.datamodules import DistillationDataModule, datamodule_by_name, evaluation_data
from dd_lightning.execution.memory import explain_oom
from dd_lightning.execution.options import Execution
from dd_lightning.functional.errors import InputError, check_range
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.networks.registry import is_import_path
from dd_lightning.sets.synthetic_file import SyntheticFile, load_synthetic
from dd_lightning.training.evaluation import RECIPES, Evaluation, EvaluationRecipe, get_recipe, percent
from dd_lightning.training.expert_store import ExpertIdentity, ExpertStore
from dd_lightning.training.experts import train_experts
from dd_lightning.training.progress import epoch_bar
from dd_lightning.training.recipes import ExpertRecipe
from dd_lightning.training.replay_buffers import import_replay_buffers


def experts(args: Sequence[str]) -> None:
    """Train and store expert trajectories."""
    parser = _parser(
        "experts [options]",
        "Train expert networks on the real data and store their trajectories. An existing store is continued: what it "
        "holds is never trained again.",
    )
    parser.add_argument("--network", type=str, default="ConvNet-3", help="Architecture.")
    parser.add_argument("--path", type=str, default="experts", help="Folder of the store.")
    parser.add_argument("--num_experts", type=int, default=100, help="Experts the store shall hold (100 in MTT).")
    parser.add_argument("--epochs", type=int, default=50, help="Epochs each shall have (50 in MTT).")
    parser.add_argument("--shard", type=str, default="1/1", help="Train the i-th of n parts only: i/n, from 1 on.")
    parser.add_argument(
        "--buffers", type=str, nargs="+", default=[], help="Take these replay_buffer_*.pt of MTT instead of training."
    )
    parser.add_subclass_arguments(DistillationDataModule, "data", required=False, help="Real data.")
    parser.add_class_arguments(ExpertRecipe, "recipe")
    parser.add_class_arguments(Execution, "execution", skip={"precision", "memory_gb"})  # the recipe has a precision
    config = parser.parse_args(args)
    if config.data is None:
        parser.error("no data; give --config, such as --config experts/digits, or --data, such as CIFAR10DataModule")
    check_range("num_experts", config.num_experts, low=1)
    check_range("epochs", config.epochs, low=1)
    objects = parser.instantiate_classes(config)
    device = _device(config.device)
    with blame_paths(config, output="path"):
        store = ExpertStore(config.path)
        data = objects.data
        data.prepare_data()
        data.setup()
        network = FunctionalNetwork(config.network, data.image_shape, data.num_classes).to(device)
        identity = ExpertIdentity.of(
            network, objects.recipe, config.epochs, fingerprint=data.fingerprint, dataset=data.name
        )
        store.check(identity)
        if config.buffers:
            held_out = data.test.to(device)
            found = import_replay_buffers(config.buffers, network, store, identity, config.epochs, held_out)
            sys.stdout.write(f"{percent(found)} on the test images after {config.epochs} epochs\n")
        else:
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
                shard=_shard(config.shard),
            )
    sys.stdout.write(f"{len(store.ids())} experts in {Path(config.path).resolve()}\n")


def evaluate(args: Sequence[str]) -> None:
    """Evaluate a distilled set from its file."""
    parser = _parser(
        "evaluate FILE [options]",
        "Train fresh networks on a distilled set, as its file describes it, and test them on real data.",
    )
    parser.add_argument("file", type=str, help="A synthetic.safetensors, or the folder of a run.")
    parser.add_argument("--networks", type=str, nargs="+", default=None, help="Architectures; the file's by default.")
    parser.add_argument("--num_networks", type=int, default=5, help="Fresh networks of each.")
    parser.add_argument(
        "--recipe",
        type=str | None,
        default=None,
        help=f"Protocol: {', '.join(sorted(RECIPES))}; the run's own by default, or mtt if it evaluated nothing.",
    )
    parser.add_argument("--epochs", type=int | None, default=None, help="Epochs, if not the protocol's.")
    parser.add_argument(
        "--augmentation", type=str | None, default=None, help="DSA strategy, if not the protocol's; or none."
    )
    parser.add_argument("--root", type=str, default="data", help="Folder of the real data.")
    parser.add_subclass_arguments(
        DistillationDataModule, "data", required=False, help="Real data, if not the file's dataset in --root."
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of all draws.")
    parser.add_class_arguments(Execution, "execution", skip={"memory_gb"})
    config = parser.parse_args(args)
    check_range("num_networks", config.num_networks, low=1)
    device = _device(config.device)
    objects = parser.instantiate_classes(config)
    with blame_paths(config, output="file"):
        path = synthetic_file(Path(config.file))
        file = load_synthetic(path)
        recipe = _recipe(file, config)
        data = objects.data or datamodule_by_name(file.dataset, root=config.root)
        file, held_out = evaluation_data(file, data)
    held_out = held_out.to(device)
    images, targets = (tensor.to(device) for tensor in file.training_set())
    points = []
    if not config.networks and is_import_path(file.network):
        raise InputError(
            f"the file was made with network {file.network!r}, and no code is imported because a file names it; if you "
            f"trust it, give --networks {file.network}"
        )
    specs = config.networks or [file.network]  # all are built before the first one is trained: a wrong name fails now
    for network in [FunctionalNetwork(spec, data.image_shape, data.num_classes).to(device) for spec in specs]:
        title = f"{config.num_networks} x {network.name}"
        with (
            explain_oom(f"training {title}", None, "set smaller --num_networks, or smaller --networks"),
            epoch_bar(title, recipe.epochs) as on_epoch,
        ):
            evaluation = Evaluation(network, held_out, recipe, objects.execution)
            result = evaluation(
                images, targets, file.evaluation_lr, config.num_networks, seed=config.seed, on_epoch=on_epoch
            )
        points.append(EvaluationPoint(file.step, network.name, result.accuracies, result.seconds, result.validations))
    show(evaluation_table(path, len(file.images), len(images), points))


def _parser(usage: str, description: str) -> OneLineParser:
    prog = f"dd-lightning {usage.split()[0]}"
    parser = OneLineParser(prog=prog, usage=f"dd-lightning {usage}", description=description)
    parser.add_argument("-c", "--config", action="config", help="YAML file or packaged name.")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or cuda:1, for example.")
    return parser


def _shard(text: str) -> tuple[int, int]:
    """Return the part of an array job, counted from 0, and how many there are."""
    if not (found := re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)) or not 1 <= int(found[1]) <= int(found[2]):
        raise InputError(f"shard is {text!r}; give i/n with i from 1 to n, such as 2/4")
    return int(found[1]) - 1, int(found[2])


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device is {name!r}, which this machine does not have; use auto or cpu") from error


def _recipe(file: SyntheticFile, config: Namespace) -> EvaluationRecipe:
    """Return the protocol that was asked for, or the one that the set's run used."""
    stored = file.evaluation_recipe
    if config.recipe is not None or not stored:
        return get_recipe(config.recipe or "mtt", config.epochs, config.augmentation)
    changes = {name: config[name] for name in ("epochs", "augmentation") if config[name] is not None}
    try:
        return EvaluationRecipe(**stored | {"milestones": tuple(stored["milestones"])} | changes)
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"the file's evaluation recipe is not understood ({str(error)[:200]}); name one with --recipe"
        ) from error
