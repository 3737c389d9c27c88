"""Classifiers of torchvision and timm by name, without their pretrained weights."""

import importlib
import math
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dd_lightning.functional.errors import InputError
from dd_lightning.networks.registry import NetworkFactory, register_family

Result = TypeVar("Result")


class ZooNetwork(nn.Module):
    """A package's model, split into a body and the linear layer at its end, for images of any number of channels.

    The model's own initialization stays. A first convolution that cannot read the images, or is replaced by a smaller
    one, gets normal weights, scaled so that its output keeps the variance of the model's own initialization. No module
    works in place, and attention is computed by its definition: second derivatives need both.

    NOTE: torch has no second derivative of some activations, such as the hard sigmoid of ``mobilenet_v3_small``:
        such models can evaluate a synthetic set, but gradients cannot be matched through them.

    Args:
        name: The network's name, for messages.
        builder: Builds the model; it may ignore the channels.
        channels: Channels of the images.
        num_classes: Number of logits.
        image_size: ``(H, W)`` of the images.
        small: Replace a 7 x 7 convolution of stride 2 at the start by a 3 x 3 one of stride 1, without the max pooling
            behind it.

    Raises:
        InputError: If the model does not take images of this size, end in a linear layer, or start as ``small`` needs.
    """

    def __init__(
        self,
        name: str,
        builder: NetworkFactory,
        channels: int,
        num_classes: int,
        image_size: tuple[int, int],
        small: bool = False,
    ) -> None:
        super().__init__()
        self.body = _tried(name, image_size, lambda: builder(channels, num_classes, image_size))
        module: Any
        for module in self.body.modules():
            if hasattr(module, "inplace"):
                module.inplace = False
        if small:
            _shrink_stem(name, self.body)
        _adapt_channels(name, self.body, channels)

        path, self.classifier = _last_linear(name, self.body, num_classes)
        images = torch.ones(1, channels, *image_size)
        logits = _tried(name, image_size, lambda: _evaluated(self.body, images))
        self.body.set_submodule(path, nn.Identity())
        features = _tried(name, image_size, lambda: _evaluated(self.body, images))
        # What the layer stands last in need not be what the model computes last.
        fits = features.shape == (1, self.classifier.in_features)
        if not fits or not torch.allclose(self.classifier(features), logits):
            raise InputError(f"network {name!r} computes more after its last linear layer: use a model that does not")

    def forward(self, images: Tensor) -> Tensor:
        """Map ``images [B, channels, H, W]`` to logits ``[B, num_classes]``."""
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            logits: Tensor = self.classifier(self.body(images))
        return logits


def _tried(name: str, image_size: tuple[int, int], action: Callable[[], Result]) -> Result:
    """Return the action's result; whatever a package raises for an image size becomes one line."""
    try:
        return action()
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"network {name!r} does not take images of {image_size[0]} x {image_size[1]} ({reason}): "
            "use larger images or a network for small ones, such as ResNet-10"
        ) from error


@torch.no_grad()
def _evaluated(model: nn.Module, images: Tensor) -> Tensor:
    """Run a model in evaluation mode, where it draws nothing and keeps its statistics, and put the mode back."""
    model.eval()
    output = model(images)
    model.train()
    if not isinstance(output, Tensor):
        raise TypeError(f"it returns a {type(output).__name__}, not logits")
    return output


def _last_linear(name: str, model: nn.Module, num_classes: int) -> tuple[str, nn.Linear]:
    owners = [owner for owner in model.named_modules() if any(True for _ in owner[1].parameters(recurse=False))]
    path, last = owners[-1] if owners else ("", model)
    if not path or not isinstance(last, nn.Linear) or last.out_features != num_classes:
        raise InputError(
            f"network {name!r} ends in a {type(last).__name__}, not in a linear layer of {num_classes} logits: "
            "use a model that does"
        )
    return path, last


def _shrink_stem(name: str, model: nn.Module) -> None:
    kinds = (nn.Conv2d, nn.MaxPool2d, nn.Linear)
    layers = iter([(path, module) for path, module in model.named_modules() if isinstance(module, kinds)])
    conv = next((module for _, module in layers if isinstance(module, nn.Conv2d)), None)
    path, pooling = next(layers, ("", None))  # what follows it
    wide = conv is not None and (conv.kernel_size, conv.stride) == ((7, 7), (2, 2))
    if conv is None or not wide or not isinstance(pooling, nn.MaxPool2d):
        raise InputError(
            f"network {name!r} does not start with a 7 x 7 convolution of stride 2 and a max pooling: leave out /small"
        )
    model.set_submodule(path, nn.Identity())
    _renew(conv, conv.in_channels, 3)
    conv.kernel_size, conv.stride, conv.padding = (3, 3), (1, 1), (1, 1)


def _adapt_channels(name: str, model: nn.Module, channels: int) -> None:
    conv = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if conv is None or conv.groups != 1:
        raise InputError(f"network {name!r} does not start with a plain convolution: use a model that does")
    if conv.in_channels != channels:
        _renew(conv, channels, conv.kernel_size[0])
        conv.in_channels = channels


def _renew(conv: nn.Conv2d, channels: int, kernel: int) -> None:
    old = conv.weight.detach()
    new = torch.empty(conv.out_channels, channels, kernel, kernel)
    deviation = old.std().item() * math.sqrt(old[0].numel() / new[0].numel())
    conv.weight = nn.Parameter(new.normal_(std=deviation))


def _torchvision_builder(name: str, model: str) -> NetworkFactory:
    models = importlib.import_module("torchvision.models")  # here, since it takes as long as all else together
    _check_known(name, model, models.list_models(module=models), "torchvision.models")

    def build(channels: int, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
        options: dict[str, Any] = {}
        if model.startswith("vit_"):
            if image_size[0] != image_size[1]:
                raise ValueError("its images must be square")
            options["image_size"] = image_size[0]
        elif model.startswith("maxvit_"):
            options["input_size"] = image_size
        elif model in {"googlenet", "inception_v3"}:
            # In training they would return the logits of their auxiliary classifiers beside their own.
            options = {"aux_logits": False, "init_weights": True}
        network: nn.Module = models.get_model(model, weights=None, num_classes=num_classes, **options)
        return network

    return build


def _timm_builder(name: str, model: str) -> NetworkFactory:
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise InputError(f"network {name!r} needs a package that is not installed: pip install timm") from error
    _check_known(name, model, timm.list_models(), "timm")

    def build(channels: int, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
        create = partial(timm.create_model, model, pretrained=False, num_classes=num_classes, in_chans=channels)
        network: nn.Module
        try:
            network = create(img_size=image_size)
        except TypeError:  # models without positions take images of any size, and no such option
            network = create()
        return network

    return build


def _check_known(name: str, model: str, known: Sequence[str], package: str) -> None:
    if model not in known:
        close = get_close_matches(model, known)
        hint = f"did you mean {' or '.join(close)}?" if close else f"see {package}.list_models()"
        raise InputError(f"network {name!r} names the unknown model {model!r}: {hint}")


def _parse(package: str, get: Callable[[str, str], NetworkFactory], parts: Sequence[str]) -> tuple[str, NetworkFactory]:
    name = "/".join([package, *parts])
    if len(parts) > 2 or parts[1:] not in ([], ["small"]):
        raise InputError(f"network {name!r} is not understood: the form is {package}/<model>[/small]")
    builder = get(name, parts[0])

    def build(channels: int, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
        return ZooNetwork(name, builder, channels, num_classes, image_size, small=len(parts) == 2)

    return name, build


_BUILDERS = {"torchvision": _torchvision_builder, "timm": _timm_builder}
for _package, _find in _BUILDERS.items():
    register_family(f"{_package}/", f"{_package}/<model>[/small]", partial(_parse, _package, _find))
