"""A report from beginning to end, and its command."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dd_lightning.cli.parser import OneLineParser
from dd_lightning.cli.report.classes import class_accuracies
from dd_lightning.cli.report.figure import draw, require_matplotlib
from dd_lightning.cli.report.page import Part, Picture, as_html, as_markdown
from dd_lightning.cli.report.results import results
from dd_lightning.cli.report.runs import compare_runs, find_runs
from dd_lightning.cli.report.tables import PUBLISHED, class_table, paper_table, ratio_table, results_table
from dd_lightning.functional.errors import check_range
from dd_lightning.sets.atomic_write import write_all_atomically

_SOURCES = (
    "Ours: mean ± population standard deviation over n seeds, at the last step; in the paper's columns, of sets made "
    f"with {PUBLISHED['network']}. Blank: not measured. Published: values of the authors, mostly the best of a run "
    f"on the test images: {'; '.join(': '.join(each) for each in PUBLISHED['sources'].items())}."
)


def report(runs: Sequence[str | Path], out: str | Path, per_class: int = 0, root: str = "data") -> dict[str, Any]:
    """Compare runs, and write `report.html`, `.md` and `.json`, the figures and the sets' pictures to a folder.

    Args:
        runs: Folders of runs, or with runs below them.
        out: Where to; files of an earlier report are replaced.
        per_class: Fresh networks to train on each set for its accuracy class by class; 0 trains none.
        root: Folder of the real data, for that.

    Returns:
        What `report.json` holds.

    Raises:
        InputError: If a folder or a file of a run cannot be used, matplotlib is not installed, or ``out`` cannot be
            written. Nothing has been written then.
    """
    check_range("per_class", per_class, low=0)
    require_matplotlib()  # before anything is trained
    read, left_out = find_runs(runs)
    comparisons = compare_runs(read, left_out)
    counted = [run for each in comparisons for arm in each.arms for run in arm.runs] if per_class else []
    by_class = {run.folder: class_accuracies(run, per_class, root) for run in counted}
    found = results(comparisons, left_out, by_class)
    files: dict[str, bytes] = {}
    parts: list[Part] = ["# Dataset distillation: report", _overview(found)]
    for number, each in enumerate(found["comparisons"], start=1):
        drawn = draw(each)
        files |= {f"figure_{number}.{suffix}": data for suffix, data in drawn.items()}
        parts += [f"## {each['title']}", Picture(f"figure_{number}.svg", each["title"], drawn["svg"]), _caption(each)]
        parts += [results_table(each), *[ratio_table(each)] * bool(each["ratios"])]
        if per_class:
            parts.append(class_table(each))
        for pictures in _pictures(each, number):
            files |= {picture.name: picture.data for picture in pictures}
            parts.append(pictures)
    for table in PUBLISHED["tables"]:
        parts += [f"## {table['title']}", paper_table(table, found["comparisons"])]
    parts += [_SOURCES, *found["left_out"]]
    files |= {"report.html": as_html(parts), "report.md": as_markdown(parts)}
    files["report.json"] = (json.dumps(found, indent=1) + "\n").encode()
    write_all_atomically((Path(out) / name, data) for name, data in files.items())
    return found


def report_command(args: Sequence[str]) -> None:
    """Compare finished runs."""
    parser = OneLineParser(
        prog="dd-lightning report",
        usage="dd-lightning report RUNS... --out DIR",
        description="Compare runs, with and without DynaDistill, over seeds: accuracy against steps, seconds and "
        "candidate evaluations, and the paper's tables. Write report.html, .md and .json, and the figures.",
    )
    parser.add_argument("-c", "--config", action="config", help="YAML file with these options.")
    parser.add_argument("runs", type=str, nargs="+", help="Folders of runs, or with runs below them.")
    parser.add_argument("--out", type=str, required=True, help="Folder of the report.")
    parser.add_argument(
        "--per_class", type=int, default=0, help="Fresh networks to train on each set for its accuracy by class."
    )
    parser.add_argument("--root", type=str, default="data", help="Folder of the real data, for --per_class.")
    config = parser.parse_args(args)
    found = report(config.runs, config.out, config.per_class, config.root)
    for line in found["left_out"]:
        sys.stderr.write(f"dd-lightning: {line}\n")
    sys.stdout.write(f"{_overview(found)}\n{(Path(config.out) / 'report.html').resolve()}\n")


def _overview(found: Mapping[str, Any]) -> str:
    runs = [run for each in found["comparisons"] for arm in each["arms"] for run in arm["runs"]]
    told = "; ".join(f"{run['folder']} ({run['state']})" for run in runs if run["state"] != "finished")
    overview = f"{len(runs)} run{'s' * (len(runs) > 1)} by dd_lightning."
    return f"{overview} Not finished, but counted: {told}." if told else overview


def _caption(comparison: Mapping[str, Any]) -> str:
    peak = comparison["base_peak"]
    text = (
        f"Points are means over seeds of each seed's mean over fresh {comparison['evaluated']} networks, bands ± the "
        "population standard deviation of the seeds' means. Seconds are those of distillation, without evaluations and "
        "training of experts, between logged steps interpolated. "
    )
    devices = sorted({device for arm in comparison["arms"] for device in arm["devices"]})
    text += f"They are of different devices: {', '.join(devices)}. " * (len(devices) > 1)
    if peak is None:
        return f"{text}There is no run of the base method, so nothing is marked."
    return (
        f"{text}Marked is the first evaluated step at which a mean curve is at 95 % of the peak of the base's: "
        f"{100 * peak['accuracy']:.1f} % at step {peak['step']:.0f}, so {100 * peak['threshold']:.1f} %. This peak is "
        f"best-on-test, chosen afterwards on the {comparison['split']} images: it tells speed, and is no result. The "
        "result is the accuracy at the last step, with its deviation over seeds, and that over the networks of a seed "
        "(root mean square)."
    )


def _pictures(comparison: Mapping[str, Any], number: int) -> Iterator[list[Picture]]:
    """Return the pictures of the sets of each arm, and whose they are."""
    for index, arm in enumerate(comparison["arms"], start=1):
        pictures = []
        for run in arm["runs"]:
            if (file := Path(run["folder"], "synthetic.png")).is_file():
                caption = f"{arm['label']}, seed {run['seed']}: {run['folder']}"
                pictures.append(Picture(f"set_{number}_{index}_seed_{run['seed']}.png", caption, file.read_bytes()))
        if pictures:
            yield pictures
