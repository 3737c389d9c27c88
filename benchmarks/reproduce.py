"""Run long comparisons of methods, one arm after another, and go on where they were stopped.

    python benchmarks/reproduce.py --root data --hours 8     # again and again, until all arms are finished

A plan names comparisons. A comparison has stages, such as the training of experts, and then arms: runs of `dd-lightning
fit`, each once for every seed. All arms of a seed are brought to the first of the plan's `steps` before one goes on to
the next, so that they can be compared early. What is finished is skipped, and what was stopped goes on from its newest
checkpoint. Ctrl-C, SIGTERM and the end of the time stop an arm after the step that it is at.

At its first start a comparison is pinned to a commit and to its entry in the plan: all of its arms run that commit's
wheel, in a virtual environment of their own, with that commit's configurations, on one kind of hardware, and with one
version of torch and Lightning. A newer commit is used by comparisons that have not begun.

`--folder` takes environments, experts and runs; `--results` one JSON for each comparison, with the accuracy of every
network that was evaluated, and synthetic sets below 1 MB. A finished arm is one that the JSON says so of: to measure
anew what is measured there, name another folder for the results.
"""

import argparse
import csv
import fcntl
import itertools
import json
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pinned import hardware, installed, resolve

HERE = Path(__file__).resolve().parent
LARGEST_SET = 1_000_000
REPORT_SECONDS = 300.0
Values = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A stage of a comparison, or an arm with one seed up to a step.

    Attributes:
        kind: `stages` or `arms`.
        name: Unique within the comparison; of an arm, also its run's.
        command: Command and options of `dd-lightning`.
        steps: Where an arm is to be.
    """

    kind: str
    name: str
    command: list[str]
    steps: int = 0


@dataclass(frozen=True)
class Supervisor:
    """Runs one child process at a time, and stops it in order.

    Attributes:
        deadline: When the time is over, by `time.monotonic`.
        grace: Seconds that a child has between SIGTERM and SIGKILL.
        lock: File descriptor of a lock, which children inherit: it is held until the last of them is gone.
    """

    deadline: float
    grace: float
    lock: int

    def run(
        self, command: list[str], folder: Path, env: dict[str, str], log: Path, report: Callable[[], None]
    ) -> Values:
        """Run a command in a folder, and `report` every few minutes; return how it ended and what it cost."""
        attempt: Values = {"began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "stopped_by": None}
        started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        with log.open("a") as output:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=env,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this program alone
                pass_fds=[self.lock],
            )
            try:
                while process.poll() is None:
                    left = self.deadline - time.monotonic()
                    if left <= 0:
                        attempt["stopped_by"] = "time"
                        self._stop(process)
                        break
                    try:
                        process.wait(min(left, REPORT_SECONDS))
                    except subprocess.TimeoutExpired:
                        report()
            except KeyboardInterrupt:
                attempt["stopped_by"] = "signal"
                self._stop(process)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        attempt["seconds"] = round(time.monotonic() - started, 1)
        attempt["cpu_seconds"] = round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1)
        return attempt | {"exit_status": process.returncode}

    def _stop(self, process: "subprocess.Popen[bytes]") -> None:
        process.terminate()
        try:
            process.wait(self.grace)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.kill()
            process.wait()


class Comparison:
    """A comparison: its record, which is its JSON, and its folder.

    It has begun if it has a folder, or an arm with a summary in the record. A finished arm stays as it is, even if the
    folder is lost.

    Args:
        name: As in the plan.
        entry: Its entry in the plan; one that has begun keeps its own.
        folder: Folder of all comparisons.
        results: Where the JSON and the sets go.
    """

    def __init__(self, name: str, entry: Values, folder: Path, results: Path) -> None:
        self.name, self.folder, self.results = name, folder / name, results
        self._json = results / f"{name}.json"
        self.record: Values = {"comparison": name, "plan": entry, "stages": {}, "arms": {}}
        if self._json.exists():
            found: Values = json.loads(self._json.read_text())
            if self.folder.exists() or any("summary" in arm for arm in found["arms"].values()):
                self.record = found
        self._plan: Values = self.record["plan"]
        self._env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
            "OMP_NUM_THREADS": str(self._plan["threads"]),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled"),
        }

    def begin(self, repository: Path, commit: str, root: Path) -> str | None:
        """Pin and install the comparison, unless it is; return why it must not go on here, if so."""
        if self.folder.exists() and "commit" not in self.record:
            return f"{self.folder} has begun, but {self._json} is not there: put it back, or delete the folder"
        pinned = self.record.setdefault("commit", resolve(repository, commit))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.report()
        found = installed(self.folder, repository, pinned)
        print(f"{self.name}: commit {pinned}, {found['file']}", flush=True)
        versions = {"python": platform.python_version()} | found["versions"]
        for what, value in (("hardware", hardware(found, self._plan["threads"])), ("versions", versions)):
            if self.record.setdefault(what, value) != value:
                return f"arms must not mix {what}: {self.record[what]} before, {value} here"
        data = self.folder / "data"  # the configurations' own root: no path of this machine gets into a run's files
        data.unlink(missing_ok=True)
        data.symlink_to(root.resolve())
        return None

    def left(self) -> list[Job]:
        """Return what is not finished: stages, then the arms of the first seed, of the second, ..."""
        return [job for job in self._jobs() if not self.finished(job)]

    def _jobs(self) -> list[Job]:
        plan = self._plan
        jobs = [Job("stages", name, [part["command"], *options(part)]) for name, part in plan["stages"].items()]
        for seed, steps in itertools.product(plan["seeds"], plan["steps"]):
            for arm, part in plan["arms"].items():
                filled = {"name": f"{arm}_seed{seed}", "seed": seed, "steps": steps}
                command = ["fit", *options(part, **filled), *options({"flags": plan["flags"]}, **filled)]
                jobs.append(Job("arms", f"{arm}_seed{seed}", command, steps))
        return jobs

    def finished(self, job: Job) -> bool:
        """Tell whether a job need not be run: an arm whose result is there, or a stage whose files are."""
        if job.kind == "stages":
            return (self.folder / f"{job.name}.done").exists()
        return int(self.record["arms"].get(job.name, {}).get("summary", {"steps": 0})["steps"]) >= job.steps

    def run(self, job: Job, supervisor: Supervisor) -> bool:
        """Run a stage or an arm, or go on with it; return whether it was stopped."""
        resume = ["--ckpt_path", "last"] if job.kind == "arms" and self._steps(job) else []
        command = [str(self.folder / "env" / "bin" / "dd-lightning"), *job.command, *resume]
        print(f"{self.name}: {job.name}: {' '.join(command)}", flush=True)
        attempts = self.record[job.kind][job.name]["attempts"]
        attempts.append({"exit_status": None})  # stands if this program is killed
        self.report()
        log = self.folder / f"{job.name}.log"
        attempts[-1] = supervisor.run(command, self.folder, self._env, log, self.report)
        stopped = attempts[-1]["stopped_by"] is not None
        if job.kind == "stages" and attempts[-1]["exit_status"] == 0 and not stopped:
            (self.folder / f"{job.name}.done").touch()
        print(f"{self.name}: {job.name}: {attempts[-1]}", flush=True)
        self.report()
        return stopped

    def report(self) -> None:
        """Write the record; what is not finished is read anew from its files."""
        for job in self._jobs():
            part = self.record[job.kind].setdefault(job.name, {"attempts": []})
            if job.kind == "arms" and not self.finished(job):
                self._read_run(job, part)
            part["status"] = self._status(job, part["attempts"])  # of an arm, that of its last steps stays
            part["command"] = " ".join(["dd-lightning", *job.command])
        self.results.mkdir(parents=True, exist_ok=True)
        partial = self._json.with_suffix(".partial")
        partial.write_text(json.dumps(self.record, indent=1) + "\n")
        partial.replace(self._json)

    def _status(self, job: Job, attempts: list[Values]) -> str:
        if self.finished(job):
            return "finished"
        if not attempts:
            return "waiting"
        last = attempts[-1]
        if last["exit_status"] is None:
            return "running"
        if last["stopped_by"] or last["exit_status"] < 0:
            return "interrupted"
        return "failed" if last["exit_status"] else "waiting"

    def _read_run(self, job: Job, part: Values) -> None:
        """Bring what is known of an arm up to date."""
        found = (self.folder / "runs" / job.name).glob("version_*")
        versions = sorted(found, key=lambda path: int(path.name.removeprefix("version_")))
        if versions:
            part |= {"steps": self._steps(job), "of_steps": self._plan["steps"][-1], "curve": read_curve(versions)}
        for version in versions:
            path, images = version / "summary.json", version / "synthetic.safetensors"
            if path.exists():
                part["summary"] = {k: v for k, v in json.loads(path.read_text()).items() if k != "files"}
                if images.stat().st_size < LARGEST_SET:
                    shutil.copyfile(images, self.results / f"{self.name}_{job.name}.safetensors")

    def _steps(self, job: Job) -> int:
        """Return the step of the newest checkpoint."""
        names = [path.name for path in (self.folder / "runs" / job.name).glob("version_*/checkpoints/*.ckpt")]
        return max([int(found[1]) for name in names if (found := re.match(r"step=(\d+)", name))], default=0)


def options(part: Values, **filled: str | int) -> list[str]:
    """Return configurations and flags of a part of the plan as options, placeholders such as `{seed}` filled in.

    Example:
        >>> options({"configs": ["a.yaml"], "flags": {"trainer.max_steps": "{steps}", "clamp": True}}, steps=8)
        ['--config', 'a.yaml', '--trainer.max_steps', '8', '--clamp', 'true']
    """
    given = [option for path in part.get("configs", []) for option in ("--config", path)]
    for name, value in part.get("flags", {}).items():
        given += [f"--{name}", value.format(**filled) if isinstance(value, str) else json.dumps(value)]
    return given


def read_curve(versions: list[Path]) -> list[Values]:
    """Return the accuracy curve of a run.

    Costs are as they were logged last, at `logged_at`: of all steps and evaluations so far, over all resumptions, but
    for the first scoring, which belongs to the step that was running.

    Args:
        versions: Folders of the run and of its resumptions, the oldest first.
    """
    points: dict[tuple[int, str], Values] = {}
    costs: dict[int, Values] = {}
    for version in versions:
        for row in read_csv(version / "evaluation.csv"):
            step, network = int(row["step"]), row["network"]
            points[step, network] = {
                "step": step,
                "network": network,
                "accuracies": [float(row[name]) for name in row if re.fullmatch(r"accuracy_\d+", name) and row[name]],
                "mean": float(row["mean"]),
                "std": float(row["std"]) if row["std"] else None,
                "seconds_evaluating": float(row["seconds"]),
            }
        for row in read_csv(version / "metrics.csv"):
            cost = {name: float(row[name]) for name in row if name.startswith("cost/") and row[name]}
            if cost:
                costs[int(row["step"])] = {"logged_at": int(row["step"])} | cost
    for (step, _), point in points.items():
        point["cost"] = costs.get(max((other for other in costs if other <= step), default=0))
    return [points[key] for key in sorted(points)]


def read_csv(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table; none if there is no file."""
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def main() -> None:
    """Run what is left of the plan, until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, default=HERE / "plans" / "cifar10_ipc1.yaml")
    parser.add_argument("--only", nargs="+", default=None, help="Comparisons to run; all by default.")
    parser.add_argument("--hours", type=float, default=float("inf"), help="Stop after so long.")
    parser.add_argument("--root", type=Path, default=Path("data"), help="Folder of the data, unpacked.")
    parser.add_argument("--folder", type=Path, default=Path("out/reproduce"), help="For environments, experts, runs.")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "reproduce", help="For JSON and sets.")
    parser.add_argument("--repository", type=Path, default=HERE.parent, help="Where commits come from.")
    parser.add_argument("--commit", default="HEAD", help="Of comparisons that have not begun.")
    parser.add_argument("--grace", type=float, default=120.0, help="Seconds a stopped arm has for its last checkpoint.")
    args = parser.parse_args()
    deadline = time.monotonic() + 3600 * args.hours
    folder, results = args.folder.resolve(), args.results.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    plan: dict[str, Values] = yaml.safe_load(args.plan.read_text())
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"{folder} is in use by this program, or by a child that has outlived it")
        supervisor = Supervisor(deadline, args.grace, lock.fileno())
        for name in args.only or plan:
            comparison = Comparison(name, plan[name], folder, results)
            if all(job.kind == "stages" for job in comparison.left()):
                continue
            if refusal := comparison.begin(args.repository, args.commit, args.root):
                print(f"{name}: not run: {refusal}", flush=True)
                continue
            for job in comparison.left():
                if time.monotonic() >= deadline or comparison.run(job, supervisor):
                    return
                if job.kind == "stages" and not comparison.finished(job):
                    break  # the arms need it


if __name__ == "__main__":
    main()
