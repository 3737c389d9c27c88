"""Distill in miniature with two checkouts of this repository, and tell whether the images are equal bit for bit.

    git worktree add ../base <commit>
    python benchmarks/compare_checkouts.py ../base .

Both run the configurations of the first checkout: the quickstart at full length, and every method's published
configuration in the smoke overlays' miniature on generated images; each with and without DynaDistill. What the first
checkout gives is kept in ``--cache`` under its commit. One thread, on a CPU.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

CASES = {
    "quickstart": (),
    "mtt/cifar10_ipc1": ("smoke", "smoke_trajectories", "smoke_cifar"),
    "idc/cifar10_ipc10": ("smoke", "smoke_networks", "smoke_cifar"),
    "dream_plus/cifar100_ipc1": ("smoke", "smoke_networks", "smoke_cifar"),
    "dm/cifar10_ipc1": ("smoke", "smoke_networks", "smoke_cifar"),
}


def distill(checkout: Path, configs: Path, generated: Path, case: str, selection: bool, folder: Path) -> None:
    """Run one case in a process and folder of its own, with a checkpoint at its last step alone."""
    flags = ["--evaluation", "null", "--runs", str(folder / "runs"), "--trainer.enable_progress_bar", "false"]
    if case == "quickstart" and not selection:
        flags += ["--selection", "null"]
    if "smoke_trajectories" in CASES[case] or case == "quickstart":
        flags += ["--model.pool.init_args.path", str(folder / "experts")]
    if "smoke_cifar" in CASES[case]:
        flags += ["--data.init_args.root", str(generated)]
    flags += ["--checkpoint.every_n_train_steps", "120" if case == "quickstart" else "3"]
    overlays = [*CASES[case], *(("dynadistill",) if selection and case != "quickstart" else ())]
    files = [part for name in (case, *overlays) for part in ("--config", str(configs / f"{name}.yaml"))]
    folder.mkdir(parents=True)
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    with (folder / "log.txt").open("w") as log:
        command = [sys.executable, "-m", "dd_lightning", "fit", *files, *flags]
        subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=log, check=True)


def learned(folder: Path) -> dict[str, Tensor]:
    """Return what the run's only checkpoint holds of the synthetic set."""
    (checkpoint,) = folder.glob("runs/*/version_0/checkpoints/*.ckpt")
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")["state_dict"]
    return {
        name.rpartition(".")[2]: value
        for name, value in state.items()
        if name.startswith("synthetic.") and isinstance(value, Tensor)
    }


def commit(checkout: Path) -> str:
    """Return the commit of a checkout, marked if files differ from it."""
    described = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    return subprocess.run(described, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    """Compare; exit status 1 if any case differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--cache", type=Path, default=Path("out/checkouts"))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    options = parser.parse_args()
    first, second, cache = (path.resolve() for path in (options.first, options.second, options.cache))
    generated = cache / "generated"
    if not generated.exists():
        subprocess.run([sys.executable, "tests/generated_cifar.py", str(generated)], cwd=first, check=True)
    folders = [cache / commit(first), cache / f"{commit(second)}-{time.time_ns()}"]
    print(f"{folders[0].name} against {commit(second)}")
    equal = True
    for case in options.cases:
        for selection in (False, True):
            name = f"{case.replace('/', '_')}{'_dynadistill' * selection}"
            for checkout, folder in zip((first, second), folders, strict=True):
                if not (folder / name).exists():
                    distill(checkout, first / "configs", generated, case, selection, folder / name)
            ours, theirs = (learned(folder / name) for folder in folders)
            differing = [key for key, value in ours.items() if not torch.equal(value, theirs[key])]
            equal &= not differing
            print(f"{name:40} {'differs in ' + ', '.join(differing) if differing else 'equal'}", flush=True)
    raise SystemExit(not equal)


if __name__ == "__main__":
    main()
