"""Kill runs at random moments, and read damaged files: what is promised about both, counted.

    python benchmarks/reliability.py kills --kills 500      # SIGKILL, resume, compare the images bit for bit
    python benchmarks/reliability.py fuzz --inputs 100000   # damaged files: read, or refused by one of our own errors
    python benchmarks/reliability.py soak --kills 30        # one long run, killed and resumed: memory and open files
    python benchmarks/reliability.py compare                # the first losses of each method against the stored ones

Each part writes its figures to `results/reliability.json` as it goes, and `results/reliability.md` is made of them.
Processes are forked from one that has imported everything, so a start costs milliseconds. One thread; not on Windows.
"""

import argparse
import contextlib
import copy
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: a process of several threads must not fork

import torch
import yaml
from accuracy_curves import hardware

import dd_lightning
from dd_lightning.cli.main import main as command
from dd_lightning.datamodules import DigitsDataModule
from dd_lightning.distillation import Distillation
from dd_lightning.functional.errors import DistillationError
from dd_lightning.functional.formation import Formation
from dd_lightning.functional.selection import sample_index, selection_probabilities
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.pools import CandidateKey, NetworkPool, PoolSetup, TrajectoryPool, TrajectorySegment
from dd_lightning.sets.color_spaces import PixelSpace
from dd_lightning.sets.optimizer import SyntheticOptimizer
from dd_lightning.sets.real import RealSet
from dd_lightning.sets.storage import Storage
from dd_lightning.sets.synthetic_file import SyntheticFile, load_synthetic, save_synthetic
from dd_lightning.trainer.checkpoints import read_checkpoint
from dd_lightning.training.expert_store import ExpertIdentity, ExpertState, ExpertStore
from dd_lightning.training.recipes import ExpertRecipe, NetworkRecipe

RESULTS = Path(__file__).resolve().parent / "results"
STEPS = 10
_SETTLED = 8.0  # seconds after which a run has allocated what it needs: some hundred steps
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

    def start(self) -> int:
        """Start it in a process of its own, from its newest checkpoint if there is one."""
        resume = ["--ckpt_path", "last"] if list(self.folder.glob("runs/*/*/checkpoints/*.ckpt")) else []
        if (process := os.fork()) != 0:
            return process
        status = 1
        try:
            os.chdir(self.folder)
            log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
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


def _wait(process: int, seconds: float) -> int | None:
    """Wait for a process; return its exit status, or kill it and return None."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        finished, status = os.waitpid(process, os.WNOHANG)
        if finished:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def kills(count: int, seed: int, folder: Path) -> Values:
    """Kill runs of each configuration at random moments until `count` kills are reached in all."""
    figures: Values = {"kills": 0, "runs": 0, "equal": 0, "configurations": {}}
    moments = random.Random(seed)
    for name in CONFIGURATIONS:
        own = {"kills": 0, "runs": 0, "equal": 0}
        figures["configurations"][name] = own
        whole = Run(folder / name / "whole", name)
        began = time.monotonic()
        assert _wait(whole.start(), 600) == 0, (whole.folder / "log.txt").read_text()[-2000:]
        seconds, images = time.monotonic() - began, whole.images()
        while own["kills"] < -(-count // len(CONFIGURATIONS)):
            run, status = Run(folder / name / str(own["runs"]), name), None
            while status is None:
                status = _wait(run.start(), moments.uniform(0.02, 1.0) * seconds)
                own["kills"] += status is None
            assert status == 0, (run.folder / "log.txt").read_text()[-2000:]
            own["runs"] += 1
            own["equal"] += torch.equal(run.images(), images)
        for key, value in own.items():
            figures[key] += value
        print(f"{name}: {own}", flush=True)
    return figures


def soak(count: int, seed: int, folder: Path, steps: int = 2000) -> Values:
    """Take many steps, killed and resumed on the way; compare memory and open files at the start and at the end."""
    run, moments = Run(folder / "soak", "MTT + DynaDistill", steps), random.Random(seed)
    text = (run.folder / "config.yaml").read_text()
    (run.folder / "config.yaml").write_text(text.replace("every_n_train_steps: 2", "every_n_train_steps: 20"))
    figures: Values = {"steps": steps, "kills": 0, "growth": [], "open_files": []}
    status: int | None = None
    while status is None:
        process, began, first = run.start(), time.monotonic(), None
        lifetime = moments.uniform(1.0, 4.0) if figures["kills"] < count else 3600.0
        while time.monotonic() - began < lifetime:
            finished, code = os.waitpid(process, os.WNOHANG)
            if finished:
                status = os.waitstatus_to_exitcode(code)
                break
            with contextlib.suppress(OSError, ValueError):
                pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
                files = len(list(Path(f"/proc/{process}/fd").iterdir()))
                if time.monotonic() - began > _SETTLED and first is None:
                    first = pages, files
                last = pages, files
            time.sleep(0.05)
        else:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            figures["kills"] += 1
        if first is not None:
            figures["growth"].append(last[0] / first[0] - 1)
            figures["open_files"].append([first[1], last[1]])
    figures["exit_status"] = status
    return figures


class _DoublePool(TrajectoryPool):
    """Stored experts, which are float32, as float64."""

    def load(self, key: CandidateKey) -> TrajectorySegment:
        segment = super().load(key)
        return TrajectorySegment(key, segment.theta.double(), segment.target.double())

    def networks(self) -> Iterator[torch.Tensor]:
        yield from (theta.double() for theta in super().networks())


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
    """Return the largest relative difference between two sets of losses."""
    pairs = [pair for name in golden for pair in zip(found[name], golden[name], strict=True)]
    return max(abs(one - other) / abs(other) for one, other in pairs)


def _readers(folder: Path) -> dict[str, tuple[Path, Callable[[Path], object]]]:
    """Write a small valid file of each kind, and say how it is read."""
    one = Path(folder / "synthetic.safetensors")
    images = torch.rand(4, 1, 4, 4)
    save_synthetic(
        one,
        SyntheticFile(
            images=images,
            labels=torch.arange(4),
            num_classes=4,
            space=PixelSpace(),
            stored_as="network",
            formation=Formation(),
            lr=0.01,
            evaluation_lr=0.01,
            dataset="digits",
            objective="TrajectoryMatching",
            network="ConvNet-1-W4",
            step=1,
            config={"model": {"ipc": 1}},
        ),
    )
    store = ExpertStore(folder / "store")
    identity = ExpertIdentity("net", ["w"], [[16]], "0" * 16, "data", {"lr": 0.1})
    store.write({0: ExpertState(torch.rand(3, 16), momentum=torch.rand(16))}, identity, 0)
    checkpoint = folder / "step=1.ckpt"
    torch.save(
        {"distillation": {"format_version": 3, "seed": 1}, "state_dict": {"synthetic.images": images}}, checkpoint
    )

    def expert(path: Path) -> object:
        at = ExpertStore(path.parent)
        at.check(identity)
        return at.metadata(0), at.epochs(0), at.rows(0, [0, 2]), at.read(0)

    return {
        "synthetic set": (one, load_synthetic),
        "expert": (store.file(0), expert),
        "checkpoint": (checkpoint, read_checkpoint),
    }


def _mutated(original: bytes, draw: random.Random) -> bytes:
    """Damage a file: bytes, its end, or a value in its text."""
    data, kind = bytearray(original), draw.randrange(5)
    if kind == 0:
        for _ in range(draw.randint(1, 8)):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == 1:
        del data[draw.randrange(len(data)) :]
    elif kind == 2:
        place = draw.randrange(len(data))
        data[place : place + draw.randint(1, 64)] = draw.randbytes(draw.randint(0, 64))
    else:  # another value in the JSON text of the header, whose length follows
        length = int.from_bytes(data[:8], "little")
        if not 0 < length < len(data):
            return bytes(data[::-1])
        text = data[8 : 8 + length].decode("utf-8", "replace")
        values = [
            "-1",
            "0",
            "1e999",
            "null",
            "[]",
            "{}",
            '\\"x\\"',
            "true",
            "9" * 30,
            "[" * 2000,
            "4294967296",
            '\\"\\"',
        ]
        spots = [i for i, letter in enumerate(text) if letter in ":,["]
        start = draw.choice(spots) + 1 if spots else 0
        end = min(start + draw.randint(0, 12), len(text))
        header = (text[:start] + draw.choice(values) + text[end:]).encode()
        data = bytearray(len(header).to_bytes(8, "little") + header + data[8 + length :])
    return bytes(data)


def fuzz(count: int, seed: int, folder: Path) -> Values:
    """Read damaged files; anything but a result or an error of our own is listed."""
    figures: Values = {"inputs": 0, "read": 0, "refused": 0, "slowest_seconds": 0.0, "faults": []}
    draw = random.Random(seed)
    for name, (path, read) in _readers(folder).items():
        original = path.read_bytes()
        for _ in range(-(-count // 3)):
            path.write_bytes(_mutated(original, draw))
            began = time.perf_counter()
            try:
                read(path)
                figures["read"] += 1
            except DistillationError as error:
                figures["refused"] += 1
                if "\n" in str(error) or len(str(error)) > 2000:
                    figures["faults"].append(f"{name}: a message of {len(str(error))} letters: {str(error)[:100]!r}")
            except BaseException as error:
                figures["faults"].append(f"{name}: {type(error).__name__}: {error}"[:300])
                (folder / f"fault-{len(figures['faults'])}").write_bytes(path.read_bytes())
            seconds = time.perf_counter() - began
            figures["slowest_seconds"] = max(figures["slowest_seconds"], seconds)
            figures["inputs"] += 1
            if len(figures["faults"]) > 50:
                return figures
        path.write_bytes(original)
        print(f"{name}: {figures['inputs']} inputs, {len(figures['faults'])} faults", flush=True)
    figures["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return figures


def describe(results: Values) -> str:
    """Lay the figures out as Markdown."""
    lines = ["# Reliability", "", "Written by `benchmarks/reliability.py` from `reliability.json`.", ""]
    for name, part in results.items():
        figures = dict(part["figures"])
        of_each = figures.pop("configurations", {})
        lines += [f"## {name}", "", f"`{part['command']}`, commit {part['commit']}, {part['hardware']}.", ""]
        lines += ["| figure | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in figures.items()), ""]
        if of_each:
            columns = list(next(iter(of_each.values())))
            lines += [f"| configuration | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
            lines += [f"| {key} | {' | '.join(str(own[each]) for each in columns)} |" for key, own in of_each.items()]
            lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Run one part and write its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["kills", "fuzz", "soak", "golden", "compare"])
    parser.add_argument("--kills", type=int, default=None, help="SIGKILLs: 500 of `kills`, 30 of `soak`.")
    parser.add_argument("--inputs", type=int, default=100_000, help="Damaged files to read.")
    parser.add_argument("--steps", type=int, default=2000, help="Of the soak.")
    parser.add_argument("--seed", type=int, default=0, help="Of the moments and the damage.")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder, golden = Path(temporary), options.results / "golden_losses.json"
        if options.part == "golden":
            golden.write_text(json.dumps(losses(folder), indent=1) + "\n")
            return
        if options.part == "compare":
            difference = compare(losses(folder), json.loads(golden.read_text()))
            print(f"largest relative difference: {difference:.2g}")
            sys.exit(int(not difference < LARGEST_DIFFERENCE))
        if options.part == "kills":
            figures = kills(options.kills or 500, options.seed, folder)
        elif options.part == "soak":
            figures = soak(options.kills or 30, options.seed, folder, options.steps)
        else:
            figures = fuzz(options.inputs, options.seed, folder)
    place = options.results / "reliability.json"
    results = json.loads(place.read_text()) if place.exists() else {}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS)
    results[options.part] = {
        "command": f"python benchmarks/reliability.py {' '.join(sys.argv[1:]).split(' --results')[0]}",
        "commit": commit.stdout.strip(),
        "hardware": f"{hardware()}, torch {torch.__version__}, 1 thread",
        "figures": figures,
    }
    options.results.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(results, indent=1) + "\n")
    (options.results / "reliability.md").write_text(describe(results))
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
