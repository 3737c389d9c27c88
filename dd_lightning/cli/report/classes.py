"""Accuracy class by class, which runs do not record: of fresh networks, trained on a stored set where it is asked."""

import torch

from dd_lightning.cli.report.runs import Run
from dd_lightning.datamodules import datamodule_by_name, evaluation_data
from dd_lightning.functional.errors import InputError
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.networks.registry import is_import_path
from dd_lightning.sets.real import RealSet
from dd_lightning.sets.synthetic_file import load_synthetic
from dd_lightning.training.evaluation import EvaluationRecipe, accuracies_of, train_fresh_networks
from dd_lightning.training.progress import epoch_bar


def class_accuracies(run: Run, num_networks: int, root: str) -> dict[str, tuple[float, ...]]:
    """Train networks on a run's set by its own recipe and seed, and return their accuracies by the class's name.

    Raises:
        InputError: If the set, its recipe or the real data below ``root`` cannot be used.
    """
    path = run.folder / "synthetic.safetensors"
    file = load_synthetic(path)
    if is_import_path(file.network) or not file.evaluation_recipe:
        raise InputError(f"{path} has no network of ours, or no recipe, to evaluate it by; leave --per_class out")
    data = datamodule_by_name(file.dataset, root=root)
    file, held_out = evaluation_data(file, data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    held_out, (images, targets) = held_out.to(device), (part.to(device) for part in file.training_set())
    recipe = EvaluationRecipe(**file.evaluation_recipe | {"milestones": tuple(file.evaluation_recipe["milestones"])})
    network = FunctionalNetwork(file.network, data.image_shape, data.num_classes).to(device)
    lr = file.evaluation_lr if recipe.lr is None else recipe.lr
    with epoch_bar(f"{num_networks} x {network.name} on {run.folder}", recipe.epochs) as on_epoch:
        training = train_fresh_networks(images, targets, lr, network, recipe, num_networks, run.seed, on_epoch)
    found = {}
    for label, name in enumerate(file.class_names or map(str, range(data.num_classes))):
        if len(rows := held_out.class_indices(label)):
            own = RealSet(held_out.images[rows], held_out.labels[rows], data.num_classes, complete=False)
            found[name] = accuracies_of(training.thetas, network, own, training.statistics)
    return found
