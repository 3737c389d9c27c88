"""Every file under configs/ does what it says, in miniature, and the published ones hold the published numbers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dd_lightning.module
from dd_lightning.cli import DistillationCLI, main
from dd_lightning.formats import ExpertStore
from dd_lightning.functional.random import step_generator
from dd_lightning.module import DistillationModule
from dd_lightning.objectives import TrajectoryMatching
from dd_lightning.pools import TrajectoryPool
from dd_lightning.synthetic import initial_images
from tests.generated_cifar import write_cifar10, write_cifar100

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FILES = {path.relative_to(CONFIGS).with_suffix("").as_posix(): path for path in sorted(CONFIGS.glob("**/*.yaml"))}
OVERLAYS = {"dynadistill", "smoke", "smoke_cifar"}
PLAIN: dict[str, dict[str, Any]] = {name: yaml.safe_load(path.read_text()) for name, path in FILES.items()}
EXPERTS = [name for name, plain in PLAIN.items() if {"path", "epochs", "data"} <= set(plain)]
FITS = [name for name, plain in PLAIN.items() if {"model", "data", "trainer"} <= set(plain)]
SMOKE_STEPS = 3

# Lightning 2.6's use of jsonargparse 4; DeprecationWarnings that the command line's users never see
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")


class Published(NamedTuple):
    """DC-BENCH, methods/tm/readme.md, as given there by the authors of MTT."""

    syn_steps: int
    expert_epochs: int
    max_start_epoch: int
    batch_syn: int | None
    image_lr: float
    student_lr_lr: float
    student_lr: float
    zca: bool


PUBLISHED = {
    "mtt/cifar10_ipc1": Published(50, 2, 2, None, 100, 1e-7, 0.01, zca=True),
    "mtt/cifar10_ipc10": Published(30, 2, 20, None, 100, 1e-5, 0.001, zca=True),
    "mtt/cifar10_ipc50": Published(30, 2, 40, None, 1000, 1e-5, 0.001, zca=False),
    "mtt/cifar100_ipc1": Published(20, 3, 20, None, 1000, 1e-5, 0.01, zca=True),
    "mtt/cifar100_ipc10": Published(20, 2, 20, None, 1000, 1e-5, 0.01, zca=False),
    "mtt/cifar100_ipc50": Published(80, 2, 40, 125, 1000, 1e-5, 0.01, zca=True),
}


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("generated")
    write_cifar10(root, images_per_class=2)
    write_cifar100(root, images_per_class=2)
    return root


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, generated: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory in which out/generated is there, as the overlay expects it."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "generated").symlink_to(generated)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # the command sets it; this restores it
    return tmp_path


Fit = Callable[..., DistillationCLI]


@pytest.fixture
def fit(monkeypatch: pytest.MonkeyPatch) -> Fit:
    """``dd-lightning fit`` in this process; returns what it built."""

    def run(*names: str, flags: tuple[str, ...] = ()) -> DistillationCLI:
        done: list[DistillationCLI] = []
        with monkeypatch.context() as patch:
            patch.setattr(DistillationCLI, "after_fit", lambda cli: done.append(cli))
            main(["fit", *_config_flags(*names), "--trainer.enable_progress_bar=false", *flags])
        assert len(done) == 1
        return done[0]

    return run


def test_every_file_is_of_one_kind() -> None:
    assert len(FITS) >= 7
    assert len(EXPERTS) >= 3
    kinds = [*FITS, *EXPERTS, *OVERLAYS]
    assert sorted(kinds) == sorted(FILES)
    assert {"quickstart", *PUBLISHED} <= set(FITS)
    assert {"experts/digits", "experts/cifar10", "experts/cifar100"} <= set(EXPERTS)


@pytest.mark.parametrize("dynadistill", [False, True], ids=["plain", "dynadistill"])
@pytest.mark.parametrize("name", FITS)
def test_miniature_run(name: str, dynadistill: bool, fit: Fit, folder: Path) -> None:
    cli = fit(name, *(["dynadistill"] if dynadistill else []), *_smoke(name))

    module = cli.model
    assert isinstance(module, DistillationModule)
    classes = 100 if "cifar100" in name else 10
    images = module.synthetic_set.images.detach()
    assert images.shape == (2 * classes, 1, 8, 8) if name == "quickstart" else (2 * classes, 3, 32, 32)
    initial = initial_images(module.real, 2, "real", step_generator(0, 0, "initial"))
    assert torch.isfinite(images).all()
    assert ((images - initial).abs().flatten(1).amax(1) > 0).sum() > 0.9 * len(images)
    assert module.trainer.global_step == SMOKE_STEPS

    assert isinstance(module.pool, TrajectoryPool)
    selects = dynadistill or "selection" in PLAIN[name]
    assert len(module.pool.store.ids()) == (10 if dynadistill else 3)
    assert module.candidate_evaluations == SMOKE_STEPS * (3 if selects else 1)

    version = folder / "out" / "smoke_runs" / PLAIN[name]["name"] / "version_0"
    assert Path(module.trainer.log_dir or "").resolve() == version.resolve()
    scalars = _scalars(version)
    curve = scalars["eval/ConvNet-1-W4/accuracy"]
    assert [step for step, _ in curve] == [0, SMOKE_STEPS]
    assert all(0 <= accuracy <= 1 for _, accuracy in curve)
    assert [step for step, _ in scalars["distill/loss"]] == [0, 1, 2]
    selection = sorted(tag for tag in scalars if tag.startswith("selection/"))
    assert bool(selection) == selects
    if selects:
        assert [f"selection/loss_{i}" in selection for i in range(4)] == [True, True, True, False]
    assert sorted(path.name for path in folder.iterdir()) == ["out"]  # nothing beside it: no real run is touched


def test_order_of_overlay_does_not_matter(fit: Fit) -> None:
    name, smoke = "mtt/cifar10_ipc50", _smoke("mtt/cifar10_ipc50")
    first = fit("dynadistill", name, *smoke)
    last = fit(name, *smoke, "dynadistill")
    assert torch.equal(first.model.synthetic_set.images, last.model.synthetic_set.images)
    assert first.config_dump == last.config_dump
    assert first.config_dump["selection"]["init_args"]["num_candidates"] == 3


def test_every_fit_config_of_mtt_is_in_the_table() -> None:
    assert sorted(PUBLISHED) == [name for name in FITS if name.startswith("mtt/")]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[DistillationCLI] = []
    monkeypatch.setattr(DistillationCLI, "_run_subcommand", lambda cli, subcommand: built.append(cli))
    main(["fit", *_config_flags(name)])
    (cli,) = built
    module, data, row = cli.model, cli.datamodule, PUBLISHED[name]
    dataset, ipc = name.removeprefix("mtt/").split("_ipc")

    assert isinstance(module, DistillationModule)
    assert isinstance(module.objective, TrajectoryMatching)
    assert isinstance(module.pool, TrajectoryPool)
    assert row == Published(
        module.objective.syn_steps,
        module.pool.expert_epochs,
        module.pool.max_start_epoch,
        module.objective.batch_syn,
        module.image_lr,
        module.student_lr_lr,
        module.initial_student_lr,
        zca={"zca": True, "normalized": False}[data.color_space],
    )
    assert (data.name, module.ipc, module.network_spec) == (dataset, int(ipc), "ConvNet-3")
    assert (module.momentum, module.init_kind, module.label_kind, module.seed) == (0.5, "real", "hard", 0)
    assert (module.pool.size, module.pool.min_start_epoch, module.pool.refresh_rule) == (100, 0, "redraw")
    assert module.pool.train_epochs is None
    assert module.pool.needed_epochs == row.max_start_epoch - 1 + row.expert_epochs <= 50
    recipe = {"lr": 0.01, "momentum": 0.0, "weight_decay": 0.0, "batch_size": 256, "lr_decay": False, "seed": 0}
    strategy = "color_crop_cutout_flip_scale_rotate"
    assert module.pool.recipe.describe(50) == {**recipe, "augmentation": strategy}
    assert (data.val_fraction, data.verify, data.download) == (0.0, True, True)
    assert cli.trainer.max_steps == 2000
    config = cli.config.fit
    assert (config.seed_everything, config.name, config.selection) == (0, name.replace("/", "_"), None)
    assert config.model.objective.init_args.augmentation == strategy
    evaluation = config.evaluation.init_args
    assert evaluation.every_n_steps == {"1": 100, "10": 500, "50": 1000}[ipc]
    assert (evaluation.num_networks, evaluation.recipe, evaluation.epochs, evaluation.split) == (5, "mtt", None, "test")


def test_dynadistill_is_the_papers(capsys: pytest.CaptureFixture[str]) -> None:
    resolved = _resolved("fit", capsys, "mtt/cifar10_ipc1", "dynadistill")
    plain = _resolved("fit", capsys, "mtt/cifar10_ipc1")
    expected = {"num_candidates": 3, "temperature": 0.5, "pool_size": 10, "every_n_steps": 1}
    assert resolved.pop("selection")["init_args"] == {**expected, "favor": "high_loss", "normalize": "none"}
    assert plain.pop("selection") is None
    assert resolved == plain  # the whole difference is the overlay


@pytest.mark.parametrize("name", EXPERTS)
def test_expert_config_makes_the_stores_that_fits_read(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    experts = _resolved("experts", capsys, name)
    users = [user for user in FITS if PLAIN[user]["model"]["pool"]["init_args"]["path"] == experts["path"]]
    assert users
    for user in users:
        fitted = _resolved("fit", capsys, user)
        pool = fitted["model"]["pool"]["init_args"]
        assert experts["recipe"] == pool["recipe"]
        assert experts["network"] == fitted["model"]["network"]
        assert experts["data"]["class_path"] == fitted["data"]["class_path"]
        for option in ("color_space", "val_fraction", "split_seed", "root"):
            assert experts["data"]["init_args"][option] == fitted["data"]["init_args"][option]
        assert experts["num_experts"] == 100 >= pool["num_experts"]
        assert experts["epochs"] == 50 >= pool["max_start_epoch"] - 1 + pool["expert_epochs"]


def test_every_store_has_an_expert_config() -> None:
    made = [PLAIN[name]["path"] for name in EXPERTS]
    assert len(set(made)) == len(made)
    assert {PLAIN[name]["model"]["pool"]["init_args"]["path"] for name in FITS} == set(made)


@pytest.mark.parametrize("name", EXPERTS)
def test_miniature_experts(name: str, folder: Path) -> None:
    main(["experts", *_config_flags(name), *_miniature_experts(name, num_experts=2)])
    path = PLAIN[name]["path"]
    store = ExpertStore(path)
    assert store.ids() == [0, 1]
    assert [store.epochs(i) for i in store.ids()] == [2, 2]
    identity = store.metadata(0).identity
    assert (identity.network, identity.dataset) == ("ConvNet-1-W4", path.split("/")[1].split("_")[0])
    assert not torch.equal(store.rows(0, [2]), store.rows(0, [0]))
    assert (folder / path).is_dir()


@pytest.mark.parametrize("name", ["quickstart", "mtt/cifar10_ipc1", "mtt/cifar10_ipc50"])
def test_experts_that_are_there_are_used(name: str, fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    path = PLAIN[name]["model"]["pool"]["init_args"]["path"]
    (experts,) = [maker for maker in EXPERTS if PLAIN[maker]["path"] == path]
    main(["experts", *_config_flags(experts), *_miniature_experts(experts, num_experts=3)])
    files = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in Path(path).iterdir()}
    assert len(files) == 3

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("experts were trained again")

    monkeypatch.setattr(dd_lightning.module, "train_experts", refuse)
    cli = fit(name, *_smoke(name), flags=("--model.pool.init_args.path", path))
    assert cli.trainer.global_step == SMOKE_STEPS
    assert {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in Path(path).iterdir()} == files


def test_readme_has_a_row_for_every_file() -> None:
    rows = [line for line in (CONFIGS / "README.md").read_text().splitlines() if line.startswith("| [`")]
    named = [row.split("`")[1] for row in rows]
    assert sorted(named) == sorted(f"{name}.yaml" for name in FILES)
    for row, file in zip(rows, named, strict=True):
        assert f"]({file})" in row


def _config_flags(*names: str) -> list[str]:
    return [part for name in names for part in ("--config", str(FILES[name]))]


def _smoke(name: str) -> list[str]:
    return ["smoke", "smoke_cifar"] if "CIFAR" in PLAIN[name]["data"]["class_path"] else ["smoke"]


def _miniature_experts(name: str, num_experts: int) -> list[str]:
    """Flags that make experts such as configs/smoke.yaml uses."""
    flags = ["--network", "ConvNet-1-W4", "--num_experts", str(num_experts), "--epochs", "2", "--device", "cpu"]
    flags += ["--recipe.batch_size", str(PLAIN["smoke"]["model"]["pool"]["init_args"]["recipe"]["batch_size"])]
    if "CIFAR" in PLAIN[name]["data"]["class_path"]:
        flags += [
            f"--data.init_args.{option}={value}" for option, value in PLAIN["smoke_cifar"]["data"]["init_args"].items()
        ]
    return flags


def _resolved(command: str, capsys: pytest.CaptureFixture[str], *names: str) -> dict[str, Any]:
    """What the command line makes of some files, defaults filled in."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([command, *_config_flags(*names), "--print_config"])
    assert stop.value.code == 0
    resolved: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return resolved


def _scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
