"""A report from beginning to end, and its command."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dd_lightning.cli.parser import OneLineParser
from dd_lightning.cli.report.figure import draw
from dd_lightning.cli.report.page import Heading, Part, Picture, Table, as_html, as_markdown
from dd_lightning.cli.report.results import results
from dd_lightning.cli.report.runs import compare_runs, find_runs
from dd_lightning.cli.report.tables import PUBLISHED, ratio_table, results_table, table_1, table_2
from dd_lightning.sets.atomic_write import write_all_atomically

_TITLE = "Dataset distillation: report"
_SOURCES = (
    "Ours: mean ± population standard deviation over seeds, at the last step. In the columns of the paper's data sets, "
    "published and ours are ConvNet-3's. Blank is not measured. Published: the authors' own figures, mostly the best of a "
    "run on the test images; "
)


def report(runs: Sequence[str | Path], out: str | Path) -> dict[str, Any]:
    """Compare runs, and write `report.html`, `.md` and `.json`, the figures and the sets' pictures to a folder.

    Args:
        runs: Folders of runs, or with runs below them.
        out: Where to; files of an earlier report are replaced.

    Returns:
        What `report.json` holds.

    Raises:
        InputError: If a folder or a file of a run cannot be used, matplotlib is not installed, or ``out`` cannot be
            written. Nothing has been written then.
    """
    read, left_out = find_runs(runs)
    found = results(compare_runs(read, left_out), left_out)
    files: dict[str, bytes] = {}
    parts: list[Part] = [Heading(_TITLE, 1), _overview(found)]
    for number, each in enumerate(found["comparisons"], start=1):
        drawn = draw(each)
        files |= {f"figure_{number}.{suffix}": data for suffix, data in drawn.items()}
        parts += [Heading(each["title"]), Picture(f"figure_{number}.svg", each["title"], drawn["svg"]), _caption(each)]
        parts += [results_table(each), *[ratio_table(each)] * bool(each["ratios"])]
        if pictures := _pictures(each, number):
            files |= {picture.name: picture.data for picture in pictures}
            parts.append(pictures)
    sources = "; ".join(f"{name} {own['source']}" for name, own in PUBLISHED["methods"].items() if own["source"])
    parts += [Heading("Table 1 of the paper: test accuracy, %"), table_1(found["comparisons"]), f"{_SOURCES}{sources}."]
    parts += [Heading("Table 2 of the paper: CIFAR-100, 1 image per class, on other networks: test accuracy, %")]
    parts += [table_2(found["comparisons"]), Heading("Runs"), _runs(found), *found["left_out"]]
    files["report.html"] = as_html(_TITLE, parts).encode()
    files["report.md"] = as_markdown(parts).encode()
    files["report.json"] = (json.dumps(found, indent=1) + "\n").encode()
    write_all_atomically((Path(out) / name, data) for name, data in files.items())
    return found


def command(args: Sequence[str]) -> None:
    """Compare finished runs."""
    parser = OneLineParser(
        prog="dd-lightning report",
        usage="dd-lightning report RUNS... --out DIR",
        description="Compare finished runs: accuracy against steps, seconds and candidate evaluations, with and without "
        "DynaDistill, over seeds; and the paper's tables. Writes report.html, .md, .json and the figures.",
    )
    parser.add_argument("runs", type=str, nargs="+", help="Folders of runs, or with runs below them.")
    parser.add_argument("--out", type=str, default="report", help="Folder of the report.")
    config = parser.parse_args(args)
    found = report(config.runs, config.out)
    for line in found["left_out"]:
        sys.stderr.write(f"dd-lightning: {line}\n")
    sys.stdout.write(f"{_overview(found)}\n{(Path(config.out) / 'report.html').resolve()}\n")


def _overview(found: Mapping[str, Any]) -> str:
    arms = [arm for each in found["comparisons"] for arm in each["arms"]]
    unfinished = [run for arm in arms for run in arm["runs"] if run["state"] != "finished"]
    count = sum(len(arm["runs"]) for arm in arms)
    told = "; ".join(f"{run['folder']} ({run['state']})" for run in unfinished)
    return f"{count} run{'s' * (count > 1)} by dd_lightning" + (
        f". Not finished, but counted: {told}." if told else "."
    )


def _caption(comparison: Mapping[str, Any]) -> str:
    peak, evaluated = comparison["base_peak"], comparison["evaluated"]
    text = (
        f"Each point is the mean over seeds of a seed's mean over fresh {evaluated} networks; the band is ± the population "
        "standard deviation of these seeds' means. Seconds are those of distillation alone, without evaluations and the "
        "training of experts, interpolated between logged steps; a point lies at the seeds' mean of what they had spent. "
    )
    if peak is None:
        return text + "There is no run of the base method, so nothing is marked."
    return text + (
        "Rings and vertical lines mark the first evaluated step at which a mean curve is at 95 % of the peak of the base's "
        f"mean curve: {100 * peak['accuracy']:.1f} % at step {peak['step']:.0f}, hence {100 * peak['threshold']:.1f} %. "
        f"That peak is chosen afterwards, on the {comparison['split']} images: a mark for speed, and no result. The "
        "result is the accuracy at the last step; its deviations are over seeds (of their means) and over the networks "
        "within a seed (root mean square)."
    )


def _pictures(comparison: Mapping[str, Any], number: int) -> list[Picture]:
    pictures = []
    for index, arm in enumerate(comparison["arms"], start=1):
        for run in arm["runs"]:
            if (file := Path(run["folder"]) / "synthetic.png").is_file():
                name = f"set_{number}_{index}_seed_{run['seed']}.png"
                pictures.append(Picture(name, f"{arm['label']}, seed {run['seed']}", file.read_bytes()))
    return pictures


def _runs(found: Mapping[str, Any]) -> Table:
    rows = [
        [run["folder"], each["title"], arm["label"], str(run["seed"]), run["state"]]
        for each in found["comparisons"]
        for arm in each["arms"]
        for run in arm["runs"]
    ]
    return ["folder", "what", "", "seed", "state"], rows
