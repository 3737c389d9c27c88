"""Training experts on the real data with Lightning, several at once, straight into an expert store."""

import logging
import random
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import cast

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from dd_lightning.execution.compile import compiles
from dd_lightning.execution.memory import explain_oom
from dd_lightning.execution.precision import in_precision, tensor_float
from dd_lightning.functional.augment import DSA, augment
from dd_lightning.functional.errors import InputError
from dd_lightning.functional.random import step_generator
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.sets.real import RealSet
from dd_lightning.training.expert_store import ExpertAccuracies, ExpertIdentity, ExpertStore
from dd_lightning.training.parallel_networks import (
    Network,
    batching_pays,
    compiled_or_plain,
    images_per_pass,
    parallel_gradients,
    parallel_logits,
)
from dd_lightning.training.progress import epoch_bar
from dd_lightning.training.recipes import ExpertRecipe

_OLD_LEAF_CHECK = r"`isinstance\(treespec, LeafSpec\)` is deprecated"
_MOST_ON_HOST = 16
_MOST_ON_ACCELERATOR = 10
_BYTES_PER_PIXEL = 6 * 1024  # twice what ConvNet-3 of width 128 keeps per input pixel for one backward pass


def experts_together(device_type: str, vmappable: bool, pixels: int, memory: int | None = None) -> int:
    """Choose how many experts are trained at once.

    Args:
        device_type: ``torch.device.type``.
        vmappable: Whether the network allows ``torch.func.vmap`` over its weights.
        pixels: Batch size times height times width, for one expert.
        memory: Bytes that the accelerator has in all, if known. (What is free changes from run to run, and
            with it would the size of the groups and so the rounding.)

    Returns:
        1 where one batched pass does not pay; else up to 16 on a host and up to 10 on an accelerator, as far
        as the memory goes.

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


def micro_batch_of(network: FunctionalNetwork, recipe: ExpertRecipe, device_type: str, batch: int) -> int:
    """Return how many images of a batch pass through an expert at once.

    Args:
        network: The architecture.
        recipe: Training settings.
        device_type: ``torch.device.type``.
        batch: Images of the longest batch.

    Raises:
        InputError: If batches are to be cut, and the network has batch norm.
    """
    if recipe.micro_batch is None or (recipe.micro_batch != "auto" and recipe.micro_batch >= batch):
        return batch
    if recipe.micro_batch != "auto":
        if network.uses_batch_statistics:
            raise InputError(
                f"the recipe's micro_batch is {recipe.micro_batch}, but network {network.name!r} has batch norm, which "
                f"needs all {batch} images of a batch at once; set recipe.micro_batch: null, or use another norm"
            )
        return recipe.micro_batch
    if device_type != "cpu" or network.uses_batch_statistics:
        return batch
    logits = in_precision(network, recipe.precision)
    return images_per_pass(logits, network.num_parameters, network.image_shape, batch)


class ExpertTraining(LightningModule):
    """Some experts, trained side by side by plain SGD on the mean cross-entropy.

    They go on from where the store left off.

    Every expert has its own initial weights, order of batches and augmentation, each a function of the
    recipe's seed, the expert's id and the epoch or step. So what becomes of an expert does not depend on
    which others are trained with it, nor on how often its training was interrupted: to the last bit where the
    experts are computed one after another, to rounding where they are computed as one batched pass.

    Args:
        network: The architecture.
        real: Training data.
        store: Where experts are continued from and written to.
        identity: What the files say about network, data and recipe.
        recipe: Training settings.
        ids: The experts. They must have the same number of stored epochs.
        epochs: Epochs each trajectory is to have.
        held_out: Data on which the accuracy is measured after each epoch; None for no measurement.
        vectorized: Compute the experts as one batched pass, rather than one after another.
        flush_seconds: The files are written at the first end of an epoch this long after they were last
            written, and at the end.
        computed: What is differentiated, such as the compiled network; left out, the network in the recipe's
            precision.
        piece: The most images of each expert in one pass; None for whole batches.

    Raises:
        InputError: If the experts do not have the same number of stored epochs, or a file cannot be read.
    """

    def __init__(
        self,
        network: FunctionalNetwork,
        real: RealSet,
        store: ExpertStore,
        identity: ExpertIdentity,
        recipe: ExpertRecipe,
        ids: list[int],
        epochs: int,
        *,
        held_out: RealSet | None = None,
        vectorized: bool = False,
        flush_seconds: float = 60.0,
        computed: Network | None = None,
        piece: int | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        stored = {id: _stored_epochs(store, id) for id in ids}
        if len(set(stored.values())) != 1:
            raise InputError(f"experts trained together have {stored} stored epochs; give equally old ones")
        self.ids = ids
        self.epochs = epochs
        self.start_epoch = max(0, stored[ids[0]])
        self.recipe = recipe
        self.vectorized = vectorized
        self.images_seen = 0
        self.started = time.monotonic()
        self._network = network
        self._computed = in_precision(network, recipe.precision) if computed is None else computed
        self._piece = piece
        self._real = real
        self._held_out = held_out
        self._store = store
        self._identity = identity
        self._flush_seconds = flush_seconds
        self._augmentation = DSA(strategy=recipe.augmentation)
        self._trajectory = torch.empty(len(ids), epochs + 1, network.num_parameters)
        self._accuracies: list[ExpertAccuracies] = []
        momenta: list[Tensor | None] = []
        for row, id in enumerate(ids):
            if stored[id] < 0:
                seed = step_generator(recipe.seed, 0, f"expert-{id}/initial").initial_seed()
                self._trajectory[row, 0] = network.initial(seed)
                self._accuracies.append(ExpertAccuracies())
                momenta.append(None)
            else:
                self._trajectory[row, : self.start_epoch + 1] = store.rows(id, range(self.start_epoch + 1))
                self._accuracies.append(store.metadata(id).accuracies)
                momenta.append(store.momentum(id))
        self._momenta = momenta
        self._done = self._saved = self.start_epoch
        self.experts = nn.ParameterList(rows[self.start_epoch].clone() for rows in self._trajectory)
        self._batches: list[list[Tensor]] = []
        self._correct = torch.zeros(len(ids))
        self._flushed = time.monotonic()

    @property
    def steps_per_epoch(self) -> int:
        """How many batches one pass over the real data has."""
        return -(-len(self._real) // self.recipe.batch_size)

    @property
    def epoch(self) -> int:
        """Index of the running epoch in the trajectories, those of earlier runs counted."""
        return self.start_epoch + self.current_epoch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make one SGD for all experts, with the momentum that the stored ones had."""
        optimizer = torch.optim.SGD(
            self.experts,
            lr=self.recipe.lr,
            momentum=self.recipe.momentum,
            weight_decay=self.recipe.weight_decay,
        )
        for weights, momentum in zip(self.experts, self._momenta, strict=True):
            if momentum is not None:
                optimizer.state[weights]["momentum_buffer"] = momentum.to(weights.device)
        return optimizer

    def on_train_start(self) -> None:
        """Bring data and network to the device."""
        self._real = self._real.to(self.device)
        if self._held_out is not None:
            self._held_out = self._held_out.to(self.device)
        self._network.to(self.device)
        self.started = self._flushed = time.monotonic()

    def on_train_epoch_start(self) -> None:
        """Shuffle the data for each expert and set the epoch's learning rate."""
        self._batches = [
            list(
                self._real.shuffled_batches(
                    self.recipe.batch_size,
                    step_generator(self.recipe.seed, self.epoch, f"expert-{id}/batches"),
                )
            )
            for id in self.ids
        ]
        self._correct = torch.zeros(len(self.ids), device=self.device)
        for group in self._optimizer().param_groups:
            group["lr"] = self.recipe.learning_rate(self.epoch, self.epochs)

    def training_step(self, batch: int, batch_idx: int) -> None:
        """Take one SGD step with every expert, each on its own batch.

        Args:
            batch: Index of the batch within the epoch.
            batch_idx: The same, as Lightning counts it.
        """
        del batch_idx  # Unused argument.
        step = self.epoch * self.steps_per_epoch + batch
        images, labels = [], []
        for id, batches in zip(self.ids, self._batches, strict=True):
            chosen = batches[batch]
            generator = step_generator(self.recipe.seed, step, f"expert-{id}/augment")
            draw = self._augmentation.draw(generator, len(chosen), self._real.image_shape[1:])
            images.append(augment(self._real.images[chosen], draw))
            labels.append(self._real.labels[chosen])
        gradients, logits = parallel_gradients(
            self._computed, list(self.experts), images, labels, self.vectorized, self._piece
        )
        for weights, gradient in zip(self.experts, gradients, strict=True):
            weights.grad = gradient
        self._optimizer().step()
        self._correct += (logits.argmax(2) == torch.stack(labels)).sum(1)
        self.images_seen += labels[0].numel() * len(labels)

    def on_train_epoch_end(self) -> None:
        """Keep the weights and accuracies of the epoch, and write the files if it is time.

        Raises:
            InputError: If the weights of an expert are no longer finite.
        """
        weights = torch.stack([expert.detach() for expert in self.experts])
        for id, finite in zip(self.ids, weights.isfinite().all(1).tolist(), strict=True):
            if not finite:
                self.flush()
                raise InputError(
                    f"expert {id} diverged in epoch {self.epoch + 1} at lr {self.recipe.lr}: its weights "
                    "are not finite; "
                    "lower the recipe's lr"
                )
        self._done = self.epoch + 1
        self._trajectory[:, self._done] = weights.cpu()
        if self.recipe.momentum:
            state = self._optimizer().state
            self._momenta = [state[expert]["momentum_buffer"].to("cpu", copy=True) for expert in self.experts]
        held_out: list[float] | list[None] = self._held_out_accuracies(weights) or [None] * len(self.ids)
        train = (self._correct.double() / len(self._real)).tolist()
        for accuracies, seen, unseen in zip(self._accuracies, train, held_out, strict=True):
            accuracies.train.append(seen)
            accuracies.held_out.append(unseen)
        if self._done == self.epochs or time.monotonic() - self._flushed >= self._flush_seconds:
            self.flush()

    def flush(self) -> None:
        """Write the files of all experts as of the last finished epoch, unless that is what they hold.

        Raises:
            InputError: If the store cannot be written.
        """
        if self._saved == self._done:
            return
        self._store.write_all(
            (
                id,
                self._trajectory[row, : self._done + 1],
                self._momenta[row],
                self._accuracies[row],
                self._identity,
                self.recipe.seed,
            )
            for row, id in enumerate(self.ids)
        )
        self._saved = self._done
        self._flushed = time.monotonic()

    def _held_out_accuracies(self, weights: Tensor) -> list[float]:
        if self._held_out is None:
            return []
        size = self._piece or self.recipe.batch_size
        correct = torch.zeros(len(self.ids), device=self.device)
        for images, labels in zip(
            torch.split(self._held_out.images, size), torch.split(self._held_out.labels, size), strict=True
        ):
            predicted = parallel_logits(self._computed, weights, images, self.vectorized).argmax(2)
            correct += (predicted == labels).sum(1)
        result: list[float] = (correct.double() / len(self._held_out)).tolist()
        return result

    def _optimizer(self) -> LightningOptimizer:
        return cast(LightningOptimizer, self.optimizers())


class ExpertProgressBar(RichProgressBar):
    """Progress bar that shows which experts are trained, their epoch and the images per second.

    Args:
        last_id: The last expert of the whole job.
    """

    def __init__(self, last_id: int) -> None:
        super().__init__()
        self._last_id = last_id

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return what stands beside the bar."""
        del trainer  # Unused argument.
        module = cast(ExpertTraining, pl_module)
        rate = module.images_seen / max(time.monotonic() - module.started, 1e-9)
        return {
            "experts": f"{module.ids[0]}-{module.ids[-1]} of {self._last_id}",
            "epoch": f"{min(module.epoch + 1, module.epochs)}/{module.epochs}",
            "images/s": f"{rate:,.0f}",
        }


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
    device: torch.device | str | None = None,
    progress_bar: bool = True,
    together: int | None = None,
    first_id: int = 0,
    flush_seconds: float = 60.0,
) -> None:
    """Bring the experts ``first_id .. first_id + num_experts - 1`` of a store to ``epochs`` epochs each.

    Experts that have them are left alone, files with fewer epochs are continued from their last row, missing
    ones are begun. A job that was killed is therefore continued by the same call and loses at most what was
    trained since the files were last written.

    It runs Trainers of its own and may be called from the ``setup`` hook of a module that is itself being
    fitted: global random states, signal handlers and log levels are as before when it returns, or raises.

    Args:
        network: The architecture.
        real: Training data.
        store: Where the experts are kept.
        identity: What network, data and recipe are called in the files; see ``ExpertIdentity.of``.
        recipe: Training settings.
        num_experts: How many experts there are to be.
        epochs: How many epochs each of them is to have.
        held_out: Data on which the accuracy is measured after each epoch; None for no measurement.
        device: Where to train; left out, Lightning chooses.
        progress_bar: Show the progress.
        together: How many experts are trained at once; left out, :func:`experts_together` chooses.
        first_id: Id of the first expert.
        flush_seconds: Longest time between two writings of the files, to the next end of an epoch.

    Raises:
        InputError: If a number is out of range, the store holds other experts than ``identity`` says or
            cannot be read or written, or an expert diverges (what was finite is written before).
    """
    for name, value, least in (
        ("num_experts", num_experts, 1),
        ("epochs", epochs, 1),
        ("first_id", first_id, 0),
        ("together", 1 if together is None else together, 1),
    ):
        if value < least:
            raise InputError(f"{name} is {value}, it must be at least {least}; raise it")
    if identity.plain()["recipe"] != recipe.describe(epochs):
        raise InputError(
            f"the identity names the recipe {identity.recipe}, the experts are to be trained with "
            f"{recipe.describe(epochs)}; make the identity from this recipe and number of epochs"
        )
    store.check(identity)
    last_id = first_id + num_experts - 1
    waiting: dict[int, list[int]] = {}
    for id in range(first_id, last_id + 1):
        stored = _stored_epochs(store, id)
        if stored < epochs:
            waiting.setdefault(stored, []).append(id)
    if not waiting:
        return
    target = torch.device(device) if device is not None else None
    with _undisturbed():
        root = _trainer(target, epochs, None).strategy.root_device
        batch = min(recipe.batch_size, len(real))
        pixels = batch * real.image_shape[1] * real.image_shape[2]
        memory = torch.cuda.mem_get_info(root)[1] if root.type == "cuda" else None
        count = together or experts_together(root.type, network.vmappable, pixels, memory)
        vectorized = count > 1 and network.vmappable and batching_pays(root.type, pixels)
        piece = micro_batch_of(network, recipe, root.type, batch)
        groups = [
            waiting[stored][start : start + count]
            for stored in sorted(waiting, reverse=True)  # those that are nearly done come first
            for start in range(0, len(waiting[stored]), count)
        ]
        computed: Network = in_precision(network, recipe.precision)
        remedy = (
            "set a smaller recipe.batch_size"
            if network.uses_batch_statistics
            else f"set recipe.micro_batch below {piece}, or a smaller recipe.batch_size"
        )
        with (
            tensor_float(recipe.precision, root),
            explain_oom(f"training {min(count, num_experts)} x {network.name} as experts", None, remedy),
        ):
            # of the whole job, stored or not: what was interrupted goes on as it began
            steps = num_experts * epochs * -(-len(real) // recipe.batch_size)
            if compiles(recipe.compile, root, steps):
                network.to(root)
                sizes = {len(group) for group in groups} if vectorized else {1}
                lengths = _pass_lengths(len(real), batch, piece)
                shapes = [(size, length) for size in sorted(sizes) for length in lengths]
                warm_up = partial(_warm_up, network.initial(0).to(root), network.image_shape, shapes, vectorized)
                with epoch_bar("compiling the experts' step", len(shapes), progress_bar) as on_shape:
                    computed = compiled_or_plain(
                        computed, partial(warm_up, on_shape), recipe.compile, "the experts' step", "recipe.compile"
                    )
            for group in groups:
                module = ExpertTraining(
                    network,
                    real,
                    store,
                    identity,
                    recipe,
                    group,
                    epochs,
                    held_out=held_out,
                    vectorized=vectorized,
                    flush_seconds=flush_seconds,
                    computed=computed,
                    piece=piece,
                )
                bar = ExpertProgressBar(last_id) if progress_bar else None
                trainer = _trainer(target, epochs - module.start_epoch, bar)
                try:
                    trainer.fit(module, train_dataloaders=range(module.steps_per_epoch))
                except (KeyboardInterrupt, SystemExit, RuntimeError, MemoryError):
                    module.flush()
                    raise


def _pass_lengths(images: int, batch: int, piece: int) -> list[int]:
    """Return the different numbers of images that passes of an epoch have."""
    lengths = {batch, images % batch or batch}
    return sorted({min(piece, length) for length in lengths} | {length % piece for length in lengths} - {0})


def _warm_up(
    theta: Tensor,
    image_shape: tuple[int, int, int],
    shapes: list[tuple[int, int]],
    vectorized: bool,
    on_shape: Callable[[int], None] | None,
    computed: Network,
) -> None:
    """Take one pass of every (experts, images)."""
    for done, (size, length) in enumerate(shapes, 1):
        images = torch.zeros(size, length, *image_shape, device=theta.device)
        labels = torch.zeros(size, length, dtype=torch.int64, device=theta.device)
        parallel_gradients(computed, [theta] * size, images, labels, vectorized)
        if on_shape is not None:
            on_shape(done)


def _stored_epochs(store: ExpertStore, id: int) -> int:
    """Return how many epochs expert ``id`` has, -1 if it has no file."""
    return store.epochs(id) if store.file(id).exists() else -1


def _trainer(device: torch.device | None, max_epochs: int, bar: RichProgressBar | None) -> Trainer:
    """Make a Trainer that does nothing but run the epochs on one device."""
    accelerator = "auto" if device is None else {"cuda": "gpu"}.get(device.type, device.type)
    return Trainer(
        accelerator=accelerator,
        devices=1 if device is None or device.index is None or device.type == "cpu" else [device.index],
        max_epochs=max_epochs,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=bar is not None,
        callbacks=[bar] if bar else [],
    )


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Leave nothing behind in the process: random states, handlers, log levels, gradient modes."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - it is guarded, not used
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    in_main = threading.current_thread() is threading.main_thread()
    on_interrupt = signal.getsignal(signal.SIGINT) if in_main else None
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with (
        torch.random.fork_rng(devices=devices),
        torch.inference_mode(False),
        torch.enable_grad(),
        warnings.catch_warnings(),
    ):
        # A person who asks for the CPU on a machine with a GPU has already been told so by the outer run.
        warnings.filterwarnings("ignore", message="GPU available but not used")
        # Lightning 2.6 asks torch 2.14 whether a tree is a leaf in the old way.
        warnings.filterwarnings("ignore", _OLD_LEAF_CHECK, FutureWarning)
        logger.setLevel(logging.WARNING)  # which devices there are, once per group of experts, helps nobody
        try:
            yield
        finally:
            logger.setLevel(level)
            if in_main and on_interrupt is not None:
                signal.signal(signal.SIGINT, on_interrupt)  # Lightning ignores it for good after a Ctrl-C
            np.random.set_state(numpy_state)  # noqa: NPY002
            random.setstate(python_state)
