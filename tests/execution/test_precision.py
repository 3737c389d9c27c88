"""What lower precision touches, and what it leaves alone."""

from typing import get_args

import pytest
import torch
from torch import Tensor

from dd_lightning.execution.precision import Parameters, Precision, in_precision, tensor_float
from dd_lightning.functional.products import gradient_products
from dd_lightning.networks import FunctionalNetwork, training_loss


def test_only_the_layers_compute_in_bfloat16() -> None:
    network = FunctionalNetwork("ConvNet-2-W8", (3, 8, 8), 4)
    seen: list[torch.dtype] = []

    def watched(theta: Parameters, images: Tensor) -> Tensor:
        assert isinstance(theta, Tensor)
        seen.extend((theta.dtype, images.dtype))
        return network(theta, images)

    theta, images = network.initial(0), torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    logits = in_precision(watched, "bfloat16")(theta, images)
    assert seen == [torch.bfloat16] * 2
    assert logits.dtype == torch.float32
    assert torch.equal(logits, network(theta.bfloat16(), images.bfloat16()).float())
    parts = in_precision(network, "bfloat16")(network.split(theta), images)
    assert torch.equal(parts, logits)
    assert in_precision(network, "float32") is in_precision(network, "tf32") is network


def test_derivatives_are_float32_and_near_the_exact_ones() -> None:
    network = FunctionalNetwork("ConvNet-2-W16", (3, 8, 8), 4)
    generator = torch.Generator().manual_seed(0)
    theta, labels = network.initial(0), torch.arange(8) % 4
    images, tangent = torch.randn(8, 3, 8, 8, generator=generator), torch.randn(theta.shape, generator=generator)
    exact = gradient_products(training_loss(network), theta, images, labels, tangent)
    rounded = gradient_products(training_loss(network, "bfloat16"), theta, images, labels, tangent)
    for value, reference in zip(rounded[:3], exact[:3], strict=True):
        assert value is not None
        assert reference is not None
        assert value.dtype == torch.float32
        assert 1e-4 < float(torch.dist(value, reference) / reference.norm()) < 0.1


@pytest.mark.filterwarnings("ignore:precision is .tf32.")
@pytest.mark.parametrize("before", [True, False])
def test_tensor_float_is_put_back(before: bool) -> None:
    def allowed() -> tuple[bool, bool]:
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    default = allowed()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = before
    try:
        for precision in get_args(Precision):
            with tensor_float(precision, torch.device("cuda")):
                assert allowed() == (precision == "tf32",) * 2
            assert allowed() == (before,) * 2
            with tensor_float(precision, torch.device("cpu")):
                assert allowed() == (before,) * 2
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = default
