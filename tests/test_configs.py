"""Every file under configs/ does what it says, in miniature, and the published ones hold the published numbers."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from dd_lightning.cli import fit as cli_fit
from dd_lightning.cli.fit import DistillationCLI
from dd_lightning.cli.main import main
from dd_lightning.functional.formation import Formation
from dd_lightning.functional.random import step_generator
from dd_lightning.module import DistillationModule
from dd_lightning.objectives import BidirectionalMatching, GradientMatching, TrajectoryMatching
from dd_lightning.pools import NetworkPool, TrajectoryPool, trajectory_pool
from dd_lightning.sets.initial import initial_images
from dd_lightning.training.expert_store import ExpertStore
from dd_lightning.training.recipes import ExpertRecipe, NetworkRecipe
from tests.generated_cifar import write_cifar10, write_cifar100
from tests.generated_mnist import write_mnist

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FILES = {path.relative_to(CONFIGS).with_suffix("").as_posix(): path for path in sorted(CONFIGS.glob("**/*.yaml"))}
SMOKES = {"smoke", "smoke_trajectories", "smoke_datm", "smoke_networks", "smoke_bilevel", "smoke_cifar", "smoke_mnist"}
OVERLAYS = {"dynadistill", *SMOKES}
PLAIN: dict[str, dict[str, Any]] = {name: yaml.safe_load(path.read_text()) for name, path in FILES.items()}
EXPERTS = [name for name, plain in PLAIN.items() if {"path", "epochs", "data"} <= set(plain)]
FITS = [name for name, plain in PLAIN.items() if {"model", "data", "trainer"} <= set(plain)]
STORES = {  # of the configurations that learn from stored trajectories
    name: pool["init_args"]["path"]
    for name in FITS
    if (pool := PLAIN[name]["model"]["pool"])["class_path"] == "TrajectoryPool"
}
METHODS = sorted({name.split("/")[0]: name for name in reversed(FITS)}.values())  # one configuration of each
HUNDRED_CLASSES = [name for name in FITS if name.endswith("/cifar100_ipc10") and not name.startswith("datm/")]
"""The plain miniatures of these have all of CIFAR-100's classes, the others a few, which takes a tenth of the time."""
SMOKE_STEPS = 3
SMOKE_OF_POOL = {"TrajectoryPool": ["smoke_trajectories"], "NetworkPool": ["smoke_networks"]}
SMOKE_OF_DATA = {
    "DigitsDataModule": [],
    "CIFAR10DataModule": ["smoke_cifar"],
    "CIFAR100DataModule": ["smoke_cifar"],
    "MNISTDataModule": ["smoke_mnist"],
    "FashionMNISTDataModule": ["smoke_mnist"],
}

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


class PublishedDATM(NamedTuple):
    """DATM's YAML files (github.com/NUS-HPC-AI-Lab/DATM at 97ae510)."""

    syn_steps: int
    expert_epochs: int
    min_start_epoch: int
    current_max_start_epoch: int | None
    max_start_epoch: int
    expansion_steps: int | None
    batch_syn: int | None
    image_lr: float
    label_lr: float
    student_lr_lr: float
    loss_threshold: float


PUBLISHED_DATM = {
    "datm/cifar10_ipc1": PublishedDATM(80, 2, 0, None, 4, None, 10, 100, 5, 1e-7, 1.1),
    "datm/cifar10_ipc10": PublishedDATM(80, 2, 0, 10, 20, 1000, 100, 100, 2, 1e-5, 1.0),
    "datm/cifar10_ipc50": PublishedDATM(80, 2, 0, 20, 40, 2000, 500, 1000, 2, 1e-5, 1.0),
    "datm/cifar100_ipc1": PublishedDATM(40, 3, 0, 10, 20, 1000, 1000, 1000, 10, 1e-5, 1.0),
    "datm/cifar100_ipc10": PublishedDATM(80, 2, 0, 30, 50, 2000, 1000, 1000, 10, 1e-5, 1.0),
    "datm/cifar100_ipc50": PublishedDATM(80, 2, 20, None, 70, None, 1000, 1000, 10, 1e-5, 1.0),
}


class PublishedLive(NamedTuple):
    """What differs between the runs of IDC (misc/reproduce.py, argument.py) and of DREAM+ (condense_improve.py)."""

    image_lr: float
    batch: int
    init: str
    interval: int | None
    pretrain_epochs: int


PUBLISHED_LIVE = {
    "idc/cifar10_ipc1": PublishedLive(5e-4, 64, "real", None, 0),
    "idc/cifar10_ipc10": PublishedLive(5e-3, 64, "real", None, 0),
    "idc/cifar10_ipc50": PublishedLive(2.5e-2, 64, "real", None, 0),
    "idc/cifar100_ipc1": PublishedLive(5e-4, 64, "real", None, 0),
    "idc/cifar100_ipc10": PublishedLive(5e-3, 64, "real", None, 0),
    "idc/cifar100_ipc50": PublishedLive(2.5e-2, 64, "real", None, 0),
    "dream_plus/cifar10_ipc1": PublishedLive(5e-4, 128, "kmeans", 10, 1),
    "dream_plus/cifar10_ipc10": PublishedLive(5e-3, 128, "kmeans", 10, 1),
    "dream_plus/cifar10_ipc50": PublishedLive(2.5e-2, 128, "kmeans", 10, 1),
    "dream_plus/cifar100_ipc1": PublishedLive(5e-4, 128, "kmeans", 10, 1),
    "dream_plus/cifar100_ipc10": PublishedLive(5e-3, 128, "kmeans", 10, 1),
    "dream_plus/cifar100_ipc50": PublishedLive(2.5e-2, 128, "kmeans", 10, 1),
}


TILES = 2 * 2**2
"""Real images per class that the miniatures need: 2 stored images with factor 2 start from so many."""


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("generated")
    write_cifar10(root, TILES)
    write_cifar100(root, TILES, num_classes=12)
    for folder in ("MNIST", "FashionMNIST"):
        write_mnist(root, folder, TILES)
    return root


@pytest.fixture(scope="module")
def hundred_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hundred_classes")
    write_cifar100(root, TILES)
    return root


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, generated: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory in which out/generated is there, as the overlay expects it."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "generated").symlink_to(generated)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # the command sets it; this restores it
    return tmp_path


class Ran(NamedTuple):
    """What ``dd-lightning fit`` has built, and the images and labels that it began with."""

    cli: DistillationCLI
    initial: Tensor
    labels: Tensor


Fit = Callable[..., Ran]


@pytest.fixture
def fit(monkeypatch: pytest.MonkeyPatch) -> Fit:
    """``dd-lightning fit`` in this process."""

    def run(*names: str, flags: Sequence[str] = ()) -> Ran:
        done: list[DistillationCLI] = []
        initial: list[tuple[Tensor, Tensor]] = []

        def on_train_start(module: DistillationModule) -> None:
            synthetic = module.synthetic_set
            initial.append((synthetic.images.detach().clone(), synthetic.targets.detach().clone()))

        run_and_forget = cli_fit.run

        def run_and_keep(cli: DistillationCLI) -> None:
            run_and_forget(cli)
            done.append(cli)

        with monkeypatch.context() as patch:
            patch.setattr(cli_fit, "run", run_and_keep)
            patch.setattr(DistillationModule, "on_train_start", on_train_start)
            main(["fit", *_config_flags(*names), "--trainer.enable_progress_bar=false", *flags])
        assert (len(done), len(initial)) == (1, 1)
        return Ran(done[0], *initial[0])

    return run


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], DistillationCLI]:
    """What ``dd-lightning fit`` builds of a configuration, without running it."""

    def run(name: str) -> DistillationCLI:
        built: list[DistillationCLI] = []
        with monkeypatch.context() as patch:
            patch.setattr(cli_fit, "run", built.append)
            main(["fit", *_config_flags(name)])
        return built[0]

    return run


def test_every_file_is_of_one_kind() -> None:
    assert len(FITS) >= 7
    assert len(EXPERTS) >= 3
    kinds = [*FITS, *EXPERTS, *OVERLAYS]
    assert sorted(kinds) == sorted(FILES)
    assert {"quickstart", *PUBLISHED, *PUBLISHED_DATM, *PUBLISHED_LIVE} <= set(FITS)
    assert {"experts/digits", "experts/cifar10", "experts/cifar100"} <= set(EXPERTS)


@pytest.mark.parametrize("dynadistill", [False, True], ids=["plain", "dynadistill"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in METHODS else pytest.mark.slow) for name in FITS]
)
def test_miniature_run(name: str, dynadistill: bool, fit: Fit, folder: Path, hundred_classes: Path) -> None:
    # the published 100 inner iterations would end beyond the run
    outer = ["--model.inner_loop", str(SMOKE_STEPS)] if PLAIN[name]["model"].get("inner_loop") else []
    hundred = name in HUNDRED_CLASSES and not dynadistill
    root = ["--data.init_args.root", str(hundred_classes)] if hundred else []
    cli, initial, labels = fit(name, *(["dynadistill"] if dynadistill else []), *_smoke(name), flags=[*outer, *root])

    module, data, config = cli.model, cli.datamodule, cli.config
    assert isinstance(module, DistillationModule)
    images = module.synthetic_set.images.detach()
    assert images.shape == (2 * data.num_classes, *data.image_shape)
    assert (data.num_classes == 100) == hundred
    assert torch.isfinite(images).all()
    assert ((images - initial).abs().flatten(1).amax(1) > 0).sum() > 0.9 * len(images)
    if module.storage.init == "real":
        drawn = initial_images(module.problem.real, 2, "real", step_generator(0, 0, "initial"), module.storage.decoding)
        assert torch.equal(initial, data.space.decode(drawn) if module.storage.image_space == "pixels" else drawn)
    assert module.trainer.global_step == SMOKE_STEPS
    moved = (module.synthetic_set.targets.detach() - labels).abs()
    if module.storage.labels == "soft":
        assert moved.shape == (2 * data.num_classes, data.num_classes)
        assert (moved.amax(1) > 0).sum() > 0.9 * len(moved)
    else:
        assert not moved.any()

    selects = dynadistill or "selection" in PLAIN[name]
    if isinstance(module.pool, TrajectoryPool):
        assert len(module.pool.store.ids()) == (10 if dynadistill else 3)
    else:
        assert isinstance(module.pool, NetworkPool)
        asked = config.selection.init_args.pool_size if selects else None
        size = max(config.model.pool.init_args.num_networks, asked or 0)
        assert len(module.pool) == len(module.pool.state_dict()["thetas"]) == size
        assert size >= 10 if dynadistill else size >= 1
    candidates = config.selection.init_args.num_candidates if selects else 1
    assert module.distillation.candidate_evaluations == SMOKE_STEPS * candidates

    version = folder / "out" / "smoke_runs" / (PLAIN[name]["name"] + "_dynadistill" * selects) / "version_0"
    assert Path(module.trainer.log_dir or "").resolve() == version.resolve()
    scalars = _scalars(version)
    curve = scalars["accuracy/ConvNet-1-W4"]
    assert [step for step, _ in curve] == [0, SMOKE_STEPS]
    assert all(0 <= accuracy <= 1 for _, accuracy in curve)
    assert [step for step, _ in scalars["distill/loss"]] == [0, 1, 2]
    assert bool(outer) == any(tag.startswith("outer/") for tag in scalars)
    if outer:
        assert scalars["outer/accuracy/ConvNet-1-W4"] == [(0, curve[0][1]), (1, curve[1][1])]
        assert scalars["outer/loss"] == scalars["distill/loss"][:1]
    selection = sorted(tag for tag in scalars if tag.startswith("selection/"))
    assert bool(selection) == selects
    if selects:
        losses = [tag for tag in selection if tag.startswith("selection/loss_rank_")]
        assert losses == [f"selection/loss_rank_{i + 1}" for i in range(3 if dynadistill else candidates)]
    assert sorted(path.name for path in folder.iterdir()) == ["out"]  # nothing beside it: no real run is touched


def test_order_of_overlay_does_not_matter(fit: Fit) -> None:
    name, smoke = "mtt/cifar10_ipc50", _smoke("mtt/cifar10_ipc50")
    first = fit("dynadistill", name, *smoke).cli
    last = fit(name, *smoke, "dynadistill").cli
    assert torch.equal(first.model.synthetic_set.images, last.model.synthetic_set.images)
    assert first.config_dump == last.config_dump
    assert first.config_dump["selection"]["init_args"]["num_candidates"] == 3


def test_every_fit_config_of_mtt_is_in_the_table() -> None:
    assert sorted(PUBLISHED) == [name for name in FITS if name.startswith("mtt/")]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name: str, build: Callable[[str], DistillationCLI]) -> None:
    cli = build(name)
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
        module.optimizer.image_lr,
        module.optimizer.student_lr_lr,
        module.optimizer.student_lr,
        zca={"zca": True, "normalized": False}[data.color_space],
    )
    assert (data.name, module.storage.ipc, module.network_spec) == (dataset, int(ipc), "ConvNet-3")
    assert (module.optimizer.momentum, module.storage.init, module.storage.labels, module.distillation.seed) == (
        0.5,
        "real",
        "hard",
        0,
    )
    assert (len(module.pool), module.pool.min_start_epoch, module.pool.refresh) == (100, 0, "redraw")
    assert module.pool.train_epochs is None
    assert module.pool.needed_epochs == row.max_start_epoch - 1 + row.expert_epochs <= 50
    recipe = {"lr": 0.01, "momentum": 0.0, "weight_decay": 0.0, "batch_size": 256, "lr_decay": False, "seed": 0}
    strategy = "color_crop_cutout_flip_scale_rotate"
    assert module.pool.recipe.describe(50) == {**recipe, "augmentation": strategy}
    assert (data.val_fraction, data.verify, data.download) == (0.0, True, True)
    assert cli.trainer.max_steps == 2000
    config = cli.config
    assert (config.seed_everything, config.name, config.selection) == (0, name.replace("/", "_"), None)
    assert config.model.objective.init_args.augmentation == strategy
    evaluation = config.evaluation.init_args
    assert evaluation.every_n_steps == {"1": 100, "10": 500, "50": 1000}[ipc]
    assert (evaluation.num_networks, evaluation.recipe, evaluation.epochs, evaluation.split) == (5, "mtt", None, "test")


def test_every_config_of_datm_is_in_the_table() -> None:
    assert sorted(PUBLISHED_DATM) == [name for name in FITS if name.startswith("datm/")]


@pytest.mark.parametrize("name", PUBLISHED_DATM)
def test_published_numbers_of_datm(name: str, build: Callable[[str], DistillationCLI]) -> None:
    cli = build(name)
    module, data, row = cli.model, cli.datamodule, PUBLISHED_DATM[name]
    dataset, ipc = name.removeprefix("datm/").split("_ipc")

    assert isinstance(module, DistillationModule)
    objective, pool = module.objective, module.pool
    assert isinstance(objective, TrajectoryMatching)
    assert isinstance(pool, TrajectoryPool)
    assert objective.loss_threshold is not None
    assert row == PublishedDATM(
        objective.syn_steps,
        pool.expert_epochs,
        pool.min_start_epoch,
        pool.current_max_start_epoch,
        pool.max_start_epoch,
        pool.expansion_steps,
        objective.batch_syn,
        module.optimizer.image_lr,
        module.optimizer.label_lr,
        module.optimizer.student_lr_lr,
        objective.loss_threshold,
    )
    assert (data.name, data.color_space, module.storage.ipc, module.network_spec) == (
        dataset,
        "zca",
        int(ipc),
        "ConvNet-3",
    )
    assert (module.storage.labels, module.optimizer.label_momentum, module.optimizer.momentum, module.storage.init) == (
        "soft",
        0.9,
        0.5,
        "real",
    )
    assert (module.optimizer.student_lr, module.distillation.seed) == (0.01, 0)
    assert (len(pool), pool.refresh, pool.train_epochs) == (100, "redraw", 100)
    strategy = "color_crop_cutout_flip_scale_rotate"
    assert pool.recipe.describe(100) == ExpertRecipe(augmentation=strategy).describe(100)
    assert cli.config.model.objective.init_args.augmentation == strategy
    assert cli.trainer.max_steps == 10_000
    evaluation = cli.config.evaluation.init_args
    assert (evaluation.num_networks, evaluation.recipe, evaluation.epochs, evaluation.split) == (5, "mtt", None, "test")


def test_every_cifar_config_of_idc_and_dream_plus_is_in_the_table() -> None:
    assert sorted(PUBLISHED_LIVE) == [name for name in FITS if name.startswith(("idc/cifar", "dream_plus/cifar"))]


@pytest.mark.parametrize("name", PUBLISHED_LIVE)
def test_published_numbers_of_live_networks(name: str, build: Callable[[str], DistillationCLI]) -> None:
    cli = build(name)
    module, data, row = cli.model, cli.datamodule, PUBLISHED_LIVE[name]
    method, cell = name.split("/")
    dataset, ipc = cell.split("_ipc")

    assert isinstance(module, DistillationModule)
    objective, pool = module.objective, module.pool
    assert type(objective) is {"idc": GradientMatching, "dream_plus": BidirectionalMatching}[method]
    assert isinstance(objective, GradientMatching)
    assert isinstance(pool, NetworkPool)
    assert row == PublishedLive(
        module.optimizer.image_lr,
        objective.batch_real,
        module.storage.init,
        objective.interval if objective.sampling == "representative" else None,
        pool.pretrain_epochs,
    )
    assert row.image_lr == pytest.approx(5e-3 * int(ipc) / 10, rel=1e-12)
    assert (data.name, module.storage.ipc, module.network_spec) == (dataset, int(ipc), "ConvNet-3")
    assert (module.storage.decoding, module.storage.effective_ipc) == (Formation(2, "single"), 4 * int(ipc))
    assert (module.storage.image_space, module.optimizer.image_steps, module.optimizer.momentum) == (
        "pixels",
        "per_class",
        0.5,
    )
    assert (
        module.distillation.inner_loop,
        module.distillation.clamp,
        module.storage.labels,
        module.distillation.seed,
    ) == (100, True, "hard", 0)
    assert (objective.metric, objective.include_classifier, objective.include_bias) == ("mse", False, False)
    assert objective.batch_syn == 128
    assert (objective.augmentation, objective.policy) == ("color_crop_cutout", "idc")
    if isinstance(objective, BidirectionalMatching):
        assert objective.alpha == 1
        assert (objective.batch_real, objective.per_cluster) == (128, 1)
    assert (len(pool), pool.age_limit, pool.refresh) == (1, 100, "winner")
    assert pool.recipe == NetworkRecipe(
        lr=0.01,
        momentum=0.9,
        weight_decay=5e-4,
        batch_size=row.batch,
        images_per_update=2000,
        augmentation="color_crop",
        policy="idc",
        cutmix=0.5,
    )
    assert pool.recipe.steps_per_update * row.batch == 2048
    assert (data.color_space, data.val_fraction, data.verify, data.download) == ("normalized", 0.0, True, True)
    assert data.channel_stats == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    assert cli.trainer.max_steps == 400 * 100
    config = cli.config
    assert (config.seed_everything, config.name, config.selection) == (0, name.replace("/", "_"), None)
    evaluation = config.evaluation.init_args
    assert evaluation.every_n_steps == 40 * 100
    assert (evaluation.num_networks, evaluation.recipe, evaluation.epochs, evaluation.split) == (5, "idc", None, "test")


@pytest.mark.parametrize("name", [name for name in METHODS if "selection" not in PLAIN[name]])
def test_dynadistill_is_the_papers(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    resolved = _resolved("fit", capsys, name, "dynadistill")
    plain = _resolved("fit", capsys, name)
    expected = {"num_candidates": 3, "temperature": 0.5, "pool_size": 10, "every_n_steps": 1}
    economies = {"refresh_per_step": None, "score_steps": None}
    assert resolved.pop("selection")["init_args"] == {
        **expected,
        **economies,
        "favor": "high_loss",
        "normalize": "none",
    }
    assert plain.pop("selection") is None
    assert resolved == plain  # the whole difference is the overlay


@pytest.mark.parametrize("name", EXPERTS)
def test_expert_config_makes_the_stores_that_fits_read(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    experts = _resolved("experts", capsys, name)
    users = [user for user, path in STORES.items() if path == experts["path"]]
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
        trained = 100 if user.startswith("datm/") else experts["epochs"]
        assert trained >= pool["max_start_epoch"] - 1 + pool["expert_epochs"]
        assert pool["train_epochs"] == (100 if user.startswith("datm/") else None)
    assert experts["epochs"] == 50


def test_every_store_has_an_expert_config() -> None:
    made = [PLAIN[name]["path"] for name in EXPERTS]
    assert len(set(made)) == len(made)
    assert set(STORES.values()) == set(made)


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
    path = STORES[name]
    (experts,) = [maker for maker in EXPERTS if PLAIN[maker]["path"] == path]
    main(["experts", *_config_flags(experts), *_miniature_experts(experts, num_experts=3)])
    files = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in Path(path).iterdir()}
    assert len(files) == 3

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("experts were trained again")

    monkeypatch.setattr(trajectory_pool, "train_experts", refuse)
    cli = fit(name, *_smoke(name), flags=["--model.pool.init_args.path", path]).cli
    assert cli.trainer.global_step == SMOKE_STEPS
    assert {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in Path(path).iterdir()} == files


def test_readme_has_a_row_for_every_file() -> None:
    rows = [line for line in (CONFIGS / "README.md").read_text().splitlines() if line.startswith("| [`")]
    named = [row.split("`")[1] for row in rows]
    assert sorted(named) == sorted(f"{name}.yaml" for name in FILES)
    for row, file in zip(rows, named, strict=True):
        assert f"]({file})" in row


def test_readme_rows_stand_under_their_method() -> None:
    methods = {"mtt": "MTT", "datm": "DATM", "idc": "IDC", "dream_plus": "DREAM+", "dm": "DM"}
    methods |= {"quickstart.yaml": "MTT", "bilevel": "RaT-BPTT"}
    heading, seen = "", set()
    for line in (CONFIGS / "README.md").read_text().splitlines():
        if line.startswith("#"):
            heading = line
        elif line.startswith("| [`") and (folder := line.split("`")[1].split("/")[0]) in methods:
            assert heading.endswith(f"({methods[folder]})"), line
            seen.add(folder)
    assert seen == set(methods)


def _config_flags(*names: str) -> list[str]:
    return [part for name in names for part in ("--config", str(FILES[name]))]


def _smoke(name: str) -> list[str]:
    """Return the overlays that make a configuration a miniature."""
    model, data = PLAIN[name]["model"], PLAIN[name]["data"]
    own = [f"smoke_{kind}" for kind in ("datm", "bilevel") if name.startswith(f"{kind}/")]
    return ["smoke", *SMOKE_OF_POOL[model["pool"]["class_path"]], *own, *SMOKE_OF_DATA[data["class_path"]]]


def _miniature_experts(name: str, num_experts: int) -> list[str]:
    """Flags that make experts such as configs/smoke_trajectories.yaml uses."""
    flags = ["--network", "ConvNet-1-W4", "--num_experts", str(num_experts), "--epochs", "2", "--device", "cpu"]
    flags += [
        "--recipe.batch_size",
        str(PLAIN["smoke_trajectories"]["model"]["pool"]["init_args"]["recipe"]["batch_size"]),
    ]
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
