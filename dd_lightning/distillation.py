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

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from dd_lightning.execution.cost import CostMeter
from dd_lightning.execution.memory import MemoryEstimate, MemoryPart, explain_oom
from dd_lightning.execution.process import Process, SingleProcess, holds_anywhere
from dd_lightning.functional.errors import DivergenceError, InputError, check_range
from dd_lightning.functional.random import StepContext
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.objectives import MatchingObjective, Problem, ScoredCandidate, Workload, check_method
from dd_lightning.pools import Candidate, CandidateKey, CandidatePool, PoolSetup, teacher_logits
from dd_lightning.sets.color_spaces import ColorSpace
from dd_lightning.sets.optimizer import ImageGradient, SyntheticOptimizer
from dd_lightning.sets.real import RealSet
from dd_lightning.sets.storage import Storage
from dd_lightning.sets.synthetic import SyntheticSet

NONFINITE_LIMIT = 20
"""Steps in a row that ``on_nonfinite: skip`` passes over, less one: a run that only skips has diverged."""

_LARGEST_WEIGHT = 1e6

CHECKPOINT_FORMAT = 3
"""Version of what a checkpoint holds; the first one had no number."""

OnNonfinite = Literal["error", "skip"]


@dataclass(frozen=True)
class Demand:
    """What a selection asks of the coming fit.

    Attributes:
        candidates: How many each step scores.
        pool_size: How many the pool must hold.
        keeps_candidates: Whether candidates of earlier steps stand beside new ones.
        selection: Its options as plain values; None without a selection.
    """

    candidates: int = 1
    pool_size: int = 1
    keeps_candidates: bool = False
    selection: dict[str, Any] | None = None


class Distillation:
    """One run: the synthetic set, what it learns from, and what must survive from one step to the next.

    Args:
        objective: What is matched.
        pool: Where candidates come from.
        storage: What of S is stored.
        optimizer: How S moves.
        inner_loop: Steps of an outer iteration.
        clamp: Clamp the images to valid pixels at the start of each outer iteration.
        on_nonfinite: Raise an error when the loss or a gradient is not finite, or skip the step.
        seed: Seed of every draw.

    Raises:
        InputError: If the parts do not go together.
    """

    def __init__(
        self,
        objective: MatchingObjective,
        pool: CandidatePool,
        storage: Storage,
        optimizer: SyntheticOptimizer,
        *,
        inner_loop: int | None = None,
        clamp: bool = False,
        on_nonfinite: OnNonfinite = "error",
        seed: int = 0,
    ) -> None:
        check_method(objective, pool, optimizer, storage.labels)
        check_range("inner_loop", inner_loop, low=1, hint="null if there are no outer iterations")
        check_range("seed", seed, low=0, high=2**63 - 1)
        if clamp and inner_loop is None:
            raise InputError("clamp is true, but inner_loop is null; images are clamped every inner_loop steps: set it")
        self.objective, self.pool = objective, pool
        self.storage, self.optimizer = storage, optimizer
        self.inner_loop, self.clamp = inner_loop, clamp
        self.on_nonfinite: OnNonfinite = on_nonfinite
        self.seed, self.rank, self._averaged = seed, 0, 1
        self.memory = MemoryEstimate(())
        self._problem: Problem | None = None
        self._process: Process = SingleProcess()
        self._valid_pixels: tuple[Tensor, Tensor] | None = None
        self._reset(torch.device("cpu"))

    def _reset(self, device: torch.device) -> None:
        self.step = -1
        self.candidate_evaluations: float = 0
        self.skipped_steps = 0
        self.cost = CostMeter(device)
        self._draws: Any = None
        self._selected: tuple[ScoredCandidate, list[CandidateKey]] | None = None
        self._refresh_due: tuple[CandidateKey, list[CandidateKey]] | None = None
        self._reference: CandidateKey | None = None
        self._image_gradient = ImageGradient(self.optimizer)
        self._before: dict[str, Any] = {}
        self._nonfinite = 0
        self._taken: Candidate

    @property
    def shared(self) -> bool:
        """Whether several processes share each step; else each takes one of its own, and gradients are averaged."""
        return self.optimizer.processes == "shard"

    @property
    def problem(self) -> Problem:
        """Synthetic set, real set and network; they exist once the run is set up."""
        if self._problem is None:
            raise RuntimeError("the run does not exist yet: it needs the data, known at setup")
        return self._problem

    def setup(
        self,
        setup: PoolSetup,
        space: ColorSpace,
        candidates: int = 1,
        synthetic: SyntheticSet | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> SyntheticSet:
        """Check all options against data and network, prepare the pool, and return S on the data's device.

        Args:
            setup: Data, network and all that the pool needs. Unless it ``continues``, an earlier run is forgotten.
            space: The data's color space.
            candidates: How many each step scores.
            synthetic: S of an earlier run or a checkpoint; None makes one, without values yet.
            say: Shows a line to whoever is going to wait.
        """
        network, real = setup.network, setup.real
        self._averaged = 1 if self.shared else setup.process.size
        check_method(self.objective, self.pool, self.optimizer, self.storage.labels, self._averaged)
        self.storage.check(real, network)
        self.objective.check(network, real)
        if synthetic is None:
            synthetic = self.storage.empty(real, space, self.optimizer.student_lr)
        self.optimizer.require_gradients(synthetic, self.objective.learnable)
        self.attach(synthetic, real, network, space)
        self._process, self.rank = setup.process, 0 if self.shared else setup.process.rank
        if self.shared:
            self._problem = replace(self.problem, process=setup.process)
        self._valid_pixels = self.storage.valid_pixels(synthetic, space) if self.clamp else None
        if not setup.continues:
            self._reset(real.images.device)
            self.objective.load_state_dict({})
        self.memory = self._plan_memory(setup, candidates)
        say(f"memory of a step on {real.images.device}: {self.memory}")
        network.to(real.images.device)
        self.pool.prepare(setup)
        return synthetic

    def attach(self, synthetic: SyntheticSet, real: RealSet, network: FunctionalNetwork, space: ColorSpace) -> None:
        """Bring S together with data in a color space and a network: enough to evaluate S."""
        self.storage.check_set(synthetic, real)
        synthetic.use_space(space)
        self._problem = Problem(synthetic, real, network)

    def _plan_memory(self, setup: PoolSetup, candidates: int) -> MemoryEstimate:
        """Estimate the peak of a step, with the network still on the CPU: the same numbers for every device."""
        real, synthetic = self.problem.real, self.problem.synthetic
        stored, held_out = synthetic.images.nbytes, setup.held_out
        resident = [
            MemoryPart("real data", real.images.nbytes + real.labels.nbytes),
            # stored images with gradient and momentum, decoded ones with theirs
            MemoryPart("synthetic set", 3 * stored + 2 * stored * synthetic.formation.per_image),
        ]
        if held_out is not None:
            resident.insert(1, MemoryPart("held-out data", held_out.images.nbytes + held_out.labels.nbytes))
        device, size = real.images.device.type, synthetic.decoded_size
        workload = Workload(setup.network, size, setup.soft_labels, candidates, device, tuple(resident))
        estimate = self.objective.plan_memory(workload, setup.execution)
        if candidates == 1:
            return estimate
        return replace(estimate, remedy=f"{estimate.remedy}, or fewer selection.num_candidates")

    def draw_initial(self) -> None:
        """Draw S_0."""
        network, pool = self.problem.network, self.pool
        self.storage.fill(
            self.problem.synthetic,
            self.problem.real,
            self.seed,
            lambda: partial(network.features, next(pool.networks())),
            partial(teacher_logits, network, pool.networks()),
        )

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

    def explain_oom(self, doing: str, remedy: str | None = None) -> AbstractContextManager[None]:
        """Return a context in which a failed allocation becomes an error of one line that says what to change."""
        return explain_oom(f"{doing} at step {self.step}", self.memory, remedy or self.memory.remedy)

    # One step

    def begin(self, step: int) -> None:
        """Do what lies between two steps, and make the step's draws; once per step.

        A pool is refreshed here and not at the end of a step: checkpoints are written before that.
        """
        if self.step == step:
            return
        self._before = self.state_dict()
        self.step = step
        if self._refresh_due is not None:
            with self.explain_oom("updating the pool", "set a smaller pool.recipe.batch_size"):
                self.pool.update(*self._refresh_due, self.context)
            self._reference, self._refresh_due = self._refresh_due[0], None
        synthetic = self.problem.synthetic
        with torch.no_grad():
            synthetic.student_lr.fill_(self.student_lr)
            if self.student_lr <= 0 and "student_lr" in self.objective.learnable:
                raise DivergenceError(
                    f"student_lr is {self.student_lr:.3g} at step {step}; it must be above 0: lower student_lr_lr, or "
                    "set student_lr_floor"
                )
            if self._valid_pixels is not None and self.outer_iteration is not None:
                torch.clamp(synthetic.images, *self._valid_pixels, out=synthetic.images.detach())
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
        self._taken, self._refresh_due = scored.candidate, (scored.candidate.key, drawn)
        return scored

    def skips(self, scored: ScoredCandidate) -> bool:
        """Tell whether a step leaves S as it is: in a process, the loss is not finite or the objective passes it over.

        Raises:
            DivergenceError: If the loss is not finite, with ``on_nonfinite: error`` or at the 20th step in a row.
        """
        finite = self._finite(scored.loss, "the matching loss")
        self._nonfinite *= not finite or not scored.skip
        return holds_anywhere(self._process, scored.skip or not finite)

    def loss(self, scored: ScoredCandidate) -> Tensor:
        """Return the loss as a scalar with a graph to what is learned; of several processes, this one's part of it."""
        if scored.owner not in (None, self.problem.process.rank):
            return self.no_loss()
        with self.explain_oom("computing the gradient"):
            return self.objective.loss(self.problem, scored)

    def no_loss(self) -> Tensor:
        """Return 0 with a graph to all that is learned: not None, which Lightning refuses in several processes."""
        learned = [parameter for parameter in self.problem.synthetic.parameters() if parameter.requires_grad]
        return torch.stack([parameter.sum() for parameter in learned]).sum() * 0

    def adjust_gradients(self) -> bool:
        """Apply ``equal_norm`` and Adam to the images' gradient; tell whether all gradients are finite.

        Raises:
            DivergenceError: If one is not finite, with ``on_nonfinite: error`` or at the 20th step in a row.
        """
        synthetic = self.problem.synthetic
        if synthetic.images.grad is None:
            raise RuntimeError(f"the images have no gradient at step {self.step}: the graph was dropped")
        gradients = [parameter.grad for parameter in synthetic.parameters() if parameter.grad is not None]
        finite = all(self._finite(gradient, "a gradient") for gradient in gradients)
        if holds_anywhere(self._process, not finite):
            return False
        self._image_gradient.adjust(synthetic.images.grad)
        self._nonfinite = 0
        return True

    def _finite(self, value: Tensor, what: str) -> bool:
        if bool(torch.isfinite(value).all()):
            return True
        self._nonfinite += 1
        if self.on_nonfinite == "skip" and self._nonfinite < NONFINITE_LIMIT:
            return False
        theta, lasting = self._taken.theta, f", as at {self._nonfinite - 1} steps before," * (self._nonfinite > 1)
        if not bool((theta.abs() < _LARGEST_WEIGHT).all()):
            remedy = f"the network of candidate {self._taken.key} has diverged: lower pool.recipe.lr"
        else:
            remedy = "lower image_lr or student_lr_lr, set student_lr_floor, or on_nonfinite: skip"
        where = f" on process {self.rank}" * (self._averaged > 1)
        raise DivergenceError(
            f"{what} is not finite at step {self.step}{where}{lasting} (student_lr {self.student_lr:.3g}, image_lr "
            f"{self.optimizer.image_lr:g}); {remedy}"
        )

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

    def state_dict(self, finished: int | None = None) -> dict[str, Any]:
        """Return what a resumed run needs to go on bit for bit, and what the run is: tensors and plain values.

        Args:
            finished: Number of finished steps: if the next one has begun, the state is that of before.
        """
        if finished is not None and finished == self.step:
            return self._before
        return {
            "format_version": CHECKPOINT_FORMAT,
            "seed": self.seed,
            "averaged": self._averaged,
            "pool": self.pool.state_dict(),
            "objective": self.objective.state_dict(),
            "image_gradient": self._image_gradient.state_dict(),
            "refresh_due": self._refresh_due,
            "candidate_evaluations": self.candidate_evaluations,
            "skipped_steps": self.skipped_steps,
            "seconds": self.cost.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; its seed wins, or the run would not be the same run."""
        if (averaged := state.get("averaged", 1)) != self._averaged:
            raise InputError(
                f"processes is 'average', and the run has {self._averaged} of them, but the checkpoint's run has "
                f"{averaged}; set trainer.devices to that"
            )
        self.seed = state["seed"]
        self.pool.load_state_dict(state["pool"])
        self.objective.load_state_dict(state["objective"])
        self._image_gradient.load_state_dict(state["image_gradient"])
        due = state["refresh_due"]
        self._refresh_due = None if due is None else (tuple(due[0]), [tuple(key) for key in due[1]])
        self.candidate_evaluations, self.skipped_steps = state["candidate_evaluations"], state["skipped_steps"]
        self.cost = CostMeter(self.problem.real.images.device, state["seconds"])
