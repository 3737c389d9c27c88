"""The steps of a run in plain torch: begin, draw candidates, score them, learn from one. No Trainer is needed.

One step t of Algorithm 1 of the paper, and the base method's without the selection::

    distillation.begin(t)
    keys = distillation.draw(3)
    distillation.select(choose(distillation.score(keys)), keys)  # left out: one candidate, drawn uniformly
    scored = distillation.take()
    distillation.loss(scored).backward()
    distillation.adjust_gradients()
    optimizer.step()
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from dd_lightning.execution.cost import CostMeter
from dd_lightning.execution.memory import MemoryEstimate, MemoryPart, explain_oom
from dd_lightning.execution.options import Execution
from dd_lightning.functional.errors import DivergenceError, InputError
from dd_lightning.functional.random import StepContext
from dd_lightning.objectives import MatchingObjective, Problem, ScoredCandidate, Workload
from dd_lightning.pools import Candidate, CandidateKey, CandidatePool
from dd_lightning.sets.optimizer import ImageGradient, SyntheticOptimizer
from dd_lightning.sets.storage import Storage

CHECKPOINT_FORMAT = 2
"""Version of what a checkpoint holds; the first one had no number."""

OnNonfinite = Literal["error", "skip"]


def check_method(objective: MatchingObjective, pool: CandidatePool, optimizer: SyntheticOptimizer) -> None:
    """Check that the pool gives what the objective learns from, and that there is a gradient by all that is learned.

    Raises:
        InputError: If not.
    """
    name = type(objective).__name__
    if not issubclass(pool.gives, objective.candidate_type):
        raise InputError(
            f"{name} learns from {objective.candidate_type.__name__}, but {type(pool).__name__} gives "
            f"{pool.gives.__name__}; use {type(objective.default_pool()).__name__}"
        )
    if optimizer.label_lr > 0 and "labels" not in objective.learnable:
        raise InputError(
            f"label_lr is {optimizer.label_lr:g}, but {name} has no gradient by the labels; set label_lr: 0 to "
            "keep them fixed"
        )


class Distillation:
    """One run: the synthetic set, what it learns from, and what must survive from one step to the next.

    Args:
        problem: Synthetic set, real set and network.
        objective: What is matched.
        pool: Where candidates come from; prepared before the first step.
        storage: What of S is stored.
        optimizer: How S moves.
        seed: Seed of every draw.
        rank: Number of the process.
        inner_loop: Steps of an outer iteration.
        valid_pixels: Smallest and largest valid image, [1, ch, H, W] each: images are clamped to them at the start of
            each outer iteration. None never clamps.
        on_nonfinite: Raise an error when the loss or a gradient is not finite, or skip the step.
    """

    def __init__(
        self,
        problem: Problem,
        objective: MatchingObjective,
        pool: CandidatePool,
        storage: Storage,
        optimizer: SyntheticOptimizer,
        *,
        seed: int = 0,
        rank: int = 0,
        inner_loop: int | None = None,
        valid_pixels: tuple[Tensor, Tensor] | None = None,
        on_nonfinite: OnNonfinite = "error",
    ) -> None:
        self.problem = problem
        self.objective = objective
        self.pool = pool
        self.storage = storage
        self.optimizer = optimizer
        self.seed = seed
        self.rank = rank
        self.inner_loop = inner_loop
        self.valid_pixels = valid_pixels
        self.on_nonfinite: OnNonfinite = on_nonfinite
        self.step = -1
        self.candidate_evaluations = 0.0
        self.skipped_steps = 0
        self.memory = MemoryEstimate(())
        self.cost = CostMeter(problem.real.images.device)
        self._draws: Any = None
        self._selected: tuple[ScoredCandidate, list[CandidateKey]] | None = None
        self._refresh_due: tuple[CandidateKey, list[CandidateKey]] | None = None
        self._reference: CandidateKey | None = None
        self._image_gradient = ImageGradient(optimizer)

    @property
    def student_lr(self) -> float:
        """The student's current learning rate, at least its floor."""
        value = float(self.problem.synthetic.student_lr.detach())
        floor = self.optimizer.student_lr_floor
        return value if floor is None else max(value, floor)

    @property
    def context(self) -> StepContext:
        """The randomness of the current step."""
        return StepContext(self.seed, self.step, self.rank)

    @property
    def outer_iteration(self) -> int | None:
        """Number of finished outer iterations, at their boundaries; None within one."""
        if self.inner_loop is None or self.step % self.inner_loop != 0:
            return None
        return self.step // self.inner_loop

    def plan_memory(self, candidates: int, device_type: str, execution: Execution) -> MemoryEstimate:
        """Estimate the peak of a step that scores ``candidates``, with the network still on the CPU."""
        real, synthetic = self.problem.real, self.problem.synthetic
        stored, per_image = synthetic.images.nbytes, synthetic.formation.per_image
        resident = (
            MemoryPart("real data", real.images.nbytes + real.labels.nbytes),
            # stored images with gradient and momentum, decoded ones with theirs
            MemoryPart("synthetic set", 3 * stored + 2 * stored * per_image),
        )
        workload = Workload(
            self.problem.network,
            synthetic.decoded_size,
            self.storage.labels == "soft",
            candidates,
            device_type,
            resident,
        )
        estimate = self.objective.plan_memory(workload, execution)
        if candidates > 1:
            estimate = replace(estimate, remedy=f"{estimate.remedy}, or fewer selection.num_candidates")
        self.memory = estimate
        return estimate

    def explain_oom(self, doing: str, remedy: str | None = None) -> AbstractContextManager[None]:
        """Return a context in which a failed allocation becomes an error of one line that says what to change."""
        return explain_oom(f"{doing} at step {self.step}", self.memory, remedy or self.memory.remedy)

    def draw_initial(self) -> None:
        """Draw S_0."""
        network, pool = self.problem.network, self.pool
        self.storage.fill(
            self.problem.synthetic,
            self.problem.real,
            self.seed,
            lambda: partial(network.features, pool.feature_parameters()),
            pool.teacher_logits,
        )

    # One step

    def begin(self, step: int) -> None:
        """Do what lies between two steps, and make the step's draws; once per step.

        A pool is refreshed here and not at the end of a step: checkpoints are written before that.
        """
        if self.step == step:
            return
        self.step = step
        if self._refresh_due is not None:
            with self.explain_oom("updating the pool", "set a smaller pool.recipe.batch_size"):
                self.pool.refresh(*self._refresh_due, self.context)
            self._reference, self._refresh_due = self._refresh_due[0], None
        synthetic = self.problem.synthetic
        with torch.no_grad():
            synthetic.student_lr.fill_(self.student_lr)
            if self.valid_pixels is not None and self.outer_iteration is not None:
                torch.clamp(synthetic.images, *self.valid_pixels, out=synthetic.images.detach())
        with self.explain_oom("drawing"):
            self._draws = self.objective.draw(self.problem, self._reference_candidate, self.context)

    def _reference_candidate(self) -> Candidate:
        """Return what the previous step learned from, as the pool has it now; at first, the first uniform draw."""
        return self.pool.load(self._reference or self.pool.draw(1, self.context)[0])

    def draw(self, count: int, exclude: Sequence[CandidateKey] = ()) -> list[CandidateKey]:
        """Draw distinct candidates from the pool, none of them in ``exclude``."""
        return self.pool.draw(count, self.context, exclude)

    def score(
        self, keys: Sequence[CandidateKey], *, steps: int | None = None, with_gradient: bool | None = None
    ) -> list[ScoredCandidate]:
        """Score candidates on the current synthetic set, all with the same draws.

        Args:
            keys: The candidates.
            steps: Score by the objective's first inner steps; None takes all of them.
            with_gradient: Each one's gradient is certain to be wanted. None: if there is only one.
        """
        with self.explain_oom("scoring"):
            candidates = [self.pool.load(key) for key in keys]
            wanted = len(keys) == 1 if with_gradient is None else with_gradient
            scored = self.objective.score(self.problem, candidates, self._draws, steps=steps, with_gradient=wanted)
        self.candidate_evaluations += len(scored) * self._share(steps)
        return scored

    def complete(self, begun: ScoredCandidate, steps: int) -> ScoredCandidate:
        """Score a candidate by all inner steps that was scored by the first ``steps`` of them."""
        with self.explain_oom("scoring"):
            candidates = [begun.candidate]
            (scored,) = self.objective.score(self.problem, candidates, self._draws, resume=[begun])
        self.candidate_evaluations += 1 - self._share(steps)
        return scored

    def _share(self, steps: int | None) -> float:
        """Return which fraction of an evaluation so many inner steps are."""
        total = self.objective.inner_steps
        return 1 if steps is None or total is None else steps / total

    def select(self, scored: ScoredCandidate, drawn: Sequence[CandidateKey]) -> None:
        """Fix what this step learns from; ``drawn`` are all candidates that it has looked at."""
        self._selected = (scored, list(drawn))

    def take(self) -> ScoredCandidate:
        """Return the selected candidate, or one drawn uniformly: the base method."""
        if self._selected is None:
            keys = self.draw(1)
            self._selected = (self.score(keys)[0], keys)
        (scored, drawn), self._selected = self._selected, None
        self._refresh_due = (scored.candidate.key, drawn)
        return scored

    def skips(self, scored: ScoredCandidate) -> bool:
        """Tell whether a step leaves S as it is: its loss is not finite, or the objective passes it over.

        Raises:
            DivergenceError: If the loss is not finite, and ``on_nonfinite`` is ``error``.
        """
        return not self._finite(scored.loss, "the matching loss") or scored.skip

    def loss(self, scored: ScoredCandidate) -> Tensor:
        """Return the loss as a scalar with a graph to what is learned."""
        with self.explain_oom("computing the gradient"):
            return self.objective.loss(self.problem, scored)

    def adjust_gradients(self) -> bool:
        """Apply ``equal_norm`` and Adam to the images' gradient; tell whether all gradients are finite.

        Raises:
            DivergenceError: If one is not finite, and ``on_nonfinite`` is ``error``.
        """
        synthetic = self.problem.synthetic
        if synthetic.images.grad is None:
            raise RuntimeError(f"the images have no gradient at step {self.step}: the graph was dropped")
        gradients = [parameter.grad for parameter in synthetic.parameters() if parameter.grad is not None]
        if not all(self._finite(gradient, "a gradient") for gradient in gradients):
            return False
        self._image_gradient.adjust(synthetic.images.grad)
        return True

    def _finite(self, value: Tensor, what: str) -> bool:
        if bool(torch.isfinite(value).all()):
            return True
        if self.on_nonfinite == "error":
            raise DivergenceError(
                f"{what} is not finite at step {self.step} (student_lr {self.student_lr:.3g}, image_lr "
                f"{self.optimizer.image_lr:g}); lower image_lr or student_lr_lr, set student_lr_floor, or "
                "on_nonfinite: skip"
            )
        return False

    def scalars(self, scored: ScoredCandidate) -> dict[str, float]:
        """Return what a step has to report, by its name in the logs."""
        values = {
            "distill/loss": float(scored.loss),
            "distill/student_lr": self.student_lr,
            **{f"distill/{name}": float(term) for name, term in scored.terms.items()},
            **self.pool.scalars(),
            "cost/candidate_evaluations": float(self.candidate_evaluations),
            "cost/seconds": self.cost.seconds,
        }
        if (peak := self.cost.peak_memory) is not None:
            values["cost/peak_memory_mb"] = peak / 2**20
        return values

    # What a checkpoint holds

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on bit for bit, and what the run is: tensors and plain values."""
        return {
            "format_version": CHECKPOINT_FORMAT,
            "run": self._run(),
            "seed": self.seed,
            "pool": self.pool.state_dict(),
            "objective": self.objective.state_dict(),
            "image_gradient": self._image_gradient.state_dict(),
            "refresh_due": self._refresh_due,
            "candidate_evaluations": self.candidate_evaluations,
            "skipped_steps": self.skipped_steps,
            "seconds": self.cost.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; its seed wins, or the run would not be the same run.

        Raises:
            InputError: If it is of another format, or of a run with other images or another method.
        """
        check_format(state)
        for name, ours in self._run().items():
            theirs = state["run"][name]
            if name != "init" and ours != theirs:
                raise InputError(
                    f"{name} is {ours!r}, but the checkpoint's run has {theirs!r}; resume with the configuration that "
                    "the run was started with"
                )
        self.seed = state["seed"]
        self.pool.load_state_dict(state["pool"])
        self.objective.load_state_dict(state["objective"])
        self._image_gradient.load_state_dict(state["image_gradient"])
        due = state["refresh_due"]
        self._refresh_due = None if due is None else (tuple(due[0]), [tuple(key) for key in due[1]])
        self.candidate_evaluations = state["candidate_evaluations"]
        self.skipped_steps = state["skipped_steps"]
        self.cost = CostMeter(self.problem.real.images.device, state["seconds"])

    def _run(self) -> dict[str, Any]:
        """Return what must be the same when a run is resumed."""
        return {"objective": type(self.objective).__name__, "pool": type(self.pool).__name__, **asdict(self.storage)}


def check_format(state: dict[str, Any]) -> None:
    """Refuse a checkpoint of another format.

    Raises:
        InputError: It names both versions.
    """
    version = state.get("format_version", 1)
    if version != CHECKPOINT_FORMAT:
        raise InputError(
            f"the checkpoint has format {version}, but this dd_lightning reads format {CHECKPOINT_FORMAT}; resume it "
            "with the version that wrote it"
        )
