"""DynaDistill: loss feedback decides which candidate a step learns from."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from dd_lightning.functional.errors import InputError
from dd_lightning.functional.selection import Favor, Normalize, entropy, sample_index, selection_probabilities
from dd_lightning.module import as_distillation
from dd_lightning.pools import CandidateKey
from dd_lightning.scalars import log_scalars, logs_now

REPORT_AFTER = 10
"""Selections after which the effective number of candidates is reported, once."""


class TrajectorySelectionCallback(Callback):
    """DynaDistill (Algorithm 1): score several candidates at every step and sample the one to learn from.

    Each step draws ``num_candidates`` from the pool, computes the matching loss of each on the current synthetic set
    with the same batches and augmentations, and samples one with softmax(+-loss / temperature). With one candidate
    the images are those of the base method, bit for bit.

    Args:
        num_candidates: M; 3 in the paper (section 4.1).
        temperature: 0.5 in the paper (section 4.1).
        favor: ``high_loss`` is Algorithm 1 line 11 as printed, exp(+L); ``low_loss`` is what the prose says, that
            better-performing models are likelier.
        normalize: Divide the losses by their ``mean`` or by their standard deviation (``zscore``) first. MTT's losses
            are near 1 and make the choice nearly uniform; sums in the hundreds make it an argmax.
        pool_size: N, the candidates the pool must hold; null leaves the pool as it is.
        every_n_steps: Select anew at every n-th step and keep the choice in between.

    Raises:
        InputError: If a value is out of range, or M exceeds the pool.

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
        self.num_candidates = num_candidates
        self.temperature = temperature
        self.favor: Favor = favor
        self.normalize: Normalize = normalize
        self.pool_size = pool_size
        self.every_n_steps = every_n_steps
        self.selections = 0
        self._effective_sum = 0.0
        self._held: CandidateKey | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask the pool for enough candidates, before the module prepares it."""
        if stage != "fit":
            return
        module = as_distillation(pl_module)
        pool = module.pool
        if self.pool_size is not None:
            pool.ensure(self.pool_size)
        if self.num_candidates > pool.size:
            raise InputError(
                f"num_candidates is {self.num_candidates}, but the pool holds {pool.size}; "
                "lower selection.num_candidates or set selection.pool_size"
            )
        module.expect_candidates(self.num_candidates)

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
        keys = module.draw_candidates(self.num_candidates)
        scored = module.score(keys)
        losses = torch.stack([candidate.loss for candidate in scored])
        probabilities = selection_probabilities(losses, self.temperature, self.favor, self.normalize)
        # A loss that is not finite has no probability: the module's own guard must see that candidate.
        broken = (~torch.isfinite(losses)).nonzero().flatten().tolist()
        index = broken[0] if broken else sample_index(probabilities, module.context().generator("selection"))
        module.select(scored[index], keys)
        self._held = keys[index]
        if not broken:
            self._log(trainer, losses, probabilities, index, time.perf_counter() - started)

    def _log(
        self, trainer: Trainer, losses: torch.Tensor, probabilities: torch.Tensor, index: int, seconds: float
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
                "selection/seconds": seconds,
            }
            values |= {f"selection/loss_{i}": float(loss) for i, loss in enumerate(losses)}
            log_scalars(trainer, values, trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """Return the counters and the choice that is being kept."""
        return {"selections": self.selections, "effective_sum": self._effective_sum, "held": self._held}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.selections = state_dict["selections"]
        self._effective_sum = state_dict["effective_sum"]
        held = state_dict["held"]
        self._held = None if held is None else tuple(held)
