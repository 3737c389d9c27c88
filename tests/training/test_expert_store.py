import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, Self

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from dd_lightning.functional.errors import InputError
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.pools import PoolSetup, TrajectoryPool
from dd_lightning.sets.atomic_write import write_atomically
from dd_lightning.training.expert_store import ExpertAccuracies, ExpertIdentity, ExpertState, ExpertStore
from dd_lightning.training.experts import train_experts
from dd_lightning.training.recipes import ExpertRecipe
from tests import small

IDENTITY = ExpertIdentity(
    network="Tiny",
    parameter_names=("weight", "bias"),
    parameter_shapes=((2, 3), (2,)),
    fingerprint="abc",
    dataset="digits",
    recipe=ExpertRecipe(lr=0.02).describe(epochs=4),
)
ACCURACIES = ExpertAccuracies(train=[0.25, 0.1 + 0.2], held_out=[None, 1 / 3])


def trajectory(epochs: int = 2) -> Tensor:
    return torch.randn(epochs + 1, 8, generator=torch.Generator().manual_seed(epochs))


@pytest.fixture
def store(tmp_path: Path) -> ExpertStore:
    store = ExpertStore(tmp_path / "deep" / "experts")
    store.write({3: ExpertState(trajectory(), accuracies=ACCURACIES)}, IDENTITY, seed=5)
    return store


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_round_trip_is_exact(store: ExpertStore) -> None:
    assert store.ids() == [3]
    assert store.epochs(3) == 2
    assert torch.equal(store.rows(3, [0, 1, 2]), trajectory())
    assert torch.equal(store.rows(3, [2, 0, 2]), trajectory()[[2, 0, 2]])
    assert store.rows(3, []).shape == (0, 8)
    state = store.read(3)
    assert torch.equal(state.trajectory, trajectory())
    assert state.momentum is state.statistics is None
    assert state.accuracies == ACCURACIES
    metadata = store.metadata(3)
    assert metadata.seed == 5
    assert metadata.accuracies == ACCURACIES
    assert metadata.identity.plain() == IDENTITY.plain()
    assert metadata.identity.parameter_shapes == [[2, 3], [2]]


def test_momentum_and_statistics_are_kept(store: ExpertStore) -> None:
    momentum, statistics = torch.arange(8.0) / 7, torch.arange(6.0)
    store.write({4: ExpertState(trajectory(), momentum, statistics, ACCURACIES)}, IDENTITY, seed=5)
    state = store.read(4)
    assert state.momentum is not None
    assert state.statistics is not None
    assert torch.equal(state.momentum, momentum)
    assert torch.equal(state.statistics, statistics)
    assert store.ids() == [3, 4]


def test_equal_content_is_equal_bytes(store: ExpertStore) -> None:
    before = store.file(3).read_bytes()
    store.write({3: ExpertState(trajectory(), accuracies=ACCURACIES)}, IDENTITY, seed=5)
    assert store.file(3).read_bytes() == before


def test_rows_reads_only_the_rows_it_is_asked_for(store: ExpertStore, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = safetensors.safe_open
    read: list[Tensor] = []

    class Watched:
        """A file that refuses to hand out a whole tensor and records what its slices hand out."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
            self.file: Any = real_open(*args, **kwargs)

        def __enter__(self) -> Self:
            self.file.__enter__()
            return self

        def __exit__(self, *args: object) -> None:
            self.file.__exit__(*args)

        def metadata(self) -> dict[str, str]:
            found: dict[str, str] = self.file.metadata()
            return found

        def get_tensor(self, name: str) -> Tensor:
            raise AssertionError(f"the whole of {name} was read")

        def get_slice(self, name: str) -> "WatchedSlice":
            return WatchedSlice(self.file.get_slice(name))

    class WatchedSlice:
        def __init__(self, part: Any) -> None:  # noqa: ANN401
            self.part = part

        def get_shape(self) -> list[int]:
            shape: list[int] = self.part.get_shape()
            return shape

        def __getitem__(self, index: slice) -> Tensor:
            tensor: Tensor = self.part[index]
            read.append(tensor)
            return tensor

    store.write({0: ExpertState(trajectory(50))}, IDENTITY, seed=5)
    monkeypatch.setattr(safetensors, "safe_open", Watched)
    assert torch.equal(store.rows(0, [40, 7]), trajectory(50)[[40, 7]])
    assert store.epochs(0) == 50
    assert sum(tensor.nbytes for tensor in read) == 2 * 8 * 4


def test_an_epoch_that_is_not_stored_is_refused(store: ExpertStore) -> None:
    for epoch in (3, -1):
        with pytest.raises(InputError, match=rf"epoch {epoch} of expert 3 .*epochs 0 to 2; train the experts") as error:
            store.rows(3, [0, epoch])
        one_line(error)


def test_a_missing_directory_is_an_empty_store(tmp_path: Path) -> None:
    store = ExpertStore(tmp_path / "nowhere")
    assert store.ids() == []
    store.check(IDENTITY)
    assert not store.path.exists()
    with pytest.raises(InputError, match=r"expert 0 was asked for, .*nowhere holds 0 experts.*train it first"):
        store.epochs(0)


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file, it must be a directory; choose another path"):
        ExpertStore(tmp_path / "file")


@pytest.mark.parametrize(
    ("change", "where", "stored", "wanted"),
    [
        ({"network": "Huge"}, "network", "'Tiny'", "'Huge'"),
        ({"parameter_names": ("weight", "offset")}, r"parameter_names\[1\]", "'bias'", "'offset'"),
        ({"parameter_shapes": ((2, 4), (2,))}, r"parameter_shapes\[0\]\[1\]", "3", "4"),
        ({"parameter_shapes": ((2, 3),)}, r"parameter_shapes\[1\]\[0\]", "2", "None"),
        ({"fingerprint": "def"}, "fingerprint", "'abc'", "'def'"),
        ({"dataset": "cifar10"}, "dataset", "'digits'", "'cifar10'"),
        ({"recipe": ExpertRecipe(lr=0.03).describe(4)}, "recipe.lr", "0.02", "0.03"),
        ({"recipe": ExpertRecipe(lr=0.02, lr_decay=True).describe(4)}, "recipe.lr_decay", "False", "True"),
    ],
)
def test_check_names_file_field_and_both_values(
    store: ExpertStore, change: dict[str, Any], where: str, stored: str, wanted: str
) -> None:
    store.check(IDENTITY)
    with pytest.raises(
        InputError,
        match=rf"expert_00003\.safetensors .*{where} = {stored}, this run has {wanted}; .*another",
    ) as error:
        store.check(dataclasses.replace(IDENTITY, **change))
    one_line(error)


def test_check_looks_at_every_file(store: ExpertStore) -> None:
    other = dataclasses.replace(IDENTITY, fingerprint="other")
    store.write({8: ExpertState(trajectory())}, other, seed=5)
    with pytest.raises(InputError, match=r"expert_00008\.safetensors"):
        store.check(IDENTITY)
    with pytest.raises(InputError, match=r"expert_00003\.safetensors"):
        store.check(other)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_named(store: ExpertStore, keep: int) -> None:
    store.file(3).write_bytes(store.file(3).read_bytes()[:keep])
    for use in (lambda: store.epochs(3), lambda: store.rows(3, [0]), lambda: store.check(IDENTITY)):
        with pytest.raises(InputError, match=r"expert_00003\.safetensors: it is damaged .*delete it") as error:
            use()
        one_line(error)


def test_a_foreign_file_is_named(store: ExpertStore) -> None:
    safetensors.torch.save_file({"trajectory": trajectory()}, store.file(1))
    with pytest.raises(InputError, match=r"expert_00001\.safetensors: dd_lightning did not write it; delete it"):
        store.epochs(1)
    safetensors.torch.save_file({"weights": trajectory()}, store.file(1), {"dd_lightning": "{}"})
    with pytest.raises(InputError, match=r"expert_00001\.safetensors: dd_lightning did not write it; delete it"):
        store.epochs(1)


def test_a_newer_format_is_named(store: ExpertStore) -> None:
    text = json.dumps({"format": "expert", "format_version": 99})
    safetensors.torch.save_file({"trajectory": trajectory()}, store.file(1), {"dd_lightning": text})
    with pytest.raises(InputError, match=r"format 99, this dd_lightning .* reads up to 1; upgrade"):
        store.epochs(1)


def test_leftovers_are_passed_over(store: ExpertStore) -> None:
    (store.path / ".expert_00009.safetensors.abc.tmp").write_bytes(b"half")
    (store.path / "notes.txt").write_text("mine")
    assert store.ids() == [3]
    store.check(IDENTITY)


def test_write_refuses_other_shapes(store: ExpertStore) -> None:
    with pytest.raises(InputError, match=r"trajectory has shape \[3, 7\], but network Tiny has 8 parameters"):
        store.write({0: ExpertState(torch.zeros(3, 7))}, IDENTITY, seed=0)
    with pytest.raises(InputError, match=r"momentum has shape \[7\], but network Tiny has 8 parameters"):
        store.write({0: ExpertState(torch.zeros(3, 8), torch.zeros(7))}, IDENTITY, seed=0)
    assert store.ids() == [3]


def test_a_failed_write_leaves_the_old_file_and_no_rest(store: ExpertStore, monkeypatch: pytest.MonkeyPatch) -> None:
    before = store.file(3).read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(
        InputError, match=r"cannot write .*expert_00003.*No space left on device; free some space"
    ) as error:
        store.write({3: ExpertState(trajectory(4))}, IDENTITY, seed=5)
    one_line(error)
    assert store.file(3).read_bytes() == before
    assert [entry.name for entry in store.path.iterdir()] == ["expert_00003.safetensors"]


def test_a_parent_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"cannot write .*file/inside.*choose a path"):
        write_atomically(tmp_path / "file" / "inside", b"")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.0}, "recipe.lr is 0; it must be above 0"),
        ({"lr": float("nan")}, "recipe.lr is nan"),
        ({"momentum": 1.0}, "recipe.momentum is 1; it must be at least 0 and below 1"),
        ({"weight_decay": -1.0}, "recipe.weight_decay is -1"),
        ({"batch_size": 0}, "recipe.batch_size is 0"),
        ({"cutmix": 1.5}, "recipe.cutmix is 1.5"),
        ({"policy": "mtt"}, "policy is 'mtt'"),
        ({"augmentation": "blur"}, "blur"),
        ({"precision": "float16"}, "precision is 'float16'; use one of float32, tf32, bfloat16"),
    ],
)
def test_recipe_refuses_values_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ExpertRecipe(**change)


def test_recipe_names_its_length_only_where_it_matters() -> None:
    assert ExpertRecipe().describe(5) == ExpertRecipe().describe(9)
    assert ExpertRecipe(lr_decay=True).describe(5) != ExpertRecipe(lr_decay=True).describe(9)


def test_of_what_came_later_a_recipe_names_what_changes_an_expert() -> None:
    plain: dict[str, object] = {
        "lr": 0.01,
        "momentum": 0.0,
        "weight_decay": 0.0,
        "batch_size": 256,
        "lr_decay": False,
        "seed": 0,
    }
    plain |= {"augmentation": "color_crop_cutout_flip_scale_rotate"}  # as stores have it that are older
    assert ExpertRecipe().describe(5) == plain
    assert ExpertRecipe(policy="idc", cutmix=0.5).describe(5) == plain | {"policy": "idc", "cutmix": 0.5}
    for precision in ("tf32", "bfloat16"):
        assert ExpertRecipe(precision=precision).describe(5) == plain | {"precision": precision}


def test_of_several_files_none_is_replaced_unless_all_are_written(
    store: ExpertStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = store.file(3).read_bytes()
    calls = 0

    def full_at_the_second(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(28, "No space left on device")

    experts = {id: ExpertState(trajectory(4)) for id in (3, 4)}
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full_at_the_second)
        with pytest.raises(InputError, match=r"cannot write .*expert_00004"):
            store.write(experts, IDENTITY, 5)
    assert store.file(3).read_bytes() == before
    assert [entry.name for entry in store.path.iterdir()] == ["expert_00003.safetensors"]
    store.write(experts, IDENTITY, 5)
    assert [store.epochs(id) for id in store.ids()] == [4, 4]


OLD = Path(__file__).parents[1] / "fixtures" / "experts_format_1"


def test_a_store_of_the_first_release_is_read_and_continued(tmp_path: Path) -> None:
    data, recipe = small.data(), ExpertRecipe(lr=0.05, momentum=0.9, batch_size=30)
    network = FunctionalNetwork(small.NETWORK, data.image_shape, data.num_classes)
    stores = {name: ExpertStore(shutil.copytree(OLD, tmp_path / name)) for name in ("read", "continued")}
    pool = TrajectoryPool(str(stores["read"].path), num_experts=2, expert_epochs=1, recipe=recipe, train_missing=False)
    pool.prepare(PoolSetup(network, data.train, data.name, data.fingerprint))
    assert torch.equal(pool.load((1, 1)).theta, stores["read"].rows(1, [1])[0])
    assert stores["read"].metadata(0).accuracies == ExpertAccuracies(
        train=[0.3, 0.6111111111111112], held_out=[0.7333333333333333, 0.9833333333333333]
    )
    identity = ExpertIdentity.of(network, recipe, 4, fingerprint=data.fingerprint, dataset=data.name)
    fresh = ExpertStore(tmp_path / "fresh")
    for store in (stores["continued"], fresh):
        train_experts(network, data.train, store, identity, recipe, 3, 4, held_out=data.test, progress_bar=False)
        assert [store.epochs(id) for id in store.ids()] == [4, 4, 4]
    for id in range(3):  # another machine may round in another way
        torch.testing.assert_close(stores["continued"].rows(id, range(5)), fresh.rows(id, range(5)), rtol=0, atol=1e-4)
    for id in range(2):
        assert torch.equal(stores["continued"].rows(id, range(3)), ExpertStore(OLD).rows(id, range(3)))
