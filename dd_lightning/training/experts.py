"""Training experts on the real data, several at once, straight into an expert store."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dd_lightning.execution.memory import explain_oom
from dd_lightning.execution.options import Execution
from dd_lightning.functional.errors import DivergenceError, InputError, check_range
from dd_lightning.functional.random import step_generator
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.sets.real import RealSet
from dd_lightning.training.claims import Claims
from dd_lightning.training.expert_store import ExpertIdentity, ExpertState, ExpertStore
from dd_lightning.training.parallel_networks import ParallelTraining, Passes, batching_pays, check_batches, piece_of
from dd_lightning.training.progress import epoch_bar
from dd_lightning.training.recipes import ExpertRecipe

_SECONDS_BETWEEN_LOOKS = 1.0

FLUSH_SECONDS = 60.0
"""Files are written at the first end of an epoch this long after they were last written, and at the end."""

_MOST_ON_HOST = 16
_MOST_ON_ACCELERATOR = 10
_BYTES_PER_PIXEL = 6 * 1024  # twice what ConvNet-3 of width 128 keeps per input pixel for one backward pass


def experts_together(device_type: str, vmappable: bool, pixels: int, memory: int | None = None) -> int:
    """Choose how many experts are trained at once: one where a batched pass does not pay, else as many as fit.

    ``pixels`` are batch size times height times width. ``memory`` is that of the whole accelerator in bytes: what is
    free changes from run to run, and with it would the size of the groups and so the rounding.

    Example:
        >>> experts_together("cpu", True, 64 * 8 * 8), experts_together("cpu", True, 256 * 32 * 32)
        (16, 1)
        >>> experts_together("cuda", True, 256 * 32 * 32, memory=16 * 1024**3)
        5
    """
    if not vmappable or not batching_pays(device_type, pixels):
        return 1
    if device_type == "cpu":
        return _MOST_ON_HOST
    if memory is None:
        return _MOST_ON_ACCELERATOR
    return max(1, min(_MOST_ON_ACCELERATOR, memory // (2 * pixels * _BYTES_PER_PIXEL)))


def train_experts(
    network: FunctionalNetwork,
    real: RealSet,
    store: ExpertStore,
    identity: ExpertIdentity,
    recipe: ExpertRecipe,
    num_experts: int,
    epochs: int,
    *,
    held_out: RealSet | None = None,
    execution: Execution = Execution(),  # noqa: B008  (frozen)
    progress_bar: bool = True,
    together: int | None = None,
    shard: tuple[int, int] = (0, 1),
) -> None:
    """Bring the first ``num_experts`` experts of a store to ``epochs`` epochs each.

    Experts that have them are left alone, shorter ones are continued, missing ones are begun: the same call continues
    an interrupted job, and processes that make it at the same time share the work (:class:`Claims`). A kill loses what
    was trained since the files were last written; Ctrl-C and errors lose no finished epoch.

    Initial weights, batches and augmentation of an expert depend on the recipe's seed, its id, and the epoch or step
    alone. So neither its neighbors nor interruptions change it: to the last bit if experts are computed one by one, to
    rounding if they are computed as one batched pass.

    Args:
        network: The architecture.
        real: Training data, on the device to train on.
        store: Where the experts are kept.
        identity: What network, data and recipe are called in the files; see ``ExpertIdentity.of``.
        recipe: Training settings.
        num_experts: How many experts the store shall hold.
        epochs: How many epochs each of them shall have.
        held_out: Data on which the accuracy is measured after each epoch; None measures nothing.
        execution: Its ``compile`` and ``micro_batch`` are used. The precision is the recipe's.
        progress_bar: Show the progress.
        together: How many experts are trained at once; None leaves it to :func:`experts_together`.
        shard: ``(i, n)`` trains every n-th expert, beginning with the i-th: one of n jobs that need not meet.

    Raises:
        InputError: If a number is out of range, or the store holds other experts than ``identity`` says or cannot be
            read or written.
        DivergenceError: If an expert's weights are no longer finite; what was finite is stored.
    """
    check_range("num_experts", num_experts, low=1)
    check_range("epochs", epochs, low=1)
    check_range("together", together, low=1)
    check_range("the number of shards", shard[1], low=1)
    check_range("the shard", shard[0], low=0, high=shard[1] - 1, hint="of 0 .. n - 1")
    wanted = range(shard[0], num_experts, shard[1])
    if identity.plain()["recipe"] != recipe.describe(epochs):
        raise InputError(
            f"the identity names the recipe {identity.recipe}, but the experts would be trained with "
            f"{recipe.describe(epochs)}; make the identity from this recipe and number of epochs"
        )
    store.check(identity)
    if not (waiting := _waiting(store, wanted, epochs)):
        return
    device, batch = real.images.device, min(recipe.batch_size, len(real))
    pixels = batch * real.image_shape[1] * real.image_shape[2]
    memory = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else None
    count = together or experts_together(device.type, network.vmappable, pixels, memory)
    piece = piece_of(network, execution.micro_batch, batch, device.type, recipe.precision)
    vectorized = count > 1 and network.vmappable and batching_pays(device.type, pixels)
    check_batches(network, len(real), recipe.batch_size)
    passes = Passes(
        network.to(device), precision=recipe.precision, vectorized=vectorized, piece=piece, running_statistics=True
    )
    sizes = {min(count, len(ids) - start) for ids in waiting.values() for start in range(0, len(ids), count)}
    remedy = "" if network.uses_batch_statistics else f"execution.micro_batch below {piece}, or "
    with explain_oom(
        f"training {min(count, num_experts)} x {network.name} as experts",
        None,
        f"set {remedy}a smaller recipe.batch_size",
    ):
        # calls of the whole job, stored or not: an interrupted one goes on as it began
        calls = len(wanted) * epochs * -(-len(real) // recipe.batch_size)
        targets = recipe.targets(real.labels, real.num_classes, real.images.dtype)
        data, what = (real.images, targets), "the experts' step"
        passes.compile(execution.compile, calls, data, recipe.batch_size, sizes, what, progress_bar)
        job = _Job(passes, real, targets, held_out and held_out.to(device), store, identity, recipe, epochs)
        remaining = sum(epochs - max(0, stored) for stored, ids in waiting.items() for _ in ids)
        with Claims(store.path) as claims, epoch_bar("experts", remaining * len(real), progress_bar) as show:
            started, images = time.monotonic(), 0
            while waiting := _waiting(store, wanted, epochs):
                for stored in sorted(waiting, reverse=True):  # those that are nearly done come first
                    if ids := claims.take(waiting[stored], count):
                        break
                if any(_stored_epochs(store, id) != stored for id in ids):
                    claims.release()  # another process has written one meanwhile
                    continue
                if not ids:
                    others = sum(map(len, waiting.values()))
                    show(images, f"waiting for {others} experts that other processes train")
                    time.sleep(_SECONDS_BETWEEN_LOOKS)
                    continue
                group = _Group(job, ids)
                whose = f"expert {ids[0] + 1}" if len(ids) == 1 else f"experts {ids[0] + 1}-{ids[-1] + 1}"

                def on_step(epoch: int, seen: int, whose: str = whose) -> None:
                    nonlocal images
                    images += seen
                    rate = images / max(time.monotonic() - started, 1e-9)
                    show(images, f"{whose} of {num_experts}, epoch {epoch + 1}/{epochs}, {rate:,.0f} images/s")

                try:
                    while group.epoch < epochs:
                        group.train_epoch(on_step)
                finally:
                    group.flush()
                    claims.release()


@dataclass(frozen=True)
class _Job:
    """What all experts of a job have in common."""

    passes: Passes
    real: RealSet
    targets: Tensor
    held_out: RealSet | None
    store: ExpertStore
    identity: ExpertIdentity
    recipe: ExpertRecipe
    epochs: int


class _Group:
    """Experts of one age that are trained side by side, and what their files will hold."""

    def __init__(self, job: _Job, ids: list[int]) -> None:
        self.job, self.ids = job, ids
        network, self.epoch = job.passes.network, max(0, _stored_epochs(job.store, ids[0]))
        self._trajectories = torch.empty(len(ids), job.epochs + 1, network.num_parameters)
        states = []
        for id, trajectory in zip(ids, self._trajectories, strict=True):
            if _stored_epochs(job.store, id) < 0:
                seed = step_generator(job.recipe.seed, 0, f"expert-{id}/initial").initial_seed()
                states.append(ExpertState(network.initial(seed)[None]))
            else:
                states.append(job.store.read(id))
            trajectory[: self.epoch + 1] = states[-1].trajectory
        self._accuracies = [state.accuracies for state in states]
        self._momenta = [state.momentum for state in states]
        self._training = ParallelTraining(
            job.passes,
            self._trajectories[:, self.epoch].to(job.real.images.device),
            job.recipe.lr,
            job.recipe,
            self._momenta,
            [state.statistics for state in states],
        )
        self._statistics = self._training.statistics.cpu()
        self._saved, self._flushed = self.epoch, time.monotonic()

    def train_epoch(self, on_step: Callable[[int, int], None]) -> None:
        """Train for an epoch, keep weights and accuracies, and write the files if it is time.

        Args:
            on_step: Called after each step with the epoch and the number of images seen.

        Raises:
            DivergenceError: If the weights of an expert are no longer finite.
        """
        real, recipe, training = self.job.real, self.job.recipe, self._training
        training.set_lr(recipe.learning_rate(self.epoch, self.job.epochs))
        orders = [step_generator(recipe.seed, self.epoch, f"expert-{id}/batches") for id in self.ids]
        batches = list(zip(*(real.shuffled_batches(recipe.batch_size, order) for order in orders), strict=True))
        correct = torch.zeros(len(self.ids), device=real.images.device)
        for step, chosen in enumerate(batches, self.epoch * len(batches)):
            images, targets = [], []
            for id, rows in zip(self.ids, chosen, strict=True):
                generator = step_generator(recipe.seed, step, f"expert-{id}/augment")
                batch = recipe.augment(real.images[rows], self.job.targets[rows], real.num_classes, generator)
                images.append(batch[0])
                targets.append(batch[1])
            logits = training.step(images, targets)
            correct += (logits.argmax(2) == torch.stack([real.labels[rows] for rows in chosen])).sum(1)
            on_step(self.epoch, len(chosen) * len(chosen[0]))
        weights = torch.stack(training.thetas)
        for id, finite in zip(self.ids, weights.isfinite().all(1).tolist(), strict=True):
            if not finite:
                raise DivergenceError(
                    f"expert {id} diverged in epoch {self.epoch + 1} at lr {recipe.lr}: its weights are not finite; "
                    "lower recipe.lr"
                )
        held_out: list[float] | list[None] = [None] * len(self.ids)
        if self.job.held_out is not None:
            size = self.job.passes.piece or recipe.batch_size
            held_out = self.job.passes.accuracies(weights, self.job.held_out, size, training.statistics)
        train = (correct.double() / len(real)).tolist()
        for accuracies, seen, unseen in zip(self._accuracies, train, held_out, strict=True):
            accuracies.train.append(seen)
            accuracies.held_out.append(unseen)
        self._momenta = [None if momentum is None else momentum.to("cpu", copy=True) for momentum in training.momenta]
        self._statistics = training.statistics.cpu()
        self._trajectories[:, self.epoch + 1] = weights.cpu()
        self.epoch += 1  # last: what is flushed after an interruption is whole
        if time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write all files as of the last finished epoch, unless that is what they hold.

        Raises:
            InputError: If the store cannot be written.
        """
        if self._saved == self.epoch:
            return
        rows = zip(self._trajectories, self._momenta, self._statistics, self._accuracies, strict=True)
        experts = {
            id: ExpertState(trajectory[: self.epoch + 1], momentum, statistics if len(statistics) else None, accuracies)
            for id, (trajectory, momentum, statistics, accuracies) in zip(self.ids, rows, strict=True)
            if _stored_epochs(self.job.store, id) < self.epoch  # never a shorter file in place of a longer one
        }
        self.job.store.write(experts, self.job.identity, self.job.recipe.seed)
        self._saved, self._flushed = self.epoch, time.monotonic()


def _waiting(store: ExpertStore, ids: Iterable[int], epochs: int) -> dict[int, list[int]]:
    """Return the experts that are too short, by how many epochs they have."""
    waiting: dict[int, list[int]] = {}
    for id in ids:
        if (stored := _stored_epochs(store, id)) < epochs:
            waiting.setdefault(stored, []).append(id)
    return waiting


def _stored_epochs(store: ExpertStore, id: int) -> int:
    """Return how many epochs expert ``id`` has, -1 if it has no file."""
    return store.epochs(id) if store.file(id).exists() else -1
