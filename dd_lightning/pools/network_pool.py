"""Live networks that go on training on the real data between distillation steps."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dd_lightning.execution.options import Execution
from dd_lightning.functional.errors import InputError, check_range
from dd_lightning.functional.random import StepContext, step_generator
from dd_lightning.pools.base import Candidate, CandidateKey, CandidatePool, PoolSetup, drawn_apart
from dd_lightning.training.parallel_networks import ParallelTraining, Passes, check_batches, piece_of
from dd_lightning.training.progress import epoch_bar
from dd_lightning.training.recipes import NetworkRecipe

NetworkRefresh = Literal["winner", "candidates", "all", "none"]


@dataclass(frozen=True)
class LiveNetwork(Candidate):
    """A network of the pool as one step finds it; its key is (place, networks that have lived there before)."""


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

    def to(self, device: torch.device) -> "_Member":
        momentum = None if self.momentum is None else self.momentum.to(device)
        return replace(self, theta=self.theta.to(device), momentum=momentum)


@dataclass(eq=False)
class NetworkPool(CandidatePool):
    """Networks that are trained on the real data between steps, and re-initialized when they are old.

    One network whose age limit is the length of the inner loop is IDC's own rule: a fresh network for each outer
    iteration, updated after every inner one; with ``pretrain_epochs`` 1, DREAM+'s. DynaDistill wants several: the paper
    says "after each distilling step, we update the trajectory pool with the latest models", but not which and by how
    much. ``refresh`` makes the choice explicit.

    Args:
        num_networks: Networks in the pool. A selection's ``pool_size`` raises it; the age limits of the first
            generation are then staggered, so that the pool always holds networks of all ages.
        age_limit: Updates after which a network is re-initialized; null never does. 100 is IDC's inner loop.
        refresh: Which networks are updated after a step: the ``winner`` (the one it learned from), all
            ``candidates`` that it scored, ``all`` of the pool, or ``none``.
        pretrain_epochs: Epochs on the real data before a new network joins the pool: 0 in IDC and DREAM, 1 in DREAM+.
        recipe: How the networks are trained, and for how long at each update.
        execution: How their training is computed; null is as the run (``model.execution``). ``micro_batch: auto`` cuts
            no batch here. The smaller last batch of an epoch is not worth compiling and stays eager.

    Raises:
        InputError: If a number is out of range.

    References:
        Kim et al., Dataset Condensation via Efficient Synthetic-Data Parameterization, https://arxiv.org/abs/2205.14959.
    """

    candidate_type: ClassVar[type[Candidate]] = LiveNetwork

    num_networks: int = 1
    age_limit: int | None = 100
    refresh: NetworkRefresh = "winner"
    pretrain_epochs: int = 0
    recipe: NetworkRecipe = field(default_factory=NetworkRecipe)
    execution: Execution | None = None

    def __post_init__(self) -> None:
        check_range("num_networks", self.num_networks, low=1)
        check_range("age_limit", self.age_limit, low=1, hint="null for no limit")
        check_range("pretrain_epochs", self.pretrain_epochs, low=0)
        self.batches_drawn = 0
        self._size = self.num_networks
        self._members: list[_Member] = []
        self._prepared: tuple[PoolSetup, Passes] | None = None
        self._epoch: tuple[int, int, list[Tensor]] | None = None

    def __len__(self) -> int:
        return self._size

    def __contains__(self, key: CandidateKey) -> bool:  # not if its network was re-initialized
        return key[0] < len(self._members) and self._members[key[0]].births == key[1]

    def prepare(self, setup: PoolSetup) -> None:
        """Compile what is to be compiled; the networks are made when the first one is asked for, or loaded."""
        if setup.soft_labels:
            raise InputError(
                "labels is 'soft' for logits of experts, but NetworkPool holds no trained experts to take them from; "
                "use labels: hard"
            )
        if not setup.continues:
            self._members, self.batches_drawn = [], 0
        self._members = [member.to(setup.real.images.device) for member in self._members]
        self._size, self._epoch = max(self.num_networks, setup.size, len(self._members)), None
        recipe, real, execution = self.recipe, setup.real, self.execution or setup.execution
        batch = min(recipe.batch_size, len(real))
        cut = None if execution.micro_batch == "auto" else execution.micro_batch
        piece = piece_of(setup.network, cut, batch, real.images.device.type, execution.precision)
        check_batches(setup.network, len(real), recipe.batch_size)
        passes = Passes(setup.network, precision=execution.precision, piece=piece)
        updated = {"winner": 1, "none": 0}.get(self.refresh, self._size)
        calls = setup.steps * updated * recipe.steps_per_update
        data = real.images[:batch], recipe.targets(real.labels[:batch], real.num_classes, real.images.dtype)
        what = "the training of the pool's networks"
        passes.compile(execution.compile, calls, data, batch, (1,), what, setup.progress_bar)
        self._prepared = setup, passes

    def draw(self, count: int, context: StepContext, exclude: Sequence[CandidateKey] = ()) -> list[CandidateKey]:
        """Draw distinct networks uniformly."""
        self._populate(context.seed)
        places = drawn_apart(len(self), count, context.generator("candidates"), exclude)
        return [(place, self._members[place].births) for place in places]

    def load(self, key: CandidateKey) -> LiveNetwork:
        """Return the network that lives in a place now."""
        member = self._members[key[0]]
        return LiveNetwork((key[0], member.births), member.theta)

    def update(self, winner: CandidateKey, drawn: Sequence[CandidateKey], context: StepContext) -> None:
        """Train the networks that the rule names, re-initializing those that are old.

        Several processes share the networks, and tell each other what has become of them.
        """
        everyone: list[CandidateKey] = [(place,) for place in range(len(self))]
        chosen = {"winner": [winner], "candidates": drawn, "all": everyone, "none": []}[self.refresh]
        process = self._ready[0].process
        owners = [number % process.size for number in range(len(chosen))]
        for (place, *_), owner in zip(chosen, owners, strict=True):
            member, here = self._members[place], owner == process.rank
            if member.age + 1 >= member.limit:
                self._members[place] = self._born(place, context.seed, member.births + 1, self._limit, here)
            else:
                batches = list(self._next_batches(context.seed))
                if here:
                    self._train(member, batches)
                member.age += 1
        for (place, *_), owner in zip(chosen, owners, strict=True):
            self._tell(self._members[place], owner)

    def networks(self) -> Iterator[Tensor]:
        """Yield the networks' parameters, [P]."""
        self._populate(self._ready[0].seed)
        yield from (member.theta for member in self._members)

    def scalars(self) -> dict[str, float]:
        """Return the networks' mean age in updates, and how many were re-initialized."""
        members = self._members
        return {
            "pool/mean_age": sum(m.age for m in members) / len(members),
            "pool/reinitialized": float(sum(m.births for m in members)),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the networks with their optimizers' states and ages."""
        names = {"thetas": "theta", "momenta": "momentum", "ages": "age", "limits": "limit", "births": "births"}
        lists = {plural: [getattr(member, name) for member in self._members] for plural, name in names.items()}
        return lists | {"batches_drawn": self.batches_drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the networks."""
        if self._prepared is not None and len(state["thetas"]) not in (0, len(self)):
            raise InputError(
                f"the pool holds {len(self)} networks, but the checkpoint's run has {len(state['thetas'])}; resume "
                "with the configuration that the run was started with"
            )
        device = torch.device("cpu") if self._prepared is None else self._prepared[0].real.images.device
        columns = (state[name] for name in ("thetas", "momenta", "ages", "limits", "births"))
        self._members = [_Member(*row).to(device) for row in zip(*columns, strict=True)]
        self._size = len(self._members) or self._size
        self.batches_drawn = state["batches_drawn"]

    @property
    def _ready(self) -> tuple[PoolSetup, Passes]:
        if self._prepared is None:
            raise RuntimeError("NetworkPool.prepare has not been called")
        return self._prepared

    @property
    def _limit(self) -> float:
        return float("inf") if self.age_limit is None else self.age_limit

    def _populate(self, seed: int) -> None:
        """Make what the first generation lacks: all of it, unless it was made already or came from a checkpoint."""
        process, missing = self._ready[0].process, range(len(self._members), len(self))
        for index in missing:
            # Limits of a first generation of N: 1/N, 2/N, ... of the age limit.
            limit = self._limit * (index + 1) / len(self)
            self._members.append(self._born(index, seed, 0, limit, index % process.size == process.rank))
        for index in missing:
            self._tell(self._members[index], index % process.size)

    def _tell(self, member: _Member, owner: int) -> None:
        """Give all processes the network that one of them has trained."""
        process = self._ready[0].process
        if process.size > 1:
            member.theta = process.broadcast(member.theta, owner)
            if process.broadcast(member.momentum is not None, owner):
                buffer = torch.zeros_like(member.theta) if member.momentum is None else member.momentum
                member.momentum = process.broadcast(buffer, owner)

    def _born(self, index: int, seed: int, births: int, limit: float, here: bool) -> _Member:
        """Make a network; it is pretrained ``here``, or by another process."""
        setup, _ = self._ready
        real = setup.real
        initial = step_generator(seed, births, f"network-{index}/initial").initial_seed()
        member = _Member(setup.network.initial(initial).to(real.images.device), None, 0, limit, births)
        draws, size = step_generator(seed, births, f"network-{index}/pretrain"), self.recipe.batch_size
        batches = ((rows, draws) for _ in range(self.pretrain_epochs) for rows in real.shuffled_batches(size, draws))
        if not here or self.pretrain_epochs == 0:
            return member
        steps = self.pretrain_epochs * -(-len(real) // size)
        with epoch_bar(f"pretraining network {index + 1} of {len(self)}", steps, setup.progress_bar) as on_step:
            self._train(member, batches, on_step)
        return member

    def _next_batches(self, seed: int) -> Iterator[tuple[Tensor, torch.Generator]]:
        """Go on through the real data where the last update has stopped, as IDC's persistent loader does."""
        real, size = self._ready[0].real, self.recipe.batch_size
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
        on_step: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Take one step of SGD for each batch, on copies: what a step was handed stays as it was."""
        (setup, passes), recipe = self._ready, self.recipe
        real = setup.real
        training = ParallelTraining(passes, [member.theta], recipe.lr, recipe, [member.momentum])
        for step, (rows, generator) in enumerate(batches):
            images, targets = recipe.augment(real.images[rows], real.labels[rows], real.num_classes, generator)
            if passes.is_compiled:  # for targets of one kind, mixed or not
                targets = recipe.targets(targets, real.num_classes, images.dtype)
            training.step([images], [targets])
            on_step(step + 1)
        (member.theta,), (member.momentum,) = training.thetas, training.momenta
