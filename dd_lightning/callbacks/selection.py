"""DynaDistill: loss feedback decides which candidate a step learns from."""

import inspect
import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from dd_lightning.callbacks.attached import RunCallback, as_distillation
from dd_lightning.distillation import Demand, Distillation
from dd_lightning.functional.errors import InputError, check_range
from dd_lightning.functional.selection import Favor, Normalize, entropy, sample_index, selection_probabilities
from dd_lightning.module import DistillationModule
from dd_lightning.objectives import ScoredCandidate
from dd_lightning.pools import CandidateKey
from dd_lightning.trainer.run import log_scalars, logs_now

REPORT_AFTER = 10
"""Selections after which the effective number of candidates is reported, once."""


class _Known(NamedTuple):
    """A candidate scored at an earlier step.

    Attributes:
        key: Which one.
        loss: Its last known loss.
    """

    key: CandidateKey
    loss: float


class TrajectorySelectionCallback(RunCallback):
    """DynaDistill (Algorithm 1): score several candidates at every step and sample the one to learn from.

    Each step draws ``num_candidates`` from the pool, computes the matching loss of each on the current synthetic set
    with the same batches and augmentations, and samples one with softmax(+-loss / temperature). With one candidate
    the images are those of the base method, bit for bit. A candidate whose loss is not finite is left out and counted.

    Most of the cost is scoring candidates that are not chosen. Three options cut it. None is in the paper; they can be
    combined, and with the last two the softmax sees other losses than those of Algorithm 1:

    * ``every_n_steps`` selects less often.
    * ``refresh_per_step`` renews a part of the candidates at each selection. The oldest leave, new ones are drawn and
      scored, and the others keep their last known loss: of earlier images, other batches and augmentations and, in a
      pool of live networks, perhaps of a network that has been trained since. How long a candidate stays depends
      neither on its loss nor on whether it is chosen: the pool is still drawn from uniformly, but successive choices
      are not independent. A chosen candidate with an old loss is scored again, since its gradient needs this step's
      draws. A candidate whose network was re-initialized, or whose loss was not finite, leaves at once.
    * ``score_steps`` scores candidates by the first n steps of the student only. That loss,
      ||theta_n - target||^2 / ||start - target||^2, is 1 for every candidate at n = 0 and says little at small n. The
      chosen candidate's path is completed from where it stopped.

    ``benchmarks/feedback_cost.py`` measures what they save, and how well such losses rank candidates.

    Args:
        num_candidates: M; 3 in the paper (section 4.1).
        temperature: 0.5 in the paper (section 4.1).
        favor: ``high_loss`` is Algorithm 1 line 11 as printed, exp(+L); ``low_loss`` is what the prose says, that
            better-performing models are likelier; ``scheduled`` goes linearly from the first to the second over the run
            (not in the paper).
        normalize: Divide the losses by their ``mean`` or by their standard deviation (``zscore``) first. MTT's losses
            are near 1 and make the choice nearly uniform; sums in the hundreds make it an argmax.
        pool_size: N, the candidates the pool must hold: a smaller pool grows, or trains the experts that it lacks. Null
            is ``num_candidates``.
        every_n_steps: Select at every n-th step and keep the choice in between.
        refresh_per_step: Candidates that are drawn and scored at each selection; null is all M.
        score_steps: Inner steps that candidates are scored by; null is all.

    Raises:
        InputError: If a value is out of range, or the objective or the pool cannot do it.

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
        check_range("num_candidates", num_candidates, low=1, hint="3 in the paper")
        check_range("temperature", temperature, low=0, exclude_low=True, hint="0.5 in the paper")
        check_range("every_n_steps", every_n_steps, low=1)
        check_range("pool_size", pool_size, low=num_candidates, hint="the pool must hold all num_candidates")
        check_range(
            "refresh_per_step", refresh_per_step, low=1, high=num_candidates, hint="null for all num_candidates"
        )
        check_range("score_steps", score_steps, low=1, hint="null for all steps")
        self.num_candidates = num_candidates
        self.temperature = temperature
        self.favor: Favor = favor
        self.normalize: Normalize = normalize
        self.pool_size = pool_size
        self.every_n_steps = every_n_steps
        self.refresh_per_step = refresh_per_step
        self.score_steps = score_steps
        self.reset()

    def reset(self) -> None:
        """Forget all selections."""
        self.selections = 0
        self.nonfinite = 0
        self._effective_sum = 0.0
        self._held: CandidateKey | None = None
        self._group: list[_Known] = []
        self._before: tuple[int, dict[str, Any]] = (-1, {})

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask the pool for enough candidates, before the module prepares it."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        module = as_distillation(pl_module)
        self._check(module, 1 if module.distillation.shared else trainer.world_size)
        keeps = self.refresh_per_step is not None
        options = {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}
        options["class"] = type(self).__name__
        size = self.pool_size or self.num_candidates
        module.demand = Demand(self.num_candidates, size, keeps_candidates=keeps, selection=options)

    def _check(self, module: DistillationModule, processes: int) -> None:
        """Refuse what pool or objective cannot do."""
        for name, alone in (("refresh_per_step", None), ("every_n_steps", 1)):
            if (value := getattr(self, name)) != alone and processes > 1:
                raise InputError(
                    f"{name} is {value}, but processes is 'average': each of {processes} would keep its own "
                    "candidates, and only one's are saved; set processes: shard"
                )
        objective = module.objective
        if self.score_steps is not None:
            if objective.inner_steps is None:
                raise InputError(
                    f"score_steps is {self.score_steps}, but {type(objective).__name__} has no inner steps; set "
                    "selection.score_steps: null"
                )
            check_range("score_steps", self.score_steps, high=objective.inner_steps, hint="the objective's inner steps")

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
        run = module.distillation
        run.begin(trainer.global_step)
        self._before = (trainer.global_step, self.state_dict())
        if self._held is not None and trainer.global_step % self.every_n_steps != 0:
            run.select(run.score([self._held])[0], [self._held])
            return
        started = time.perf_counter()
        kept = self._kept(run)
        keys = run.draw(self.num_candidates - len(kept), [known.key for known in kept])
        scored = run.score(keys, steps=self._steps, with_gradient=self.num_candidates == 1)
        losses = torch.stack([candidate.loss for candidate in scored])
        if kept:
            losses = torch.cat([losses.new_tensor([known.loss for known in kept]), losses])
        progress = trainer.global_step / max(trainer.max_steps, 1)
        probabilities = selection_probabilities(losses, self.temperature, self.favor, self.normalize, progress)
        index = sample_index(probabilities, run.context.generator("selection"))
        if index < len(kept):  # known from an earlier step: now with this one's draws
            scored += run.score([kept[index].key], steps=self._steps, with_gradient=True)
            winner = scored[-1]
        else:
            winner = scored[index - len(kept)]
        self._remember(kept, scored)
        if self._steps is not None:
            winner = run.complete(winner, self._steps)
        run.select(winner, [candidate.candidate.key for candidate in scored])
        self._held = winner.candidate.key
        self._report(trainer, losses, probabilities, index, len(scored), time.perf_counter() - started)

    @property
    def _steps(self) -> int | None:
        """Inner steps to score by; None for all: a single candidate needs no score to be chosen."""
        return self.score_steps if self.num_candidates > 1 else None

    def _kept(self, run: Distillation) -> list[_Known]:
        """Return the candidates of the last step that stay, the one that has been there longest first."""
        if self.refresh_per_step is None:
            return []
        staying = self.num_candidates - self.refresh_per_step
        group = self._group[max(0, len(self._group) - staying) :]
        return [known for known in group if known.key in run.pool]

    def _remember(self, kept: Sequence[_Known], scored: Sequence[ScoredCandidate]) -> None:
        if self.refresh_per_step is None:
            return
        losses = {known.key: known.loss for known in kept}
        losses |= {candidate.candidate.key: float(candidate.loss) for candidate in scored}
        self._group = [_Known(key, loss) for key, loss in losses.items() if math.isfinite(loss)]

    def _report(
        self,
        trainer: Trainer,
        losses: Tensor,
        probabilities: Tensor,
        index: int,
        scored: int,
        seconds: float,
    ) -> None:
        finite = losses.isfinite()
        self.nonfinite += int((~finite).sum())
        spread = float(entropy(probabilities))
        self.selections += 1
        self._effective_sum += math.exp(spread)
        if self.selections == REPORT_AFTER:
            effective = self._effective_sum / REPORT_AFTER
            remedy = "" if 1.05 < effective < 0.99 * self.num_candidates else "; selection.normalize changes that"
            rank_zero_info(f"selection: {effective:.2f} of {self.num_candidates} candidates in effect{remedy}")
        if logs_now(trainer) and finite.any():
            values = {
                "selection/loss_mean": float(losses[finite].mean()),
                "selection/loss_chosen": float(losses[index]),
                "selection/rank_chosen": float((losses < losses[index]).sum() + 1),
                "selection/entropy": spread,
                "selection/probability_chosen": float(probabilities[index]),
                "selection/scored": float(scored),
                "selection/nonfinite": float(self.nonfinite),
                "selection/seconds": seconds,
            }
            # by rank: a candidate's place among those drawn says nothing
            ranked = enumerate(losses[finite].sort().values, start=1)
            values |= {f"selection/loss_rank_{rank}": float(loss) for rank, loss in ranked}
            log_scalars(trainer, values)

    def state_dict(self) -> dict[str, Any]:
        """Return the counters, the choice that is being kept and the losses that are known, after a finished step."""
        trainer, (step, before) = self._last_trainer() if self._last_trainer else None, self._before
        if trainer is not None and trainer.global_step == step:
            return before
        return {
            "selections": self.selections,
            "nonfinite": self.nonfinite,
            "effective_sum": self._effective_sum,
            "held": self._held,
            "group": [tuple(known) for known in self._group],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.selections = state_dict["selections"]
        self.nonfinite = state_dict["nonfinite"]
        self._effective_sum = state_dict["effective_sum"]
        held = state_dict["held"]
        self._held = None if held is None else tuple(held)
        self._group = [_Known(tuple(key), loss) for key, loss in state_dict["group"]]
