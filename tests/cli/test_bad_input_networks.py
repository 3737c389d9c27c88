"""Bad input to matching on live networks: one line with the value and the fix, and nothing is written or lost."""

import re

import pytest
import torch

from tests import small
from tests.small import Cli


def no_features(channels: int, num_classes: int, image_size: tuple[int, int]) -> torch.nn.Module:
    """Build a network whose last layer has another name."""
    del image_size
    layers = [torch.nn.Conv2d(channels, 2, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(2, num_classes))


NO_FEATURES = "--model.network tests.test_bad_input_networks:no_features"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--model.ipc 40",
            r"ipc 40 with factor 2 starts from 160 real images per class, but class 8, the smallest, has 139; "
            r"lower ipc or factor, or set init: noise",
        ),
        (
            "--model.ipc 40 --model.init kmeans",
            r"ipc 40 with factor 2 starts from 160 real images per class, but class 8, the smallest, has 139; lower",
        ),
        ("--model.factor 9", "factor is 9; it must be at least 1 and at most 8"),
        ("--model.factor 9 --model.init noise", "factor is 9; it must be at least 1 and at most 8"),
        ("--model.factor 0", "factor is 0; it must be at least 1"),
        (
            "--model.objective.batch_real 140",
            r"batch_real is 140, but class 8, the smallest, has 139 images \(no image is used twice\); lower "
            r"objective\.batch_real",
        ),
        (
            "--model.objective.batch_real 140 --model.objective.sampling representative",
            r"batch_real is 140, but class 8, the smallest, has 139 images \(k-means would have more clusters than",
        ),
        ("--model.objective.batch_real 0", r"batch_real is 0; it must be at least 1"),
        ("--model.objective.interval 0 --model.objective.sampling representative", r"interval is 0; .*at least 1"),
        (
            "--model.objective.per_cluster 3 --model.objective.sampling representative",
            r"per_cluster is 3; it must divide batch_real, 8",
        ),
        ("--model.objective.augmentation blur", r"blur"),
        ("--model.objective BidirectionalMatching --model.objective.alpha -1", r"alpha is -1; .* at least 0"),
        ("--model.label_lr 0.1", r"label_lr is 0\.1, but GradientMatching has no gradient by the labels"),
        (
            f"{NO_FEATURES} --model.objective BidirectionalMatching",
            r"has no features: name its last layer 'classifier'",
        ),
        (f"{NO_FEATURES} --model.objective.sampling representative", r"has no features: name its last layer"),
        (f"{NO_FEATURES} --model.init kmeans", r"has no features: name its last layer 'classifier'"),
        ("--selection.pool_size 2", r"pool_size is 2, but num_candidates is 3; the pool must hold them all"),
        (
            "--selection.num_candidates 3",
            r"num_candidates is 3, but the pool holds 1; lower selection\.num_candidates or set selection\.pool_size",
        ),
        ("--model.clamp true --model.inner_loop null", r"clamp is true, but inner_loop is null; .*: set it"),
        (
            "--model.clamp true --model.image_space network --data.color_space zca",
            r"clamp is true, but whitened images have no range of valid pixels; set image_space: pixels, or",
        ),
        ("--model.inner_loop 0", r"inner_loop is 0; an outer iteration has at least 1 step, or use null"),
        ("--model.labels soft", r"labels is 'soft' .* NetworkPool holds no trained experts .*use labels: hard"),
        ("--model.pool.age_limit 0", r"age_limit is 0; it must be at least 1 \(null for no limit\)"),
        ("--model.pool.num_networks 0", r"num_networks is 0; it must be at least 1"),
        ("--model.pool.pretrain_epochs -1", r"pretrain_epochs is -1; it must be at least 0"),
        ("--model.pool.recipe.cutmix 1.5", r"recipe\.cutmix is 1\.5; it must be at least 0 and at most 1"),
        ("--model.pool.recipe.lr 0", r"recipe\.lr is 0; it must be above 0"),
        (
            "--model.objective TrajectoryMatching",
            r"TrajectoryMatching learns from TrajectorySegment, but NetworkPool gives LiveNetwork; use TrajectoryPool",
        ),
    ],
)
def test_values(cli: Cli, options: str, message: str) -> None:
    assert re.search(message, cli.networks_refused(*options.split()))
    written = {path.name for path in (cli.folder / "runs").rglob("*") if path.is_file()}
    assert not {name for name in written if name.endswith((".ckpt", ".safetensors", "evaluation.csv"))}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model.objective.metric l2", r"mse.*l1.*cos"),
        ("--model.objective.policy mtt", r"dsa.*idc"),
        ("--model.objective.sampling random", r"shuffled.*representative"),
        ("--model.pool.refresh losers", r"winner.*candidates.*all.*none"),
        ("--model.pool.recipe.policy mtt", r"dsa.*idc"),
        ("--model.formation double", r"single.*multi"),
        ("--model.image_space rgb", r"network.*pixels"),
        ("--model.image_steps each", r"joint.*per_class"),
        ("--model.objective.alpha 1", r"alpha"),
    ],
)
def test_options(cli: Cli, options: str, message: str) -> None:
    line = cli.networks_refused(*options.split(), status=2)
    assert re.search(message, line)
    assert options.split()[0].split(".")[-1] in line
    assert not (cli.folder / "runs").exists()


def test_a_run_is_not_resumed_as_another(cli: Cli) -> None:
    cli.fit_networks("--evaluation", "null", "--trainer.max_steps", "2")
    checkpoint = cli.version(name="networks") / "checkpoints" / "step=2.ckpt"
    before = checkpoint.read_bytes(), small.contents(cli.version(name="networks"))
    for options, message in (
        (
            "--model.factor 1",
            "factor is 1 in the configuration, but 2 in the checkpoint; resume with",
        ),
        ("--model.image_space network", r"image_space is 'network' in .*'pixels' in the checkpoint; resume with"),
        ("--model.pool.num_networks 2", r"the pool holds 2 networks, but the checkpoint's run has 1; resume with"),
        ("--selection.pool_size 4", r"the pool holds 4 networks, but the checkpoint's run has 1; resume with"),
        ("--model.ipc 2", r"images is \[20, 1, 8, 8\] in the configuration, but \[10, 1, 8, 8\]"),
        (
            "--model.objective BidirectionalMatching",
            r"run has GradientMatching on NetworkPool, but .* BidirectionalMatching on NetworkPool; resume with",
        ),
    ):
        assert re.search(message, cli.networks_refused(*options.split(), "--ckpt_path", "last"))
        assert (checkpoint.read_bytes(), small.contents(cli.version(name="networks"))) == before
    cli.fit_networks("--evaluation", "null", "--ckpt_path", "last")  # nothing was lost
    cli.fit_networks("--evaluation", "null", "--name", "whole")
    assert small.same(cli.learned(_last(cli), "networks"), cli.learned(name="whole"))


def _last(cli: Cli) -> int:
    return max(int(path.name.removeprefix("version_")) for path in (cli.folder / "runs" / "networks").iterdir())
