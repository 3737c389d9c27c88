"""Kill runs at random moments, and read damaged files: what is promised about both, counted.

    python benchmarks/reliability.py kills --kills 500      # SIGKILL, resume, compare the images bit for bit
    python benchmarks/reliability.py fuzz --inputs 100000   # damaged files: read, or refused by one of our own errors
    python benchmarks/reliability.py soak --kills 30        # one long run, killed and resumed: memory and open files
    python benchmarks/reliability.py builders               # two processes that fill one expert store
    python benchmarks/reliability.py compare                # the first losses of each method against the stored ones

Each part writes its figures to `results/reliability.json` as it goes, and `results/reliability.md` is made of them.
Processes are forked from one that has imported everything, so a start costs milliseconds. One thread; not on Windows.
"""

import argparse
import copy
import json
import mmap
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: a process of several threads must not fork

import torch
import yaml
from accuracy_curves import hardware
from damaged_files import fuzz

import dd_lightning
from dd_lightning.cli.main import main as command
from dd_lightning.datamodules import DigitsDataModule
from dd_lightning.distillation import Distillation
from dd_lightning.functional.selection import sample_index, selection_probabilities
from dd_lightning.module import DistillationModule
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.pools import CandidateKey, NetworkPool, PoolSetup, TrajectoryPool, TrajectorySegment
from dd_lightning.sets.optimizer import SyntheticOptimizer
from dd_lightning.sets.real import RealSet
from dd_lightning.sets.storage import Storage
from dd_lightning.sets.synthetic_file import load_synthetic
from dd_lightning.trainer.checkpoints import AtomicCheckpointIO
from dd_lightning.training.evaluation import Evaluation
from dd_lightning.training.recipes import ExpertRecipe, NetworkRecipe

RESULTS = Path(__file__).resolve().parent / "results"
STEPS = 10
SETTLED = 100  # steps after which a run has allocated what it needs
LARGEST_DIFFERENCE = 1e-6  # stored experts are rounded to float32
Values = dict[str, Any]

EXPERTS = {"path": "experts", "num_experts": 3, "expert_epochs": 1, "max_start_epoch": 2, "recipe": {"batch_size": 256}}
NETWORKS = {"age_limit": 3, "recipe": {"batch_size": 64, "images_per_update": 64}}


def _trajectories(pool: Values | None = None, **model: Any) -> Values:  # noqa: ANN401
    objective = {"class_path": "TrajectoryMatching", "init_args": {"syn_steps": 2}}
    settings = {"image_lr": 10.0, "student_lr": 0.05, "student_lr_lr": 1e-5, "objective": objective}
    return settings | {"pool": {"class_path": "TrajectoryPool", "init_args": EXPERTS | (pool or {})}} | model


def _networks(objective: str, options: Values, pool: Values | None = None, **model: Any) -> Values:  # noqa: ANN401
    settings: Values = {"image_lr": 0.05, "objective": {"class_path": objective, "init_args": options}}
    return settings | {"pool": {"class_path": "NetworkPool", "init_args": NETWORKS | (pool or {})}} | model


CONFIGURATIONS: dict[str, tuple[Values, Values | None]] = {
    "MTT": (_trajectories(), None),
    "MTT, advance": (_trajectories({"refresh": "advance"}), {"num_candidates": 2}),
    "MTT + DynaDistill": (_trajectories(), {"num_candidates": 3}),
    "MTT + DynaDistill, losses remembered": (_trajectories(), {"num_candidates": 2, "refresh_per_step": 1}),
    "DATM": (_trajectories(labels="soft", label_lr=1.0, equal_norm=True, image_optimizer="adam"), None),
    "IDC": (
        _networks("GradientMatching", {"batch_real": 8}, factor=2, image_space="pixels", inner_loop=4, clamp=True),
        None,
    ),
    "IDC + DynaDistill": (_networks("GradientMatching", {"batch_real": 8}, {"num_networks": 3}), {"num_candidates": 2}),
    "DREAM+": (_networks("BidirectionalMatching", {"batch_real": 8, "interval": 3}, {"pretrain_epochs": 1}), None),
    "DM": (_networks("DistributionMatching", {"batch_real": 8}, {"refresh": "none"}), {"num_candidates": 1}),
}


RANKED = ("MTT + DynaDistill, losses remembered", "IDC + DynaDistill", "DREAM+")
"""Those that are run on two ranks: shared by candidates, and by classes and networks."""


class Run:
    """A small run on the digits that can be started, killed and resumed.

    Args:
        folder: Its own.
        configuration: Of `CONFIGURATIONS`.
        steps: How many it takes.
    """

    def __init__(self, folder: Path, configuration: str, steps: int = STEPS) -> None:
        model, selection = CONFIGURATIONS[configuration]
        self.folder = folder
        folder.mkdir(parents=True)
        config = {
            "seed_everything": 3,
            "name": "run",
            "runs": "runs",
            "model": {"network": "ConvNet-1-W4"} | model,
            "data": {"class_path": "DigitsDataModule"},
            "selection": selection and {"class_path": "TrajectorySelectionCallback", "init_args": selection},
            "evaluation": {"every_n_steps": 4, "num_networks": 1, "epochs": 2},
            "checkpoint": {"every_n_train_steps": 2},
            "trainer": {"accelerator": "cpu", "max_steps": steps, "enable_progress_bar": False, "log_every_n_steps": 1},
        }
        if selection is None:
            del config["selection"]
        (folder / "config.yaml").write_text(yaml.safe_dump(config))

    def start(self, watch: "Watch | None" = None, rank: int = 0, ranks: int = 1, port: int = 0) -> int:
        """Start it, or one of its ranks, in a process of its own, from its newest checkpoint if there is one."""
        resume = ["--ckpt_path", "last"] if list(self.folder.glob("runs/*/*/checkpoints/*.ckpt")) else []
        if (process := os.fork()) != 0:
            return process
        status = 1
        try:
            os.chdir(self.folder)
            log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if watch is not None:
                watch.attach()
            if ranks > 1:  # as torchrun tells it
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
                os.environ |= {name: str(value) for name, value in (place | {"GROUP_RANK": 0}).items()}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "run"}
                resume += ["--trainer.devices", str(ranks)]
            command(["fit", "--config", "config.yaml", "--name", "run", *resume])
            status = 0
        finally:
            sys.stderr.flush()
            os._exit(status)

    def images(self) -> torch.Tensor:
        """Return what the newest version learned."""
        versions = sorted(self.folder.glob("runs/run/version_*"), key=lambda path: int(path.name[8:]))
        written = [path / "synthetic.safetensors" for path in versions if (path / "summary.json").exists()]
        return load_synthetic(written[-1]).images


class Watch:
    """What a run's process is doing, in memory that it shares with this one."""

    PHASES = ("before and after", "experts and pool", "step", "checkpoint", "evaluation", "closing evaluation")

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._shared = mmap.mmap(-1, mmap.PAGESIZE)
        self.reset()

    def reset(self) -> None:
        """Forget the process of before."""
        self._shared[:16] = struct.pack("<qq", 0, -1)

    @property
    def phase(self) -> str:
        """What it does now."""
        return self.PHASES[struct.unpack_from("<q", self._shared)[0]]

    def is_in(self, phase: str) -> bool:
        """Tell whether it is in a phase."""
        return self.phase == phase

    @property
    def step(self) -> int:
        """The step that it takes; -1 before the first one."""
        step: int = struct.unpack_from("<q", self._shared, 8)[0]
        return step

    def attach(self) -> None:
        """Watch this process."""

        def within(phase: int, function: Callable[..., Any]) -> Callable[..., Any]:
            def watched(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401
                (before,) = struct.unpack_from("<q", self._shared)
                closes = phase == 4 and self.step >= self.steps - 1
                if phase == 2:
                    struct.pack_into("<q", self._shared, 8, arguments[0].global_step)
                struct.pack_into("<q", self._shared, 0, phase + closes)
                try:
                    return function(*arguments, **options)
                finally:
                    struct.pack_into("<q", self._shared, 0, 2 if phase == 2 else before)

            return watched

        for phase, owner, name in (
            (1, Distillation, "setup"),
            (2, DistillationModule, "training_step"),  # and what follows it, up to the next one
            (3, AtomicCheckpointIO, "save_checkpoint"),
            (4, Evaluation, "__call__"),
        ):
            setattr(owner, name, within(phase, getattr(owner, name)))


def _wait(process: int, seconds: float, may_die: Callable[[], bool] = lambda: True, more: float = 0.0) -> int | None:
    """Wait for a process; return its exit status, or kill it and return None.

    Args:
        process: Its number.
        seconds: How long it lives at least.
        may_die: Asked from then on.
        more: Seconds that it lives after that.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline or not may_die():
        finished, status = os.waitpid(process, os.WNOHANG)
        if finished:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.0005)
    time.sleep(more)
    _kill(process)
    return None


def _kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def kills(count: int, seed: int, folder: Path, report: Callable[[Values], None]) -> Values:
    """Kill runs of each configuration at random moments until `count` kills are reached in all.

    Half of them strike at any time, half wait for one of the phases, drawn at random, some of which are short.
    """
    figures: Values = {"kills": 0, "runs": 0, "equal": 0, "killed in": dict.fromkeys(Watch.PHASES, 0)}
    figures["configuration"] = {}
    moments, watch = random.Random(seed), Watch(STEPS)
    for name in CONFIGURATIONS:
        own = {"kills": 0, "runs": 0, "equal": 0}
        figures["configuration"][name] = own
        whole = Run(folder / name / "whole", name)
        began = time.monotonic()
        assert _wait(whole.start(), 600) == 0, (whole.folder / "log.txt").read_text()[-2000:]
        seconds, images = time.monotonic() - began, whole.images()
        while own["kills"] < -(-count // len(CONFIGURATIONS)):
            run, status = Run(folder / name / str(own["runs"]), name), None
            while status is None:
                watch.reset()
                life, target = moments.uniform(0.02, 1.0) * seconds, moments.choice(Watch.PHASES[1:])
                process, more = run.start(watch), moments.uniform(0, 0.005)
                if moments.random() < 0.5:
                    status = _wait(process, life)
                else:
                    status = _wait(process, life / 4, partial(watch.is_in, target), more)
                if status is None:
                    own["kills"] += 1
                    figures["killed in"][watch.phase] += 1
            assert status == 0, (run.folder / "log.txt").read_text()[-2000:]
            own["runs"] += 1
            own["equal"] += torch.equal(run.images(), images)
        for key, value in own.items():
            figures[key] += value
        print(f"{name}: {own}", flush=True)
        report(figures)
    return figures


def rank_kills(count: int, seed: int, folder: Path, report: Callable[[Values], None]) -> Values:
    """Kill one of two ranks at random moments, `count` times; the other one must end by itself."""
    slowest = "slowest end of the other rank, seconds"
    figures: Values = {"kills": 0, "runs": 0, "equal": 0, slowest: 0.0, "configuration": {}}
    moments, watch = random.Random(seed), Watch(STEPS)

    def started(run: Run, victim: int) -> list[int]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        watch.reset()
        return [run.start(watch if rank == victim else None, rank, 2, port) for rank in range(2)]

    for name in RANKED:
        own = {"kills": 0, "runs": 0, "equal": 0}
        figures["configuration"][name] = own
        whole, began = Run(folder / name / "whole", name), time.monotonic()
        assert [_wait(rank, 600) for rank in started(whole, 0)] == [0, 0], (whole.folder / "log.txt").read_text()[
            -2000:
        ]
        seconds, images = time.monotonic() - began, whole.images()
        while own["kills"] < -(-count // len(RANKED)):
            run, status = Run(folder / name / str(own["runs"]), name), None
            while status is None:
                victim, life = moments.randrange(2), moments.uniform(0.1, 1.0) * seconds
                ranks = started(run, victim)
                # before it knows the other one, nobody but what has started both can tell that it is gone
                status = _wait(ranks[victim], life, lambda: watch.phase != Watch.PHASES[0])
                died = time.monotonic()
                other = _wait(ranks[1 - victim], 120)
                if status is None:
                    assert other is not None, f"{name}: the other rank did not end"
                    own["kills"] += 1
                    figures[slowest] = max(figures[slowest], round(time.monotonic() - died, 2))
                else:
                    assert [status, other] == [0, 0], (run.folder / "log.txt").read_text()[-2000:]
            own["runs"] += 1
            own["equal"] += torch.equal(run.images(), images)
        for key, value in own.items():
            figures[key] += value
        print(f"{name}: {own}", flush=True)
        report(figures)
    return figures


def soak(count: int, seed: int, folder: Path, steps: int) -> Values:
    """Take many steps, killed and resumed on the way; compare memory and open files at step 100 and at the end.

    The first process lives for a little more than 100 steps, the last one for all that the kills have left.
    """
    run, moments, watch = Run(folder / "soak", "MTT + DynaDistill", steps), random.Random(seed), Watch(steps)
    text = (run.folder / "config.yaml").read_text()
    (run.folder / "config.yaml").write_text(text.replace("every_n_train_steps: 2", "every_n_train_steps: 20"))
    settled = min(SETTLED, steps // 4)
    each = max((steps - settled) // (2 * max(count, 1)), 1)  # half of the steps for the kills
    done, status, lives = 0, None, list[list[tuple[int, int, int]]]()
    while status is None:
        watch.reset()
        process, samples, first = run.start(watch), list[tuple[int, int, int]](), -1
        lives.append(samples)
        life = moments.randint(1, 2 * each) + (settled * 5 // 4 if done == 0 else 0)
        while status is None:
            finished, code = os.waitpid(process, os.WNOHANG)
            if finished:
                status = os.waitstatus_to_exitcode(code)
                break
            step = watch.step
            first = step if first < 0 else first
            if done < count and first >= 0 and step - first >= life:
                time.sleep(moments.uniform(0, 0.05))
                _kill(process)
                done += 1
                break
            if step >= 0:
                pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
                samples.append((step, pages * mmap.PAGESIZE // 2**10, len([*Path(f"/proc/{process}/fd").iterdir()])))
            time.sleep(0.02)
    assert status == 0, (run.folder / "log.txt").read_text()[-2000:]
    near = max(settled // 5, 2)
    early = [each for each in lives[0] if settled <= each[0] < settled + near]
    of_last = [each for each in lives[-1] if lives[-1][0][0] + settled <= each[0] < lives[-1][0][0] + settled + near]
    late = [each for each in lives[-1] if each[0] >= steps - near]

    def growth(before: list[tuple[int, int, int]]) -> float:
        return round(max(size for _, size, _ in late) / max(size for _, size, _ in before) - 1, 4)

    return {
        "steps": steps,
        "kills": done,
        f"resident KiB at step {settled}": max(size for _, size, _ in early),
        "resident KiB at the end": max(size for _, size, _ in late),
        "growth": growth(early),
        "last process: steps": steps - lives[-1][0][0],
        f"last process: growth from its step {settled}": growth(of_last) if of_last else None,
        f"open files at step {settled}": min(files for _, _, files in early),
        "open files at the end": min(files for _, _, files in late),
        "exit status": status,
    }


class _DoublePool(TrajectoryPool):
    """Stored experts, which are float32, as float64."""

    def load(self, key: CandidateKey) -> TrajectorySegment:
        segment = super().load(key)
        return TrajectorySegment(key, segment.theta.double(), segment.target.double())

    def networks(self) -> Iterator[torch.Tensor]:
        yield from (theta.double() for theta in super().networks())


def builders(folder: Path, experts: int, epochs: int = 8, rounds: int = 3) -> Values:
    """Time one process that trains experts, two with a store each, and two with one store, in turns.

    What two processes do together on this machine bounds what they can gain: half of the time of two independent ones.
    """
    options = f"--data DigitsDataModule --network ConvNet-1-W8 --num_experts {experts} --epochs {epochs} --device cpu"

    def seconds(*stores: str) -> float:
        begun, processes = time.monotonic(), list[int]()
        for store in stores:
            if (process := os.fork()) == 0:
                with Path(os.devnull).open("w") as nowhere:
                    os.dup2(nowhere.fileno(), 1)
                    os.dup2(nowhere.fileno(), 2)
                command(["experts", *options.split(), "--path", str(folder / store)])
                os._exit(0)
            processes.append(process)
        if any(os.waitpid(process, 0)[1] for process in processes):
            raise RuntimeError("a builder failed")
        return time.monotonic() - begun

    taken = [
        (seconds(f"{number}-one"), seconds(f"{number}-a", f"{number}-b"), seconds(*[f"{number}-both"] * 2))
        for number in range(rounds)
    ]
    ratios = {
        "two with a store each / one": median(apart / alone for alone, apart, _ in taken),
        "two with one store / one": median(both / alone for alone, _, both in taken),
        "two with one store / half of two with a store each": median(2 * both / apart for _, apart, both in taken),
    }
    return {
        "experts, epochs, rounds": [experts, epochs, rounds],
        "seconds of one, of two with a store each, of two with one store": [
            round(median(arm), 1) for arm in zip(*taken, strict=True)
        ],
        **{name: round(ratio, 2) for name, ratio in ratios.items()},
    }


def losses(folder: Path, steps: int = 20) -> dict[str, list[float]]:
    """Return each configuration's first losses, distilled in float64 and without a Trainer."""
    found: dict[str, list[float]] = {}
    torch.set_default_dtype(torch.float64)
    data = DigitsDataModule()
    real = RealSet(data.train.images.double(), data.train.labels, data.num_classes)
    for name, (model, selection) in CONFIGURATIONS.items():
        parts = {key: value for key, value in model.items() if key not in ("objective", "pool")}
        made = {key: value.pop("init_args") for key, value in copy.deepcopy(model).items() if isinstance(value, dict)}
        objective = getattr(dd_lightning, model["objective"]["class_path"])(**made["objective"])
        kind, recipe = (_DoublePool, ExpertRecipe) if "path" in made["pool"] else (NetworkPool, NetworkRecipe)
        options = made["pool"] | {"recipe": recipe(**made["pool"]["recipe"])}
        if "path" in options:
            options["path"] = str(folder / "experts")
        storage = Storage(**{key: value for key, value in parts.items() if key in Storage.__dataclass_fields__})
        moves = {key: value for key, value in parts.items() if key in SyntheticOptimizer.__dataclass_fields__}
        rules = {key: parts[key] for key in ("inner_loop", "clamp") if key in parts}
        run = Distillation(objective, kind(**options), storage, SyntheticOptimizer(**moves), seed=3, **rules)
        count = 1 if selection is None else selection["num_candidates"]
        network = FunctionalNetwork("ConvNet-1-W4", data.image_shape, data.num_classes)
        soft = storage.labels == "soft"
        setup = PoolSetup(network, real, "digits", data.fingerprint, seed=3, steps=steps, size=count, soft_labels=soft)
        synthetic = run.setup(setup, data.space, count)
        run.draw_initial()
        optimizer = run.optimizer.build(synthetic, objective.learnable, data.num_classes)
        found[name] = []
        for step in range(steps):
            run.begin(step)
            keys = run.draw(count)
            scored = run.score(keys)
            odds = selection_probabilities(torch.stack([each.loss for each in scored]), 0.5, "high_loss", "none", 0.0)
            run.select(scored[sample_index(odds, run.context.generator("selection"))], keys)
            taken = run.take()
            optimizer.zero_grad()
            run.loss(taken).backward()
            run.adjust_gradients()
            optimizer.step()
            found[name].append(float(taken.loss))
        print(f"{name}: {found[name][0]:.12g} .. {found[name][-1]:.12g}", flush=True)
    return found


def compare(found: dict[str, list[float]], golden: dict[str, list[float]]) -> float:
    """Return the largest relative difference between two sets of losses; NaN if one is not finite."""
    pairs = [pair for name in golden for pair in zip(found[name], golden[name], strict=True)]
    return float(torch.tensor([abs(one - other) / abs(other) for one, other in pairs]).max())


def describe(results: Values) -> str:
    """Lay the figures out as Markdown."""
    lines = ["# Reliability", "", "Written by `benchmarks/reliability.py` from `reliability.json`.", ""]
    for name, part in results.items():
        figures, seed = part["figures"], f"seed {part.get('seed')}, " * ("seed" in part)
        lines += [f"## {name}", "", f"`{part['command']}`, {seed}commit {part['commit']}, "]
        lines[-1] += f"{part['hardware']}" + (f", {part['seconds']:.0f} s." if "seconds" in part else ".")
        plain = {key: value for key, value in figures.items() if not isinstance(value, dict)}
        for head, table in [("figure", plain), *((k, v) for k, v in figures.items() if isinstance(v, dict))]:
            columns = [*next(iter(table.values()))] if isinstance(next(iter(table.values())), dict) else [""]
            lines += ["", f"| {head} | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
            for key, value in table.items():
                cells = [value[each] for each in columns] if isinstance(value, dict) else [value]
                lines.append(f"| {key} | {' | '.join(map(str, cells))} |")
        lines.append("")
    return "\n".join(lines)


def _checkpoint(folder: Path) -> bytes:
    """Return a checkpoint that a run wrote."""
    run = Run(folder / "checkpoint", "MTT + DynaDistill", 2)
    assert _wait(run.start(), 600) == 0, (run.folder / "log.txt").read_text()[-2000:]
    (path,) = run.folder.glob("runs/*/*/checkpoints/*.ckpt")
    return path.read_bytes()


def main() -> None:
    """Run one part; its figures are written as it goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["kills", "ranks", "fuzz", "soak", "builders", "golden", "compare"])
    parser.add_argument("--kills", type=int, default=None, help="SIGKILLs: 500, 20 of `ranks`, 30 of `soak`.")
    parser.add_argument("--inputs", type=int, default=100_000, help="Damaged files to read.")
    parser.add_argument("--steps", type=int, default=2000, help="Of the soak.")
    parser.add_argument("--experts", type=int, default=64, help="That the builders train.")
    parser.add_argument("--seed", type=int, default=0, help="Of the moments and the damage.")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS)
    began = time.monotonic()

    def report(figures: Values) -> None:
        place = options.results / "reliability.json"
        results = json.loads(place.read_text()) if place.exists() else {}
        results[options.part] = {
            "command": f"python benchmarks/reliability.py {' '.join(sys.argv[1:]).split(' --results')[0]}",
            "commit": commit.stdout.strip(),
            "hardware": f"{hardware()}, torch {torch.__version__}, 1 thread",
            "seed": options.seed,
            "seconds": time.monotonic() - began,
            "figures": figures,
        }
        options.results.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(results, indent=1) + "\n")
        (options.results / "reliability.md").write_text(describe(results))

    with tempfile.TemporaryDirectory() as temporary:
        folder, golden = Path(temporary), options.results / "golden_losses.json"
        if options.part == "golden":
            golden.write_text(json.dumps(losses(folder), indent=1) + "\n")
        elif options.part == "compare":
            difference = compare(losses(folder), json.loads(golden.read_text()))
            print(f"largest relative difference: {difference:.2g}")
            sys.exit(int(not difference < LARGEST_DIFFERENCE))
        elif options.part == "kills":
            report(kills(options.kills or 500, options.seed, folder, report))
        elif options.part == "ranks":
            report(rank_kills(options.kills or 20, options.seed, folder, report))
        elif options.part == "soak":
            report(soak(options.kills or 30, options.seed, folder, options.steps))
        elif options.part == "builders":
            report(builders(folder, options.experts))
        else:
            report(fuzz(options.inputs, options.seed, folder, _checkpoint(folder), report))


if __name__ == "__main__":
    main()
