"""Bad input through the commands: one line with the value and the fix, and nothing that was there is lost."""

import re
from pathlib import Path

import pytest
import torch

from dd_lightning.datamodules import DatasetDataModule
from dd_lightning.functional.errors import InputError
from dd_lightning.objectives import TrajectoryMatching
from dd_lightning.pools import CandidateKey, TrajectoryPool, TrajectorySegment
from dd_lightning.sets.synthetic_file import load_synthetic, save_synthetic
from dd_lightning.training.expert_store import ExpertStore
from tests import small
from tests.small import Cli


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--selection.temperature 0", r"temperature is 0\.0; it must be above 0 \(the paper uses 0\.5\)"),
        ("--selection.temperature -1", r"temperature is -1\.0; it must be above 0"),
        ("--selection.num_candidates 0", r"num_candidates is 0; at least 1"),
        (
            "--selection.num_candidates 5",
            r"num_candidates is 5, but the pool holds 4; lower selection\.num_candidates or set selection\.pool_size",
        ),
        ("--model.ipc 0", r"ipc is 0; it must be at least 1 image per class"),
        (
            "--model.ipc 140",
            r"ipc 140 with factor 1 starts from 140 real images per class, but class 8, the smallest, has 139",
        ),
        ("--model.student_lr 0", r"student_lr is 0\.0; .* must start above 0"),
        ("--model.student_lr_floor -1", r"student_lr_floor is -1\.0; give a positive number, or null"),
        (
            "--model.pool.max_start_epoch 9 --model.pool.train_missing false",
            r"too small \(expert 0 has 3 epochs\): the pool needs 4 experts of 9 epochs; set train_missing: true",
        ),
        (
            "--model.pool.num_experts 9 --model.pool.train_missing false",
            r"too small \(4 experts\): the pool needs 9 experts of 3 epochs; .*lower num_experts",
        ),
        ("--model.pool.recipe.lr -1", r"recipe\.lr is -1; it must be above 0"),
        ("--model.network Foo", r"unknown network 'Foo': use one of AlexNet, ConvNet-"),
        ("--evaluation.networks [Foo]", r"unknown network 'Foo': use one of AlexNet, ConvNet-"),
        ("--evaluation.recipe foo", r"unknown evaluation recipe 'foo'; choose one of idc, mtt"),
        ("--evaluation.epochs 0", r"recipe\.epochs is 0; it must be at least 1"),
        ("--evaluation.split val", r"split is 'val', but val_fraction is 0, .*set val_fraction above 0"),
        ("--data.val_fraction 2", r"val_fraction is 2; it must be at least 0 and below 1"),
        (
            "--trainer.precision bf16-mixed",
            r"precision is 'bf16-mixed', but only '32-true' .*set trainer\.precision: 32",
        ),
        ("--trainer.precision 16-mixed", r"precision is '(bf)?16-mixed', but only '32-true' is supported"),
        (
            "--trainer.accumulate_grad_batches 2",
            r"accumulate_grad_batches is 2, .*set trainer\.accumulate_grad_batches",
        ),
        ("--ckpt_path missing.ckpt", r"--ckpt_path is 'missing\.ckpt', which is no file; give a checkpoint, or 'last'"),
        ("--ckpt_path small.yaml", r"'small\.yaml', which is damaged or no checkpoint of a distillation run"),
        ("--ckpt_path last", r"no run under .* has a readable checkpoint; leave --ckpt_path out to start anew"),
        (
            "--runs small.yaml/runs",
            r"run folder .*small\.yaml/runs/small cannot be written \(Not a directory\); .*--runs",
        ),
        ("--model.pool.path small.yaml", r"expert store small\.yaml is a file, it must be a directory"),
        (
            "--data CIFAR10DataModule --data.root nowhere --data.download false",
            r"CIFAR-10 is not in .*/nowhere/cifar-10-batches-py and download is off: set root .* or download to true",
        ),
    ],
)
def test_values(cli: Cli, options: str, message: str) -> None:
    before = small.contents(cli.store)
    assert re.search(message, cli.fit_refused(*options.split()))
    assert small.contents(cli.store) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--bogus 1", r"--bogus 1; see dd-lightning fit --help"),
        ("--selection.tempature 1", r"'tempature' is not accepted; see dd-lightning"),
        ("--model.pool.init_args.pat x", r"'pat' is not accepted; see dd-lightning"),
        ("--model.ipc many", r'"model\.ipc": .*int.*many'),
        ("--model.init zeros", r"real.*noise.*zeros|zeros.*real.*noise"),
        ("--data FooDataModule", r"data is 'FooDataModule', which is no class; name one, or give its import path"),
        ("--model.objective Foo", r"model\.objective is 'Foo', which is no class"),
        ("--config nowhere.yaml", r"does not exist: '.*nowhere\.yaml'"),
        ("--config other.yaml", r"does not accept option 'moddel"),
        ("--config broken.yaml", r"Problems parsing config: .* in the YAML file, line 2, column 1; see"),
    ],
)
def test_options(cli: Cli, options: str, message: str) -> None:
    (cli.folder / "other.yaml").write_text("moddel: {ipc: 1}\n")
    (cli.folder / "broken.yaml").write_text("model: {ipc: 1\n")
    assert re.search(message, cli.fit_refused(*options.split(), status=2))


def test_commands(cli: Cli) -> None:
    line = cli.refused("fitt", status=2)
    assert line == "dd-lightning: error: unknown command 'fitt'; use fit, experts or evaluate"
    assert re.search("num_experts is 0 .*at least 1", cli.refused("experts", "--num_experts", "0"))
    assert re.search("--epoch 3; see dd-lightning experts --help", cli.refused("experts", "--epoch", "3", status=2))
    assert re.search("file.*see dd-lightning evaluate --help", cli.refused("evaluate", status=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model.network ConvNet-1-W5", r"was made with network = 'ConvNet-1-W4', this run has 'ConvNet-1-W5'"),
        ("--data.split_seed 1", r"was made with .*fingerprint = '[0-9a-f]+', this run has '[0-9a-f]+'"),
        ("--data.color_space pixel", r"was made with .*fingerprint = '[0-9a-f]+', this run has '[0-9a-f]+'"),
        ("--model.pool.recipe.lr 0.1", r"was made with recipe\.lr = 0\.05, this run has 0\.1; .*another expert path"),
    ],
)
def test_store_of_something_else(cli: Cli, options: str, message: str) -> None:
    before = small.contents(cli.store)
    line = cli.fit_refused(*options.split())
    assert re.search(message, line)
    assert str(cli.store / "expert_00000.safetensors") in line
    assert small.contents(cli.store) == before


def copied(store: Path, folder: Path) -> Path:
    folder.mkdir()
    for name, content in small.contents(store).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("damage", "reason"),
    [("truncated", "damaged or not a safetensors file"), ("foreign", "dd_lightning did not write it")],
)
def test_damaged_expert(cli: Cli, damage: str, reason: str) -> None:
    store = copied(cli.store, cli.folder / "copy")
    broken = store / "expert_00002.safetensors"
    if damage == "truncated":
        broken.write_bytes(broken.read_bytes()[:-100])
    else:
        cli.fit("--evaluation", "null", "--trainer.max_steps", "1")
        file = load_synthetic(cli.version() / "synthetic.safetensors")
        save_synthetic(broken, file)
    before = small.contents(store)
    line = cli.fit_refused("--model.pool.path", str(store))
    assert str(broken) in line
    assert reason in line or "it does not hold an expert trajectory" in line
    assert "delete it, and it will be trained again" in line
    assert small.contents(store) == before
    broken.unlink()  # as told
    cli.fit("--model.pool.path", str(store), "--evaluation", "null", "--trainer.max_steps", "1")
    assert small.contents(store) == small.contents(cli.store)


def test_wrong_evaluation_is_told_before_experts_are_trained(cli: Cli) -> None:
    for options in (["--evaluation.networks", "[Foo]"], ["--evaluation.split", "val"]):
        cli.fit_refused("--model.pool.path", "new", *options)
        assert not (cli.folder / "new").exists()


def test_wrong_network_is_told_before_any_is_evaluated(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    cli.fit("--evaluation", "null", "--trainer.max_steps", "1")

    def nothing(*_: object) -> None:
        raise AssertionError("a network was trained")

    monkeypatch.setattr("dd_lightning.cli.evaluate_synthetic_set", nothing)
    file = str(cli.version() / "synthetic.safetensors")
    assert "unknown network 'Foo'" in cli.refused("evaluate", file, "--networks", small.NETWORK, "Foo")


class FailingPool(TrajectoryPool):
    """The target is NaN from the sixth load on, where it is told so."""

    failing = True
    loads = 0

    def load(self, key: CandidateKey) -> TrajectorySegment:
        segment = super().load(key)
        self.loads += 1
        if self.failing and self.loads > 5:
            return TrajectorySegment(key, segment.start, segment.target * float("nan"))
        return segment


def test_nan_loses_nothing(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = ["--model.pool", "tests.test_bad_input.FailingPool", "--model.pool.path", "new"]
    line = cli.fit_refused(*failing)
    assert re.search(r"matching loss is not finite at step 5 \(student_lr .*image_lr 10\); lower image_lr", line)
    assert ExpertStore(cli.folder / "new").ids() == list(range(small.EXPERTS))
    assert [path.name for path in (cli.version() / "checkpoints").iterdir()] == ["step=4.ckpt"]
    assert load_synthetic(cli.version() / "synthetic.safetensors").images.isfinite().all()
    assert len((cli.version() / "evaluation.csv").read_text().splitlines()) == 1 + 2  # heading, steps 0 and 4
    before = small.contents(cli.folder / "new")
    monkeypatch.setattr(FailingPool, "failing", False)
    cli.fit(*failing, "--ckpt_path", "last")
    assert small.contents(cli.folder / "new") == before
    cli.fit("--name", "whole")
    assert small.same(cli.learned(1), cli.learned(name="whole"))


def test_diverging_images_are_one_line(cli: Cli) -> None:
    assert re.search(r"is not finite at step \d+ .*lower image_lr", cli.fit_refused("--model.image_lr", "1e38"))


def test_evaluate(cli: Cli) -> None:
    cli.fit("--evaluation", "null", "--trainer.max_steps", "1")
    good = cli.version() / "synthetic.safetensors"
    bad = cli.folder / "bad.safetensors"
    bad.write_bytes(good.read_bytes()[:-50])
    assert re.search(r"bad\.safetensors: it is damaged or not a safetensors", cli.refused("evaluate", str(bad)))
    assert re.search(r"no synthetic set at nowhere; check the path", cli.refused("evaluate", "nowhere"))
    expert = str(cli.store / "expert_00000.safetensors")
    assert re.search(r"not a synthetic set of dd_lightning", cli.refused("evaluate", expert))
    for options, message in (
        (("--num_networks", "0"), "num_networks is 0; it must be at least 1"),
        (("--recipe", "foo"), "unknown evaluation recipe 'foo'; choose one of idc, mtt"),
        (("--device", "toaster"), "device is 'toaster', which this machine does not have; use auto or cpu"),
        (
            ("--data", "tests.test_bad_input.Wide"),
            r"holds 10 classes of \(1, 8, 8\) images, but wide has 3 of \(1, 8, 9\); give the data .* with --data",
        ),
    ):
        assert re.search(message, cli.refused("evaluate", str(good), *options))


class Wide(DatasetDataModule):
    """Images of another shape."""

    def __init__(self) -> None:
        images, labels = torch.zeros(6, 1, 8, 9), torch.arange(6) % 3
        both = torch.utils.data.TensorDataset(images, labels)
        super().__init__(both, both, name="wide")


def test_evaluate_of_a_set_with_unknown_data(cli: Cli, store: Path, tmp_path: Path) -> None:
    from dd_lightning.callbacks import SyntheticSetWriter

    small.fit(tmp_path, small.module(store), SyntheticSetWriter(), steps=1)
    line = cli.refused("evaluate", str(tmp_path / "synthetic.safetensors"))
    assert re.search(r"dataset 'patterns' is none of .*digits.*; name its data module with --data", line)


@pytest.mark.parametrize("syn_steps", [0, -1])
def test_objective(syn_steps: int) -> None:
    with pytest.raises(InputError, match=f"syn_steps is {syn_steps}; the student needs at least 1 step"):
        TrajectoryMatching(syn_steps=syn_steps)
