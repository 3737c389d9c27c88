import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from dd_lightning.functional.errors import InputError
from dd_lightning.networks import ConvNet, FunctionalNetwork, build_network

# torch compiles its forward-mode rules with its own deprecated compiler, at the first use.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script.:FutureWarning")

SHAPE = (2, 8, 8)
NAMES = ["ConvNet-2-W8", "ConvNet-2-W8-GN", "ConvNet-2-W8-BN", "ConvNet-2-W8-LN", "ConvNet-2-W8-NN-MP-LEAKY"]


def tiny(name: str = "ConvNet-2-W8") -> FunctionalNetwork:
    return FunctionalNetwork(name, SHAPE, num_classes=5)


def data(batch: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, *SHAPE, generator=generator, dtype=torch.float64)
    return images, torch.randint(5, (batch,), generator=generator)


def fail(channels: int, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
    torch.rand(3)
    raise RuntimeError("no such luck")


class Shifted(nn.Module):
    """Two of its traits matter here: a buffer that a call writes to, and no part called classifier."""

    calls: Tensor

    def __init__(self, channels: int, num_classes: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.head = nn.Linear(channels * image_size[0] * image_size[1], num_classes, bias=False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        logits: Tensor = self.head(images.flatten(1)) + self.calls
        return logits


def test_names_shapes_and_length() -> None:
    network = FunctionalNetwork("ConvNet-3-AP", (3, 32, 32), 10)
    module = ConvNet(3, 10, (32, 32))
    assert network.name == "ConvNet-3"
    assert network.num_parameters == 320_010
    assert network.parameter_names == tuple(name for name, _ in module.named_parameters())
    assert network.parameter_shapes == tuple(tuple(p.shape) for p in module.parameters())
    assert network.parameter_shapes[0] == (128, 3, 3, 3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_call_equals_the_module(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    module = build_network(name, 2, 5, (8, 8)).to(dtype)
    images = data()[0].to(dtype)
    network = tiny(name)
    logits = network(network.flatten(module), images)
    assert logits.dtype == dtype
    assert torch.equal(logits, module(images))


@pytest.mark.parametrize("name", NAMES)
def test_initial_is_a_construction_after_manual_seed(name: str) -> None:
    network = tiny(name)
    torch.manual_seed(11)
    module = build_network(name, 2, 5, (8, 8))
    expected = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
    assert torch.equal(network.initial(11), expected)
    assert torch.equal(network.initial(11), network.initial(11))
    assert not torch.equal(network.initial(11), network.initial(12))
    assert not network.initial(11).requires_grad


def test_global_random_state_is_put_back() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    network = tiny()
    network.initial(4)
    network(network.initial(4), data()[0].float())
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(InputError, match="no such luck"):
        FunctionalNetwork(fail, SHAPE, 5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("spec", ["ConvNet-1-W8", Shifted])
def test_flatten_copies(spec: str | type[Shifted]) -> None:
    network = FunctionalNetwork(spec, SHAPE, 5)
    module = build_network(spec, 2, 5, (8, 8))
    theta = network.flatten(module)
    kept = theta.clone()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    assert torch.equal(theta, kept)
    assert torch.equal(network.flatten(module), kept + 1)


def test_calls_leave_vector_and_template_alone() -> None:
    network = tiny()
    theta, images = network.initial(0), data()[0].float()
    kept = theta.clone()
    first = network(theta, images)
    network(theta + 1, images)
    assert torch.equal(network(theta, images), first)
    assert torch.equal(theta, kept)


@pytest.mark.parametrize("name", NAMES)
def test_features_are_what_the_classifier_is_given(name: str) -> None:
    network = tiny(name)
    theta, images = network.initial(0).double(), data()[0]
    features = network.features(theta, images)
    assert features.shape == (6, 8 * 2 * 2)
    weight, bias = theta[-5 * 32 - 5 : -5].view(5, 32), theta[-5:]
    torch.testing.assert_close(features @ weight.T + bias, network(theta, images), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_vmap_of_grad_equals_the_loop(name: str) -> None:
    network = tiny(name)
    assert network.vmappable
    images, labels = data()
    thetas = torch.stack([network.initial(seed) for seed in range(3)]).double()

    def loss(theta: Tensor) -> Tensor:
        return F.cross_entropy(network(theta, images), labels)

    batched = torch.func.vmap(torch.func.grad(loss))(thetas)
    for theta, gradient in zip(thetas, batched, strict=True):
        leaf = theta.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(leaf), leaf)
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_forward_over_reverse_equals_double_backward(name: str) -> None:
    network = tiny(name)
    images, labels = data()
    theta = network.initial(0).double()
    direction = torch.randn(len(theta), generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def loss(theta: Tensor, images: Tensor) -> Tensor:
        return F.cross_entropy(network(theta, images), labels)

    def gradients(theta: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        in_theta, in_images = torch.func.grad(loss, argnums=(0, 1))(theta, images)
        return in_theta, in_images

    products = torch.func.jvp(gradients, (theta, images), (direction, torch.zeros_like(images)))[1]
    leaves = (theta.requires_grad_(), images.requires_grad_())
    (gradient,) = torch.autograd.grad(loss(*leaves), leaves[0], create_graph=True)
    expected = torch.autograd.grad(gradient, leaves, direction)
    for product, reference in zip(products, expected, strict=True):
        assert float(reference.abs().max()) > 1e-4
        torch.testing.assert_close(product, reference, rtol=0, atol=1e-10)


def test_gradcheck_in_the_parameters_and_the_images() -> None:
    network = FunctionalNetwork("ConvNet-1-W4-SIGMOID", (1, 4, 4), 3)
    theta = network.initial(0).double().requires_grad_()
    images = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.autograd.gradcheck(network, (theta, images.requires_grad_()))


def test_batch_norm_uses_the_batch_and_remembers_nothing() -> None:
    network = tiny("ConvNet-2-W8-BN")
    theta, images = network.initial(0), data()[0].float()
    first = network(theta, images)
    network(theta, 5 + 3 * images)
    assert torch.equal(network(theta, images), first)
    # It normalizes over the batch: an image's logits depend on the others.
    assert not torch.allclose(network(theta, images[:3]), first[:3], atol=1e-3)


@pytest.mark.parametrize("name", ["ConvNet-2-W8-BN", "torchvision/resnet18"])
def test_running_statistics_are_those_of_the_module(name: str) -> None:
    network = tiny(name)
    module = build_network(name, 2, 5, (8, 8)).double().train()
    theta, statistics = network.flatten(module), network.initial_statistics().double()
    for step in range(3):
        images = data()[0] * (1 + step) + step
        logits, statistics = network.training_pass(theta, statistics, images)
        assert torch.equal(logits, network(theta, images))
        torch.testing.assert_close(logits, module(images), rtol=1e-10, atol=1e-10)
    running = torch.cat([buffer for name, buffer in module.named_buffers() if "running" in name])
    assert len(running) == network.num_statistics
    torch.testing.assert_close(statistics, running, rtol=1e-10, atol=1e-12)
    module.eval()
    images = data()[0]
    torch.testing.assert_close(network.test_pass(theta, statistics, images), module(images), rtol=1e-10, atol=1e-10)
    assert torch.equal(network.test_pass(theta, statistics[:0], images), network(theta, images))


def test_each_norm_has_its_own_momentum_and_may_keep_no_statistics() -> None:
    def build(channels: int, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
        norms = [nn.BatchNorm2d(2, momentum=0.3), nn.BatchNorm2d(2, track_running_stats=False)]
        return nn.Sequential(*norms, nn.Flatten(), nn.BatchNorm1d(128, momentum=None), nn.Linear(128, num_classes))

    network, images = FunctionalNetwork(build, SHAPE, 5), data()[0]
    assert network.num_statistics == 2 * (2 + 128)
    theta = network.initial(0).double()
    statistics = network.training_pass(theta, network.initial_statistics().double(), images)[1]
    first = nn.BatchNorm2d(2, momentum=0.3).double()
    first(images)
    assert first.running_mean is not None
    assert first.running_var is not None
    torch.testing.assert_close(statistics[:2], first.running_mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(statistics[2:4], first.running_var, rtol=1e-12, atol=1e-12)
    assert float(statistics[4:].sub(network.initial_statistics()[4:]).abs().max()) > 0.01


def test_running_statistics_under_vmap() -> None:
    network = tiny("ConvNet-2-W8-BN")
    thetas = torch.stack([network.initial(seed) for seed in range(3)]).double()
    statistics = torch.stack([network.initial_statistics() + seed for seed in range(3)]).double()
    images = torch.stack([data()[0] + shift for shift in range(3)])
    every = torch.func.vmap(network.training_pass)(thetas, statistics, images)
    tested = torch.func.vmap(network.test_pass)(thetas, statistics, images)
    for k in range(3):
        for value, expected in zip(every, network.training_pass(thetas[k], statistics[k], images[k]), strict=True):
            torch.testing.assert_close(value[k], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(
            tested[k], network.test_pass(thetas[k], statistics[k], images[k]), rtol=0, atol=1e-12
        )


def test_buffers_are_copied_for_each_call() -> None:
    network = FunctionalNetwork(Shifted, SHAPE, 5).to("cpu")
    assert not network.vmappable
    theta, images = network.initial(0).double(), data()[0]
    expected = images.flatten(1) @ theta.view(5, -1).T + 1
    for _ in range(2):
        logits = network(theta, images)
        assert logits.dtype == torch.float64
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)


def test_errors() -> None:
    network = tiny()
    length = network.num_parameters
    with pytest.raises(InputError, match=rf"needs a vector of {length} parameters, got one of shape \(3,\)"):
        network(torch.zeros(3), torch.zeros(1, *SHAPE))
    with pytest.raises(InputError, match="has no features: name its last layer 'classifier'"):
        FunctionalNetwork(Shifted, SHAPE, 5).features(torch.zeros(640), torch.zeros(1, *SHAPE))
    with pytest.raises(InputError, match=r"not those of 'ConvNet-2-W8' \(first difference: 'features\.4\.bias'\)"):
        network.flatten(build_network("ConvNet-1-W8", 2, 5, (8, 8)))
    with pytest.raises(InputError, match=r"'classifier.weight' has shape \(7, 32\), .* needs \(5, 32\): build it"):
        network.flatten(build_network("ConvNet-2-W8", 2, 7, (8, 8)))
    with pytest.raises(InputError, match="depth=4 leaves no pixel of 8 x 8 images"):
        tiny("ConvNet-4")


@pytest.mark.parametrize(
    ("name", "depends"),
    [("ConvNet-1-W4-BN", True), ("ResNet-10-W4-BN", True), ("ConvNet-1-W4", False), ("ConvNet-1-W4-LN", False)],
)
def test_batch_statistics_are_known(name: str, depends: bool) -> None:
    network = FunctionalNetwork(name, (1, 8, 8), 3)
    theta, images = network.initial(0), torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    assert network.uses_batch_statistics is depends
    assert torch.allclose(network(theta, images)[:2], network(theta, images[:2]), atol=1e-5) is not depends
