"""Configurations: packaged ones by name, those of earlier versions, and what a wheel holds."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from dd_lightning.cli.configs import RENAMED, current_names, find_config
from dd_lightning.cli.fit import DistillationCLI
from tests.small import Cli

ROOT = Path(__file__).resolve().parents[2]
RESOLVED = sorted((Path(__file__).parent / "resolved").glob("*.yaml"))
"""Written by commit b32ae44: the config.yaml of a run of each method, and what `experts --print_config` printed."""
METHODS = [path for path in RESOLVED if path.stem != "experts"]


def parsed(cli: Cli, *arguments: str) -> dict[str, Any]:
    with pytest.raises(SystemExit) as stopped:
        cli(*arguments, "--print_config")
    assert stopped.value.code == 0
    values: dict[str, Any] = yaml.safe_load(cli.out)
    return values


@pytest.mark.parametrize(
    ("name", "file"), [("quickstart", "quickstart"), ("mtt/cifar10_ipc1.yaml", "mtt/cifar10_ipc1")]
)
def test_packaged_by_name(cli: Cli, name: str, file: str) -> None:
    assert find_config(name) == ROOT / "configs" / f"{file}.yaml"
    assert parsed(cli, "fit", "--config", name) == parsed(cli, "fit", f"--config={ROOT}/configs/{file}.yaml")


def test_packaged_overlays_and_experts(cli: Cli) -> None:
    values = parsed(cli, "fit", "-c", "dm/digits", "-c", "dynadistill", "-c", "{model: {ipc: 7}}")
    assert (values["name"], values["model"]["ipc"]) == ("dm_digits", 7)
    assert values["selection"]["init_args"]["pool_size"] == 10
    assert parsed(cli, "experts", "--config", "experts/cifar100")["path"] == "experts/cifar100_zca_ConvNet-3"


def test_a_local_file_wins_over_a_packaged_one(cli: Cli) -> None:
    (cli.folder / "quickstart").write_text("{name: mine, data: DigitsDataModule}")
    assert parsed(cli, "fit", "--config", "quickstart")["name"] == "mine"
    (cli.folder / "quickstart").unlink()
    (cli.folder / "quickstart").mkdir()
    assert parsed(cli, "fit", "--config", "quickstart")["name"] == "quickstart"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("quikstart", "--config is 'quikstart', .*did you mean quickstart"),
        ("mtt/cifar10_ipc2.yaml", "--config is 'mtt/cifar10_ipc2.yaml', .*did you mean mtt/cifar10_ipc"),
        ("configs/quickstart.yaml", "--config is 'configs/quickstart.yaml', .*did you mean quickstart"),
        ("nowhere.yaml", "--config is 'nowhere.yaml', .*give a path, or a packaged name"),
        ("folder", "--config is 'folder', which is a folder"),
        ("broken.yaml", "broken.yaml is not YAML: .*line 2, column 1"),
        ("latin.yaml", "latin.yaml is not YAML: 'utf-8' codec can't decode byte 0xe9"),
        ("list.yaml", "list.yaml holds no options"),
        ("empty.yaml", "empty.yaml holds no options"),
        ("pipe.yaml", "--config is 'pipe.yaml', which is neither a file"),
        (300 * "x", "--config is 'x{300}', but File name too long"),
        ("laughs.yaml", "laughs.yaml has [0-9,]{19,} values .* at most 100,000"),
        ("merges.yaml", "merges.yaml has [0-9,]{19,} values .* at most 100,000"),
        ("itself.yaml", "itself.yaml has inf values .* at most 100,000"),
        ("long.yaml", "--config is 'long.yaml', which is too long; .*262,144 bytes"),
    ],
)
def test_bad_configurations(cli: Cli, given: str, said: str) -> None:
    (cli.folder / "folder").mkdir()
    for name, text in {"broken": "model: {ipc: 1\n", "list": "- 1\n", "empty": ""}.items():
        (cli.folder / f"{name}.yaml").write_text(text)
    (cli.folder / "latin.yaml").write_bytes(b"model: caf\xe9")
    os.mkfifo(cli.folder / "pipe.yaml")
    (cli.folder / "long.yaml").write_bytes(b"#" * (1 << 18) + b"\nmodel: {ipc: 1}")
    for name, step in {"laughs": "&a{} [{}]", "merges": "&a{} {{<<: [{}]}}"}.items():
        lines = [f"a{i}: " + step.format(i, ",".join([f"*a{i - 1}"] * 10)) for i in range(1, 15)]
        (cli.folder / f"{name}.yaml").write_text("\n".join(["a0: &a0 {x: 1}", *lines]))
    (cli.folder / "itself.yaml").write_text("model: &m {ipc: 1, again: *m}")
    for command in ("fit", "experts"):
        assert re.search(said, cli.refused(command, "--config", given))
        assert re.search("--config: expected one argument", cli.refused(command, "--config", status=2))


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_a_resolved_configuration_of_an_earlier_version_is_the_same_run(cli: Cli, path: Path) -> None:
    values = parsed(cli, "fit", "--config", str(path))
    old = yaml.safe_load(path.read_text())
    assert kept(old) <= kept(values)
    again = cli.folder / "again.yaml"
    again.write_text(yaml.safe_dump(values))
    assert parsed(cli, "fit", "--config", str(again)) == values
    modules = re.sub(r"dd_lightning\.(\w+DataModule)", r"dd_lightning.data.digits.\1", path.read_text())
    modules = re.sub(r"dd_lightning\.(\w+Matching)", r"dd_lightning.objectives.base.\1", modules)
    modules = re.sub(r"dd_lightning\.(\w+Pool)", r"dd_lightning.pools.some_file.\1", modules)
    again.write_text(re.sub(r"dd_lightning\.(\w+Callback)", r"dd_lightning.callbacks.\1", modules))
    assert parsed(cli, "fit", "--config", str(again)) == values
    built = DistillationCLI(["--config", str(path), "--runs", str(cli.folder)])
    assert type(built.model.objective).__name__ == old["model"]["objective"]["class_path"].rpartition(".")[2]


def test_resolved_experts_of_an_earlier_version(cli: Cli) -> None:
    (path,) = set(RESOLVED) - set(METHODS)
    assert kept(yaml.safe_load(path.read_text())) <= kept(parsed(cli, "experts", "--config", str(path)))


def kept(values: dict[str, Any], prefix: str = "") -> set[tuple[str, str]]:
    """Return the keys and values of a configuration, flat, without renamed options."""
    flat: set[tuple[str, str]] = set()
    for name, value in values.items():
        key = prefix if name == "init_args" else f"{prefix}.{name}".removeprefix(".")
        if isinstance(value, dict):
            flat |= kept(value, key)
        elif key not in RENAMED:
            flat.add((key, str(value)))
    return flat


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("dd_lightning.data.CIFAR10DataModule", "dd_lightning.CIFAR10DataModule"),
        ("dd_lightning.data.image_folder.ImageFolderDataModule", "dd_lightning.ImageFolderDataModule"),
        ("dd_lightning.objectives.trajectory_matching.TrajectoryMatching", "dd_lightning.TrajectoryMatching"),
        ("dd_lightning.callbacks.synthetic_writer.SyntheticSetWriter", "dd_lightning.SyntheticSetWriter"),
        ("dd_lightning.recipes.ExpertRecipe", "dd_lightning.ExpertRecipe"),
        ("--model.pool=dd_lightning.pools.network_pool.NetworkPool", "--model.pool=dd_lightning.NetworkPool"),
        ("dd_lightning.networks.convnet.ConvNet", "dd_lightning.networks.convnet.ConvNet"),  # no public class
        ("my_package.dd_lightning.data.CIFAR10DataModule", "my_package.dd_lightning.data.CIFAR10DataModule"),
    ],
)
def test_class_paths_of_earlier_versions(old: str, new: str) -> None:
    assert current_names(old) == new


def test_class_paths_of_earlier_versions_as_options(cli: Cli) -> None:
    options = ["--data", "dd_lightning.data.DigitsDataModule", "--selection=dd_lightning.callbacks.selection."]
    options[-1] += "TrajectorySelectionCallback"
    values = parsed(cli, "fit", *options, "--model.objective.class_path", "dd_lightning.objectives.x.GradientMatching")
    assert values["data"]["class_path"] == "dd_lightning.DigitsDataModule"
    assert values["selection"]["class_path"] == "dd_lightning.TrajectorySelectionCallback"
    assert values["model"]["objective"]["class_path"] == "dd_lightning.GradientMatching"


@pytest.mark.parametrize("key", RENAMED)
def test_a_renamed_option_is_refused_with_its_new_name(cli: Cli, key: str) -> None:
    option = key.rpartition(".")[2]
    value = {"compile": "on", "precision": "bfloat16", "micro_batch": "3", "memory_gb": "2.5", "early_networks": "1"}
    base = ["--config", "dm/digits" if key.startswith("model.pool.") and ".recipe" not in key else "quickstart"]
    command = ["experts", "--data", "DigitsDataModule"] if key.startswith("recipe.") else ["fit", *base]
    written = cli.folder / "old.yaml"
    for name in (f"{key}", key.replace("model.pool.", "model.pool.init_args.")):
        nested: Any = value[option]
        for part in reversed(name.split(".")):
            nested = {part: nested}
        written.write_text(yaml.safe_dump(nested))
        for options in ([f"--{name}", value[option]], ["--config", str(written)]):
            line = cli.refused(*command, *options, "--print_config", status=2)
            assert f"{key} is now {RENAMED[key]}; see" in line


def test_every_package_is_installed() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "dd_lightning").rglob("__init__.py")}
    assert listed == {name.replace("/", ".") for name in found} | {"dd_lightning.configs"}


@pytest.mark.slow
def test_packaged_configurations_of_a_wheel(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    source, empty = tmp_path / "source", tmp_path / "empty"
    for folder in ("dd_lightning", "configs"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source / file)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheels = tmp_path / "wheels"
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", wheels, source], check=True)
    (wheel,) = wheels.iterdir()
    subprocess.run([*pip, "install", "--no-deps", "--target", tmp_path / "installed", wheel], check=True)
    installed = {path.relative_to(tmp_path / "installed/dd_lightning") for path in tmp_path.glob("installed/**/*.yaml")}
    assert installed == {path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml")}
    empty.mkdir()
    names = [part for name in ("quickstart", "smoke", "smoke_trajectories.yaml") for part in ("--config", name)]
    command = [sys.executable, "-m", "dd_lightning", "fit", *names, "--trainer.max_steps", "1", "--evaluation", "null"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    subprocess.run(command, cwd=empty, env=environment, check=True)
    assert (empty / "out/smoke_runs/quickstart_dynadistill/version_0/summary.json").is_file()
