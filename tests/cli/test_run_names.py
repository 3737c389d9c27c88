"""Where a run goes by its name, and where it is looked for again."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dd_lightning.cli.runs import new_version
from tests import small
from tests.small import Cli

SELECTION = ("--selection.temperature", "0.1")


def fit(cli: Cli, *options: str) -> None:
    """Run the small configuration without typing its name."""
    config = small.command_line(cli.folder, cli.store)[:2]
    cli("fit", *config, "--evaluation", "null", "--trainer.max_steps", "2", *options)


def runs(cli: Cli) -> dict[str, int]:
    return {path.name: len(list(path.glob("version_*"))) for path in (cli.folder / "runs").iterdir()}


def test_a_selection_ends_the_name_unless_it_is_typed(cli: Cli) -> None:
    fit(cli)
    fit(cli, *SELECTION)
    fit(cli, *SELECTION, "--name=typed")
    assert runs(cli) == {"small": 1, "small_dynadistill": 1, "typed": 1}
    # the file of a run with a selection, run again, goes to where that one is; without it, to the base method's
    config = str(cli.version(name="small_dynadistill") / "config.yaml")
    cli("fit", "--config", config)
    cli("fit", "--config", config, "--selection", "null")
    assert runs(cli) == {"small": 2, "small_dynadistill": 2, "typed": 1}


def test_the_last_checkpoint_is_looked_for_under_both_names(cli: Cli) -> None:
    def resumed_from(version: Path) -> str:
        path: str = yaml.safe_load((version / "config.yaml").read_text())["ckpt_path"]
        return str(Path(path).relative_to(cli.folder / "runs"))

    longer = ("--trainer.max_steps", "3", "--ckpt_path", "last")
    fit(cli, *SELECTION, "--name", "small")  # as earlier versions named it
    fit(cli, *SELECTION, *longer)
    assert resumed_from(cli.version(0, "small_dynadistill")) == "small/version_0/checkpoints/step=2.ckpt"
    with pytest.raises(SystemExit):
        fit(cli, *longer)
    assert "selection.class is None, but the checkpoint's run has 'TrajectorySelectionCallback'" in cli.err
    fit(cli)
    fit(cli, *longer)
    assert resumed_from(cli.version(3)) == "small/version_2/checkpoints/step=2.ckpt"
    fit(cli, *SELECTION)
    fit(cli, *SELECTION, *longer)  # its own come first
    resumed = cli.version(2, "small_dynadistill")
    assert resumed_from(resumed) == "small_dynadistill/version_1/checkpoints/step=2.ckpt"


def test_runs_that_start_at_the_same_moment_have_folders_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "version_6").mkdir()
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda _: new_version(tmp_path), range(40)))
    assert {path.name for path in made} == {f"version_{number}" for number in range(7, 47)}
    assert len(list(tmp_path.iterdir())) == 41


def test_a_refused_run_leaves_no_folder(cli: Cli) -> None:
    cli.fit_refused("--trainer.strategy", "teamwork")
    assert list((cli.folder / "runs" / "small").iterdir()) == []


def test_tensorboard_shows_the_command_and_the_configuration(cli: Cli) -> None:
    fit(cli, *SELECTION)
    folder = cli.version(name="small_dynadistill")
    events = EventAccumulator(str(folder)).Reload()
    tags = ("command/text_summary", "config/text_summary")
    command, config = (events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in tags)
    assert command.startswith("    dd-lightning fit --config ")
    assert command.endswith(" ".join(SELECTION))
    assert yaml.safe_load(config) == yaml.safe_load((folder / "config.yaml").read_text())


def test_other_loggers_know_what_tells_runs_apart(cli: Cli) -> None:
    cli.fit(*SELECTION)
    settings = yaml.safe_load((cli.version() / "hparams.yaml").read_text())
    assert (settings["method"], settings["seed"]) == ("DynaDistill + TrajectoryMatching", 3)
    assert settings["selection.temperature"] == 0.1


def test_accuracies_are_monitored_from_the_command_line(cli: Cli) -> None:
    metric = f"accuracy/{small.NETWORK}"
    cli.fit(
        *("--checkpoint.monitor", metric, "--checkpoint.mode", "max", "--checkpoint.every_n_train_steps", "4"),
        *("--trainer.callbacks+=EarlyStopping", f"--trainer.callbacks.monitor={metric}"),
        # no accuracy is better than another by 1
        *("--trainer.callbacks.mode=max", "--trainer.callbacks.patience=1", "--trainer.callbacks.min_delta=1"),
    )
    assert json.loads((cli.version() / "summary.json").read_text())["steps"] == 4
    assert [path.name for path in (cli.version() / "checkpoints").iterdir()] == ["step=4.ckpt"]
    refused = cli.fit_refused("--checkpoint.monitor", metric)
    assert "every_n_train_steps is 2, but its monitor" in refused
    assert "measured every 4 steps" in refused
