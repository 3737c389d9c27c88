"""Expert trajectories on disk as a pool of segments."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dd_lightning.functional.errors import InputError
from dd_lightning.functional.random import StepContext
from dd_lightning.pools.base import (
    Candidate,
    CandidateKey,
    CandidatePool,
    FullSetAccuracies,
    PoolSetup,
    drawn_apart,
)
from dd_lightning.training.expert_store import ExpertIdentity, ExpertStore
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


class TrajectoryPool(CandidatePool):
    """Stored expert trajectories; a candidate is a segment (expert, epoch t -> t + expert_epochs).

    Start epochs are integers in [min_start_epoch, max_start_epoch). Only two rows of a file are read per candidate.
    Experts that the store lacks are trained on the first fit and kept; experts that are too short are continued.

    The paper says that the pool is updated "with the latest models" after each step, and not what that means for
    trajectories that are stored: ``refresh`` makes the choice explicit.

    Args:
        path: Folder of the expert store.
        num_experts: Experts to use; 100 in the MTT reference.
        expert_epochs: MTT's M, the epochs a segment spans; 2 in most published settings.
        max_start_epoch: MTT's T+, the exclusive end of the start window.
        min_start_epoch: Start of the window; 0 in MTT (DATM raises it for large ipc).
        current_max_start_epoch: If given, the window first ends here and grows to ``max_start_epoch`` (DATM).
        expansion_steps: Distillation steps over which it grows, linearly.
        train_epochs: Epochs to train missing experts for; null is as many as the window can use.
        train_missing: Train the experts that the store lacks; if false, a lack is an error.
        recipe: How experts are trained.
        refresh: ``redraw``: a fresh start epoch at each draw, MTT's own rule. ``advance``: each expert has a cursor
            that moves one epoch on when the expert was used, and wraps within the start window.
        share_start_epoch: All candidates of a step share one start epoch (``redraw`` only).

    Raises:
        InputError: If the window is empty or reaches beyond ``train_epochs``, or switches contradict each other.
    """

    gives: ClassVar[type[Candidate]] = TrajectorySegment

    def __init__(
        self,
        path: str = "experts",
        num_experts: int = 100,
        expert_epochs: int = 2,
        max_start_epoch: int = 2,
        min_start_epoch: int = 0,
        current_max_start_epoch: int | None = None,
        expansion_steps: int | None = None,
        train_epochs: int | None = None,
        train_missing: bool = True,
        recipe: ExpertRecipe = ExpertRecipe(),  # noqa: B008  (frozen)
        refresh: TrajectoryRefresh = "redraw",
        share_start_epoch: bool = False,
    ) -> None:
        super().__init__(num_experts)
        if expert_epochs < 1:
            raise InputError(f"expert_epochs is {expert_epochs}; a segment spans at least 1 epoch")
        if not 0 <= min_start_epoch < max_start_epoch:
            raise InputError(
                f"the start window [{min_start_epoch}, {max_start_epoch}) is empty; "
                "choose 0 <= min_start_epoch < max_start_epoch"
            )
        if (current_max_start_epoch is None) != (expansion_steps is None):
            raise InputError(
                f"current_max_start_epoch is {current_max_start_epoch} and expansion_steps is {expansion_steps}; "
                "give both for a growing window, or neither"
            )
        if current_max_start_epoch is not None and not min_start_epoch < current_max_start_epoch <= max_start_epoch:
            raise InputError(
                f"current_max_start_epoch is {current_max_start_epoch}; it must lie above min_start_epoch "
                f"({min_start_epoch}) and at most at max_start_epoch ({max_start_epoch})"
            )
        if expansion_steps is not None and expansion_steps < 1:
            raise InputError(f"expansion_steps is {expansion_steps}; the window needs at least 1 step to grow")
        self.needed_epochs = max_start_epoch - 1 + expert_epochs
        if train_epochs is not None and train_epochs < self.needed_epochs:
            raise InputError(
                f"train_epochs is {train_epochs}, but the start window up to {max_start_epoch - 1} plus expert_epochs "
                f"{expert_epochs} reads epoch {self.needed_epochs}; raise train_epochs or lower max_start_epoch"
            )
        if refresh == "advance" and share_start_epoch:
            raise InputError(
                "refresh is 'advance' with share_start_epoch: cursors differ between experts; use refresh: redraw"
            )
        self.store = ExpertStore(path)
        self.recipe = recipe
        self.expert_epochs = expert_epochs
        self.min_start_epoch = min_start_epoch
        self.max_start_epoch = max_start_epoch
        self.current_max_start_epoch = current_max_start_epoch
        self.expansion_steps = expansion_steps
        self.train_epochs = train_epochs
        self.train_missing = train_missing
        self.refresh_rule: TrajectoryRefresh = refresh
        self.share_start_epoch = share_start_epoch
        self.cursors: list[int] = []
        self._experts: list[int] = []
        self._setup: PoolSetup | None = None

    def prepare(self, setup: PoolSetup) -> None:
        """Check the store against the network, data and recipe, and train what it lacks."""
        self._setup = setup
        wanted = self.train_epochs or self.needed_epochs
        identity = ExpertIdentity.of(
            setup.network, self.recipe, wanted, fingerprint=setup.fingerprint, dataset=setup.dataset
        )
        self.store.check(identity)
        ids = self.store.ids()
        lacking = self.size - len(ids)
        short = [i for i in ids[: self.size] if self.store.epochs(i) < self.needed_epochs]
        if (lacking > 0 or short) and not self.train_missing:
            what = f"expert {short[0]} has {self.store.epochs(short[0])} epochs" if short else f"{len(ids)} experts"
            raise InputError(
                f"the store {self.store.path} is too small ({what}): the pool needs {self.size} experts of "
                f"{self.needed_epochs} epochs; set train_missing: true, or lower num_experts or max_start_epoch"
            )
        if lacking > 0 or short:
            setup.train_experts(self.store, identity, self.recipe, self.size, wanted)
        self._experts = self.store.ids()[: self.size]
        if not self.cursors:
            self.cursors = [self.min_start_epoch] * self.size

    def draw(self, count: int, context: StepContext, exclude: Sequence[CandidateKey] = ()) -> list[CandidateKey]:
        """Draw distinct experts, each with its start epoch by the refresh rule."""
        generator = context.generator("candidates")
        experts = drawn_apart(self.size, count, generator, exclude)
        if self.refresh_rule == "advance":
            return [(i, self.cursors[i]) for i in experts]
        low, high = self.min_start_epoch, self.start_window_end(context.step)
        starts = torch.randint(low, high, (count,), generator=generator).tolist()
        return [(i, starts[0] if self.share_start_epoch else s) for i, s in zip(experts, starts, strict=True)]

    @property
    def shares_draw(self) -> bool:
        """Whether the candidates of a step share a start epoch."""
        return self.share_start_epoch

    def load(self, key: CandidateKey) -> TrajectorySegment:
        """Read the segment's two rows."""
        expert, epoch = key
        rows = self.store.rows(self._experts[expert], [epoch, epoch + self.expert_epochs]).to(self._ready.device)
        return TrajectorySegment(key, rows[0], rows[1])

    def refresh(self, winner: CandidateKey, drawn: Sequence[CandidateKey], context: StepContext) -> None:
        """Move the used expert's cursor on (``advance``); nothing to do otherwise."""
        del drawn
        if self.refresh_rule == "advance":
            low, high = self.min_start_epoch, self.start_window_end(context.step)
            self.cursors[winner[0]] = low + (winner[1] + 1 - low) % (high - low)

    def start_window_end(self, step: int) -> int:
        """Return the exclusive end of the start window at a step; it grows linearly where DATM's switch is on."""
        if self.current_max_start_epoch is None or self.expansion_steps is None:
            return self.max_start_epoch
        grown = (self.max_start_epoch - self.current_max_start_epoch) * step // self.expansion_steps
        return min(self.current_max_start_epoch + grown, self.max_start_epoch)

    def feature_parameters(self) -> Tensor:
        """Return the first expert's parameters at its last stored epoch, [P]."""
        expert = self._experts[0]
        return self.store.rows(expert, [self.store.epochs(expert)])[0].to(self._ready.device)

    def teacher_logits(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return logits [n, C] averaged over the experts that classify an image correctly (over all if none does).

        As in DATM: the last stored epoch of each expert.
        """
        network = self._ready.network
        total = torch.zeros(len(images), self._ready.real.num_classes, device=images.device)
        correct_total, correct_count = torch.zeros_like(total), torch.zeros(len(images), 1, device=images.device)
        with torch.no_grad():
            for expert in self._experts:
                theta = self.store.rows(expert, [self.store.epochs(expert)])[0].to(images.device)
                logits = network(theta, images)
                correct = (logits.argmax(1) == labels).float().unsqueeze(1)
                total += logits
                correct_total += correct * logits
                correct_count += correct
        return torch.where(correct_count > 0, correct_total / correct_count.clamp_min(1), total / self.size)

    def full_set_accuracies(self) -> FullSetAccuracies | None:
        """Return the experts' own held-out accuracies at the last epoch that all of them have."""
        records = [self.store.metadata(expert).accuracies.held_out for expert in self._experts]
        epochs = min(len(record) for record in records) if records else 0
        last = [record[epochs - 1] for record in records] if epochs else []
        known = tuple(accuracy for accuracy in last if accuracy is not None)
        if not known:
            return None
        return FullSetAccuracies(known, f"{len(known)} experts after {epochs} epochs")

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
