"""Live networks that go on training on the real data between distillation steps."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dd_lightning.execution.compile import Compile, compile_choice, compiles, try_compile
from dd_lightning.execution.compiled_loss import compiled_loss
from dd_lightning.execution.precision import Precision, precision_choice, tensor_float
from dd_lightning.functional.cutmix import cutmix, draw_cutmix, label_logits
from dd_lightning.functional.errors import InputError
from dd_lightning.functional.policies import augment_in_turn
from dd_lightning.functional.products import DifferentiatedLoss, gradient
from dd_lightning.functional.random import StepContext, step_generator
from dd_lightning.networks import training_loss
from dd_lightning.pools.base import Candidate, CandidateKey, CandidatePool, PoolSetup, drawn_apart
from dd_lightning.training.progress import epoch_bar
from dd_lightning.training.recipes import NetworkRecipe

NetworkRefresh = Literal["winner", "candidates", "all", "none"]


@dataclass(frozen=True)
class LiveNetwork(Candidate):
    """A network of the pool as one step finds it."""


@dataclass
class _Member:
    """One place of the pool: the network that lives there now.

    Attributes:
        theta: Its parameters, [P].
        momentum: SGD's buffer, [P]; None before the first step.
        age: Updates since it was born.
        limit: It is re-initialized in place of the update that would bring it to this age.
        births: How many networks have lived here before.
    """

    theta: Tensor
    momentum: Tensor | None
    age: int
    limit: float
    births: int


class NetworkPool(CandidatePool):
    """Networks that are trained on the real data between steps, and re-initialized when they are old.

    With one network, whose age limit is the length of the inner loop, it is IDC's own rule: a fresh network for each
    outer iteration, updated after every inner one. With ``pretrain_epochs`` 1 it is DREAM+'s. The paper's DynaDistill
    wants several and says "after each distilling step, we update the trajectory pool with the latest models", but not
    which and by how much: ``refresh`` makes the choice explicit.

    Args:
        num_networks: Networks in the pool. A selection's ``pool_size`` raises it; the age limits of the first
            generation are then staggered, so that the pool always holds networks of all ages.
        age_limit: Updates after which a network is re-initialized; null never does. 100 is IDC's inner loop.
        refresh: Which networks are updated after a step: the ``winner`` (the one it learned from), all
            ``candidates`` that it scored, ``all`` of the pool, or ``none``.
        pretrain_epochs: Epochs on the real data before a new network joins the pool: 0 in IDC and DREAM, 1 in DREAM+.
        recipe: How the networks are trained, and for how long at each update.
        compile: Compile the gradient of their training. It takes up to a minute before the first step, and the rounding
            is another one. ``auto`` does so on CUDA alone, in runs of at least 50,000 of these gradients, unless the
            Trainer is ``deterministic`` (the compiler may choose other kernels in another process); where it is
            impossible, the run goes on without. A smaller last batch of an epoch is not worth it, and stays as it is.
        precision: What the networks' layers compute in while they are trained: ``float32``; ``tf32``, on CUDA alone; or
            ``bfloat16``. Parameters, their updates and the cross-entropy are in float32.

    Raises:
        InputError: If a number is out of range, or ``compile`` or ``precision`` unknown.

    References:
        Kim et al., Dataset Condensation via Efficient Synthetic-Data Parameterization, https://arxiv.org/abs/2205.14959.
    """

    gives: ClassVar[type[Candidate]] = LiveNetwork
    same_in_every_process: ClassVar[bool] = False

    def __init__(
        self,
        num_networks: int = 1,
        age_limit: int | None = 100,
        refresh: NetworkRefresh = "winner",
        pretrain_epochs: int = 0,
        recipe: NetworkRecipe = NetworkRecipe(),  # noqa: B008  (frozen)
        compile: Compile | bool = "off",
        precision: Precision = "float32",
    ) -> None:
        super().__init__(num_networks)
        if age_limit is not None and age_limit < 1:
            raise InputError(f"age_limit is {age_limit}; a network lives for at least 1 step, or use null for no limit")
        if pretrain_epochs < 0:
            raise InputError(f"pretrain_epochs is {pretrain_epochs}; it must be at least 0")
        self.age_limit = age_limit
        self.refresh_rule: NetworkRefresh = refresh
        self.pretrain_epochs = pretrain_epochs
        self.recipe = recipe
        self.policy = recipe.policy_of_augmentation()
        self.compile = compile_choice(compile)
        self.precision = precision_choice(precision)
        self._compiled: DifferentiatedLoss | None = None
        self.batches_drawn = 0
        self._members: list[_Member] = []
        self._setup: PoolSetup | None = None
        self._epoch: tuple[int, int, list[Tensor]] | None = None

    def prepare(self, setup: PoolSetup) -> None:
        """Take note of network and data; the networks are made when the first one is asked for, or loaded.

        Their training is compiled now, if that was asked for or repays itself.
        """
        self._setup, self._compiled = setup, None
        updated = {"winner": 1, "none": 0}.get(self.refresh_rule, self.size)
        if compiles(self.compile, setup.device, setup.steps * updated * self.recipe.steps_per_update):
            setup.say("compiling the training of the pool's networks: it may take a minute")
            what = "the training of the pool's networks"
            self._compiled = try_compile(self._warmed_up, self.compile, what, "pool.compile")

    def draw(self, count: int, context: StepContext, exclude: Sequence[CandidateKey] = ()) -> list[CandidateKey]:
        """Draw distinct networks uniformly."""
        self._populate(context.seed)
        return [(i,) for i in drawn_apart(self.size, count, context.generator("candidates"), exclude)]

    def generation(self, key: CandidateKey) -> int:
        """Return how many networks have lived at a place before the one that is there now."""
        return self._members[key[0]].births

    def load(self, key: CandidateKey) -> LiveNetwork:
        """Return the network that lives at a place."""
        return LiveNetwork(key, self._members[key[0]].theta)

    def refresh(self, winner: CandidateKey, drawn: Sequence[CandidateKey], context: StepContext) -> None:
        """Train the networks that the rule names, re-initializing those that are old."""
        chosen = {"winner": [winner], "candidates": drawn, "all": [(i,) for i in range(self.size)], "none": []}
        for (index,) in chosen[self.refresh_rule]:
            member = self._members[index]
            if member.age + 1 >= member.limit:
                self._members[index] = self._born(index, context.seed, member.births + 1, self._limit)
            else:
                self._train(member, self._next_batches(context.seed))
                member.age += 1

    def feature_parameters(self) -> Tensor:
        """Return the first network's parameters, [P]."""
        self._populate(self._ready.seed)
        return self._members[0].theta

    def scalars(self) -> dict[str, float]:
        """Return the networks' mean age in updates, and how many were re-initialized."""
        members = self._members
        return {
            "pool/mean_age": sum(m.age for m in members) / len(members),
            "pool/reinitialized": float(sum(m.births for m in members)),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the networks with their optimizers' states and ages."""
        members = self._members
        return {
            "thetas": [m.theta for m in members],
            "momenta": [m.momentum for m in members],
            "ages": [m.age for m in members],
            "limits": [m.limit for m in members],
            "births": [m.births for m in members],
            "batches_drawn": self.batches_drawn,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the networks."""
        if self._setup is not None and len(state["thetas"]) not in (0, self.size):
            raise InputError(
                f"the pool holds {self.size} networks, but the checkpoint's run has {len(state['thetas'])}; resume "
                "with the configuration that the run was started with"
            )
        device = self._setup.device if self._setup is not None else torch.device("cpu")
        self._members = [
            _Member(theta.to(device), None if momentum is None else momentum.to(device), age, limit, births)
            for theta, momentum, age, limit, births in zip(
                *(state[name] for name in ("thetas", "momenta", "ages", "limits", "births")), strict=True
            )
        ]
        self.size = len(self._members) or self.size
        self.batches_drawn = state["batches_drawn"]

    @property
    def _compiled_batch(self) -> int:
        """Images of the batches that compiled code is for: all but the last one of an epoch."""
        return min(self.recipe.batch_size, len(self._ready.real))

    def _warmed_up(self) -> DifferentiatedLoss:
        """Train on one batch, which compiles all that the run will need."""
        network, device, size = self._ready.network, self._ready.device, self._compiled_batch
        images, labels = self._ready.real.images[:size].to(device), self._ready.real.labels[:size].to(device)
        loss = compiled_loss(training_loss(network, self.precision))
        with tensor_float(self.precision, device):
            loss.gradient(network.initial(0).to(images), images, self._compiled_targets(images, labels))
        return loss

    def _compiled_targets(self, images: Tensor, targets: Tensor) -> Tensor:
        """Return targets of one kind, whether or not CutMix has mixed a batch: compiled code is for one kind."""
        return label_logits(targets, self._ready.network.num_classes, images.dtype) if self.recipe.cutmix else targets

    def _gradient(self, theta: Tensor, images: Tensor, targets: Tensor) -> Tensor:
        """Return the gradient of the networks' training, by compiled code where there is any."""
        if self._compiled is not None and len(images) == self._compiled_batch:
            return self._compiled.gradient(theta, images, self._compiled_targets(images, targets))
        return gradient(training_loss(self._ready.network, self.precision), theta, images, targets)

    @property
    def _ready(self) -> PoolSetup:
        if self._setup is None:
            raise RuntimeError("NetworkPool.prepare has not been called")
        return self._setup

    @property
    def _limit(self) -> float:
        return float("inf") if self.age_limit is None else self.age_limit

    def _populate(self, seed: int) -> None:
        """Make what the first generation lacks: all of it, unless it was made already or came from a checkpoint."""
        for index in range(len(self._members), self.size):
            # Limits of a first generation of N: 1/N, 2/N, ... of the age limit.
            self._members.append(self._born(index, seed, 0, self._limit * (index + 1) / self.size))

    def _born(self, index: int, seed: int, births: int, limit: float) -> _Member:
        network, real, device = self._ready.network, self._ready.real, self._ready.device
        initial = step_generator(seed, births, f"network-{index}/initial").initial_seed()
        member = _Member(network.initial(initial).to(device), None, 0, limit, births)
        draws, size = step_generator(seed, births, f"network-{index}/pretrain"), self.recipe.batch_size
        batches = ((rows, draws) for _ in range(self.pretrain_epochs) for rows in real.shuffled_batches(size, draws))
        shown = self.pretrain_epochs > 0 and self._ready.progress_bar
        steps = self.pretrain_epochs * -(-len(real) // size)
        with epoch_bar(f"pretraining network {index + 1} of {self.size}", steps, shown) as on_step:
            self._train(member, batches, on_step)
        return member

    def _next_batches(self, seed: int) -> Iterator[tuple[Tensor, torch.Generator]]:
        """Go on through the real data where the last update has stopped, as IDC's persistent loader does."""
        real, size = self._ready.real, self.recipe.batch_size
        per_epoch = -(-len(real) // size)
        for _ in range(self.recipe.steps_per_update):
            epoch, position = divmod(self.batches_drawn, per_epoch)
            if self._epoch is None or self._epoch[:2] != (seed, epoch):
                order = step_generator(seed, epoch, "pool/order")
                self._epoch = (seed, epoch, list(real.shuffled_batches(size, order)))
            yield self._epoch[2][position], step_generator(seed, self.batches_drawn, "pool/augment")
            self.batches_drawn += 1

    def _train(
        self,
        member: _Member,
        batches: Iterable[tuple[Tensor, torch.Generator]],
        on_step: Callable[[int], None] | None = None,
    ) -> None:
        """Take one step of SGD for each batch, on copies: what a step was handed stays as it was."""
        real, recipe = self._ready.real, self.recipe
        theta = member.theta.clone()
        sgd = torch.optim.SGD([theta], recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
        if member.momentum is not None:
            sgd.state[theta]["momentum_buffer"] = member.momentum.clone()
        for step, (rows, generator) in enumerate(batches):
            draws = self.policy.draw(generator, len(rows), real.image_shape[-2:])
            images, targets = augment_in_turn(real.images[rows], draws), real.labels[rows]
            mix = draw_cutmix(generator, len(rows), real.image_shape[-2:], recipe.cutmix)
            if mix is not None:
                images, targets = cutmix(images, targets, mix, real.num_classes)
            with tensor_float(self.precision, images.device):
                theta.grad = self._gradient(theta, images, targets)
            sgd.step()
            if on_step is not None:
                on_step(step + 1)
        member.theta, member.momentum = theta.detach(), sgd.state[theta].get("momentum_buffer")
