"""``dd-lightning experts``, and what it shares with ``dd-lightning evaluate``."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from dd_lightning.cli.errors import blame_paths
from dd_lightning.cli.parser import OneLineParser
from dd_lightning.datamodules import DistillationDataModule
from dd_lightning.execution.options import Execution
from dd_lightning.functional.errors import InputError, check_range
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.training.evaluation import percent
from dd_lightning.training.expert_store import ExpertIdentity, ExpertStore
from dd_lightning.training.experts import train_experts
from dd_lightning.training.recipes import ExpertRecipe
from dd_lightning.training.replay_buffers import import_replay_buffers


def experts(args: Sequence[str]) -> None:
    """Train and store expert trajectories."""
    parser = command_parser(
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
    device = device_named(config.device)
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


def command_parser(usage: str, description: str) -> OneLineParser:
    """Return a parser with the options that both commands have."""
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


def device_named(name: str) -> torch.device:
    """Return a device, or for ``auto`` the first GPU or the CPU; an `InputError` if this machine has none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device is {name!r}, which this machine does not have; use auto or cpu") from error
