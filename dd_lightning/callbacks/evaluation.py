"""Accuracy-against-step curves of the synthetic set."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from dd_lightning.callbacks.accuracy_curve import AccuracyCurve, EvaluationPoint
from dd_lightning.callbacks.attached import RunCallback, as_distillation
from dd_lightning.callbacks.tensorboard import lay_out_bands, log_hyperparameters
from dd_lightning.execution.memory import explain_oom
from dd_lightning.execution.options import Execution
from dd_lightning.functional.errors import DistillationError, InputError, check_range
from dd_lightning.functional.random import step_generator
from dd_lightning.module import DistillationModule
from dd_lightning.networks import FunctionalNetwork, NetworkSpec, network_name
from dd_lightning.sets.atomic_write import write_atomically
from dd_lightning.sets.real import RealSet
from dd_lightning.trainer.run import log_scalars, monitors, process_of, run_folder
from dd_lightning.training.evaluation import Evaluation, EvaluationRecipe, get_recipe
from dd_lightning.training.parallel_networks import check_batches
from dd_lightning.training.progress import epoch_bar

Split = Literal["test", "val"]

DRAWS = 5
"""The fewest draws of random real images that a set is compared with: one differs from another by several points."""

REMEDY = "set smaller evaluation.num_networks, or smaller evaluation.networks"
"""What a person can do where an evaluation needs more memory than there is."""


class EvalCallback(RunCallback):
    """Train fresh networks on the synthetic set at step 0, every n steps and the last, and log their accuracy.

    Every point is logged to all loggers at exactly ``global_step``: the mean as ``accuracy/<network>``; below
    ``evaluation/<network>/`` the ``std``, ``low`` and ``high`` (mean -+ std), the ``best`` point so far, the
    ``best_validation`` of each network while it was trained, if the recipe has several, and the ``seconds``. The raw
    accuracies are kept in :attr:`points`, in the checkpoint and in ``evaluation.csv`` beside the logs. The headline is
    the last step. Training is not disturbed: with another interval, or without the callback, the images are the same,
    bit for bit.

    ``ModelCheckpoint(monitor="accuracy/<network>", mode="max")`` keeps the best evaluated step after the first, and
    ``EarlyStopping`` with the same arguments stops by it: both look at each evaluation. In file names the metric is
    ``accuracy_<network>``, without slashes: ``ModelCheckpoint(filename="{step}-{accuracy_ConvNet-3:.3f}", ...)``.

    A Trainer may have several evaluations, of other networks or by other recipes; two that share both need a ``name``.

    Args:
        every_n_steps: Distance of the points; 100 in the MTT reference.
        networks: Architectures to train; null is the module's own.
        num_networks: Fresh networks per architecture and point; 5 in the literature.
        num_networks_intermediate: Fresh networks per architecture at the points before the last step, at most
            ``num_networks``: the first ones of those, so a curve costs less and its end is what it would have been. A
            deviation is given of two networks and more. Null is ``num_networks``.
        recipe: Published protocol, ``mtt`` or ``idc``; or one of your own.
        epochs: Epochs, if other than the protocol's.
        augmentation: DSA strategy, if other than the protocol's; "none" switches it off.
        split: Held-out data to test on: ``test``, or ``val`` where the data has a ``val_fraction``.
        compare_random: At the end, evaluate the same number of random real images by the same recipe and learning
            rate: ``num_networks`` draws of them, at least 5, by one network each. So the deviation of ``random_real``
            is over draws and networks. The curve's step 0, if ``init`` is ``real``, is one more draw.
        execution: How the networks are computed, if other than the run (``model.execution``).
        name: Tells this evaluation's curves, file and state from those of another one of the Trainer. Null is made of
            ``networks``, ``recipe`` and ``split`` where they are not the default.

    Raises:
        InputError: If a number is out of range, the recipe is unknown, there is no such split, two evaluations have the
            same curve, or a callback monitors an accuracy that is not measured.
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        networks: Sequence[NetworkSpec] | None = None,
        num_networks: int = 5,
        recipe: str | EvaluationRecipe = "mtt",
        epochs: int | None = None,
        augmentation: str | None = None,
        split: Split = "test",
        compare_random: bool = True,
        num_networks_intermediate: int | None = None,
        execution: Execution | None = None,
        name: str | None = None,
    ) -> None:
        check_range("evaluation.every_n_steps", every_n_steps, low=1)
        if networks is not None and not networks:
            raise InputError("evaluation.networks is []; name at least one, or null for the run's own network")
        check_range("evaluation.num_networks", num_networks, low=1, hint="5 in the literature")
        check_range(
            "evaluation.num_networks_intermediate",
            num_networks_intermediate,
            low=1,
            high=num_networks,
            hint="null for num_networks at every point",
        )
        self.every_n_steps = every_n_steps
        networks = [networks] if isinstance(networks, str) else networks
        self.network_specs = networks
        self.num_networks = num_networks
        self.num_networks_intermediate = num_networks_intermediate or num_networks
        self.execution = execution
        self.recipe = get_recipe(recipe, epochs, augmentation)
        kind = [recipe if isinstance(recipe, str) else "own"] * (recipe != "mtt") + [split] * (split != "test")
        self._suffix = name or "_".join(kind)
        self._label = name or "_".join([*map(network_name, networks or []), *kind])
        self.split: Split = split
        self.compare_random = compare_random
        self._counted = num_networks_intermediate is not None
        self._draws = max(num_networks, DRAWS)
        self._networks: list[FunctionalNetwork] = []
        self._held_out: RealSet | None = None
        self._evaluations: dict[str, Evaluation] = {}
        self.curve_names: dict[str, str] = {}
        """Name of each network's curve, known at setup: the network's, unless another evaluation has that one."""
        self._file = "evaluation.csv"
        self.reset()

    @property
    def state_key(self) -> str:
        """What tells the states of a Trainer's evaluations apart."""
        return f"EvalCallback {self._label}".rstrip()

    def reset(self) -> None:
        """Forget the curve."""
        self.curve = AccuracyCurve(self.num_networks, self._counted, len(self.recipe.validation_epochs) > 1)
        self.random_real: EvaluationPoint | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Build the architectures: if they or the split do not exist, fail before the module trains experts."""
        super().setup(trainer, pl_module, stage)
        module, device = as_distillation(pl_module), trainer.strategy.root_device
        data, evaluations = module.datamodule, _evaluations(trainer)
        if self is evaluations[0]:
            curves: set[str] = set()
            for each in evaluations:
                each._name_curves(module.network_spec, curves)
        else:
            self._file = f"evaluation_{_without_slashes(self._label)}.csv"
        split: dict[str, Split] = {"validate": "val", "test": "test"}
        self._held_out = data.to(device).held_out(split.get(stage, self.split))
        specs = self._specs(module.network_spec)
        self._networks = [FunctionalNetwork(spec, data.image_shape, data.num_classes).to(device) for spec in specs]
        self._evaluations = {}
        trained_on = module.storage.effective_ipc * data.num_classes
        for network in self._networks:
            check_batches(network, trained_on, self.recipe.batch_size)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Measure the set on the data of ``Trainer.validate``: those that were held out of the training data."""
        module, device = as_distillation(pl_module), trainer.strategy.root_device
        data = module.datamodule
        network = FunctionalNetwork(module.network_spec, data.image_shape, data.num_classes).to(device)
        curve = AccuracyCurve(self.num_networks, self._counted, len(self.recipe.validation_epochs) > 1)
        with torch.inference_mode(False):
            module.distillation.attach(module.synthetic_set, data.train, network, data.space)
            curve.points = self._measured(module, self.num_networks)
        if self is _evaluations(trainer)[0]:
            module.measured = {}
        module.measured |= curve.scalars(module.global_step, self.curve_names)

    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Measure the set on the test data."""
        self.on_validation_batch_start(trainer, pl_module)

    def _specs(self, default: NetworkSpec) -> Sequence[NetworkSpec]:
        return self.network_specs or [default]

    def _name_curves(self, default: NetworkSpec, taken: set[str]) -> None:
        """Name the curve of each network, unlike those ``taken``, to which the names are added."""
        self.curve_names = {}
        networks = [network_name(spec) for spec in self._specs(default)]
        if len(set(networks)) < len(networks):
            raise InputError(f"evaluation.networks is {networks}; each architecture may be named once")
        for network in networks:
            name = network if network not in taken else f"{network}_{self._suffix}".rstrip("_")
            if name in taken:
                raise InputError(
                    f"two evaluations have the curve accuracy/{name}; give one of them a name: EvalCallback(name=...)"
                )
            taken.add(name)
            self.curve_names[network] = name

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate step 0, or bring the curve of a resumed run into its new logs."""
        super().on_train_start(trainer, pl_module)
        module, curve, now = as_distillation(pl_module), self.curve, trainer.global_step
        run_folder(trainer, self._file)
        if self is (evaluations := _evaluations(trainer))[0]:
            lay_out_bands(trainer, [name for each in evaluations for name in each.curve_names.values()])
            log_hyperparameters(module)
        curve.points = [point for point in curve.points if point.step <= now and point.network in self.curve_names]
        for step in sorted({point.step for point in curve.points}):
            self._log(module, step)
        if curve.points:
            self._write_csv(trainer)
        # a run may have been stopped within an evaluation, or at its end, which is evaluated in full; and a checkpoint
        # may have been written between two evaluations of its step
        if not curve.at(now) and now < trainer.max_steps and now % self.every_n_steps == 0:
            self._evaluate(module, self.num_networks_intermediate)

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
            self._evaluate(as_distillation(pl_module), self.num_networks if last else self.num_networks_intermediate)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the last step unless it is a full point already; whatever monitors looks after this."""
        if trainer.global_step >= trainer.max_steps or trainer.should_stop:
            self._evaluate_last(as_distillation(pl_module))

    def _evaluate_last(self, module: DistillationModule) -> None:
        curve, step = self.curve, module.global_step
        last = curve.at(step)
        if not last or any(len(point.accuracies) < self.num_networks for point in last):
            # a run that was ended early, at a point, had not been told that it was its last step
            curve.points = [point for point in curve.points if point.step != step]
            self._evaluate(module, self.num_networks)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare with random real images, and close the run's hparams."""
        module = as_distillation(pl_module)
        self._evaluate_last(module)  # unless that is done: a run may end before its epoch does
        if self.compare_random:
            # as many as are stored, or there are: what a budget of that many whole images is worth
            real, seed = module.problem.real, module.distillation.seed
            draws = [step_generator(seed, draw, "random-real") for draw in range(self._draws)]
            rows = torch.stack([real.sample_per_class(module.storage.ipc, draw) for draw in draws])
            given = module, self._networks[0], real.images[rows], real.labels[rows], "random real images"
            try:
                self.random_real = self._train_and_test(*given, self._draws)
            except DistillationError as error:  # the run has its result
                rank_zero_warn(f"there is no comparison with random real images: {error}")
        if self is _evaluations(trainer)[0]:
            log_hyperparameters(module, finished=True)

    @property
    def metrics(self) -> dict[str, int]:
        """How many steps lie between two values of each metric that a callback may monitor; known at setup."""
        names = [f"evaluation/{name}/{key}" for name in self.curve_names.values() for key in self.curve.keys]
        for name in self.curve_names.values():
            names += [f"accuracy/{name}", _without_slashes(f"accuracy/{name}")]
        return dict.fromkeys(names, self.every_n_steps)

    @property
    def points(self) -> list[EvaluationPoint]:
        """The points of the curve."""
        return self.curve.points

    @property
    def seconds(self) -> float:
        """Wall-clock seconds that all evaluations have taken."""
        random_real = [] if self.random_real is None else [self.random_real]
        return sum(point.seconds for point in (*self.points, *random_real))

    def last(self, network: str | None = None) -> EvaluationPoint:
        """Return the last point of an architecture (of the first one, by default): the headline."""
        return self.curve.last(network or self._networks[0].name)

    def best(self, network: str | None = None) -> EvaluationPoint:
        """Return the point of highest mean accuracy; looking at it on the test split is not a result."""
        return self.curve.best(network or self._networks[0].name)

    def _evaluate(self, module: DistillationModule, count: int) -> None:
        self.curve.points += self._measured(module, count)
        metrics = self._log(module, module.global_step)
        self._write_csv(module.trainer)
        for callback in monitors(module.trainer):
            if callback.monitor in metrics:
                # Lightning has them look at the end of an epoch or of a validation, by their options, and a run is one
                # epoch without validations. Each acts on one of the two.
                callback.on_train_epoch_end(module.trainer, module)
                callback.on_validation_end(module.trainer, module)

    def _measured(self, module: DistillationModule, count: int) -> list[EvaluationPoint]:
        images, targets = (
            part.detach() for part in (module.synthetic_set.decoded(), module.synthetic_set.decoded_targets())
        )
        return [
            self._train_and_test(module, network, images, targets, "evaluation", count) for network in self._networks
        ]

    def _write_csv(self, trainer: Trainer) -> None:
        folder = run_folder(trainer)
        if trainer.is_global_zero and folder is not None:
            write_atomically(folder / self._file, self.curve.csv().encode())

    def _train_and_test(
        self,
        module: DistillationModule,
        network: FunctionalNetwork,
        images: Tensor,
        targets: Tensor,
        what: str,
        count: int,
    ) -> EvaluationPoint:
        if self._held_out is None:
            raise RuntimeError("EvalCallback.setup has not been called")
        trainer, run = module.trainer, module.distillation
        shown = trainer.progress_bar_callback is not None and trainer.is_global_zero
        title = f"{count} x {network.name}"
        with (
            run.cost.paused(),
            explain_oom(f"training {title} ({what}) at step {module.global_step}", run.memory, REMEDY),
            torch.inference_mode(False),
            torch.enable_grad(),  # whatever hook calls
            epoch_bar(f"{what}: {title}", self.recipe.epochs, shown) as on_epoch,
        ):
            if network.name not in self._evaluations:
                self._evaluations[network.name] = Evaluation(
                    network,
                    self._held_out,
                    self.recipe,
                    self.execution or module.execution,
                    trainer.max_steps // self.every_n_steps + 1,
                    (self.num_networks_intermediate, self.num_networks, *[self._draws] * self.compare_random),
                    process_of(trainer),
                )
            evaluation = self._evaluations[network.name]
            result = evaluation(images, targets, run.student_lr, count, run.seed, on_epoch)
        return EvaluationPoint(module.global_step, network.name, result.accuracies, result.seconds, result.validations)

    def _log(self, module: DistillationModule, step: int) -> dict[str, Tensor]:
        """Log a step, and return its metrics by the names that they can be monitored by."""
        trainer, inner_loop = module.trainer, module.distillation.inner_loop
        values = self.curve.scalars(step, self.curve_names)
        log_scalars(trainer, values, step)
        if inner_loop is not None and step % inner_loop == 0:
            log_scalars(trainer, {f"outer/{name}": value for name, value in values.items()}, step // inner_loop)
        # for ModelCheckpoint(monitor=...) and EarlyStopping, which read the Trainer's metrics
        metrics = {name: torch.tensor(value) for name, value in values.items()}
        metrics |= {_without_slashes(name): value for name, value in metrics.items() if name.startswith("accuracy/")}
        trainer.callback_metrics.update(metrics)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Return the curve."""
        return self.curve.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the curve."""
        self.curve.load_state_dict(state_dict)


def _evaluations(trainer: Trainer) -> list[EvalCallback]:
    return [callback for callback in trainer.callbacks if isinstance(callback, EvalCallback)]  # type: ignore[attr-defined]


def _without_slashes(metric: str) -> str:
    return metric.replace("/", "_")
