"""Expert trajectories on disk as a pool of segments."""

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dd_lightning.execution.options import Execution
from dd_lightning.execution.process import holds_anywhere
from dd_lightning.functional.errors import InputError, check_range
from dd_lightning.functional.random import StepContext
from dd_lightning.pools.base import Candidate, CandidateKey, CandidatePool, PoolSetup, drawn_apart
from dd_lightning.training.expert_store import ExpertIdentity, ExpertStore
from dd_lightning.training.experts import train_experts
from dd_lightning.training.recipes import ExpertRecipe

TrajectoryRefresh = Literal["redraw", "advance"]


@dataclass(frozen=True)
class TrajectorySegment(Candidate):
    """A piece of an expert's trajectory; ``theta`` is where it starts.

    Attributes:
        target: The expert's parameters ``expert_epochs`` later, [P].
    """

    target: Tensor

    @property
    def start(self) -> Tensor:
        """The expert's parameters at the start epoch, [P]: theta_0 of the student."""
        return self.theta


@dataclass(eq=False)
class TrajectoryPool(CandidatePool):
    """Stored expert trajectories; a candidate is a segment (expert, epoch t -> t + expert_epochs).

    Start epochs are integers in [min_start_epoch, max_start_epoch). Only two rows of a file are read per candidate.
    Experts that the store lacks are trained at the first fit and kept; experts that are too short are continued.

    The paper says that the pool is updated "with the latest models" after each step, and not what that means for
    stored trajectories: ``refresh`` makes the choice explicit.

    Args:
        path: Folder of the expert store.
        num_experts: Experts to use; 100 in the MTT reference. A selection's ``pool_size`` raises it.
        expert_epochs: MTT's M, the epochs a segment spans; 2 in most published settings.
        max_start_epoch: MTT's T+, the exclusive end of the start window.
        min_start_epoch: Start of the window; 0 in MTT (DATM raises it for large ipc).
        current_max_start_epoch: If given, the window first ends here and grows to ``max_start_epoch`` (DATM).
        expansion_steps: Distillation steps over which it grows, linearly.
        train_epochs: Epochs to train missing experts for; null is as many as the window can use.
        train_missing: Train the experts that the store lacks; if false, a lack is an error.
        skip_damaged: Read all that the window uses at the start, and leave damaged experts out with a warning; nothing
            is trained while there are any. If false, they are errors when they are read.
        recipe: How experts are trained.
        refresh: ``redraw``: a fresh start epoch at each draw, MTT's own rule. ``advance``: each expert has a cursor
            that moves one epoch on when the expert was used, and wraps within the start window.
        share_start_epoch: All candidates of a step share one start epoch (``redraw`` only).
        execution: ``compile`` and ``micro_batch`` of the experts' training; null is as the run (``model.execution``).
            Their precision is the recipe's.

    Raises:
        InputError: If the window is empty or reaches beyond ``train_epochs``, or switches contradict each other.
    """

    candidate_type: ClassVar[type[Candidate]] = TrajectorySegment

    path: str = "experts"
    num_experts: int = 100
    expert_epochs: int = 2
    max_start_epoch: int = 2
    min_start_epoch: int = 0
    current_max_start_epoch: int | None = None
    expansion_steps: int | None = None
    train_epochs: int | None = None
    train_missing: bool = True
    skip_damaged: bool = False
    recipe: ExpertRecipe = field(default_factory=ExpertRecipe)
    refresh: TrajectoryRefresh = "redraw"
    share_start_epoch: bool = False
    execution: Execution | None = None

    def __post_init__(self) -> None:
        low, high, first_high = self.min_start_epoch, self.max_start_epoch, self.current_max_start_epoch
        self.needed_epochs = high - 1 + self.expert_epochs
        check_range("num_experts", self.num_experts, low=1)
        check_range("expert_epochs", self.expert_epochs, low=1)
        check_range("min_start_epoch", low, low=0)
        check_range("max_start_epoch", high, low=low + 1, hint="the window must not be empty")
        if (first_high is None) != (self.expansion_steps is None):
            raise InputError(
                f"current_max_start_epoch is {first_high} and expansion_steps is {self.expansion_steps}; give both for "
                "a growing window, or neither"
            )
        check_range("current_max_start_epoch", first_high, low=low + 1, high=high)
        check_range("expansion_steps", self.expansion_steps, low=1)
        check_range("train_epochs", self.train_epochs, low=self.needed_epochs, hint="the window reads so many")
        if self.refresh == "advance" and self.share_start_epoch:
            raise InputError(
                "refresh is 'advance' with share_start_epoch: cursors differ between experts; use refresh: redraw"
            )
        self.store = ExpertStore(self.path)
        self.cursors: list[int] = []
        self._size = self.num_experts
        self._experts: list[int] = []
        self._seconds = 0.0
        self._setup: PoolSetup | None = None

    def __len__(self) -> int:
        return self._size

    def prepare(self, setup: PoolSetup) -> None:
        """Check the store against the network, data and recipe, and train what it lacks."""
        if setup.keeps_candidates and self.share_start_epoch:
            raise InputError(
                "selection.refresh_per_step keeps candidates, which have start epochs of their own, but "
                "share_start_epoch is true; set refresh_per_step: null, or share_start_epoch: false"
            )
        self._setup, self._seconds = setup, 0.0
        cursors = self.cursors if setup.continues else []
        size = self._size = max(self.num_experts, setup.size, len(cursors))
        self.cursors = cursors + [self.min_start_epoch] * (size - len(cursors))
        wanted = self.train_epochs or self.needed_epochs
        identity = ExpertIdentity.of(
            setup.network, self.recipe, wanted, fingerprint=setup.fingerprint, dataset=setup.dataset
        )
        if self.skip_damaged and (whole := self._without_damaged(size)) is not None:
            self.store.check(identity, whole)
            check_range("experts that are whole", len(whole), low=max(1, setup.size), hint="delete the damaged ones")
            self._experts, self._size, self.cursors = whole, len(whole), self.cursors[: len(whole)]
            return
        self.store.check(identity)
        ids = self.store.ids()
        short = [i for i in ids[:size] if self.store.epochs(i) < wanted]
        if setup.process.broadcast(len(ids) < size or bool(short)):
            if not self.train_missing:
                what = f"expert {short[0]} has {self.store.epochs(short[0])} epochs" if short else f"{len(ids)} experts"
                raise InputError(
                    f"the store {self.store.path} is too small ({what}): the pool needs {size} experts of "
                    f"{wanted} epochs; set train_missing: true, or lower num_experts, train_epochs or max_start_epoch"
                )
            started = time.perf_counter()
            train_experts(  # processes share them by claims
                setup.network,
                setup.real,
                self.store,
                identity,
                self.recipe,
                size,
                wanted,
                held_out=setup.held_out,
                execution=self.execution or setup.execution,
                progress_bar=setup.progress_bar and setup.process.rank == 0,
            )
            setup.process.barrier()
            self._seconds = time.perf_counter() - started
        self._experts = self.store.ids()[:size]
        if holds_anywhere(setup.process, len(self._experts) < size):
            raise InputError(
                f"path is {self.path!r}, where not every process sees {size} experts (this one: {len(self._experts)}); "
                "give a folder that all of them share"
            )

    def _without_damaged(self, size: int) -> list[int] | None:
        """Return the experts whose rows can all be read; None if none of the first ``size`` is damaged."""
        whole, reasons = [], []
        for id in (ids := self.store.ids()[:size]):
            try:
                self.store.rows(id, range(self.min_start_epoch, self.needed_epochs + 1))
                whole.append(id)
            except InputError as error:
                reasons.append(str(error))
        if not reasons:
            return None
        warnings.warn(f"{len(reasons)} of {len(ids)} experts are left out: {'; '.join(reasons)}", stacklevel=2)
        return whole

    def draw(self, count: int, context: StepContext, exclude: Sequence[CandidateKey] = ()) -> list[CandidateKey]:
        """Draw distinct experts, each with its start epoch by the refresh rule."""
        generator = context.generator("candidates")
        experts = drawn_apart(len(self), count, generator, exclude)
        if self.refresh == "advance":
            return [(i, self.cursors[i]) for i in experts]
        low, high = self.min_start_epoch, self.start_window_end(context.step)
        starts = torch.randint(low, high, (count,), generator=generator).tolist()
        return [(i, starts[0] if self.share_start_epoch else s) for i, s in zip(experts, starts, strict=True)]

    def load(self, key: CandidateKey) -> TrajectorySegment:
        """Read the segment's two rows."""
        (expert, epoch), device = key, self._ready.real.images.device
        rows = self.store.rows(self._experts[expert], [epoch, epoch + self.expert_epochs]).to(device)
        return TrajectorySegment(key, rows[0], rows[1])

    def update(self, winner: CandidateKey, drawn: Sequence[CandidateKey], context: StepContext) -> None:
        """Move the used expert's cursor on (``advance``); nothing to do otherwise."""
        del drawn
        if self.refresh == "advance":
            low, high = self.min_start_epoch, self.start_window_end(context.step)
            self.cursors[winner[0]] = low + (winner[1] + 1 - low) % (high - low)

    def start_window_end(self, step: int) -> int:
        """Return the exclusive end of the start window at a step; it grows linearly where DATM's switch is on."""
        if self.current_max_start_epoch is None or self.expansion_steps is None:
            return self.max_start_epoch
        grown = (self.max_start_epoch - self.current_max_start_epoch) * step // self.expansion_steps
        return min(self.current_max_start_epoch + grown, self.max_start_epoch)

    def networks(self) -> Iterator[Tensor]:
        """Yield each expert's parameters at its last stored epoch, [P]."""
        for expert in self._experts:
            yield self.store.rows(expert, [self.store.epochs(expert)])[0].to(self._ready.real.images.device)

    def summary(self) -> dict[str, Any]:
        """Return the experts' held-out accuracies at the last epoch that all have, and what training them took."""
        records = [self.store.metadata(expert).accuracies.held_out for expert in self._experts]
        epochs = min(map(len, records), default=0)
        known = [record[epochs - 1] for record in records if epochs and record[epochs - 1] is not None]
        full_set = {"accuracies": known, "trained": f"{len(known)} experts after {epochs} epochs"}
        return {"full_set": full_set if known else None, "seconds_training_experts": self._seconds}

    def state_dict(self) -> dict[str, Any]:
        """Return the cursors."""
        return {"cursors": list(self.cursors)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the cursors."""
        if self.cursors and len(state["cursors"]) != len(self.cursors):
            raise InputError(
                f"num_experts is {len(self.cursors)}, but the checkpoint's run has {len(state['cursors'])}; resume "
                "with the configuration that the run was started with"
            )
        self.cursors = list(state["cursors"])

    @property
    def _ready(self) -> PoolSetup:
        if self._setup is None:
            raise RuntimeError("TrajectoryPool.prepare has not been called")
        return self._setup
