"""Odd values of options: one line that has the option and the value, before anything is trained or written."""

import re

import pytest
import torch
import yaml

from dd_lightning.datamodules import DatasetDataModule
from dd_lightning.execution.precision import warn_of_no_effect
from tests import small
from tests.small import Cli


def no_features(channels: int, num_classes: int, image_size: tuple[int, int]) -> torch.nn.Module:
    """Build a network whose last layer has another name."""
    del image_size
    layers = [torch.nn.Conv2d(channels, 2, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(2, num_classes))


class Wide(DatasetDataModule):
    """Images of another shape."""

    def __init__(self) -> None:
        images, labels = torch.rand(6, 1, 8, 9), torch.arange(6) % 3
        both = torch.utils.data.TensorDataset(images, labels)
        super().__init__(both, both, name="wide")


NO_FEATURES = "--model.network tests.cli.test_bad_options:no_features"

TRAJECTORIES = [  # options for the small run on stored trajectories, and what the line has
    ("--model.ipc 0", "ipc is 0"),
    ("--model.ipc -3", "ipc is -3"),
    ("--model.ipc 140", "ipc 140 .*class 8.*139"),
    ("--model.image_lr -1", "image_lr is -1"),
    ("--model.momentum 1", "momentum is 1"),
    ("--model.label_momentum -0.1", r"label_momentum is -0\.1"),
    ("--model.label_lr -1", "label_lr is -1"),
    ("--model.student_lr 0", "student_lr is 0"),
    ("--model.student_lr_lr -1", "student_lr_lr is -1"),
    ("--model.student_lr_floor -1", "student_lr_floor is -1"),
    ("--model.student_lr_floor 0", "student_lr_floor is 0"),
    ("--model.execution.micro_batch 0", r"execution\.micro_batch is 0"),
    ("--model.execution.memory_gb 0", r"execution\.memory_gb is 0"),
    ("--model.objective.execution.micro_batch -1", r"execution\.micro_batch is -1"),
    ("--evaluation.execution.memory_gb -1", r"execution\.memory_gb is -1"),
    ("--model.network Foo", "'Foo'.*ConvNet-"),
    ("--model.network=", "''.*ConvNet-"),
    ("--model.network ConvNet-0", "depth.*0"),
    ("--model.network ConvNet-1-W0", "width.*0"),
    ("--model.objective.syn_steps 0", "syn_steps is 0"),
    ("--model.objective.syn_steps -1", "syn_steps is -1"),
    ("--model.objective.batch_syn 0", "batch_syn is 0"),
    ("--model.objective.augmentation blur", "'blur'"),
    ("--model.objective.augmentation=", "augmentation.*''"),
    ("--model.pool.num_experts 0", "num_experts|0 candidates"),
    ("--model.pool.expert_epochs 0", "expert_epochs is 0"),
    ("--model.pool.max_start_epoch 0", "start.* 0"),
    ("--model.pool.min_start_epoch -1", "start.*-1"),
    ("--model.pool.min_start_epoch 9", "start_epoch"),
    ("--model.pool.train_epochs 1", "train_epochs is 1"),
    ("--model.pool.path=", "path is ''"),
    ("--model.pool.path small.yaml", r"small\.yaml.*directory"),
    ("--model.pool.max_start_epoch 9 --model.pool.train_missing false", "3 epochs.*9 epochs.*train_missing"),
    ("--model.pool.num_experts 9 --model.pool.train_missing false", "4 experts.*9 experts.*num_experts"),
    ("--model.pool.recipe.lr -1", "lr is -1"),
    ("--model.pool.recipe.batch_size 0", "batch_size is 0"),
    ("--model.pool.recipe.momentum 1", "momentum is 1"),
    ("--model.pool.recipe.weight_decay -1", "weight_decay is -1"),
    ("--selection.temperature 0", r"temperature is 0.*above 0"),
    ("--selection.temperature -1", "temperature is -1.*above 0"),
    ("--selection.num_candidates 0", "num_candidates is 0"),
    ("--selection.pool_size 2", "pool_size is 2.*3"),
    ("--selection.every_n_steps 0", "every_n_steps is 0"),
    ("--selection.score_steps 0", "score_steps is 0"),
    ("--selection.score_steps 9", "score_steps is 9.*2"),
    ("--selection.refresh_per_step 0", "refresh_per_step is 0"),
    ("--selection.refresh_per_step 9", "refresh_per_step is 9.*3"),
    ("--evaluation.every_n_steps 0", "every_n_steps is 0"),
    ("--evaluation.networks [Foo]", "'Foo'.*ConvNet-"),
    ("--evaluation.networks [ConvNet-1,ConvNet-1]", r"networks is \['ConvNet-1', 'ConvNet-1'\]"),
    ("--evaluation.num_networks 0", "num_networks is 0"),
    ("--evaluation.num_networks_intermediate 9", "num_networks_intermediate is 9.* 2"),
    ("--evaluation.recipe foo", "recipe.*'foo'.*idc.*mtt"),
    ("--evaluation.epochs 0", "epochs (is )?0"),
    ("--evaluation.augmentation blur", "'blur'"),
    ("--evaluation.split val", "'val'.*val_fraction"),
    ("--data.val_fraction 2", "val_fraction is 2"),
    ("--data.val_fraction -0.1", "val_fraction is -0.1"),
    ("--data CIFAR10DataModule --data.root nowhere --data.download false", "/nowhere.*root.*download"),
    ("--writer.every_n_steps 0", "every_n_steps is 0"),
    ("--writer.max_per_class 0", "max_per_class is 0"),
    ("--checkpoint.every_n_train_steps -1", "every_n_train_steps=-1"),
    ("--trainer.precision bf16-mixed", r"precision is 'bf16-mixed'.*32-true"),
    ("--trainer.precision 16-mixed", r"precision is '(bf)?16-mixed'.*32-true"),
    ("--model.label_lr 0.1", "label_lr is 0.1, but labels is 'hard'"),
    ("--checkpoint.monitor nothing", "ModelCheckpoint's monitor is 'nothing'; .*accuracy/ConvNet-1-W4 or loss"),
    ("--checkpoint.monitor evaluation/ConvNet-1-W4/lov", "monitor is 'evaluation/ConvNet-1-W4/lov'; .*accuracy/"),
    ("--checkpoint.monitor nothing --evaluation null", "monitor is 'nothing'; it must be loss"),
    ("--trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor=loss", "EarlyStopping's monitor is 'loss'"),
    ("--trainer.log_every_n_steps -1", "trainer.log_every_n_steps is -1.*at least 0"),
    ("--trainer.gradient_clip_val -1", "trainer.gradient_clip_val is -1.*at least 0"),
    ("--trainer.min_steps 9", "trainer.min_steps is 9.*at most 6"),
    ("--trainer.max_time 00:00:00:00", "trainer.max_time is 0.*above 0"),
    ("--trainer.barebones true", "trainer.barebones is true; it must be false"),
    ("--trainer.enable_checkpointing false", "trainer.enable_checkpointing is false; it must be true"),
    ("--trainer.accumulate_grad_batches 2", "accumulate_grad_batches is 2"),
    ("--trainer.accelerator abacus", "Trainer.*accelerator='abacus'"),
    ("--trainer.devices 0", "Trainer.*devices='?0"),
    ("--trainer.strategy teamwork", "Trainer.*strategy='teamwork'"),
    ("--trainer.max_time never", "Trainer.*'never'"),
    ("--seed_everything -5", "seed_everything is -5"),
    ("--ckpt_path missing.ckpt", r"--ckpt_path is 'missing\.ckpt', .*'last'"),
    ("--ckpt_path /dev/null", "--ckpt_path is '/dev/null', which is no file"),
    ("--ckpt_path small.yaml", r"--ckpt_path is 'small\.yaml'.*'last'"),
    ("--ckpt_path=", "--ckpt_path is ''"),
    ("--ckpt_path last --name new", "--ckpt_path is 'last', .*new.*--name"),
    ("--name=", "--name is ''"),
    ("--name /tmp/name", "--name is '/tmp/name'"),
    ("--name ../name", r"--name is '\.\./name'"),
    ("--name .", r"--name is '\.'"),
    ("--runs=", "--runs is ''"),
    ("--runs small.yaml/runs", r"/small\.yaml/runs.*--runs"),
]

NETWORKS = [  # for the small run on live networks
    ("--model.ipc 40", r"ipc 40 .*160.*class 8.*139"),
    ("--model.ipc 40 --model.init kmeans", r"ipc 40 .*160.*class 8.*139"),
    ("--model.factor 9", "factor.*9.*8 x 8"),
    ("--model.factor 9 --model.init noise", "factor.*9.*8 x 8"),
    ("--model.factor 0", "factor.*0"),
    ("--model.clamp true --model.inner_loop null", "clamp is true, .*inner_loop"),
    ("--model.clamp true --model.image_space network --data.color_space zca", "clamp is true, .*image_space"),
    ("--model.inner_loop 0", "inner_loop is 0"),
    ("--model.labels soft", "labels is 'soft'.*NetworkPool"),
    ("--model.label_lr 0.1", "label_lr is 0.1, but labels is 'hard'"),
    ("--model.objective TrajectoryMatching", "TrajectoryMatching .*NetworkPool .*TrajectoryPool"),
    ("--model.objective BidirectionalMatching --model.objective.alpha -1", "alpha is -1"),
    ("--model.objective.batch_real 0", "batch_real is 0"),
    ("--model.objective.batch_syn 0", "batch_syn is 0"),
    ("--model.objective.interval 0 --model.objective.sampling representative", "interval is 0"),
    ("--model.objective.interval 0", "interval is 0"),
    ("--model.objective.per_cluster 0", "per_cluster is 0"),
    ("--model.objective.per_cluster 3 --model.objective.sampling representative", "per_cluster is 3.*8"),
    ("--model.objective.augmentation blur", "'blur'"),
    (f"{NO_FEATURES} --model.objective BidirectionalMatching", "'classifier'"),
    (f"{NO_FEATURES} --model.objective.sampling representative", "'classifier'"),
    (f"{NO_FEATURES} --model.init kmeans", "'classifier'"),
    ("--model.pool.age_limit 0", "age_limit is 0"),
    ("--model.pool.num_networks 0", "num_networks|0 candidates"),
    ("--model.pool.pretrain_epochs -1", "pretrain_epochs is -1"),
    ("--model.pool.recipe.cutmix 1.5", r"recipe\.cutmix is 1\.5"),
    ("--model.pool.recipe.lr 0", r"recipe\.lr is 0"),
    ("--model.pool.recipe.images_per_update 0", "images_per_update (is )?0"),
    ("--selection.pool_size 2", "pool_size is 2.*3"),
]

WRONG_TYPES = [  # no run has these: exit status 2
    ("--model.ipc many", "model.ipc is 'many'; it must be an integer"),
    ("--model.ipc 1.5", "model.ipc is '1.5'; it must be an integer"),
    ("--model.ipc null", "model.ipc is null; it must be an integer"),
    ("--model.image_lr nan", "model.image_lr is 'nan'; it must be a number"),
    ("--model.inner_loop often", "model.inner_loop is 'often'; it must be an integer or null"),
    ("--model.clamp maybe", "model.clamp is 'maybe'; it must be true or false"),
    ("--model.init zeros", "model.init is 'zeros'; it must be 'real', 'kmeans', 'noise'"),
    ("--model.formation double", "model.formation is 'double'; it must be 'single', 'multi'"),
    ("--model.image_space rgb", "model.image_space is 'rgb'; it must be 'network', 'pixels'"),
    ("--model.image_steps each", "model.image_steps is 'each'; it must be 'joint', 'per_class'"),
    ("--model.objective.metric l2", "model.objective.metric is 'l2'; it must be 'mse', 'l1', 'l1_mean', 'cos'"),
    ("--model.objective.policy mtt", "model.objective.policy is 'mtt'; it must be 'dsa', 'idc'"),
    ("--model.objective.sampling random", "model.objective.sampling is 'random'; it must be 'shuffled', 'represen"),
    (
        "--model.execution.compile maybe",
        "model.execution.compile is 'maybe'; it must be 'auto', 'on', 'off' or true or",
    ),
    (
        "--model.pool.execution.precision half",
        "model.pool.execution.precision is 'half'; it must be 'float32', 'tf32', ",
    ),
    ("--model.pool.refresh losers", "model.pool.refresh is 'losers'; it must be "),
    ("--model.pool.recipe.policy mtt", "model.pool.recipe.policy is 'mtt'; it must be 'dsa', 'idc'"),
    ("--model.pool.recipe.lr fast", "model.pool.recipe.lr is 'fast'; it must be a number"),
    ("--model.pool.recipe 5", "model.pool.recipe is '5'; it must be a mapping"),
    ("--model 5", "model is '5'; it must be a mapping"),
    ("--selection.temperature hot", "selection.temperature is 'hot'; it must be a number"),
    ("--evaluation.networks 5", "evaluation.networks is '5'; it must be a list or null"),
    ("--evaluation.split train", "evaluation.split is 'train'; it must be 'test', 'val'"),
    ("--data.color_space lab", "data.color_space is 'lab'; it must be 'pixel', 'normalized', 'zca'"),
    ("--data FooDataModule", "data is 'FooDataModule', which is no such class; give one of CIFAR10DataModule, "),
    ("--data dd_lightning.NetworkPool", "data is 'dd_lightning.NetworkPool', which is no such class; give one of"),
    ("--model.objective no.such.Class", "model.objective is 'no.such.Class', but No module named 'no'"),
    (
        "--model.objective null --model.objective.batch_real 8",
        "model.objective.batch_real is an option of a class; give",
    ),
    ("--selection 5", "selection is '5', which is no such class; give one of TrajectorySelectionCallback or"),
    ("--trainer.callbacks Foo", "trainer.callbacks is 'Foo', which is no such class"),
    ("--trainer.callbacks EarlyStopping", "trainer.callbacks is 'lightning.pytorch.callbacks.EarlyStopping', but"),
    ("--model.ipc", "--model.ipc: expected one argument"),
]

TYPOS = [
    ("--bogus 1", "bogus is no option; see dd-lightning fit --help"),
    ("bogus", "bogus is no option; see"),
    ("--modell.ipc 1", "modell.ipc is no option; did you mean model.ipc?"),
    ("--model.ipcc=1", "model.ipcc is no option; did you mean model.ipc? See dd-lightning fit --help"),
    ("--model.ip 1", "model.ip is no option; did you mean model.ipc?"),  # no abbreviations
    ("--trainer.max_step 1", "trainer.max_step is no option; did you mean trainer.max_steps?"),
    ("--num_candidates 3", "num_candidates is no option; did you mean selection.num_candidates?"),
    ("--model.recipe.lr 1", "model.recipe.lr is no option; did you mean model.pool.recipe.lr?"),
    ("--selection.tempature 1", "selection.tempature is no option of TrajectorySelectionCallback; did you mean se"),
    ("--evaluation.num_network 1", "evaluation.num_network is no option of EvalCallback; did you mean evaluation.num"),
    ("--data.colour_space zca", "data.colour_space is no option of DigitsDataModule; did you mean data.color_space?"),
    ("--model.pool.init_args.pat x", "model.pool.pat is no option of NetworkPool; "),
    ("--model.pool.recipe.batchsize 1", "model.pool.recipe.batchsize is no option of NetworkPool; did you mean model"),
    ("--model.objective.alpha 1", "model.objective.alpha is no option of GradientMatching, but of Bidirectional"),
    ("--model.objective.age_limit 1", "model.objective.age_limit is no option of GradientMatching; did you mean mod"),
    ("--config typo0.yaml", "moddel.ipc is no option; did you mean model.ipc?"),
    ("--config typo1.yaml", "model.pool.recipe.lrr is no option of NetworkPool; did you mean model.pool.recipe.lr?"),
    ("--config typo2.yaml", "temperature is no option; did you mean selection.temperature?"),
    ("--config typo3.yaml", "selection.tempature is no option of TrajectorySelectionCallback; did you mean"),
]  # fmt: skip
FILES = (
    "moddel: {ipc: 1}",
    "model: {pool: {init_args: {recipe: {lrr: 1}}}}",
    "temperature: 0.5",
    "selection: {tempature: 1}",
)


def ids(table: list[tuple[str, str]]) -> list[str]:
    return [options for options, _ in table]


@pytest.mark.parametrize(("options", "said"), TRAJECTORIES, ids=ids(TRAJECTORIES))
def test_values(cli: Cli, options: str, said: str) -> None:
    before = small.contents(cli.store)
    assert re.search(said, cli.fit_refused(*options.split()))
    assert small.contents(cli.store) == before
    assert results(cli) == set()


@pytest.mark.parametrize(("options", "said"), NETWORKS, ids=ids(NETWORKS))
def test_values_for_live_networks(cli: Cli, options: str, said: str) -> None:
    assert re.search(said, cli.networks_refused(*options.split()))
    assert results(cli) == set()


@pytest.mark.parametrize(("options", "said"), [*WRONG_TYPES, *TYPOS], ids=ids([*WRONG_TYPES, *TYPOS]))
def test_types_and_typos(cli: Cli, options: str, said: str) -> None:
    for number, text in enumerate(FILES):
        (cli.folder / f"typo{number}.yaml").write_text(text)
    assert said in cli.networks_refused(*options.split(), status=2)
    assert not (cli.folder / "runs").exists()


@pytest.mark.parametrize(
    "options",
    [
        "trainer.limit_val_batches 3",
        "trainer.val_check_interval 0",
        "trainer.check_val_every_n_epoch -1",
        "trainer.num_sanity_val_steps 2",
        "trainer.min_epochs -5",
        "trainer.default_root_dir elsewhere",
        "trainer.log_every_n_steps 0",
        "model.execution.precision tf32",
    ],
)
def test_values_without_effect_are_told(cli: Cli, options: str) -> None:
    warn_of_no_effect.cache_clear()
    with pytest.warns(UserWarning, match=options.split()[0].rpartition(".")[2]) as told:
        cli.fit(*f"--{options} --trainer.max_steps 1 --evaluation null".split())
    assert len([warning for warning in told if options.split()[1] in str(warning.message)]) == 1


def test_null_is_a_value_within_an_optional_group(cli: Cli) -> None:
    keys = ("model.objective", "model.pool", "evaluation")
    options = [f"--{key}.execution.micro_batch{value}" for key in keys for value in ("=4", "=null")]
    cli.fit(*options, "--trainer.max_steps", "1")
    resolved = yaml.safe_load((cli.version() / "config.yaml").read_text())
    groups = (
        *(resolved["model"][key]["init_args"] for key in ("objective", "pool")),
        resolved["evaluation"]["init_args"],
    )
    assert [group["execution"]["micro_batch"] for group in groups] == [None, None, None]


def test_without_a_logger_files_go_to_the_runs_folder(cli: Cli) -> None:
    before = set(cli.folder.iterdir())
    cli.fit("--trainer.logger", "false")
    written = {path.name for path in cli.version().iterdir()}
    assert written >= {"config.yaml", "summary.json", "evaluation.csv", "synthetic.safetensors", "checkpoints"}
    assert {path.name for path in set(cli.folder.iterdir()) - before} <= {"runs", "small.yaml"}


def results(cli: Cli) -> set[str]:
    """Return the checkpoints, sets and accuracies that a run wrote."""
    written = {path.name for path in (cli.folder / "runs").rglob("*") if path.is_file()}
    return {name for name in written if name.endswith((".ckpt", ".safetensors", "evaluation.csv"))}


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        ("fitt", 2, "unknown command 'fitt'; did you mean fit?"),
        ("--config quickstart", 2, "unknown command '--config'; use fit, experts, evaluate, report"),
        ("fit", 2, "no data.*--config quickstart.*--data, such as CIFAR10DataModule"),
        ("fit --model.ipc 1", 2, "no data.*--config quickstart.*--data, such as CIFAR10DataModule"),
        ("experts", 2, "no data.*--config experts/digits.*--data, such as CIFAR10DataModule"),
        (
            "experts --num_experts 1 --epochs 1",
            2,
            "no data.*--config experts/digits.*--data, such as CIFAR10DataModule",
        ),
        ("experts --data DigitsDataModule --num_experts 0", 1, "num_experts is 0"),
        ("experts --data DigitsDataModule --epochs 0", 1, "epochs is 0"),
        ("experts --data DigitsDataModule --epoch 3", 2, "epoch is no option; did you mean epochs?"),
        ("experts --data DigitsDataModule --path=", 1, "path is ''"),
        ("experts --data DigitsDataModule --network Foo", 1, "'Foo'.*ConvNet-"),
        ("experts --data DigitsDataModule --recipe.lr 0", 1, "lr is 0"),
        ("experts --data DigitsDataModule --recipe.lrr 1", 2, r"recipe\.lrr is no option; did you mean recipe\.lr\?"),
        ("experts --data DigitsDataModule --device toaster", 1, "device is 'toaster'"),
        ("evaluate", 2, "file.*see dd-lightning evaluate --help"),
        ("evaluate nowhere", 1, "nowhere"),
        ("evaluate .", 1, r"synthetic\.safetensors"),
        ("evaluate nowhere --num_networks 0", 1, "num_networks is 0"),
        ("evaluate nowhere --execution.micro_batch 0", 1, r"execution\.micro_batch is 0"),
        ("evaluate nowhere --execution.precision float8", 2, r"execution\.precision is 'float8'"),
        ("experts --data DigitsDataModule --execution.compile maybe", 2, r"execution\.compile is 'maybe'"),
        ("experts --data DigitsDataModule --execution.precision tf32", 2, r"execution\.precision is no option"),
        ("evaluate nowhere --device toaster", 1, "device is 'toaster'"),
        ("report", 2, "runs.*see dd-lightning report --help"),
        ("report nowhere --out x", 1, "nowhere is no folder"),
        ("report nowhere --ou x", 2, "ou is no option; did you mean out?"),
    ],
)
def test_commands(cli: Cli, options: str, status: int, said: str) -> None:
    assert re.search(said, cli.refused(*options.split(), status=status))
    assert list(cli.folder.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--model.network ConvNet-1-W5", "network = 'ConvNet-1-W4', .*'ConvNet-1-W5'"),
        ("--data.split_seed 1", "fingerprint = '[0-9a-f]+', .*'[0-9a-f]+'"),
        ("--data.color_space pixel", "fingerprint = '[0-9a-f]+', .*'[0-9a-f]+'"),
        ("--model.pool.recipe.lr 0.1", r"recipe\.lr = 0\.05, .*0\.1; .*another expert path"),
    ],
)
def test_store_of_something_else(cli: Cli, options: str, said: str) -> None:
    before = small.contents(cli.store)
    line = cli.fit_refused(*options.split())
    assert re.search(said, line)
    assert str(cli.store / "expert_00000.safetensors") in line
    assert small.contents(cli.store) == before
