"""The program that runs long comparisons, in miniature: stopped, continued, and refused on other hardware."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parents[1]
STEPS = [100, 200]
PLAN = {
    "digits": {
        "threads": 1,
        "steps": STEPS,
        "seeds": [0],
        "stages": {
            "experts": {
                "command": "experts",
                "configs": ["configs/experts/digits.yaml"],
                "flags": {"path": "../experts", "network": "ConvNet-1-W4", "num_experts": 3, "epochs": 2},
            }
        },
        "arms": {
            "base": {"configs": ["configs/quickstart.yaml"], "flags": {"selection": None}},
            "low_loss": {"configs": ["configs/quickstart.yaml"], "flags": {"selection.favor": "low_loss"}},
        },
        "flags": {
            "name": "{name}",
            "seed_everything": "{seed}",
            "trainer.max_steps": "{steps}",
            "trainer.enable_progress_bar": False,
            "checkpoint.every_n_train_steps": 10,
            "checkpoint.save_on_exception": True,
            "evaluation.every_n_steps": 100,
            "evaluation.num_networks": 3,
            "evaluation.num_networks_intermediate": 2,
            "evaluation.epochs": 2,
            "model.network": "ConvNet-1-W4",
            "model.objective.init_args.syn_steps": 2,
            "model.pool.init_args.path": "../experts",
            "model.pool.init_args.num_experts": 3,
            "model.pool.init_args.max_start_epoch": 1,
            "model.pool.init_args.train_missing": False,
        },
    }
}


def start(folder: Path) -> "subprocess.Popen[str]":
    (folder / "plan.yaml").write_text(yaml.safe_dump(PLAN, sort_keys=False))
    folders = [f"--{name}={folder / name}" for name in ("folder", "results", "root")]
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "reproduce.py"), f"--plan={folder / 'plan.yaml'}"]
    return subprocess.Popen([*command, *folders], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def record(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "results" / "digits.json").read_text())
    return values


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("DD_LIGHTNING_LONG"), reason="takes minutes; set DD_LIGHTNING_LONG=1 to run it")
@pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="comparisons are pinned to commits")
def test_comparison_is_stopped_and_continued(tmp_path: Path) -> None:
    run = start(tmp_path)
    checkpoints = tmp_path / "folder" / "digits" / "runs" / "base_seed0" / "version_0" / "checkpoints"
    while run.poll() is None and not list(checkpoints.glob("*.ckpt")):
        time.sleep(0.05)
    second = start(tmp_path)
    assert "is in use" in second.communicate()[0]
    assert second.returncode == 1
    run.terminate()
    said = run.communicate()[0]
    assert run.returncode == 0, said
    assert str(tmp_path / "folder" / "digits" / "env") in said
    stopped = record(tmp_path)
    assert stopped["stages"]["experts"]["status"] == "finished"
    base, low_loss = stopped["arms"].values()
    assert (base["status"], base["attempts"][0]["stopped_by"], low_loss["status"]) == (
        "interrupted",
        "signal",
        "waiting",
    )
    assert 0 < base["steps"] < STEPS[0]
    assert [point["step"] for point in base["curve"]][:1] == [0]

    said = start(tmp_path).communicate()[0]
    finished = record(tmp_path)
    assert said.count("--ckpt_path last") == 3
    assert len(finished["stages"]["experts"]["attempts"]) == 1
    for name, arm in finished["arms"].items():
        assert (arm["status"], arm["steps"]) == ("finished", STEPS[-1]), said
        assert [(point["step"], len(point["accuracies"])) for point in arm["curve"]] == [(0, 2), (100, 3), (200, 3)]
        assert (tmp_path / "results" / f"digits_{name}.safetensors").exists()
    assert [len(arm["attempts"]) for arm in finished["arms"].values()] == [3, 2]
    assert finished["arms"]["low_loss_seed0"]["summary"]["candidate_evaluations"] == 3 * STEPS[-1]
    assert os.fspath(tmp_path) not in json.dumps(finished)
    assert start(tmp_path).communicate()[0] == ""  # nothing is left

    finished["hardware"]["cpu"] = "another"
    del finished["arms"]["base_seed0"]["summary"]
    (tmp_path / "results" / "digits.json").write_text(json.dumps(finished))
    assert "not run: arms must not mix hardware" in start(tmp_path).communicate()[0]
