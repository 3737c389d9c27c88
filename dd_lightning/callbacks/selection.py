"""DynaDistill: loss feedback decides which candidate a step learns from."""

import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from dd_lightning.functional.errors import InputError
from dd_lightning.functional.selection import Favor, Normalize, entropy, sample_index, selection_probabilities
from dd_lightning.module import DistillationModule, as_distillation, log_scalars, logs_now
from dd_lightning.objectives import ScoredCandidate
from dd_lightning.pools import CandidateKey

REPORT_AFTER = 10
"""Selections after which the effective number of candidates is reported, once."""


class _Known(NamedTuple):
    """A candidate that steps have looked at.

    Attributes:
        key: Which one.
        loss: Its last known loss.
    """

    key: CandidateKey
    loss: float


class TrajectorySelectionCallback(Callback):
    """DynaDistill (Algorithm 1): score several candidates at every step and sample the one to learn from.

    Each step draws ``num_candidates`` from the pool, computes the matching loss of each on the current synthetic set
    with the same batches and augmentations, and samples one with softmax(+-loss / temperature). With one candidate
    the images are those of the base method, bit for bit.

    Most of what it costs is the scoring of candidates that are not chosen. Three options cut that. None is in the
    paper; they can be combined, and with the last two the softmax sees other losses than those of Algorithm 1:

    * ``every_n_steps`` looks at candidates less often.
    * ``refresh_per_step`` renews a part of the candidates at each selection. Those that have been there longest leave,
      new ones are drawn and scored, and the others stand in the softmax with their last known loss: of earlier images,
      of another step's batches and augmentations and, in a pool of live networks, perhaps of a network that has been
      trained since. A stored trajectory is one of (experts x start epochs), so that a loss remembered by its name would
      hardly ever be met again; hence it is the group that persists. How long a candidate is in it depends neither on
      its loss nor on whether it is chosen: the pool is still drawn from uniformly, but successive choices are not
      independent. One that is chosen with a loss of an earlier step is scored anew, since its gradient needs this
      step's draws. A candidate whose network was re-initialized meanwhile, or whose loss was not finite, leaves at
      once.
    * ``score_steps`` scores candidates by the first n steps of the student alone. The loss on the way,
      ||theta_n - target||^2 / ||start - target||^2, is another quantity than the matching loss: it is 1 for every
      candidate at n = 0, tells them apart the less the smaller n is, and knows nothing of where students go afterwards.
      The chosen one's path is completed from where it stopped.

    ``benchmarks/feedback_cost.py`` measures what they save, and how well such losses rank candidates.

    Args:
        num_candidates: M; 3 in the paper (section 4.1).
        temperature: 0.5 in the paper (section 4.1).
        favor: ``high_loss`` is Algorithm 1 line 11 as printed, exp(+L); ``low_loss`` is what the prose says, that
            better-performing models are likelier.
        normalize: Divide the losses by their ``mean`` or by their standard deviation (``zscore``) first. MTT's losses
            are near 1 and make the choice nearly uniform; sums in the hundreds make it an argmax.
        pool_size: N, the candidates the pool must hold; null leaves the pool as it is.
        every_n_steps: Select anew at every n-th step and keep the choice in between.
        refresh_per_step: Candidates that are drawn and scored anew at each selection; null is all M.
        score_steps: Inner steps that candidates are scored by; null is all.

    Raises:
        InputError: If a value is out of range, M exceeds the pool, or the objective or the pool cannot do it.

    References:
        Chen et al., DynaDistill: Leveraging Real-Time Feedback for Effective Dataset Distillation, CVPRW 2024.
    """

    def __init__(
        self,
        num_candidates: int = 3,
        temperature: float = 0.5,
        favor: Favor = "high_loss",
        normalize: Normalize = "none",
        pool_size: int | None = None,
        every_n_steps: int = 1,
        refresh_per_step: int | None = None,
        score_steps: int | None = None,
    ) -> None:
        if num_candidates < 1:
            raise InputError(f"num_candidates is {num_candidates}; at least 1 candidate must be drawn")
        if not 0 < temperature < float("inf"):
            raise InputError(f"temperature is {temperature}; it must be above 0 (the paper uses 0.5)")
        if every_n_steps < 1:
            raise InputError(f"every_n_steps is {every_n_steps}; it must be at least 1")
        if pool_size is not None and pool_size < num_candidates:
            raise InputError(
                f"pool_size is {pool_size}, but num_candidates is {num_candidates}; the pool must hold them all"
            )
        if refresh_per_step is not None and not 1 <= refresh_per_step <= num_candidates:
            raise InputError(
                f"refresh_per_step is {refresh_per_step}; it must be from 1 to num_candidates, which is "
                f"{num_candidates}, or null for all of them"
            )
        if score_steps is not None and score_steps < 1:
            raise InputError(f"score_steps is {score_steps}; it must be at least 1, or null for all steps")
        self.num_candidates = num_candidates
        self.temperature = temperature
        self.favor: Favor = favor
        self.normalize: Normalize = normalize
        self.pool_size = pool_size
        self.every_n_steps = every_n_steps
        self.refresh_per_step = refresh_per_step
        self.score_steps = score_steps
        self.selections = 0
        self._effective_sum = 0.0
        self._held: CandidateKey | None = None
        self._group: list[_Known] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask the pool for enough candidates, before the module prepares it."""
        if stage != "fit":
            return
        module = as_distillation(pl_module)
        if self.pool_size is None and self.num_candidates > len(module.pool):
            raise InputError(
                f"num_candidates is {self.num_candidates}, but the pool holds {len(module.pool)}; "
                "lower selection.num_candidates or set selection.pool_size"
            )
        module.expect_candidates(self.num_candidates, self.pool_size, keep=self.refresh_per_step is not None)
        self._group = []  # of an earlier fit; a checkpoint's is loaded after this
        if self.refresh_per_step is not None and trainer.world_size > 1:
            raise InputError(
                f"refresh_per_step is {self.refresh_per_step}, but trainer runs {trainer.world_size} processes: "
                "each would keep candidates of its own, and only one's are saved; set trainer.devices: 1, or null"
            )
        if self.score_steps is not None:
            objective = module.objective
            if objective.inner_steps is None:
                raise InputError(
                    f"score_steps is {self.score_steps}, but {type(objective).__name__} has no inner steps to stop "
                    "after; set selection.score_steps: null"
                )
            if self.score_steps > objective.inner_steps:
                raise InputError(
                    f"score_steps is {self.score_steps}, but the objective takes {objective.inner_steps} inner steps; "
                    "lower selection.score_steps, or set null"
                )

    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,  # noqa: ANN401  (Lightning's own signature)
        batch_idx: int,
    ) -> None:
        """Score the candidates and hand the sampled one to the module, with all that its scoring computed."""
        del batch, batch_idx
        module = as_distillation(pl_module)
        if self._held is not None and trainer.global_step % self.every_n_steps != 0:
            module.select(module.score([self._held])[0], [self._held])
            return
        started = time.perf_counter()
        kept = self._kept(module)
        keys = module.draw_candidates(self.num_candidates - len(kept), [known.key for known in kept])
        scored = self._score(module, keys, sole=self.num_candidates == 1)
        losses = torch.stack([candidate.loss for candidate in scored])
        if kept:
            losses = torch.cat([losses.new_tensor([known.loss for known in kept]), losses])
        probabilities = selection_probabilities(losses, self.temperature, self.favor, self.normalize)
        # A loss that is not finite has no probability: the module's own guard must see that candidate.
        broken = (~torch.isfinite(losses)).nonzero().flatten().tolist()
        index = broken[0] if broken else sample_index(probabilities, module.context().generator("selection"))
        if index < len(kept):  # known from an earlier step: now with this one's draws
            scored += self._score(module, [kept[index].key], sole=True)
            winner = scored[-1]
        else:
            winner = scored[index - len(kept)]
        self._remember(kept, scored)
        if self._first_steps is not None:
            winner = module.completed(winner, self._first_steps)
        module.select(winner, [candidate.candidate.key for candidate in scored])
        self._held = winner.candidate.key
        if not broken:
            self._log(trainer, losses, probabilities, index, len(scored), time.perf_counter() - started)

    @property
    def _first_steps(self) -> int | None:
        """Inner steps to score by; None for all: a sole candidate needs no score to be chosen."""
        return self.score_steps if self.num_candidates > 1 else None

    def _score(self, module: DistillationModule, keys: Sequence[CandidateKey], sole: bool) -> list[ScoredCandidate]:
        if self._first_steps is not None:
            return module.score_begun(keys, self._first_steps)
        return module.score(keys, sole)

    def _kept(self, module: DistillationModule) -> list[_Known]:
        """Return the candidates of the last step that stay, the one that has been there longest first."""
        if self.refresh_per_step is None:
            return []
        staying = self.num_candidates - self.refresh_per_step
        group = self._group[max(0, len(self._group) - staying) :]
        there = module.still_there([known.key for known in group])
        return [known for known, stays in zip(group, there, strict=True) if stays]

    def _remember(self, kept: Sequence[_Known], scored: Sequence[ScoredCandidate]) -> None:
        if self.refresh_per_step is None:
            return
        losses = {known.key: known.loss for known in kept}
        losses |= {candidate.candidate.key: float(candidate.loss) for candidate in scored}
        self._group = [_Known(key, loss) for key, loss in losses.items() if math.isfinite(loss)]

    def _log(
        self,
        trainer: Trainer,
        losses: torch.Tensor,
        probabilities: torch.Tensor,
        index: int,
        scored: int,
        seconds: float,
    ) -> None:
        spread = float(entropy(probabilities))
        self.selections += 1
        self._effective_sum += float(torch.tensor(spread).exp())
        if self.selections == REPORT_AFTER:
            effective = self._effective_sum / REPORT_AFTER
            remedy = "" if 1.05 < effective < 0.99 * self.num_candidates else "; selection.normalize changes that"
            rank_zero_info(f"selection: {effective:.2f} of {self.num_candidates} candidates in effect{remedy}")
        if logs_now(trainer):
            values = {
                "selection/loss_mean": float(losses.mean()),
                "selection/loss_chosen": float(losses[index]),
                "selection/entropy": spread,
                "selection/probability_chosen": float(probabilities[index]),
                "selection/scored": float(scored),
                "selection/seconds": seconds,
            }
            values |= {f"selection/loss_{i}": float(loss) for i, loss in enumerate(losses)}
            log_scalars(trainer, values, trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """Return the counters, the choice that is being kept and the losses that are known."""
        return {
            "selections": self.selections,
            "effective_sum": self._effective_sum,
            "held": self._held,
            "group": [tuple(known) for known in self._group],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.selections = state_dict["selections"]
        self._effective_sum = state_dict["effective_sum"]
        held = state_dict["held"]
        self._held = None if held is None else tuple(held)
        self._group = [_Known(tuple(key), loss) for key, loss in state_dict.get("group", ())]
