"""The LightningModule that holds the learnable images."""

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from dd_lightning.datamodules import DistillationDataModule
from dd_lightning.execution.memory import MemoryEstimate, MemoryPart, explain_oom, peak_memory_bytes
from dd_lightning.functional.distances import step_per_iteration
from dd_lightning.functional.errors import InputError
from dd_lightning.functional.formation import Formation, FormationKind
from dd_lightning.functional.random import StepContext, step_generator
from dd_lightning.networks import FunctionalNetwork, NetworkSpec
from dd_lightning.objectives import MatchingObjective, ScoredCandidate, TrajectoryMatching
from dd_lightning.pools import Candidate, CandidateKey, CandidatePool, PoolSetup
from dd_lightning.sets.class_batches import Features
from dd_lightning.sets.initial import Initialization, check_initial, class_labels, initial_images
from dd_lightning.sets.real import RealSet
from dd_lightning.sets.synthetic import ImageSpace, LabelKind, SyntheticSet
from dd_lightning.training.expert_store import ExpertIdentity, ExpertStore
from dd_lightning.training.experts import train_experts
from dd_lightning.training.recipes import ExpertRecipe

DEFAULT_STEPS = 2000
"""Distillation steps when the Trainer is given no ``max_steps``: the paper's number for trajectory matching."""


class DistillationModule(LightningModule):
    """Dataset distillation: learns a few images per class by one matching objective.

    One batch is one optimizer step is one distillation step t. Without a selection callback each step learns from one
    candidate drawn uniformly from the pool: the base method.

    Args:
        objective: Matching objective; null is trajectory matching with its defaults.
        pool: Where candidates come from; null is the pool that goes with the objective, with its defaults.
        network: Architecture of students and experts, by name (``ConvNet-3``, ``ConvNet-3-W32``), import path or
            factory.
        ipc: Images per class, as they are stored.
        factor: Multi-formation (IDC): each stored image is cut into factor x factor tiles, and each tile is enlarged to
            a training image. 1 is none; IDC uses 2 for CIFAR.
        formation: ``single`` cuts by ``factor`` alone, ``multi`` by 1, 2, ..., ``factor``; ``single`` in IDC.
        image_space: Where images are stored and learned: as networks see them, or as ``pixels`` in [0, 1] that are
            normalized on their way to a network, as in IDC and DREAM. Learning rates belong to one or the other.
        init: Start from ``real`` images (the MTT reference's default), from the real images nearest to the centroids of
            ``kmeans`` (DREAM), or from ``noise``.
        labels: ``hard``, or ``soft``: logits taken from the experts (DATM).
        image_lr: Learning rate of the images; 100 is the published value for CIFAR-10 at ipc 1.
        student_lr: Initial learning rate of the student; it is learned. 0.01 in the reference.
        student_lr_lr: Learning rate of the student's learning rate; 0 keeps it fixed.
        label_lr: Learning rate of soft labels; 0 keeps them fixed.
        momentum: Momentum of the images' and the learning rate's SGD; 0.5 in the references.
        image_steps: ``joint``: one step moves the images of all classes. ``per_class``: ``image_lr`` and ``momentum``
            are those of a reference that steps once for each class (IDC, DREAM); the step that equals them is taken.
        inner_loop: Steps that make up an outer iteration, 100 in IDC and DREAM. Curves are then logged against outer
            iterations, too.
        clamp: Clamp the images to valid pixels at the start of each outer iteration, as IDC and DREAM do.
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
        inner_loop: int | None = None,
        clamp: bool = False,
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
        if inner_loop is not None and inner_loop < 1:
            raise InputError(f"inner_loop is {inner_loop}; an outer iteration has at least 1 step, or use null")
        if clamp and inner_loop is None:
            raise InputError("clamp is true, but inner_loop is null; images are clamped every inner_loop steps: set it")
        self.objective: MatchingObjective = objective or TrajectoryMatching()
        self.pool: CandidatePool = pool or self.objective.default_pool()
        if not issubclass(self.pool.gives, self.objective.candidates):
            raise InputError(
                f"{type(self.objective).__name__} learns from {self.objective.candidates.__name__}, but "
                f"{type(self.pool).__name__} gives {self.pool.gives.__name__}; use "
                f"{type(self.objective.default_pool()).__name__}"
            )
        if label_lr > 0 and not self.objective.learns_labels:
            raise InputError(
                f"label_lr is {label_lr:g}, but {type(self.objective).__name__} has no gradient by the labels; set "
                "label_lr: 0, which keeps them fixed"
            )
        self.network_spec = network
        self.ipc = ipc
        self.formation = Formation(factor, formation)
        self.image_space: ImageSpace = image_space
        self.init_kind: Initialization = init
        self.label_kind: LabelKind = labels
        self.image_lr = image_lr
        self.initial_student_lr = student_lr
        self.student_lr_lr = student_lr_lr
        self.label_lr = label_lr
        self.momentum = momentum
        self.label_momentum = label_momentum
        self.image_steps: Literal["joint", "per_class"] = image_steps
        self.inner_loop = inner_loop
        self.clamp = clamp
        self.student_lr_floor = student_lr_floor
        self.on_nonfinite = on_nonfinite
        self.seed = seed if seed is not None else int(os.environ.get("PL_GLOBAL_SEED", "0"))
        self.synthetic: SyntheticSet | None = None
        self.candidate_evaluations: float = 0
        self.seconds_before_resume = 0.0
        self.skipped_steps = 0
        self.expert_seconds = 0.0
        self.memory_estimate: MemoryEstimate | None = None
        self._network: FunctionalNetwork | None = None
        self._real: RealSet | None = None
        self._started = time.perf_counter()
        self._selected: tuple[ScoredCandidate, list[CandidateKey]] | None = None
        self._refresh_due: tuple[CandidateKey, list[CandidateKey]] | None = None
        self._reference: CandidateKey | None = None
        self._clusters_due = False
        self._begun_step = -1
        self._draw: Any = None
        self._skipped = False
        self._candidates_per_step = self._expected_candidates = 1

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
    def effective_ipc(self) -> int:
        """Images per class after decoding: what networks are trained on."""
        return self.ipc * self.formation.per_image

    @property
    def outer_iteration(self) -> int | None:
        """Outer iterations that are done, where there are any and the last one is complete."""
        if self.inner_loop is None or self.global_step % self.inner_loop != 0:
            return None
        return self.global_step // self.inner_loop

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

    def draw_candidates(self, count: int, exclude: Sequence[CandidateKey] = ()) -> list[CandidateKey]:
        """Draw distinct candidates from the pool, distinct also from those ``exclude`` which they are to stand."""
        self._begin_step()
        return self.pool.draw(count, self.context(), exclude)

    def generations(self, keys: Sequence[CandidateKey]) -> list[int]:
        """Return the pool's :meth:`~CandidatePool.generation` of candidates, as this step finds them."""
        self._begin_step()
        return [self.pool.generation(key) for key in keys]

    def score(self, keys: Sequence[CandidateKey], sole: bool | None = None) -> list[ScoredCandidate]:
        """Score candidates on the current synthetic set, all with the same draws.

        Args:
            keys: The candidates.
            sole: Whether the gradient of each is certain to be wanted; null: if it is only one.
        """
        self._begin_step()
        sole = len(keys) == 1 if sole is None else sole
        with self.explain_oom("scoring", self.memory_remedy):
            candidates = [self.pool.load(key) for key in keys]
            scored = self.objective.score_all(self.synthetic_set, self.real, self.network, candidates, self._draw, sole)
        self.candidate_evaluations += len(scored)
        return scored

    def score_begun(self, keys: Sequence[CandidateKey], steps: int) -> list[ScoredCandidate]:
        """Score candidates by the first inner steps alone; :meth:`completed` takes the others.

        Each counts as a fraction of an evaluation.

        Args:
            keys: The candidates.
            steps: How many of the objective's ``inner_steps``.
        """
        self._begin_step()
        with self.explain_oom("scoring", self.memory_remedy):
            candidates = [self.pool.load(key) for key in keys]
            begun = self.objective.score_begun(
                self.synthetic_set, self.real, self.network, candidates, self._draw, steps
            )
        self.candidate_evaluations += len(begun) * steps / (self.objective.inner_steps or steps)
        return begun

    def completed(self, begun: ScoredCandidate, steps: int) -> ScoredCandidate:
        """Return a candidate that was scored by its first ``steps`` inner steps, scored by all of them."""
        with self.explain_oom("scoring", self.memory_remedy):
            scored = self.objective.completed(self.synthetic_set, self.real, self.network, begun)
        self.candidate_evaluations += 1 - steps / (self.objective.inner_steps or steps)
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
        with self.explain_oom("computing the gradient", self.memory_remedy):
            return self.objective.loss(self.synthetic_set, self.network, scored)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401  (Lightning's own signature)
        """Compute the gradient by the images."""
        with self.explain_oom("computing the gradient", self.memory_remedy):
            super().backward(loss, *args, **kwargs)

    def expect_candidates(self, count: int) -> None:
        """Tell, before the module is set up, how many candidates each step of the coming fit scores."""
        self._expected_candidates = count

    @property
    def memory_remedy(self) -> str:
        """What a person can do where a step needs more memory than there is."""
        several = self._candidates_per_step > 1
        return self.objective.memory_remedy + (", or fewer selection.num_candidates" if several else "")

    def explain_oom(self, doing: str, remedy: str) -> AbstractContextManager[None]:
        """Return a context in which a failed allocation becomes an InputError of one line.

        Args:
            doing: What is done in it.
            remedy: What a person can do about it.
        """
        return explain_oom(f"{doing} at step {self.global_step}", self.memory_estimate, remedy)

    def _begin_step(self) -> None:
        """Do, once per step, what must happen between two steps; at the start, so that no checkpoint misses it."""
        if self._begun_step == self.global_step:
            return
        self._begun_step = self.global_step
        if self._refresh_due is not None:
            with self.explain_oom("updating the pool", "set a smaller pool.recipe.batch_size"):
                self.pool.refresh(*self._refresh_due, self.context())
            self._reference, self._refresh_due = self._refresh_due[0], None
        synthetic = self.synthetic_set
        with torch.no_grad():
            synthetic.student_lr.fill_(self.student_lr)
            if self.clamp and self.outer_iteration is not None:
                torch.clamp(synthetic.images, *self._valid_pixels(), out=synthetic.images.detach())
        with self.explain_oom("drawing", self.memory_remedy):
            self._draw = self.objective.draw(
                synthetic, self.real, self.network, self._reference_candidate, self.context()
            )

    def _reference_candidate(self) -> Candidate:
        """Return what the previous step learned from, as the pool has it now; at first, the first uniform draw."""
        return self.pool.load(self._reference or self.pool.draw(1, self.context())[0])

    def _valid_pixels(self) -> tuple[Tensor, Tensor]:
        """Return the smallest and the largest valid image, [1, ch, H, W] each."""
        images = self.synthetic_set.images
        black, white = torch.zeros_like(images[:1]), torch.ones_like(images[:1])
        if self.image_space == "pixels":
            return black, white
        return self.datamodule.space.encode(black), self.datamodule.space.encode(white)

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
        learns_lr = self.student_lr_lr > 0 and self.objective.uses_student_lr
        synthetic.student_lr.requires_grad_(learns_lr)
        image_lr, momentum = self.image_lr, self.momentum
        if self.image_steps == "per_class":
            image_lr, momentum = step_per_iteration(image_lr, momentum, self.datamodule.num_classes)
        groups: list[dict[str, Any]] = [{"params": [synthetic.images], "lr": image_lr, "momentum": momentum}]
        if learns_lr:
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
        self._network = FunctionalNetwork(self.network_spec, datamodule.image_shape, datamodule.num_classes)
        # what can be wrong with them is found before experts are trained for hours
        self.objective.check(self._network, real)
        check_initial(real, self.ipc, self.init_kind, self.formation)
        if self.init_kind == "kmeans":
            self._network.check_features()
        if self.clamp and self.image_space == "network" and datamodule.space.kind == "zca":
            raise InputError(
                "clamp is true, but whitened images have no range of valid pixels; set image_space: pixels, or "
                "data.color_space: normalized"
            )
        self.memory_estimate = self._plan_memory(real)
        rank_zero_info(f"memory of a step on {device}: {self.memory_estimate}")
        self._network.to(device)
        self.pool.prepare(
            PoolSetup(
                self._network,
                real,
                datamodule.name,
                datamodule.fingerprint,
                device,
                self._train_experts,
                self.seed,
                self.trainer.progress_bar_callback is not None,
                self.trainer.max_steps,
                rank_zero_info,
            )
        )
        if self.synthetic is None:
            # A checkpoint may be about to replace it: k-means, and the training that it needs, wait for on_fit_start.
            self._clusters_due = self.init_kind == "kmeans"
            self.synthetic = self._initial_set(real, "real" if self._clusters_due else self.init_kind).to(device)
        else:
            self.synthetic.use_space(datamodule.space)

    def _plan_memory(self, real: RealSet) -> MemoryEstimate:
        """Estimate the peak of a step, while the network is still on the host: the same numbers for every device."""
        # what was told is for one fit: the next one may have no selection
        self._candidates_per_step, self._expected_candidates = self._expected_candidates, 1
        image = real.images[0].nbytes
        stored = image * self.ipc * real.num_classes
        resident = (
            MemoryPart("real data", real.images.nbytes + real.labels.nbytes),
            # stored images with gradient and momentum, decoded ones with theirs
            MemoryPart("synthetic set", 3 * stored + 2 * stored * self.formation.per_image),
        )
        size = real.num_classes * self.effective_ipc
        return self.objective.plan_memory(
            self.network,
            size,
            self.label_kind == "soft",
            self._candidates_per_step,
            resident,
            self.trainer.strategy.root_device.type,
        )

    def _initial_set(self, real: RealSet, init: Initialization) -> SyntheticSet:
        space = self.datamodule.space
        images = initial_images(
            real, self.ipc, init, step_generator(self.seed, 0, "initial"), self.formation, self._pool_features
        )
        targets = class_labels(real.num_classes, self.ipc).to(images.device)
        if self.label_kind == "soft":
            targets = self.pool.teacher_logits(images, targets)
        if self.image_space == "network":
            return SyntheticSet(images, targets, self.initial_student_lr, self.formation)
        return SyntheticSet(space.decode(images), targets, self.initial_student_lr, self.formation, space)

    def _pool_features(self) -> Features:
        theta = self.pool.feature_parameters()
        return lambda images: self.network.features(theta, images)

    def _refuse_unsupported_trainer(self) -> None:
        if self.trainer.precision != "32-true":
            raise InputError(
                f"precision is {self.trainer.precision!r}, but only '32-true' is supported: autocast would reach the "
                "step and not the selection; set trainer.precision: 32-true"
            )
        if self.trainer.world_size > 1 and not self.pool.same_in_every_process:
            raise InputError(
                f"trainer runs {self.trainer.world_size} processes, but each would train its own "
                f"{type(self.pool).__name__}, and only one is saved; set trainer.devices: 1"
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
        if self._clusters_due:
            self._clusters_due = False
            self.synthetic_set.load_state_dict(self._initial_set(self._real, "kmeans").state_dict())
        self._started = time.perf_counter()
        self._begun_step, self._selected, self._reference = -1, None, None  # of an earlier fit of the same module

    def on_train_start(self) -> None:
        """Let the objective prepare: now it is known what is learned, and whether from a checkpoint."""
        self.objective.prepare(self.network, self.synthetic_set, self.trainer.max_steps, rank_zero_info)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store what a resumed run needs to go on bit for bit."""
        checkpoint["distillation"] = {
            "seed": self.seed,
            "method": self._method,
            "pool": self.pool.state_dict(),
            "objective": self.objective.state_dict(),
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
        method = tuple(state.get("method", self._method))
        if method != self._method and self.synthetic is not None:
            theirs, ours = " on ".join(method), " on ".join(self._method)
            raise InputError(
                f"the checkpoint's run has {theirs}, but the configuration has {ours}; resume with the configuration "
                "that the run was started with"
            )
        if state["seed"] != self.seed and self.synthetic is not None:
            rank_zero_warn(f"seed is {self.seed}, but the checkpoint's run has {state['seed']}: going on with that one")
        self.seed = state["seed"]
        self._clusters_due = False
        if method == self._method:  # load_from_checkpoint need not be told the method to give the images
            self.pool.load_state_dict(state["pool"])
            self.objective.load_state_dict(state.get("objective", {}))
        due = state["refresh_due"]
        self._refresh_due = None if due is None else (tuple(due[0]), [tuple(key) for key in due[1]])
        self.candidate_evaluations = state["candidate_evaluations"]
        self.skipped_steps = state["skipped_steps"]
        self.seconds_before_resume = state["seconds"]
        if "loops" in checkpoint:  # a longer run may go on where a finished one ended: its one epoch is not over
            checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"] = False
        if self.synthetic is None:  # load_from_checkpoint: there was no setup
            prefix, saved = "synthetic.", checkpoint["state_dict"]
            self.synthetic = SyntheticSet.from_state(
                {name.removeprefix(prefix): value for name, value in saved.items() if name.startswith(prefix)}
            )
            self.formation, self.image_space = self.synthetic.formation, self.synthetic.image_space

    @property
    def _method(self) -> tuple[str, str]:
        return type(self.objective).__name__, type(self.pool).__name__

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
            values |= {f"distill/{name}": float(term) for name, term in scored.terms.items()}
            values |= self.pool.scalars()
            if (outer := self.outer_iteration) is not None:
                log_scalars(self.trainer, {"outer/loss": float(scored.loss)}, outer)
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
            "factor": self.formation.factor,
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
            state = owner.state_dict()
            settings |= {name: value for name, value in plain.items() if not name.startswith("_") and name not in state}
        return settings


def as_distillation(module: LightningModule) -> DistillationModule:
    """Return the module that a callback was called with, as what it must be.

    Raises:
        InputError: If it is another kind of module.
    """
    if not isinstance(module, DistillationModule):
        raise InputError(f"the callback is attached to {type(module).__name__}; it needs a DistillationModule")
    return module


def log_scalars(trainer: Trainer, values: Mapping[str, float], step: int) -> None:
    """Write values to all loggers at x = ``step``.

    ``LightningModule.log`` would write them at the next logging interval's x, and repeat them at later ones.
    """
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            logger.log_metrics(dict(values), step=step)


def logs_now(trainer: Trainer) -> bool:
    """Tell whether the Trainer's ``log_every_n_steps`` asks for this step's values."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # one of Lightning's connectors sets it
    return every > 0 and trainer.global_step % every == 0
