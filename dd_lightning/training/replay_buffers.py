"""Expert trajectories of other projects: the ``replay_buffer_*.pt`` that MTT, FTD, TESLA and DATM train.

A file is a list of up to ten experts, each a list of the weights before training and after each epoch, each a list of
the parameters in the network's order.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dd_lightning.functional.errors import InputError
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.sets.foreign.content import load_tensors
from dd_lightning.sets.real import RealSet
from dd_lightning.training.expert_store import ExpertAccuracies, ExpertIdentity, ExpertState, ExpertStore
from dd_lightning.training.parallel_networks import Passes

UNKNOWN_SEED = -1
_TEST_BATCH = 256


def import_replay_buffers(
    files: Sequence[Path | str],
    network: FunctionalNetwork,
    store: ExpertStore,
    identity: ExpertIdentity,
    epochs: int,
    held_out: RealSet,
) -> list[float]:
    """Write the experts of some files into an empty store, and return the held-out accuracy of each one's last epoch.

    What the files do not say, network, data, color space and recipe, is the caller's word. An expert that is wrong
    about most images is warned of: its color space or network is then another one.

    Args:
        files: ``replay_buffer_*.pt``.
        network: The architecture.
        store: Where they go.
        identity: What network, data and recipe are called in the files.
        epochs: How many epochs each has; a store continues none of them, since the momentum is unknown.
        held_out: Images to test the last weights on, in the color space that the experts were trained in.

    Raises:
        InputError: If the store has experts, a file does not hold experts of this network and length, or the network
            has batch norm, whose running statistics such files lack.
    """
    if network.num_statistics:
        raise InputError(f"{network.name} has batch norm, whose running statistics replay buffers lack; train experts")
    if store.ids():
        raise InputError(f"the store {store.path} has {len(store.ids())} experts; give another path")
    accuracies: list[float] = []
    passes = Passes(network, vectorized=False)
    for file in map(Path, files):
        for expert in _experts(file, load_tensors(file)):
            if len(expert) != epochs + 1:
                raise InputError(f"{file} has experts of {len(expert) - 1} epochs, but epochs is {epochs}; set epochs")
            shapes = [[tuple(tensor.shape) for tensor in weights] for weights in expert]
            if any(each != list(network.parameter_shapes) for each in shapes):
                raise InputError(
                    f"{file} has parameters {shapes[0][0]}, ... {shapes[0][-1]}, but {network.name} has "
                    f"{network.parameter_shapes[0]}, ... {network.parameter_shapes[-1]}; give their network and data"
                )
            rows = torch.stack([torch.cat([tensor.float().flatten() for tensor in weights]) for weights in expert])
            accuracies += passes.accuracies(rows[-1:].to(held_out.images.device), held_out, _TEST_BATCH)
            measured = ExpertAccuracies(held_out=[*[None] * (epochs - 1), accuracies[-1]])
            store.write({len(accuracies) - 1: ExpertState(rows, accuracies=measured)}, identity, UNKNOWN_SEED)
    if accuracies and min(accuracies) < 2 / held_out.num_classes:
        warnings.warn(
            f"an expert is right about {min(accuracies):.1%} of the test images; were they trained in this color space "
            "(--data.color_space) and network?",
            stacklevel=2,
        )
    return accuracies


def _experts(file: Path, content: Any) -> Any:  # noqa: ANN401  (whatever the file holds)
    """Return the experts, if that is what they are."""
    nested = (
        isinstance(content, list)
        and all(isinstance(expert, list) and len(expert) > 1 for expert in content)
        and all(isinstance(weights, list) and weights for expert in content for weights in expert)
        and all(isinstance(tensor, torch.Tensor) for expert in content for weights in expert for tensor in weights)
    )
    if not nested or not content:
        raise InputError(f"{file} is no list of experts, each a list of lists of parameters, as MTT writes it")
    return content
