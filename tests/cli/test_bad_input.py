"""Bad files, faults on the way and faults of our own: what is one line, what keeps its traceback, what is lost."""

import errno
import functools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dd_lightning.callbacks import EvalCallback, SyntheticSetWriter
from dd_lightning.datamodules import DigitsDataModule
from dd_lightning.functional.errors import DivergenceError, InputError, OutOfMemoryError
from dd_lightning.module import DistillationModule
from dd_lightning.pools import CandidateKey, TrajectoryPool, TrajectorySegment
from dd_lightning.sets.synthetic_file import load_synthetic, save_synthetic
from dd_lightning.training.expert_store import ExpertStore
from tests import small
from tests.small import Cli


def copied(store: Path, folder: Path) -> Path:
    folder.mkdir()
    for name, content in small.contents(store).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("damage", ["truncated", "a distilled set", "text"])
def test_damaged_expert(cli: Cli, damage: str) -> None:
    store = copied(cli.store, cli.folder / "copy")
    broken = store / "expert_00002.safetensors"
    if damage == "truncated":
        broken.write_bytes(broken.read_bytes()[:-100])
    elif damage == "text":
        broken.write_text("something else")
    else:
        cli.fit("--evaluation", "null", "--trainer.max_steps", "1")
        save_synthetic(broken, load_synthetic(cli.version() / "synthetic.safetensors"))
    before = small.contents(store)
    line = cli.fit_refused("--model.pool.path", str(store))
    assert str(broken) in line
    assert "delete it" in line
    assert small.contents(store) == before
    broken.unlink()  # the remedy
    cli.fit("--model.pool.path", str(store), "--evaluation", "null", "--trainer.max_steps", "1")
    assert small.contents(store) == small.contents(cli.store)


@pytest.mark.parametrize("options", ["--evaluation.networks [Foo]", "--evaluation.split val"])
def test_wrong_evaluation_is_refused_before_experts_are_trained(cli: Cli, options: str) -> None:
    cli.fit_refused("--model.pool.path", "new", *options.split())
    assert not (cli.folder / "new").exists()


class FailingPool(TrajectoryPool):
    """The target is NaN from the sixth load on, as long as ``failing``."""

    failing = True
    loads = 0

    def load(self, key: CandidateKey) -> TrajectorySegment:
        segment = super().load(key)
        self.loads += 1
        if self.failing and self.loads > 5:
            return TrajectorySegment(key, segment.start, segment.target * float("nan"))
        return segment


def test_nan_loses_nothing(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = ["--model.pool", "tests.cli.test_bad_input.FailingPool", "--model.pool.path", "new"]
    line = cli.fit_refused(*failing)
    assert re.search(r"not finite at step 5 \(student_lr .*image_lr 10\); lower image_lr", line)
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
    assert re.search(r"not finite at step \d+ .*lower image_lr", cli.fit_refused("--model.image_lr", "1e38"))


def test_a_run_is_not_resumed_as_another(cli: Cli) -> None:
    cli.fit_networks("--evaluation", "null", "--trainer.max_steps", "2")
    checkpoint = cli.version(name="networks") / "checkpoints" / "step=2.ckpt"
    before = checkpoint.read_bytes(), small.contents(cli.version(name="networks"))
    for options, said in (
        ("--model.factor 1", "factor is 1, .*2"),
        ("--model.image_space network", "image_space is 'network', .*'pixels'"),
        ("--model.pool.num_networks 2", r"pool\.num_networks is 2, .* 1"),
        ("--selection.pool_size 4", r"selection\.class is 'Traj.*, .* None"),
        ("--model.ipc 2", r"ipc is 2, .* 1"),
        ("--model.objective BidirectionalMatching", "'BidirectionalMatching', .*'GradientMatching'"),
    ):
        assert re.search(said, cli.networks_refused(*options.split(), "--ckpt_path", "last"))
        assert (checkpoint.read_bytes(), small.contents(cli.version(name="networks"))) == before
    cli.fit_networks("--evaluation", "null", "--ckpt_path", "last")  # nothing was lost
    cli.fit_networks("--evaluation", "null", "--name", "whole")
    newest = max((cli.folder / "runs" / "networks").iterdir(), key=lambda path: int(path.name[8:]))
    assert small.same(cli.learned(int(newest.name[8:]), "networks"), cli.learned(name="whole"))


def test_evaluate_refuses_other_files_and_data(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    cli.fit("--evaluation", "null", "--trainer.max_steps", "1")
    good = cli.version() / "synthetic.safetensors"
    bad = cli.folder / "bad.safetensors"
    bad.write_bytes(good.read_bytes()[:-50])
    assert re.search(r"bad\.safetensors: it is damaged", cli.refused("evaluate", str(bad)))
    expert = str(cli.store / "expert_00000.safetensors")
    assert "not a synthetic set" in cli.refused("evaluate", expert)
    assert re.search(
        r"10 classes of \(1, 8, 8\) images, but wide has 3 of \(1, 8, 9\); .*--data",
        cli.refused("evaluate", str(good), "--data", "tests.cli.test_bad_options.Wide"),
    )

    assert re.search("recipe.*'foo'.*idc.*mtt", cli.refused("evaluate", str(good), "--recipe", "foo"))
    assert re.search("epochs is 0", cli.refused("evaluate", str(good), "--epochs", "0"))

    def nothing(*_: object) -> None:
        raise AssertionError("a network was trained")

    monkeypatch.setattr("dd_lightning.cli.evaluate.Evaluation", nothing)
    assert "'Foo'" in cli.refused("evaluate", str(good), "--networks", small.NETWORK, "Foo")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"network": "os:system"},
            "network 'os:system', and no code is imported because a file names it; .*--networks",
        ),
        (
            {"evaluation_recipe": {"milestones": [], "augmentation": 3}},
            "evaluation recipe is not understood .*--recipe",
        ),
        ({"evaluation_recipe": {"milestones": [], "x" * 900: 3}}, "evaluation recipe is not understood .*--recipe"),
        ({"evaluation_recipe": {"milestones": 2}}, "evaluation recipe is not understood .*--recipe"),
    ],
)
def test_evaluate_trusts_no_file(cli: Cli, change: dict[str, Any], said: str) -> None:
    cli.fit("--evaluation", "null", "--trainer.max_steps", "1")
    path = cli.version() / "synthetic.safetensors"
    save_synthetic(path, replace(load_synthetic(path), **change))
    assert re.search(said, line := cli.refused("evaluate", str(path)))
    assert len(line) < 600


def test_evaluate_a_set_of_unknown_data(cli: Cli, store: Path, tmp_path: Path) -> None:
    small.fit(tmp_path / "run", small.module(store), SyntheticSetWriter(), steps=1)
    line = cli.refused("evaluate", str(tmp_path / "run" / "synthetic.safetensors"))
    assert re.search(r"dataset 'patterns' is none of .*digits.*; name its data module with --data", line)


@pytest.mark.parametrize("kind", [DivergenceError, OutOfMemoryError])
def test_a_run_that_diverges_or_needs_too_much_memory_is_one_line(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def fail(*_: object) -> None:
        raise kind("step 0 failed; lower something")

    monkeypatch.setattr(DistillationModule, "training_step", fail)
    assert cli.fit_refused() == "dd-lightning: error: step 0 failed; lower something"


@pytest.mark.parametrize(
    ("number", "path", "said"),
    [
        (errno.ENOSPC, None, "runs is '.*/runs', but No space left on device; free some space"),
        (errno.ENOSPC, "runs/small/version_0/events", "runs is '.*/runs', but No space left.* at .*/events; free"),
        (errno.EACCES, "runs/small/version_0/events", "runs is '.*/runs', but Permission denied at .*/events; give an"),
        (errno.EIO, "data/digits", r"data\.init_args\.root is 'data', but Input/output error at data/digits"),
    ],
)
def test_trouble_with_a_given_path_names_its_option(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, number: int, path: str | None, said: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, errno_text(number), path)

    monkeypatch.setattr(DistillationModule, "training_step", fail)
    assert re.search(said, cli.fit_refused())


def errno_text(number: int) -> str:
    return {
        errno.ENOSPC: "No space left on device",
        errno.EACCES: "Permission denied",
        errno.EIO: "Input/output error",
    }[number]


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/usr/lib/libours.so"),
        PermissionError("no file at all"),
        KeyError("ours"),
        TypeError("ours"),
        ValueError("ours"),
        RuntimeError("ours"),
    ],
    ids=repr,
)
def test_our_own_faults_keep_their_traceback(cli: Cli, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    for owner, method in ((DistillationModule, "training_step"), (DigitsDataModule, "load"), (EvalCallback, "setup")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, method, fail)
            with pytest.raises(type(error)) as raised:
                cli.fit()
            assert raised.value is error
            assert "dd-lightning: error" not in cli.err


@pytest.mark.parametrize("owner", [EvalCallback, DistillationModule])
def test_a_fault_of_a_constructor_while_it_handles_bad_input_is_ours(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, owner: type
) -> None:
    @functools.wraps(owner.__init__)  # type: ignore[misc]
    def fail(*_: object, **__: object) -> None:
        try:
            raise InputError("handled")
        except InputError:
            raise ValueError("our own fault")  # noqa: B904  (the context is the point)

    monkeypatch.setattr(owner, "__init__", fail)
    with pytest.raises(ValueError, match="our own fault"):
        cli.fit()
    assert "dd-lightning: error" not in cli.err
