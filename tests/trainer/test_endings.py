"""Whatever ends a run, a checkpoint of its last finished step is left, and the resumed run learns the same bits."""

import os
import signal
import warnings
import zipfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from dd_lightning.callbacks import SyntheticSetWriter
from dd_lightning.functional.errors import DivergenceError, InputError
from dd_lightning.module import DistillationModule
from dd_lightning.objectives import BidirectionalMatching
from dd_lightning.trainer.checkpoints import AtomicCheckpointIO
from dd_lightning.trainer.endings import Endings
from tests import small

Make = Callable[[Path], tuple[DistillationModule, list[Callback]]]
VARIANTS: dict[str, Make] = {
    "base": lambda store: (small.module(store), []),
    "advance, equal norm": lambda store: (
        small.module(store, {"refresh": "advance"}, equal_norm=True, image_optimizer="adam"),
        [small.selection(temperature=0.1, refresh_per_step=1)],
    ),
    "every 3": lambda store: (small.module(store), [small.selection(temperature=0.1, every_n_steps=3)]),
    "networks": lambda _: (small.network_module({"num_networks": 3, "refresh": "all"}, inner_loop=2, clamp=True), []),
    "representatives": lambda _: (
        small.network_module({"num_networks": 2}, objective=BidirectionalMatching(batch_real=8, interval=2)),
        [small.selection(num_candidates=2)],
    ),
}


class EndError(Exception):
    pass


class End(Callback):
    """Ends a run at a step, in one of its hooks."""

    def __init__(self, hook: str, step: int, how: Callable[[Trainer], None]) -> None:
        self.hook, self.step, self.how = hook, step, how

    def _end(self, hook: str, trainer: Trainer) -> None:
        if hook == self.hook and trainer.global_step == self.step:
            self.how(trainer)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:  # noqa: ANN401
        self._end("batch_start", trainer)

    def on_before_backward(self, trainer: Trainer, *_: Any) -> None:  # noqa: ANN401
        self._end("before_backward", trainer)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:  # noqa: ANN401
        self._end("batch_end", trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end("train_end", trainer)


def fail(_: Trainer) -> None:
    raise EndError


def send(number: int) -> Callable[[Trainer], None]:
    return lambda _: os.kill(os.getpid(), number)


def twice(_: Trainer) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)


def stop_early(trainer: Trainer) -> None:
    trainer.should_stop = True


ENDINGS: dict[str, tuple[str, Callable[[Trainer], None], int | None, int]] = {
    # hook, what happens there once 3 steps are finished, exit status, finished steps that are saved
    "SIGTERM within a step": ("before_backward", send(signal.SIGTERM), 143, 4),
    "SIGTERM between steps": ("batch_end", send(signal.SIGTERM), 143, 3),
    "Ctrl-C within a step": ("batch_start", send(signal.SIGINT), 130, 4),
    "Ctrl-C twice": ("before_backward", twice, 1, 3),
    "exception between steps": ("batch_end", fail, None, 3),
    "exception at the start of a step": ("batch_start", fail, None, 3),
    "exception within a step": ("before_backward", fail, None, 3),
    "stopped early": ("batch_end", stop_early, 0, 3),
}


def checkpointing(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=100)


@pytest.fixture(scope="module")
def uninterrupted(store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tensor, ...]]:
    learned: dict[str, tuple[Tensor, ...]] = {}
    for name, make in VARIANTS.items():
        module, callbacks = make(store)
        small.fit(tmp_path_factory.mktemp("uninterrupted"), module, *callbacks)
        learned[name] = small.learned(module)
    return learned


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_ending_leaves_the_last_finished_step(
    store: Path, tmp_path: Path, uninterrupted: dict[str, tuple[Tensor, ...]], variant: str, ending: str
) -> None:
    hook, how, status, finished = ENDINGS[ending]
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    module, callbacks = VARIANTS[variant](store)
    callbacks += [End(hook, 3, how), checkpointing(tmp_path), SyntheticSetWriter()]
    if status == 0:
        small.fit(tmp_path, module, *callbacks)
    elif status is None:
        with pytest.raises(EndError):
            small.fit(tmp_path, module, *callbacks)
    else:
        with pytest.raises(SystemExit) as ended:
            small.fit(tmp_path, module, *callbacks)
        assert ended.value.code == status
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before
    assert [path.name for path in tmp_path.glob("*.ckpt")] == [f"step={finished}.ckpt"]
    assert (tmp_path / "synthetic.safetensors").exists()

    resumed, callbacks = VARIANTS[variant](store)
    callbacks += [checkpointing(tmp_path)]
    runner = small.fit(tmp_path, resumed, *callbacks, ckpt_path=tmp_path / f"step={finished}.ckpt")
    assert runner.global_step == 6
    assert small.same(small.learned(resumed), uninterrupted[variant])
    # Lightning never removes the checkpoint that was resumed
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {f"step={finished}.ckpt", "step=6.ckpt"}


def test_lightnings_own_checkpoint_resumes_and_is_extended(
    store: Path, tmp_path: Path, uninterrupted: dict[str, tuple[Tensor, ...]]
) -> None:
    def fit(steps: int, path: Path | None = None, *callbacks: Callback) -> tuple[DistillationModule, Path]:
        module, own = small.module(store), ModelCheckpoint()
        runner = small.fit(tmp_path, module, own, *callbacks, steps=steps, ckpt_path=path, max_epochs=1)
        assert runner.global_step == steps
        return module, Path(own.best_model_path)

    _, path = fit(2)
    stopped = ModelCheckpoint()
    with pytest.raises(EndError):
        small.fit(tmp_path, small.module(store), stopped, End("batch_end", 4, fail), ckpt_path=path, max_epochs=1)
    module, path = fit(6, Path(stopped.best_model_path))
    assert small.same(small.learned(module), uninterrupted["base"])
    assert small.same(small.learned(fit(6, path)[0]), uninterrupted["base"])  # and nothing is left to do


def test_max_time_is_that_of_each_fit(store: Path, tmp_path: Path) -> None:
    def run(ckpt_path: Path | None) -> int:
        own, second = small.checkpoints(tmp_path, 10**6), timedelta(seconds=0.5)
        runner = small.fit(tmp_path, small.module(store), own, steps=10**6, max_time=second, ckpt_path=ckpt_path)
        return runner.global_step

    reached = run(None)
    assert run(tmp_path / f"step={reached}.ckpt") > reached


def test_sigusr1_saves_and_goes_on(store: Path, tmp_path: Path) -> None:
    module, end = small.module(store), End("before_backward", 3, send(signal.SIGUSR1))
    own = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=100, save_top_k=-1)
    assert small.fit(tmp_path, module, end, own).global_step == 6
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {"step=4.ckpt", "step=6.ckpt"}


def test_a_monitored_checkpoint_is_not_disturbed(store: Path, tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, filename="best", monitor="loss", every_n_train_steps=2)
    small.fit(tmp_path, small.module(store), best, steps=5)
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {"best.ckpt", "step=5.ckpt"}


def test_a_run_stopped_in_its_closing_evaluation_is_completed(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run(folder: Path, *extra: Callback, ckpt_path: Path | None = None) -> Any:  # noqa: ANN401
        evaluation = small.evaluation(every_n_steps=4, compare_random=True)
        callbacks = [evaluation, SyntheticSetWriter(), checkpointing(folder), *extra]
        small.fit(folder, small.module(store), *callbacks, ckpt_path=ckpt_path)
        return evaluation

    whole = run(tmp_path / "whole")
    with pytest.raises(EndError):
        run(tmp_path / "cut", End("train_end", 6, fail))
    warnings.filterwarnings("ignore", "The dirpath has changed")
    with caplog.at_level("INFO"):
        resumed = run(tmp_path / "resumed", ckpt_path=tmp_path / "cut" / "step=6.ckpt")
    assert "taken 6 steps, max_steps is 6: nothing is left to train" in caplog.text
    assert [point.accuracies for point in resumed.points] == [point.accuracies for point in whole.points]
    assert [point.step for point in resumed.points] == [0, 4, 6]
    assert resumed.random_real.accuracies == whole.random_real.accuracies
    assert (tmp_path / "resumed" / "synthetic.safetensors").exists()


def test_a_run_stopped_in_an_evaluation_makes_up_for_it(store: Path, tmp_path: Path) -> None:
    whole, cut, resumed = small.evaluation(), small.evaluation(), small.evaluation()
    small.fit(tmp_path / "whole", small.module(store), whole)
    with pytest.raises(EndError):
        small.fit(tmp_path, small.module(store), End("batch_end", 4, fail), cut, checkpointing(tmp_path))
    small.fit(tmp_path, small.module(store), resumed, checkpointing(tmp_path), ckpt_path=tmp_path / "step=4.ckpt")
    assert [(p.step, p.accuracies) for p in resumed.points] == [(p.step, p.accuracies) for p in whole.points]


def test_a_diverged_run_keeps_what_it_has(store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def spoil(trainer: Trainer) -> None:
        module = trainer.lightning_module
        assert isinstance(module, DistillationModule)
        module.synthetic_set.images.data.fill_(float("nan"))

    own = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2)
    with pytest.raises(DivergenceError, match="not finite at step 3"), caplog.at_level("INFO"):
        small.fit(tmp_path, small.module(store), own, End("batch_end", 3, spoil), SyntheticSetWriter(every_n_steps=2))
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["step=2.ckpt"]
    assert f"DivergenceError at step 3; resume with ckpt_path {tmp_path / 'step=2.ckpt'}" in caplog.text


@pytest.mark.parametrize(
    ("option", "value"), [("save_weights_only", True), ("save_top_k", 0), ("every_n_train_steps", 0)]
)
def test_checkpoints_that_resume_nothing_are_refused(store: Path, tmp_path: Path, option: str, value: object) -> None:
    options: dict[str, Any] = {option: value}
    own = ModelCheckpoint(tmp_path, **options)
    with pytest.raises(InputError, match=rf"checkpoint\.{option} is {str(value).lower()}"):
        small.fit(tmp_path, small.module(store), own)


@pytest.mark.parametrize("option", ["max_steps", "max_epochs", "limit_train_batches"])
def test_no_steps_are_refused(store: Path, tmp_path: Path, option: str) -> None:
    options: dict[str, Any] = {"steps" if option == "max_steps" else option: 0}
    with pytest.raises(InputError, match=rf"trainer\.{option} is 0"):
        small.fit(tmp_path, small.module(store), **options)


def test_checkpoints_are_checked_and_put_in_place_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "a.ckpt"
    content = {"distillation": {"x": torch.arange(1000.0)}, "state_dict": {}}
    io.save_checkpoint(content, path)
    assert torch.equal(io.load_checkpoint(path)["distillation"]["x"], content["distillation"]["x"])
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]

    raw = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        data = next(each for each in archive.infolist() if each.file_size == 4000)
    raw[data.header_offset + 500] ^= 1  # one bit of one number
    path.write_bytes(raw)
    assert torch.load(path, weights_only=True) is not None
    with pytest.raises(InputError, match=r"ckpt_path is .*a\.ckpt.*checksum"):
        io.load_checkpoint(path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    path.write_bytes(b"the old one")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"a\.ckpt: No space left"):
        io.save_checkpoint(content, path)
    assert path.read_bytes() == b"the old one"
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_trainer_is_watched_once(store: Path, tmp_path: Path) -> None:
    module = small.module(store)
    runner = small.fit(tmp_path, module, steps=2)
    runner.fit_loop.epoch_loop.max_steps = 4
    runner.fit(module, datamodule=small.data())
    assert sum(isinstance(each, Endings) for each in runner.callbacks) == 1  # type: ignore[attr-defined]
    assert isinstance(runner.strategy.checkpoint_io, AtomicCheckpointIO)
