"""A checkpoint knows which run it is of: the module comes back as it was, and another run does not go on from it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from dd_lightning.execution.options import Execution
from dd_lightning.functional.errors import InputError
from dd_lightning.module import DistillationModule
from dd_lightning.objectives import GradientMatching, TrajectoryMatching
from dd_lightning.pools import NetworkPool, TrajectoryPool
from dd_lightning.trainer.settings import as_plain, from_plain
from tests import small


@dataclass(kw_only=True, eq=False)
class OwnMatching(GradientMatching):
    """Somebody's own objective."""


@pytest.mark.parametrize(
    "value",
    [
        TrajectoryMatching(syn_steps=7, execution=Execution(compile="on", micro_batch=None)),
        NetworkPool(num_networks=2, age_limit=None, recipe=small.LIVE_RECIPE),
        TrajectoryPool("store", recipe=small.RECIPE),
    ],
)
def test_plain_values_make_the_same_object(value: object) -> None:
    made = from_plain("option", as_plain(value))
    assert type(made) is type(value)
    assert as_plain(made) == as_plain(value)


def test_the_module_comes_back_as_it_was(store: Path, tmp_path: Path) -> None:
    whole = small.module(store, {"refresh": "advance"}, syn_steps=3, student_lr_floor=1e-4)
    small.fit(tmp_path, whole)
    saved = small.module(store, {"refresh": "advance"}, syn_steps=3, student_lr_floor=1e-4)
    small.fit(tmp_path, saved, small.checkpoints(tmp_path), steps=3)
    loaded = DistillationModule.load_from_checkpoint(tmp_path / "step=3.ckpt")
    assert dict(loaded.hparams) == dict(saved.hparams)
    assert (loaded.storage, loaded.optimizer, loaded.network_spec) == (saved.storage, saved.optimizer, small.NETWORK)
    assert (as_plain(loaded.objective), as_plain(loaded.pool)) == (as_plain(saved.objective), as_plain(saved.pool))
    assert small.same(small.learned(loaded), small.learned(saved))
    small.fit(tmp_path, loaded, small.checkpoints(tmp_path), ckpt_path=tmp_path / "step=3.ckpt")
    assert small.same(small.learned(loaded), small.learned(whole))


def test_weights_go_into_a_new_module(store: Path, tmp_path: Path) -> None:
    saved = small.module(store)
    small.fit(tmp_path, saved, steps=1)
    fresh = small.module(store)
    fresh.load_state_dict(saved.state_dict())
    assert small.same(small.learned(fresh), small.learned(saved))


def test_no_class_is_imported_because_a_file_names_it(tmp_path: Path) -> None:
    module = small.network_module(objective=OwnMatching(batch_real=8))
    small.fit(tmp_path, module, small.checkpoints(tmp_path), steps=1)
    path = tmp_path / "step=1.ckpt"
    with pytest.raises(InputError, match=r"objective is of class '.*:OwnMatching'.*pass objective=\.\.\. yourself"):
        DistillationModule.load_from_checkpoint(path)
    own = OwnMatching(batch_real=8)
    assert DistillationModule.load_from_checkpoint(path, objective=own).objective is own

    checkpoint = torch.load(path, weights_only=True)
    checkpoint["hyper_parameters"]["objective"] = {"class": "os:system", "command": "true"}
    checkpoint["hyper_parameters"]["pool"] = {"class": "NetworkPool", "sides": 3}
    torch.save(checkpoint, path)
    with pytest.raises(InputError, match="objective is of class 'os:system'"):
        DistillationModule.load_from_checkpoint(path)
    with pytest.raises(InputError, match=r"pool does not fit NetworkPool: .*sides"):
        DistillationModule.load_from_checkpoint(path, objective=own)


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    # options of the module, of the pool, what is said
    "momentum": ({"momentum": 0.3}, {}, r"model\.momentum is 0\.3, .* has 0\.5"),
    "objective": ({"objective": TrajectoryMatching(syn_steps=3)}, {}, r"model\.objective\.syn_steps is 3, .* has 2"),
    "window": ({}, {"max_start_epoch": 2}, r"model\.pool\.max_start_epoch is 2, .* has 3"),
    "learned or not": ({"student_lr_lr": 0.0}, {}, r"model\.student_lr_lr is 0\.0, .* has 0\.001"),
    "equal norm": ({"equal_norm": True}, {}, r"model\.equal_norm is True, .* has False"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_run_does_not_go_on(store: Path, tmp_path: Path, change: str) -> None:
    options, pool_options, said = CHANGES[change]
    small.fit(tmp_path, small.module(store), small.checkpoints(tmp_path), steps=1)
    with pytest.raises(InputError, match=f"^{said}: resume with"):
        small.fit(
            tmp_path,
            small.module(store, pool_options, **options),
            small.checkpoints(tmp_path),
            ckpt_path=tmp_path / "step=1.ckpt",
        )


def test_other_data_and_another_selection_do_not_go_on(store: Path, tmp_path: Path) -> None:
    saved = small.checkpoints(tmp_path)
    small.fit(tmp_path, small.network_module(), small.selection(num_candidates=1, temperature=0.2), saved, steps=1)
    path = tmp_path / "step=1.ckpt"
    again = (small.selection(num_candidates=1, temperature=0.3), small.checkpoints(tmp_path))
    with pytest.raises(InputError, match=r"^selection\.temperature is 0\.3, but the checkpoint's run has 0\.2: resume"):
        small.fit(tmp_path, small.network_module(), *again, ckpt_path=path)
    with pytest.raises(InputError, match=r"^selection\.class is None, .* 'TrajectorySelectionCallback'"):
        small.fit(tmp_path, small.network_module(), small.checkpoints(tmp_path), ckpt_path=path)
    again = (small.selection(num_candidates=1, temperature=0.2), small.checkpoints(tmp_path))
    with pytest.raises(InputError, match=r"^data\.fingerprint is"):
        small.fit(tmp_path, small.network_module(), *again, ckpt_path=path, datamodule=small.data(seed=7))


def test_another_learning_rate_is_applied(store: Path, tmp_path: Path) -> None:
    slow: dict[str, Any] = {"image_lr": 10.0, "momentum": 0.0}
    fast: dict[str, Any] = slow | {"image_lr": 20.0}
    small.fit(tmp_path, small.module(store, **slow), small.checkpoints(tmp_path), steps=2)
    start = DistillationModule.load_from_checkpoint(tmp_path / "step=1.ckpt").synthetic_set.images
    moved = []
    for options in (slow, fast):
        module = small.module(store, **options)
        path = tmp_path / "step=1.ckpt"
        small.fit(tmp_path / "again", module, small.checkpoints(tmp_path), steps=2, ckpt_path=path)
        moved.append((module.synthetic_set.images - start).detach())
    torch.testing.assert_close(moved[1], 2 * moved[0], rtol=1e-4, atol=1e-6)
