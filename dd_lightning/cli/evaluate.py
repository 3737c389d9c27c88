"""``dd-lightning evaluate``: a distilled set, and what it is compared with, on several architectures."""

import hashlib
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import get_args

import torch
import yaml
from jsonargparse import Namespace, get_loader
from torch import Tensor

from dd_lightning.cli.commands import command_parser, device_named
from dd_lightning.cli.errors import blame_paths
from dd_lightning.cli.measured import Measured, Results, commit, hardware, plain, score_table, summarize, table
from dd_lightning.cli.parser import OneLineParser
from dd_lightning.cli.runs import synthetic_file
from dd_lightning.cli.summary import show
from dd_lightning.datamodules import DistillationDataModule, datamodule_by_name, evaluation_data, training_data
from dd_lightning.execution.memory import explain_oom
from dd_lightning.execution.options import Execution
from dd_lightning.functional.errors import InputError, check_choice, check_range
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.networks.registry import is_import_path
from dd_lightning.sets.coresets import Coreset, coreset
from dd_lightning.sets.synthetic_file import SyntheticFile, load_synthetic
from dd_lightning.training.evaluation import RECIPES, Evaluation, EvaluationRecipe, get_recipe, side_by_side
from dd_lightning.training.parallel_networks import check_batches
from dd_lightning.training.progress import epoch_bar
from dd_lightning.training.scores import augmentation_robust_score, label_robust_score
from dd_lightning.version import __version__

REAL_LR = 0.01
"""Learning rate on the full training set, if the recipe has none: that of MTT's experts, and of DD-Ranking there."""

PLAIN, HARD = ", no augmentation", ", hard labels"


@dataclass(frozen=True, eq=False)
class Trial:
    """What networks are trained on, by which recipe, and the number of the draw."""

    trained_on: str
    images: Tensor
    targets: Tensor
    recipe: EvaluationRecipe
    draw: int = 0

    def to(self, device: torch.device) -> "Trial":
        """Return it with images and targets on a device."""
        return replace(self, images=self.images.to(device), targets=self.targets.to(device))


def evaluate(args: Sequence[str]) -> None:
    """Evaluate a distilled set from its file."""
    parser = command_parser(
        "evaluate FILE [options]",
        "Train fresh networks on a distilled set, as its file describes it, and on what it is compared with, and test "
        "them on real data. With --out, an evaluation that was stopped goes on where it was.",
    )
    _add_options(parser)
    config = parser.parse_args(args)
    _check(config)
    device = device_named(config.device)
    objects = parser.instantiate_classes(config)
    with blame_paths(config, output="out"):
        path = synthetic_file(Path(config.file))
        file = load_synthetic(path)
        recipe = _recipe(file, config)
        if config.scores and recipe == _plain(recipe):
            raise InputError("--scores compares with and without augmentation, but the recipe has none; give another")
        data = objects.data or datamodule_by_name(file.dataset, root=config.root)
        data.refit(data.color_space, file.val_fraction, file.split_seed)
        file, held_out = evaluation_data(file, data)
    if not config.networks and is_import_path(file.network):
        raise InputError(
            f"the file was made with network {file.network!r}, and no code is imported because a file names it; if you "
            f"trust it, give --networks {file.network}"
        )
    specs = config.networks or [file.network]  # all are built before the first one is trained: a wrong name fails now
    networks = [FunctionalNetwork(spec, data.image_shape, data.num_classes).to(device) for spec in specs]
    held_out = held_out.to(device)
    trials = [trial.to(device) for trial in _trials(file, data, recipe, config)]
    for network, trial in product(networks, trials):
        check_batches(network, len(trial.images), trial.recipe.batch_size)
    checksum = hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
    about = {
        "command": shlex.join(["dd-lightning", "evaluate", *args]),
        "package_version": __version__,
        "commit": commit(),
        "hardware": hardware(device),
        "set": {
            "file": str(path),
            "checksum": checksum,
            "dataset": file.dataset,
            "objective": file.objective,
            "step": file.step,
            "images": len(file.images),
            "decoded_images": len(trials[0].images),
        },
    }
    results = Results(config.out, about)
    with _resume_line(results):
        for network in networks:
            evaluations: dict[EvaluationRecipe, Evaluation] = {}
            measured: dict[str, list[Measured]] = {}
            for number, trial in enumerate(trials, 1):
                if trial.recipe not in evaluations:
                    same = sum(each.recipe == trial.recipe for each in trials)
                    evaluations[trial.recipe] = Evaluation(network, held_out, trial.recipe, objects.execution, same)
                row = results.of(
                    Measured(
                        trained_on=trial.trained_on,
                        draw=trial.draw,
                        images=len(trial.images),
                        set=checksum,
                        data=data.fingerprint,
                        network=network.name,
                        recipe=plain(trial.recipe),
                        lr=trial.recipe.lr or file.evaluation_lr,
                        seed=config.seed,
                        precision=config.execution.precision,
                    )
                )
                title = f"{trial.trained_on}, {number} of {len(trials)}"
                _train(results, row, trial, evaluations[trial.recipe], config.num_networks, title)
                measured.setdefault(trial.trained_on, []).append(row)
            own = [summarize(rows, config.num_networks) for rows in measured.values()]
            results.summary += own
            if config.scores:
                results.scores[network.name] = _scores({each["trained_on"]: each["mean"] for each in own})
        results.save()
    decoding = f", decoded to {len(trials[0].images)}" if len(trials[0].images) != len(file.images) else ""
    show(table(f"{path}: {len(file.images)} images{decoding}", results.summary))
    if config.scores:
        show(score_table(results.scores))


def _add_options(parser: OneLineParser) -> None:
    parser.add_argument("file", type=str, help="A synthetic.safetensors, or the folder of a run.")
    parser.add_argument("--networks", type=str, nargs="+", default=None, help="Architectures; the file's by default.")
    parser.add_argument("--num_networks", type=int, default=5, help="Fresh networks of each.")
    parser.add_argument(
        "--recipe",
        type=str | None,
        default=None,
        help=f"Protocol: {', '.join(sorted(RECIPES))}, or a YAML file with the fields of an EvaluationRecipe; the "
        "run's own by default, or mtt if it evaluated nothing.",
    )
    parser.add_argument("--epochs", type=int | None, default=None, help="Epochs, if not the protocol's.")
    parser.add_argument(
        "--augmentation", type=str | None, default=None, help="DSA strategy, if not the protocol's; or none."
    )
    parser.add_argument(
        "--baselines",
        type=str,
        nargs="+",
        default=[],
        help=f"Also train on as many real images: {', '.join(get_args(Coreset))}.",
    )
    parser.add_argument("--draws", type=int, default=5, help="Draws of random real images.")
    parser.add_argument(
        "--full_data", type=int | None, default=None, help="Also train on all real images, for so many epochs."
    )
    parser.add_argument(
        "--scores",
        action="store_true",
        help="Also compute DD-Ranking's label- and augmentation-robust scores; they take --full_data.",
    )
    parser.add_argument(
        "--out", type=str | None, default=None, help="Folder for evaluate.json and evaluate.csv, or a .json file."
    )
    parser.add_argument("--root", type=str, default="data", help="Folder of the real data.")
    parser.add_subclass_arguments(
        DistillationDataModule, "data", required=False, help="Real data, if not the file's dataset in --root."
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of all draws.")
    parser.add_class_arguments(Execution, "execution", skip={"memory_gb"})


def _train(results: Results, row: Measured, trial: Trial, evaluation: Evaluation, wanted: int, title: str) -> None:
    """Train the networks that are missing, at once where that is faster, and save them as soon as they are known."""
    network = evaluation.network
    while (done := len(row.accuracies)) < wanted:
        count = wanted - done if side_by_side(network, trial.images, trial.recipe) else 1
        numbers = f"{done + 1}" if count == 1 else f"{done + 1}-{done + count}"
        with (
            explain_oom(
                f"training {count} x {network.name}", None, "set smaller --num_networks, or smaller --networks"
            ),
            epoch_bar(f"{title}: {network.name} {numbers} of {wanted}", trial.recipe.epochs) as on_epoch,
        ):
            result = evaluation(trial.images, trial.targets, row.lr, count, row.seed, on_epoch, done)
        row.add(result, results.about["hardware"])
        results.save()


def _check(config: Namespace) -> None:
    """Raise `InputError` if options are out of range or contradict each other."""
    check_range("num_networks", config.num_networks, low=1)
    check_range("draws", config.draws, low=1, hint="5 are usual")
    check_range("full_data", config.full_data, low=1, hint="epochs")
    for kind in config.baselines:
        check_choice("baselines", kind, get_args(Coreset))
    if config.scores and config.full_data is None:
        raise InputError(
            "--scores compares with all real images; say for how many epochs to train on them: --full_data"
        )
    if config.out == "":
        raise InputError("--out is ''; give a folder, or a .json file")


def _trials(
    file: SyntheticFile, data: DistillationDataModule, recipe: EvaluationRecipe, config: Namespace
) -> list[Trial]:
    """Return all that networks are trained on: the set first."""
    images, targets = file.training_set()
    trials = [Trial("distilled", images, targets, recipe)]
    kinds: dict[Coreset, None] = dict.fromkeys(config.baselines)
    if config.scores:
        kinds["random"] = None
    real = training_data(file, data) if kinds or config.full_data else None
    if real is None:
        return trials
    for kind in kinds:
        for draw in range(config.draws if kind == "random" else 1):
            rows = coreset(real, file.ipc, kind, config.seed, draw)
            trials.append(Trial(kind, real.images[rows], real.labels[rows], recipe, draw))
    if config.scores:
        scored = [trial for trial in trials if trial.trained_on in ("distilled", "random")]
        trials += [replace(each, trained_on=each.trained_on + PLAIN, recipe=_plain(recipe)) for each in scored]
        if file.label_kind == "soft":
            trials.append(Trial("distilled" + HARD, images, targets.argmax(1), recipe))
    if config.full_data is not None:
        full = replace(recipe, epochs=config.full_data, lr=recipe.lr or REAL_LR)
        trials.append(Trial("full", real.images, real.labels, full))
    return trials


def _plain(recipe: EvaluationRecipe) -> EvaluationRecipe:
    return replace(recipe, augmentation="none", cutmix=0.0)


def _scores(accuracy: Mapping[str, float]) -> dict[str, float]:
    own, random = accuracy["distilled"], accuracy["random"]
    hard = accuracy.get("distilled" + HARD, own)
    return {
        "lrs": label_robust_score(accuracy["full"], hard, own, random),
        "ars": augmentation_robust_score(own, random, accuracy["distilled" + PLAIN], accuracy["random" + PLAIN]),
        "hard_label_recovery": accuracy["full"] - hard,
        "improvement_over_random": own - random,
    }


def _recipe(file: SyntheticFile, config: Namespace) -> EvaluationRecipe:
    """Return the protocol that was asked for, or the one that the set's run used."""
    given, stored = config.recipe, file.evaluation_recipe
    if given is not None and given.endswith((".yaml", ".yml")):
        return get_recipe(_recipe_from(Path(given)), config.epochs, config.augmentation)
    if given is not None or not stored:
        return get_recipe(given or "mtt", config.epochs, config.augmentation)
    changes = {name: config[name] for name in ("epochs", "augmentation") if config[name] is not None}
    try:
        return EvaluationRecipe(**stored | {"milestones": tuple(stored["milestones"])} | changes)
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"the file's evaluation recipe is not understood ({str(error)[:200]}); name one with --recipe"
        ) from error


def _recipe_from(path: Path) -> EvaluationRecipe:
    try:
        values = get_loader("yaml")(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(
            f"--recipe is {str(path)!r}, which is not YAML: {' '.join(str(error).split())[:200]}"
        ) from error
    if not isinstance(values, dict):
        raise InputError(f"--recipe is {str(path)!r}, which must be a YAML mapping, such as 'epochs: 300'")
    parser = OneLineParser(prog="dd-lightning evaluate")
    parser.add_class_arguments(EvaluationRecipe, "recipe")
    recipe: EvaluationRecipe = parser.instantiate_classes(parser.parse_object({"recipe": values})).recipe
    return recipe


@contextmanager
def _resume_line(results: Results) -> Iterator[None]:
    """Where an evaluation that is kept ends before its time, say how to go on."""
    try:
        yield
    except BaseException:
        if results.path is not None:
            sys.stderr.write(f"dd-lightning: to go on: {results.about['command']}\n")
        raise
