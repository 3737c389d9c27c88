"""Expert trajectories on disk: one safetensors file per expert, in one directory.

A file ``expert_00007.safetensors`` holds

* ``trajectory``, float32 ``[epochs + 1, P]``: the flat weights before training and after each epoch;
* ``momentum``, float32 ``[P]``, if the recipe has momentum: what SGD carries on from the last row;
* ``statistics``, float32 ``[S]``, if the network has batch norm: its running statistics at the last row;
* one metadata entry, ``dd_lightning``, JSON text: what the expert is (network, data, recipe), its accuracies, and a
  CRC-32 of each row, which is compared when the row is read (files of before 0.2 have none).
"""

import json
import re
import zlib
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

    Attributes:
        network: Name of the architecture.
        parameter_names: Names of the parameters, in the order in which they lie in a row.
        parameter_shapes: Their shapes.
        fingerprint: Fingerprint of the real data, preprocessing included.
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
        """Describe the experts of ``epochs`` epochs that a network, a recipe and real data make."""
        shapes, names = network.parameter_shapes, network.parameter_names
        return cls(network.name, names, shapes, fingerprint, dataset, recipe.describe(epochs))

    def plain(self) -> dict[str, Any]:
        """Return the fields as JSON values (tuples become lists)."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values


@dataclass(frozen=True)
class ExpertAccuracies:
    """Accuracies after each epoch, in [0, 1].

    Attributes:
        train: Running accuracy on the augmented training batches of each epoch.
        held_out: Accuracy on held-out data after each epoch, None where it was not measured.
    """

    train: list[float] = field(default_factory=list)
    held_out: list[float | None] = field(default_factory=list)


@dataclass(frozen=True)
class ExpertState:
    """How far an expert is.

    Attributes:
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
    """What a file says about its expert: network, data and recipe, the recipe's seed, and accuracies."""

    identity: ExpertIdentity
    seed: int
    accuracies: ExpertAccuracies


class ExpertStore:
    """Directory of expert trajectories.

    A directory that does not exist is an empty store; the first write makes it. Nothing is held open or cached, so a
    store may be read while another process adds to it.

    Args:
        path: The directory.

    Raises:
        InputError: If ``path`` is empty or a file. Methods that read raise it if a file is missing, damaged or foreign.
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
        """Return the flat weights of expert ``id`` after some numbers of epochs, reading no other row.

        Args:
            id: The expert.
            epochs: Numbers of epochs, 0 being the initial weights; any order, repeats allowed.

        Returns:
            ``[len(epochs), P]``, float32, on the host, sharing memory with nothing.
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
            checksums = json.loads(file.metadata()[METADATA_KEY]).get("checksums")
            result = torch.empty(len(epochs), width)
            for row, epoch in enumerate(epochs):
                result[row] = part[epoch : epoch + 1][0]
                if checksums is not None and _checksum(result[row]) != checksums["trajectory"][epoch]:
                    raise self._unreadable(id, f"the checksum of epoch {epoch} differs: it is damaged")
                if not bool(result[row].isfinite().all()):
                    raise self._unreadable(id, f"epoch {epoch} is not finite")
            return result

    def metadata(self, id: int) -> ExpertMetadata:
        """Return what the file of expert ``id`` says about it."""
        with self._opened(id) as file:
            values = json.loads(file.metadata()[METADATA_KEY])
        try:
            accuracies = ExpertAccuracies(**values["accuracies"])
            return ExpertMetadata(ExpertIdentity(**values["identity"]), values["seed"], accuracies)
        except (KeyError, TypeError) as error:
            raise self._unreadable(id, f"its metadata lack or mistake {error}") from error

    def read(self, id: int) -> ExpertState:
        """Return all that continuing expert ``id`` needs, on the host, sharing memory with nothing."""
        with self._opened(id) as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping
            checksums = json.loads(file.metadata()[METADATA_KEY]).get("checksums")
        if checksums is not None and _checksums(tensors) != checksums:
            raise self._unreadable(id, "a checksum differs: it is damaged")
        return ExpertState(
            tensors["trajectory"], tensors.get("momentum"), tensors.get("statistics"), self.metadata(id).accuracies
        )

    def check(self, identity: ExpertIdentity, ids: Sequence[int] | None = None) -> None:
        """Compare stored experts, all by default, with what is wanted.

        Raises:
            InputError: If a file differs, naming the file, the first field that differs and both values.
        """
        wanted = dict(_leaves("", identity.plain()))
        for id in self.ids() if ids is None else ids:
            stored = dict(_leaves("", self.metadata(id).identity.plain()))
            for name in [*wanted, *stored]:
                if stored.get(name) != wanted.get(name):
                    raise InputError(
                        f"{self.file(id)} was made with {name} = {stored.get(name)!r}, this run has "
                        f"{wanted.get(name)!r}; give this run another expert path, or the setting of the stored experts"
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
    # One entry only: the order of several in the header is not fixed, and equal content should be equal bytes.
    named = {"trajectory": expert.trajectory, "momentum": expert.momentum, "statistics": expert.statistics}
    on_host = {
        name: tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in named.items()
        if tensor is not None
    }
    text = json.dumps(
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "package_version": __version__,
            "identity": identity.plain(),
            "seed": seed,
            "accuracies": asdict(expert.accuracies),
            "checksums": _checksums(on_host),
        },
        sort_keys=True,
    )
    return bytes(safetensors.torch.save(on_host, {METADATA_KEY: text}))


def _checksums(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Return a checksum of each row of the trajectory, and one of each other tensor."""
    return {name: [_checksum(row) for row in (each if each.ndim == 2 else [each])] for name, each in tensors.items()}


def _checksum(row: Tensor) -> int:
    return zlib.crc32(row.contiguous().numpy().data)


def _leaves(name: str, value: object) -> Iterator[tuple[str, object]]:
    """Name the plain values within a JSON value."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(f"{name}.{key}".lstrip("."), inner)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _leaves(f"{name}[{index}]", inner)
    else:
        yield name, value
