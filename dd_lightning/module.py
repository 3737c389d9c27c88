"""The LightningModule that holds the learnable images."""

import os
import time
from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from dd_lightning.cost import peak_memory_bytes
from dd_lightning.data import DistillationDataModule
from dd_lightning.experts import train_experts
from dd_lightning.formats import ExpertIdentity, ExpertStore
from dd_lightning.functional.errors import InputError
from dd_lightning.functional.random import StepContext, step_generator
from dd_lightning.networks import FunctionalNetwork, NetworkSpec
from dd_lightning.objectives import MatchingObjective, ScoredCandidate, TrajectoryMatching
from dd_lightning.pools import CandidateKey, CandidatePool, PoolSetup, TrajectoryPool
from dd_lightning.real import RealSet
from dd_lightning.recipes import ExpertRecipe
from dd_lightning.scalars import log_scalars, logs_now
from dd_lightning.synthetic import Initialisation, LabelKind, SyntheticSet, class_labels, initial_images

DEFAULT_STEPS = 2000
"""Distillation steps when the Trainer is given no ``max_steps``: the paper's number for trajectory matching."""


class DistillationModule(LightningModule):
    """Dataset distillation: learns a few images per class by one matching objective.

    One batch is one optimiser step is one distillation step t. Without a selection callback each step learns from one
    candidate drawn uniformly from the pool: the base method.

    Args:
        objective: Matching objective; null is trajectory matching with its defaults.
        pool: Where candidates come from; null is a trajectory pool with its defaults.
        network: Architecture of students and experts, by name (``ConvNet-3``, ``ConvNet-3-W32``), import path or
            factory.
        ipc: Images per class.
        init: Start from real images or from noise; ``real`` is the MTT reference's default.
        labels: ``hard``, or ``soft``: logits taken from the experts (DATM).
        image_lr: Learning rate of the images; 100 is the published value for CIFAR-10 at ipc 1.
        student_lr: Initial learning rate of the student; it is learned. 0.01 in the reference.
        student_lr_lr: Learning rate of the student's learning rate; 0 keeps it fixed.
        label_lr: Learning rate of soft labels; 0 keeps them fixed.
        momentum: Momentum of the images' and the learning rate's SGD; 0.5 in the reference.
        label_momentum: Momentum of the soft labels' SGD; 0.9 in DATM.
        student_lr_floor: Keep the student's learning rate at or above this; null never touches it, as the reference.
        on_nonfinite: What to do when the loss or a gradient is NaN or infinite: stop with an error, or leave S
            unchanged and go on to the next step.
        seed: Seed of every draw; null takes the one given to ``seed_everything``.

    Raises:
        InputError: If a value is out of range.
    """

    def __init__(
        self,
        objective: MatchingObjective | None = None,
        pool: CandidatePool | None = None,
        network: NetworkSpec = "ConvNet-3",
        ipc: int = 1,
        init: Initialisation = "real",
        labels: LabelKind = "hard",
        image_lr: float = 100.0,
        student_lr: float = 0.01,
        student_lr_lr: float = 1e-7,
        label_lr: float = 0.0,
        momentum: float = 0.5,
        label_momentum: float = 0.9,
        student_lr_floor: float | None = None,
        on_nonfinite: Literal["error", "skip"] = "error",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if ipc < 1:
            raise InputError(f"ipc is {ipc}; it must be at least 1 image per class")
        if student_lr <= 0:
            raise InputError(f"student_lr is {student_lr}; the student's learning rate must start above 0")
        if student_lr_floor is not None and student_lr_floor <= 0:
            raise InputError(f"student_lr_floor is {student_lr_floor}; give a positive number, or null for no floor")
        self.objective: MatchingObjective = objective or TrajectoryMatching()
        self.pool: CandidatePool = pool or TrajectoryPool()
        self.network_spec = network
        self.ipc = ipc
        self.init_kind: Initialisation = init
        self.label_kind: LabelKind = labels
        self.image_lr = image_lr
        self.initial_student_lr = student_lr
        self.student_lr_lr = student_lr_lr
        self.label_lr = label_lr
        self.momentum = momentum
        self.label_momentum = label_momentum
        self.student_lr_floor = student_lr_floor
        self.on_nonfinite = on_nonfinite
        self.seed = seed if seed is not None else int(os.environ.get("PL_GLOBAL_SEED", "0"))
        self.synthetic: SyntheticSet | None = None
        self.candidate_evaluations = 0
        self.seconds_before_resume = 0.0
        self.skipped_steps = 0
        self.expert_seconds = 0.0
        self._network: FunctionalNetwork | None = None
        self._real: RealSet | None = None
        self._started = time.perf_counter()
        self._selected: tuple[ScoredCandidate, list[CandidateKey]] | None = None
        self._refresh_due: tuple[CandidateKey, list[CandidateKey]] | None = None
        self._begun_step = -1
        self._draw: Any = None
        self._skipped = False

    # What is learned, and from what

    @property
    def synthetic_set(self) -> SyntheticSet:
        """The synthetic set; it exists once the module is set up or loaded."""
        if self.synthetic is None:
            raise RuntimeError("the synthetic set does not exist yet: fit the module, or load a checkpoint")
        return self.synthetic

    @property
    def network(self) -> FunctionalNetwork:
        """The architecture of students and experts; it exists once the module is set up."""
        if self._network is None:
            raise RuntimeError("the network does not exist yet: it needs the data's shape, known at setup")
        return self._network

    @property
    def datamodule(self) -> DistillationDataModule:
        """The data that the Trainer was given.

        Raises:
            InputError: If it is not a DistillationDataModule.
        """
        datamodule = getattr(self.trainer, "datamodule", None)
        if not isinstance(datamodule, DistillationDataModule):
            raise InputError(
                f"the data is {type(datamodule).__name__}; pass a DistillationDataModule as Trainer.fit(datamodule=...)"
            )
        return datamodule

    @property
    def real(self) -> RealSet:
        """The training data on the device; it is there once fitting has begun."""
        if self._real is None:
            raise RuntimeError("the real set is not on the device yet: it is brought there when fitting begins")
        return self._real

    @property
    def student_lr(self) -> float:
        """The student's current learning rate, with the floor applied."""
        value = float(self.synthetic_set.student_lr.detach())
        return value if self.student_lr_floor is None else max(value, self.student_lr_floor)

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of the run so far, over all its resumptions."""
        return self.seconds_before_resume + time.perf_counter() - self._started

    # One step

    def context(self) -> StepContext:
        """Return the randomness of the current step."""
        return StepContext(self.seed, self.global_step, self.global_rank)

    def draw_candidates(self, count: int) -> list[CandidateKey]:
        """Draw distinct candidates from the pool."""
        self._begin_step()
        return self.pool.draw(count, self.context())

    def score(self, keys: Sequence[CandidateKey]) -> list[ScoredCandidate]:
        """Score candidates on the current synthetic set, all with the same draws."""
        self._begin_step()
        synthetic, real = self.synthetic_set, self.real
        scored = [self.objective.score(synthetic, real, self.network, self.pool.load(key), self._draw) for key in keys]
        self.candidate_evaluations += len(scored)
        return scored

    def select(self, scored: ScoredCandidate, drawn: Sequence[CandidateKey]) -> None:
        """Fix what this step learns from, in place of a uniform draw.

        Args:
            scored: The candidate, with whatever its scoring computed.
            drawn: All candidates that the step has looked at.
        """
        self._selected = (scored, list(drawn))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        """Learn from the selected candidate, or from a uniformly drawn one."""
        del batch, batch_idx
        if self._selected is None:
            keys = self.draw_candidates(1)
            self._selected = (self.score(keys)[0], keys)
        (scored, drawn), self._selected = self._selected, None
        self._refresh_due = (scored.candidate.key, drawn)
        self._log_step(scored)
        self._skipped = not self._finite(scored.loss, "the matching loss") or self.objective.skips(scored.loss)
        if self._skipped:
            self.skipped_steps += 1
            return None
        return self.objective.loss(self.synthetic_set, self.network, scored)

    def _begin_step(self) -> None:
        """Do, once per step, what must happen between two steps; at the start, so that no checkpoint misses it."""
        if self._begun_step == self.global_step:
            return
        self._begun_step = self.global_step
        if self._refresh_due is not None:
            self.pool.refresh(*self._refresh_due, self.context())
            self._refresh_due = None
        with torch.no_grad():
            self.synthetic_set.student_lr.fill_(self.student_lr)
        self._draw = self.objective.draw(self.synthetic_set, self.real, self.context())

    def _finite(self, value: Tensor, what: str) -> bool:
        if bool(torch.isfinite(value).all()):
            return True
        if self.on_nonfinite == "error":
            raise InputError(
                f"{what} is not finite at step {self.global_step} (student_lr {self.student_lr:.3g}, image_lr "
                f"{self.image_lr:g}); lower image_lr or student_lr_lr, set student_lr_floor, or on_nonfinite: skip"
            )
        return False

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Check that the images have a finite gradient before they are moved by it."""
        if self._skipped:
            return
        images = self.synthetic_set.images
        if images.grad is None:
            raise RuntimeError(f"the images have no gradient at step {self.global_step}: the graph was dropped")
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if not all(self._finite(p.grad, "a gradient") for p in parameters if p.grad is not None):
            self.skipped_steps += 1
            optimizer.zero_grad()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One SGD with a group each for images, student learning rate and soft labels."""
        synthetic = self.synthetic_set
        synthetic.student_lr.requires_grad_(self.student_lr_lr > 0)
        groups: list[dict[str, Any]] = [{"params": [synthetic.images], "lr": self.image_lr}]
        if self.student_lr_lr > 0:
            groups.append({"params": [synthetic.student_lr], "lr": self.student_lr_lr})
        if synthetic.label_kind == "soft":
            synthetic.targets.requires_grad_(self.label_lr > 0)
            if self.label_lr > 0:
                groups.append({"params": [synthetic.targets], "lr": self.label_lr, "momentum": self.label_momentum})
        return torch.optim.SGD(groups, lr=self.image_lr, momentum=self.momentum)

    # Setting up and resuming

    def setup(self, stage: str) -> None:
        """Build the network, the pool (training experts that are missing) and the initial synthetic set."""
        if stage != "fit":
            return
        self._refuse_unsupported_trainer()
        datamodule, device = self.datamodule, self.trainer.strategy.root_device
        real = datamodule.train.to(device)
        self._network = FunctionalNetwork(self.network_spec, datamodule.image_shape, datamodule.num_classes).to(device)
        # ipc is checked, by drawing S_0, before experts are trained for hours
        images = initial_images(real, self.ipc, self.init_kind, step_generator(self.seed, 0, "initial"))
        labels = class_labels(real.num_classes, self.ipc).to(device)
        self.pool.prepare(
            PoolSetup(self._network, real, datamodule.name, datamodule.fingerprint, device, self._train_experts)
        )
        if self.synthetic is None:
            targets = labels if self.label_kind == "hard" else self.pool.teacher_logits(images, labels)
            self.synthetic = SyntheticSet(images, targets, self.initial_student_lr).to(device)

    def _refuse_unsupported_trainer(self) -> None:
        if self.trainer.precision != "32-true":
            raise InputError(
                f"precision is {self.trainer.precision!r}, but only '32-true' is supported: autocast would reach the "
                "step and not the selection; set trainer.precision: 32-true"
            )
        if self.trainer.accumulate_grad_batches != 1:
            raise InputError(
                f"accumulate_grad_batches is {self.trainer.accumulate_grad_batches}, but one batch is one "
                "distillation step; set trainer.accumulate_grad_batches: 1"
            )
        if self.trainer.max_steps < 1:
            self.trainer.fit_loop.epoch_loop.max_steps = DEFAULT_STEPS
            rank_zero_info(f"max_steps is not set: running the paper's {DEFAULT_STEPS} distillation steps")

    def _train_experts(
        self, store: ExpertStore, identity: ExpertIdentity, recipe: ExpertRecipe, num_experts: int, epochs: int
    ) -> None:
        datamodule, started = self.datamodule, time.perf_counter()
        if self.trainer.is_global_zero:
            train_experts(
                self.network,
                datamodule.train,
                store,
                identity,
                recipe,
                num_experts,
                epochs,
                held_out=datamodule.test,
                device=self.trainer.strategy.root_device,
                progress_bar=self.trainer.progress_bar_callback is not None,
            )
        self.trainer.strategy.barrier("experts")
        self.expert_seconds = time.perf_counter() - started

    def on_fit_start(self) -> None:
        """Bring the real data to the device and start the clock."""
        self._real = self.datamodule.train.to(self.device)
        self._started = time.perf_counter()
        self._begun_step, self._selected = -1, None  # of an earlier fit of the same module

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what a resumed run needs to go on bit for bit."""
        checkpoint["distillation"] = {
            "seed": self.seed,
            "pool": self.pool.state_dict(),
            "refresh_due": self._refresh_due,
            "candidate_evaluations": self.candidate_evaluations,
            "skipped_steps": self.skipped_steps,
            "seconds": self.seconds,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore it; the seed of the checkpoint wins, or the run would not be the same run."""
        state = checkpoint.get("distillation")
        if state is None:
            raise InputError("the checkpoint holds no distillation run; give one that DistillationModule wrote")
        if state["seed"] != self.seed and self.synthetic is not None:
            rank_zero_warn(f"seed is {self.seed}, but the checkpoint's run has {state['seed']}: going on with that one")
        self.seed = state["seed"]
        self.pool.load_state_dict(state["pool"])
        due = state["refresh_due"]
        self._refresh_due = None if due is None else (tuple(due[0]), [tuple(key) for key in due[1]])
        self.candidate_evaluations = state["candidate_evaluations"]
        self.skipped_steps = state["skipped_steps"]
        self.seconds_before_resume = state["seconds"]
        if "loops" in checkpoint:  # a longer run may go on where a finished one ended: its one epoch is not over
            checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"] = False
        saved = {name.removeprefix("synthetic."): value for name, value in checkpoint["state_dict"].items()}
        if self.synthetic is None:  # load_from_checkpoint: there was no setup
            self.synthetic = SyntheticSet(saved["images"], saved["targets"], float(saved["student_lr"]))
        elif self.synthetic.images.shape != saved["images"].shape:
            raise InputError(
                f"the checkpoint's images are {tuple(saved['images'].shape)}, but the configuration makes "
                f"{tuple(self.synthetic.images.shape)}; resume with the configuration that the run was started with"
            )
        elif saved["targets"].is_floating_point() != self.synthetic.targets.is_floating_point():
            raise InputError(
                f"labels is {self.label_kind!r}, but the checkpoint's run has the other kind; resume with the "
                "configuration that the run was started with"
            )

    # Logging

    def _log_step(self, scored: ScoredCandidate) -> None:
        self.log("loss", scored.loss, prog_bar=True, logger=False)
        if logs_now(self.trainer):
            peak = peak_memory_bytes(self.device)
            values = {
                "distill/loss": float(scored.loss),
                "distill/student_lr": self.student_lr,
                "cost/seconds": self.seconds,
                "cost/candidate_evaluations": float(self.candidate_evaluations),
            }
            if peak is not None:
                values["cost/peak_memory_mb"] = peak / 2**20
            log_scalars(self.trainer, values, self.global_step)

    def hyperparameters(self) -> dict[str, Any]:
        """Return the run's settings as plain values, for TensorBoard's hparams."""
        settings: dict[str, Any] = {
            "objective": type(self.objective).__name__,
            "pool": type(self.pool).__name__,
            "network": self.network.name,
            "dataset": self.datamodule.name,
            "ipc": self.ipc,
            "init": self.init_kind,
            "labels": self.label_kind,
            "image_lr": self.image_lr,
            "student_lr": self.initial_student_lr,
            "student_lr_lr": self.student_lr_lr,
            "momentum": self.momentum,
            "seed": self.seed,
            "steps": self.trainer.max_steps,
        }
        for owner in (self.objective, self.pool):
            plain = {k: v for k, v in vars(owner).items() if isinstance(v, (bool, int, float, str))}
            settings |= {name: value for name, value in plain.items() if not name.startswith("_")}
        return settings


def as_distillation(module: LightningModule) -> DistillationModule:
    """Return the module that a callback was called with, as what it must be.

    Raises:
        InputError: If it is another kind of module.
    """
    if not isinstance(module, DistillationModule):
        raise InputError(f"the callback is attached to {type(module).__name__}; it needs a DistillationModule")
    return module
