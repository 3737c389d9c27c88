"""`dd-lightning report` on folders of runs that are written by hand."""

import csv
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from dd_lightning.cli.main import main
from dd_lightning.cli.report import report
from dd_lightning.cli.report.figure import _STYLES
from dd_lightning.cli.report.results import results
from dd_lightning.cli.report.runs import compare_runs, find_runs
from dd_lightning.cli.report.tables import PUBLISHED, paper_table
from dd_lightning.datamodules import DigitsDataModule
from dd_lightning.functional.errors import InputError
from dd_lightning.sets.synthetic_file import save_synthetic
from dd_lightning.training.evaluation import mean_std
from tests import small
from tests.sets.test_synthetic_file import example
from tests.small import Cli

ROOT = Path(__file__).resolve().parents[2]
NETWORK = "ConvNet-3"
SELECTION = {"class_path": "dd_lightning.TrajectorySelectionCallback", "init_args": {"temperature": 0.5}}
BASE = {0: (0.2, 0.4), 10: (0.5, 0.7), 20: (0.75, 0.85)}
FAST = {0: (0.2, 0.4), 10: (0.75, 0.8), 20: (0.8, 0.84)}

Points = Mapping[int, Sequence[float]]


def write_run(
    folder: Path,
    points: Points = BASE,
    *,
    seed: int = 0,
    selects: bool = False,
    finished: bool = True,
    networks: Mapping[str, Points] | None = None,
    **options: Any,  # noqa: ANN401
) -> Path:
    """Write the files of a run of 20 steps, two networks per point; of the options, ``__`` stands for a dot."""
    folder.mkdir(parents=True)
    config: dict[str, Any] = {
        "seed_everything": seed,
        "name": folder.name,
        "selection": SELECTION if selects else None,
        "evaluation": {"class_path": "dd_lightning.EvalCallback", "init_args": {"every_n_steps": 10, "split": "test"}},
        "model": {
            "objective": {"class_path": "dd_lightning.TrajectoryMatching", "init_args": {"syn_steps": 20}},
            "pool": {"class_path": "dd_lightning.TrajectoryPool", "init_args": {"path": f"experts/{folder.name}"}},
            "network": NETWORK,
            "ipc": 1,
            "image_lr": 100.0,
            "seed": None,
        },
        "data": {"class_path": "dd_lightning.cifar10DataModule", "init_args": {"root": "data"}},
        "writer": {"every_n_steps": seed + 5},
        "trainer": {"max_steps": 20, "accelerator": "cpu"},
    }
    for key, value in options.items():
        *groups, name = key.split("__")
        place = config
        for group in groups:
            place = place[group]
            place = place.get("init_args", place)
        place[name] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with (folder / "evaluation.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", "network", "mean", "std", "seconds", "accuracy_0", "accuracy_1"])
        for network, curve in (networks or {NETWORK: points}).items():
            for step, values in curve.items():
                writer.writerow([step, network, "", "", 1.0, *values, *[""] * (2 - len(values))])
    per_step = 3 if selects else 1
    rows = ["cost/candidate_evaluations,cost/seconds,selection/entropy,step", f"{per_step},0.1,,0", ",,1.0,5"]
    rows += [f"{per_step * (step + 1)},{step * (1 + seed) * per_step},,{step}" for step in (5, 10, 15)]
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    Image.new("L", (8, 8), 255 * selects).save(folder / "synthetic.png")
    if finished:
        result = {
            "steps": 20,
            "seconds": 20.0 * (1 + seed) * per_step,
            "candidate_evaluations": 20 * per_step,
            "device": "cuda:0" if selects else "cpu",
            "peak_memory_bytes": 3 * 2**20 + seed,
            "random_real": {"network": NETWORK, "accuracies": [0.1 + seed / 10, 0.2 + seed / 10]},
        }
        (folder / "summary.json").write_text(json.dumps(result))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two seeds of each; the second one is .1 better at step 10, and takes twice as long."""
    for selects, points in ((False, BASE), (True, FAST)):
        for seed in (0, 1):
            better = points | {10: [value + 0.1 * seed for value in points[10]]}
            write_run(tmp_path / f"runs/{['a', 'b'][selects]}/version_{seed}", better, seed=seed, selects=selects)
    return tmp_path / "runs"


def refused(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 1) -> str:
    """Run a report that must fail with one line and leave nothing, and return that line."""
    with pytest.raises(SystemExit) as stopped:
        main(["report", *map(str, arguments), "--out", "left"])
    assert stopped.value.code == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("dd-lightning: error: ")
    assert err.count("\n") == 1
    assert not Path("left").exists()
    return err


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_numbers(runs: Path, tmp_path: Path) -> None:
    found = report([runs], tmp_path / "out")
    assert found == json.loads((tmp_path / "out/report.json").read_text())
    (comparison,) = found["comparisons"]
    base, fast = comparison["arms"]
    assert comparison["title"] == "MTT, cifar10, 1 image per class, ConvNet-3"
    assert [arm["label"] for arm in comparison["arms"]] == ["base", "DynaDistill"]
    # means of base: .3, (.6 + .7) / 2, .8
    assert base["curve"]["mean"] == pytest.approx([0.3, 0.65, 0.8])
    assert base["curve"]["std"] == pytest.approx([0, 0.05, 0])
    assert base["curve"]["seconds"] == pytest.approx([0, 15, 30])
    assert fast["curve"]["evaluations"] == pytest.approx([0, 30, 60])
    assert comparison["base_peak"] == pytest.approx({"accuracy": 0.8, "step": 20, "threshold": 0.76})
    assert [base["to_95"][axis]["mean_curve"] for axis in ("steps", "seconds", "evaluations")] == [20, 30, 20]
    assert [fast["to_95"][axis]["mean_curve"] for axis in ("steps", "seconds", "evaluations")] == [10, 45, 30]
    (ratios,) = comparison["ratios"]
    assert [ratios[axis]["ratio"] for axis in ("steps", "seconds", "evaluations")] == pytest.approx([2, 2 / 3, 2 / 3])
    assert (ratios["seconds"]["base"], ratios["seconds"]["other"]) == ([20, 40], [30, 60])
    assert base["last"][NETWORK] == pytest.approx(
        {"step": 20, "mean": 0.8, "std_seeds": 0, "std_networks": 0.05, "seeds": 2, "networks": 2}
    )
    assert base["random_real"]["mean"] == pytest.approx(0.2)
    assert base["random_real"]["std_seeds"] == pytest.approx(0.05)
    assert base["peak_memory_bytes"] == 3 * 2**20 + 1
    assert "They are of different devices: cpu, cuda:0." in (tmp_path / "out/report.md").read_text()


def test_files(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["report", str(runs), "--out", "out"])
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines()[-1] == str(Path("out/report.html").resolve())
    pictures = {f"set_1_{arm}_seed_{seed}.png" for arm in (1, 2) for seed in (0, 1)}
    written = {path.name for path in Path("out").iterdir()}
    assert written == {"report.html", "report.md", "report.json", "figure_1.png", "figure_1.svg"} | pictures
    page, text = Path("out/report.html").read_text(), Path("out/report.md").read_text()
    addresses = re.findall(r"(?:src|href)\s*=\s*[\"']?([^\"'> ]{12})|url\(|@import|<script|<link", page)
    assert set(addresses) == {"data:image/s", "data:image/p"}
    assert len(addresses) == 1 + 4
    for target in re.findall(r"!\[[^]]*\]\(([^)]*)\)", text):
        assert Path("out", target).is_file()
    for shown in ("80.0", "best-on-test", "seed 0: 20 / 10; seed 1: 20 / 10", "20.0 ± 5.0", "49.63"):
        assert shown in page
        assert shown in text
    with Image.open("out/figure_1.png") as image:
        assert image.size == (1760, 640)
    first = {path: path.read_bytes() for path in Path("out").iterdir()}
    main(["report", str(runs), "--out", "out"])
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == first


def test_interval_from_five_seeds_on(tmp_path: Path) -> None:
    for seed in range(5):
        for selects, points in ((False, BASE), (True, FAST)):
            write_run(tmp_path / f"runs/{selects}_{seed}", points, seed=seed, selects=selects)
    (comparison,) = report(["runs"], "out")["comparisons"]
    assert comparison["ratios"][0]["steps"]["interval"] == [2, 2]
    page = Path("out/report.html").read_text()
    assert "95 % interval 2.00 to 2.00 (paired bootstrap over seeds, 2,000 resamples)" in page
    assert "seed 4: " not in page.replace("seed 4: runs", "")


def test_not_reached_is_a_value(tmp_path: Path) -> None:
    write_run(tmp_path / "runs/a")
    write_run(tmp_path / "runs/b", {0: (0.3,), 10: (0.5,), 20: (0.75,)}, selects=True)
    found = report(["runs"], "out")["comparisons"][0]
    assert found["arms"][1]["to_95"]["steps"] == {"mean_curve": None, "seeds": [None]}
    assert found["ratios"][0]["steps"]["ratio"] == 0
    assert "seed 0: 20 / not reached" in Path("out/report.md").read_text()


def test_without_a_base_nothing_is_marked(tmp_path: Path) -> None:
    write_run(tmp_path / "runs/b", selects=True)
    found = report(["runs"], "out")["comparisons"][0]
    assert (found["base_peak"], found["ratios"], found["arms"][0]["to_95"]) == (None, [], {})
    assert "There is no run of the base method" in Path("out/report.md").read_text()


def grouped(*paths: Path) -> list[tuple[str, list[tuple[str, list[int]]]]]:
    runs, left_out = find_runs(paths)
    comparisons = compare_runs(runs, left_out)
    return [(each.title, [(arm.label, [run.seed for run in arm.runs]) for arm in each.arms]) for each in comparisons]


@pytest.mark.parametrize(
    "options",
    [
        {"name": "other", "seed_everything": 7},
        {"model__seed": 7},
        {"writer__every_n_steps": 1, "seed_everything": 7},
        {"model__pool__path": "elsewhere", "data__root": "elsewhere", "seed_everything": 7},
        {"evaluation__every_n_steps": 5, "evaluation__compare_random": False, "seed_everything": 7},
        {"trainer__accelerator": "gpu", "trainer__log_every_n_steps": 3, "seed_everything": 7},
        {"model__execution": {"compile": "on", "micro_batch": 3}, "seed_everything": 7},
    ],
    ids=lambda options: " ".join(options),
)
def test_what_does_not_change_the_result_does_not_split(tmp_path: Path, options: dict[str, Any]) -> None:
    write_run(tmp_path / "runs/a")
    write_run(tmp_path / "runs/b", **options)
    ((_, arms),) = grouped(tmp_path / "runs")
    assert arms == [("base", [0, 7])]


def test_other_selections_and_steps_share_a_figure(tmp_path: Path) -> None:
    colder = SELECTION | {"init_args": {"temperature": 0.1}}
    write_run(tmp_path / "runs/a")
    write_run(tmp_path / "runs/b", selects=True)
    write_run(tmp_path / "runs/c", selection=colder)
    ((_, arms),) = grouped(tmp_path / "runs")
    assert arms == [("base", [0]), ("DynaDistill (temperature 0.1)", [0]), ("DynaDistill (temperature 0.5)", [0])]
    write_run(tmp_path / "more/d", trainer__max_steps=40)
    ((_, arms),) = grouped(tmp_path / "runs/a", tmp_path / "more")
    assert arms == [("base (max_steps 20)", [0]), ("base (max_steps 40)", [0])]


@pytest.mark.parametrize(
    ("objective", "labels", "method"),
    [
        ("dd_lightning.TrajectoryMatching", "hard", "MTT"),
        ("dd_lightning.objectives.trajectory_matching.TrajectoryMatching", "soft", "DATM"),
        ("dd_lightning.BidirectionalMatching", "soft", "DREAM+"),
        ("mine.LogitMatching", "hard", "LogitMatching"),
    ],
)
def test_methods_go_by_their_objective(tmp_path: Path, objective: str, labels: str, method: str) -> None:
    write_run(tmp_path / "runs/a", model__objective={"class_path": objective}, model__labels=labels)
    ((title, _),) = grouped(tmp_path / "runs")
    assert title.startswith(f"{method}, ")


def test_other_options_have_another_figure(tmp_path: Path) -> None:
    write_run(tmp_path / "runs/a")
    write_run(tmp_path / "runs/b", model__image_lr=10.0)
    write_run(tmp_path / "runs/c", model__ipc=10, model__objective={"class_path": "x.GradientMatching"})
    titles = [title for title, _ in grouped(tmp_path / "runs")]
    mtt = "MTT, cifar10, 1 image per class, ConvNet-3"
    assert titles == [
        "IDC, cifar10, 10 images per class, ConvNet-3",
        f"{mtt} (image_lr 10.0)",
        f"{mtt} (image_lr 100.0)",
    ]


def test_a_run_that_was_resumed_counts_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "runs/version_2", {0: (0.3,), 10: (0.5,)}, finished=False)
    write_run(tmp_path / "runs/version_10", ckpt_path="runs/version_2/checkpoints/step=10.ckpt")
    main(["report", "runs", "runs/version_2", "--out", "out"])
    found = json.loads(Path("out/report.json").read_text())
    assert found["comparisons"][0]["arms"][0]["runs"] == [{"folder": "runs/version_10", "seed": 0, "state": "finished"}]
    (line,) = capsys.readouterr().err.splitlines()
    assert "runs/version_2 is left out: runs/version_10, of the same options and seed, got further" in line
    assert line.removeprefix("dd-lightning: ") in Path("out/report.html").read_text()


def test_unfinished_runs_count_as_far_as_they_got_and_are_named(tmp_path: Path) -> None:
    write_run(tmp_path / "runs/a")
    write_run(tmp_path / "runs/b", {0: (0.5,), 10: (0.9,)}, seed=1, finished=False)
    Path("runs/b/metrics.csv").unlink()  # a run of less than 100 steps has not written it
    (arm,) = report(["runs"], "out")["comparisons"][0]["arms"]
    assert arm["curve"]["mean"] == pytest.approx([0.4, 0.75, 0.8])
    assert arm["curve"]["seeds"] == [2, 2, 1]
    assert arm["curve"]["seconds"] == [0, 10, 20]
    assert (arm["last"][NETWORK]["step"], arm["last"][NETWORK]["seeds"]) == (20, 1)
    assert "Not finished, but counted: runs/b (unfinished: step 10 of 20)" in Path("out/report.md").read_text()


def test_runs_without_a_point_are_left_out_below_a_folder_and_refused_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "runs/a")
    (write_run(tmp_path / "runs/b", seed=1) / "evaluation.csv").unlink()
    found = report(["runs"], "out")
    assert found["left_out"] == ["runs/b is left out: it has no evaluated step"]
    assert "runs/b has no evaluated step" in refused(capsys, "runs/b")
    Path("runs/a/evaluation.csv").unlink()
    assert "no run in runs has an evaluated step" in refused(capsys, "runs")


def test_bad_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    Path("file").touch()
    write_run(tmp_path / "runs/a")
    assert "empty holds no run" in refused(capsys, "runs", "empty")
    assert "nowhere is no folder" in refused(capsys, "runs", "nowhere")
    assert "file is a file" in refused(capsys, "file")
    refused(capsys, status=2)
    Path("left").touch()
    with pytest.raises(InputError, match="cannot write left"):
        report(["runs"], "left")


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("metrics.csv", "cost/seconds,step\n1.0,10\n2.0", "line 3 is torn"),
        ("metrics.csv", "cost/seconds,step\n1.0,10\n2.0,20", "line 3 is torn"),
        ("metrics.csv", "cost/seconds,step\n1.0,10\n2.x,20\n", "'2.x'"),
        ("metrics.csv", "cost/seconds\n1.0\n", "no column step"),
        ("metrics.csv", b"\xff\xfe\x00", "decode"),
        ("evaluation.csv", "step,network,accuracy_0\n0,N\n", "line 2 is torn"),
        ("evaluation.csv", "step,network\n0,N\n", "no column accuracy_0"),
        ("evaluation.csv", "step,network,accuracy_0\n", "no evaluated step"),
        ("evaluation.csv", "", "no evaluated step"),
        ("config.yaml", "a: [", "config.yaml"),
        ("config.yaml", "text", "no mapping"),
        ("config.yaml", None, "config.yaml"),
        ("summary.json", '{"steps": 2', "summary.json"),
        ("summary.json", '{"steps": "2"}', "no mapping with steps"),
        ("synthetic.safetensors", "torn", "damaged"),
    ],
)
def test_damaged_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str | bytes | None, told: str
) -> None:
    write_run(tmp_path / "runs/a")
    file = write_run(tmp_path / "runs/b", seed=1) / name
    if text is None:
        file.unlink()
    else:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    line = refused(capsys, "runs")
    assert told in line
    assert "runs/b" in line


@pytest.mark.parametrize("change", [{"dataset": "cars"}, {"fingerprint": "fedcba9876543210"}])
def test_other_data_in_one_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any]) -> None:
    save_synthetic(write_run(tmp_path / "runs/a") / "synthetic.safetensors", example())
    other = write_run(tmp_path / "runs/b", selects=True, data__root="elsewhere")
    save_synthetic(other / "synthetic.safetensors", example())
    ((title, _),) = grouped(tmp_path / "runs")
    assert title == "MTT, digits, 1 image per class, ConvNet-2"
    save_synthetic(other / "synthetic.safetensors", replace(example(), **change))
    line = refused(capsys, "runs")
    assert "runs/a" in line
    assert "runs/b" in line
    assert f"{next(iter(change.values()))}; report them apart" in line


def test_without_matplotlib(runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert 'pip install "dd_lightning[report]"' in refused(capsys, runs)


def test_tables_of_the_paper(tmp_path: Path) -> None:
    far = {NETWORK: BASE, "ResNet-10": {20: (0.4, 0.6)}}
    write_run(tmp_path / "runs/a", data="cifar100DataModule", networks=far)
    write_run(tmp_path / "runs/b", model__network="ConvNet-3-W16")  # not the paper's network
    write_run(tmp_path / "runs/c", model__ipc=10, selects=True)
    write_run(tmp_path / "runs/d", data="svhnDataModule", model__labels="soft")
    runs, left_out = find_runs(["runs"])
    found = results(compare_runs(runs, left_out), left_out, {})["comparisons"]
    one, two = ([heading, *rows] for heading, rows in (paper_table(table, found) for table in PUBLISHED["tables"]))
    assert one[0][2:] == [f"CIFAR-{size}, {ipc}" for size in (10, 100) for ipc in (1, 10, 50)] + ["svhn, 1"]
    assert one[1] == ["MTT", "published", "46.2", "65.4", "71.6", "24.3", "39.7", "47.7", ""]
    assert one[2] == ["", "paper", "49.63", "64.16", "72.49", "33.13", "", "", ""]
    assert one[3] == ["", "ours", "", "", "", "80.0 (n=1, step 20)", "", "", ""]
    assert one[5] == ["", "ours", "", "80.0 (n=1, step 20)", "", "", "", "", ""]
    assert ["", "ours", *[""] * 6, "80.0 (n=1, step 20)"] in one  # of DATM, which is not in the paper
    assert two[1] == ["MTT", "paper", "33.13", "25.38", "25.19"]
    assert two[2] == ["", "ours", "80.0 (n=1, step 20)", "50.0 (n=1, step 20)", ""]
    assert len([row for row in two if row[0] == "DREAM+ + DynaDistill"]) == 1


def test_other_networks_of_the_evaluate_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"trained_on": "distilled", "network": "ResNet-10", "accuracies": [0.2, 0.4]},
        {"trained_on": "distilled", "network": NETWORK, "accuracies": [0.0, 0.0]},  # the run's own
        {"trained_on": "random", "network": "VGG-11", "accuracies": [0.1, 0.1]},
    ]
    file = write_run(tmp_path / "runs/a") / "evaluate.json"
    file.write_text(json.dumps({"set": {"step": 20}, "measured": rows}))
    write_run(tmp_path / "runs/b", seed=1)
    last = report(["runs"], "out")["comparisons"][0]["arms"][0]["last"]
    assert list(last) == [NETWORK, "ResNet-10"]
    assert (last[NETWORK]["mean"], last["ResNet-10"]["mean"]) == pytest.approx((0.8, 0.3))
    assert (last["ResNet-10"]["step"], last["ResNet-10"]["seeds"]) == (20, 1)
    file.write_text(json.dumps({"measured": rows}))
    assert "runs/a/evaluate.json: KeyError('set')" in refused(capsys, "runs")


def test_readme_says_what_the_report_says() -> None:
    """README's table of methods and the report have one source."""
    tables = PUBLISHED["tables"][0]["methods"]
    rows = [line.split("|")[1:-1] for line in (ROOT / "README.md").read_text().splitlines() if "](configs/" in line]
    rows = [[cell.strip() for cell in row] for row in rows if len(row) == 6]
    assert {re.findall(r"\[(.*?)\]", row[0])[0] for row in rows} == set(tables)
    for name, _, *columns, _ in rows:
        numbers = tables[re.findall(r"\[(.*?)\]", name)[0]]
        for cell, key in zip(columns, ("published", "paper", "paper + DynaDistill"), strict=True):
            known = numbers.get(key, [None] * 3)[:3]
            shown = [None if not each[:1].isdigit() else float(each) for each in cell.split(" / ")]
            assert (shown if cell else [None] * 3) == known, (name, key)


def test_no_two_curves_look_alike_in_black_and_white() -> None:
    assert all(len({style[i] for style in _STYLES}) == len(_STYLES) for i in (0, 1, 3))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_real_runs_of_three_seeds(cli: Cli) -> None:
    """In miniature: `fit` in a loop over seeds, without and with selection, and their report."""
    for name, options in (("base", ()), ("dyna", ("--selection.num_candidates", "2"))):
        for seed in range(3):
            cli.fit("--name", name, "--seed_everything", str(seed), "--trainer.max_steps", "4", *options)
    cli("report", "runs", "--out", "out", "--per_class", "1")
    (comparison,) = json.loads((cli.folder / "out/report.json").read_text())["comparisons"]
    assert comparison["title"] == f"MTT, digits, 1 image per class, {small.NETWORK}"
    arms = comparison["arms"]
    assert [[run["seed"] for run in arm["runs"]] for arm in arms] == [[0, 1, 2]] * 2
    assert [arm["curve"]["steps"] for arm in arms] == [[0, 4]] * 2
    assert [arm["curve"]["evaluations"] for arm in arms] == [[0, 4], [0, 8]]
    for arm, name in zip(arms, ("base", "dyna"), strict=True):
        summaries = [json.loads((cli.version(seed, name) / "summary.json").read_text()) for seed in range(3)]
        own = [mean_std(each["networks"][small.NETWORK]["last"]["accuracies"])[0] for each in summaries]
        assert arm["last"][small.NETWORK]["mean"] == pytest.approx(mean_std(own)[0])
        assert arm["last"][small.NETWORK]["std_seeds"] == pytest.approx(mean_std(own)[1])
        assert arm["curve"]["seconds"][1] == pytest.approx(mean_std([each["seconds"] for each in summaries])[0])
        assert list(arm["per_class"]) == [str(digit) for digit in range(10)]


def test_accuracy_by_class_is_that_of_the_runs_own_networks(cli: Cli) -> None:
    cli.fit("--trainer.max_steps", "1")
    cli("report", str(cli.version()), "--out", "out", "--per_class", "2")
    (arm,) = json.loads((cli.folder / "out/report.json").read_text())["comparisons"][0]["arms"]
    data = DigitsDataModule()
    data.setup()
    counts = data.test.class_counts
    total = sum(count * arm["per_class"][str(label)]["mean"] for label, count in enumerate(counts))
    assert total / sum(counts) == pytest.approx(arm["last"][small.NETWORK]["mean"])
    assert "| class, 2 fresh networks per set | base, % |" in (cli.folder / "out/report.md").read_text()
