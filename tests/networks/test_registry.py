from functools import partial
from typing import Any

import pytest
from torch import nn

from dd_lightning.networks import ConvNet, build_network, network_name
from tests.networks.checks import check_one_line_error, count


def tiny(channels: int, num_classes: int, image_size: tuple[int, int]) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * image_size[0] * image_size[1], num_classes))


def not_a_network(channels: int, num_classes: int, image_size: tuple[int, int]) -> Any:  # noqa: ANN401
    return channels


def test_factories_and_import_paths() -> None:
    path = "dd_lightning.networks.convnet:ConvNet"
    for spec in (path, "dd_lightning.networks.convnet.ConvNet", ConvNet):
        assert network_name(spec) == path
        assert count(build_network(spec, 3, 10, (32, 32))) == 320_010
    assert count(build_network(tiny, 1, 10, (8, 8))) == 650
    assert network_name(tiny).endswith("test_registry:tiny")
    shallow, deep = partial(ConvNet, depth=1), partial(ConvNet, depth=2)
    assert network_name(shallow) == f"{path}(depth=1)"
    assert network_name(deep) == f"{path}(depth=2)"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ResNext-50", r"unknown network 'ResNext-50': use one of .*ConvNet-<depth>.*import path of a factory"),
        ("no_such_package.models:net", r"cannot import network 'no_such_package\.models:net' \(No module named"),
        ("torch.nn:NoSuchThing", r"cannot import network 'torch\.nn:NoSuchThing' \(module .* has no attribute"),
        (":net", r"cannot import network ':net' \(Empty module name\)"),
        ("math:pi", r"network 'math:pi' is a float: it must be a function of"),
        (not_a_network, r"gave a int: it must return a torch\.nn\.Module"),
    ],
)
def test_errors(spec: Any, message: str) -> None:  # noqa: ANN401
    check_one_line_error(spec, message)
