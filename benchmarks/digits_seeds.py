"""Run the quickstart for several seeds, base and with DynaDistill, and print a table.

    python benchmarks/digits_seeds.py --out benchmarks/results/digits_seeds.json

Experts are shared by all runs: they belong to the data, not to the seed of a run.
"""

import argparse
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from accuracy_curves import hardware

from dd_lightning.cli import main as dd_lightning
from dd_lightning.evaluation import mean_std

METHODS = {"base": ["--selection", "null"], "+ DynaDistill": []}


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/digits_seeds"))
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write.")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="Further flags of dd-lightning fit.")
    args = parser.parse_args()
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    commit = git.stdout.strip()  # of the code that is imported now, not of what is there when the runs have ended
    rows: list[dict[str, Any]] = []
    for name, flags in METHODS.items():
        for seed in args.seeds:
            folder = args.runs / name.strip("+ ").lower()
            started = time.perf_counter()
            dd_lightning(
                [
                    "fit",
                    "--config",
                    "configs/quickstart.yaml",
                    "--seed_everything",
                    str(seed),
                    "--runs",
                    str(folder),
                    "--name",
                    f"seed{seed}",
                    *flags,
                    *args.flags,
                ]
            )
            newest = max((folder / f"seed{seed}").glob("version_*"), key=lambda path: int(path.name.split("_")[1]))
            result = json.loads((newest / "summary.json").read_text())
            (network,) = result["networks"].values()
            rows.append(
                {
                    "method": name,
                    "seed": seed,
                    "distilled": network["last"]["accuracies"],
                    "random_real": result["random_real"]["accuracies"],
                    "seconds": time.perf_counter() - started,
                }
            )
    print(f"{hardware()}; torch {torch.__version__}")
    for name in METHODS:
        own = [row for row in rows if row["method"] == name]
        for row in own:
            (d, ds), (r, rs) = mean_std(row["distilled"]), mean_std(row["random_real"])
            print(
                f"{name:14} seed {row['seed']}: distilled {100 * d:.1f} ± {100 * ds:.1f} %, "
                f"random real {100 * r:.1f} ± {100 * rs:.1f} %, {row['seconds']:.0f} s"
            )
        d, ds = mean_std([a for row in own for a in row["distilled"]])
        r, rs = mean_std([a for row in own for a in row["random_real"]])
        print(
            f"{name:14} all: distilled {100 * d:.1f} ± {100 * ds:.1f} %, random real {100 * r:.1f} ± {100 * rs:.1f} %"
        )
    if args.out is not None:
        record = {"hardware": hardware(), "torch": torch.__version__, "commit": commit, "rows": rows}
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
