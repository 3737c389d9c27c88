"""A network as a function of one flat parameter vector."""

from copy import copy, deepcopy
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call, replace_all_batch_norm_modules_
from torch.nn.modules.batchnorm import _BatchNorm

from dd_lightning.execution.precision import Parameters, Precision, in_precision
from dd_lightning.functional.errors import InputError
from dd_lightning.functional.losses import classification_loss
from dd_lightning.functional.products import Loss
from dd_lightning.networks.registry import NetworkSpec, build_network, is_import_path, network_name

RUNNING = ("running_mean", "running_var")  # what torch's batch norms call their running statistics


class FunctionalNetwork:
    """A network without weights of its own: a pure function of a flat parameter vector ``[P]`` and images.

    The vector decides the precision: float64 vector and images give a float64 network. Calls work under `torch.func`'s
    ``grad``, ``jvp`` and ``vmap``, and plain autograd.

    A call normalizes by the statistics of the batch where the network has batch norm, as students and matching do.
    Networks that are trained and then tested carry running statistics beside theta, a vector ``[S]`` that
    :meth:`training_pass` takes and returns and :meth:`test_pass` uses.

    NOTE: Modules are in evaluation mode, so dropout is off, and what a module writes into its other buffers during a
    call is dropped. Batch norm of ``momentum=None``, torch's cumulative average, has momentum 0.1 here.

    Args:
        spec: A network's name, the import path of a factory, or a factory.
        image_shape: ``(channels, H, W)``.
        num_classes: Number of logits.

    Attributes:
        name: The network's name (see `network_name`).
        parameter_names: In the vector's order, like ``parameter_shapes``.
        num_parameters: P.
        num_statistics: S, the running means and variances of all batch norms.
        vmappable: Whether vectors can go through `torch.func.vmap`: not where code may write into buffers.
        uses_batch_statistics: Whether it has batch norm: a batch then cannot be computed in pieces.

    Raises:
        InputError: If the network cannot be built.

    Example:
        >>> network = FunctionalNetwork("ConvNet-1-W8", image_shape=(1, 8, 8), num_classes=10)
        >>> network(network.initial(seed=0), torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, spec: NetworkSpec, image_shape: tuple[int, int, int], num_classes: int) -> None:
        self.name = network_name(spec)
        self.image_shape = image_shape
        self.num_classes = num_classes
        self._spec = spec
        self._precision: Precision = "float32"
        template = self._build(seed=0)
        named = dict(template.named_parameters())
        self.parameter_names: tuple[str, ...] = tuple(named)
        self.parameter_shapes: tuple[tuple[int, ...], ...] = tuple(tuple(p.shape) for p in named.values())
        self._lengths = [parameter.numel() for parameter in named.values()]
        self.num_parameters = sum(self._lengths)

        # the base of every batch norm; torch has no public name for it
        norms = {name: module for name, module in template.named_modules() if isinstance(module, _BatchNorm)}
        self.uses_batch_statistics = bool(norms)
        self._tracking = {name: norm.num_features for name, norm in norms.items() if norm.track_running_stats}
        self.num_statistics = 2 * sum(self._tracking.values())
        replace_all_batch_norm_modules_(template)
        for name in self._tracking:
            norms[name].register_buffer("collected_mean", None)
            norms[name].register_buffer("collected_var", None)
            norms[name].register_forward_pre_hook(_collect)
        self._template = template.eval().requires_grad_(False)
        self.vmappable = not any(True for _ in template.buffers())
        if not isinstance(spec, str) or is_import_path(spec):
            self._check_logits()
        self._body: nn.Module | None = None
        if isinstance(getattr(template, "classifier", None), nn.Module):
            self._body = deepcopy(template)
            self._body.classifier = nn.Identity()

    def __call__(self, theta: Parameters, images: Tensor) -> Tensor:
        """Return the logits ``[B, num_classes]`` of images ``[B, C, H, W]``.

        Theta is ``[P]`` (else an `InputError`), on the images' device and of their dtype, or its parts.
        """
        return self._run(self._template, theta, images, {})

    def initial_statistics(self) -> Tensor:
        """Return the running statistics ``[S]`` of an untrained network: means 0, variances 1."""
        parts = [torch.tensor([0.0, 1.0]).repeat_interleave(features) for features in self._tracking.values()]
        return torch.cat([torch.zeros(0), *parts])

    def training_pass(self, theta: Parameters, statistics: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits, normalized by the batch, and the running statistics moved towards the batch's.

        They move as torch's do: by each norm's momentum (0.1 unless it says otherwise), with the unbiased variance.
        Logits are ``[B, num_classes]``, statistics ``[S]`` without a graph; none, ``[0]``, come back as they are.
        """
        collected = self._named(statistics, "collected")
        logits = self._run(self._template, theta, images, collected)
        return logits, torch.cat([statistics[:0], *collected.values()])

    def test_pass(self, theta: Parameters, statistics: Tensor, images: Tensor) -> Tensor:
        """Return the logits ``[B, num_classes]``, normalized by statistics ``[S]``; by the batch's if none."""
        return self._run(self._template, theta, images, self._named(statistics, "running"))

    def features(self, theta: Parameters, images: Tensor) -> Tensor:
        """Return what the layer ``classifier`` is given, flattened to ``[B, F]``; an `InputError` if there is none."""
        return self._run(self.check_features(), theta, images, {}).flatten(1)

    def check_features(self) -> nn.Module:
        """Return the network without its ``classifier``; an `InputError` if it has none."""
        if self._body is None:
            raise InputError(f"network {self.name!r} has no features: name its last layer 'classifier'")
        return self._body

    def classify(self, theta: Parameters, features: Tensor) -> Tensor:
        """Return the logits ``[B, num_classes]`` of :meth:`features` ``[B, F]``; an `InputError` if there are none."""
        self.check_features()
        classifier, prefix = self._template.get_submodule("classifier"), "classifier."

        def classified(theta: Parameters, features: Tensor) -> Tensor:
            state = self._state(self._template, theta)
            own = {name.removeprefix(prefix): part for name, part in state.items() if name.startswith(prefix)}
            logits: Tensor = functional_call(classifier, own, (features,))
            return logits

        return in_precision(classified, self._precision)(theta, features)

    def in_precision(self, precision: Precision) -> Self:
        """Return the network with layers that compute in ``precision``; what goes in and comes out stays as it is."""
        twin = copy(self)
        twin._precision = precision
        return twin

    def check_pieces(self, micro_batch: int | None, batch: int) -> None:
        """Raise `InputError` if batch norm forbids pieces of at most ``micro_batch`` images of a batch; None: whole."""
        if micro_batch is not None and micro_batch < batch and self.uses_batch_statistics:
            raise InputError(
                f"micro_batch is {micro_batch}, but network {self.name!r} has batch norm, which needs all {batch} "
                "images of a batch at once; set execution.micro_batch: null, or use another norm"
            )

    def takes(self, batch: int) -> bool:
        """Tell whether a batch of so many images leaves each batch norm several values per channel: a variance."""
        if not self.uses_batch_statistics or batch > 1:
            return True
        try:
            self(torch.zeros(self.num_parameters), torch.zeros(batch, *self.image_shape))
        except ValueError:  # torch's own, before it computes anything
            return False
        return True

    def split(self, theta: Tensor) -> tuple[Tensor, ...]:
        """Return the parameters as views into ``theta [P]`` (else an `InputError`), in their own shapes, in order."""
        if tuple(theta.shape) != (self.num_parameters,):
            raise InputError(
                f"network {self.name!r} needs a vector of {self.num_parameters} parameters, got one of shape "
                f"{tuple(theta.shape)}: was it made for another network, image shape or number of classes?"
            )
        # One split, not a slice each: its backward is one concatenation instead of a [P] vector for each parameter.
        parts = torch.split(theta, self._lengths)
        return tuple(part.view(shape) for part, shape in zip(parts, self.parameter_shapes, strict=True))

    def initial(self, seed: int) -> Tensor:
        """Return the parameters ``[P]``, on the host, of a network built after `torch.manual_seed`, which is undone."""
        return self.flatten(self._build(seed))

    def flatten(self, module: nn.Module) -> Tensor:
        """Return a copy ``[P]``, detached, of the parameters of a module that was built from the same spec.

        Raises:
            InputError: If names or shapes of the parameters differ from this network's.
        """
        named = dict(module.named_parameters())
        if tuple(named) != self.parameter_names:
            odd = sorted(set(named) ^ set(self.parameter_names)) or list(named)
            raise InputError(
                f"the module's parameters are not those of {self.name!r} (first difference: {odd[0]!r}): "
                "build it from the same network name"
            )
        for (name, parameter), shape in zip(named.items(), self.parameter_shapes, strict=True):
            if tuple(parameter.shape) != shape:
                raise InputError(
                    f"the module's {name!r} has shape {tuple(parameter.shape)}, {self.name!r} needs {shape}: "
                    "build it for the same images and classes"
                )
        # Concatenation copies, even a single tensor.
        return torch.cat([parameter.detach().flatten() for parameter in named.values()])

    def to(self, device: torch.device | str) -> Self:
        """Move the network's buffers to a device; return the network."""
        self._template.to(device)
        if self._body is not None:
            self._body.to(device)
        return self

    def _build(self, seed: int) -> nn.Module:
        channels, height, width = self.image_shape
        # Only the host's generator is forked and seeded: `torch.manual_seed` would reseed every accelerator, too.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)
            return build_network(self._spec, channels, self.num_classes, (height, width))

    def _check_logits(self) -> None:
        """Try somebody's own network on two blank images."""
        try:
            with torch.no_grad():
                logits = self(self.flatten(self._template), torch.zeros(2, *self.image_shape))
        except Exception as error:
            line = (str(error).splitlines() or [""])[0]
            raise InputError(
                f"network {self.name!r} does not take images {list(self.image_shape)} ({type(error).__name__}: {line})"
            ) from error
        if not isinstance(logits, Tensor) or logits.shape != (2, self.num_classes):
            gives = list(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise InputError(
                f"network {self.name!r} gives {gives} for 2 images: logits [2, {self.num_classes}] are needed"
            )

    def _run(self, module: nn.Module, theta: Parameters, images: Tensor, statistics: dict[str, Tensor]) -> Tensor:
        """Call a module; the statistics become what it has put in their place."""

        def run(theta: Parameters, images: Tensor) -> Tensor:
            state = self._state(module, theta)
            state |= {
                name: part.to(images.dtype) if name.endswith(RUNNING) else part for name, part in statistics.items()
            }
            output: Tensor = functional_call(module, state, (images,))
            statistics.update((name, state[name]) for name in statistics)
            return output

        return in_precision(run, self._precision)(theta, images)

    def _named(self, statistics: Tensor, kind: str) -> dict[str, Tensor]:
        if not statistics.numel():
            return {}
        lengths = [features for features in self._tracking.values() for _ in range(2)]
        names = [f"{name}.{kind}_{which}".lstrip(".") for name in self._tracking for which in ("mean", "var")]
        return dict(zip(names, statistics.split(lengths), strict=True))

    def _state(self, module: nn.Module, theta: Parameters) -> dict[str, Tensor]:
        """Name the parts that the module has, and copy its buffers in the parameters' precision."""
        parts = self.split(theta) if isinstance(theta, Tensor) else theta
        wanted = {name for name, _ in module.named_parameters()}
        state = {name: part for name, part in zip(self.parameter_names, parts, strict=True) if name in wanted}
        for name, buffer in module.named_buffers():
            state[name] = buffer.to(parts[0].dtype if buffer.is_floating_point() else buffer.dtype, copy=True)
        return state


def _collect(norm: Any, inputs: tuple[Tensor]) -> None:  # noqa: ANN401  (buffers that were registered on it)
    """Move the statistics that a batch norm was given towards those of its batch, as torch does."""
    if norm.collected_mean is None:
        return
    batch, momentum = inputs[0].detach().to(norm.collected_mean.dtype), 0.1 if norm.momentum is None else norm.momentum
    with torch.no_grad():
        var, mean = torch.var_mean(batch, [axis for axis in range(batch.dim()) if axis != 1], correction=1)
        norm.collected_mean = norm.collected_mean.lerp(mean, momentum)
        norm.collected_var = norm.collected_var.lerp(var, momentum)


def training_loss(network: FunctionalNetwork, precision: Precision = "float32") -> Loss:
    """Return the mean cross-entropy of a network as a function of (theta [P], images, targets).

    The layers compute in ``precision``; the cross-entropy stays in that of the parameters.
    """
    logits = in_precision(network, precision)
    return lambda theta, images, targets: classification_loss(logits(theta, images), targets)
