"""The command line: what it writes, and what it says to bad input."""

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dd_lightning.cli.main import main
from dd_lightning.cli.report import percent
from dd_lightning.module import DistillationModule
from dd_lightning.objectives import ScoredCandidate, TrajectoryMatching
from dd_lightning.sets.synthetic_file import load_synthetic

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning 2.6 with jsonargparse 4
Fit = Callable[..., Path]

BASE: dict[str, Any] = {
    "seed_everything": 3,
    "name": "tiny",
    "model": {
        "network": "ConvNet-1-W4",
        "image_lr": 5.0,
        "student_lr_lr": 1e-4,
        "objective": {"class_path": "TrajectoryMatching", "init_args": {"syn_steps": 2}},
        "pool": {
            "class_path": "TrajectoryPool",
            "init_args": {
                "num_experts": 4,
                "expert_epochs": 1,
                "max_start_epoch": 2,
                "recipe": {"lr": 0.05, "batch_size": 500},
            },
        },
    },
    "evaluation": {"every_n_steps": 2, "num_networks": 2, "epochs": 2},
    "checkpoint": {"every_n_train_steps": 2},
    "trainer": {"accelerator": "cpu", "max_steps": 5, "log_every_n_steps": 1, "enable_progress_bar": False},
}


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    path = folder / "experts"
    flags = ["--network", "ConvNet-1-W4", "--num_experts", "4", "--epochs", "2", "--recipe.lr", "0.05"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["experts", *flags, "--recipe.batch_size", "500", "--path", str(path)])
    return path


@pytest.fixture
def fit(experts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fit:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))

    def run(*flags: str) -> Path:
        main(["fit", "--config", "base.yaml", "--model.pool.init_args.path", str(experts), *flags])
        return max((tmp_path / "runs" / "tiny").glob("version_*"), key=lambda path: int(path.name[8:]))

    return run


def images(run: Path) -> torch.Tensor:
    return load_synthetic(run / "synthetic.safetensors").images


def test_a_run_leaves_all_its_files(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    run = fit("--selection.num_candidates", "3")
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    curve = events.Scalars("eval/ConvNet-1-W4/accuracy")
    assert [point.step for point in curve] == [0, 2, 4, 5]
    rows = [line.split(",") for line in (run / "evaluation.csv").read_text().splitlines()]
    assert [int(row[0]) for row in rows[1:]] == [0, 2, 4, 5]
    assert [float(row[2]) for row in rows[1:]] == pytest.approx([point.value for point in curve], abs=1e-6)
    for row in rows[1:]:
        assert sum(map(float, row[5:])) / 2 == pytest.approx(float(row[2]))
    scalars = set(events.Tags()["scalars"])
    wanted = {"distill/loss", "distill/student_lr", "cost/seconds", "cost/candidate_evaluations"}
    wanted |= {f"eval/ConvNet-1-W4/{name}" for name in ("accuracy_std", "accuracy_best", "seconds")}
    wanted |= {f"selection/{name}" for name in ("loss_0", "loss_2", "entropy", "probability_chosen", "seconds")}
    assert wanted <= scalars
    assert [point.step for point in events.Scalars("distill/loss")] == [0, 1, 2, 3, 4]
    assert events.Scalars("cost/candidate_evaluations")[-1].value == 15
    best = [point.value for point in events.Scalars("eval/ConvNet-1-W4/accuracy_best")]
    assert best == pytest.approx([max(p.value for p in curve[: i + 1]) for i in range(4)])
    assert events.Tags()["images"] == ["synthetic"]
    assert events.Scalars("hp/ConvNet-1-W4/accuracy_last")[-1].value == pytest.approx(curve[-1].value)
    file = load_synthetic(run / "synthetic.safetensors")
    assert (file.step, file.dataset, file.config["model"]["ipc"]) == (5, "digits", 1)
    assert (run / "synthetic.png").read_bytes().startswith(b"\x89PNG")
    assert yaml.safe_load((run / "config.yaml").read_text())["selection"]["init_args"]["temperature"] == 0.5
    result = json.loads((run / "summary.json").read_text())
    assert result["networks"]["ConvNet-1-W4"]["last"]["accuracies"] == [float(value) for value in rows[-1][5:]]
    printed = capsys.readouterr().out
    for label in (
        "10 distilled images",
        "10 random real images",
        "full training set",
        "steps",
        "seconds",
        "peak memory",
    ):
        assert label in printed


def test_one_candidate_and_no_evaluation_change_nothing(fit: Fit) -> None:
    base = images(fit("--selection", "null"))
    assert torch.equal(base, images(fit("--selection.num_candidates", "1")))
    assert torch.equal(base, images(fit("--evaluation", "null")))
    assert torch.equal(base, images(fit("--evaluation.every_n_steps", "1", "--evaluation.networks", "[ConvNet-2-W4]")))
    assert not torch.equal(base, images(fit("--seed_everything", "4")))


def test_the_saved_configuration_repeats_the_run(fit: Fit, tmp_path: Path) -> None:
    run = fit("--selection.temperature", "0.1")
    main(["fit", "--config", str(run / "config.yaml"), "--name", "again"])
    assert torch.equal(images(run), images(tmp_path / "runs/again/version_0"))


def test_killed_and_resumed(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = images(fit("--selection.num_candidates", "2"))
    step = DistillationModule.training_step

    def killed(self: DistillationModule, batch: torch.Tensor, batch_idx: int) -> torch.Tensor | None:
        if self.global_step == 3:
            raise RuntimeError("killed")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(DistillationModule, "training_step", killed)
        with pytest.raises(RuntimeError, match="killed"):
            fit("--selection.num_candidates", "2")
    resumed = fit("--selection.num_candidates", "2", "--ckpt_path", "last")
    assert torch.equal(whole, images(resumed))
    curve = EventAccumulator(str(resumed)).Reload().Scalars("eval/ConvNet-1-W4/accuracy")
    assert [point.step for point in curve] == [0, 2, 4, 5]


def test_evaluate_prints_a_row_for_each_network(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    run = fit("--evaluation", "null")
    capsys.readouterr()
    names = ["ConvNet-1-W4", "ConvNet-2-W4"]
    main(["evaluate", str(run / "synthetic.safetensors"), "--networks", *names, "--num_networks", "2"])
    found = re.findall(r"(ConvNet-\d-W4) .*\d\.\d ± \d+\.\d %", capsys.readouterr().out)
    assert found == names


def test_evaluate_repeats_the_protocol_of_a_run(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    run = fit("--evaluation.augmentation", "none", "--evaluation.compare_random", "false")
    last = json.loads((run / "summary.json").read_text())["networks"]["ConvNet-1-W4"]["last"]["accuracies"]
    capsys.readouterr()
    same = ["--epochs", "2", "--augmentation", "none", "--num_networks", "2", "--seed", "3"]
    main(["evaluate", str(run / "synthetic.safetensors"), *same])
    assert percent(last) in capsys.readouterr().out


@pytest.mark.parametrize("command", [[], ["fit"], ["experts"], ["evaluate"]])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        main([*command, "--help"])
    wanted = {"fit": "--selection", "experts": "--num_experts", "evaluate": "--networks"}
    assert (wanted[command[0]] if command else "evaluate") in capsys.readouterr().out


BAD = {
    "temperature 0": (["--selection.temperature", "0"], r"temperature is 0.*above 0"),
    "temperature -1": (["--selection.temperature", "-1"], r"temperature is -1.*above 0"),
    "no candidates": (["--selection.num_candidates", "0"], r"num_candidates is 0.*at least 1"),
    "too many candidates": (["--selection.num_candidates", "5"], r"num_candidates is 5, but the pool holds 4.*lower"),
    "ipc 0": (["--model.ipc", "0"], r"ipc is 0.*at least 1"),
    "ipc beyond a class": (["--model.ipc", "1000"], r"1000"),
    "window": (
        ["--model.pool.init_args.max_start_epoch", "9", "--model.pool.init_args.train_missing", "false"],
        r"too small.*has 2 epochs.*9 epochs",
    ),
    "network": (["--model.network", "Foo-3"], r"Foo-3.*ConvNet"),
    "dataset": (["--data", "Foo"], r"Foo"),
    "recipe": (["--evaluation.recipe", "foo"], r"recipe 'foo'.*mtt"),
    "other network": (["--model.network", "ConvNet-1-W8"], r"ConvNet-1-W4.*ConvNet-1-W8|ConvNet-1-W8.*ConvNet-1-W4"),
    "other recipe": (["--model.pool.init_args.recipe.lr", "0.1"], r"lr.*0\.05.*0\.1|lr.*0\.1.*0\.05"),
    "other data": (["--data", "DigitsDataModule", "--data.val_fraction", "0.5"], r"fingerprint"),
    "run folder": (["--runs", "base.yaml/runs"], r"cannot be written.*--runs"),
    "key": (["--model.foo", "1"], r"foo"),
    "precision": (["--trainer.precision", "bf16-mixed"], r"bf16-mixed.*32-true"),
    "accumulation": (["--trainer.accumulate_grad_batches", "2"], r"accumulate_grad_batches is 2.*1"),
    "loss": (["--model.image_lr", "1e38"], r"not finite at step \d.*lower image_lr"),
    "val": (["--evaluation.split", "val"], r"val_fraction"),
    "checkpoint": (["--ckpt_path", "nowhere.ckpt"], r"nowhere\.ckpt.*no file"),
    "last": (["--ckpt_path", "last", "--name", "new"], r"no run under .*new has a readable checkpoint"),
    "missing data": (
        ["--data", "CIFAR10DataModule", "--data.root", "nowhere", "--data.download", "false"],
        r"/nowhere",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_loses_nothing(
    case: str,
    fit: Fit,
    experts: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags, message = BAD[case]
    before = {path.name: path.read_bytes() for path in experts.iterdir()}
    with pytest.raises(SystemExit) as stop:
        fit(*flags)
    assert stop.value.code in (1, 2)
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert errors[0].startswith("dd-lightning: error: ")
    assert re.search(message, errors[0])
    assert {path.name: path.read_bytes() for path in experts.iterdir()} == before


def test_a_loss_that_is_nan_keeps_the_last_good_checkpoint(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = images(fit())
    score = TrajectoryMatching.score
    calls: list[None] = []

    def broken(self: TrajectoryMatching, *args: Any, **kwargs: Any) -> list[ScoredCandidate]:  # noqa: ANN401
        scored = score(self, *args, **kwargs)
        calls.append(None)
        if len(calls) == 4:
            scored[0].loss.fill_(float("nan"))
        return scored

    with monkeypatch.context() as patch:
        patch.setattr(TrajectoryMatching, "score", broken)
        with pytest.raises(SystemExit):
            fit()
    assert torch.equal(images(fit("--ckpt_path", "last")), whole)


@pytest.mark.parametrize("damage", ["truncated", "foreign"])
def test_a_damaged_store_is_named_and_the_rest_is_kept(
    damage: str, experts: Path, tmp_path: Path, fit: Fit, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in experts.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    victim = copy / "expert_00001.safetensors"
    victim.write_bytes(victim.read_bytes()[:200] if damage == "truncated" else b"something else")
    others = {path.name: path.read_bytes() for path in copy.iterdir()}
    with pytest.raises(SystemExit) as stop:
        fit("--model.pool.init_args.path", str(copy))
    assert stop.value.code == 1
    assert re.search(r"error: .*expert_00001\.safetensors.*delete", capsys.readouterr().err)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == others
    victim.unlink()  # the fix that the message names
    fit("--model.pool.init_args.path", str(copy))
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == {
        path.name: path.read_bytes() for path in experts.iterdir()
    }
