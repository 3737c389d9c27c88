"""The commands, run in this process."""

import csv
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dd_lightning import __version__
from dd_lightning.cli.runs import synthetic_file
from dd_lightning.datamodules import DigitsDataModule
from dd_lightning.functional.errors import InputError
from dd_lightning.module import DistillationModule
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.sets.pictures import image_grid
from dd_lightning.sets.synthetic_file import load_synthetic
from dd_lightning.training import evaluation
from dd_lightning.training.evaluation import EvaluationRecipe, evaluate_synthetic_set, percent
from dd_lightning.training.expert_store import ExpertStore
from tests import small
from tests.small import Cli


def resolved(cli: Cli, number: int = 0) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((cli.version(number) / "config.yaml").read_text())
    return values


def overlay(folder: Path, **values: Any) -> list[str]:  # noqa: ANN401
    path = folder / "overlay.yaml"
    path.write_text(yaml.safe_dump(values))
    return ["--config", str(path)]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    assert events.Tags()["images"] == ["synthetic"]
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_fit_leaves_everything_in_the_runs_folder(cli: Cli) -> None:
    cli.fit("--selection.num_candidates", "3")
    folder = cli.version()
    names = {path.name for path in folder.iterdir()}
    files = {"config.yaml", "metrics.csv", "evaluation.csv", "summary.json", "synthetic.safetensors", "synthetic.png"}
    assert files <= names
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step=6.ckpt"]
    assert sum(name.startswith("events.out.tfevents") for name in names) == 1
    assert cli.err.count("Warning") == cli.err.count("deprecated") == 0
    assert resolved(cli)["selection"]["init_args"]["temperature"] == 0.5
    logged = scalars(folder)
    curve = dict(logged[f"accuracy/{small.NETWORK}"])
    with (folder / "evaluation.csv").open() as file:
        rows = [[float(value) for value in (row[0], row[2], *row[5:])] for row in list(csv.reader(file))[1:]]
    assert [step for step, *_ in rows] == list(curve) == [0, 4, 6]
    for step, mean, *raw in rows:
        assert sum(raw) / 2 == pytest.approx(mean) == pytest.approx(curve[int(step)], abs=1e-6)
    best = [accuracy for _, accuracy in logged[f"evaluation/{small.NETWORK}/best"]]
    assert best == pytest.approx([max(list(curve.values())[: i + 1]) for i in range(3)])
    assert [step for step, _ in logged["distill/loss"]] == [0, 1, 2, 3, 4, 5]
    assert logged["cost/candidate_evaluations"][-1][1] == 18
    wanted = {"distill/student_lr", "cost/seconds", f"evaluation/{small.NETWORK}/std"}
    wanted |= {
        f"selection/{name}" for name in ("loss_rank_1", "loss_rank_3", "entropy", "probability_chosen", "seconds")
    }
    assert wanted <= set(logged)
    result = json.loads((folder / "summary.json").read_text())
    assert result["networks"][small.NETWORK]["last"]["accuracies"] == rows[-1][2:]


def test_synthetic_file_is_the_module(cli: Cli) -> None:
    cli.fit("--model.labels", "soft", "--model.label_lr", "1.0", "--model.ipc", "2")
    file = load_synthetic(cli.version() / "synthetic.safetensors")
    module = DistillationModule.load_from_checkpoint(cli.version() / "checkpoints" / "step=6.ckpt")
    assert torch.equal(file.images, module.synthetic_set.images)
    assert torch.equal(file.labels, module.synthetic_set.targets)
    assert file.lr == file.evaluation_lr == float(module.synthetic_set.student_lr.detach())
    assert (file.step, file.ipc, file.num_classes, file.dataset) == (6, 2, 10, "digits")
    assert (file.label_kind, file.network, file.objective) == ("soft", small.NETWORK, "TrajectoryMatching")
    assert file.config["model"]["ipc"] == 2
    assert file.config["trainer"]["max_steps"] == 6
    grid = image_grid(file.stored_pixels(), 10, names=file.class_names)
    with Image.open(cli.version() / "synthetic.png") as picture:
        assert picture.size == (grid.shape[2], grid.shape[1])


@pytest.mark.parametrize("choice", [[], ["--selection.temperature", "0.1"]], ids=["base", "selection"])
def test_saved_configuration_gives_the_same_images(cli: Cli, choice: list[str]) -> None:
    cli.fit(*choice)
    cli("fit", "--config", str(cli.version() / "config.yaml"), "--name", "again")
    assert small.same(cli.learned(name="again"), cli.learned())


def test_selection_from_one_flag(cli: Cli) -> None:
    cli.fit("--selection.temperature", "0.1")
    cli.fit("--selection.temperature", "0.1", before=tuple(overlay(cli.folder, selection={"num_candidates": 2})))
    cli.fit()
    cli.fit(*overlay(cli.folder, selection={"num_candidates": 2}), "--selection", "null")
    chosen = [resolved(cli, number)["selection"] for number in range(4)]
    arguments = [values["init_args"] for values in chosen[:2]]
    assert [values["temperature"] for values in arguments] == [0.1, 0.1]
    assert [values["num_candidates"] for values in arguments] == [3, 2]
    assert chosen[2:] == [None, None]
    assert small.same(cli.learned(3), cli.learned(2))
    assert not small.same(cli.learned(0), cli.learned(2))


def test_overlay_comes_before_or_after(cli: Cli) -> None:
    overlaid = overlay(cli.folder, selection={"num_candidates": 2, "temperature": 0.2})
    cli.fit(*overlaid)
    cli.fit(before=tuple(overlaid))
    first, second = resolved(cli, 0), resolved(cli, 1)
    assert first == second
    assert first["selection"]["init_args"]["num_candidates"] == 2
    assert small.same(cli.learned(0), cli.learned(1))


def test_one_candidate_and_other_evaluations_leave_the_images_alone(cli: Cli) -> None:
    cli.fit()
    for number, options in enumerate(
        (
            ["--evaluation", "null"],
            ["--evaluation.every_n_steps", "1", "--evaluation.networks", "[ConvNet-2-W4]"],
            ["--selection.num_candidates", "1"],
        )
    ):
        cli.fit(*options)
        assert small.same(cli.learned(0), cli.learned(1 + number))
    assert not (cli.version(1) / "evaluation.csv").exists()
    cli.fit("--seed_everything", "4")
    assert not small.same(cli.learned(0), cli.learned(4))


@pytest.mark.parametrize("choice", [[], ["--selection.temperature", "0.1"]], ids=["base", "selection"])
def test_killed_and_resumed_from_last(cli: Cli, choice: list[str]) -> None:
    cli.fit(*choice, "--name", "whole")
    cli.kill(5, *choice)
    assert [path.name for path in (cli.version(0) / "checkpoints").iterdir()] == ["step=4.ckpt"]
    (cli.version(1) / "checkpoints").mkdir(parents=True)  # a run that died before its first checkpoint
    cut = (cli.version(0) / "checkpoints" / "step=4.ckpt").read_bytes()[:-2000]
    (cli.version(2) / "checkpoints").mkdir(parents=True)
    (cli.version(2) / "checkpoints" / "step=5.ckpt").write_bytes(cut)
    cli.fit(*choice, "--ckpt_path", "last")
    assert resolved(cli, 3)["ckpt_path"] == str(cli.version(0) / "checkpoints" / "step=4.ckpt")
    assert small.same(cli.learned(3), cli.learned(name="whole"))
    assert [step for step, _ in scalars(cli.version(3))[f"accuracy/{small.NETWORK}"]] == [0, 4, 6]
    assert "Warning" not in cli.err
    assert "dirpath has changed" not in cli.err


def test_a_finished_run_is_extended(cli: Cli) -> None:
    cli.fit("--trainer.max_steps", "8", "--name", "whole")
    cli.fit()
    cli.fit("--trainer.max_steps", "7", "--ckpt_path", "last")
    cli.fit("--trainer.max_steps", "8", "--ckpt_path", "last")
    assert small.same(cli.learned(2), cli.learned(name="whole"))


def test_a_finished_run_resumed_keeps_its_results(cli: Cli) -> None:
    cli.fit()
    cli.fit("--ckpt_path", "last")
    assert re.search(r"steps +│ 6; 6 candidates evaluated", cli.out)


def test_closing_table(cli: Cli) -> None:
    cli.fit("--selection.num_candidates", "2")
    rows = dict(re.findall(r"│ ([^│]+?) +│ ([^│]+?) +│", cli.out))
    with (cli.version() / "evaluation.csv").open() as file:
        last = [float(value) for value in file.read().splitlines()[-1].split(",")[5:]]
    how = f"step 6; 2 fresh {small.NETWORK}, held-out test data"
    assert rows["10 distilled images"] == f"{percent(last)}  ({how})"
    assert re.match(
        r"[\d.]+ ± [\d.]+ %  \(5 draws, a network each, same recipe; distilled is [+-][\d.]+ points\)",
        rows["10 random real images"],
    )
    assert re.match(r"[\d.]+ ± [\d.]+ %  \(4 experts after 3 epochs\)", rows["full training set"])
    assert rows["steps"] == "6; 12 candidates evaluated"
    assert re.match(r"\d+  \(\d+ evaluating\)", rows["seconds"])
    assert re.match(r"[\d,]+ MiB \(process, cpu\)", rows["peak memory"])
    assert rows["files"] == str(cli.version())


def test_several_validations_are_reported_apart(cli: Cli) -> None:
    cli.fit("--evaluation.recipe", "idc", "--evaluation.epochs", "4", "--trainer.max_steps", "1")
    rows = dict(re.findall(r"│ ([^│]+?) +│ ([^│]+?) +│", cli.out))
    result = json.loads((cli.version() / "summary.json").read_text())
    last = result["networks"][small.NETWORK]["last"]
    assert last["validations"] == 4
    assert all(best >= own for best, own in zip(last["best_validation"], last["accuracies"], strict=True))
    assert result["random_real"]["draws"] == len(result["random_real"]["best_validation"]) == 5
    assert rows["10 distilled images"].startswith(percent(last["accuracies"]))
    assert rows["best of 4 validations"] == f"{percent(last['best_validation'])}  (step 1; chosen on the same data)"

    path = cli.version() / "synthetic.safetensors"
    cli("evaluate", str(path), "--recipe", "idc", "--epochs", "4", "--num_networks", "2", "--seed", "3")
    (row,) = re.findall(r"│ (\S+) +│ (\d+) +│ ([^│]+?) +│ ([^│]+?) +│ (\d+) +│", cli.out)
    assert row[:4] == (small.NETWORK, "2", percent(last["accuracies"]), percent(last["best_validation"]))
    headings = " ".join(cli.out.replace("┃", " ").split())
    assert "best of 4" in headings
    assert "chosen on" in headings


def test_missing_experts_are_trained_and_counted(cli: Cli) -> None:
    cli.fit("--model.pool.path", str(cli.folder / "new"), "--trainer.max_steps", "1", "--evaluation", "null")
    assert ExpertStore(cli.folder / "new").ids() == list(range(small.EXPERTS))
    # the same recipe gives the same experts
    assert small.contents(cli.folder / "new") == small.contents(cli.store)
    assert re.search(r"seconds +│ \d+  \(\d+ training experts before\)", cli.out)


def test_experts_trains_continues_and_then_does_nothing(cli: Cli) -> None:
    options = ["--network", small.NETWORK, "--path", "experts", "--recipe.lr", "0.05", "--device", "cpu"]
    options += ["--data", "DigitsDataModule"]
    cli("experts", *options, "--num_experts", "2", "--epochs", "2")
    assert cli.out.splitlines()[-1] == f"2 experts in {cli.folder / 'experts'}"
    assert small.contents(cli.folder / "experts").keys() == {f"expert_0000{i}.safetensors" for i in range(2)}
    cli("experts", *options, "--num_experts", "3", "--epochs", "3")
    once = small.contents(cli.folder / "experts")
    times = [path.stat().st_mtime_ns for path in sorted((cli.folder / "experts").iterdir())]
    store = ExpertStore(cli.folder / "experts")
    assert [store.epochs(i) for i in store.ids()] == [3, 3, 3]
    cli("experts", *options, "--num_experts", "3", "--epochs", "3")
    assert small.contents(cli.folder / "experts") == once
    assert [path.stat().st_mtime_ns for path in sorted((cli.folder / "experts").iterdir())] == times
    # fit uses what experts stored
    assert small.contents(cli.store).keys() >= once.keys()
    assert once == {name: content for name, content in small.contents(cli.store).items() if name in once}


def test_precision_compile_and_pieces_of_experts_are_options(cli: Cli) -> None:
    options = ["--network", small.NETWORK, "--num_experts", "1", "--epochs", "1", "--device", "cpu"]
    options += ["--recipe.lr", "0.05", "--data", "DigitsDataModule"]
    low = ["--path", "low", "--recipe.precision", "bfloat16"]
    cli("experts", *options, *low, "--execution.compile", "auto", "--execution.micro_batch", "32")
    written = ExpertStore(cli.folder / "low")
    assert written.metadata(0).identity.recipe["precision"] == "bfloat16"
    before = small.contents(cli.folder / "low")
    first = cli.store / "expert_00000.safetensors"
    assert before["expert_00000.safetensors"] != first.read_bytes()
    # fit reads and trains the same ones
    recipe = ["--model.pool.recipe.precision", "bfloat16", "--model.pool.execution.micro_batch", "32"]
    more = ["--model.pool.num_experts", "2", "--model.pool.max_start_epoch", "1", "--selection", "null"]
    cli.fit("--model.pool.path", "low", *recipe, *more, "--trainer.max_steps", "1", "--evaluation", "null")
    assert written.ids() == [0, 1]
    after = small.contents(cli.folder / "low")
    assert {name: after[name] for name in before} == before
    line = cli.fit_refused("--model.pool.path", "low", *more)
    assert "recipe.precision = 'bfloat16', this run has None" in line


def test_early_points_cost_less_and_the_table_says_so(cli: Cli) -> None:
    cli.fit("--evaluation.num_networks_intermediate", "1")
    with (cli.version() / "evaluation.csv").open() as file:
        assert [row["num_networks"] for row in csv.DictReader(file)] == ["1", "1", "2"]
    result = json.loads((cli.version() / "summary.json").read_text())["networks"][small.NETWORK]
    assert (result["last"]["step"], len(result["last"]["accuracies"])) == (6, 2)
    best = result["best"]
    of = "; of 1 network" * (len(best["accuracies"]) == 1)
    assert f"{percent(best['accuracies'])}  (step {best['step']}{of})" in cli.out


def test_evaluate_prints_what_the_function_returns(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    cli.fit()
    recipe = EvaluationRecipe(epochs=3)
    monkeypatch.setitem(evaluation.RECIPES, "mtt", recipe)
    networks = [small.NETWORK, "ConvNet-2-W4"]
    path = cli.version() / "synthetic.safetensors"
    options = ["--recipe", "mtt", "--num_networks", "3", "--seed", "2", "--device", "cpu"]
    cli("evaluate", str(path), "--networks", *networks, *options)
    rows = re.findall(r"│ (\S+) +│ (\d+) +│ ([^│]+?) +│ (\d+) +│", cli.out)
    file, data = load_synthetic(path), DigitsDataModule()
    assert file.lr is not None
    expected = []
    for name in networks:
        network = FunctionalNetwork(name, data.image_shape, data.num_classes)
        result = evaluate_synthetic_set(file.images, file.labels, file.lr, data.test, network, recipe, 3, 2)
        expected.append((name, "3", percent(result.accuracies)))
    assert [row[:3] for row in rows] == expected
    cli("evaluate", str(path), "--device", "cpu", "--num_networks", "1")
    assert [row[0] for row in re.findall(r"│ (\S+) +│ (\d+) +│", cli.out)] == [small.NETWORK]


def test_evaluate_repeats_the_protocol_of_a_run(cli: Cli) -> None:
    cli.fit("--evaluation.augmentation", "none", "--evaluation.compare_random", "false")
    last = (cli.version() / "evaluation.csv").read_text().splitlines()[-1].split(",")
    explicit = ["--recipe", "mtt", "--epochs", "2", "--augmentation", "none"]
    for place, options in (("synthetic.safetensors", explicit), (".", []), ("..", ["--execution.micro_batch", "null"])):
        # two networks with the run's seed; its recipe is in the file
        cli("evaluate", str(cli.version() / place), *options, "--num_networks", "2", "--seed", "3")
        assert percent([float(value) for value in last[5:]]) in cli.out


def test_evaluate_takes_the_newest_set_of_a_folder(tmp_path: Path) -> None:
    for version in (2, 9, 10):
        (tmp_path / f"version_{version}").mkdir()
    for version in (2, 9):
        (tmp_path / f"version_{version}" / "synthetic.safetensors").touch()
    assert synthetic_file(tmp_path).parent.name == "version_9"
    assert synthetic_file(tmp_path / "version_2").parent.name == "version_2"
    assert synthetic_file(tmp_path / "missing") == tmp_path / "missing"
    with pytest.raises(InputError, match="version_10 holds no synthetic"):
        synthetic_file(tmp_path / "version_10")


def help_of(cli: Cli, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        cli(*arguments)
    assert stopped.value.code in (0, None)
    assert cli.err == ""
    return cli.out


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (
            "fit",
            "--config --name --runs --ckpt_path --selection --evaluation --model.objective --model.pool --model.ipc "
            "--model.network --data --writer.every_n_steps --trainer.max_steps",
        ),
        ("experts", "--config --network --path --num_experts --epochs --data --recipe.lr --device"),
        ("evaluate", "file --config --networks --num_networks --recipe --data --root --seed --device"),
    ],
)
def test_help(cli: Cli, command: str, options: str) -> None:
    shown = help_of(cli, command, "--help")
    assert [option for option in options.split() if option not in shown] == []
    for class_name in ("DigitsDataModule", "CIFAR100DataModule"):
        assert class_name in shown[shown.index("--data.help CLASS") :]


def test_help_of_fit_is_short_and_ours_comes_first(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = help_of(cli, "fit", "--help")
    assert len(shown.splitlines()) < 400
    assert max(map(len, shown.splitlines())) < 120
    places = [
        shown.index(key) for key in ("--name", "--selection", "--model.ipc", "--data ", "--checkpoint.", "--trainer.")
    ]
    assert places == sorted(places)
    assert "torch.nn" not in shown
    assert "lightning.pytorch" not in shown
    assert re.search(r"--model\.network NETWORK.*?\(type: str, default: ConvNet-3\)", shown, re.DOTALL)
    index = shown[shown.index("A class has options") :]
    for option in ("model.objective", "model.pool", "data", "selection", "evaluation", "trainer.callbacks"):
        assert f"--{option}.help CLASS" in index
    assert "--model.pool.recipe.batch_size" in help_of(cli, "fit", "--model.pool.help", "NetworkPool")


def test_general_help_and_version(cli: Cli) -> None:
    for arguments in ([], ["-h"], ["--help"]):
        cli(*arguments)
        assert all(re.search(rf"^  {command} +\w", cli.out, re.MULTILINE) for command in ("fit", "experts", "evaluate"))
    cli("--version")
    assert cli.out == f"dd-lightning {__version__}\n"


def test_a_module_of_the_current_folder_can_be_named(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(cli.folder))])
    (cli.folder / "here.py").write_text("def wrong(channels, num_classes, image_size):\n    return 3\n")
    assert "here" in cli.fit_refused("--model.network", "here.wrong", "--trainer.max_steps", "1")
