"""Compare the methods on digits, each without and with DynaDistill, over several seeds, and print a table.

    python benchmarks/digits_methods.py --out benchmarks/results/digits_methods.json

It can run in pieces (``--methods dm --seeds 0``): rows of ``--out`` that this call does not measure stay as they are,
and the table is of all of them. MTT's experts are shared by all runs: they belong to the data, not to a run's seed.

``start`` is the accuracy at step 0, which tells the initialization's share. The gain is distilled minus random real
images, as many as are stored, paired by seed and number of the network. Its 95 % interval is Student's over all pairs;
since the networks of one seed share their images, the pairs are not independent and it is too narrow for new seeds.
"""

import argparse
import json
import math
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accuracy_curves import hardware, read_curve
from scipy.stats import t as student

from dd_lightning.cli.main import main as dd_lightning
from dd_lightning.training.evaluation import mean_std

METHODS = {
    "mtt": ("MTT", "configs/quickstart.yaml"),
    "idc": ("IDC", "configs/idc/digits.yaml"),
    "dream_plus": ("DREAM+", "configs/dream_plus/digits.yaml"),
    "dm": ("DM", "configs/dm/digits.yaml"),
}
SELECTIONS = {
    "base": ("", ["--selection", "null"]),
    "dynadistill": (" + DynaDistill", ["--config", "configs/dynadistill.yaml"]),
}

Row = dict[str, Any]


def measure(method: str, selection: str, seed: int, runs: Path, flags: Sequence[str]) -> Row:
    """Run ``dd-lightning fit`` once and return what the table needs of it."""
    folder, name = runs / f"{method}_{selection}", f"seed{seed}"
    command = ["fit", "--config", METHODS[method][1], *SELECTIONS[selection][1]]
    command += ["--seed_everything", str(seed), "--runs", str(folder), "--name", name, *flags]
    started = time.perf_counter()
    dd_lightning(command)
    seconds = time.perf_counter() - started
    newest = max((folder / name).glob("version_*"), key=lambda path: int(path.name.split("_")[1]))
    result = json.loads((newest / "summary.json").read_text())
    ((network, own),) = result["networks"].items()
    return {
        "method": method,
        "selection": selection,
        "seed": seed,
        "start": read_curve(newest)[network][0]["accuracies"],
        "distilled": own["last"]["accuracies"],
        "random_real": result["random_real"]["accuracies"],
        "seconds": seconds,
    }


def paired_interval(rows: Sequence[Row]) -> tuple[float, float]:
    """Return the mean gain over random real images, and half the width of its 95 % interval."""
    gains = [d - r for row in rows for d, r in zip(row["distilled"], row["random_real"], strict=True)]
    mean, std = mean_std(gains)
    if len(gains) < 2:
        return mean, math.nan
    return mean, float(student.ppf(0.975, len(gains) - 1)) * std / math.sqrt(len(gains) - 1)


def table(rows: Sequence[Row]) -> str:
    """Return the table, in Markdown."""
    lines = ["| method | seeds | start | distilled | random real | gain (95 % interval) | seconds per run |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for method, selection in ((m, s) for m in METHODS for s in SELECTIONS):
        own = [row for row in rows if (row["method"], row["selection"]) == (method, selection)]
        if not own:
            continue
        shown = []
        for kind in ("start", "distilled", "random_real"):
            mean, std = mean_std([accuracy for row in own for accuracy in row[kind]])
            shown.append(f"{100 * mean:.1f} ± {100 * std:.1f} %")
        gain, half = paired_interval(own)
        seeds = ", ".join(str(row["seed"]) for row in own)
        seconds = mean_std([row["seconds"] for row in own])[0]
        label = METHODS[method][0] + SELECTIONS[selection][0]
        interval = f"{100 * gain:+.1f} ({100 * (gain - half):+.1f} to {100 * (gain + half):+.1f})"
        lines.append(f"| {label} | {seeds} | {' | '.join(shown)} | {interval} | {seconds:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--selections", nargs="+", choices=SELECTIONS, default=list(SELECTIONS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/digits_methods"))
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write, or to update, after every run.")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="Further flags of dd-lightning fit.")
    args = parser.parse_args()
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    commit = git.stdout.strip()  # of the code that is imported now, not of what is there when the runs have ended
    origin = {"hardware": hardware(), "threads": torch.get_num_threads(), "torch": torch.__version__, "commit": commit}
    rows: dict[tuple[str, str, int], Row] = {}
    if args.out is not None and args.out.exists():
        record = json.loads(args.out.read_text())
        if record["flags"] != args.flags:
            parser.error(f"{args.out} holds runs with the flags {record['flags']}; give the same, or another --out")
        rows = {(row["method"], row["selection"], row["seed"]): row for row in record["rows"]}
    for method, selection, seed in ((m, s, n) for m in args.methods for s in args.selections for n in args.seeds):
        rows[method, selection, seed] = measure(method, selection, seed, args.runs, args.flags) | origin
        if args.out is not None:
            record = {"flags": args.flags, "rows": [rows[key] for key in sorted(rows)]}
            args.out.write_text(json.dumps(record, indent=1) + "\n")
    for known in sorted({(row["hardware"], row["threads"], row["torch"], row["commit"]) for row in rows.values()}):
        print("{}, {} threads; torch {}; commit {}".format(*known))
    print(table([rows[key] for key in sorted(rows)]))


if __name__ == "__main__":
    main()
