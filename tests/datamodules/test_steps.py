from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from dd_lightning.datamodules import DigitsDataModule, StepLoader
from dd_lightning.functional.errors import InputError

# Lightning 2.6.6 builds torch's own LeafSpec, which torch 2.14 deprecates; nothing of ours is involved.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You passed in a .val_dataloader. but have no"),  # this module evaluates no set
]


class Recorder(LightningModule):
    """One optimizer step per batch; notes what it was handed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seen: list[int] = []

    def training_step(self, batch: int, batch_idx: int) -> Tensor:
        assert isinstance(batch, int)
        assert batch == self.global_step == batch_idx
        self.seen.append(batch)
        return self.weight**2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_trainer(root: Path, **options: object) -> Trainer:
    return Trainer(
        default_root_dir=root,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,  # type: ignore[arg-type]  # passed on as they come
    )


def test_a_whole_run_sees_each_step_once(tmp_path: Path) -> None:
    module, trainer = Recorder(), make_trainer(tmp_path, max_steps=7, enable_checkpointing=False)
    trainer.fit(module, datamodule=DigitsDataModule(root=str(tmp_path)))
    assert module.seen == list(range(7))
    assert trainer.global_step == 7
    assert len(StepLoader(trainer)) == 7


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")  # each run writes its own checkpoints
@pytest.mark.parametrize(("stop", "max_steps"), [(1, 7), (3, 7), (6, 7), (7, 7), (7, 10)])
def test_a_resumed_run_sees_exactly_the_steps_that_were_left(tmp_path: Path, stop: int, max_steps: int) -> None:
    def keep_all(folder: str) -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)

    trainer = make_trainer(tmp_path, max_steps=7, callbacks=[keep_all("first")])
    trainer.fit(Recorder(), datamodule=DigitsDataModule(root=str(tmp_path)))
    checkpoint = str(tmp_path / "first" / f"step={stop}.ckpt")

    module, resumed = Recorder(), make_trainer(tmp_path, max_steps=max_steps, callbacks=[keep_all("second")])
    resumed.fit(module, datamodule=DigitsDataModule(root=str(tmp_path)), ckpt_path=checkpoint)
    assert module.seen == list(range(stop, max_steps))
    assert resumed.global_step == max_steps


def test_a_run_can_be_stopped_early_and_go_on(tmp_path: Path) -> None:
    class Stopper(Recorder):
        def on_train_batch_end(self, *_: object) -> None:
            self.trainer.should_stop = self.global_step == 4

    first, trainer = Stopper(), make_trainer(tmp_path, max_steps=9, enable_checkpointing=False)
    trainer.fit(first, datamodule=DigitsDataModule(root=str(tmp_path)))
    assert first.seen == [0, 1, 2, 3]
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")

    second, resumed = Recorder(), make_trainer(tmp_path, max_steps=9, enable_checkpointing=False)
    resumed.fit(second, datamodule=DigitsDataModule(root=str(tmp_path)), ckpt_path=str(tmp_path / "stopped.ckpt"))
    assert second.seen == [4, 5, 6, 7, 8]
    assert resumed.global_step == 9


def test_an_endless_run_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    with pytest.raises(InputError, match=r"trainer.max_steps is -1; it must be at least 1"):
        trainer.fit(Recorder(), datamodule=DigitsDataModule(root=str(tmp_path)))
    with pytest.raises(InputError, match="there is no trainer"):
        DigitsDataModule(root=str(tmp_path)).train_dataloader()
