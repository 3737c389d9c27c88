"""Expert trajectories on disk: one safetensors file per expert, in one directory.

A file ``expert_00007.safetensors`` holds

* ``trajectory``, float32 ``[epochs + 1, P]``: the flat weights before training and after each epoch;
* ``momentum``, float32 ``[P]``, if the recipe has momentum: what SGD carries on from the last row;
* ``statistics``, float32 ``[S]``, if the network has batch norm: its running statistics at the last row;
* one metadata entry, ``dd_lightning``, JSON text: what the expert is (network, data, recipe) and its accuracies.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from dd_lightning.functional.errors import InputError
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.sets.atomic_write import write_all_atomically
from dd_lightning.training.recipes import ExpertRecipe
from dd_lightning.version import __version__

FORMAT = "expert"
FORMAT_VERSION = 1
METADATA_KEY = "dd_lightning"
_FILE_NAME = re.compile(r"expert_(\d{5,})\.safetensors")


@dataclass(frozen=True)
class ExpertIdentity:
    """What experts must have in common to serve one distillation.

    Args:
        network: Name of the architecture.
        parameter_names: Names of the parameters, in the order in which they lie in a row.
        parameter_shapes: Their shapes, in the same order.
        fingerprint: Fingerprint of the real data the experts were trained on, preprocessing included.
        dataset: Name of the real data, for people.
        recipe: The training settings, as :meth:`dd_lightning.training.recipes.ExpertRecipe.describe` gives them.
    """

    network: str
    parameter_names: Sequence[str]
    parameter_shapes: Sequence[Sequence[int]]
    fingerprint: str
    dataset: str
    recipe: dict[str, Any]

    @classmethod
    def of(
        cls, network: FunctionalNetwork, recipe: ExpertRecipe, epochs: int, *, fingerprint: str, dataset: str
    ) -> "ExpertIdentity":
        """Describe the experts that a network, a recipe and real data make.

        Args:
            network: The architecture.
            recipe: Training settings.
            epochs: How many epochs each trajectory shall have; it matters only with ``lr_decay``.
            fingerprint: Fingerprint of the real data.
            dataset: Name of the real data.
        """
        return cls(
            network=network.name,
            parameter_names=network.parameter_names,
            parameter_shapes=network.parameter_shapes,
            fingerprint=fingerprint,
            dataset=dataset,
            recipe=recipe.describe(epochs),
        )

    def plain(self) -> dict[str, Any]:
        """Return the fields as JSON values (tuples become lists)."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values


@dataclass(frozen=True)
class ExpertAccuracies:
    """Accuracies after each epoch, in [0, 1].

    Args:
        train: Running accuracy on the augmented training batches of each epoch.
        held_out: Accuracy on held-out data after each epoch, None where it was not measured.
    """

    train: list[float] = field(default_factory=list)
    held_out: list[float | None] = field(default_factory=list)


@dataclass(frozen=True)
class ExpertState:
    """How far an expert is.

    Args:
        trajectory: Weights before training and after each epoch, ``[epochs + 1, P]``.
        momentum: What SGD carries on from the last row, ``[P]``, or None.
        statistics: Running statistics of batch norms at the last row, ``[S]``, or None.
        accuracies: Accuracies after each epoch.
    """

    trajectory: Tensor
    momentum: Tensor | None = None
    statistics: Tensor | None = None
    accuracies: ExpertAccuracies = field(default_factory=ExpertAccuracies)


@dataclass(frozen=True)
class ExpertMetadata:
    """What a file says about its expert.

    Args:
        identity: Network, data and recipe.
        seed: Seed of the recipe.
        accuracies: Accuracies after each epoch.
        package_version: Version of dd_lightning that wrote the file.
        format_version: Version of the layout.
    """

    identity: ExpertIdentity
    seed: int
    accuracies: ExpertAccuracies
    package_version: str
    format_version: int


class ExpertStore:
    """Directory of expert trajectories.

    A directory that does not exist is an empty store; the first write makes it. Nothing is held open or cached, so a
    store may be read while another process adds to it.

    Args:
        path: The directory.

    Raises:
        InputError: If ``path`` is empty or a file; in all methods that read, if a file is missing, damaged or foreign.
    """

    def __init__(self, path: Path | str) -> None:
        if not str(path):
            raise InputError("path is ''; name the folder of the expert store")
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"expert store {self.path} is a file, it must be a directory; choose another path")

    def file(self, id: int) -> Path:
        """Return where expert ``id`` is, or would be."""
        return self.path / f"expert_{id:05d}.safetensors"

    def ids(self) -> list[int]:
        """Return the ids of the stored experts, ascending. Files of other names are passed over."""
        if not self.path.is_dir():
            return []
        matches = (_FILE_NAME.fullmatch(entry.name) for entry in self.path.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def epochs(self, id: int) -> int:
        """Return how many epochs of training expert ``id`` has: one less than the rows of its trajectory."""
        with self._opened(id) as file:
            rows: int = file.get_slice("trajectory").get_shape()[0]
            return rows - 1

    def rows(self, id: int, epochs: Sequence[int]) -> Tensor:
        """Return the flat weights of expert ``id`` after the given numbers of epochs, reading no other row.

        Args:
            id: The expert.
            epochs: Numbers of epochs, 0 being the initial weights; any order, repeats allowed.

        Returns:
            A tensor of shape ``[len(epochs), P]``, float32, on the host, that shares memory with nothing.

        Raises:
            InputError: If an epoch is not stored.
        """
        with self._opened(id) as file:
            part = file.get_slice("trajectory")
            count, width = part.get_shape()
            for epoch in epochs:
                if not 0 <= epoch < count:
                    raise InputError(
                        f"epoch {epoch} of expert {id} was asked for, {self.file(id)} holds epochs 0 to {count - 1}; "
                        f"train the experts for at least {epoch} epochs or ask for an earlier one"
                    )
            result = torch.empty(len(epochs), width)
            for row, epoch in enumerate(epochs):
                result[row] = part[epoch : epoch + 1][0]
            return result

    def metadata(self, id: int) -> ExpertMetadata:
        """Return what the file of expert ``id`` says about it."""
        with self._opened(id) as file:
            values = json.loads(file.metadata()[METADATA_KEY])
        try:
            return ExpertMetadata(
                identity=ExpertIdentity(**values["identity"]),
                seed=values["seed"],
                accuracies=ExpertAccuracies(**values["accuracies"]),
                package_version=values["package_version"],
                format_version=values["format_version"],
            )
        except (KeyError, TypeError) as error:
            raise self._unreadable(id, f"its metadata lack or mistake {error}") from error

    def read(self, id: int) -> ExpertState:
        """Return all that continuing expert ``id`` needs, on the host, sharing memory with nothing."""
        with self._opened(id) as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping
        return ExpertState(
            tensors["trajectory"], tensors.get("momentum"), tensors.get("statistics"), self.metadata(id).accuracies
        )

    def check(self, identity: ExpertIdentity) -> None:
        """Compare every stored expert with what is wanted.

        Args:
            identity: The wanted network, data and recipe.

        Raises:
            InputError: If a file differs, naming the file, the first field that differs and both values.
        """
        wanted = identity.plain()
        for id in self.ids():
            stored = self.metadata(id).identity.plain()
            for name, value in wanted.items():
                difference = _first_difference(name, stored[name], value)
                if difference:
                    where, has, wants = difference
                    raise InputError(
                        f"{self.file(id)} was made with {where} = {has}, this run has {wants}; "
                        "give this run another expert path, or the setting of the stored experts"
                    )

    def write(self, experts: Mapping[int, ExpertState], identity: ExpertIdentity, seed: int) -> None:
        """Write the files of some experts, each atomically and nearly at once: a kill hardly ever parts them.

        Older files of the same ids are replaced. Equal arguments give equal bytes.

        Args:
            experts: By id; they are serialized one by one.
            identity: Network, data and recipe.
            seed: Seed of the recipe.

        Raises:
            InputError: If shapes disagree with the identity, or the place cannot be written.
        """
        write_all_atomically((self.file(id), _serialized(expert, identity, seed)) for id, expert in experts.items())

    @contextmanager
    def _opened(self, id: int) -> Iterator[Any]:
        path = self.file(id)
        try:
            opened = safetensors.safe_open(str(path), framework="pt")
        except FileNotFoundError as error:
            raise InputError(
                f"expert {id} was asked for, {self.path} holds {len(self.ids())} experts and not that one; "
                "train it first"
            ) from error
        except (safetensors.SafetensorError, OSError) as error:
            raise self._unreadable(id, "it is damaged or not a safetensors file") from error
        with opened as file:
            try:
                values = json.loads((file.metadata() or {})[METADATA_KEY])
                kind, version = values["format"], values["format_version"]
                shape = file.get_slice("trajectory").get_shape()
            except (KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
                raise self._unreadable(id, "dd_lightning did not write it") from error
            if kind != FORMAT or len(shape) != 2 or shape[0] < 1:
                raise self._unreadable(id, "it does not hold an expert trajectory")
            if version > FORMAT_VERSION:
                raise InputError(
                    f"{path} has expert format {version}, this dd_lightning {__version__} reads up to "
                    f"{FORMAT_VERSION}; upgrade dd_lightning or choose another expert path"
                )
            yield file

    def _unreadable(self, id: int, why: str) -> InputError:
        return InputError(f"cannot read expert {self.file(id)}: {why}; delete it, and it will be trained again")


def _serialized(expert: ExpertState, identity: ExpertIdentity, seed: int) -> bytes:
    width = sum(torch.Size(shape).numel() for shape in identity.parameter_shapes)
    for name, tensor, axes in (("trajectory", expert.trajectory, 2), ("momentum", expert.momentum, 1)):
        if tensor is not None and (tensor.ndim != axes or tensor.shape[-1] != width):
            raise InputError(
                f"{name} has shape {list(tensor.shape)}, but network {identity.network} has {width} parameters; give "
                "flat vectors of them"
            )
    text = json.dumps(
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "package_version": __version__,
            "identity": identity.plain(),
            "seed": seed,
            "accuracies": asdict(expert.accuracies),
        },
        sort_keys=True,
    )
    # One entry only: the order of several in the header is not fixed, and equal content should be equal bytes.
    named = {"trajectory": expert.trajectory, "momentum": expert.momentum, "statistics": expert.statistics}
    on_host = {
        name: tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in named.items()
        if tensor is not None
    }
    return bytes(safetensors.torch.save(on_host, {METADATA_KEY: text}))


def _first_difference(name: str, stored: object, wanted: object) -> tuple[str, str, str] | None:
    """Find the first place where two JSON values differ, as (place, stored value, wanted value)."""
    if stored == wanted:
        return None
    if isinstance(stored, dict) and isinstance(wanted, dict):
        for key in sorted(stored.keys() | wanted.keys()):
            inner = _first_difference(f"{name}.{key}", stored.get(key), wanted.get(key))
            if inner:
                return inner
    if isinstance(stored, list) and isinstance(wanted, list):
        if len(stored) != len(wanted):
            return f"length of {name}", str(len(stored)), str(len(wanted))
        for index, (has, wants) in enumerate(zip(stored, wanted, strict=True)):
            inner = _first_difference(f"{name}[{index}]", has, wants)
            if inner:
                return inner
    return name, repr(stored), repr(wanted)
