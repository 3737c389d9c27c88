"""The LightningModule that holds the learnable images: hooks, optimizer, logging."""

import os
import weakref
from dataclasses import fields
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from dd_lightning.datamodules import DistillationDataModule
from dd_lightning.distillation import Demand, Distillation, OnNonfinite, check_format
from dd_lightning.execution.options import Execution
from dd_lightning.functional.formation import FormationKind
from dd_lightning.networks import FunctionalNetwork, NetworkSpec
from dd_lightning.objectives import MatchingObjective, Problem, TrajectoryMatching
from dd_lightning.pools import CandidatePool, PoolSetup
from dd_lightning.sets.initial import Initialization
from dd_lightning.sets.optimizer import SyntheticOptimizer
from dd_lightning.sets.storage import Storage
from dd_lightning.sets.synthetic import ImageSpace, LabelKind, SyntheticSet
from dd_lightning.trainer.checkpoints import reopen_epoch
from dd_lightning.trainer.endings import Endings
from dd_lightning.trainer.run import TrainerProcess, attached_data, check_trainer, log_scalars, logs_now


class DistillationModule(LightningModule):
    """Dataset distillation: learns a few images per class by one matching objective.

    One batch is one optimizer step is one distillation step t. Without a selection callback, each step learns from one
    candidate drawn uniformly from the pool: the base method.

    Args:
        objective: Matching objective; null is trajectory matching with its defaults.
        pool: Where candidates come from; null is the objective's own kind of pool with its defaults.
        network: Architecture of students and experts: a name (``ConvNet-3-W32``), an import path or a factory.
        ipc: Stored images per class.
        factor: Each stored image is cut into factor x factor tiles, enlarged to training images; 2 in IDC for CIFAR.
        formation: ``single`` cuts by ``factor`` alone (IDC), ``multi`` by 1, 2, ..., ``factor``.
        image_space: Images are stored as the ``network`` sees them, or as ``pixels`` in [0, 1] (IDC, DREAM).
        init: Start from ``real`` images (MTT), those nearest to the centroids of ``kmeans`` (DREAM), or ``noise``.
        labels: ``hard``, or ``soft``: logits taken from the experts (DATM).
        image_lr: Learning rate of the images; 100 in MTT for CIFAR-10 at ipc 1.
        student_lr: Initial learning rate of the student; it is learned. 0.01 in MTT.
        student_lr_lr: Learning rate of the student's learning rate; 0 keeps it fixed.
        label_lr: Learning rate of soft labels; 0 keeps them fixed.
        momentum: Momentum of the images' and the learning rate's SGD; 0.5 in MTT and IDC.
        label_momentum: Momentum of the soft labels' SGD; 0.9 in DATM.
        image_steps: ``per_class``: ``image_lr`` and ``momentum`` are those of a reference that steps once per class
            (IDC, DREAM), and the equivalent single step is taken. ``joint``: they are this step's own.
        image_optimizer: ``sgd``, as in the references; or ``adam`` for the images, which ignores ``momentum``.
        equal_norm: Scale each image gradient to the running mean of its norm: a large loss is then no larger step.
        inner_loop: Steps of an outer iteration, 100 in IDC and DREAM; curves are also logged against these.
        clamp: Clamp the images to valid pixels at the start of each outer iteration (IDC, DREAM).
        student_lr_floor: Least student learning rate; null is no floor, as in MTT.
        on_nonfinite: When the loss or a gradient is NaN or infinite: stop with an ``error``, or ``skip`` the step.
        execution: How everything is computed; objective, pool and evaluation may override it.
        seed: Seed of every draw; null takes the one given to ``seed_everything``.

    Raises:
        InputError: If a value is out of range, or objective and pool do not go together.
    """

    def __init__(
        self,
        objective: MatchingObjective | None = None,
        pool: CandidatePool | None = None,
        network: NetworkSpec = "ConvNet-3",
        ipc: int = 1,
        factor: int = 1,
        formation: FormationKind = "single",
        image_space: ImageSpace = "network",
        init: Initialization = "real",
        labels: LabelKind = "hard",
        image_lr: float = 100.0,
        student_lr: float = 0.01,
        student_lr_lr: float = 1e-7,
        label_lr: float = 0.0,
        momentum: float = 0.5,
        label_momentum: float = 0.9,
        image_steps: Literal["joint", "per_class"] = "joint",
        image_optimizer: Literal["sgd", "adam"] = "sgd",
        equal_norm: bool = False,
        inner_loop: int | None = None,
        clamp: bool = False,
        student_lr_floor: float | None = None,
        on_nonfinite: OnNonfinite = "error",
        execution: Execution = Execution(),  # noqa: B008  (frozen)
        seed: int | None = None,
    ) -> None:
        options = dict(locals())
        super().__init__()
        self.storage = Storage(**{field.name: options[field.name] for field in fields(Storage)})
        self.optimizer = SyntheticOptimizer(**{f.name: options[f.name] for f in fields(SyntheticOptimizer)})
        self.objective: MatchingObjective = objective or TrajectoryMatching()
        self.pool: CandidatePool = pool or self.objective.default_pool()
        self.distillation = Distillation(
            self.objective,
            self.pool,
            self.storage,
            self.optimizer,
            inner_loop=inner_loop,
            clamp=clamp,
            on_nonfinite=on_nonfinite,
            seed=seed if seed is not None else int(os.environ.get("PL_GLOBAL_SEED", "0")),
        )
        self.network_spec = network
        self.execution = execution
        self.synthetic: SyntheticSet | None = None
        self.demand = Demand()  # a selection says what it needs before `setup`
        self._initialized = False
        self._skipped = False
        self._last_trainer: weakref.ref[Trainer] | None = None

    @property
    def synthetic_set(self) -> SyntheticSet:
        """The synthetic set; it exists once the module is set up or loaded."""
        if self.synthetic is None:
            raise RuntimeError("the synthetic set does not exist yet: fit the module, or load a checkpoint")
        return self.synthetic

    @property
    def problem(self) -> Problem:
        """Synthetic set, real set and network; they exist once the module is set up."""
        return self.distillation.problem

    @property
    def datamodule(self) -> DistillationDataModule:
        """The data that the Trainer was given."""
        return attached_data(self.trainer)

    def setup(self, stage: str) -> None:
        """Check all options against data and network, and prepare the pool (training missing experts)."""
        if stage != "fit":
            return
        check_trainer(self.trainer)
        Endings.attach(self.trainer)
        data, demand = self.datamodule.to(self.trainer.strategy.root_device), self.demand
        setup = PoolSetup(
            FunctionalNetwork(self.network_spec, data.image_shape, data.num_classes),
            data.train,
            data.name,
            data.fingerprint,
            held_out=data.test,
            seed=self.distillation.seed,
            steps=self.trainer.max_steps,
            size=demand.pool_size,
            keeps_candidates=demand.keeps_candidates,
            soft_labels=self.storage.labels == "soft",
            continues=self._last_trainer is not None and self._last_trainer() is self.trainer,
            execution=self.execution,
            process=TrainerProcess(self.trainer),
            progress_bar=self.trainer.progress_bar_callback is not None,
        )
        self.synthetic = self.distillation.setup(setup, data.space, demand.candidates, self.synthetic, rank_zero_info)
        self._last_trainer, self.demand = weakref.ref(self.trainer), Demand()

    def on_fit_start(self) -> None:
        """Draw S_0, unless S comes from a checkpoint or an earlier fit."""
        if not self._initialized:
            self.distillation.draw_initial()
        self._initialized = True

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return one SGD with a group each for images, student learning rate and soft labels."""
        return self.optimizer.build(self.synthetic_set, self.objective.learnable, self.datamodule.num_classes)

    def on_train_start(self) -> None:
        """Let the objective prepare, now that it is known what is learned, and start the clock."""
        self.objective.prepare(self.problem, self.trainer.max_steps, rank_zero_info)
        self.distillation.cost.start()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Learn from the selected candidate, or from a uniformly drawn one."""
        del batch, batch_idx
        run = self.distillation
        run.begin(self.global_step)
        scored = run.take()
        self.log("loss", scored.loss, prog_bar=True, logger=False)
        if logs_now(self.trainer):
            log_scalars(self.trainer, run.scalars(scored))
            if run.outer_iteration is not None:
                log_scalars(self.trainer, {"outer/loss": float(scored.loss)}, run.outer_iteration)
        self._skipped = TrainerProcess(self.trainer).any(run.skips(scored))
        if not self._skipped:
            return run.loss(scored)
        # without effect on S, and not None, which Lightning refuses under several processes
        return torch.stack([p.sum() for p in self.synthetic_set.parameters() if p.requires_grad]).sum() * 0

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401  (Lightning's own signature)
        """Compute the gradient by the images."""
        with self.distillation.explain_oom("computing the gradient"):
            super().backward(loss, *args, **kwargs)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let only finite gradients move S."""
        if self._skipped or TrainerProcess(self.trainer).any(not self.distillation.adjust_gradients()):
            self.distillation.skipped_steps += 1
            optimizer.zero_grad()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what a resumed run needs to go on bit for bit."""
        checkpoint["distillation"] = self.distillation.state_dict(self.global_step)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore it. Without a setup, as in ``load_from_checkpoint``, give back the images."""
        state, seed, prefix = check_format(checkpoint.get("distillation")), self.distillation.seed, "synthetic."
        if self.synthetic is not None:
            self.distillation.load_state_dict(state)
            if state["seed"] != seed:
                rank_zero_warn(f"seed is {seed}, but the checkpoint's run has {state['seed']}, which is used")
        else:
            saved = checkpoint["state_dict"].items()
            synthetic = {name.removeprefix(prefix): value for name, value in saved if name.startswith(prefix)}
            self.storage = Storage(**state["storage"])
            self.synthetic = SyntheticSet.from_state(synthetic)
        self._initialized = True
        if "loops" in checkpoint:
            reopen_epoch(checkpoint)
