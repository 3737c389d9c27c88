"""The LightningModule that holds the learnable images: hooks, optimizer, logging."""

import os
import weakref
from collections.abc import Callable
from dataclasses import fields
from operator import attrgetter
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from dd_lightning.datamodules import DistillationDataModule
from dd_lightning.distillation import Demand, Distillation, OnNonfinite
from dd_lightning.execution.options import Execution
from dd_lightning.functional.errors import InputError
from dd_lightning.functional.formation import FormationKind
from dd_lightning.networks import FunctionalNetwork, NetworkSpec
from dd_lightning.objectives import MatchingObjective, ObjectiveName, Problem, make_objective
from dd_lightning.pools import CandidatePool
from dd_lightning.sets.initial import Initialization
from dd_lightning.sets.optimizer import SyntheticOptimizer
from dd_lightning.sets.storage import Storage
from dd_lightning.sets.synthetic import ImageSpace, LabelKind, SyntheticSet
from dd_lightning.trainer.checkpoints import SavedModule, check_format, reopen_epoch
from dd_lightning.trainer.endings import Endings
from dd_lightning.trainer.run import attached_data, check_trainer, log_step, pool_setup, share_version, sum_gradients
from dd_lightning.trainer.settings import as_plain, check_same_run, from_plain, run_settings


def _of_run(name: str) -> Any:  # noqa: ANN401  (whatever it is)
    return property(attrgetter(f"distillation.{name}"), lambda module, value: setattr(module.distillation, name, value))


class DistillationModule(SavedModule):
    """Dataset distillation: learns a few images per class by one matching objective.

    One batch is one step t; without a selection callback, it learns from a uniformly drawn candidate: the base method.

    Args:
        objective: Matching objective, or ``mtt``, ``idc``, ``dream_plus`` or ``dm`` with its defaults; null is ``mtt``.
        pool: Where candidates come from; null is the objective's own kind of pool with its defaults.
        network: Architecture of students and experts: a name (``ConvNet-3-W32``), an import path or a factory.
        ipc: Stored images per class.
        factor: Each stored image is cut into factor x factor tiles, which are enlarged; 2 in IDC for CIFAR.
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
        image_steps: ``per_class`` takes the one step equal to a reference's step for each class (IDC, DREAM).
        image_optimizer: ``sgd``, as in the references; or ``adam`` for the images, which ignores ``momentum``.
        equal_norm: Scale each image gradient to the running mean of its norm: a large loss is then no larger step.
        processes: Several ones ``shard`` each step; or each takes its own, and the ``average`` gradient moves S.
        inner_loop: Steps of an outer iteration, 100 in IDC and DREAM; curves are also logged against these.
        clamp: Clamp the images to valid pixels at the start of each outer iteration (IDC, DREAM).
        student_lr_floor: Least student learning rate; null is no floor, as in MTT.
        on_nonfinite: When the loss or a gradient is NaN or infinite: stop with an ``error``, or ``skip`` the step.
        execution: How everything is computed; objective, pool and evaluation may override it.
        seed: Seed of every draw; null takes the one given to ``seed_everything``.

    Raises:
        InputError: If a value is out of range, or objective and pool do not go together.
    """

    # kept by the run alone: who sets one here sets it there
    objective: MatchingObjective = _of_run("objective")
    pool: CandidatePool = _of_run("pool")
    storage: Storage = _of_run("storage")
    optimizer: SyntheticOptimizer = _of_run("optimizer")
    problem: Problem = _of_run("problem")

    def __init__(
        self,
        objective: MatchingObjective | ObjectiveName | None = None,
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
        processes: Literal["shard", "average"] = "shard",
        inner_loop: int | None = None,
        clamp: bool = False,
        student_lr_floor: float | None = None,
        on_nonfinite: OnNonfinite = "error",
        execution: Execution = Execution(),  # noqa: B008  (frozen)
        seed: int | None = None,
    ) -> None:
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed
        options = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        objective = options["objective"] = make_objective(from_plain("objective", objective) or "mtt")
        pool = options["pool"] = from_plain("pool", pool) or objective.default_pool()
        self.save_hyperparameters(as_plain(options), logger=False)
        storage = Storage(**{field.name: options[field.name] for field in fields(Storage)})
        optimizer = SyntheticOptimizer(**{f.name: options[f.name] for f in fields(SyntheticOptimizer)})
        rules: dict[str, Any] = {"inner_loop": inner_loop, "clamp": clamp, "on_nonfinite": on_nonfinite, "seed": seed}
        self.distillation = Distillation(objective, pool, storage, optimizer, **rules)
        self.network_spec, self.execution = network, from_plain("execution", execution)
        self.synthetic = None
        self.demand = Demand()  # a selection says what it needs before `setup`
        self.measured: dict[str, float] = {}  # evaluations say what, before `validation_step` and `test_step`
        self._initialized = self._skipped = False
        self._settings: dict[str, Any] = {}
        self._last_trainer: Callable[[], Trainer | None] = type(None)  # none, until a weak reference replaces it

    @property
    def synthetic_set(self) -> SyntheticSet:
        """The synthetic set; it exists once the module is set up or loaded."""
        if self.synthetic is None:
            raise InputError("the synthetic set does not exist yet: fit the module, or load a checkpoint")
        return self.synthetic

    @property
    def datamodule(self) -> DistillationDataModule:
        """The data that the Trainer was given."""
        return attached_data(self.trainer)

    def configure_callbacks(self) -> list[Callback]:
        """Add none; it is the last moment before data modules are used, and loggers make their folders."""
        attached_data(self.trainer)
        share_version(self.trainer)
        return []

    def setup(self, stage: str) -> None:
        """Check all options against data and network, and prepare the pool (training missing experts)."""
        self.trainer.limit_val_batches = int(stage != "fit")  # a fit's callbacks evaluate
        if stage != "fit":
            return
        Endings.attach(check_trainer(self.trainer))
        data, demand = self.datamodule.to(self.trainer.strategy.root_device), self.demand
        network = FunctionalNetwork(self.network_spec, data.image_shape, data.num_classes)
        continues = self._last_trainer() is self.trainer
        setup = pool_setup(self.trainer, self.distillation, network, demand, self.execution, continues)
        self.synthetic = self.distillation.setup(setup, data.space, demand.candidates, self.synthetic, rank_zero_info)
        self._settings = run_settings(self.hparams, self.objective, self.pool, data.fingerprint, demand.selection)
        self._last_trainer, self.demand = weakref.ref(self.trainer), Demand()

    def on_fit_start(self) -> None:
        """Draw S_0, unless S comes from a checkpoint or an earlier fit."""
        if not self._initialized:
            self.distillation.draw_initial()
            self._initialized = True

    def configure_optimizers(self) -> torch.optim.SGD:
        """Return one SGD with a group each for images, student learning rate and soft labels."""
        return self.optimizer.build(self.synthetic_set, self.objective.learnable, self.datamodule.num_classes)

    def on_train_start(self) -> None:
        """Apply the learning rates, let the objective prepare for what is learned, and start the clock."""
        groups, own = self.trainer.optimizers[0].param_groups, self.configure_optimizers().param_groups
        for group, wanted in zip(groups, own, strict=True):
            group["lr"] = wanted["lr"]  # a checkpoint brings those of before
        sum_gradients(self.trainer, self.distillation)
        self.objective.prepare(self.problem, self.trainer.max_steps, rank_zero_info)
        self.distillation.cost.start()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Learn from the selected candidate, or from a uniformly drawn one."""
        del batch, batch_idx
        (run := self.distillation).begin(self.global_step)
        scored = run.take()
        self.log("loss", scored.loss, prog_bar=True, logger=False)
        log_step(self.trainer, run, scored)
        self._skipped = run.skips(scored)
        return run.no_loss() if self._skipped else run.loss(scored)

    def validation_step(self, batch: int, batch_idx: int) -> None:
        """Return what the Trainer's evaluations have measured of S."""
        del batch, batch_idx
        if not self.measured:
            raise InputError("nothing evaluates the set; give the Trainer an EvalCallback: callbacks=[EvalCallback()]")
        self.log_dict(self.measured, batch_size=1)

    test_step = validation_step

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401  (Lightning's own signature)
        """Compute the gradient by the images."""
        with self.distillation.explain_oom("computing the gradient"):
            super().backward(loss, *args, **kwargs)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let only finite gradients move S."""
        if self._skipped or not self.distillation.adjust_gradients():
            self.distillation.skipped_steps += 1
            optimizer.zero_grad()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what a resumed run needs to go on bit for bit."""
        checkpoint["distillation"] = self.distillation.state_dict(self.global_step) | {"settings": self._settings}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore it; ``load_from_checkpoint``, without a setup, gives back the module and the images."""
        state, seed = check_format(checkpoint.get("distillation")), self.distillation.seed
        if self.synthetic is not None:
            check_same_run(state["settings"], self._settings)
            self.distillation.load_state_dict(state)
            if state["seed"] != seed:
                rank_zero_warn(f"seed is {seed}, but the checkpoint's run has {state['seed']}, which is used")
        self._initialized = True
        reopen_epoch(checkpoint)
