"""Accuracy-against-step curves of the synthetic set."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from dd_lightning.execution.compile import Compile, compile_choice
from dd_lightning.execution.options import Execution
from dd_lightning.functional.errors import InputError
from dd_lightning.functional.random import step_generator
from dd_lightning.module import DistillationModule, as_distillation, log_scalars
from dd_lightning.networks import FunctionalNetwork, NetworkSpec, network_name
from dd_lightning.sets.atomic_write import write_atomically
from dd_lightning.sets.initial import class_labels, initial_images
from dd_lightning.sets.real import RealSet
from dd_lightning.training.evaluation import Evaluation, EvaluationResult, get_recipe, mean_std
from dd_lightning.training.progress import epoch_bar

REMEDY = "set smaller evaluation.num_networks, or smaller evaluation.networks"
"""What a person can do where an evaluation needs more memory than there is."""


@dataclass(frozen=True)
class EvaluationPoint:
    """One point of an accuracy curve.

    Attributes:
        step: Distillation step.
        network: Architecture that was trained.
        accuracies: Held-out accuracy of each fresh network, in [0, 1].
        seconds: What the evaluation took.
        validations: The accuracies at each of the recipe's tests; empty if only ``accuracies`` are known.
    """

    step: int
    network: str
    accuracies: tuple[float, ...]
    seconds: float
    validations: tuple[tuple[float, ...], ...] = ()

    @property
    def result(self) -> EvaluationResult:
        """The point's accuracies, with mean and std."""
        return EvaluationResult(self.accuracies, self.seconds, self.validations)

    @property
    def best_accuracies(self) -> tuple[float, ...]:
        """Each network's best validation; chosen on the data it is measured on, hence no result."""
        return self.result.best_accuracies


class EvalCallback(Callback):
    """Train fresh networks on the synthetic set at step 0, every n steps and the last, and log their accuracy.

    Every point is logged to all loggers at exactly ``global_step``; the raw accuracy of each network is kept, in
    :attr:`points`, in the checkpoint and in ``evaluation.csv`` beside the logs. The headline is the last step;
    ``accuracy_best``, the best point so far, is logged under its own name, and so is ``accuracy_best_validation``, the
    best test of each network while it was trained, if the recipe has several. Training is not disturbed: with another
    interval, or without the callback, the images are the same, bit for bit.

    Args:
        every_n_steps: Distance of the points; 100 in the MTT reference.
        networks: Architectures to train; null is the module's own.
        num_networks: Fresh networks per architecture and point; 5 in the literature.
        num_networks_intermediate: Fresh networks per architecture at the points before the last step, at most
            ``num_networks``: the first ones of those, so a curve costs less and its end is what it would have been. A
            deviation is given of two networks and more. Null is ``num_networks``.
        recipe: Published protocol: ``mtt``, or ``idc``.
        epochs: Epochs, if other than the protocol's.
        augmentation: DSA strategy, if other than the protocol's; "none" switches it off.
        split: Held-out data to test on: ``test``, or ``val`` where the data has a ``val_fraction``.
        compare_random: At the end, evaluate the same number of random real images by the same recipe and learning
            rate.
        compile: Compile the networks' gradients, once in a run. It takes up to minutes, and the rounding is another
            one. ``auto`` does so on CUDA alone, in runs of at least 50,000 steps of fresh networks (points x epochs x
            batches), unless the Trainer is ``deterministic``; where it is impossible, the run goes on without.

    Raises:
        InputError: If a number is out of range, the recipe or ``compile`` is unknown, or there is no such split.
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        networks: list[str] | None = None,
        num_networks: int = 5,
        recipe: str = "mtt",
        epochs: int | None = None,
        augmentation: str | None = None,
        split: Literal["test", "val"] = "test",
        compare_random: bool = True,
        num_networks_intermediate: int | None = None,
        compile: Compile | bool = "off",
    ) -> None:
        if every_n_steps < 1 or num_networks < 1:
            raise InputError(
                f"evaluation.every_n_steps is {every_n_steps} and num_networks is {num_networks}; both must be >= 1"
            )
        if num_networks_intermediate is not None and not 1 <= num_networks_intermediate <= num_networks:
            raise InputError(
                f"evaluation.num_networks_intermediate is {num_networks_intermediate} and num_networks is "
                f"{num_networks}; use 1 .. {num_networks}, or null for as many at every point"
            )
        self.every_n_steps = every_n_steps
        self.network_specs = networks
        self.num_networks = num_networks
        self.num_networks_intermediate = num_networks_intermediate
        self.compile = compile_choice(compile)
        self.recipe = get_recipe(recipe, epochs, augmentation)
        self.split: Literal["test", "val"] = split
        self.compare_random = compare_random
        self.points: list[EvaluationPoint] = []
        self.random_real: EvaluationPoint | None = None
        self._networks: list[FunctionalNetwork] = []
        self._held_out: RealSet | None = None
        self._evaluations: dict[str, Evaluation] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Build the architectures: if they or the split do not exist, fail before the module trains experts."""
        if stage != "fit":
            return
        module, device = as_distillation(pl_module), trainer.strategy.root_device
        data = module.datamodule
        self._held_out = data.held_out(self.split).to(device)
        specs: Sequence[NetworkSpec] = self.network_specs or [module.network_spec]
        self._networks = [FunctionalNetwork(spec, data.image_shape, data.num_classes).to(device) for spec in specs]
        self._evaluations = {}
        names = [network_name(spec) for spec in specs]
        if len(set(names)) < len(names):
            raise InputError(f"evaluation.networks is {names}; each architecture may be named once")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate step 0, or bring the curve of a resumed run into its new logs."""
        self.points = [point for point in self.points if point.step <= trainer.global_step]
        for step in sorted({point.step for point in self.points}):
            self._log(trainer, step)
        if self.points:
            self._write_csv(trainer)
        else:
            self._evaluate(trainer, as_distillation(pl_module), self._early)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401  (Lightning's own signature)
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Evaluate every n-th step."""
        del outputs, batch, batch_idx
        if trainer.global_step % self.every_n_steps == 0:
            last = trainer.global_step == trainer.max_steps
            self._evaluate(trainer, as_distillation(pl_module), self.num_networks if last else self._early)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the last step if it is no full point yet, compare with random real images, log the hparams."""
        module = as_distillation(pl_module)
        last = [point for point in self.points if point.step == trainer.global_step]
        if not last or any(len(point.accuracies) < self.num_networks for point in last):
            # a run that was ended early, at a point, had not been told that it was its last step
            self.points = [point for point in self.points if point.step != trainer.global_step]
            self._evaluate(trainer, module, self.num_networks)
        if self.compare_random:
            # as many as are stored: what a budget of that many whole images is worth
            images = initial_images(module.real, module.ipc, "real", step_generator(module.seed, 0, "random-real"))
            labels = class_labels(module.datamodule.num_classes, module.ipc).to(images.device)
            self.random_real = self._train_and_test(
                trainer, module, self._networks[0], images, labels, "random real images", self.num_networks
            )
        self._log_hyperparameters(trainer, module)

    @property
    def seconds(self) -> float:
        """Wall-clock seconds that all evaluations have taken."""
        points = [*self.points, *([self.random_real] if self.random_real is not None else [])]
        return sum(point.seconds for point in points)

    def last(self, network: str | None = None) -> EvaluationPoint:
        """Return the last point of an architecture (of the first one, by default): the headline.

        Where ``num_networks_intermediate`` are fewer, it is the last one of all ``num_networks``, once there is one.
        """
        name = network or self._networks[0].name
        mine = [point for point in self.points if point.network == name]
        return ([point for point in mine if len(point.accuracies) >= self.num_networks] or mine)[-1]

    def best(self, network: str | None = None) -> EvaluationPoint:
        """Return the point of highest mean accuracy, of however many networks.

        Looking at it on the test split is not a result.
        """
        name = network or self._networks[0].name
        return max((p for p in self.points if p.network == name), key=lambda point: point.result.mean)

    @property
    def _early(self) -> int:
        return self.num_networks if self.num_networks_intermediate is None else self.num_networks_intermediate

    def _evaluate(self, trainer: Trainer, module: DistillationModule, count: int) -> None:
        images, targets = module.synthetic_set.decoded().detach(), module.synthetic_set.decoded_targets().detach()
        self.points += [
            self._train_and_test(trainer, module, network, images, targets, "evaluation", count)
            for network in self._networks
        ]
        self._log(trainer, trainer.global_step)
        self._write_csv(trainer)

    def _write_csv(self, trainer: Trainer) -> None:
        if trainer.is_global_zero and trainer.log_dir is not None:
            write_atomically(Path(trainer.log_dir) / "evaluation.csv", self._csv().encode())

    def _train_and_test(
        self,
        trainer: Trainer,
        module: DistillationModule,
        network: FunctionalNetwork,
        images: Tensor,
        targets: Tensor,
        what: str,
        count: int,
    ) -> EvaluationPoint:
        if self._held_out is None:
            raise RuntimeError("EvalCallback.setup has not been called")
        # Gradients are needed here whatever hook calls, and the global random state is never touched.
        shown = trainer.progress_bar_callback is not None and trainer.is_global_zero
        title = f"{what}: {count} x {network.name}"
        with (
            module.explain_oom(f"training {count} x {network.name} ({what})", REMEDY),
            torch.inference_mode(False),
            torch.enable_grad(),
            epoch_bar(title, self.recipe.epochs, shown) as on_epoch,
        ):
            if network.name not in self._evaluations:
                self._evaluations[network.name] = Evaluation(
                    network,
                    self._held_out,
                    self.recipe,
                    Execution(compile=self.compile),
                    trainer.max_steps // self.every_n_steps + 1,
                    (self._early, self.num_networks),
                )
            evaluation = self._evaluations[network.name]
            result = evaluation(images, targets, module.student_lr, count, module.seed, on_epoch)
        return EvaluationPoint(trainer.global_step, network.name, result.accuracies, result.seconds, result.validations)

    def _has_deviation(self, point: EvaluationPoint) -> bool:
        """Tell whether a deviation says something: that of an early point's only network would be no spread at all."""
        return self.num_networks_intermediate is None or len(point.accuracies) > 1

    @property
    def _several_validations(self) -> bool:
        return len(self.recipe.validation_epochs) > 1

    def _log(self, trainer: Trainer, step: int) -> None:
        values: dict[str, float] = {}
        for point in (p for p in self.points if p.step == step):
            so_far = [p.result.mean for p in self.points if p.network == point.network and p.step <= step]
            values |= {
                f"eval/{point.network}/accuracy": point.result.mean,
                f"eval/{point.network}/accuracy_best": max(so_far),
                f"eval/{point.network}/seconds": point.seconds,
            }
            if self._has_deviation(point):
                values[f"eval/{point.network}/accuracy_std"] = point.result.std
            if self.num_networks_intermediate is not None:
                values[f"eval/{point.network}/num_networks"] = len(point.accuracies)
            if self._several_validations:
                values[f"eval/{point.network}/accuracy_best_validation"] = mean_std(point.best_accuracies)[0]
        log_scalars(trainer, values, step)
        inner_loop = as_distillation(trainer.lightning_module).inner_loop
        if inner_loop is not None and step % inner_loop == 0:
            log_scalars(trainer, {f"outer/{name}": value for name, value in values.items()}, step // inner_loop)
        # for ModelCheckpoint(monitor=...) and EarlyStopping, which read the Trainer's metrics
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})

    def _log_hyperparameters(self, trainer: Trainer, module: DistillationModule) -> None:
        metrics = {
            f"hp/{network.name}/accuracy_last": self.last(network.name).result.mean for network in self._networks
        }
        metrics |= {
            f"hp/{network.name}/accuracy_best": self.best(network.name).result.mean for network in self._networks
        }
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.log_hyperparams(module.hyperparameters(), metrics)

    def _csv(self) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        # one that is resumed may have had more networks before
        columns = max([self.num_networks, *(len(point.accuracies) for point in self.points)])
        numbers = range(columns)
        counted = self.num_networks_intermediate is not None
        best = ["best_validation_mean", "best_validation_std", *(f"best_validation_{i}" for i in numbers)]
        headings = ["step", "network", "mean", "std", "seconds", *(f"accuracy_{i}" for i in numbers)]
        writer.writerow(headings + best * self._several_validations + ["num_networks"] * counted)
        for point in self.points:
            result, nothing = point.result, [""] * (columns - len(point.accuracies))
            std = result.std if self._has_deviation(point) else ""
            values = [point.step, point.network, result.mean, std, point.seconds, *point.accuracies, *nothing]
            if self._several_validations:
                mean, best_std = mean_std(point.best_accuracies)
                values += [mean, best_std if self._has_deviation(point) else "", *point.best_accuracies, *nothing]
            writer.writerow(values + [len(point.accuracies)] * counted)
        return text.getvalue()

    def state_dict(self) -> dict[str, Any]:
        """Return the curve."""
        return {
            "points": [
                (p.step, p.network, list(p.accuracies), p.seconds, [list(each) for each in p.validations])
                for p in self.points
            ]
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the curve, also from a checkpoint that holds no validations."""
        self.points = [_restored(*saved) for saved in state_dict["points"]]


def _restored(
    step: int,
    network: str,
    accuracies: Sequence[float],
    seconds: float,
    validations: Sequence[Sequence[float]] = (),
) -> EvaluationPoint:
    return EvaluationPoint(step, network, tuple(accuracies), seconds, tuple(tuple(each) for each in validations))
